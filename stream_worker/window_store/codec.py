"""Windows as bytes: msgpack, with the revision of its layout in each record.

A window names its event types and their fields once; an event is its distance in time from the
one before it, the number of its type, its id, and the values in the order of the names. What
follows from a chapter's events is not stored beside them. A record of an older revision is read,
and written in the newest one with its window's next change.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from llm4es.errors import LLM4ESError
from llm4es.events import Event, EventKey, FieldValue
from llm4es.windows import Chapter, SealedHistory, Window

__all__ = ["decode_window", "encode_window"]

_REVISION: Final = 2
_EPOCH: Final = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
_MICROSECOND: Final = timedelta(microseconds=1)

_Key = tuple[int, str, str]  # µs since 1970, type, event id
_Type = tuple[str, list[str]]  # its name, and its fields'


class _Revision(msgspec.Struct, array_like=True, frozen=True):
    revision: int


class _Chapter(msgspec.Struct, array_like=True, frozen=True):
    events: list[list[Any]]  # [µs since the last one before it, type's number, id, *values]
    forgotten: tuple[_Key, _Key, int] | None  # first, last and count, where there are no events
    tokens: int
    ids_hash: bytes | None
    sums: bytes | None


class _Sealed(msgspec.Struct, array_like=True, frozen=True):
    chapters: int
    count: int
    sums: bytes


class _Window(msgspec.Struct, array_like=True, frozen=True):
    revision: int
    topic: str | None
    partition: int | None
    next_offset: int
    as_of: int | None
    sealed: _Sealed | None
    types: list[_Type]
    chapters: list[_Chapter]


class _Event1(msgspec.Struct, array_like=True, frozen=True):
    key: _Key
    fields: dict[str, Any]


class _Chapter1(msgspec.Struct, array_like=True, frozen=True):
    events: list[_Event1]
    first: _Key
    last: _Key
    count: int
    tokens: int
    ids_hash: bytes | None
    sums: bytes | None


class _Window1(msgspec.Struct, array_like=True, frozen=True):
    revision: int
    topic: str | None
    partition: int | None
    next_offset: int
    as_of: int | None
    sealed: _Sealed | None
    chapters: list[_Chapter1]


_encoder = msgspec.msgpack.Encoder()
_revision_decoder = msgspec.msgpack.Decoder(_Revision)
_decoder = msgspec.msgpack.Decoder(_Window)
_decoder_1 = msgspec.msgpack.Decoder(_Window1)


def encode_window(window: Window) -> bytes:
    """Everything but entity id and version, which the stores keep beside it."""
    sealed = window.sealed
    types: dict[tuple[str, tuple[str, ...]], int] = {}
    chapters = [_pack_chapter(chapter, types) for chapter in window.chapters]
    return _encoder.encode(
        _Window(
            revision=_REVISION,
            topic=window.topic,
            partition=window.partition,
            next_offset=window.next_offset,
            as_of=None if window.as_of is None else _to_us(window.as_of),
            sealed=None
            if sealed is None
            else _Sealed(sealed.chapters, sealed.count, _pack_sums(sealed.sums)),
            types=[(name, list(fields)) for name, fields in types],
            chapters=chapters,
        )
    )


def decode_window(entity_id: str, version: int, data: bytes) -> Window:
    """Rebuild a window. Raises LLM4ESError for a record this code cannot read."""
    try:
        revision = _revision_decoder.decode(data).revision
        if revision not in _READERS:
            msg = (
                f"a stored window has revision {revision}, this code reads {min(_READERS)} to "
                f"{_REVISION}; start a fresh window store (another --window-store), or run the "
                "version that wrote it"
            )
            raise LLM4ESError(msg)
        found, chapters = _READERS[revision](entity_id, data)
    except (msgspec.DecodeError, LookupError, ValueError, TypeError) as error:
        msg = f"a stored window cannot be read ({error}); start a fresh window store"
        raise LLM4ESError(msg) from error
    sealed = found.sealed
    return Window(
        entity_id=entity_id,
        version=version,
        topic=found.topic,
        partition=found.partition,
        next_offset=found.next_offset,
        as_of=None if found.as_of is None else _from_us(found.as_of),
        sealed=None
        if sealed is None
        else SealedHistory(
            chapters=sealed.chapters, count=sealed.count, sums=_unpack_sums(sealed.sums)
        ),
        chapters=chapters,
    )


def _pack_chapter(chapter: Chapter, types: dict[tuple[str, tuple[str, ...]], int]) -> _Chapter:
    events = []
    before = 0
    for event in chapter.events:
        moment = _to_us(event.occurred_at)
        number = types.setdefault((event.type, tuple(event.fields)), len(types))
        events.append([moment - before, number, event.event_id, *event.fields.values()])
        before = moment
    return _Chapter(
        events=events,
        forgotten=None
        if events
        else (_pack_key(chapter.first), _pack_key(chapter.last), chapter.count),
        tokens=chapter.tokens,
        ids_hash=chapter.ids_hash,
        sums=None if chapter.sums is None else _pack_sums(chapter.sums),
    )


def _read_2(entity_id: str, data: bytes) -> tuple[_Window, tuple[Chapter, ...]]:
    found = _decoder.decode(data)
    return found, tuple(_unpack_chapter(entity_id, each, found.types) for each in found.chapters)


def _unpack_chapter(entity_id: str, chapter: _Chapter, types: Sequence[_Type]) -> Chapter:
    events = tuple(_unpack_events(entity_id, chapter.events, types))
    if chapter.forgotten is not None:
        first, last, count = chapter.forgotten
        ends = (_unpack_key(first), _unpack_key(last))
    else:
        ends, count = (events[0].key, events[-1].key), len(events)
    return Chapter(
        events=events,
        first=ends[0],
        last=ends[1],
        count=count,
        tokens=chapter.tokens,
        ids_hash=chapter.ids_hash,
        sums=None if chapter.sums is None else _unpack_sums(chapter.sums),
    )


def _unpack_events(
    entity_id: str, events: Sequence[list[Any]], types: Sequence[_Type]
) -> Iterator[Event]:
    moment = 0
    for distance, number, event_id, *values in events:
        moment += distance
        name, fields = types[number]
        yield Event(
            entity_id=entity_id,
            occurred_at=_from_us(moment),
            type=name,
            event_id=event_id,
            fields=MappingProxyType(dict(zip(fields, map(_unpack_value, values), strict=True))),
        )


def _read_1(entity_id: str, data: bytes) -> tuple[_Window1, tuple[Chapter, ...]]:
    """Read the first layout, in which every event had its fields by name."""
    found = _decoder_1.decode(data)
    return found, tuple(
        Chapter(
            events=tuple(
                Event(
                    entity_id=entity_id,
                    occurred_at=_from_us(event.key[0]),
                    type=event.key[1],
                    event_id=event.key[2],
                    fields=MappingProxyType(
                        {name: _unpack_value(value) for name, value in event.fields.items()}
                    ),
                )
                for event in chapter.events
            ),
            first=_unpack_key(chapter.first),
            last=_unpack_key(chapter.last),
            count=chapter.count,
            tokens=chapter.tokens,
            ids_hash=chapter.ids_hash,
            sums=None if chapter.sums is None else _unpack_sums(chapter.sums),
        )
        for chapter in found.chapters
    )


_Reader = Callable[[str, bytes], tuple[_Window | _Window1, tuple[Chapter, ...]]]
_READERS: Final[dict[int, _Reader]] = {1: _read_1, 2: _read_2}


def _pack_sums(sums: NDArray[np.float64]) -> bytes:
    return sums.astype("<f8").tobytes()


def _unpack_sums(data: bytes) -> NDArray[np.float64]:
    return np.frombuffer(data, dtype="<f8").astype(np.float64, copy=False)


def _pack_key(key: EventKey) -> _Key:
    return (_to_us(key[0]), key[1], key[2])


def _unpack_key(key: _Key) -> EventKey:
    return (_from_us(key[0]), key[1], key[2])


def _unpack_value(value: FieldValue | list[str]) -> FieldValue:
    return tuple(value) if isinstance(value, list) else value


def _to_us(moment: datetime) -> int:
    return (moment - _EPOCH) // _MICROSECOND


def _from_us(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)

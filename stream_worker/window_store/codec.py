"""Windows as bytes: msgpack, with the revision of its layout in each record."""

from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from llm4es.errors import LLM4ESError
from llm4es.events import Event, EventKey, FieldValue
from llm4es.windows import Chapter, SealedHistory, Window

__all__ = ["decode_window", "encode_window"]

_REVISION: Final = 1
_EPOCH: Final = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
_MICROSECOND: Final = timedelta(microseconds=1)

_Key = tuple[int, str, str]  # µs since 1970, type, event id
_Value = str | int | float | bool | list[str] | None


class _Event(msgspec.Struct, array_like=True, frozen=True):
    key: _Key
    fields: dict[str, _Value]


class _Chapter(msgspec.Struct, array_like=True, frozen=True):
    events: list[_Event]
    first: _Key
    last: _Key
    count: int
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
    chapters: list[_Chapter]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Window)


def encode_window(window: Window) -> bytes:
    """Everything but entity id and version, which the stores keep beside it."""
    sealed = window.sealed
    return _encoder.encode(
        _Window(
            revision=_REVISION,
            topic=window.topic,
            partition=window.partition,
            next_offset=window.next_offset,
            as_of=None if window.as_of is None else _to_us(window.as_of),
            sealed=None
            if sealed is None
            else _Sealed(sealed.chapters, sealed.count, sealed.sums.astype("<f8").tobytes()),
            chapters=[_pack_chapter(chapter) for chapter in window.chapters],
        )
    )


def decode_window(entity_id: str, version: int, data: bytes) -> Window:
    """Rebuild a window. Raises LLM4ESError for a record this code cannot read."""
    try:
        found = _decoder.decode(data)
    except msgspec.DecodeError as error:
        msg = f"a stored window cannot be read ({error}); start a fresh window store"
        raise LLM4ESError(msg) from error
    if found.revision != _REVISION:
        msg = (
            f"a stored window has revision {found.revision}, this code reads {_REVISION}; start a "
            "fresh window store (another --window-store), or run the version that wrote it"
        )
        raise LLM4ESError(msg)
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
        else SealedHistory(chapters=sealed.chapters, count=sealed.count, sums=_sums(sealed.sums)),
        chapters=tuple(_unpack_chapter(entity_id, chapter) for chapter in found.chapters),
    )


def _pack_chapter(chapter: Chapter) -> _Chapter:
    return _Chapter(
        events=[
            _Event(_pack_key(event.key), {k: _pack_value(v) for k, v in event.fields.items()})
            for event in chapter.events
        ],
        first=_pack_key(chapter.first),
        last=_pack_key(chapter.last),
        count=chapter.count,
        tokens=chapter.tokens,
        ids_hash=chapter.ids_hash,
        sums=None if chapter.sums is None else chapter.sums.astype("<f8").tobytes(),
    )


def _unpack_chapter(entity_id: str, chapter: _Chapter) -> Chapter:
    return Chapter(
        events=tuple(
            Event(
                entity_id=entity_id,
                occurred_at=_from_us(event.key[0]),
                type=event.key[1],
                event_id=event.key[2],
                fields=MappingProxyType({k: _unpack_value(v) for k, v in event.fields.items()}),
            )
            for event in chapter.events
        ),
        first=_unpack_key(chapter.first),
        last=_unpack_key(chapter.last),
        count=chapter.count,
        tokens=chapter.tokens,
        ids_hash=chapter.ids_hash,
        sums=None if chapter.sums is None else _sums(chapter.sums),
    )


def _sums(data: bytes) -> NDArray[np.float64]:
    return np.frombuffer(data, dtype="<f8").astype(np.float64, copy=False)


def _pack_key(key: EventKey) -> _Key:
    return (_to_us(key[0]), key[1], key[2])


def _unpack_key(key: _Key) -> EventKey:
    return (_from_us(key[0]), key[1], key[2])


def _pack_value(value: FieldValue) -> _Value:
    return list(value) if isinstance(value, tuple) else value


def _unpack_value(value: _Value) -> FieldValue:
    return tuple(value) if isinstance(value, list) else value


def _to_us(moment: datetime) -> int:
    return (moment - _EPOCH) // _MICROSECOND


def _from_us(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)

"""Rows in Feast's own online encoding, and the portable way to write them.

Every value is the wire form of Feast's `Value` message. A vector's is a header and the array's
own bytes: 1 microsecond where building a `FloatList` takes 114 at 384 dimensions, same bytes.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from struct import Struct
from types import MappingProxyType
from typing import Final, Protocol

import numpy as np
from feast import FeatureStore, FeatureView
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from numpy.typing import NDArray

from llm4es.deletion import Tombstone
from llm4es.errors import ConfigError, SinkRejected, SinkUnavailable
from llm4es.events import EPOCH, entity_hash
from llm4es.features import FeatureRow

__all__ = [
    "NO_MARKS",
    "Marks",
    "OnlineRows",
    "PortableRows",
    "ViewTarget",
    "encode_float",
    "encode_integer",
    "encode_nanos",
    "encode_row",
    "encode_seconds",
    "encode_text",
    "encode_timestamp",
    "encode_unix_timestamp",
    "encode_vector",
    "text_header",
    "vector_header",
]

log = logging.getLogger(__name__)

Marks = Mapping[str, int]  # what an online store notes of a topic: a number by name
NO_MARKS: Final[Marks] = MappingProxyType({})

_LENGTH_DELIMITED = 2
_FLOAT_LIST_TAG = Value.DESCRIPTOR.fields_by_name["float_list_val"].number << 3 | _LENGTH_DELIMITED
_FLOATS_TAG = 1 << 3 | _LENGTH_DELIMITED  # FloatList.val, packed
_CONTINUES = 0x80
_64_BITS = 2**64 - 1
_FLOAT = Struct("<f")
_SECONDS_TAG, _NANOS_TAG = b"\x08", b"\x10"
# A tag is what stands in front of a value's own bytes, or of its length.
_FLOAT_TAG = Value(float_val=1).SerializeToString()[:-4]
_INTEGER_TAG = Value(int64_val=1).SerializeToString()[:-1]
_TIME_TAG = Value(unix_timestamp_val=1).SerializeToString()[:-1]
_TEXT_TAG = Value(string_val="x").SerializeToString()[:-2]
_REMEMBERED = 1_000_000  # entities whose newest `as_of` the portable guard keeps
_Written = tuple[EntityKey, dict[str, Value], datetime, datetime | None]
_OURS = (AttributeError, KeyError, NotImplementedError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class ViewTarget:
    """Where rows go: a feature view of a store, as Feast loaded them."""

    store: FeatureStore
    view: FeatureView
    join_key: str
    # Whether the registry calls the join key a feature, too. Feast does, of a stream feature view
    # that it has read back, and its own writes fill it: a row of ours that left it out would leave
    # a value, and a timestamp, of an older row behind.
    key_is_feature: bool = field(init=False)

    def __post_init__(self) -> None:
        found = any(feature.name == self.join_key for feature in self.view.features)
        object.__setattr__(self, "key_is_feature", found)

    def entity_key(self, entity_id: str) -> EntityKey:
        """Feast's key of an entity."""
        return EntityKey(join_keys=[self.join_key], entity_values=[Value(string_val=entity_id)])


class OnlineRows(Protocol):
    """Writes rows of one view, at most one per entity and call, newer over older only."""

    def write(
        self,
        rows: Sequence[FeatureRow],
        *,
        topic: str = "",
        held: Marks = NO_MARKS,
        ahead: Marks = NO_MARKS,
    ) -> list[str]:
        """Give the ids of entities that have a newer row already; theirs was not written.

        Every other row is readable on return. A row with the timestamp that stands changes
        nothing. Behind the rows the marks of a topic move up to `ahead`, none back. Raises
        SinkUnavailable, SinkRejected, StoreLost where less than `held` is noted.
        """
        ...

    def marks(self, topic: str) -> Marks | None:
        """What is noted of a topic; None where the store cannot note anything."""
        ...

    def delete(self, tombstones: Sequence[Tombstone], *, guard_s: float) -> None:
        """Take the values of rows at or before each `as_of`; leave `as_of` as their timestamp.

        It stays for at least `guard_s` seconds, and keeps older rows from being written, be there
        a row now or not. A newer row stays as it is. Raises SinkUnavailable, SinkRejected.
        """
        ...

    def replace(self, rows: Sequence[FeatureRow], seen: Sequence[datetime | None]) -> list[str]:
        """Write each row over the one of the timestamp that was seen, be it newer or older.

        Gives the entities where another one stands by now. Raises as `write`, and ConfigError
        where the store cannot compare.
        """
        ...

    def as_of(self, entity_ids: Sequence[str]) -> list[datetime | None]:
        """Timestamps of rows that stand or were deleted, as exact as the store knows them."""
        ...

    def sync(self) -> None:
        """Return when what was written survives a power cut, where that is ours to say."""
        ...

    def close(self) -> None:
        """Release the connection."""
        ...


def encode_vector(vector: NDArray[np.float32]) -> bytes:
    """Encode (n,) float32 as the wire form of Value(float_list_val=FloatList(val=vector))."""
    data = np.ascontiguousarray(vector, dtype="<f4").tobytes()
    return vector_header(len(data)) + data


@lru_cache(maxsize=64)
def vector_header(size: int) -> bytes:
    """What stands in front of a vector's own `size` bytes."""
    inner = bytes([_FLOATS_TAG]) + _varint(size) if size else b""
    return _varint(_FLOAT_LIST_TAG) + _varint(len(inner) + size) + inner


def encode_row(row: FeatureRow, target: ViewTarget) -> dict[str, bytes]:
    """Wire form of each feature of a row, by name: what `Value.SerializeToString` would give."""
    values = {
        "embedding": encode_vector(row.embedding),
        "surprise": encode_vector(row.surprise),
        "surprise_last": encode_float(row.surprise_last),
        "event_count": encode_integer(row.event_count),
        "last_event_id": encode_text(row.last_event_id),
        "last_event_time": encode_unix_timestamp(int(row.last_event_time.timestamp())),
        "bundle_id": encode_text(row.bundle_id),
    }
    if target.key_is_feature:
        values[target.join_key] = encode_text(row.entity_id)
    return values


def encode_float(number: float) -> bytes:
    """Wire form of Value(float_val=number)."""
    encoded: bytes = _FLOAT_TAG + _FLOAT.pack(number)
    return encoded


def encode_integer(number: int) -> bytes:
    """Wire form of Value(int64_val=number)."""
    encoded: bytes = _INTEGER_TAG + _varint(number)
    return encoded


def encode_unix_timestamp(seconds: int) -> bytes:
    """Wire form of Value(unix_timestamp_val=seconds)."""
    encoded: bytes = _TIME_TAG + _varint(seconds)
    return encoded


def encode_text(text: str) -> bytes:
    """Wire form of Value(string_val=text)."""
    encoded = text.encode()
    return text_header(len(encoded)) + encoded


def text_header(size: int) -> bytes:
    """What stands in front of a text's own `size` bytes."""
    header: bytes = _TEXT_TAG + _varint(size)
    return header


def encode_timestamp(moment: datetime) -> tuple[int, int, bytes]:
    """Seconds and nanoseconds since 1970, and the wire form of that Timestamp."""
    since = moment - EPOCH
    seconds, nanos = since.days * 86_400 + since.seconds, since.microseconds * 1_000
    return seconds, nanos, encode_seconds(seconds) + encode_nanos(nanos)


def encode_seconds(seconds: int) -> bytes:
    """Wire form of a Timestamp's seconds."""
    return _SECONDS_TAG + _varint(seconds) if seconds else b""


def encode_nanos(nanos: int) -> bytes:
    """Wire form of a Timestamp's nanoseconds, which stand behind its seconds."""
    return _NANOS_TAG + _varint(nanos) if nanos else b""


class PortableRows:
    """Any Feast online store, through its own `online_write_batch`.

    Most stores let an older row overwrite a newer one, so what this process wrote, or found when
    it first met an entity, is remembered. That guards against this process alone: one writer.
    """

    def __init__(self, target: ViewTarget) -> None:
        self._target = target
        self._provider = target.store._get_provider()  # noqa: SLF001 - Feast has no public way
        self._newest: OrderedDict[str, datetime] = OrderedDict()
        log.warning(
            "online store %s: order of rows is kept for one writer only; run one worker, or use "
            "Redis",
            target.store.config.online_store.type,
        )
        self.as_of(["any"])  # a store that is away says so at start

    def write(
        self,
        rows: Sequence[FeatureRow],
        *,
        topic: str = "",  # noqa: ARG002 - a store that is not ours to know takes no marks
        held: Marks = NO_MARKS,  # noqa: ARG002
        ahead: Marks = NO_MARKS,  # noqa: ARG002
    ) -> list[str]:
        """See OnlineRows."""
        self._meet([row.entity_id for row in rows])
        fresh = [row for row in rows if self._is_newer(row)]
        data: list[_Written] = [
            (
                self._target.entity_key(row.entity_id),
                {
                    name: Value.FromString(value)
                    for name, value in encode_row(row, self._target).items()
                },
                row.as_of,
                None,
            )
            for row in fresh
        ]
        self._write(data)
        if data:
            self._verify(fresh)
        return [row.entity_id for row in rows if row.as_of < self._newest[row.entity_id]]

    def marks(self, topic: str) -> Marks | None:  # noqa: ARG002
        """Nothing: see OnlineRows."""
        return None

    def delete(self, tombstones: Sequence[Tombstone], *, guard_s: float) -> None:  # noqa: ARG002
        """See OnlineRows. Timestamps stay for good: Feast has no way to take one row out."""
        self._meet([each.entity_id for each in tombstones])
        due = [
            each
            for each in tombstones
            if (newest := self._newest.get(each.entity_id)) is None or newest <= each.as_of
        ]
        names = [feature.name for feature in self._target.view.features]
        self._write(
            [
                (
                    self._target.entity_key(each.entity_id),
                    {name: Value() for name in names},
                    each.as_of,
                    None,
                )
                for each in due
            ]
        )
        for each in due:
            self._newest[each.entity_id] = each.as_of

    def replace(self, rows: Sequence[FeatureRow], seen: Sequence[datetime | None]) -> list[str]:  # noqa: ARG002
        """Refuse: nothing here can be compared and written at once."""
        raise ConfigError(
            "repair", "this online store cannot compare before it writes", "use Redis or SQLite"
        )

    def as_of(self, entity_ids: Sequence[str]) -> list[datetime | None]:
        """See OnlineRows."""
        keys = [self._target.entity_key(entity_id) for entity_id in entity_ids]
        if not keys:
            return []
        try:
            found = self._provider.online_read(
                self._target.store.config, self._target.view, keys, ["bundle_id"]
            )
        except _OURS as error:
            raise SinkRejected(f"online store: {error!r}") from error
        except Exception as error:
            raise SinkUnavailable(f"online store: {error!r}") from error
        return [
            None if moment is None or not values else moment.replace(tzinfo=UTC)
            for moment, values in found
        ]

    def sync(self) -> None:
        """Nothing: durability is the store's."""

    def close(self) -> None:
        """Nothing is held."""

    def _write(self, data: "list[_Written]") -> None:
        if not data:
            return
        try:
            self._provider.online_write_batch(
                self._target.store.config, self._target.view, data, None
            )
        except _OURS as error:
            raise SinkRejected(f"online store: {error!r}") from error
        except Exception as error:
            # Each vendor has errors of its own.
            raise SinkUnavailable(f"online store: {error!r}") from error

    def _meet(self, entity_ids: Sequence[str]) -> None:
        unknown = [entity_id for entity_id in entity_ids if entity_id not in self._newest]
        for entity_id, moment in zip(unknown, self.as_of(unknown), strict=True):
            if moment is not None:
                self._newest[entity_id] = moment

    def _is_newer(self, row: FeatureRow) -> bool:
        newest = self._newest.get(row.entity_id)
        return newest is None or row.as_of > newest

    def _verify(self, rows: Sequence[FeatureRow]) -> None:
        standing = self.as_of([row.entity_id for row in rows])
        for row, moment in zip(rows, standing, strict=True):
            # Some stores keep whole seconds.
            if moment is None or moment < row.as_of.replace(microsecond=0):
                entity = entity_hash(row.entity_id)
                raise SinkRejected(f"online store: entity {entity} is not there after writing it")
            self._newest[row.entity_id] = row.as_of
            self._newest.move_to_end(row.entity_id)
        while len(self._newest) > _REMEMBERED:
            self._newest.popitem(last=False)


_SHORT = [bytes([number]) for number in range(_CONTINUES)]
_FIVE_BYTES = range(2**28, 2**35)  # seconds of today, and most of a second's nanoseconds


def _varint(number: int) -> bytes:
    if 0 <= number < _CONTINUES:
        return _SHORT[number]
    if number in _FIVE_BYTES:
        return bytes(
            (
                number & 0x7F | _CONTINUES,
                number >> 7 & 0x7F | _CONTINUES,
                number >> 14 & 0x7F | _CONTINUES,
                number >> 21 & 0x7F | _CONTINUES,
                number >> 28,
            )
        )
    number &= _64_BITS  # a negative one, in two's complement
    encoded = bytearray()
    while number >= _CONTINUES:
        encoded.append(number % _CONTINUES | _CONTINUES)
        number //= _CONTINUES
    encoded.append(number)
    return bytes(encoded)

"""Rows as the one string that the script of `redis_rows` takes apart.

MessagePack, which Redis' Lua reads by itself, of what stands in a row's hash: fields and values in
turns, the timestamp's first. What is the same in many rows is made once.
"""

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llm4es.events import EPOCH
from llm4es.feast.online import (
    ViewTarget,
    encode_float,
    encode_integer,
    encode_nanos,
    encode_seconds,
    encode_text,
    encode_unix_timestamp,
    text_header,
    vector_header,
)
from llm4es.features import FeatureRow

__all__ = ["RowPacker"]

_FIXED, _16_BITS, _32_BITS = 0xA0, 0xDA, 0xDB  # a string's length; all that Redis' Lua knows of
_FIXED_LIMIT, _16_BITS_LIMIT = 32, 2**16
_GUARD = struct.Struct(">BQBIBI")  # seconds u64, nanoseconds u32, where its row begins u32
_U64, _U32 = 0xCF, 0xCE
_FLOATS = np.dtype("<f4")


class RowPacker:
    """Packs rows of one view, whose fields in Redis are `fields` by feature, and `timestamp`."""

    def __init__(
        self, target: ViewTarget, fields: Mapping[str, bytes], timestamp_field: bytes
    ) -> None:
        names = {name: _string(field) for name, field in fields.items()}
        self._timestamp = _string(timestamp_field)
        self._names = tuple(
            names[name]
            for name in (
                *("embedding", "surprise", "surprise_last", "event_count", "last_event_id"),
                *("last_event_time", "bundle_id"),
            )
        )
        self._key = names[target.join_key] if target.key_is_feature else None
        self.width = 2 * (1 + len(self._names) + (self._key is not None))  # strings of a row

    def pack(self, rows: Sequence[FeatureRow]) -> tuple[bytes, bytes]:
        """Give the guards (seconds, nanoseconds, offset of each row, as numbers) and the rows."""
        timestamp, key = self._timestamp, self._key
        embedding, surprise, last, count, event, event_time, bundle = self._names
        guards, packed, at = [], [], 0
        for row in rows:
            since = row.as_of - EPOCH
            seconds = since.days * 86_400 + since.seconds
            nanos = since.microseconds * 1_000
            moment = _seconds(seconds) + encode_nanos(nanos)
            event_id = row.last_event_id.encode()
            vector, more = row.embedding, row.surprise
            joined = b"".join(
                (
                    timestamp,
                    _HEADS[len(moment)],
                    moment,
                    _vector_head(embedding, vector.size),
                    vector.tobytes() if vector.dtype is _FLOATS else _converted(vector),
                    _vector_head(surprise, more.size),
                    more.tobytes() if more.dtype is _FLOATS else _converted(more),
                    last,
                    _FLOAT_HEAD,
                    encode_float(row.surprise_last),
                    _integer(count, row.event_count),
                    _text_head(event, len(event_id)),
                    event_id,
                    _unix_timestamp(event_time, int(row.last_event_time.timestamp())),
                    _text(bundle, row.bundle_id),
                )
            )
            if key is not None:
                entity_id = row.entity_id.encode()
                joined += _text_head(key, len(entity_id)) + entity_id
            guards.append(_GUARD.pack(_U64, seconds, _U32, nanos, _U32, at))
            packed.append(joined)
            at += len(joined)
        return b"".join(guards), b"".join(packed)


def _converted(vector: NDArray[np.float32]) -> bytes:
    return vector.astype(_FLOATS).tobytes()


def _head(length: int) -> bytes:
    if length < _FIXED_LIMIT:
        return bytes((_FIXED | length,))
    if length < _16_BITS_LIMIT:
        return struct.pack(">BH", _16_BITS, length)
    return struct.pack(">BI", _32_BITS, length)


def _string(content: bytes) -> bytes:
    return _head(len(content)) + content


_HEADS = [_head(length) for length in range(_FIXED_LIMIT)]
_FLOAT_HEAD = _head(len(encode_float(0)))
_seconds = lru_cache(maxsize=4096)(encode_seconds)


# Each of these gives a field's name, too: what stands before it is the same in every row.


@lru_cache(maxsize=64)
def _vector_head(name: bytes, size: int) -> bytes:
    """What stands in front of a vector's numbers."""
    header = vector_header(4 * size)
    return name + _head(len(header) + 4 * size) + header


@lru_cache(maxsize=4096)
def _text_head(name: bytes, size: int) -> bytes:
    header = text_header(size)
    return name + _head(len(header) + size) + header


@lru_cache(maxsize=64)
def _text(name: bytes, text: str) -> bytes:
    return name + _string(encode_text(text))


@lru_cache(maxsize=4096)
def _integer(name: bytes, number: int) -> bytes:
    return name + _string(encode_integer(number))


@lru_cache(maxsize=4096)
def _unix_timestamp(name: bytes, seconds: int) -> bytes:
    return name + _string(encode_unix_timestamp(seconds))

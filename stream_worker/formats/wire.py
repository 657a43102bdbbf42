"""Confluent's framing: a zero, the schema's id, and for Protobuf which message of it."""

from llm4es.errors import InvalidEvent

__all__ = ["split_header", "split_indexes"]

_HEADER_BYTES = 5
_MAGIC = 0
_CONTINUES = 0x80
_LONGEST_VARINT = 5
_MOST_INDEXES = 32  # messages nested deeper than that are no message of anybody's


def split_header(value: bytes) -> tuple[int, bytes]:
    """Give a schema's id, and what comes after it. Raises InvalidEvent."""
    if len(value) < _HEADER_BYTES or value[0] != _MAGIC:
        raise InvalidEvent(
            "value", "does not begin as a schema registry's clients write (0, then a schema's id)"
        )
    return int.from_bytes(value[1:_HEADER_BYTES], "big"), value[_HEADER_BYTES:]


def split_indexes(value: bytes) -> tuple[tuple[int, ...], bytes]:
    """Give the path to a message within its file (zigzag varints), and what comes after it."""
    count, at = _varint(value, 0)
    if not 0 <= count <= _MOST_INDEXES:
        raise InvalidEvent("value", f"its message's path has {count} steps")
    if count == 0:  # how the first message is written
        return (0,), value[at:]
    indexes = []
    for _ in range(count):
        index, at = _varint(value, at)
        indexes.append(index)
    return tuple(indexes), value[at:]


def _varint(value: bytes, at: int) -> tuple[int, int]:
    number = 0
    for place in range(_LONGEST_VARINT):
        if at + place >= len(value):
            break
        byte = value[at + place]
        number |= (byte & ~_CONTINUES) << 7 * place
        if byte < _CONTINUES:
            return (number >> 1) ^ -(number & 1), at + place + 1
    raise InvalidEvent("value", "its message's path is cut short")

"""Records as the log holds them, and the events they become."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgspec

from llm4es.errors import InvalidEvent
from llm4es.schema import (
    CategoriesField,
    CategoryField,
    EventSchema,
    EventTime,
    FieldSpec,
    FlagField,
    NumberField,
)

__all__ = [
    "EARLIEST_TIME",
    "EPOCH",
    "LATEST_TIME",
    "NO_OFFSETS",
    "NO_SPANS",
    "Event",
    "EventKey",
    "FieldValue",
    "OffsetSpans",
    "Origin",
    "Record",
    "TopicPartition",
    "coordinates_id",
    "decode_object",
    "entity_hash",
    "entity_id_of",
    "entity_id_of_key",
    "origin_headers",
    "origin_of",
    "parse_document",
    "parse_event",
]

FieldValue = str | int | float | bool | tuple[str, ...] | None
EventKey = tuple[datetime, str, str]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# What 64 bits of nanoseconds hold, in whole years: pandas and Feast keep times so, and "a day
# before" has to be a time too.
EARLIEST_TIME = datetime(1678, 1, 1, tzinfo=UTC)
LATEST_TIME = datetime(2262, 1, 1, tzinfo=UTC)
_SMALLEST, _LARGEST = -(2**63), 2**64 - 1  # integers that a stored window holds
_MAX_ID_LENGTH = 512
_MAX_DEPTH = 64
_ORIGIN = "llm4es.origin."
_NANOSECONDS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}


class TopicPartition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int


OffsetSpans = Mapping[TopicPartition, tuple[int, int]]  # first and next offset
NO_SPANS: Final[OffsetSpans] = MappingProxyType({})
NO_OFFSETS: Final[Mapping[TopicPartition, int]] = MappingProxyType({})


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One record of the log, as it came: nothing about it has been checked."""

    topic: str
    partition: int
    offset: int
    timestamp: datetime | None  # LogAppendTime; None where the log keeps none, or one that is none
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()

    @property
    def topic_partition(self) -> TopicPartition:
        """The partition it came from."""
        return TopicPartition(self.topic, self.partition)


class Origin(NamedTuple):
    """Where a record stood first, and when that log got it: identity and time of what it says."""

    topic: str
    partition: int
    offset: int
    timestamp: datetime | None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One user action, validated; nothing downstream re-checks it."""

    entity_id: str
    occurred_at: datetime  # event time, UTC, microseconds
    type: str
    event_id: str  # with the two above: identity and order within the entity
    fields: Mapping[str, FieldValue]

    @property
    def key(self) -> EventKey:
        """Identity and order within the entity."""
        return (self.occurred_at, self.type, self.event_id)


def coordinates_id(topic: str, partition: int, offset: int) -> str:
    """Name an event by its record; padded, so that text order is the order of the numbers."""
    return f"{topic}/{partition:010d}/{offset:019d}"


def origin_of(record: Record) -> Origin:
    """Read the origin that `repartition` noted in a record's headers; else the record itself is.

    Raises InvalidEvent for headers that are not as `origin_headers` writes them.
    """
    if not record.headers:
        return Origin(record.topic, record.partition, record.offset, record.timestamp)
    found = {
        name.removeprefix(_ORIGIN): value
        for name, value in record.headers
        if name.startswith(_ORIGIN)
    }
    if not found:
        return Origin(record.topic, record.partition, record.offset, record.timestamp)
    try:
        texts = {name: (value or b"").decode() for name, value in found.items()}
        timestamp = texts.get("timestamp_us")
        return Origin(
            texts["topic"],
            int(texts["partition"]),
            int(texts["offset"]),
            None if timestamp is None else EPOCH + timedelta(microseconds=int(timestamp)),
        )
    except (KeyError, ValueError, OverflowError) as error:
        raise InvalidEvent(
            "headers", f"{_ORIGIN}* are not as repartition writes them ({error!r})"
        ) from error


def origin_headers(record: Record) -> list[tuple[str, bytes]]:
    """Note a record's origin for the copies of it; none where it has one noted already."""
    if any(name.startswith(_ORIGIN) for name, _ in record.headers):
        return []
    noted = {
        "topic": record.topic,
        "partition": str(record.partition),
        "offset": str(record.offset),
    }
    if record.timestamp is not None:
        noted["timestamp_us"] = str((record.timestamp - EPOCH) // timedelta(microseconds=1))
    return [(_ORIGIN + name, text.encode()) for name, text in noted.items()]


def entity_hash(entity_id: str) -> str:
    """Name an entity in a message or log: BLAKE2b-64 of its id in hex. Ids themselves are data."""
    return blake2b(entity_id.encode(), digest_size=8).hexdigest()


def decode_object(value: bytes, *, max_depth: int = _MAX_DEPTH) -> dict[str, Any]:
    """Decode one JSON object. Raises InvalidEvent for anything else, and for a deeper one."""
    try:
        document = msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidEvent("value", f"is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise InvalidEvent("value", f"is JSON, but no object: {type(document).__name__}")
    # What has so few brackets, and most records do, cannot be deeper.
    if value.count(b"{") + value.count(b"[") > max_depth and _is_deeper(document, max_depth):
        raise InvalidEvent("value", f"is nested deeper than {max_depth} levels")
    return document


def _is_deeper(document: dict[str, Any], max_depth: int) -> bool:
    level: list[Any] = [document]
    for _ in range(max_depth):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def entity_id_of(document: Mapping[str, Any], field: str) -> str:
    """Read an entity's id: a string, or an integer in decimal. Raises InvalidEvent."""
    if field not in document or document[field] is None:
        raise InvalidEvent(field, "the entity id is missing")
    return _identifier(field, document[field])


def entity_id_of_key(key: bytes | None) -> str:
    """Read an entity's id from a record's key, as a tombstone has it. Raises InvalidEvent."""
    if key is None:
        raise InvalidEvent("key", "the entity id is missing")
    try:
        return _identifier("key", key.decode())
    except UnicodeDecodeError as error:
        raise InvalidEvent("key", f"is no UTF-8 ({error.reason})") from error


def parse_event(
    value: bytes, schema: EventSchema, *, entity: str, coordinates: str | None = None
) -> Event:
    """Turn a record's bytes into an event of `entity`.

    `coordinates` (see `coordinates_id`) is the event's id where the schema names no field for
    it. Raises InvalidEvent naming the field; fields the schema does not name are left behind.
    """
    return parse_document(decode_object(value), schema, entity=entity, coordinates=coordinates)


def parse_document(
    document: Mapping[str, Any],
    schema: EventSchema,
    *,
    entity: str,
    coordinates: str | None = None,
) -> Event:
    """Turn a record that is decoded already into an event, by the rules of `parse_event`.

    Values are those of JSON; where the schema awaits a time, in whatever format, a `datetime` does
    as well, as columnar files and Avro hold it (without a zone it is UTC).
    """
    entity_id = entity_id_of(document, schema.entity(entity).field)
    event_type = _event_type(document, schema)
    if schema.event_id is not None:
        if document.get(schema.event_id) is None:
            raise InvalidEvent(schema.event_id, "the event id is missing")
        event_id = _identifier(schema.event_id, document[schema.event_id])
    elif coordinates is not None:
        event_id = coordinates
    else:
        raise InvalidEvent("event_id", "the schema names no event id and there are no coordinates")
    fields = {
        name: _field_value(name, spec, document.get(name))
        for name, spec in schema.types[event_type].fields.items()
    }
    return Event(
        entity_id=entity_id,
        occurred_at=_event_time(document, schema.event_time),
        type=event_type,
        event_id=event_id,
        fields=MappingProxyType(fields),
    )


def _event_type(document: Mapping[str, Any], schema: EventSchema) -> str:
    if schema.type_field is None:
        return next(iter(schema.types))
    name = document.get(schema.type_field)
    if not isinstance(name, str) or name not in schema.types:
        known = ", ".join(schema.types)
        raise InvalidEvent(schema.type_field, f"unknown event type (known: {known})")
    return name


def _identifier(field: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InvalidEvent(field, f"an id is text or an integer, not {type(value).__name__}")
    text = str(value)
    if not text or len(text) > _MAX_ID_LENGTH:
        raise InvalidEvent(field, f"an id has 1 to {_MAX_ID_LENGTH} characters, not {len(text)}")
    return text


def _event_time(document: Mapping[str, Any], spec: EventTime) -> datetime:
    raw = document.get(spec.field)
    if raw is None:
        raise InvalidEvent(spec.field, "the event time is missing")
    try:
        is_read = isinstance(raw, datetime) or spec.format == "iso8601"
        moment = _from_iso(raw) if is_read else _from_epoch(raw, spec.unit)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidEvent(spec.field, f"is no {spec.format} time ({error})") from error
    if not EARLIEST_TIME <= moment < LATEST_TIME:
        raise InvalidEvent(
            spec.field,
            f"year {moment.year} is not in {EARLIEST_TIME.year} to {LATEST_TIME.year - 1}",
        )
    return moment


def _from_iso(raw: object) -> datetime:
    if not isinstance(raw, str | datetime):
        msg = f"text expected, not {type(raw).__name__}"
        raise TypeError(msg)
    moment = datetime.fromisoformat(raw) if isinstance(raw, str) else raw
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _from_epoch(raw: object, unit: str) -> datetime:
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        msg = f"a number expected, not {type(raw).__name__}"
        raise TypeError(msg)
    # An integer stays one: a float cannot hold today's time in nanoseconds.
    size = _NANOSECONDS[unit]
    microseconds = raw * size // 1_000 if isinstance(raw, int) else round(raw * (size / 1_000))
    return EPOCH + timedelta(microseconds=microseconds)


def _field_value(name: str, spec: FieldSpec, raw: object) -> FieldValue:
    if raw is None:
        if spec.nullable:
            return None
        raise InvalidEvent(name, "is missing")
    if isinstance(spec, NumberField):
        return _number(name, raw)
    if isinstance(spec, CategoryField):
        return _category(name, spec, raw)
    if isinstance(spec, CategoriesField):
        return _categories(name, spec, raw)
    if isinstance(spec, FlagField):
        if not isinstance(raw, bool):
            raise InvalidEvent(name, f"a flag is true or false, not {type(raw).__name__}")
        return raw
    return _text(name, raw, spec.max_length)


def _number(name: str, raw: object) -> float | int:
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise InvalidEvent(name, f"a number is due, not {type(raw).__name__}")
    try:
        finite = math.isfinite(raw)
    except OverflowError:
        finite = False
    if not finite:
        raise InvalidEvent(name, "a finite number is due")
    # A longer integer is read as other JSON parsers do: to the precision of a double.
    return raw if _SMALLEST <= raw <= _LARGEST else float(raw)


def _category(name: str, spec: CategoryField, raw: object) -> str:
    due = str if spec.codes == "string" else int
    if isinstance(raw, bool) or not isinstance(raw, due):
        raise InvalidEvent(
            name, f"a category of {spec.codes} codes is due, not {type(raw).__name__}"
        )
    code = _text(name, str(raw), spec.max_length)
    if spec.closed and code not in spec.names:
        raise InvalidEvent(name, "a code that the schema does not name")
    return code


def _categories(name: str, spec: CategoriesField, raw: object) -> tuple[str, ...]:
    if not isinstance(raw, list) or len(raw) > spec.max_items:
        raise InvalidEvent(name, f"a list of at most {spec.max_items} codes is due")
    return tuple(_text(name, item, spec.max_length) for item in raw)


def _text(name: str, raw: object, max_length: int) -> str:
    if not isinstance(raw, str):
        raise InvalidEvent(name, f"text is due, not {type(raw).__name__}")
    if len(raw) > max_length:
        raise InvalidEvent(name, f"{len(raw)} characters, at most {max_length} are allowed")
    return raw

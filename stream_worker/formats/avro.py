"""Avro records."""

import json
import struct
from decimal import DecimalException
from io import BytesIO
from typing import Any

from llm4es.errors import ConfigError, InvalidEvent
from stream_worker.formats.registry import FoundSchema, SchemaSource
from stream_worker.formats.wire import split_header

try:
    import fastavro
    from fastavro.read import SchemaResolutionError
    from fastavro.schema import SchemaParseException, UnknownType
except ImportError:
    fastavro = None  # type: ignore[assignment]

__all__ = ["AvroDecoder"]

_BROKEN = (
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    DecimalException,
    struct.error,
    RecursionError,
    MemoryError,
)


class AvroDecoder:
    """Reads records of one schema, or of whatever schema its frame names.

    Without a registry a value is what `schema` (JSON) says, bare. With one it is read by the
    schema that it was written with, and seen as `schema` where that is given: fields that are
    new there get their defaults. Raises ConfigError for a schema that is none.
    """

    def __init__(self, schema: str | None, registry: SchemaSource | None) -> None:
        if fastavro is None:
            raise ConfigError(
                "value_format", "Avro is not installed", "pip install 'llm4es[formats]'"
            )
        if schema is None and registry is None:
            raise ConfigError(
                "value_schema", "bare Avro cannot be read without its schema", "name an .avsc file"
            )
        self._registry = registry
        self._schema = None if schema is None else _parsed_setting(schema)
        self._writers: dict[int, Any] = {}

    def __call__(self, value: bytes) -> dict[str, Any]:
        """Decode one record. Raises InvalidEvent, SourceUnavailable."""
        if self._registry is None:
            return _read(value, self._schema, None)
        schema_id, body = split_header(value)
        if schema_id not in self._writers:
            self._writers[schema_id] = _parsed(schema_id, self._registry.schema(schema_id))
        return _read(body, self._writers[schema_id], self._schema)


def _read(body: bytes, writer: Any, reader: Any) -> dict[str, Any]:  # noqa: ANN401 - fastavro's
    stream = BytesIO(body)
    try:
        found = fastavro.schemaless_reader(stream, writer, reader)
    except SchemaResolutionError as error:
        raise InvalidEvent("value", f"does not fit value_schema ({error})") from error
    except _BROKEN as error:
        raise InvalidEvent("value", f"is no Avro of its schema ({error!r})") from error
    left = len(body) - stream.tell()
    if left:
        raise InvalidEvent("value", f"has {left} bytes behind its record")
    if not isinstance(found, dict):
        raise InvalidEvent("value", f"is Avro, but no record: {type(found).__name__}")
    return found


def _parsed(schema_id: int, found: FoundSchema) -> Any:  # noqa: ANN401
    if found.kind != "AVRO":
        raise InvalidEvent("schema_id", f"schema {schema_id} is {found.kind}, not Avro")
    named: dict[str, Any] = {}
    try:
        for text in found.references:
            fastavro.parse_schema(json.loads(text), named_schemas=named)
        return fastavro.parse_schema(json.loads(found.text), named_schemas=named)
    except (SchemaParseException, UnknownType, ValueError, KeyError, TypeError) as error:
        raise InvalidEvent("schema_id", f"schema {schema_id} cannot be used ({error!r})") from error


def _parsed_setting(text: str) -> Any:  # noqa: ANN401
    try:
        return fastavro.parse_schema(json.loads(text))
    except (SchemaParseException, UnknownType, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "value_schema", f"is no Avro schema ({error!r})", "name an .avsc file, in JSON"
        ) from error

"""From what is known of a topic's values to the function that decodes them."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from llm4es.errors import ConfigError, InvalidEvent
from llm4es.events import decode_object
from stream_worker.formats.registry import SchemaRegistry, SchemaRegistrySettings, SchemaSource
from stream_worker.formats.wire import split_header

__all__ = ["Decode", "FormatName", "ValueFormat", "open_decoder"]

FormatName = Literal["json", "avro", "protobuf"]
Decode = Callable[[bytes], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueFormat:
    """How values are written. Framed as Confluent's clients do it where there is a registry."""

    name: FormatName = "json"
    schema_text: str | None = None  # of Avro: JSON
    schema_file: Path | None = None  # of Avro an .avsc, of Protobuf a descriptor set
    message: str | None = None  # of Protobuf: full name
    registry: SchemaRegistrySettings | None = None
    max_depth: int = 64  # of JSON


def open_decoder(form: ValueFormat) -> Decode:
    """Make the decoder. It raises InvalidEvent, and SourceUnavailable while the registry is away.

    Values that it gives are as JSON has them, or `datetime`. Raises ConfigError.
    """
    registry = None if form.registry is None else SchemaRegistry(form.registry)
    if form.name == "json":
        decode: Decode = partial(decode_object, max_depth=form.max_depth)
        return decode if registry is None else partial(_framed_json, decode, registry)
    if form.name == "avro":
        from stream_worker.formats.avro import AvroDecoder  # noqa: PLC0415 - an extra

        text = form.schema_text or None
        if form.schema_file is not None:
            text = _read(form.schema_file).decode(errors="replace")
        return partial(_plain_after, AvroDecoder(text, registry))
    from stream_worker.formats.protobuf import ProtobufDecoder  # noqa: PLC0415 - slow to import

    if form.schema_file is None or not form.message:
        raise ConfigError(
            "value_schema" if form.schema_file is None else "value_message",
            "Protobuf cannot be read without a descriptor set and the name of a message",
            "set both; protoc --include_imports --descriptor_set_out=FILE makes the first",
        )
    return partial(_plain_after, ProtobufDecoder(_read(form.schema_file), form.message, registry))


def _framed_json(decode: Decode, registry: SchemaSource, value: bytes) -> dict[str, Any]:
    schema_id, body = split_header(value)
    kind = registry.schema(schema_id).kind
    if kind != "JSON":
        raise InvalidEvent("schema_id", f"schema {schema_id} is {kind}, not JSON")
    return decode(body)


def _plain_after(decode: Decode, value: bytes) -> dict[str, Any]:
    return {name: _plain(found) for name, found in decode(value).items()}


def _plain(value: Any) -> Any:  # noqa: ANN401 - whatever a format has
    """Say a value as JSON would, but for moments."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, Decimal):
        return (
            int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
        )
    if isinstance(value, date | time) and not isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    return value


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            "value_schema", f"{path} cannot be read ({error.strerror})", "name the schema's file"
        ) from error

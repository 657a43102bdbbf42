"""Protobuf messages, by descriptors: no generated code is imported."""

from collections.abc import Mapping
from datetime import UTC
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from llm4es.errors import ConfigError, InvalidEvent
from stream_worker.formats.registry import SchemaSource
from stream_worker.formats.wire import split_header, split_indexes

__all__ = ["ProtobufDecoder"]

_REMEDY = "make it with protoc --include_imports --descriptor_set_out=FILE"
_WRAPPED = "google.protobuf."
_WRAPPERS = {
    f"{_WRAPPED}{kind}Value"
    for kind in ("Double", "Float", "Int64", "UInt64", "Int32", "UInt32", "Bool", "String", "Bytes")
}


class ProtobufDecoder:
    """Reads one type of message. Fields that its descriptor does not know are left behind.

    `descriptors` is a FileDescriptorSet with all that it imports, `message` a full name. With a
    registry a value is framed: its schema must be known there, and its message be ours by its
    place in its file. Raises ConfigError for descriptors that are none, or lack the message.
    """

    def __init__(self, descriptors: bytes, message: str, registry: SchemaSource | None) -> None:
        self._descriptor = _find(descriptors, message)
        self._class: Any = GetMessageClass(self._descriptor)
        self._registry = registry
        self._path = _path(self._descriptor)
        self._known: set[int] = set()

    def __call__(self, value: bytes) -> dict[str, Any]:
        """Decode one message. Raises InvalidEvent, SourceUnavailable."""
        body = value if self._registry is None else self._unframed(value, self._registry)
        try:
            message = self._class.FromString(body)
        except DecodeError as error:
            name = self._descriptor.full_name
            raise InvalidEvent("value", f"is no Protobuf message {name} ({error})") from error
        return _fields(message)

    def _unframed(self, value: bytes, registry: SchemaSource) -> bytes:
        schema_id, rest = split_header(value)
        if schema_id not in self._known:
            found = registry.schema(schema_id)
            if found.kind != "PROTOBUF":
                raise InvalidEvent("schema_id", f"schema {schema_id} is {found.kind}, not Protobuf")
            self._known.add(schema_id)
        path, body = split_indexes(rest)
        if path != self._path:
            raise InvalidEvent(
                "value",
                f"is message {path} of its file, {self._descriptor.full_name} is {self._path}",
            )
        return body


def _find(descriptors: bytes, message: str) -> Any:  # noqa: ANN401 - protobuf has no types here
    pool = DescriptorPool()
    try:
        for file in FileDescriptorSet.FromString(descriptors).file:
            pool.Add(file)
    except (DecodeError, TypeError, ValueError) as error:
        raise ConfigError("value_schema", f"is no descriptor set ({error})", _REMEDY) from error
    try:
        return pool.FindMessageTypeByName(message)
    except KeyError as error:
        raise ConfigError(
            "value_message", f"value_schema has no message {message!r}", "give its full name"
        ) from error


def _path(descriptor: Any) -> tuple[int, ...]:  # noqa: ANN401
    """Where a message stands in its file: indices from the outermost message on."""
    holder = descriptor.containing_type
    siblings = holder.nested_types if holder is not None else _outermost(descriptor.file)
    index = [each.full_name for each in siblings].index(descriptor.full_name)
    return (index,) if holder is None else (*_path(holder), index)


def _outermost(file: Any) -> list[Any]:  # noqa: ANN401
    return list(file.message_types_by_name.values())


def _fields(message: Any) -> dict[str, Any]:  # noqa: ANN401
    """Values by the names of the .proto file; None where a field that can be absent is."""
    return {
        field.name: None
        if field.has_presence and not message.HasField(field.name)
        else _value(field, getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
    }


def _value(field: Any, value: Any) -> Any:  # noqa: ANN401
    if not field.is_repeated:
        return _single(field, value)
    if isinstance(value, Mapping):
        return dict(value)
    return [_single(field, each) for each in value]


def _single(field: Any, value: Any) -> Any:  # noqa: ANN401
    if field.enum_type is not None:
        named = field.enum_type.values_by_number.get(value)
        return value if named is None else named.name
    if field.message_type is None:
        return value
    name = field.message_type.full_name
    if name in _WRAPPERS:
        return value.value
    return _moment(value) if name == f"{_WRAPPED}Timestamp" else _fields(value)


def _moment(value: Any) -> Any:  # noqa: ANN401
    try:
        return value.ToDatetime(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidEvent("value", f"holds a timestamp that is none ({error})") from error

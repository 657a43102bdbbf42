"""Values as producers write them, Confluent's own serializers among them, become events."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import UUID

import fastavro
import pytest
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from google.protobuf import timestamp_pb2, wrappers_pb2
from google.protobuf.descriptor_pb2 import (
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from dev.registry_double import RegistryDouble
from llm4es.errors import ConfigError, InvalidEvent, SourceUnavailable
from llm4es.events import decode_object, parse_document
from llm4es.schema import load_schema
from stream_worker.formats.decoding import Decode, ValueFormat, open_decoder
from stream_worker.formats.registry import SchemaRegistrySettings

AT = datetime(2026, 3, 1, 12, 0, 0, 123_000, tzinfo=UTC)
SCHEMA = load_schema("""
name: payments
entities: {customer: {field: customer}}
event_id: id
event_time: {field: at, format: epoch, unit: ms}
types:
  payment:
    fields:
      amount: {kind: number}
      currency: {kind: category}
      shop: {kind: text, nullable: true}
      tags: {kind: categories}
      booked: {kind: text, nullable: true}
""")
AVRO: dict[str, Any] = {
    "type": "record",
    "name": "Payment",
    "namespace": "shop",
    "fields": [
        {"name": "customer", "type": "long"},
        {"name": "id", "type": {"type": "string", "logicalType": "uuid"}},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {
            "name": "amount",
            "type": {"type": "bytes", "logicalType": "decimal", "precision": 12, "scale": 2},
        },
        {
            "name": "currency",
            "type": {"type": "enum", "name": "Currency", "symbols": ["EUR", "USD"]},
        },
        {"name": "shop", "type": ["null", "string"], "default": None},
        {"name": "tags", "type": {"type": "array", "items": "string"}},
        {
            "name": "booked",
            "type": ["null", {"type": "int", "logicalType": "date"}],
            "default": None,
        },
    ],
}  # fmt: skip
ID = "c0ffee00-0000-4000-8000-000000000001"


def payment(**changed: object) -> dict[str, Any]:
    return {
        "customer": 17, "id": UUID(ID), "at": AT, "amount": Decimal("9.99"), "currency": "EUR",
        "shop": None, "tags": ["a", "b"], "booked": date(2026, 3, 2), **changed,
    }  # fmt: skip


def avro(document: dict[str, Any], schema: Any = AVRO) -> bytes:  # noqa: ANN401
    stream = BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(schema), document)
    return stream.getvalue()


def framed(schema_id: int, body: bytes) -> bytes:
    return b"\x00" + schema_id.to_bytes(4, "big") + body


def parsed(decode: Decode, value: bytes) -> dict[str, Any]:
    event = parse_document(decode(value), SCHEMA, entity="customer")
    return {
        "entity": event.entity_id, "id": event.event_id, "at": event.occurred_at, **event.fields,
    }  # fmt: skip


DUE = {
    "entity": "17", "id": ID, "at": AT, "amount": 9.99, "currency": "EUR", "shop": None,
    "tags": ("a", "b"), "booked": "2026-03-02",
}  # fmt: skip


@pytest.fixture(scope="module")
def registry() -> Iterator[RegistryDouble]:
    with RegistryDouble() as double:
        yield double


def with_registry(registry: RegistryDouble, **more: Any) -> ValueFormat:  # noqa: ANN401
    return ValueFormat(registry=SchemaRegistrySettings(url=registry.url), **more)


def test_bare_avro_with_logical_types_unions_and_enums_becomes_an_event() -> None:
    decode = open_decoder(ValueFormat(name="avro", schema_text=json.dumps(AVRO)))
    assert parsed(decode, avro(payment())) == DUE
    assert parsed(decode, avro(payment(shop="bakery", booked=None)))["shop"] == "bakery"


@pytest.mark.parametrize("unit", ["timestamp-micros", "local-timestamp-millis"])
def test_times_of_every_precision_are_read_as_times(unit: str) -> None:
    at = {"name": "at", "type": {"type": "long", "logicalType": unit}}
    schema = {**AVRO, "fields": [at if f["name"] == "at" else f for f in AVRO["fields"]]}
    decode = open_decoder(ValueFormat(name="avro", schema_text=json.dumps(schema)))
    moment = AT.replace(tzinfo=None) if unit.startswith("local") else AT
    assert parsed(decode, avro(payment(at=moment), schema))["at"] == AT


def test_what_confluents_avro_serializer_writes_is_read_by_the_schema_it_was_written_with(
    registry: RegistryDouble,
) -> None:

    wider = {**AVRO, "fields": [*AVRO["fields"], {"name": "new", "type": "int", "default": 3}]}
    client = SchemaRegistryClient({"url": registry.url})
    context = SerializationContext("payments", MessageField.VALUE)
    decode = open_decoder(with_registry(registry, name="avro"))
    narrow = open_decoder(with_registry(registry, name="avro", schema_text=json.dumps(AVRO)))
    for schema, document in ((AVRO, payment()), (wider, payment(new=4))):
        value = AvroSerializer(client, json.dumps(schema))(document, context)
        assert value is not None
        assert value[0] == 0
        for reading in (decode, narrow):
            assert parsed(reading, value) == DUE
        assert ("new" in decode(value), "new" in narrow(value)) == (schema is wider, False)
    asked = registry.asked
    decode(value)
    assert registry.asked == asked  # a schema is asked for once


def test_schemas_that_refer_to_others_are_read(registry: RegistryDouble) -> None:
    money = {"type": "record", "name": "Money", "namespace": "shop",
             "fields": [{"name": "cents", "type": "int"}]}  # fmt: skip
    registry.register("money", {"schema": json.dumps(money), "schemaType": "AVRO"})
    outer = {"type": "record", "name": "Bill", "fields": [{"name": "sum", "type": "shop.Money"}]}
    number = registry.register(
        "bill",
        {
            "schema": json.dumps(outer), "schemaType": "AVRO",
            "references": [{"name": "shop.Money", "subject": "money", "version": 1}],
        },
    )  # fmt: skip
    decode = open_decoder(with_registry(registry, name="avro"))
    whole = {**outer, "fields": [{"name": "sum", "type": money}]}
    assert decode(framed(number, avro({"sum": {"cents": 5}}, whole))) == {"sum": {"cents": 5}}


BROKEN_AVRO: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda v: v[:-3],
    "longer": lambda v: v + b"x",
    "empty": lambda _: b"",
    "JSON": lambda _: b'{"customer": 17}',
    "a wild union": lambda v: v.replace(b"\x00\x04\x02a", b"\x7f\x04\x02a"),
    "lengths without end": lambda _: b"\xff" * 200,
}


@pytest.mark.parametrize("how", BROKEN_AVRO)
def test_broken_avro_is_a_bad_record(registry: RegistryDouble, how: str) -> None:
    number = registry.register("p", {"schema": json.dumps(AVRO), "schemaType": "AVRO"})
    bare = open_decoder(ValueFormat(name="avro", schema_text=json.dumps(AVRO)))
    wired = open_decoder(with_registry(registry, name="avro"))
    value = BROKEN_AVRO[how](avro(payment()))
    for decode, each in ((bare, value), (wired, framed(number, value)), (wired, value)):
        with pytest.raises(InvalidEvent):
            decode(each)


def test_an_id_that_the_registry_does_not_know_is_a_bad_record_and_not_asked_for_each_time(
    registry: RegistryDouble,
) -> None:
    decode = open_decoder(with_registry(registry, name="avro"))
    asked = registry.asked
    for _ in range(3):
        with pytest.raises(InvalidEvent, match="schema_id: the registry knows no schema 7"):
            decode(framed(7, b""))
    assert registry.asked == asked + 1
    other = registry.register("j", {"schema": "{}", "schemaType": "JSON"})
    with pytest.raises(InvalidEvent, match="is JSON, not Avro"):
        decode(framed(other, b""))
    broken = registry.register("b", {"schema": '{"type": "none"}', "schemaType": "AVRO"})
    with pytest.raises(InvalidEvent, match="cannot be used"):
        decode(framed(broken, b""))


def test_a_registry_that_is_away_is_waited_for_and_one_that_refuses_us_is_not() -> None:
    with RegistryDouble(user="me", password="open") as double:  # noqa: S106 - a test's
        number = double.register("p", {"schema": json.dumps(AVRO), "schemaType": "AVRO"})
        value = framed(number, avro(payment()))
        refused = open_decoder(with_registry(double, name="avro"))
        with pytest.raises(ConfigError, match="schema_registry_url: the registry refuses us"):
            refused(value)
        settings = SchemaRegistrySettings(url=double.url, username="me", password="open")  # noqa: S106
        assert "open" not in repr(settings)
        decode = open_decoder(ValueFormat(name="avro", registry=settings))
        double.failing = True
        with pytest.raises(SourceUnavailable):
            decode(value)
        double.failing = False
        double.stop()
        with pytest.raises(SourceUnavailable):
            decode(value)
        double.start()
        assert parsed(decode, value) == DUE
        double.stop()
        assert parsed(decode, value) == DUE  # known by now


def proto_file() -> FileDescriptorProto:
    """payments.proto, as protoc would describe it: proto3, the message in second place."""
    file = FileDescriptorProto(
        name="payments.proto", package="shop", syntax="proto3",
        dependency=["google/protobuf/timestamp.proto", "google/protobuf/wrappers.proto"],
    )  # fmt: skip
    file.message_type.add(name="Login")
    currency = file.enum_type.add(name="Currency")
    for number, name in enumerate(("NONE", "EUR", "USD")):
        currency.value.add(name=name, number=number)
    message = file.message_type.add(name="Payment")
    kinds = FieldDescriptorProto
    for number, (name, kind, type_name, label) in enumerate(
        (
            ("customer", kinds.TYPE_INT64, None, kinds.LABEL_OPTIONAL),
            ("id", kinds.TYPE_STRING, None, kinds.LABEL_OPTIONAL),
            ("at", kinds.TYPE_MESSAGE, ".google.protobuf.Timestamp", kinds.LABEL_OPTIONAL),
            ("amount", kinds.TYPE_DOUBLE, None, kinds.LABEL_OPTIONAL),
            ("currency", kinds.TYPE_ENUM, ".shop.Currency", kinds.LABEL_OPTIONAL),
            ("shop", kinds.TYPE_MESSAGE, ".google.protobuf.StringValue", kinds.LABEL_OPTIONAL),
            ("tags", kinds.TYPE_STRING, None, kinds.LABEL_REPEATED),
            ("booked", kinds.TYPE_STRING, None, kinds.LABEL_OPTIONAL),
        ),
        1,
    ):
        field = message.field.add(name=name, number=number, type=kind, label=label)
        if type_name is not None:
            field.type_name = type_name
    return file


def descriptor_set() -> FileDescriptorSet:
    found = FileDescriptorSet()
    for module in (timestamp_pb2, wrappers_pb2):
        module.DESCRIPTOR.CopyToProto(found.file.add())
    found.file.add().CopyFrom(proto_file())
    return found


@cache
def message_class(name: str = "shop.Payment") -> Any:  # noqa: ANN401
    pool = DescriptorPool()
    for file in descriptor_set().file:
        pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName(name))


def message(**changed: object) -> Any:  # noqa: ANN401
    made = message_class()(
        **{"customer": 17, "id": ID, "amount": 9.99, "currency": 1, "tags": ["a", "b"],
           "booked": "2026-03-02", **changed}
    )  # fmt: skip
    made.at.FromDatetime(AT)
    return made


@pytest.fixture(scope="module")
def descriptors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("proto") / "payments.pb"
    path.write_bytes(descriptor_set().SerializeToString())
    return path


def test_bare_protobuf_with_enums_wrappers_and_timestamps_becomes_an_event(
    descriptors: Path,
) -> None:
    decode = open_decoder(
        ValueFormat(name="protobuf", schema_file=descriptors, message="shop.Payment")
    )
    assert parsed(decode, message().SerializeToString()) == DUE
    with_shop = message()
    with_shop.shop.value = "bakery"
    assert parsed(decode, with_shop.SerializeToString())["shop"] == "bakery"
    timeless = message_class()(customer=17, id=ID)
    with pytest.raises(InvalidEvent, match="at: the event time is missing"):
        parsed(decode, timeless.SerializeToString())
    with pytest.raises(InvalidEvent, match="is no Protobuf message"):
        decode(b"\xff\xff")


def test_what_confluents_protobuf_serializer_writes_is_read(
    registry: RegistryDouble, descriptors: Path
) -> None:

    client = SchemaRegistryClient({"url": registry.url})
    context = SerializationContext("payments", MessageField.VALUE)
    decode = open_decoder(
        with_registry(registry, name="protobuf", schema_file=descriptors, message="shop.Payment")
    )
    serializer = ProtobufSerializer(message_class(), client, {"use.deprecated.format": False})
    value = serializer(message(), context)
    assert value is not None
    assert parsed(decode, value) == DUE
    first = ProtobufSerializer(
        message_class("shop.Login"), client, {"use.deprecated.format": False}
    )
    other = first(message_class("shop.Login")(), context)
    assert other is not None
    with pytest.raises(InvalidEvent, match=r"is message \(0,\) of its file"):
        decode(other)
    for broken in (value[:5], value[:6], framed(9, value[5:]), b"", value[:5] + b"\xff" * 9):
        with pytest.raises(InvalidEvent):
            decode(broken)


def test_json_with_a_registrys_frame_is_read_too(registry: RegistryDouble) -> None:
    number = registry.register("j", {"schema": "{}", "schemaType": "JSON"})
    decode = open_decoder(with_registry(registry, name="json"))
    assert decode(framed(number, b'{"a": 1}')) == {"a": 1}
    with pytest.raises(InvalidEvent, match="does not begin as"):
        decode(b'{"a": 1}')


def test_json_that_is_nested_too_deep_is_a_bad_record() -> None:
    decode = open_decoder(ValueFormat(max_depth=3))
    assert decode(b'{"a": {"b": [1]}, "c": [{}, {}, [], []]}')
    for deep in (b'{"a": {"b": [[1]]}}', b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}"):
        with pytest.raises(InvalidEvent, match=r"deeper|not JSON"):
            decode(deep)
    nested = b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}"
    assert decode_object(nested)


def test_formats_that_cannot_be_read_as_set_refuse_to_start(
    tmp_path: Path, descriptors: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("{")
    for field, form in {
        "value_schema": ValueFormat(name="avro"),
        "value_message": ValueFormat(name="protobuf", schema_file=descriptors),
    }.items():
        with pytest.raises(ConfigError) as refused:
            open_decoder(form)
        assert refused.value.field == field
    for form in (
        ValueFormat(name="avro", schema_file=broken),
        ValueFormat(name="avro", schema_file=tmp_path / "none"),
        ValueFormat(name="protobuf"),
        ValueFormat(name="protobuf", schema_file=broken, message="shop.Payment"),
    ):
        with pytest.raises(ConfigError, match="value_schema"):
            open_decoder(form)
    with pytest.raises(ConfigError, match="value_message"):
        open_decoder(ValueFormat(name="protobuf", schema_file=descriptors, message="shop.None"))

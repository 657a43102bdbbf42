"""What becomes an event, and what each bad record is told."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm4es.errors import InvalidEvent
from llm4es.events import Event, coordinates_id, parse_event
from llm4es.schema import load_schema
from tests.histories import SCHEMA_YAML, payment, schema

GOOD: dict[str, Any] = payment("e1", 0)


def parse(document: object) -> Event:
    value = document if isinstance(document, bytes) else json.dumps(document).encode()
    return parse_event(value, schema(), entity="customer")


def test_a_good_record_becomes_an_event_of_its_named_fields_alone() -> None:
    event = parse({**GOOD, "card_holder": "Jane Roe", "amount": 12})
    assert event.entity_id == "c1"
    assert event.occurred_at == datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert dict(event.fields) == {"amount": 12, "goods": "g1", "note": None}


def test_another_entity_of_the_same_record_is_another_id() -> None:
    event = parse_event(json.dumps(GOOD).encode(), schema(), entity="terminal")
    assert event.entity_id == "t1"


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"customer_id": None}, "customer_id", "missing"),
        ({"customer_id": ""}, "customer_id", "characters"),
        ({"customer_id": 1.5}, "customer_id", "float"),
        ({"event_id": None}, "event_id", "missing"),
        ({"at": None}, "at", "missing"),
        ({"at": "yesterday"}, "at", "iso8601"),
        ({"at": 1767225600}, "at", "text expected"),
        ({"kind": "refund"}, "kind", "unknown event type"),
        ({"amount": "9.99"}, "amount", "number is due"),
        ({"amount": True}, "amount", "number is due"),
        ({"amount": None}, "amount", "missing"),
        ({"goods": 5411}, "goods", "category"),
        ({"goods": "g" * 257}, "goods", "at most 256"),
        ({"note": ["a"]}, "note", "text is due"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, object], field: str, reason: str) -> None:
    with pytest.raises(InvalidEvent, match=reason) as caught:
        parse({**GOOD, **change})
    assert caught.value.field == field


@pytest.mark.parametrize(
    "value",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"a": NaN}', b"[" * 100_000, b'"\xed\xa0\x80"'],
)
def test_what_is_no_json_object_is_told_so(value: bytes) -> None:
    with pytest.raises(InvalidEvent) as caught:
        parse(value)
    assert caught.value.field == "value"


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_invalid_event(value: bytes) -> None:
    with pytest.raises(InvalidEvent):
        parse(value)


@given(
    st.dictionaries(
        st.sampled_from([*GOOD, "other"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    )
)
def test_no_values_raise_anything_but_invalid_event(change: dict[str, object]) -> None:
    try:
        event = parse({**GOOD, **change})
    except InvalidEvent:
        return
    assert "other" not in event.fields


@pytest.mark.parametrize(
    ("unit", "raw", "expected"),
    [
        ("s", 1767225600, datetime(2026, 1, 1, tzinfo=UTC)),
        ("s", 1767225600.25, datetime(2026, 1, 1, 0, 0, 0, 250_000, tzinfo=UTC)),
        ("ms", 1767225600001, datetime(2026, 1, 1, 0, 0, 0, 1_000, tzinfo=UTC)),
        ("us", 1767225600000001, datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=UTC)),
        ("ns", 1767225600000001999, datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=UTC)),
    ],
)
def test_epochs_keep_their_microseconds(unit: str, raw: float, expected: datetime) -> None:
    epochs = load_schema(SCHEMA_YAML.replace("iso8601", f"epoch, unit: {unit}"))
    value = json.dumps({**GOOD, "at": raw}).encode()
    assert parse_event(value, epochs, entity="customer").occurred_at == expected


@pytest.mark.parametrize("raw", ["2026-03-01T13:00:00+01:00", "2026-03-01T12:00:00Z"])
def test_times_are_utc_whatever_the_producer_writes(raw: str) -> None:
    assert parse({**GOOD, "at": raw}).occurred_at == datetime(2026, 3, 1, 12, tzinfo=UTC)


def test_without_an_event_id_the_coordinates_identify_and_order_as_numbers() -> None:
    anonymous = load_schema(SCHEMA_YAML.replace("event_id: event_id\n", ""))
    ids = [
        parse_event(
            json.dumps(GOOD).encode(),
            anonymous,
            entity="customer",
            coordinates=coordinates_id("shop", 0, offset),
        ).event_id
        for offset in (2, 10, 100)
    ]
    assert ids == sorted(ids)

"""Small schemas, events and records that many tests share."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType

from llm4es.events import Event, FieldValue, Record
from llm4es.schema import EventSchema, load_schema

START = datetime(2026, 3, 1, 12, tzinfo=UTC)

SCHEMA_YAML = """
name: shop
entities:
  customer: {field: customer_id}
  terminal: {field: terminal_id}
event_id: event_id
event_time: {field: at, format: iso8601}
type_field: kind
types:
  payment:
    fields:
      amount: {kind: number, unit: EUR, decimals: 2}
      goods: {kind: category, names: {g1: groceries}}
      note: {kind: text, nullable: true}
  login:
    fields:
      device: {kind: category}
      ok: {kind: flag}
"""


def schema() -> EventSchema:
    return load_schema(SCHEMA_YAML)


def event(
    second: float,
    *,
    entity_id: str = "c1",
    event_id: str | None = None,
    kind: str = "payment",
    fields: Mapping[str, FieldValue] | None = None,
) -> Event:
    if fields is None:
        fields = (
            {"amount": 9.99, "goods": "g1", "note": None}
            if kind == "payment"
            else {"device": "phone", "ok": True}
        )
    return Event(
        entity_id=entity_id,
        occurred_at=START + timedelta(seconds=second),
        type=kind,
        event_id=event_id or f"e{second}",
        fields=MappingProxyType(dict(fields)),
    )


def payment(
    event_id: str, second: float, *, customer: str = "c1", **more: object
) -> dict[str, object]:
    return {
        "customer_id": customer,
        "terminal_id": "t1",
        "event_id": event_id,
        "at": (START + timedelta(seconds=second)).isoformat(),
        "kind": "payment",
        "amount": 9.99,
        "goods": "g1",
        **more,
    }


def records(
    documents: Sequence[Mapping[str, object]], *, partitions: int = 1, topic: str = "shop"
) -> list[Record]:
    """A log of the documents, each recorded a second after it occurred."""
    offsets = dict.fromkeys(range(partitions), 0)
    made = []
    for document in documents:
        customer = str(document["customer_id"])
        partition = sum(customer.encode()) % partitions
        made.append(
            Record(
                topic=topic,
                partition=partition,
                offset=offsets[partition],
                timestamp=datetime.fromisoformat(str(document["at"])) + timedelta(seconds=1),
                key=customer.encode(),
                value=json.dumps(document).encode(),
            )
        )
        offsets[partition] += 1
    return made


def write_jsonl(path: Path, documents: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path

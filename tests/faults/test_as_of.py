"""`as_of` is when the log knew of an event: judged here without the code that folds."""

import json
from datetime import datetime, timedelta

from llm4es.features import FeatureRow
from tests.faults.worlds import POLICY, World

MICROSECOND = timedelta(microseconds=1)


def due(world: World) -> dict[str, list[datetime]]:
    """Every `as_of` of each customer, by DESIGN 2 alone."""
    rows: dict[str, list[datetime]] = {}
    last: dict[str, datetime] = {}
    newest: dict[str, datetime] = {}
    seen: set[tuple[str, datetime, str]] = set()
    for record in world.log:
        assert record.timestamp is not None
        if record.value is None:  # a tombstone: what came before goes, and `as_of` rises
            customer = (record.key or b"").decode()
            rows[customer] = []
            newest.pop(customer, None)
            seen = {each for each in seen if each[0] != customer}
            last[customer] = max([record.timestamp, *after(last, customer)])
            continue
        document = json.loads(record.value)
        if not isinstance(document["amount"], float):
            continue
        customer, at = document["customer_id"], datetime.fromisoformat(document["at"])
        late = customer in newest and newest[customer] - at > POLICY.allowed_lateness
        if late or (customer, at, document["event_id"]) in seen:
            continue
        seen.add((customer, at, document["event_id"]))
        newest[customer] = max(at, newest.get(customer, at))
        last[customer] = max([record.timestamp, at + MICROSECOND, *after(last, customer)])
        rows.setdefault(customer, []).append(last[customer])
    return {customer: moments for customer, moments in rows.items() if moments}


def after(last: dict[str, datetime], customer: str) -> list[datetime]:
    return [last[customer] + MICROSECOND] if customer in last else []


def test_every_row_bears_the_time_at_which_the_log_knew_of_its_event(
    event_by_event: World,
) -> None:
    found: dict[str, list[datetime]] = {}
    rows: list[FeatureRow] = event_by_event.sink.offline
    for row in rows:
        found.setdefault(row.entity_id, []).append(row.as_of)
    assert found == due(event_by_event)

"""`as_of` is when the log knew of an event: judged here without the code that folds."""

import json
from datetime import datetime, timedelta

from llm4es.features import FeatureRow
from tests.faults.worlds import POLICY, World

MICROSECOND = timedelta(microseconds=1)


def due(world: World) -> dict[str, list[datetime]]:
    """Every `as_of` of each customer, by DESIGN 2 alone."""
    moments: dict[str, list[datetime]] = {}
    last: dict[str, datetime] = {}  # by tombstones, too
    newest: dict[str, datetime] = {}
    seen: set[tuple[str, datetime, str]] = set()
    for record in world.log:
        assert record.timestamp is not None
        if record.value is None:
            customer = (record.key or b"").decode()
            before = [last[customer] + MICROSECOND] if customer in last else []
            last[customer] = max(record.timestamp, *before)
            newest.pop(customer, None)
            moments.pop(customer, None)  # its rows are gone
            seen = {each for each in seen if each[0] != customer}
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
        known = [record.timestamp, at + MICROSECOND]
        known += [last[customer] + MICROSECOND] if customer in last else []
        last[customer] = max(known)
        moments.setdefault(customer, []).append(last[customer])
    return moments


def test_every_row_bears_the_time_at_which_the_log_knew_of_its_event(
    event_by_event: World,
) -> None:
    found: dict[str, list[datetime]] = {}
    rows: list[FeatureRow] = event_by_event.sink.offline
    for row in rows:
        found.setdefault(row.entity_id, []).append(row.as_of)
    assert found == due(event_by_event)

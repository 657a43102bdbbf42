import json
import zlib
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import pairwise
from math import nan
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

from export.datasets.population import CATEGORIES, DEVICES, HOME
from export.datasets.simulator import LABEL_SCHEMA, Simulation, simulate, write_simulation
from llm4es.errors import ConfigError, InvalidEvent
from llm4es.events import Event, parse_event
from llm4es.rendering import Renderer, RenderingSpec, bucket_name
from llm4es.schema import CategoryField, EventSchema, load_schema

SCHEMA_FILE = Path(__file__).parents[2] / "export" / "datasets" / "payments.yaml"
FILES = ("events.jsonl", "labels.parquet", "schema.yaml")


@cache
def default_run() -> Simulation:
    return simulate()


@cache
def schema() -> EventSchema:
    return load_schema(SCHEMA_FILE)


def parsed(simulation: Simulation, entity: str = "customer") -> list[Event]:
    return [
        parse_event(json.dumps(record).encode(), schema(), entity=entity)
        for record in simulation.events
    ]


def once(simulation: Simulation) -> dict[str, dict[str, Any]]:
    return {record["event_id"]: record for record in simulation.events}


def test_files_are_the_same_bytes_for_a_seed_and_others_for_another(tmp_path: Path) -> None:
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        write_simulation(simulate(customers=30, days=30, seed=seed), tmp_path / name)
    for file in FILES:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    for file in FILES[:2]:
        assert (tmp_path / "first" / file).read_bytes() != (tmp_path / "other" / file).read_bytes()


def test_default_run_has_the_promised_size_and_mix() -> None:
    kinds = Counter(record["type"] for record in once(default_run()).values())
    total = sum(kinds.values())
    assert 14_000 <= total <= 18_000
    assert 0.77 <= kinds["payment"] / total <= 0.83
    assert kinds["chargeback"] >= 100


@pytest.mark.parametrize("seed", [1, 7, 11])
def test_fraud_is_rare_and_of_both_kinds(seed: int) -> None:
    labels = simulate(seed=seed).labels
    scenarios = Counter(label["scenario"] for label in labels)
    assert set(scenarios) == {"", "takeover", "terminal"}
    assert 0.010 <= 1 - scenarios[""] / len(labels) <= 0.025
    assert scenarios["takeover"] > scenarios["terminal"] >= 20
    assert all(label["label"] == int(label["scenario"] != "") for label in labels)


def test_takeover_is_four_to_ten_payments_in_at_most_three_days_of_an_eighth_of_the_customers() -> (
    None
):
    taken: dict[str, list[datetime]] = {}
    for label in default_run().labels:
        if label["scenario"] == "takeover":
            taken.setdefault(label["customer_id"], []).append(label["event_time"])
    assert len(taken) == round(0.12 * 240)
    for times in taken.values():
        assert 4 <= len(times) <= 10
        assert max(times) - min(times) < timedelta(days=3, hours=1)


def test_every_record_is_an_event_of_its_customer() -> None:
    events = parsed(default_run())
    assert len(events) == len(default_run().events)
    assert len({event.entity_id for event in events}) == 240
    assert {event.type for event in events} == {"payment", "login", "chargeback"}
    first = datetime(2026, 1, 5, tzinfo=UTC)
    assert all(first <= event.occurred_at < first + timedelta(days=75) for event in events)


def test_payments_and_chargebacks_are_events_of_a_terminal_and_logins_of_none() -> None:
    for record in simulate(customers=20, days=30).events:
        value = json.dumps(record).encode()
        if record["type"] == "login":
            with pytest.raises(InvalidEvent, match="terminal_id"):
                parse_event(value, schema(), entity="terminal")
        else:
            event = parse_event(value, schema(), entity="terminal")
            assert event.entity_id == record["terminal_id"]


def test_every_code_has_a_name() -> None:
    categories = schema().types["payment"].fields["category"]
    devices = schema().types["login"].fields["device"]
    countries = schema().types["payment"].fields["country"]
    for field, codes in (
        (categories, set(CATEGORIES)),
        (devices, set(DEVICES)),
        (countries, {record.get("country", HOME) for record in default_run().events}),
    ):
        assert isinstance(field, CategoryField)
        assert set(field.names) == codes


def test_card_holder_and_terminal_are_in_no_line() -> None:
    simulation = simulate(customers=20, days=30)
    holders = {record["card_holder"] for record in simulation.events if "card_holder" in record}
    assert len(holders) >= 15
    events = parsed(simulation)
    assert not any({"card_holder", "recorded_at"} & set(event.fields) for event in events)
    edges = {bucket_name("payment", "amount"): np.array([5.0, 20.0, 80.0])}
    renderer = Renderer(schema(), RenderingSpec(ratios=("amount",)), edges)
    text = "".join(renderer.line(event, ()).text for event in events)
    for hidden in (
        *holders,
        *(str(record.get("terminal_id", "-t-")) for record in simulation.events),
    ):
        assert hidden not in text


def test_labels_are_those_of_the_payments_one_each_in_order() -> None:
    records = once(default_run())
    payments = {key for key, record in records.items() if record["type"] == "payment"}
    labels = default_run().labels
    assert len(labels) == len(payments)
    assert {label["event_id"] for label in labels} == payments
    assert all(a["event_time"] <= b["event_time"] for a, b in pairwise(labels))
    for label in labels:
        record = records[label["event_id"]]
        assert label["customer_id"] == record["customer_id"]
        assert label["amount"] == record["amount"]
        assert label["event_time"] == datetime.fromisoformat(record["occurred_at"])


def test_a_label_is_known_at_the_chargeback_or_two_weeks_later() -> None:
    charged_back = {
        (record["customer_id"], record["amount"], record["occurred_at"])
        for record in default_run().events
        if record["type"] == "chargeback"
    }
    end = datetime(2026, 1, 5, tzinfo=UTC) + timedelta(days=75)
    waits = Counter[str]()
    for label in default_run().labels:
        known = label["label_available_at"]
        wait = known - label["event_time"]
        if wait == timedelta(days=14):
            waits[f"undisputed {label['label']}"] += 1
            continue
        assert label["label"] == 1
        assert timedelta(days=3) <= wait <= timedelta(days=7)
        if known < end:
            moment = known.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            assert (label["customer_id"], label["amount"], moment) in charged_back
        waits["chargeback"] += 1
    assert waits["chargeback"] > 5 * waits["undisputed 1"] > 0


def test_the_log_is_in_order_of_arrival_and_some_records_come_late() -> None:
    events = default_run().events
    arrivals = [record["recorded_at"] for record in events]
    assert arrivals == sorted(arrivals)
    newest: dict[str, str] = {}
    overtaken = 0
    for record in events:
        assert record["occurred_at"] < record["recorded_at"]
        wait = datetime.fromisoformat(record["recorded_at"]) - datetime.fromisoformat(
            record["occurred_at"]
        )
        assert wait < timedelta(minutes=16)
        customer = record["customer_id"]
        overtaken += record["occurred_at"] < newest.get(customer, "")
        newest[customer] = max(newest.get(customer, ""), record["occurred_at"])
    assert 0.001 <= overtaken / len(events) <= 0.01
    times = [record["occurred_at"] for record in events]
    highest = ""
    behind = 0
    for moment in times:
        behind += moment < highest
        highest = max(highest, moment)
    assert 0.003 <= behind / len(events) <= 0.01


def test_some_records_are_sent_twice_and_differ_only_in_when_they_came() -> None:
    seen: dict[str, dict[str, object]] = {}
    twice = 0
    for record in default_run().events:
        said = {key: value for key, value in record.items() if key != "recorded_at"}
        twice += record["event_id"] in seen
        assert seen.setdefault(record["event_id"], said) == said
    assert 0.001 <= twice / len(seen) <= 0.004


def features(records: Iterable[dict[str, Any]]) -> tuple[list[list[float]], list[list[float]]]:
    """Each payment by itself (amount, category, channel, country, hour), and beside its habits."""
    alone, habits = [], []
    before: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["occurred_at"]):
        past = before.setdefault(record["customer_id"], [])
        if record["type"] == "payment":
            now = datetime.fromisoformat(record["occurred_at"])
            paid = [other for other in past if other["type"] == "payment"]
            day = [other for other in past if now - other["at"] < timedelta(days=1)]
            hours = [abs(other["at"].hour - now.hour) for other in paid]
            codes = [
                zlib.crc32(record[name].encode()) for name in ("category", "channel", "country")
            ]
            alone.append([record["amount"], *codes, now.hour + now.minute / 60])
            habits.append(
                [
                    record["amount"] / median([other["amount"] for other in paid] or [nan]),
                    fmean([other["category"] == record["category"] for other in paid] or [nan]),
                    fmean([min(gap, 24 - gap) <= 2 for gap in hours] or [nan]),
                    sum(not other["success"] for other in day if other["type"] == "login"),
                    sum(other["type"] == "payment" for other in day),
                ]
            )
        past.append({**record, "at": datetime.fromisoformat(record["occurred_at"])})
    return alone, habits


def test_a_payment_alone_tells_less_of_fraud_than_with_its_customers_habits() -> None:
    alone, habits = features(once(default_run()).values())
    frauds = [label["label"] for label in default_run().labels]
    groups = [label["customer_id"] for label in default_run().labels]

    def judged(rows: list[list[float]]) -> tuple[float, float]:
        chances = cross_val_predict(
            HistGradientBoostingClassifier(max_iter=60, max_leaf_nodes=15, random_state=0),
            np.array(rows),
            frauds,
            groups=groups,
            cv=StratifiedGroupKFold(3, shuffle=True, random_state=0),
            method="predict_proba",
        )[:, 1]
        return roc_auc_score(frauds, chances), average_precision_score(frauds, chances)

    amount_auc, _ = judged([row[:1] for row in alone])
    alone_auc, alone_ap = judged(alone)
    auc, ap = judged([[*a, *b] for a, b in zip(alone, habits, strict=True)])
    assert amount_auc < 0.72
    assert 0.75 < alone_auc < 0.90
    assert auc > alone_auc + 0.03
    assert ap > 2.5 * alone_ap


def test_written_folder_holds_log_labels_and_schema(tmp_path: Path) -> None:
    simulation = simulate(customers=20, days=30)
    write_simulation(simulation, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert {path.name for path in folder.iterdir()} == set(FILES)
    with (folder / "events.jsonl").open() as log:
        assert [json.loads(line) for line in log] == simulation.events
    labels = pq.read_table(folder / "labels.parquet")
    assert labels.schema.equals(LABEL_SCHEMA)
    assert labels.num_rows == len(simulation.labels)
    assert load_schema(folder / "schema.yaml") == schema()


@pytest.mark.parametrize(
    ("arguments", "field"), [({"customers": 3}, "customers"), ({"days": 9}, "days")]
)
def test_too_little_to_simulate_is_refused(arguments: dict[str, int], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        simulate(**arguments)  # type: ignore[arg-type]

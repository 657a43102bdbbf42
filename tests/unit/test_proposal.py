"""A proposed schema loads, reads the log it was proposed from, and leaves out what it should."""

import json
import random
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import yaml

from export.datasets.simulator import simulate, write_simulation
from export.personal_data import personal_reason
from export.proposal import Proposal, propose_schema
from llm4es.errors import ConfigError
from llm4es.schema import (
    CategoriesField,
    CategoryField,
    EventSchema,
    FieldSpec,
    FlagField,
    NumberField,
    QuantileBuckets,
    TextField,
    load_schema,
)
from tests.commands import run

Rows = Sequence[Mapping[str, Any]]


def loaded(proposal: Proposal) -> EventSchema:
    """Every proposal must load, and read all of its sample."""
    assert proposal.first_problem == ""
    assert proposal.parsed == proposal.sampled > 0
    return load_schema(proposal.yaml)


def jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fields_of(schema: EventSchema) -> Mapping[str, FieldSpec]:
    (kind,) = schema.types.values()
    return kind.fields


def payments(count: int = 400) -> list[dict[str, Any]]:
    rng = random.Random(7)
    start = datetime(2026, 1, 1, tzinfo=UTC)
    return [
        {
            "user_id": 1 + n % 20,
            "created_at": (start + timedelta(minutes=n)).isoformat(),
            "amount_eur": round(rng.lognormvariate(2, 2), 2),
            "mcc": rng.choice([5411, 5812, 7995]),
            "tags": rng.sample(["a", "b", "c"], 2),
            "ok": rng.random() < 0.9,
            "note": f"purpose number {n}",
            "session_id": f"s-{n // 3}",
            "is_fraud": 0,
        }
        for n in range(count)
    ]


def test_the_simulated_log_gives_its_types_entities_and_ids(tmp_path: Path) -> None:
    write_simulation(simulate(customers=40, days=30), tmp_path)
    schema = loaded(propose_schema(tmp_path / "events.jsonl"))
    shipped = load_schema(tmp_path / "schema.yaml")
    assert schema.entities.keys() == shipped.entities.keys()
    assert next(iter(schema.entities)) == "customer"
    assert schema.event_id == "event_id"
    assert schema.event_time == shipped.event_time
    assert schema.type_field == "type"
    assert schema.types.keys() == shipped.types.keys()
    for name, kind in schema.types.items():
        ours = {field: spec.kind for field, spec in kind.fields.items()}
        theirs = {field: spec.kind for field, spec in shipped.types[name].fields.items()}
        assert ours == {field: kind for field, kind in theirs.items() if field != "terminal_id"}
    proposal = propose_schema(tmp_path / "events.jsonl")
    assert "#   card_holder: looks like a person's name" in proposal.yaml
    assert "recorded_at: a second time" in proposal.yaml


def test_a_table_as_movielens_is_has_text_lists_and_missing_years(tmp_path: Path) -> None:
    rows = [
        {
            "entity_id": 1 + n % 10,
            "event_time": datetime(1997, 9, 20, tzinfo=UTC) + timedelta(seconds=n),
            "item_id": n % 150,
            "title": f"Film number {n % 150}, The",
            "release_year": None if n % 50 == 3 else 1950 + n % 40,
            "genres": ["Drama", "Crime"][: 1 + n % 2],
            "rating": 1 + n % 5,
        }
        for n in range(500)
    ]
    path = tmp_path / "ratings.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    schema = loaded(propose_schema(path))
    assert schema.name == "ratings"
    assert schema.entities["entity"].field == "entity_id"
    assert schema.event_id is None
    fields = fields_of(schema)
    assert isinstance(fields["title"], TextField)
    assert isinstance(fields["genres"], CategoriesField)
    assert isinstance(fields["release_year"], NumberField)
    assert fields["release_year"].nullable
    assert isinstance(fields["rating"], NumberField)
    assert "item_id" not in fields


def test_kinds_units_and_buckets_and_no_label(tmp_path: Path) -> None:
    proposal = propose_schema(jsonl(tmp_path / "log.jsonl", payments()))
    fields = fields_of(loaded(proposal))
    amount = fields["amount_eur"]
    assert isinstance(amount, NumberField)
    assert (amount.unit, amount.decimals) == ("EUR", 2)
    assert isinstance(amount.buckets, QuantileBuckets)
    assert isinstance(fields["mcc"], CategoryField)
    assert fields["mcc"].codes == "integer"
    assert isinstance(fields["ok"], FlagField)
    assert isinstance(fields["tags"], CategoriesField)
    assert isinstance(fields["note"], TextField)
    assert not fields["session_id"].render
    assert "is_fraud: looks like a label" in proposal.yaml
    assert "3 codes: " in proposal.yaml


def test_csv_is_text_and_read_as_what_it_looks_like(tmp_path: Path) -> None:
    rows = [
        {**row, "tags": "|".join(row["tags"]), "zip4": f"{n % 7:04d}"}
        for n, row in enumerate(payments())
    ]
    path = tmp_path / "2024 export.csv"
    pa_csv.write_csv(pa.Table.from_pylist(rows), path)
    schema = loaded(propose_schema(path))
    assert schema.name == "log_2024_export"
    fields = fields_of(schema)
    assert {name: spec.kind for name, spec in fields.items()} == {
        "amount_eur": "number",
        "mcc": "category",
        "ok": "flag",
        "note": "text",
        "session_id": "text",
        "tags": "categories",
    }


@pytest.mark.parametrize(("unit", "size"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_epochs_are_told_by_their_size(unit: str, size: int, tmp_path: Path) -> None:
    rows = [{"account": f"a{n % 5}", "ts": (1_700_000_000 + n) * size, "x": n} for n in range(60)]
    schema = loaded(propose_schema(jsonl(tmp_path / "log.jsonl", rows)))
    assert (schema.event_time.format, schema.event_time.unit) == ("epoch", unit)
    assert schema.entities["account"].field == "account"


PERSONAL: Mapping[str, Sequence[object]] = {
    "contact": [f"anna.{n}@example.org" for n in range(60)],
    "called": [f"+49 170 55{n:05d}" for n in range(60)],
    "paid_with": ["4111 1111 1111 1111", "5500005555555559"] * 30,
    "from_where": ["DE89370400440532013000", "GB82 WEST 1234 5698 7654 32"] * 30,
    "host": [f"192.168.0.{n}" for n in range(60)],
    "first_name": ["Anna", "Bert", "Carl"] * 20,
    "birthDate": ["1980-02-01"] * 60,
    "home_address": ["1 High Street"] * 60,
    "card_number": list(range(60)),
    "gender": ["F", "M"] * 30,
}


def test_what_looks_personal_is_left_out_with_the_reason(tmp_path: Path) -> None:
    rows = [
        {"client_id": n % 6, "time": f"2026-01-01T00:00:{n:02d}Z", "shop": f"shop {n % 3}"}
        | {name: values[n] for name, values in PERSONAL.items()}
        for n in range(60)
    ]
    proposal = propose_schema(jsonl(tmp_path / "log.jsonl", rows))
    assert set(fields_of(loaded(proposal))) == {"shop"}
    for name in PERSONAL:
        assert f"#   {name}: looks like " in proposal.yaml
    for value in ("anna.0", "Anna", "4111", "192.168"):
        assert value not in proposal.yaml


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("merchant_name", ["Shop A", "Shop B"]),
        ("amount", [12.5, 99.0]),
        ("terminal", ["t000910", "t001271"]),
        ("note", ["2024-01-01 12:00", "1234567890"]),
        ("count", list(range(1000, 1100))),
        ("title", ["Emma (1996)"]),
        ("message", ["hello"]),
        ("shipping", ["fast"]),
        ("version", ["1.2.3"]),
    ],
)
def test_what_is_not_personal_is_kept(name: str, values: list[object]) -> None:
    assert personal_reason(name, values) == ""


def test_an_entity_that_is_an_address_is_named_with_a_warning(tmp_path: Path) -> None:
    rows = [{"user": f"u{n % 4}@x.org", "at": f"2026-01-01T00:00:{n:02d}Z"} for n in range(40)]
    proposal = propose_schema(jsonl(tmp_path / "log.jsonl", rows))
    loaded(proposal)
    assert "looks like e-mail addresses: hash it before it is logged" in proposal.yaml


def test_odd_names_and_values_stay_valid_yaml(tmp_path: Path) -> None:
    rows = [
        {
            "user id": f"u{n % 4}",
            "time": f"2026-01-01T00:00:{n:02d}Z",
            "yes": ["a: b", "# c\nd", '"e"', "{f}"][n % 4],
            "x,y: {z}": n,
            "nested": {"a": 1},
            "mixed": [1, "a"][n % 2],
            "empty": None,
            "same": "always",
        }
        for n in range(60)
    ]
    proposal = propose_schema(jsonl(tmp_path / "log.jsonl", rows), entity="user id")
    assert set(fields_of(loaded(proposal))) == {"yes", "x,y: {z}"}
    assert "nested: of several types, or nested" in proposal.yaml
    assert "same: always always" in proposal.yaml


def test_lines_that_are_no_records_are_passed_over_and_counted_as_unread(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "log.jsonl", payments())
    with path.open("a") as log:
        log.write("no json\n[1, 2]\n")
    proposal = propose_schema(path)
    assert (proposal.sampled, proposal.parsed) == (402, 400)
    assert "record 400" in proposal.first_problem


def test_where_nothing_is_an_entity_or_a_time_the_flag_is_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "log.jsonl", [{"who": n % 3, "t": f"day {n}"} for n in range(30)])
    with pytest.raises(ConfigError, match="--time"):
        propose_schema(path)
    path = jsonl(tmp_path / "log.jsonl", [{"x": n * 0.5, "at": "2026-01-01"} for n in range(30)])
    with pytest.raises(ConfigError, match="--entity"):
        propose_schema(path)
    with pytest.raises(ConfigError, match="no field 'nobody'"):
        propose_schema(path, entity="nobody")
    with pytest.raises(ConfigError, match="holds no record"):
        propose_schema(jsonl(tmp_path / "none.jsonl", []))


def test_the_command_prints_yaml_alone_and_says_how_much_fits(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "log.jsonl", payments())
    done = run(["export", "schema", str(path), "--sample", "100"])
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["name"] == "log"
    assert done.stderr == "100 of 100 records fit\n"
    refused = run(["export", "schema", str(tmp_path / "nothing.csv")])
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1

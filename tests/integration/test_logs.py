"""Logs read one entity at a time: by the rules of `read_log`, and in flat memory."""

import json
import logging
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from export.corpus import read_log
from export.datasets.simulator import simulate, write_simulation
from export.logs import LogCounts, iterate_histories
from llm4es.errors import ConfigError
from llm4es.events import Event
from llm4es.schema import EventSchema, load_schema
from tests.commands import ROOT

SCHEMA = """
name: log
entities: {customer: {field: customer_id}, terminal: {field: terminal_id}}
event_time: {field: at}
types:
  event:
    fields:
      amount: {kind: number, nullable: true}
      code: {kind: category, codes: integer}
      tags: {kind: categories, nullable: true}
      ok: {kind: flag}
      note: {kind: text, nullable: true}
"""
RECORDS: list[dict[str, Any]] = [
    {"customer_id": "b", "terminal_id": 7, "at": "2026-01-01T00:00:03Z", "amount": 1.5,
     "code": 4, "tags": ["x", "y"], "ok": True, "note": 'late, "quoted"\nand on two lines'},
    {"customer_id": "a", "terminal_id": None, "at": "2026-01-01T00:00:02Z", "amount": 2.5,
     "code": 5, "tags": None, "ok": False, "note": None},
    {"customer_id": "b", "terminal_id": 7, "at": "2026-01-01T00:00:01Z", "amount": None,
     "code": 6, "tags": ["z"], "ok": True, "note": "first"},
    {"customer_id": None, "terminal_id": 9, "at": "2026-01-01T00:00:04Z", "amount": 3.0,
     "code": 7, "tags": None, "ok": True, "note": "nobody's"},
    {"customer_id": "ä", "terminal_id": 9, "at": "no time", "amount": 3.0,
     "code": 8, "tags": None, "ok": True, "note": "invalid"},
]  # fmt: skip


def schema() -> EventSchema:
    return load_schema(SCHEMA)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """The same records in the format that the name asks for."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        cells = [r | {"tags": None if r["tags"] is None else "|".join(r["tags"])} for r in records]
        pa_csv.write_csv(pa.Table.from_pylist(cells), path)
    return path


def both(
    path: Path, words: EventSchema, entity: str
) -> tuple[dict[str, tuple[Event, ...]], LogCounts]:
    """Histories as they are iterated, which are those of `read_log` with the same counts."""
    counts = LogCounts()
    found = dict(iterate_histories(path, words, entity=entity, counts=counts))
    if path.suffix != ".csv":
        whole = read_log(path, words, entity=entity)
        assert list(found) == list(whole.histories)
        assert found == dict(whole.histories)
        assert (counts.records, counts.duplicates, counts.without_entity, counts.invalid) == (
            whole.records, whole.duplicates, whole.without_entity, whole.invalid,
        )  # fmt: skip
        assert counts.events == whole.events
    return found, counts


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_a_log_reads_the_same_in_every_format(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / f"log.{suffix}", RECORDS)
    with caplog.at_level(logging.WARNING):
        found, counts = both(path, schema(), "customer")
    assert list(found) == ["a", "b"]
    assert [event.fields["note"] for event in found["b"]] == ["first", RECORDS[0]["note"]]
    assert [event.fields["amount"] for event in found["b"]] == [None, 1.5]
    assert [event.fields["code"] for event in found["b"]] == ["6", "4"]
    assert [event.fields["tags"] for event in found["b"]] == [("z",), ("x", "y")]
    assert found["a"][0].fields["ok"] is False
    assert (counts.records, counts.without_entity, counts.invalid) == (5, 1, 1)
    assert "1 of 5 records are no events" in caplog.text
    terminals, _ = both(path, schema(), "terminal")
    assert list(terminals) == ["7", "9"]


def test_the_simulated_log_with_its_duplicates_and_late_records(tmp_path: Path) -> None:
    write_simulation(simulate(customers=60, days=40), tmp_path)
    words = load_schema(tmp_path / "schema.yaml")
    _, counts = both(tmp_path / "events.jsonl", words, "customer")
    assert counts.duplicates > 0
    _, counts = both(tmp_path / "events.jsonl", words, "terminal")
    assert counts.without_entity > 0


def test_of_two_records_with_one_identity_the_first_in_the_log_stands(tmp_path: Path) -> None:
    words = load_schema(SCHEMA.replace("event_time:", "event_id: note\nevent_time:"))
    twice = [RECORDS[0] | {"note": "n", "amount": float(n)} for n in range(9_000)]
    for suffix in ("jsonl", "parquet"):
        found, counts = both(write(tmp_path / f"log.{suffix}", twice), words, "customer")
        assert [event.fields["amount"] for event in found["b"]] == [0.0]
        assert counts.duplicates == 8_999


def test_nan_is_null_and_nanoseconds_are_cut(tmp_path: Path) -> None:
    times = np.array(["2026-01-01T00:00:00.123456789"] * 2, "datetime64[ns]")
    table = pa.table({
        "customer_id": [1, 2], "terminal_id": [1, 1], "at": times, "amount": [float("nan"), 1.0],
        "code": [1, 2], "tags": pa.array([None, None], pa.list_(pa.string())),
        "ok": [True, False], "note": [None, "x"],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "log.parquet")
    found = dict(iterate_histories(tmp_path / "log.parquet", schema(), entity="customer"))
    assert found["1"][0].fields["amount"] is None
    assert found["1"][0].occurred_at.microsecond == 123_456


def test_dictionaries_and_times_with_a_zone_are_read_as_what_they_stand_for(tmp_path: Path) -> None:
    moment = datetime(2026, 1, 1, 3, tzinfo=UTC)
    table = pa.Table.from_pylist(RECORDS[:3]).to_pydict() | {"at": [moment] * 3}
    columns = {name: pa.array(values) for name, values in table.items()}
    columns["at"] = columns["at"].cast(pa.timestamp("ms", tz="Asia/Tokyo"))
    for name in ("customer_id", "note"):
        columns[name] = columns[name].dictionary_encode()
    pq.write_table(pa.table(columns), tmp_path / "log.parquet", row_group_size=1)
    found, _ = both(tmp_path / "log.parquet", schema(), "customer")
    assert list(found) == ["a", "b"]
    assert {event.occurred_at for event in found["b"]} == {moment}
    assert [event.fields["note"] for event in found["b"]] == [RECORDS[0]["note"], "first"]


def test_a_folder_of_parts_is_one_log(tmp_path: Path) -> None:
    for part, record in enumerate(RECORDS[:3]):
        write(tmp_path / f"part-{part}.jsonl", [record])
    found = dict(iterate_histories(tmp_path, schema(), entity="customer"))
    assert [len(history) for history in found.values()] == [1, 2]
    ids = [event.event_id for event in found["b"]]
    assert ids[0].endswith("/0000000002/0000000000000000000")


def test_lines_that_are_no_json_and_rows_that_are_no_rows_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", RECORDS[:3])
    with path.open("ab") as log:
        log.write(b'{"customer_id": \xff}\n\n[]\n{"customer_id": true}\n')
    _, counts = both(path, schema(), "customer")
    assert counts.invalid == 4
    path = write(tmp_path / "log.csv", RECORDS[:3])
    with path.open("a") as log:
        log.write("one,two\n")
    counts = LogCounts()
    assert len(dict(iterate_histories(path, schema(), entity="customer", counts=counts))) == 2
    assert (counts.records, counts.invalid) == (4, 1)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    words = schema()

    def refused(path: Path, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            list(iterate_histories(path, words, entity="customer"))

    refused(tmp_path / "none.jsonl", "is not there")
    refused(tmp_path / "none.xlsx", "is no log")
    refused(tmp_path, "is no log")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    refused(tmp_path / "bad.parquet", "cannot be read")
    refused(write(tmp_path / "nobody.jsonl", [RECORDS[3]]), "holds no event of entity 'customer'")
    pq.write_table(pa.table({"customer_id": ["a"]}), tmp_path / "timeless.parquet")
    refused(tmp_path / "timeless.parquet", "at: .* has no such column")
    pq.write_table(pa.table({"customer_id": [1.5], "at": ["x"]}), tmp_path / "float.parquet")
    refused(tmp_path / "float.parquet", "an id is text or an integer")


def test_stopping_early_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", RECORDS[:3])
    histories = iterate_histories(path, schema(), entity="customer")
    assert next(histories)[0] == "a"
    histories.close()  # type: ignore[attr-defined]


MEASURE = """
import resource, sys
from pathlib import Path
from export.logs import iterate_histories
from llm4es.schema import load_schema
schema = load_schema(sys.argv[2])
log = iterate_histories(Path(sys.argv[1]), schema, entity="customer", memory_mb=64)
events = sum(len(history) for _, history in log)
print(events, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
WIDE = """
name: wide
entities: {customer: {field: customer_id}}
event_time: {field: at, format: epoch}
types: {event: {fields: {amount: {kind: number}, note: {kind: text}}}}
"""


def peak_mb(path: Path, records: int) -> float:
    """Peak memory of a process of its own that reads a log of so many records."""
    rng = np.random.default_rng(0)
    columns = pa.schema({
        "customer_id": pa.int64(), "at": pa.int64(), "amount": pa.float64(), "note": pa.string(),
    })  # fmt: skip
    with pq.ParquetWriter(path, columns) as writer:
        for start in range(0, records, 50_000):
            numbers = np.arange(start, start + 50_000)
            customers = rng.integers(0, records // 100, 50_000)
            notes = [f"{number:>0100d}" for number in numbers]
            amounts = rng.random(50_000)
            batch = pa.table([customers, 1_700_000_000 + numbers, amounts, notes], schema=columns)
            writer.write_table(batch)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), WIDE],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    events, peak_kb = map(int, done.stdout.split())
    assert events == records
    return peak_kb / 1024


def test_memory_is_flat_from_200_thousand_records_to_a_million(tmp_path: Path) -> None:
    small = peak_mb(tmp_path / "small.parquet", 200_000)
    large = peak_mb(tmp_path / "large.parquet", 1_000_000)
    # Five times the records: held as events they took 600 MB more, here it was 45, of which most
    # is DuckDB's limit, which the smaller log does not reach.
    assert large < small + 120, f"{small:.0f} MB, then {large:.0f} MB"

"""What compaction promises: fewer parts, the same rows, none lost to a kill and none twice."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from feast import FeatureStore
from pyarrow import parquet

from llm4es.deletion import DeletionKey, Tombstone
from llm4es.events import TopicPartition
from llm4es.feast import FeastSink, ViewSpec, compact_view, open_sink
from llm4es.feast.compaction import compact
from llm4es.feast.definitions import FIELDS, TIMESTAMP_FIELD
from llm4es.feast.deletions import rewriting
from llm4es.feast.journal import recover_journals
from llm4es.feast.offline_log import LogOfflineStore, rewrite_deleted
from llm4es.feast.parts import list_parts, log_schema, write_part
from llm4es.features import view_name
from tests.feast_parts import (
    BUNDLE_ID,
    MICROSECOND,
    NOON,
    ROOT,
    apply,
    make_repo,
    make_spec,
    row,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
]

VIEW = view_name("customer", BUNDLE_ID)
JOIN_KEY = "customer_id"
FLUSH_KILLS, COMPACTION_KILLS = 50, 20
EVENTS = TopicPartition("events", 0)


@pytest.fixture
def spec(tmp_path: Path) -> ViewSpec:
    return make_spec(tmp_path / "bundle")


@pytest.fixture
def repo(tmp_path: Path, spec: ViewSpec) -> Path:
    folder = make_repo(tmp_path / "repo")
    apply(folder, spec)
    return folder


def log_of(repo: Path) -> Path:
    return repo / "data/offline" / VIEW


def data_parts(log: Path) -> list[Path]:
    return [part for part in list_parts(log) if part.stem != "part-0-schema"]


def lying_in(parts: Sequence[Path]) -> Counter[tuple[str, str]]:
    """(entity, event) of rows as they lie there, each as often as it does."""
    table = pa.concat_tables(
        [log_schema(JOIN_KEY).empty_table(), *(parquet.read_table(p) for p in parts)]
    )
    names = (JOIN_KEY, "last_event_id")
    return Counter(zip(*(table[name].to_pylist() for name in names), strict=True))


def read(repo: Path) -> Counter[tuple[str, str]]:
    """(entity, event) of rows as the store gives them."""
    stock = FeatureStore(repo_path=str(repo))
    found = LogOfflineStore.pull_all_from_table_or_query(
        config=stock.config,
        data_source=stock.get_data_source(f"{VIEW}_offline_log"),
        join_key_columns=[JOIN_KEY],
        feature_name_columns=list(FIELDS),
        timestamp_field=TIMESTAMP_FIELD,
    ).to_arrow()
    return Counter(
        zip(*(found[name].to_pylist() for name in (JOIN_KEY, "last_event_id")), strict=True)
    )


def flush(sink: FeastSink, spec: ViewSpec, first: int, count: int = 2, *, days: int = 0) -> None:
    rows = [
        row(
            spec, f"c{n % 3}", seed=n, last_event_id=f"e{n}",
            as_of=NOON + n * MICROSECOND + days * 86_400_000_000 * MICROSECOND,
        )
        for n in range(first, first + count)
    ]  # fmt: skip
    sink.journal(rows, {EVENTS: (first, first + count)})
    sink.roll()


def test_kills_during_flushes_and_compactions_lose_no_row_and_double_none(repo: Path) -> None:
    log, rng = log_of(repo), random.Random(8)  # random moments are the machine's own
    reported: dict[str, int] = {}
    rounds = ["flush"] * FLUSH_KILLS + ["compact"] * COMPACTION_KILLS
    rng.shuffle(rounds)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.contract.compacting", str(log)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        for number, what in enumerate(rounds):
            entity = f"{what}-{number}"
            parent.stdin.write(f"{what} {entity}\n")
            parent.stdin.flush()
            pid = int(parent.stdout.readline().removeprefix("pid "))
            sign = "durable" if what == "flush" else "compacting"
            for _ in range(rng.randint(1, 3)):
                while True:
                    line = parent.stdout.readline()
                    if line.startswith("durable"):
                        reported[entity] = int(line.split()[1])
                    if line.startswith(sign):
                        break
            time.sleep(rng.uniform(0, 0.02))  # somewhere within it
            os.kill(pid, signal.SIGKILL)
            while (line := parent.stdout.readline().strip()) != "gone":
                if line.startswith("durable"):
                    reported[entity] = int(line.split()[1])
            if number % 10 == 0:
                recover_journals(log)
                refuse_wrong(read(repo), reported)
        parent.stdin.close()
    recover_journals(log)
    refuse_wrong(read(repo), reported)
    compact(log, JOIN_KEY)
    assert not list(log.rglob(".compact-*.tmp"))
    refuse_wrong(lying_in(data_parts(log)), reported)
    assert len(data_parts(log)) == 1


def refuse_wrong(found: Counter[tuple[str, str]], reported: dict[str, int]) -> None:
    assert set(found.values()) == {1}
    for entity, count in reported.items():
        numbers = {int(event.removeprefix("e")) for of, event in found if of == entity}
        assert set(range(count)) <= numbers, entity
        assert numbers == set(range(len(numbers)))  # nothing else


def test_parts_of_a_day_become_one_and_rows_that_stood_twice_stand_once(
    repo: Path, spec: ViewSpec
) -> None:
    sink = open_sink(repo, spec, writer_id="w")
    for first in (0, 2, 4):
        flush(sink, spec, first)
    flush(sink, spec, 3, 3)  # other offsets, rows that are there
    flush(sink, spec, 100, days=1)
    assert len(data_parts(log_of(repo))) == 5
    before = read(repo)
    done = compact_view(repo, spec)
    assert (done.parts_before, done.parts_after, done.duplicates) == (5, 2, 3)
    assert read(repo) == before == lying_in(data_parts(log_of(repo)))
    assert {part.parent.name for part in data_parts(log_of(repo))} == {
        "dt=2026-03-01", "dt=2026-03-02",
    }  # fmt: skip
    again = compact_view(repo, spec)
    assert (again.parts_before, again.parts_after, again.duplicates) == (2, 2, 0)
    sink.close()


def test_an_exact_replay_replaces_its_parts_and_another_stands_beside_them(
    repo: Path, spec: ViewSpec
) -> None:
    sink = open_sink(repo, spec, writer_id="w")
    flush(sink, spec, 0, 4)
    (part,) = data_parts(log_of(repo))
    assert part.name.startswith("events-0.000000000000-000000000004-")
    flush(sink, spec, 0, 4)
    assert data_parts(log_of(repo)) == [part]
    sink.journal([row(spec, last_event_id="another")], {EVENTS: (0, 4)})  # not the same rows
    sink.roll()
    assert len(data_parts(log_of(repo))) == 2
    assert len(read(repo)) == 5
    sink.close()


def test_a_log_without_days_is_laid_out_by_day(repo: Path, spec: ViewSpec) -> None:
    sink = open_sink(repo, spec, writer_id="w")
    flush(sink, spec, 0, 4)
    sink.close()
    log = log_of(repo)
    (part,) = data_parts(log)
    write_part(log, "part-of-an-older-version", parquet.ParquetFile(part).read())
    part.unlink()
    assert compact(log, JOIN_KEY).parts_after == 1
    assert data_parts(log)[0].parent.name == "dt=2026-03-01"
    assert len(read(repo)) == 4


def test_parts_that_are_large_enough_are_left_alone(repo: Path, spec: ViewSpec) -> None:
    sink = open_sink(repo, spec, writer_id="w")
    for first in range(0, 20, 4):
        flush(sink, spec, first, 4)
    sink.close()
    done = compact(log_of(repo), JOIN_KEY, part_rows=8)
    sizes = sorted(parquet.read_metadata(part).num_rows for part in data_parts(log_of(repo)))
    assert (done.parts_after, sizes) == (3, [4, 8, 8])


def test_readers_go_on_while_parts_are_replaced(repo: Path, spec: ViewSpec) -> None:
    sink = open_sink(repo, spec, writer_id="w")
    failures: list[BaseException] = []
    done = threading.Event()

    def keep_reading() -> None:
        try:
            while not done.is_set():
                assert set(read(repo).values()) <= {1}
        except BaseException as error:  # noqa: BLE001 - the test's thread says it
            failures.append(error)

    reader = threading.Thread(target=keep_reading)
    reader.start()
    for first in range(0, 120, 2):
        flush(sink, spec, first)
        if first % 6 == 4:
            compact(log_of(repo), JOIN_KEY)
    done.set()
    reader.join()
    sink.close()
    assert failures == []
    assert len(read(repo)) == 120


def test_a_compaction_waits_for_who_rewrites_the_log(repo: Path, spec: ViewSpec) -> None:
    sink = open_sink(repo, spec, writer_id="w")
    for first in (0, 2):
        flush(sink, spec, first)
    sink.close()
    with ThreadPoolExecutor() as pool, rewriting(log_of(repo)):
        waiting = pool.submit(compact, log_of(repo), JOIN_KEY)
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        assert len(data_parts(log_of(repo))) == 2
    assert waiting.result().parts_after == 1


def test_compaction_keeps_what_is_deleted_out_of_sight(repo: Path, spec: ViewSpec) -> None:
    key = DeletionKey("k" * 32)
    sink = open_sink(repo, spec, writer_id="w", deletion_key=key)
    for first in (0, 3):
        flush(sink, spec, first, 3)
    sink.delete([Tombstone(entity_id="c1", as_of=NOON + timedelta(days=1))])
    left = {(f"c{n % 3}", f"e{n}") for n in range(6) if n % 3 != 1}
    assert set(read(repo)) == left
    sink.close()
    compact(log_of(repo), JOIN_KEY)
    assert set(read(repo)) == left
    rewrite_deleted(log_of(repo), join_key=JOIN_KEY, timestamp_field=TIMESTAMP_FIELD)
    assert set(lying_in(data_parts(log_of(repo)))) == left

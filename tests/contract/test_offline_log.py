"""What the offline log promises: nothing lost to a kill, nothing read twice, no future seen."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import typing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, PushSource
from feast.data_source import PushMode
from feast.types import Int64
from feast.value_type import ValueType
from pyarrow import parquet

from dev.servers import wait_until
from llm4es.deletion import DeletionKey, Tombstone
from llm4es.errors import ConfigError, SinkUnavailable
from llm4es.feast import (
    FeastSink,
    ViewSpec,
    offline_log,
    open_sink,
    read_as_of,
    reader,
    training_frame,
)
from llm4es.feast.definitions import FIELDS, TIMESTAMP_FIELD
from llm4es.feast.deletions import Deletions, pending_deletions
from llm4es.feast.journal import OfflineJournal, recover_journals
from llm4es.feast.offline_log import LogOfflineStore, rewrite_deleted
from llm4es.feast.parts import day_folder, ensure_log, list_parts, log_schema, rows_to_batch
from llm4es.features import FeatureRow, view_name
from tests.feast_parts import (
    BUNDLE_ID,
    MICROSECOND,
    NOON,
    ROOT,
    apply,
    frame,
    make_repo,
    make_spec,
    row,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ibis"),
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
]

VIEW = view_name("customer", BUNDLE_ID)
JOIN_KEY = "customer_id"
SECOND = timedelta(seconds=1)
KEY = DeletionKey("a key of tests alone")
Unit = Literal["ns", "us", "ms", "s"]
# Rows that a process has reported when it is killed: within a journal, as it is sealed, as its
# part is written, and after many.
KILLED_AFTER = (0, 3, 18, 21, 24, 60, 63, 150)


@pytest.fixture
def spec(tmp_path: Path) -> ViewSpec:
    return make_spec(tmp_path / "bundle")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def repo(tmp_path: Path, spec: ViewSpec) -> Path:
    folder = make_repo(tmp_path / "repo")
    apply(folder, spec)
    return folder


@pytest.fixture
def stock(repo: Path) -> FeatureStore:
    return FeatureStore(repo_path=str(repo))


@pytest.fixture
def sink(repo: Path, spec: ViewSpec) -> Iterator[FeastSink]:
    opened = open_sink(repo, spec, writer_id="w")
    yield opened
    opened.close()


@contextmanager
def journal(
    folder: Path, *, roll_rows: int = 10**6, roll_s: float = 3600
) -> Iterator[OfflineJournal]:
    opened = OfflineJournal(
        folder, join_key=JOIN_KEY, writer_id="w", roll_rows=roll_rows, roll_s=roll_s
    )
    try:
        yield opened
    finally:
        opened.close()


def read_parts(folder: Path) -> pa.Table:
    """Rows as they lie in the parts, each as often as it lies there."""
    schema = log_schema(JOIN_KEY)
    return pa.concat_tables(
        [schema.empty_table(), *(parquet.read_table(part) for part in list_parts(folder))]
    )


def event_ids(folder: Path) -> list[str]:
    return sorted(read_parts(folder)["last_event_id"].to_pylist())


def the_journal(folder: Path) -> Path:
    (found,) = (folder / "_journal").glob("*.journal")
    return found


def one(spec: ViewSpec, number: int, entity_id: str = "c1") -> FeatureRow:
    return row(
        spec,
        entity_id,
        seed=number,
        as_of=NOON + number * MICROSECOND,
        last_event_id=f"e{number}",
    )


def test_every_row_reported_as_durable_is_there_once_after_kills_at_any_moment(log: Path) -> None:
    entities = [f"killed-after-{count}" for count in KILLED_AFTER]
    reported: dict[str, int] = {}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.contract.journalling", str(log), *entities],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        for entity_id, count in zip(entities, KILLED_AFTER, strict=True):
            parent.stdin.write("\n")
            parent.stdin.flush()
            pid = int(parent.stdout.readline().removeprefix("pid "))
            reported[entity_id] = 0
            while reported[entity_id] < count:
                reported[entity_id] = int(parent.stdout.readline())
            assert recover_journals(log) == 0  # the writer lives, and those before it left none
            os.kill(pid, signal.SIGKILL)
            while (line := parent.stdout.readline().strip()) != "gone":
                reported[entity_id] = int(line)
    recover_journals(log)
    assert list((log / "_journal").iterdir()) == []
    found = Counter(
        (entity, int(event.removeprefix("e")))
        for entity, event in zip(
            *(read_parts(log)[name].to_pylist() for name in (JOIN_KEY, "last_event_id")),
            strict=True,
        )
    )
    assert set(found.values()) == {1}
    for entity_id, count in reported.items():
        numbers = {number for entity, number in found if entity == entity_id}
        assert set(range(count)) <= numbers
        # What was durable and not yet reported may be there, too: nothing else.
        assert numbers == set(range(len(numbers)))


def test_a_torn_last_frame_is_cut_off_wherever_it_was_torn(
    tmp_path: Path, log: Path, spec: ViewSpec
) -> None:
    with journal(log) as opened:
        opened.append([one(spec, 0), one(spec, 1)])
        whole = the_journal(log).stat().st_size
        opened.append([one(spec, 2)])
        content = the_journal(log).read_bytes()
        name = the_journal(log).name
    cuts = [*range(whole, whole + 10), *range(whole + 10, len(content), 97), len(content) - 1]
    torn = {f"cut-{cut}": content[:cut] for cut in cuts}
    flipped = bytearray(content)
    flipped[-20] ^= 1
    torn["flipped"] = bytes(flipped)
    for case, left in torn.items():
        folder = tmp_path / case
        (folder / "_journal").mkdir(parents=True)
        (folder / "_journal" / name).write_bytes(left)
        assert recover_journals(folder) == 2, case
        assert event_ids(folder) == ["e0", "e1"], case
        assert recover_journals(folder) == 0
    for case, left in {"empty": b"", "no schema": content[:11]}.items():
        folder = tmp_path / case
        (folder / "_journal").mkdir(parents=True)
        (folder / "_journal" / name).write_bytes(left)
        assert recover_journals(folder) == 0
        assert list((folder / "_journal").iterdir()) == []


def test_a_kill_between_the_part_and_the_journals_end_makes_no_row_twice(
    tmp_path: Path, log: Path, spec: ViewSpec
) -> None:
    with journal(log) as opened:
        opened.append([one(spec, 0)])
        path = the_journal(log)
        shutil.copy(path, tmp_path / "kept")
        opened.roll()
        assert event_ids(log) == ["e0"]
        shutil.move(tmp_path / "kept", path)
        recover_journals(log)  # into the part that is there
        assert event_ids(log) == ["e0"]
        assert not path.exists()


def test_recovery_takes_nothing_from_a_writer_that_lives(log: Path, spec: ViewSpec) -> None:
    with journal(log) as living:
        living.append([one(spec, 0)])
        with journal(log) as other:  # opening recovers, too
            assert recover_journals(log) == 0
            assert event_ids(log) == []
            other.append([one(spec, 1)])
        living.append([one(spec, 2)])
    assert event_ids(log) == ["e0", "e1", "e2"]


def test_half_a_part_is_no_part(log: Path, spec: ViewSpec) -> None:
    with journal(log) as opened:
        opened.append([one(spec, 0)])
    (log / ".part-half.parquet.tmp").write_bytes(b"PAR1")
    assert event_ids(log) == ["e0"]


@pytest.mark.parametrize("when", [{"roll_rows": 5}, {"roll_s": 0.01}])
def test_rows_are_rolled_by_count_and_by_time_without_being_asked(
    log: Path, spec: ViewSpec, when: dict[str, int]
) -> None:
    with journal(log, **when) as opened:
        opened.append([one(spec, n) for n in range(5)])
        assert wait_until(lambda: len(event_ids(log)) == 5, timeout_s=60)


def test_a_writer_that_is_ahead_of_its_parts_waits_and_is_refused_while_none_can_be_written(
    log: Path, spec: ViewSpec
) -> None:
    with journal(log, roll_rows=1) as opened:
        for number in range(12):
            opened.append([one(spec, number)])
            assert len(list((log / "_journal").glob("*.journal"))) <= 5
        opened.roll()
        day = Path(str(day_folder(log, NOON.date())))
        moved = day.rename(log / ".moved")
        day.write_bytes(b"")  # no folder: no part can be written
        for number in range(12, 16):
            opened.append([one(spec, number)])
        with pytest.raises(SinkUnavailable):
            opened.append([one(spec, 16)])
        day.unlink()
        moved.rename(day)
    assert event_ids(log) == sorted(f"e{number}" for number in range(16))


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A disk that is full: writes beyond `size` fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_a_full_disk_refused_is_not_there_and_what_it_took_before_and_after_is(
    log: Path, spec: ViewSpec
) -> None:
    with journal(log) as opened:
        opened.append([one(spec, 0)])
        with files_no_larger_than(the_journal(log).stat().st_size + 100):
            with pytest.raises(SinkUnavailable):
                opened.append([one(spec, 1)])
            with pytest.raises(SinkUnavailable):
                opened.roll()  # no part fits
        opened.append([one(spec, 2)])
    assert event_ids(log) == ["e0", "e2"]


def test_a_journal_that_a_full_disk_tore_is_whole_for_a_recovery(log: Path, spec: ViewSpec) -> None:
    with journal(log) as opened:
        opened.append([one(spec, 0)])
        path = the_journal(log)
        size = path.stat().st_size
        with files_no_larger_than(size + 100), pytest.raises(SinkUnavailable):
            opened.append([one(spec, 1)])
        left = path.read_bytes() if path.exists() else b""
    # The failure seals the journal, and the roll may have come first.
    assert len(left) in {0, size}
    assert event_ids(log) == ["e0"]


def historical(stock: FeatureStore, entities: pd.DataFrame) -> pd.DataFrame:
    found: pd.DataFrame = stock.get_historical_features(
        entity_df=entities, features=[f"{VIEW}:embedding", f"{VIEW}:last_event_id"]
    ).to_df()
    return found


def test_every_entity_row_comes_back_in_order_with_what_was_known_at_its_moment(
    stock: FeatureStore, sink: FeastSink, spec: ViewSpec
) -> None:
    later = NOON + SECOND
    sink.journal(
        [
            row(spec, "c1", as_of=NOON, last_event_id="c1-first"),
            row(spec, "c1", as_of=later, last_event_id="c1-second"),
            row(spec, "c2", as_of=NOON, last_event_id="c2-first"),
        ]
    )
    sink.roll()
    asked: list[tuple[str, datetime, str | None]] = [
        ("c2", later, "c2-first"),
        ("c1", later - MICROSECOND, "c1-first"),
        ("c1", later, "c1-second"),  # inclusive
        ("c1", NOON, "c1-first"),
        ("nobody", NOON, None),
        ("c1", NOON, "c1-first"),  # the same once more
        ("c1", NOON - MICROSECOND, None),
        ("c1", later + timedelta(days=4000), "c1-second"),
    ]
    entities = pd.DataFrame(
        {
            JOIN_KEY: [entity_id for entity_id, _, _ in asked],
            "event_timestamp": [moment for _, moment, _ in asked],
            "label": range(len(asked)),
        },
        index=range(100, 100 + len(asked)),
    )
    before = entities.copy()
    found = historical(stock, entities)
    assert list(found["label"]) == list(range(len(asked)))
    assert list(found[JOIN_KEY]) == list(entities[JOIN_KEY])
    assert list(found["event_timestamp"]) == list(entities["event_timestamp"])
    due = [event_id for _, _, event_id in asked]
    assert [None if pd.isna(each) else each for each in found["last_event_id"]] == due
    assert set(found.columns) == {*entities.columns, "embedding", "last_event_id"}
    pd.testing.assert_frame_equal(entities, before)  # the caller's own


@pytest.mark.parametrize("unit", typing.get_args(Unit))
def test_entity_timestamps_of_any_unit_and_zone_are_accepted(
    stock: FeatureStore, sink: FeastSink, spec: ViewSpec, unit: Unit
) -> None:
    sink.journal([row(spec, as_of=NOON, last_event_id="known")])
    sink.roll()
    zoned = pd.Series([NOON.astimezone(timezone(timedelta(hours=5)))]).dt.as_unit(unit)
    naive = pd.Series([NOON.replace(tzinfo=None)]).dt.as_unit(unit)
    for moments in (zoned, naive, zoned.astype(str)):
        found = historical(stock, pd.DataFrame({JOIN_KEY: "c1", "event_timestamp": moments}))
        assert list(found["last_event_id"]) == ["known"]


def test_a_nanosecond_before_a_row_does_not_see_it_and_one_after_does(
    stock: FeatureStore, sink: FeastSink, spec: ViewSpec
) -> None:
    sink.journal([row(spec, as_of=NOON, last_event_id="known")])
    sink.roll()
    nanosecond = pd.Timedelta(1, "ns")
    moments = [pd.Timestamp(NOON).as_unit("ns") + step * nanosecond for step in (-1, 0, 1)]
    found = historical(stock, pd.DataFrame({JOIN_KEY: "c1", "event_timestamp": moments}))
    assert list(found["last_event_id"].notna()) == [False, True, True]


def test_no_entity_rows_and_no_log_yet_are_answered_too(
    stock: FeatureStore, sink: FeastSink
) -> None:
    entities = pd.DataFrame({JOIN_KEY: ["c1"], "event_timestamp": [NOON]})
    assert historical(stock, entities)["last_event_id"].isna().all()
    assert historical(stock, entities.iloc[:0]).empty
    shutil.rmtree(sink.journal_folder)  # no one has written yet: journal and log are one folder
    assert historical(stock, entities)["last_event_id"].isna().all()


def pull_all(stock: FeatureStore) -> pd.DataFrame:
    found: pd.DataFrame = LogOfflineStore.pull_all_from_table_or_query(
        config=stock.config,
        data_source=stock.get_data_source(f"{VIEW}_offline_log"),
        join_key_columns=[JOIN_KEY],
        feature_name_columns=list(FIELDS),
        timestamp_field=TIMESTAMP_FIELD,
    ).to_df()
    return found


def test_identical_rows_in_two_parts_are_read_once(
    repo: Path, stock: FeatureStore, sink: FeastSink, spec: ViewSpec
) -> None:
    rows = [one(spec, 0), one(spec, 1)]
    sink.journal(rows)
    again = open_sink(repo, spec, writer_id="after-a-crash")
    again.journal([*rows, one(spec, 2)])
    again.close()
    sink.roll()
    assert len(read_parts(repo / "data/offline" / VIEW)) == 5
    assert sorted(pull_all(stock)["last_event_id"]) == ["e0", "e1", "e2"]
    found = historical(
        stock, pd.DataFrame({JOIN_KEY: "c1", "event_timestamp": [each.as_of for each in rows]})
    )
    assert list(found["last_event_id"]) == ["e0", "e1"]
    assert list(read_as_of(stock, "customer")["event_id"]) == ["e0", "e1", "e2"]


def test_what_stock_feast_writes_offline_is_one_more_part_and_as_good_as_ours(
    repo: Path, stock: FeatureStore, sink: FeastSink, spec: ViewSpec
) -> None:
    sink.journal([one(spec, 0)])
    sink.roll()
    ours = list_parts(repo / "data/offline" / VIEW)
    stock.write_to_offline_store(VIEW, frame([one(spec, 1)]))
    parts = list_parts(repo / "data/offline" / VIEW)
    assert len(parts) == len(ours) + 1
    assert {parquet.read_schema(part) for part in parts} == {parquet.read_schema(ours[0])}
    found = pull_all(stock).sort_values("last_event_id")
    assert list(found["last_event_id"]) == ["e0", "e1"]
    for number, vector in enumerate(found["embedding"]):
        assert np.array(vector, np.float32).tolist() == one(spec, number).embedding.tolist()


def test_materialize_brings_the_newest_row_of_each_entity_online(
    stock: FeatureStore, sink: FeastSink, spec: ViewSpec
) -> None:
    rows = [one(spec, 0), one(spec, 1), one(spec, 2, "c2")]
    sink.journal(rows)
    sink.roll()
    stock.materialize(NOON - SECOND, NOON + SECOND, feature_views=[VIEW])
    found = stock.get_online_features(
        features=stock.get_feature_service("customer_llm4es"),
        entity_rows=[{JOIN_KEY: "c1"}, {JOIN_KEY: "c2"}],
    ).to_dict()
    assert found["last_event_id"] == ["e1", "e2"]
    assert np.array(found["embedding"][0], np.float32).tolist() == rows[1].embedding.tolist()


def test_stock_push_to_a_view_on_a_push_source_appends_a_part(
    repo: Path, stock: FeatureStore
) -> None:
    entity = Entity(name="shop", join_keys=["shop_id"], value_type=ValueType.STRING)
    log = FileSource(
        name="visits_log", path="data/visits", timestamp_field=TIMESTAMP_FIELD,
        tags={"join_key": "shop_id"},
    )  # fmt: skip
    view = FeatureView(
        name="visits",
        entities=[entity],
        schema=[Field(name="count", dtype=Int64)],
        source=PushSource(name="visits_push", batch_source=log),
    )
    (repo / "data/visits").mkdir(parents=True)
    schema = pa.schema(
        [("shop_id", pa.string()), (TIMESTAMP_FIELD, pa.timestamp("us", "UTC")), ("count", "int64")]
    )
    parquet.write_table(schema.empty_table(), repo / "data/visits/part-0.parquet")
    stock.apply([entity, log, view])
    for count in (1, 2):
        moment = pd.Timestamp(NOON) + count * SECOND
        pushed = pd.DataFrame({"shop_id": ["s1"], TIMESTAMP_FIELD: [moment], "count": [count]})
        stock.push("visits_push", pushed, to=PushMode.OFFLINE)
    assert len(list_parts(repo / "data/visits")) == 3
    found = stock.get_historical_features(
        entity_df=pd.DataFrame(
            {"shop_id": "s1", "event_timestamp": [NOON, NOON + SECOND, NOON + 2 * SECOND]}
        ),
        features=["visits:count"],
    ).to_df()
    assert list(found["count"].fillna(0)) == [0, 1, 2]


def test_an_events_own_as_of_is_that_of_the_first_row_it_was_the_newest_in(
    stock: FeatureStore, sink: FeastSink, spec: ViewSpec
) -> None:
    def at(number: int, event_id: str, entity_id: str = "c1") -> FeatureRow:
        return row(spec, entity_id, as_of=NOON + number * MICROSECOND, last_event_id=event_id)

    # After e2 one came late: a second row in which e2 is the newest. e9 is another's, too.
    sink.journal([at(3, "e2"), at(1, "e1"), at(5, "e2"), at(7, "e9"), at(2, "e9", "c2")])
    sink.roll()
    found = read_as_of(stock, "customer")
    assert [str(dtype) for dtype in found.dtypes] == ["object", "object", "datetime64[us, UTC]"]
    assert [tuple(each) for each in found.itertuples(index=False)] == [
        ("c1", "e1", NOON + 1 * MICROSECOND),
        ("c2", "e9", NOON + 2 * MICROSECOND),
        ("c1", "e2", NOON + 3 * MICROSECOND),
        ("c1", "e9", NOON + 7 * MICROSECOND),
    ]
    assert list(found.columns) == [JOIN_KEY, "event_id", "as_of"]
    joined = historical(stock, found.rename(columns={"as_of": "event_timestamp"}))
    assert list(joined["last_event_id"]) == list(found["event_id"])


def test_an_entity_without_rows_has_no_events_and_one_without_a_service_is_refused(
    stock: FeatureStore,
) -> None:
    found = read_as_of(stock, "customer")
    assert found.empty
    assert list(found.columns) == [JOIN_KEY, "event_id", "as_of"]
    with pytest.raises(ConfigError, match="feast apply"):
        read_as_of(stock, "terminal")


def test_the_view_is_the_one_that_the_service_points_to(
    tmp_path: Path, repo: Path, spec: ViewSpec, sink: FeastSink
) -> None:
    sink.journal([one(spec, 1)])
    sink.roll()
    other = make_spec(tmp_path / "other", bundle_id="ba9876543210")
    stock = apply(repo, other)
    assert read_as_of(stock, "customer").empty
    views = [
        stock.get_stream_feature_view(view_name("customer", each.manifest.id))
        for each in (spec, other)
    ]
    stock.apply(FeatureService(name="customer_llm4es", features=[views[0]]))
    assert list(read_as_of(stock, "customer")["event_id"]) == ["e1"]
    stock.apply(FeatureService(name="customer_llm4es", features=list(views)))
    with pytest.raises(ConfigError, match="2 bundles"):
        read_as_of(stock, "customer")


def test_as_of_is_exact_where_a_float_would_not_be(
    stock: FeatureStore, sink: FeastSink, spec: ViewSpec
) -> None:
    moment = datetime(2199, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    sink.journal([row(spec, as_of=moment)])
    sink.roll()
    assert list(read_as_of(stock, "customer")["as_of"]) == [moment]


def test_writers_that_start_at_once_on_a_new_log_all_start(tmp_path: Path) -> None:
    schema = log_schema("customer_id")
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        with ThreadPoolExecutor(8) as pool:
            for made in [pool.submit(ensure_log, folder, schema) for _ in range(8)]:
                made.result()
        assert not list(folder.glob(".*.tmp"))
        assert len(list_parts(folder)) == 1


def rows_of(log: Path) -> list[tuple[str, str]]:
    found = read_parts(log)
    return sorted(zip(found[JOIN_KEY].to_pylist(), found["last_event_id"].to_pylist(), strict=True))


def tree_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_deleted_rows_go_from_every_part_whenever_the_rewriting_is_killed(
    log: Path, spec: ViewSpec
) -> None:
    parts = 120
    with journal(log) as writer:
        for number in range(parts):
            writer.append([one(spec, number), one(spec, number, "somebody")])
            writer.roll()
    deletions = Deletions(log, KEY)
    last = NOON + (parts - 2) * MICROSECOND  # its last row is younger than the tombstone
    deletions.add([Tombstone(entity_id="somebody", as_of=last)])
    due = sorted([("c1", f"e{n}") for n in range(parts)] + [("somebody", f"e{parts - 1}")])
    before = {part: part.stat().st_ino for part in list_parts(log)}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.contract.rewriting", str(log)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as parent:  # fmt: skip
        assert parent.stdin is not None
        assert parent.stdout is not None

        def rewritten() -> int:
            return sum(not part.exists() for part in before)

        for count in (1, 20, 70):
            parent.stdin.write("\n")
            parent.stdin.flush()
            pid = int(parent.stdout.readline())
            assert wait_until(lambda c=count: rewritten() >= c, timeout_s=60, every_s=0.001)  # type: ignore[misc]
            os.kill(pid, signal.SIGKILL)
            assert parent.stdout.readline() == "gone\n"
            assert rewritten() < parts - 1
            # Readers find rows again by their number: under one name they never change.
            assert all(before.get(p, p.stat().st_ino) == p.stat().st_ino for p in list_parts(log))
            assert set(due) <= set(rows_of(log))
            assert list(pending_deletions(log)) == ["somebody"]
        parent.stdin.close()
    torn = log / "dt=2026-03-01" / ".part-of-a-killed-writer.parquet.0123abcd.tmp"
    torn.write_bytes(b"somebody")
    done = rewrite_deleted(log, join_key=JOIN_KEY, timestamp_field=TIMESTAMP_FIELD)
    assert done.entities == 1
    assert 0 < done.parts == done.rows < parts
    assert rows_of(log) == due
    assert not list(log.rglob("*.tmp"))
    assert pending_deletions(log) == {}
    assert rewrite_deleted(log, join_key=JOIN_KEY, timestamp_field=TIMESTAMP_FIELD).parts == 0


def test_nothing_of_a_deleted_entity_is_left_and_no_late_writer_brings_it_back(
    log: Path, spec: ViewSpec
) -> None:
    """A zombie's journal is rolled, or recovered, after the parts were rewritten."""
    zombie = OfflineJournal(
        log, join_key=JOIN_KEY, writer_id="z", roll_rows=10**6, roll_s=3600,
        deletions=Deletions(log, KEY),
    )  # fmt: skip
    zombie.append([one(spec, 1, "somebody"), one(spec, 2)])
    shutil.copy(the_journal(log), log.parent / "aside")
    Deletions(log, KEY).add([Tombstone(entity_id="somebody", as_of=NOON + SECOND)])
    rewrite_deleted(log, join_key=JOIN_KEY, timestamp_field=TIMESTAMP_FIELD)
    zombie.roll()
    assert rows_of(log) == [("c1", "e2")]
    assert zombie.kept([one(spec, 3, "somebody")]) == []
    zombie.close()
    shutil.copy(log.parent / "aside", log / "_journal" / "left.journal")
    recover_journals(log, Deletions(log, KEY))
    assert rows_of(log) == [("c1", "e2")] * 2
    assert b"somebody" not in tree_bytes(log)


def test_readers_leave_out_what_is_deleted_without_any_key_and_torn_notes_are_none(
    repo: Path, spec: ViewSpec, stock: FeatureStore
) -> None:
    sink = open_sink(repo, spec, writer_id="w", deletion_key=KEY)
    sink.journal([one(spec, 0), one(spec, 1), one(spec, 0, "c2")])
    sink.roll()
    sink.delete([Tombstone(entity_id="c1", as_of=NOON)])
    folder = repo / "data/offline" / VIEW
    assert sorted(read_as_of(stock, "customer")["event_id"]) == ["e0", "e1"]
    for name in ("hashes", "pending"):
        with (folder / "_deleted" / name).open("ab") as file:
            file.write(b'["c2",9')  # a writer was killed
    assert list(pending_deletions(folder)) == ["c1"]
    sink.delete([Tombstone(entity_id="c1", as_of=NOON + SECOND)])
    assert pending_deletions(folder) == {"c1": NOON + SECOND}
    entities = pd.DataFrame(
        {JOIN_KEY: ["c1", "c2"], "event_timestamp": [NOON + SECOND, NOON + SECOND]}
    )
    found = stock.get_historical_features(
        entity_df=entities, features=[f"{VIEW}:last_event_id"]
    ).to_df()
    assert found["last_event_id"].isna().tolist() == [True, False]
    assert list(read_as_of(stock, "customer")[JOIN_KEY]) == ["c2"]
    trained = training_frame(stock, entities, entities=["customer"]).entities["customer"]
    assert trained.known.tolist() == [False, True]
    sink.close()


@pytest.mark.parametrize("name", ["pending_deletions", "list_parts"])
@pytest.mark.parametrize("module", [reader, offline_log])
def test_a_part_that_is_rewritten_under_a_reader_is_read_anew(
    spec: ViewSpec,
    stock: FeatureStore,
    module: ModuleType,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All is settled while a reader looks: nothing says any more what must not be read."""
    log = Path(stock.repo_path) / "data/offline" / VIEW
    sink = open_sink(Path(stock.repo_path), spec, writer_id="w", deletion_key=KEY)
    sink.journal([one(spec, 0, "a"), one(spec, 0, "b"), one(spec, 1, "c")])
    sink.roll()
    sink.delete([Tombstone(entity_id="a", as_of=NOON + SECOND)])
    sink.close()
    looked_at = getattr(module, name)

    def rewrite() -> None:
        monkeypatch.setattr(module, name, looked_at)
        assert rewrite_deleted(log, join_key=JOIN_KEY, timestamp_field=TIMESTAMP_FIELD).rows == 1

    def look(folder: Path) -> object:
        if name == "pending_deletions":
            rewrite()
            return looked_at(folder)
        parts = looked_at(folder)
        rewrite()
        return parts

    monkeypatch.setattr(module, name, look)
    if module is reader:
        assert sorted(read_as_of(stock, "customer")[JOIN_KEY]) == ["b", "c"]
    else:
        ids = ["a", "b", "c"]
        entities = pd.DataFrame({JOIN_KEY: ids, "event_timestamp": NOON + SECOND})
        found = stock.get_historical_features(
            entity_df=entities, features=[f"{VIEW}:last_event_id"]
        ).to_df()
        assert list(found["last_event_id"].fillna("")) == ["", "e0", "e1"]
    assert pending_deletions(log) == {}


def test_a_single_file_is_a_source_without_deletions(tmp_path: Path, spec: ViewSpec) -> None:
    stock = FeatureStore(repo_path=str(make_repo(tmp_path / "repo")))
    parquet.write_table(
        pa.Table.from_batches([rows_to_batch([one(spec, 0)], JOIN_KEY)]), tmp_path / "rows.parquet"
    )
    source = FileSource(
        name="rows", path=str(tmp_path / "rows.parquet"), timestamp_field=TIMESTAMP_FIELD
    )
    found = LogOfflineStore.pull_latest_from_table_or_query(
        stock.config, source, [JOIN_KEY], ["last_event_id"], TIMESTAMP_FIELD, None, NOON, NOON
    ).to_df()
    assert list(found["last_event_id"]) == ["e0"]

"""Events to fresh embeddings, on real Kafka, Redis, Feast and a real model."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dev.servers import KafkaServer, RedisServer
from llm4es.bundle import Bundle, load_bundle
from llm4es.events import parse_event
from llm4es.feast import open_reader
from llm4es.features import SumsLayout, view_name
from llm4es.windows import Outcome, Window, fold
from stream_worker.ports import WindowStore
from stream_worker.window_store.redis import RedisWindowStore
from tests.commands import Background, run
from tests.integration.conftest import Repo, Sample, apply_repo, open_store
from tests.kafka_topics import make_topics, produce
from tests.torch_reference import Expected, expect, load_model

TOLERANCE = 1e-3
FIELDS = ["embedding", "surprise", "surprise_last", "event_count", "last_event_id", "bundle_id"]

Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Served:
    """What a run left behind: online rows by customer, and where its offline rows are."""

    online: Rows
    as_of: Mapping[str, datetime]  # of the online rows, to the microsecond
    offline: Path
    reports: list[dict[str, Any]]


@pytest.fixture(scope="module")
def bundle(bundle_folder: Path) -> Bundle:
    return load_bundle(bundle_folder)


@pytest.fixture(scope="module")
def windows(bundle: Bundle, sample: Sample) -> dict[str, Window]:
    """Every customer's window, folded here from the log, with nothing forgotten."""
    windows: dict[str, Window] = {}
    for key, value in sample.records():
        event = parse_event(value, bundle.schema, entity="customer")
        folded = fold(
            windows.get(key.decode(), Window(entity_id=key.decode())),
            event,
            recorded_at=event.occurred_at + timedelta(days=1000),
            policy=bundle.manifest.window,
            measure=bundle.tokens.measure,
        )
        assert folded.outcome is not Outcome.LATE
        windows[key.decode()] = folded.window
    return windows


@pytest.fixture(scope="module")
def expected(bundle: Bundle, windows: dict[str, Window]) -> dict[str, Expected]:
    model = load_model(bundle)
    return {customer: expect(bundle, model, window) for customer, window in windows.items()}


@pytest.fixture(scope="module")
def by_group(
    kafka_server: KafkaServer,
    redis_server: RedisServer,
    bundle: Bundle,
    sample: Sample,
    tmp_path_factory: pytest.TempPathFactory,
) -> Served:
    """Two worker processes of one group, Redis for windows and rows, a topic of 4 partitions."""
    folder = tmp_path_factory.mktemp("group")
    topic = f"payments-{folder.name}"
    make_topics(kafka_server, topic, partitions=4)
    repo = apply_repo(
        folder / "repo",
        bundle.folder,
        topic=topic,
        bootstrap_servers=kafka_server.bootstrap_servers,
        redis=f"{redis_server.address},db=2",
    )
    windows_url = f"{redis_server.url}/3"
    arguments = [
        "stream_worker", "run", "--bundle", str(bundle.folder), *repo.flags, "--source", "kafka",
        "--window-store", windows_url, "--threads", "1", "--max-records", "64", "--verbose",
        "--json",
    ]  # fmt: skip
    with (
        Background(folder / "w1", [*arguments, "--state-dir", str(folder / "s1")], env=repo.env)
        as one,
        Background(folder / "w2", [*arguments, "--state-dir", str(folder / "s2")], env=repo.env)
        as two,
    ):  # fmt: skip
        for worker in (one, two):
            worker.wait_for("assigned")
        wait_until_shared(one, two)
        sent = produce(kafka_server, topic, sample.records())
        ends = {partition: 1 + max(o for p, o in sent if p == partition) for partition, _ in sent}
        assert len(ends) == 4
        store = RedisWindowStore(windows_url, bundle.id)
        wait_until_folded(store, topic, ends, one, two)
        store.close()
        codes = [one.stop(), two.stop()]
        assert codes == [0, 0], one.err.read_text() + two.err.read_text()
    reports = [json.loads(worker.out.read_text()) for worker in (one, two)]
    offline = repo.folder / "data" / "offline" / view_name("customer", bundle.id)
    customers = sample.customers()
    return Served(
        read_online(repo, customers), read_as_of_online(repo, bundle, customers), offline, reports
    )


@pytest.fixture(scope="module")
def by_file(bundle: Bundle, sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """One worker on the file, SQLite for windows and rows, a row for every event."""
    folder = tmp_path_factory.mktemp("file")
    repo = apply_repo(folder / "repo", bundle.folder)
    done = run(
        ["stream_worker", "run", "--bundle", str(bundle.folder), *repo.flags, "--source", "file",
         "--events", str(sample.events), "--recorded-at-field", "recorded_at",
         "--window-store", f"sqlite:{folder / 'windows.db'}", "--state-dir", str(folder / "state"),
         "--until-end", "--every-event", "--json"],
        timeout_s=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    offline = repo.folder / "data" / "offline" / view_name("customer", bundle.id)
    customers = sample.customers()
    return Served(
        read_online(repo, customers),
        read_as_of_online(repo, bundle, customers),
        offline,
        [json.loads(done.stdout)],
    )


def wait_until_shared(one: Background, two: Background) -> None:
    """Each worker's newest assignment is two of the four partitions."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        newest = [
            next(
                (line for line in reversed(worker.err.read_text().splitlines())
                 if "assigned: " in line),
                "",
            )
            for worker in (one, two)
        ]  # fmt: skip
        if all(line.count("@") == 2 for line in newest):
            return
        time.sleep(0.05)
    pytest.fail(f"the group did not share the topic: {newest}")


def wait_until_folded(
    store: WindowStore, topic: str, ends: Mapping[int, int], *workers: Background
) -> None:
    deadline = time.monotonic() + 240
    found: dict[int, int] = {}
    while found != ends:
        assert time.monotonic() < deadline, f"{found} of {ends}"
        for worker in workers:
            assert worker.process.poll() is None, worker.err.read_text()
        time.sleep(0.1)
        found = {tp.partition: offset for tp, offset in store.offsets(topic).items()}


def read_online(repo: Repo, customers: list[str]) -> Rows:
    """The rows, through stock Feast's own service."""
    store = open_store(repo)
    service = store.get_feature_service("customer_llm4es")
    found = store.get_online_features(
        features=service, entity_rows=[{"customer_id": customer} for customer in customers]
    ).to_dict()
    return {
        customer: {field: found[field][index] for field in FIELDS}
        for index, customer in enumerate(customers)
    }


def read_as_of_online(repo: Repo, bundle: Bundle, customers: list[str]) -> dict[str, datetime]:
    """What the rows' own timestamps are, which stock Feast tells in whole seconds at best."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in repo.env.items():
            patch.setenv(name, value)
        reader = open_reader(repo.folder, bundle, config_file=repo.file)
        rows = reader.read(customers)
        reader.close()
    return {row.entity_id: row.as_of for row in rows if row is not None}


def offline_rows(served: Served) -> list[tuple[Any, ...]]:
    """(customer, as_of, last event's id, events seen) of every row, in order."""
    columns = ["customer_id", "event_timestamp", "last_event_id", "event_count"]
    table = pq.read_table(served.offline, columns=columns)
    return sorted(zip(*(table[name].to_pylist() for name in columns), strict=True))


def assert_served(served: Served, expected: Mapping[str, Expected], bundle: Bundle) -> None:
    assert set(served.online) == set(expected)
    columns = SumsLayout(bundle).columns
    assert len(bundle.manifest.pooling.scales) == 3
    for customer, due in expected.items():
        row = served.online[customer]
        assert row["embedding"] is not None, f"{customer} is missing"
        assert row["bundle_id"] == bundle.id
        np.testing.assert_allclose(row["embedding"], due.embedding, rtol=0, atol=TOLERANCE)
        assert sorted(due.surprise) == sorted(columns)
        np.testing.assert_allclose(
            row["surprise"], [due.surprise[name] for name in columns], rtol=0, atol=TOLERANCE
        )
        assert row["surprise_last"] == pytest.approx(due.surprise_last, abs=TOLERANCE)


def test_two_workers_on_kafka_and_redis_serve_what_pytorch_computes(
    by_group: Served, expected: dict[str, Expected], bundle: Bundle
) -> None:
    assert all(report["rows"] > 0 for report in by_group.reports)
    assert_served(by_group, expected, bundle)


def test_the_file_source_and_sqlite_serve_the_same(
    by_file: Served, by_group: Served, expected: dict[str, Expected], bundle: Bundle
) -> None:
    assert_served(by_file, expected, bundle)
    for customer, row in by_file.online.items():
        other = by_group.online[customer]
        np.testing.assert_allclose(row["embedding"], other["embedding"], rtol=1e-4, atol=1e-5)
        assert row["event_count"] == other["event_count"]
        assert row["last_event_id"] == other["last_event_id"]


def test_as_of_rises_and_the_newest_offline_row_is_the_online_row(
    by_group: Served, by_file: Served
) -> None:
    for served in (by_group, by_file):
        rows = offline_rows(served)
        assert len({row[:2] for row in rows}) == len(rows)
        newest = {row[0]: row for row in rows}
        assert set(newest) == set(served.online)
        assert {customer: row[1] for customer, row in newest.items()} == served.as_of
        for customer, row in newest.items():
            assert row[2] == served.online[customer]["last_event_id"]
            counts = [r[3] for r in rows if r[0] == customer]
            assert counts == sorted(counts)


def test_every_event_gives_a_row_after_each_accepted_event(
    by_file: Served, windows: dict[str, Window]
) -> None:
    events = sum(chapter.count for window in windows.values() for chapter in window.chapters)
    assert len(offline_rows(by_file)) == events


def test_event_count_and_last_event_are_the_windows(
    by_group: Served, windows: dict[str, Window]
) -> None:
    for customer, window in windows.items():
        row = by_group.online[customer]
        assert row["event_count"] == sum(chapter.count for chapter in window.chapters)
        assert window.last_event is not None
        assert row["last_event_id"] == window.last_event.event_id

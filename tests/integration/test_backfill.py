"""A backfill by Ray is that of one process, is what the worker makes, and may be killed."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from dev.servers import KafkaServer
from llm4es.bundle import Bundle
from llm4es.errors import ConfigError
from llm4es.features import FeatureRow
from llm4es.testing import Crash, Interrupted, LengthEmbedder, MemorySink, modelless_bundle
from llm4es.windows import WindowPolicy
from stream_worker.assembly import assembled_around
from stream_worker.dead_letters import FileDeadLetters
from stream_worker.metrics import Metrics
from stream_worker.ops.backfill import backfill
from stream_worker.ops.buckets import BucketReader, fill_here
from stream_worker.ops.disk_buckets import DiskBuckets
from stream_worker.ops.ray_pool import ray_pool
from stream_worker.sources.files import FileLog, FileRecordSource
from stream_worker.sources.kafka_client import KafkaProducer
from stream_worker.window_store.codec import encode_window
from stream_worker.window_store.sqlite import SqliteWindowStore
from stream_worker.worker import Parts, Worker, WorkerPolicy
from tests.histories import payment, records, schema, write_jsonl
from tests.integration.ops.worlds import Live

POLICY = WorkerPolicy(until_end=True)
WINDOW = WindowPolicy(
    chapter_events=5,
    max_chapter_tokens=300,
    allowed_lateness=timedelta(seconds=50),
    max_clock_skew=timedelta(seconds=5),
)
CUSTOMERS = 41


def bundle() -> Bundle:
    return modelless_bundle(schema(), entity="customer", window=WINDOW)


def open_reader() -> BucketReader:
    made = bundle()
    return BucketReader(made, LengthEmbedder(made), POLICY)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    documents = [
        payment(f"e{n}", n if n % 7 else n - 30, customer=f"c{n * n % CUSTOMERS}")
        for n in range(600)
    ]
    bad = {**payment("bad", 1, customer="c1"), "amount": "much"}
    return write_jsonl(tmp_path_factory.mktemp("log") / "log.jsonl", [*documents, bad])


@contextmanager
def parts(folder: Path, log: Path) -> Iterator[Parts]:
    made = bundle()
    folder.mkdir(exist_ok=True)
    store = SqliteWindowStore(folder / "windows.db", made.id)
    letters = FileDeadLetters(folder / "letters.jsonl")
    try:
        yield Parts(
            bundle=made,
            source=FileRecordSource(FileLog(path=log, key_field="customer_id")),
            store=store,
            embedder=LengthEmbedder(made),
            sink=MemorySink(),
            dead_letters=letters,
            metrics=Metrics(),
        )
    finally:
        letters.close()
        store.close()


Told = dict[str, tuple[object, ...]]


def told(made: Parts) -> Told:
    """Online row, and window, of every customer."""
    sink = made.sink
    assert isinstance(sink, MemorySink)
    windows = {entity: made.store.read(entity) for entity in sorted(sink.online)}
    return {
        entity: (*plain(sink.online[entity]), encode_window(window))
        for entity, window in windows.items()
        if window is not None
    }


def plain(row: FeatureRow) -> tuple[object, ...]:
    return row.as_of, row.embedding.tobytes(), row.event_count, row.last_event_id


def test_ray_gives_what_one_process_gives_and_the_worker_serves(tmp_path: Path, log: Path) -> None:
    with parts(tmp_path / "one", log) as one:
        done = backfill(one, lambda buckets: fill_here(open_reader, buckets), tmp_path / "buckets")
        due = told(one)
    assert done.records == 601
    assert done.dead_letters == 1
    assert done.entities == len(due) > 10
    with (
        parts(tmp_path / "ray", log) as many,
        ray_pool(open_reader, actors=2) as pool,
    ):
        assert backfill(many, pool.fill, tmp_path / "buckets") == done
        assert told(many) == due
    with parts(tmp_path / "live", log) as live:
        Worker(live, POLICY).run()
        served = told(live)
    assert list(served) == list(due)
    for entity, (as_of, vector, *rest, _) in served.items():
        assert due[entity][0] == as_of
        assert due[entity][2:4] == tuple(rest)
        ours, theirs = (np.frombuffer(each, np.float32) for each in (vector, due[entity][1]))  # type: ignore[call-overload]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_worker_goes_on_where_it_ended_and_a_second_one_is_refused(
    tmp_path: Path, log: Path
) -> None:
    with parts(tmp_path, log) as made:
        backfill(made, lambda buckets: fill_here(open_reader, buckets), tmp_path / "buckets")
        before = told(made)
        Worker(made, POLICY).run()
        assert made.metrics.summary().records == 0
        assert told(made) == before
        with pytest.raises(ConfigError, match="a backfill has ended"):
            backfill(made, lambda buckets: fill_here(open_reader, buckets), tmp_path / "buckets")


def test_killed_between_two_buckets_it_is_begun_anew_and_passes_over_what_stands(
    tmp_path: Path, log: Path
) -> None:
    def die() -> None:
        raise Crash

    with parts(tmp_path / "whole", log) as whole:
        backfill(whole, lambda buckets: fill_here(open_reader, buckets), tmp_path / "buckets")
        due = told(whole)
    with parts(tmp_path / "killed", log) as made:
        store = made.store
        killed = replace(
            made,
            store=Interrupted(store, "begin", [lambda: None] * 5 + [die]),
        )
        with pytest.raises(Crash):
            backfill(killed, lambda buckets: fill_here(open_reader, buckets), tmp_path / "buckets")
        again = replace(made, source=FileRecordSource(FileLog(path=log, key_field="customer_id")))
        done = backfill(
            again, lambda buckets: fill_here(open_reader, buckets), tmp_path / "buckets"
        )
        assert 0 < done.passed_over < len(due)
        assert told(made) == due


def test_the_end_of_a_transaction_is_no_record_that_is_waited_for(
    kafka_server: KafkaServer, tmp_path: Path, unique: str
) -> None:
    live = Live(tmp_path / "live", unique, kafka=kafka_server)
    producer = KafkaProducer(
        bootstrap_servers=kafka_server.bootstrap_servers, transactional_id=f"job-{unique}"
    )
    producer.init_transactions()
    producer.begin_transaction()
    for number in range(30):
        made = payment(f"e{number}", number, customer=f"cust-{number % 5:02d}")
        producer.send(
            unique, key=str(made["customer_id"]).encode(), value=json.dumps(made).encode()
        )
    producer.commit_transaction()
    producer.close()
    with assembled_around(live.settings, live.bundle, LengthEmbedder) as built:

        def open_live_reader() -> BucketReader:
            return BucketReader(live.bundle, LengthEmbedder(live.bundle), POLICY)

        done = backfill(
            built.parts,
            lambda buckets: fill_here(open_live_reader, buckets),
            tmp_path / "buckets",
        )
    assert (done.records, done.entities) == (30, 5)
    assert {row.event_count for row in live.online_rows().values()} == {6}


def test_a_log_on_disk_is_read_a_bucket_at_a_time(tmp_path: Path) -> None:
    made = records([payment(f"e{n}", n, customer=f"c{n % 300}") for n in range(5_000)])
    buckets = DiskBuckets(tmp_path / "buckets", expected=len(made))
    for start in range(0, len(made), 700):
        buckets.add(made[start : start + 700])
    count = buckets.finish()
    assert 1 < count <= 64
    read = buckets.read()
    found = list(next(read))
    assert len(list((tmp_path / "buckets").iterdir())) == count - 1  # the others are not read yet
    owners = {record.key for record in found}
    for bucket in read:
        assert owners.isdisjoint({record.key for record in bucket})
        owners |= {record.key for record in bucket}
        found += bucket
    by_key = {key: [each for each in made if each.key == key] for key in owners}
    assert {key: [each for each in found if each.key == key] for key in owners} == by_key
    assert len(found) == len(made)


def test_a_log_that_was_taken_away_meanwhile_is_said(tmp_path: Path) -> None:
    buckets = DiskBuckets(tmp_path / "buckets", expected=10)
    buckets.add(records([payment(f"e{n}", n, customer=f"c{n}") for n in range(10)]))
    buckets.finish()
    read = buckets.read()
    next(read)
    buckets.remove()  # as `forget` does
    with pytest.raises(ConfigError, match="is gone"):
        next(read)

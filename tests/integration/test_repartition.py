"""Repartitioning on a real Kafka: each record once and in order, whoever is killed or paused."""

import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dev.servers import KafkaServer, create_topic, wait_until
from llm4es.errors import BundleMismatch, ConfigError
from llm4es.events import Record, origin_of
from stream_worker.ops.repartition import Repartition, RepartitionSpec
from stream_worker.sources.kafka_client import (
    KafkaConsumer,
    KafkaProducer,
    KafkaSettings,
    kafka_partition,
    to_record,
)
from tests.commands import Background, run
from tests.histories import SCHEMA_YAML
from tests.kafka_topics import LARGEST, produce

START_MS = 1_700_000_000_000
TERMINALS = 7


@dataclass(frozen=True)
class Topics:
    """Two topics of payments keyed by customer, and one to be keyed by terminal."""

    server: KafkaServer
    name: str

    @property
    def sources(self) -> tuple[str, str]:
        return (f"{self.name}.a", f"{self.name}.b")

    @property
    def target(self) -> str:
        return f"{self.name}.by-terminal"

    def spec(self, **more: Any) -> RepartitionSpec:  # noqa: ANN401 - of a spec
        return RepartitionSpec(
            **{
                "sources": self.sources,
                "target": self.target,
                "entity_field": "terminal_id",
                "dead_letter_topic": f"{self.target}.dead-letters",
                **more,
            }
        )

    def job(self, **more: Any) -> Repartition:  # noqa: ANN401
        kafka = KafkaSettings(bootstrap_servers=self.server.bootstrap_servers)
        return Repartition(kafka, self.spec(**more))

    def command(self, schema: Path, *more: str) -> list[str]:
        return [
            "stream_worker", "repartition", "--entity", "terminal", "--schema", str(schema),
            *(flag for name in self.sources for flag in ("--from", name)), "--to", self.target,
            "--bootstrap-servers", self.server.bootstrap_servers, "--json", *more,
        ]  # fmt: skip

    def fill(self, count: int) -> None:
        """Payments a millisecond apart, by turns in the one topic and the other."""
        producer = KafkaProducer(bootstrap_servers=self.server.bootstrap_servers, acks="all")
        for number in range(count):
            producer.send(
                self.sources[number % 2],
                key=f"c{number % 11}".encode(),
                value=json.dumps(payment(number)).encode(),
                headers=[("trace", b"%d" % number)],
                timestamp_ms=START_MS + number,
            )
        producer.flush(timeout=60)
        producer.close()

    def written(self, *, committed: bool = True) -> list[Record]:
        """The target, partition by partition, to where it ends now."""
        consumer = KafkaConsumer(
            bootstrap_servers=self.server.bootstrap_servers,
            isolation_level="read_committed" if committed else "read_uncommitted",
            metrics_enabled=False,
        )
        found: list[Record] = []
        try:
            partitions = [
                kafka_partition(self.target, p)
                for p in sorted(consumer.partitions_for_topic(self.target) or ())
            ]
            consumer.assign(partitions)
            consumer.seek_to_beginning()
            ends = consumer.end_offsets(partitions)
            deadline = time.monotonic() + 60
            while any(consumer.position(tp) < ends[tp] for tp in partitions):
                assert time.monotonic() < deadline
                for raws in consumer.poll(timeout_ms=200).values():
                    found += map(to_record, raws)
        finally:
            consumer.close(autocommit=False)
        return found


def payment(number: int) -> dict[str, object]:
    return {"customer_id": f"c{number % 11}", "terminal_id": f"t{number % TERMINALS}", "n": number}


@pytest.fixture
def topics(kafka_server: KafkaServer, unique: str) -> Topics:
    made = Topics(kafka_server, unique)
    # So that a test says what time it is.
    timed = {
        "message.timestamp.type": "CreateTime",
        "retention.ms": "-1",
        "max.message.bytes": str(LARGEST),
    }
    for name in made.sources:
        create_topic(kafka_server.bootstrap_servers, name, partitions=2, config=timed)
    create_topic(kafka_server.bootstrap_servers, made.target, partitions=3)
    room = {"max.message.bytes": str(LARGEST + (64 << 10))}
    create_topic(kafka_server.bootstrap_servers, f"{made.target}.dead-letters", config=room)
    return made


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "schema.yaml"
    path.write_text(SCHEMA_YAML)
    return path


def numbers(records: list[Record]) -> dict[bytes | None, list[int]]:
    """What was paid at each terminal, in the order of the log."""
    found: Mapping[bytes | None, list[int]] = defaultdict(list)
    for record in records:
        found[record.key].append(json.loads(record.value or b"")["n"])
    return dict(found)


def due(count: int) -> dict[bytes | None, list[int]]:
    return {f"t{t}".encode(): list(range(t, count, TERMINALS)) for t in range(TERMINALS)}


def test_two_topics_become_one_in_the_order_of_their_timestamps_with_origins_noted(
    topics: Topics,
) -> None:
    topics.fill(500)
    job = topics.job(max_records=90)
    job.run(until_end=True)
    written = topics.written()
    assert numbers(written) == due(500)
    assert job.counts["written"] == job.counts["read"] == 500
    assert job.counts["late_inputs"] == 0
    origins = {tuple(origin_of(record)) for record in written}
    assert len(origins) == 500
    assert {origin[0] for origin in origins} == set(topics.sources)
    for record in written:
        number = json.loads(record.value or b"")["n"]
        timestamp = origin_of(record).timestamp
        assert timestamp is not None
        assert timestamp.timestamp() == pytest.approx((START_MS + number) / 1000, abs=1e-6)
        assert ("trace", b"%d" % number) in record.headers
    again = topics.job()
    again.run(until_end=True)
    assert again.counts["read"] == 0


def test_what_has_no_terminal_or_cannot_be_read_is_left_out_and_told(topics: Topics) -> None:
    produce(
        topics.server,
        topics.sources[0],
        [
            (b"c1", b'{"terminal_id": "t1", "n": 1}'),
            (b"c1", b'{"customer_id": "c1"}'),
            (b"c1", b'{"terminal_id": null}'),
            (b"c1", None),
            (b"c1", b"{"),
            (b"c1", b'{"terminal_id": [1]}'),
        ],
    )
    job = topics.job()
    job.run(until_end=True)
    assert numbers(topics.written()) == {b"t1": [1]}
    assert (job.counts["without_entity"], job.counts["dead_letters"]) == (3, 2)


def test_killed_at_any_moment_it_neither_loses_nor_doubles_a_record(
    topics: Topics, schema: Path, tmp_path: Path
) -> None:
    count = 1200
    topics.fill(count)
    command = topics.command(schema, "--max-records", "7", "--verbose")
    for round_, at_least in enumerate((1, 150, 400)):
        with Background(tmp_path / f"run{round_}", command) as job:
            assert wait_until(
                lambda least=at_least: len(topics.written()) >= least,  # type: ignore[misc]
                timeout_s=60,
            ), job.err.read_text()
            job.process.kill()
            job.process.wait()
        assert len(topics.written()) < count
    done = run([*command, "--until-end"])
    assert done.returncode == 0, done.stderr
    assert numbers(topics.written()) == due(count)


def test_a_zombie_is_fenced_and_what_it_had_under_way_is_never_seen(
    topics: Topics, schema: Path, tmp_path: Path
) -> None:
    count = 1200
    topics.fill(count)
    command = topics.command(schema, "--max-records", "7", "--verbose")
    with Background(tmp_path / "zombie", command) as zombie:
        assert wait_until(lambda: len(topics.written()) > 0, timeout_s=60), zombie.err.read_text()
        os.kill(zombie.process.pid, signal.SIGSTOP)
        done = run([*command, "--until-end"])
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["written"] > 0
        os.kill(zombie.process.pid, signal.SIGCONT)
        assert zombie.process.wait(timeout=60) == 1
        assert "another process repartitions" in zombie.err.read_text()
    assert numbers(topics.written()) == due(count)


def test_topics_that_do_not_fit_are_refused(topics: Topics) -> None:
    with pytest.raises(ConfigError, match="is an input too"):
        topics.job(target=topics.sources[0])
    with pytest.raises(ConfigError, match="from: Kafka knows no topic 'none'"):
        topics.job(sources=("none",))
    small = f"{topics.name}.small"
    servers = topics.server.bootstrap_servers
    create_topic(servers, small, config={"max.message.bytes": "1000"})
    with pytest.raises(ConfigError, match="takes 1000 bytes"):
        topics.job(target=small)
    compact = f"{topics.name}.compact"
    create_topic(servers, compact, config={"cleanup.policy": "compact"})
    with pytest.raises(BundleMismatch, match="compact"):
        topics.job(target=compact)

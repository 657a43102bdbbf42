"""One suite over every source of records."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dev.servers import KafkaServer, create_topic, wait_until
from llm4es.errors import (
    BundleMismatch,
    ConfigError,
    Fenced,
    SinkUnavailable,
    SourceUnavailable,
)
from llm4es.events import Record, TopicPartition
from stream_worker.log_checks import refuse_changed_log
from stream_worker.ports import RecordSource
from stream_worker.sources import kafka_client
from stream_worker.sources.files import FileLog, FileRecordSource
from stream_worker.sources.kafka import KafkaGroup, KafkaRecordSource
from stream_worker.sources.kafka_client import KafkaProducer, KafkaSettings, kafka_partition
from tests.histories import payment, write_jsonl
from tests.kafka_topics import make_topics, produce

DOCUMENTS = [payment(f"e{n}", n, customer=f"c{n % 7}") for n in range(50)]
COUNT = len(DOCUMENTS)

Opener = Callable[[], RecordSource]


class Starts:
    """A listener that starts each partition where it is told, or at 0."""

    def __init__(self, positions: Mapping[TopicPartition, int] | None = None) -> None:
        self.positions = dict(positions or {})
        self.seen: set[TopicPartition] = set()

    def assigned(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        self.seen |= set(partitions)
        return {tp: self.positions.get(tp, 0) for tp in partitions}

    def revoked(self, partitions: Sequence[TopicPartition]) -> None:
        self.seen -= set(partitions)


@pytest.fixture(params=["jsonl", "parquet", "kafka"])
def opener(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[Opener]:
    opened: list[RecordSource] = []

    def keep(source: RecordSource) -> RecordSource:
        opened.append(source)
        return source

    if request.param == "kafka":
        server: KafkaServer = request.getfixturevalue("kafka_server")
        make_topics(server, unique)
        produce(
            server,
            unique,
            [(str(d["customer_id"]).encode(), json.dumps(d).encode()) for d in DOCUMENTS],
        )
        settings = KafkaSettings(bootstrap_servers=server.bootstrap_servers)
        yield lambda: keep(KafkaRecordSource(settings, unique, KafkaGroup(unique)))
    else:
        path = tmp_path / f"events.{request.param}"
        if request.param == "jsonl":
            write_jsonl(path, DOCUMENTS)
        else:
            pq.write_table(pa.Table.from_pylist(DOCUMENTS), path)
        yield lambda: keep(FileRecordSource(FileLog(path=path, key_field="customer_id")))
    for source in opened:
        source.close()


def drain(source: RecordSource, count: int, *, max_records: int = 16) -> list[Record]:
    found: list[Record] = []
    deadline = time.monotonic() + 60
    while len(found) < count and time.monotonic() < deadline:
        found += source.poll(max_records, 0.2)
    return found


def by_partition(records: Sequence[Record]) -> dict[TopicPartition, list[int]]:
    offsets: dict[TopicPartition, list[int]] = {}
    for record in records:
        offsets.setdefault(record.topic_partition, []).append(record.offset)
    return offsets


def test_every_record_comes_once_and_each_partitions_in_order(opener: Opener) -> None:
    source, listener = opener(), Starts()
    source.subscribe(listener)
    assert source.remaining() is None
    found = drain(source, COUNT)
    description = source.describe()
    assert len(listener.seen) == description.identity.partitions == 4
    assert {str(json.loads(r.value or b"")["event_id"]) for r in found} == {
        str(d["event_id"]) for d in DOCUMENTS
    }
    for record in found:
        assert record.key == str(json.loads(record.value or b"")["customer_id"]).encode()
    for tp, offsets in by_partition(found).items():
        assert offsets == list(range(description.spans[tp.partition].end))
    assert source.remaining() == 0
    assert source.poll(16, 0.1) == []


def test_a_listener_that_cannot_say_now_where_to_start_is_asked_again(opener: Opener) -> None:
    class AwayOnce(Starts):
        asked = 0

        def assigned(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
            self.asked += 1
            if self.asked == 1:
                raise SinkUnavailable("the windows are away")
            return super().assigned(partitions)

    source, listener = opener(), AwayOnce()
    source.subscribe(listener)

    def poll_until_asked() -> None:
        deadline = time.monotonic() + 60
        while not listener.asked and time.monotonic() < deadline:
            assert source.poll(16, 0.1) == []

    with pytest.raises(SinkUnavailable):
        poll_until_asked()
    assert len(drain(source, COUNT)) == COUNT


def test_a_poll_gives_no_more_than_it_is_asked_for(opener: Opener) -> None:
    source = opener()
    source.subscribe(Starts())
    sizes: list[int] = []
    while sum(sizes) < COUNT:
        sizes.append(len(source.poll(3, 0.5)))
    assert max(sizes) <= 3


def test_the_listener_decides_where_reading_starts(opener: Opener) -> None:
    first = opener()
    first.subscribe(Starts())
    offsets = by_partition(drain(first, COUNT))
    first.close()
    starts = {tp: len(found) // 2 for tp, found in offsets.items()}
    source = opener()
    source.subscribe(Starts(starts))
    found = by_partition(drain(source, sum(len(o) - starts[tp] for tp, o in offsets.items())))
    assert found == {tp: o[starts[tp] :] for tp, o in offsets.items() if o[starts[tp] :]}


def test_seeking_back_gives_the_same_records_again(opener: Opener) -> None:
    source = opener()
    source.subscribe(Starts())
    once = drain(source, COUNT)
    source.seek(dict.fromkeys(by_partition(once), 0))
    again = drain(source, COUNT)
    assert sorted(again, key=lambda r: (r.partition, r.offset)) == sorted(
        once, key=lambda r: (r.partition, r.offset)
    )


def test_a_group_takes_its_committed_offsets_across_a_restart(
    kafka_server: KafkaServer, unique: str
) -> None:
    make_topics(kafka_server, unique)
    produce(kafka_server, unique, [(b"c1", b"{}")] * 3)
    settings = KafkaSettings(bootstrap_servers=kafka_server.bootstrap_servers)
    first = KafkaRecordSource(settings, unique, KafkaGroup(unique))
    first.subscribe(Starts())
    found = drain(first, 3)
    tp = found[0].topic_partition
    assert first.committed([tp]) == {}
    first.commit({tp: 2})
    first.close()
    second = KafkaRecordSource(settings, unique, KafkaGroup(unique))
    assert second.committed([tp]) == {tp: 2}
    second.close()


def test_a_commit_reaches_the_group_while_the_worker_goes_on(
    kafka_server: KafkaServer, unique: str
) -> None:
    make_topics(kafka_server, unique)
    produce(kafka_server, unique, [(b"c1", b"{}")] * 3)
    settings = KafkaSettings(bootstrap_servers=kafka_server.bootstrap_servers)
    worker = KafkaRecordSource(settings, unique, KafkaGroup(unique))
    other = KafkaRecordSource(settings, unique, KafkaGroup(unique))
    worker.subscribe(Starts())
    tp = drain(worker, 3)[0].topic_partition
    worker.commit({tp: 1})
    # By itself, without another call.
    assert wait_until(lambda: other.committed([tp]) == {tp: 1}, timeout_s=30)
    worker.commit({tp: 2})
    worker.commit({tp: 3})  # waits for the one before, and is sent by what comes next
    assert wait_until(
        lambda: not worker.poll(1, 0.01) and other.committed([tp]) == {tp: 3}, timeout_s=30
    )
    worker.commit({tp: 2})
    assert worker.committed([tp]) == {tp: 2}, "it knows what it has said itself"
    worker.commit({tp: 3})
    worker.close()
    assert other.committed([tp]) == {tp: 3}
    other.close()


def test_a_sample_gives_the_newest_records_and_moves_nothing(
    kafka_server: KafkaServer, unique: str
) -> None:
    make_topics(kafka_server, unique, partitions=1)
    produce(kafka_server, unique, [(b"c1", str(n).encode()) for n in range(10)])
    settings = KafkaSettings(bootstrap_servers=kafka_server.bootstrap_servers)
    source = KafkaRecordSource(settings, unique, KafkaGroup(unique))
    assert [record.value for record in source.sample(3)] == [b"7", b"8", b"9"]
    source.subscribe(Starts())
    assert len(drain(source, 10)) == 10
    source.close()


def group_source(server: KafkaServer, topic: str, **group: Any) -> KafkaRecordSource:  # noqa: ANN401
    settings = KafkaSettings(bootstrap_servers=server.bootstrap_servers)
    return KafkaRecordSource(settings, topic, KafkaGroup(topic, **group))


def poll_until(sources: Sequence[RecordSource], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        for source in sources:
            source.poll(1, 0.05)


def test_a_member_that_shows_life_in_a_long_batch_keeps_its_partitions(
    kafka_server: KafkaServer, unique: str
) -> None:
    """Three times as long as a poll may take; without the signs of life they would be gone."""
    make_topics(kafka_server, unique)
    produce(kafka_server, unique, [(b"c1", b"{}")] * 8)
    source, listener = group_source(kafka_server, unique, max_poll_interval_ms=2_000), Starts()
    source.subscribe(listener)
    polled = drain(source, 1, max_records=1)
    until = time.monotonic() + 6
    while time.monotonic() < until:
        time.sleep(0.3)
        source.keep_alive()
    left = drain(source, 7)
    assert [record.offset for record in (*polled, *left)] == list(range(8))
    assert len(listener.seen) == 4
    source.close()


def test_a_member_whose_partitions_go_in_the_middle_of_a_batch_is_told(
    kafka_server: KafkaServer, unique: str
) -> None:
    make_topics(kafka_server, unique)
    produce(kafka_server, unique, [(b"c1", b"{}")] * 8)
    one, two = group_source(kafka_server, unique), group_source(kafka_server, unique)
    first, second = Starts(), Starts()
    one.subscribe(first)
    polled = drain(one, 1, max_records=1)
    two.subscribe(second)

    def hold_a_batch() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            one.keep_alive()
            two.poll(1, 0.05)

    with pytest.raises(Fenced):
        hold_a_batch()
    one.seek({polled[0].topic_partition: 0})
    poll_until([one, two], lambda: len(first.seen) == len(second.seen) == 2)
    assert not first.seen & second.seen
    one.close()
    two.close()


class Member:
    """A static member that polls in a thread of its own, as a worker does."""

    def __init__(self, server: KafkaServer, topic: str, instance_id: str) -> None:
        self.starts = Starts()
        self._source = group_source(
            server, topic, instance_id=instance_id, session_timeout_ms=30_000, join_wait_ms=5_000
        )
        self._source.subscribe(self.starts)
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()

    def _poll(self) -> None:
        while not self._leaving.is_set():
            self._source.poll(1, 0.1)

    def leave(self) -> None:
        self._leaving.set()
        self._thread.join()
        self._source.close()


def test_a_static_member_that_restarts_gets_its_partitions_back(
    kafka_server: KafkaServer, unique: str
) -> None:
    make_topics(kafka_server, unique)
    members = [Member(kafka_server, unique, f"w{number}") for number in range(2)]
    try:
        assert wait_until(
            lambda: [len(member.starts.seen) for member in members] == [2, 2], timeout_s=90
        )
        before, kept = set(members[0].starts.seen), set(members[1].starts.seen)
        members[0].leave()
        members[0] = Member(kafka_server, unique, "w0")
        assert wait_until(lambda: len(members[0].starts.seen) == 2, timeout_s=90)
        assert members[0].starts.seen == before
        assert members[1].starts.seen == kept
    finally:
        for member in members:
            member.leave()


def test_members_that_do_not_know_a_new_topic_yet_come_to_own_it(
    kafka_server: KafkaServer, unique: str
) -> None:
    """A join begun for new topics may end between two polls, where kafka-python forgets it."""
    for number in range(5):
        topic = f"{unique}-{number}"
        make_topics(kafka_server, topic)
        members = [Member(kafka_server, topic, f"w{number}") for number in range(2)]
        try:
            for each in members:
                assert wait_until(lambda each=each: len(each.starts.seen) == 2, timeout_s=60)  # type: ignore[misc]
        finally:
            for member in members:
                member.leave()


def test_a_kafka_that_is_not_there_is_unavailable() -> None:
    settings = KafkaSettings(bootstrap_servers="127.0.0.1:1", bootstrap_timeout_ms=500)
    with pytest.raises(SourceUnavailable, match="bootstrap_servers"):
        KafkaRecordSource(settings, "shop", KafkaGroup("g"))


def test_a_topic_that_is_not_there_is_a_config_error(
    kafka_server: KafkaServer, unique: str
) -> None:
    settings = KafkaSettings(bootstrap_servers=kafka_server.bootstrap_servers)
    source = KafkaRecordSource(settings, unique, KafkaGroup(unique))
    with pytest.raises(ConfigError, match="create"):
        source.describe()
    source.close()


@pytest.mark.parametrize(
    ("config", "compacted", "timestamps"),
    [
        ({}, False, "log_append"),
        ({"cleanup.policy": "compact,delete"}, True, "log_append"),
        ({"message.timestamp.type": "CreateTime"}, False, "create_bounded"),  # an hour: KIP-1030
        (
            {
                "message.timestamp.type": "CreateTime",
                "message.timestamp.after.max.ms": str(2**63 - 1),
            },
            False,
            "create",
        ),
    ],
)
def test_a_topics_configuration_is_told(
    kafka_server: KafkaServer,
    unique: str,
    config: dict[str, str],
    *,
    compacted: bool,
    timestamps: str,
) -> None:
    create_topic(kafka_server.bootstrap_servers, unique, partitions=2, config=config)
    settings = KafkaSettings(bootstrap_servers=kafka_server.bootstrap_servers)
    source = KafkaRecordSource(settings, unique, KafkaGroup(unique))
    found = source.describe()
    source.close()
    assert (found.compacted, found.timestamps) == (compacted, timestamps)
    assert found.identity.partitions == 2
    assert found.identity.topic_id not in {"", "None"}


def shop_source(server: KafkaServer, topic: str) -> KafkaRecordSource:
    settings = KafkaSettings(bootstrap_servers=server.bootstrap_servers)
    return KafkaRecordSource(settings, topic, KafkaGroup(topic))


def delete_before(server: KafkaServer, topic: str, offset: int) -> None:
    """What retention does, when it does it."""
    admin: Any = vars(kafka_client)["KafkaAdminClient"]
    client = admin(bootstrap_servers=server.bootstrap_servers)
    client.delete_records({kafka_partition(topic, 0): offset})
    client.close()


def test_records_that_retention_took_before_they_were_read_are_not_stepped_over(
    kafka_server: KafkaServer, unique: str
) -> None:
    make_topics(kafka_server, unique, partitions=1)
    produce(kafka_server, unique, [(b"c1", b"{}")] * 10)
    source = shop_source(kafka_server, unique)
    source.subscribe(Starts())
    assert len(drain(source, 10)) == 10
    source.seek({TopicPartition(unique, 0): 3})  # as after a batch that a store made wait
    delete_before(kafka_server, unique, 3)
    assert len(drain(source, 7)) == 7  # what is gone was not due
    source.seek({TopicPartition(unique, 0): 3})
    delete_before(kafka_server, unique, 6)
    with pytest.raises(
        BundleMismatch, match=r"begins at offset 6, and 3 was due.*--unproven-start"
    ):
        drain(source, 1)
    source.close()


def test_an_end_that_is_reached_by_stepping_over_lost_records_is_no_end(
    kafka_server: KafkaServer, unique: str
) -> None:
    make_topics(kafka_server, unique, partitions=1)
    produce(kafka_server, unique, [(b"c1", b"{}")] * 10)
    source = shop_source(kafka_server, unique)
    source.subscribe(Starts())
    assert len(drain(source, 10)) == 10
    source.seek({TopicPartition(unique, 0): 3})
    delete_before(kafka_server, unique, 10)

    def reach_the_end() -> None:
        deadline = time.monotonic() + 60
        while source.remaining() != 0 and time.monotonic() < deadline:
            source.poll(16, 0.1)

    with pytest.raises(BundleMismatch, match="begins at offset 10, and 3 was due"):
        reach_the_end()
    source.close()


def test_the_gaps_that_transactions_leave_are_no_loss(
    kafka_server: KafkaServer, unique: str
) -> None:
    make_topics(kafka_server, unique, partitions=1)
    producer = KafkaProducer(
        bootstrap_servers=kafka_server.bootstrap_servers, transactional_id=unique
    )
    producer.init_transactions()
    for end in ("commit", "abort", "commit"):
        producer.begin_transaction()
        producer.send(unique, key=b"c1", value=end.encode())
        producer.flush()
        (producer.commit_transaction if end == "commit" else producer.abort_transaction)()
    producer.close()
    source = shop_source(kafka_server, unique)
    source.subscribe(Starts())
    assert [record.offset for record in drain(source, 2, max_records=1)] == [0, 4]
    source.close()


def test_a_member_of_the_group_that_is_given_nothing_has_nothing_left_to_read(
    kafka_server: KafkaServer, unique: str
) -> None:
    make_topics(kafka_server, unique, partitions=1)
    produce(kafka_server, unique, [(b"c1", b"{}")] * 3)
    sources = [shop_source(kafka_server, unique) for _ in range(2)]
    for source in sources:
        source.subscribe(Starts())
        assert source.remaining() is None
    read = 0
    left: list[int | None] = [None, None]
    deadline = time.monotonic() + 60
    while left != [0, 0] and time.monotonic() < deadline:
        read += sum(len(source.poll(16, 0.05)) for source in sources)
        left = [source.remaining() for source in sources]
    assert left == [0, 0]
    assert read >= 3
    assert sorted(len(source._consumer.assignment()) for source in sources) == [0, 1]  # noqa: SLF001
    for source in sources:
        source.close()


def test_a_lone_member_is_not_at_the_end_before_it_was_given_its_partitions(
    kafka_server: KafkaServer, unique: str
) -> None:
    make_topics(kafka_server, unique, partitions=1)
    produce(kafka_server, unique, [(b"c1", b"{}")] * 3)
    source = shop_source(kafka_server, unique)  # it knows no partition: it gives itself none
    source.subscribe(Starts())
    read, left = 0, None
    deadline = time.monotonic() + 60
    while left is None and time.monotonic() < deadline:
        read += len(source.poll(1, 0.05))
        left = source.remaining()
    assert (left, read) in {(3, 0), (2, 1)}
    source.close()


def test_a_topic_that_the_client_has_forgotten_to_ask_for_is_asked_for_again(
    kafka_server: KafkaServer, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_topics(kafka_server, unique, partitions=1)
    produce(kafka_server, unique, [(b"c1", b"{}")] * 3)
    source = shop_source(kafka_server, unique)
    source.subscribe(Starts())
    cluster = source._consumer._cluster  # noqa: SLF001
    asked: list[object] = []

    def on_its_way_before_the_topic_was_named(request: Callable[[], Any]) -> Callable[[], Any]:
        def stale() -> Any:  # noqa: ANN401 - kafka-python has no types
            asked.append(None)
            made = request()
            if len(asked) <= 2:  # the first one, and what the group's leader asks for
                made.topics = []
            return made

        return stale

    monkeypatch.setattr(
        cluster, "metadata_request", on_its_way_before_the_topic_was_named(cluster.metadata_request)
    )
    cluster._partitions = {}  # noqa: SLF001
    assert len(drain(source, 3)) == 3
    assert len(asked) > 2
    source.close()


def test_a_member_of_a_group_whose_leader_knows_no_partitions_is_not_at_the_end(
    kafka_server: KafkaServer, unique: str
) -> None:
    source = shop_source(kafka_server, unique)  # of a topic that is not there yet
    source.subscribe(Starts())
    deadline = time.monotonic() + 60
    while not source._rebalances.joined and time.monotonic() < deadline:  # noqa: SLF001
        assert source.poll(16, 0.05) == []
    assert source._rebalances.joined  # noqa: SLF001
    source.poll(16, 0.05)
    assert source.remaining() is None
    source.close()


@pytest.mark.parametrize("timestamp_ms", [2**62, 253402300800000, 253402300799999])
def test_a_producers_timestamp_that_is_no_time_leaves_the_record_readable(
    kafka_server: KafkaServer, unique: str, timestamp_ms: int
) -> None:
    config = {
        "message.timestamp.type": "CreateTime",
        "message.timestamp.after.max.ms": str(2**63 - 1),
    }
    create_topic(kafka_server.bootstrap_servers, unique, config=config)
    producer = KafkaProducer(bootstrap_servers=kafka_server.bootstrap_servers, acks="all")
    producer.send(unique, key=b"c1", value=b"{}", timestamp_ms=timestamp_ms).get(timeout=30)
    producer.close()
    source = shop_source(kafka_server, unique)
    (record,) = source.sample(1)
    source.close()
    assert (record.timestamp is None) == (timestamp_ms > 253402300799999)


@pytest.mark.parametrize("codec", ["gzip", "lz4", "snappy", "zstd"])
def test_records_are_read_however_their_producer_compressed_them(
    kafka_server: KafkaServer, unique: str, codec: str
) -> None:
    create_topic(kafka_server.bootstrap_servers, unique)
    producer = KafkaProducer(
        bootstrap_servers=kafka_server.bootstrap_servers, acks="all", compression_type=codec
    )
    producer.send(unique, key=b"c1", value=b'{"note": "%s"}' % (b"x" * 500)).get(timeout=30)
    producer.close()
    source = shop_source(kafka_server, unique)
    (record,) = source.sample(1)
    source.close()
    assert record.value == b'{"note": "%s"}' % (b"x" * 500)


@pytest.mark.parametrize(
    ("raw", "known"),
    [
        ("2026-03-01T12:00:00+00:00", True),
        ("2026-03-01T12:00:00", True),
        ("0001-01-01T00:00:00+14:00", False),
        ("9999-12-31T23:59:59-14:00", False),
        ("yesterday", False),
        (1767225600, False),
        (None, False),
    ],
)
def test_a_record_says_when_the_file_got_it_or_has_no_time_of_its_own(
    tmp_path: Path, raw: object, *, known: bool
) -> None:
    path = write_jsonl(tmp_path / "events.jsonl", [payment("e1", 0) | {"recorded_at": raw}])
    log = FileLog(path=path, key_field="customer_id", recorded_at_field="recorded_at")
    source = FileRecordSource(log)
    source.subscribe(Starts())
    (record,) = source.poll(1, 0)
    assert (record.timestamp is not None) == known


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_a_small_file_that_grows_is_the_same_log(tmp_path: Path, lines: int) -> None:
    path = write_jsonl(tmp_path / "events.jsonl", DOCUMENTS[:lines])
    assert path.stat().st_size < 4096
    log = FileLog(path=path, key_field="customer_id")
    before = FileRecordSource(log).describe()
    write_jsonl(path, DOCUMENTS)
    after = FileRecordSource(log).describe()
    refuse_changed_log(after, before.identity)
    assert after.identity.topic_id
    assert (before.identity == after.identity) == (lines > 0)


def test_a_broken_parquet_file_is_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    pq.write_table(pa.Table.from_pylist(DOCUMENTS), path)
    whole = path.read_bytes()
    for broken in (b"", b"PAR1", whole[: len(whole) // 2], b"not Parquet" * 99):
        path.write_bytes(broken)
        with pytest.raises(ConfigError, match=r"events: .* is no whole Parquet file"):
            FileRecordSource(FileLog(path=path, key_field="customer_id"))


def test_a_file_that_grew_is_the_same_log_and_another_file_is_not(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "events.jsonl", DOCUMENTS * 3)
    log = FileLog(path=path, key_field="customer_id")
    before = FileRecordSource(log).describe()
    with path.open("ab") as file:
        file.write(b"not JSON\n")
    after = FileRecordSource(log).describe()
    assert after.identity == before.identity
    assert after.spans[0].end == before.spans[0].end + 1
    write_jsonl(path, list(reversed(DOCUMENTS)))
    assert FileRecordSource(log).describe().identity != before.identity


def test_a_file_log_that_cannot_be_read_is_a_config_error(tmp_path: Path) -> None:
    for name in ("absent.jsonl", "events.csv"):
        with pytest.raises(ConfigError, match="events"):
            FileRecordSource(FileLog(path=tmp_path / name, key_field="customer_id"))

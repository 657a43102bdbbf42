"""One suite over every source of records."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dev.servers import KafkaServer, create_topic
from llm4es.errors import ConfigError, SourceUnavailable
from llm4es.events import Record, TopicPartition
from stream_worker.ports import RecordSource
from stream_worker.sources.files import FileLog, FileRecordSource
from stream_worker.sources.kafka import KafkaGroup, KafkaRecordSource
from stream_worker.sources.kafka_client import KafkaSettings
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

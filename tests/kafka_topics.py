"""Topics for tests: made, filled and read back through kafka-python."""

import time
from collections.abc import Mapping, Sequence

from dev.servers import KafkaServer, create_topic
from stream_worker.sources.kafka_client import KafkaConsumer, KafkaProducer, kafka_partition

LARGEST = 8 << 20


def make_topics(server: KafkaServer, topic: str, *, partitions: int = 4) -> None:
    """A topic of events and its dead letters, of the sizes that the compose file gives them."""
    create_topic(
        server.bootstrap_servers, topic, partitions=partitions,
        config={"max.message.bytes": str(LARGEST)},
    )  # fmt: skip
    create_topic(
        server.bootstrap_servers, f"{topic}.dead-letters", partitions=1,
        config={"max.message.bytes": str(LARGEST + (64 << 10))},
    )  # fmt: skip


def produce(
    server: KafkaServer, topic: str, records: Sequence[tuple[bytes | None, bytes | None]]
) -> list[tuple[int, int]]:
    """Produce (key, value) pairs in order; their (partition, offset)."""
    producer = KafkaProducer(
        bootstrap_servers=server.bootstrap_servers, acks="all", max_request_size=LARGEST
    )
    try:
        sent = [producer.send(topic, key=key, value=value) for key, value in records]
        producer.flush(timeout=60)
        return [(found.partition, found.offset) for found in (s.get(timeout=60) for s in sent)]
    finally:
        producer.close()


def read_all(
    server: KafkaServer, topic: str, *, expect: int, timeout_s: float = 60.0
) -> list[tuple[Mapping[str, bytes], bytes | None, bytes]]:
    """Read a topic of one partition until `expect` records are there: (headers, key, value)."""
    consumer = KafkaConsumer(
        bootstrap_servers=server.bootstrap_servers,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=2 * LARGEST,
        isolation_level="read_committed",
    )
    found: list[tuple[Mapping[str, bytes], bytes | None, bytes]] = []
    deadline = time.monotonic() + timeout_s
    try:
        consumer.assign([kafka_partition(topic, 0)])
        consumer.seek_to_beginning()
        while len(found) < expect and time.monotonic() < deadline:
            for batch in consumer.poll(timeout_ms=200).values():
                found += [(dict(record.headers), record.key, record.value) for record in batch]
    finally:
        consumer.close(autocommit=False)
    return found

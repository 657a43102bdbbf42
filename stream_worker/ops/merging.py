"""Several partitions as one sequence, by record timestamp: what is behind is waited for."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import datetime

from llm4es.events import EPOCH, Record, TopicPartition
from stream_worker.sources.kafka_client import KafkaConsumer, kafka_partition, mapped, to_record

__all__ = ["MergedRecords", "next_offsets"]

_HELD_RECORDS = 5_000  # of one partition, before it is paused
_HELD_BYTES = 8 << 20
_POLL_MS = 100


class MergedRecords:
    """Records of a consumer's partitions by (timestamp, topic, partition, offset).

    A record is given once every other partition has one too, or is at its end: what comes there
    later is younger, as far as brokers' clocks agree. One that has more and does not deliver is
    waited for, at most `max_idle_ms`; what it holds then comes late (`late_inputs` counts how
    often). `consumer` is assigned and placed.
    """

    def __init__(self, consumer: KafkaConsumer, *, max_idle_ms: int) -> None:
        self._consumer = consumer
        self._max_idle_s = max_idle_ms / 1000
        self._held: dict[TopicPartition, deque[Record]] = {
            TopicPartition(*tp): deque() for tp in consumer.assignment()
        }
        self._bytes = dict.fromkeys(self._held, 0)
        self._waiting_since: float | None = None
        self.late_inputs = 0

    def take(self, most: int) -> list[Record]:
        """Poll, and give what may be given now: at most `most` records, perhaps none."""
        with mapped():
            found = self._consumer.poll(timeout_ms=0 if self._ready() else _POLL_MS)
        for name, raws in found.items():
            tp = TopicPartition(*name)
            records = [to_record(raw) for raw in raws]
            self._held[tp].extend(records)
            self._bytes[tp] += sum(map(_size, records))
        behind = self._behind()
        taken = [] if behind and not self._waited_enough() else self._merge(most, behind)
        if not behind:
            self._waiting_since = None
        self._pause_full()
        return taken

    def at_end(self) -> bool:
        """Whether nothing is held, and nothing is left to read."""
        return not any(self._held.values()) and not self._behind()

    def _ready(self) -> bool:
        """Whether something may be given without waiting for more."""
        return self._waiting_since is None and any(self._held.values())

    def _behind(self) -> set[TopicPartition]:
        """Partitions of which nothing is held, and which are not at their end."""
        empty = [kafka_partition(*tp) for tp, held in self._held.items() if not held]
        if not empty:
            return set()
        with mapped():
            ends = self._consumer.end_offsets(empty)
            return {TopicPartition(*tp) for tp in empty if self._consumer.position(tp) < ends[tp]}

    def _waited_enough(self) -> bool:
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
        return now - self._waiting_since >= self._max_idle_s

    def _merge(self, most: int, behind: set[TopicPartition]) -> list[Record]:
        """Merge up to where a partition runs empty: its next record is not known yet."""
        if behind and any(self._held.values()):
            self.late_inputs += 1
        sources = {tp for tp, held in self._held.items() if held}
        taken: list[Record] = []
        while len(taken) < most and all(self._held[tp] for tp in sources) and sources:
            first = min(sources, key=lambda tp: _order(self._held[tp][0]))
            record = self._held[first].popleft()
            self._bytes[first] -= _size(record)
            taken.append(record)
        return taken

    def _pause_full(self) -> None:
        full = {
            kafka_partition(*tp)
            for tp, held in self._held.items()
            if len(held) >= _HELD_RECORDS or self._bytes[tp] >= _HELD_BYTES
        }
        paused = self._consumer.paused()
        self._consumer.pause(*(full - paused))
        self._consumer.resume(*(paused - full))


def next_offsets(records: Sequence[Record]) -> Mapping[TopicPartition, int]:
    """Where each partition goes on after these records."""
    return {record.topic_partition: record.offset + 1 for record in records}


def _order(record: Record) -> tuple[datetime, str, int, int]:
    return (record.timestamp or EPOCH, record.topic, record.partition, record.offset)


def _size(record: Record) -> int:
    return len(record.value or b"") + len(record.key or b"")

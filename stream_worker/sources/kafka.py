"""A Kafka topic, read by a consumer group through kafka-python."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from llm4es.errors import BundleMismatch, ConfigError, Fenced
from llm4es.events import EPOCH, Record, TopicPartition
from stream_worker.ports import (
    AssignmentListener,
    LogDescription,
    LogIdentity,
    PartitionSpan,
    Timestamps,
)
from stream_worker.sources.commits import CALL_MS, GroupCommits
from stream_worker.sources.kafka_client import (
    ConsumerRebalanceListener,
    KafkaConsumer,
    KafkaError,
    KafkaSettings,
    admin,
    connecting,
    kafka_partition,
    mapped,
    to_record,
    topic_configs,
)

__all__ = ["KafkaGroup", "KafkaRecordSource"]

log = logging.getLogger(__name__)

_FETCH_BYTES = 16 << 20  # above the largest record, so that one can always be fetched
_SAMPLE_TIMEOUT_S = 10.0
_ANSWER_MS = 5  # within which brokers answer that have something
_FOREVER_MS = str(2**63 - 1)  # message.timestamp.after.max.ms where nothing is bounded


class KafkaGroup:
    """Name and timings of the consumer group; `instance_id` makes membership static (KIP-345).

    `join_wait_ms` is how long a poll stays with a rebalance that is under way, whatever its own
    timeout. kafka-python 3.0 forgets a join that completes between two polls and begins another,
    so that on a slow machine short polls may never get their partitions. (Members that share one
    thread must not wait for one another.)
    """

    def __init__(
        self,
        name: str,
        *,
        session_timeout_ms: int = 10_000,
        max_poll_interval_ms: int = 300_000,
        instance_id: str | None = None,
        join_wait_ms: int = 0,
    ) -> None:
        self.name = name
        self.join_wait_ms = join_wait_ms
        self.config: dict[str, Any] = {
            "group_id": name,
            "session_timeout_ms": session_timeout_ms,
            "heartbeat_interval_ms": max(1, session_timeout_ms // 3),
            "max_poll_interval_ms": max_poll_interval_ms,
            "group_instance_id": instance_id,
        }


class KafkaRecordSource:
    """See `ports.RecordSource`. Reads `read_committed`; offsets are committed only by `commit`.

    Without a group it reads every partition, commits nothing, and no group is touched.
    """

    def __init__(self, settings: KafkaSettings, topic: str, group: KafkaGroup | None) -> None:
        self._settings = settings
        self._topic = topic
        self._group = group.name if group is not None else None
        self._join_wait_ms = group.join_wait_ms if group is not None else 0
        self._listener: AssignmentListener | None = None
        self._rebalances = _Rebalances()
        # Assigned, but not yet told where to read from: their records are not to be used.
        self._unplaced: set[TopicPartition] = set()
        self._unplaced_at_poll: frozenset[TopicPartition] = frozenset()
        self._due: dict[TopicPartition, int] = {}  # offsets that are read next
        with connecting(self._settings):
            self._consumer = KafkaConsumer(
                **self._consumer_config(), **(group.config if group else {})
            )
        self._commits = GroupCommits(self._consumer)

    def describe(self) -> LogDescription:
        """Ask the brokers; see `ports.RecordSource`."""
        with admin(self._settings) as client:
            found = client.describe_topics([self._topic])
            topic = found[0] if found else {}
            if not topic.get("partitions"):
                raise ConfigError(
                    "topic", f"Kafka knows no topic {self._topic!r}", "create it, or name another"
                )
            configs = topic_configs(client, self._topic)
        partitions = sorted(entry["partition_index"] for entry in topic["partitions"])
        return LogDescription(
            identity=LogIdentity(
                topic=self._topic, topic_id=str(topic["topic_id"]), partitions=len(partitions)
            ),
            spans=self._spans(partitions),
            compacted="compact" in configs["cleanup.policy"],
            timestamps=_timestamps(configs),
        )

    def sample(self, count: int) -> Sequence[Record]:
        """Read the newest records with a consumer of no group."""
        with connecting(self._settings):
            reader = KafkaConsumer(**self._consumer_config())
        try:
            with mapped():
                return self._read_tail(reader, count)
        finally:
            reader.close(autocommit=False)

    def subscribe(self, listener: AssignmentListener) -> None:
        """Join the group at the next poll."""
        self._listener = listener
        with mapped():
            if self._group is not None:
                self._consumer.subscribe([self._topic], listener=self._rebalances)
                return
            found = self._consumer.partitions_for_topic(self._topic) or ()
            partitions = [kafka_partition(self._topic, each) for each in sorted(found)]
            self._consumer.assign(partitions)
        self._rebalances.on_partitions_assigned(partitions)

    def poll(self, max_records: int, timeout_s: float) -> Sequence[Record]:
        """Records that wait to be read; those of a partition come in order of offset."""
        with mapped():
            self._commits.look()
            coordinator = self._consumer._coordinator  # noqa: SLF001 - see `KafkaGroup`
            if coordinator.rejoining and not coordinator.need_rejoin():
                # A join that was begun because topics had changed, and ended between two polls: it
                # is forgotten too, but nothing says so, and the member would own nothing for ever.
                coordinator.request_rejoin()
            if self._join_wait_ms and coordinator.need_rejoin():
                coordinator.poll(timeout_ms=self._join_wait_ms)
            self._ask_for_the_topic()
            found = self._fetched(max_records, int(timeout_s * 1000))
        self._place_assigned()
        assigned = {TopicPartition(*name) for name in self._consumer.assignment()}
        placed = assigned - self._unplaced_at_poll
        batches = {
            tp: raws
            for tp, raws in ((TopicPartition(*name), raws) for name, raws in found.items())
            if tp in placed
        }
        self._refuse_skipped({tp: raws[0].offset for tp, raws in batches.items()})
        self._due |= {tp: raws[-1].offset + 1 for tp, raws in batches.items()}
        return [to_record(raw) for raws in batches.values() for raw in raws]

    def committed(self, partitions: Iterable[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Offsets that the group has committed."""
        if self._group is None:
            return {}
        self._commits.finish()
        with mapped():
            found = {
                tp: self._consumer.committed(kafka_partition(*tp), timeout_ms=CALL_MS)
                for tp in partitions
            }
        return {tp: offset for tp, offset in found.items() if offset is not None}

    def commit(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Send them, and go on: brokers take milliseconds (`group.coordinator.append.linger.ms`).

        What is on its way is waited for by `committed` and `close`.
        """
        if self._group is not None:
            self._commits.send(next_offsets)

    def seek(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read on from there, where the partition is still ours."""
        owned = self._consumer.assignment()
        for tp, offset in positions.items():
            partition = kafka_partition(*tp)
            if partition in owned:
                with mapped():
                    self._consumer.seek(partition, offset)
                self._due[tp] = offset

    def offsets_at(
        self,
        moment: datetime,
        moment_of: Callable[[Record], datetime | None],  # noqa: ARG002 - for logs without an index
    ) -> dict[int, int]:
        """First offset of each partition whose record is not older; its end where none is."""
        with mapped():
            asked = [
                kafka_partition(self._topic, each)
                for each in sorted(self._consumer.partitions_for_topic(self._topic) or ())
            ]
            at_ms = -((EPOCH - moment) // timedelta(milliseconds=1))  # rounded up
            found = self._consumer.offsets_for_times(dict.fromkeys(asked, at_ms))
            ends = self._consumer.end_offsets(asked)
        return {tp.partition: found[tp].offset if found[tp] else ends[tp] for tp in asked}

    def positions(self) -> dict[TopicPartition, int]:
        """Offsets that are read next."""
        with mapped():
            return {
                TopicPartition(*tp): self._consumer.position(tp)
                for tp in self._consumer.assignment()
            }

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        """Read no more of these."""
        self._consumer.pause(*(kafka_partition(*tp) for tp in partitions))

    def keep_alive(self) -> None:
        """Poll with everything paused, so that `max_poll_interval_ms` begins anew.

        A rebalance may happen in it; what it gives is placed by the next `poll`.
        """
        owned = self._consumer.assignment()
        with mapped():
            paused = self._consumer.paused()
            self._consumer.pause(*owned)
            found = self._consumer.poll(timeout_ms=0)
            self._consumer.resume(*(owned & self._consumer.assignment() - paused))
            for partition, raws in found.items():  # of partitions that came meanwhile
                self._consumer.seek(partition, raws[0].offset)
        if self._rebalances.pending or not self._rebalances.joined:
            raise Fenced("the group has given partitions of this batch to another worker")

    def lag(self) -> Mapping[TopicPartition, int]:
        """By the ends that came with the last fetch of each partition."""
        ends = {tp: self._consumer.highwater(kafka_partition(*tp)) for tp in self._due}
        return {tp: max(0, end - self._due[tp]) for tp, end in ends.items() if end is not None}

    def remaining(self) -> int | None:
        """Records up to the end of the assigned partitions; asks the brokers."""
        owned = self._consumer.assignment()
        if self._unplaced or self._rebalances.pending or not self._rebalances.joined:
            return None
        if not owned:
            return 0 if self._group_owns_all() else None
        with mapped():
            ends = self._consumer.end_offsets(list(owned), timeout_ms=CALL_MS)
            reached = {tp: self._consumer.position(tp, timeout_ms=CALL_MS) for tp in ends}
        if None in reached.values():  # it was not found in time
            return None
        self._refuse_skipped({TopicPartition(*tp): at for tp, at in reached.items()})
        return sum(max(0, int(end - reached[tp])) for tp, end in ends.items())

    def close(self) -> None:
        """Leave the group."""
        self._commits.finish()
        try:
            self._consumer.close(autocommit=False)
        except KafkaError as error:
            log.warning("the group was not left in order (%s); it will notice", error)

    def _fetched(self, max_records: int, timeout_ms: int) -> dict[Any, list[Any]]:
        """What is here already and what the brokers have besides, or else what comes in time.

        kafka-python asks for more of a partition when it has given all that it had. What came
        while a batch was worked on would have to wait until the next one is done too.
        """
        found: dict[Any, list[Any]] = {}
        if not self._consumer._coordinator.need_rejoin():  # noqa: SLF001 - for that it is too short
            found |= self._consumer.poll(timeout_ms=0, max_records=max_records)
        if not found:
            return dict(self._consumer.poll(timeout_ms=timeout_ms, max_records=max_records))
        room = max_records - sum(map(len, found.values()))
        if room > 0 and timeout_ms > 0:
            with suppress(KafkaError):  # what was found must not be lost; it comes up again
                more = self._consumer.poll(timeout_ms=min(timeout_ms, _ANSWER_MS), max_records=room)
                for partition, raws in more.items():
                    found[partition] = [*found.get(partition, ()), *raws]
        return found

    def _place_assigned(self) -> None:
        """Tell the listener of rebalances since the last poll, and go where it says."""
        revoked, assigned = self._rebalances.take()
        self._unplaced = (self._unplaced - revoked) | assigned
        self._unplaced_at_poll = frozenset(self._unplaced)
        if self._listener is None:
            return
        if revoked:
            for tp in revoked:
                self._due.pop(tp, None)
            self._commits.forget(revoked)
            self._listener.revoked(sorted(revoked))
        if self._unplaced:
            self.seek(self._listener.assigned(sorted(self._unplaced)))
            self._unplaced = set()

    def _ask_for_the_topic(self) -> None:
        """Ask again while the client does not know the topic.

        kafka-python forgets what it was asked for while an older request was on its way
        (`ClusterMetadata.update_metadata`), and a leader that knows no partitions gives none
        until the metadata's age, five minutes.
        """
        cluster = self._consumer._cluster  # noqa: SLF001
        if self._group is not None and not cluster.partitions_for_topic(self._topic):
            cluster.request_update()

    def _group_owns_all(self) -> bool:
        """Whether others have what we have not: a leader that knows no partitions gives none."""
        with admin(self._settings) as client:
            members = client.describe_groups([self._group])[self._group]["members"]
            topics = client.describe_topics([self._topic])
        assignments = [member["member_assignment"] for member in members]
        owned = sum(
            len(entry["partitions"])
            for assignment in assignments
            if isinstance(assignment, dict)
            for entry in assignment["assigned_partitions"]
            if entry["topic"] == self._topic
        )
        return owned == sum(len(topic.get("partitions") or ()) for topic in topics) > 0

    def _refuse_skipped(self, reached: Mapping[TopicPartition, int]) -> None:
        """Refuse records behind a gap that retention has made: the client steps over it silently.

        Gaps are also where transactions end; so the partition's beginning is asked for.
        """
        gaps = [kafka_partition(*tp) for tp, at in reached.items() if at > self._due.get(tp, at)]
        if not gaps:
            return
        with mapped():
            firsts = self._consumer.beginning_offsets(gaps, timeout_ms=CALL_MS)
        for partition, first in firsts.items():
            due = self._due[TopicPartition(*partition)]
            if first > due:
                raise BundleMismatch(
                    f"topic {self._topic}",
                    f"partition {partition.partition} begins at offset {first}, and {due} was due: "
                    "retention has overtaken this worker",
                    "lengthen its retention and start a fresh window store with --unproven-start",
                )

    def _consumer_config(self) -> dict[str, Any]:
        return {
            **self._settings.client_config(),
            "enable_auto_commit": False,
            "auto_offset_reset": "earliest",
            "isolation_level": "read_committed",
            "allow_auto_create_topics": False,
            "max_partition_fetch_bytes": _FETCH_BYTES,
            "metrics_enabled": False,
        }

    def _spans(self, partitions: Sequence[int]) -> dict[int, PartitionSpan]:
        asked = [kafka_partition(self._topic, partition) for partition in partitions]
        with mapped():
            firsts = self._consumer.beginning_offsets(asked, timeout_ms=CALL_MS)
            ends = self._consumer.end_offsets(asked, timeout_ms=CALL_MS)
        return {tp.partition: PartitionSpan(firsts[tp], ends[tp]) for tp in asked}

    def _read_tail(self, reader: "KafkaConsumer", count: int) -> list[Record]:
        partitions = [
            kafka_partition(self._topic, partition)
            for partition in sorted(reader.partitions_for_topic(self._topic) or ())
        ]
        reader.assign(partitions)
        firsts, ends = reader.beginning_offsets(partitions), reader.end_offsets(partitions)
        for tp in partitions:
            reader.seek(tp, max(firsts[tp], ends[tp] - count))
        records: list[Record] = []
        deadline = time.monotonic() + _SAMPLE_TIMEOUT_S
        while any(reader.position(tp) < ends[tp] for tp in partitions):
            if time.monotonic() > deadline:
                log.warning("only %d records of the topic could be looked at", len(records))
                break
            found = reader.poll(timeout_ms=200)
            records += [to_record(raw) for batch in found.values() for raw in batch]
        return records


class _Rebalances(ConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no types
    """Notes what happened: callbacks run inside the client, where nothing may block."""

    def __init__(self) -> None:
        self._revoked: set[TopicPartition] = set()
        self._assigned: set[TopicPartition] = set()
        self.joined = False  # the group has said what we own, be it nothing

    @property
    def pending(self) -> bool:
        return bool(self._revoked or self._assigned)

    def on_partitions_revoked(self, revoked: Iterable[tuple[str, int]]) -> None:
        gone = {TopicPartition(*tp) for tp in revoked}
        self._revoked |= gone
        self._assigned -= gone
        self.joined = False

    def on_partitions_assigned(self, assigned: Iterable[tuple[str, int]]) -> None:
        self._assigned |= {TopicPartition(*tp) for tp in assigned}
        self.joined = True

    def take(self) -> tuple[set[TopicPartition], set[TopicPartition]]:
        taken = self._revoked, self._assigned
        self._revoked, self._assigned = set(), set()
        return taken


def _timestamps(configs: Mapping[str, str]) -> Timestamps:
    if configs["message.timestamp.type"] == "LogAppendTime":
        return "log_append"
    bound = configs.get("message.timestamp.after.max.ms", _FOREVER_MS)
    return "create" if bound == _FOREVER_MS else "create_bounded"

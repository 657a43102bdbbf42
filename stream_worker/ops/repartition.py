"""`repartition`: a log of one entity becomes the log of another, inside Kafka transactions.

Records go, in the order of their timestamps, into a topic that is keyed by the other entity;
offsets are in the same transaction as the records, so that a reader that is `read_committed` sees
each once, whenever this is killed. One process does it: a second one fences the first.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from llm4es.errors import (
    BundleMismatch,
    ConfigError,
    Fenced,
    InvalidEvent,
    SinkUnavailable,
    SourceUnavailable,
)
from llm4es.events import Record, decode_object, entity_id_of, origin_headers
from stream_worker.dead_letters import KafkaDeadLetters
from stream_worker.formats.decoding import Decode
from stream_worker.ops.merging import MergedRecords, next_offsets
from stream_worker.ports import DeadLetter
from stream_worker.sources.kafka_client import (
    FENCED,
    KafkaConsumer,
    KafkaError,
    KafkaProducer,
    KafkaSettings,
    OffsetAndMetadata,
    admin,
    connecting,
    kafka_partition,
    mapped,
    topic_configs,
    translate,
)

__all__ = ["Repartition", "RepartitionSpec"]

log = logging.getLogger(__name__)

_FETCH_BYTES = 16 << 20
_LARGEST_REQUEST = 64 << 20  # what a topic takes is the topic's to say
_COUNTED = ("read", "written", "without_entity", "dead_letters", "transactions", "late_inputs")


@dataclass(frozen=True, slots=True, kw_only=True)
class RepartitionSpec:
    """What goes where. `entity_field` holds the id of the entity that the new log is keyed by."""

    sources: tuple[str, ...]
    target: str
    entity_field: str
    dead_letter_topic: str
    max_idle_ms: int = 5_000
    max_records: int = 2_000  # of one transaction
    transaction_timeout_ms: int = 60_000
    unproven_start: bool = False

    @property
    def job(self) -> str:
        """Its consumer group, and its `transactional_id`: one such job per target."""
        return f"llm4es-repartition-{self.target}"


class Repartition:
    """Writes the target from the sources; `counts` says how much so far.

    Refuses, when it is made, topics from which or into which it cannot: ConfigError,
    BundleMismatch. A record that cannot be read is parked in the dead-letter topic; one without
    the entity, and a tombstone (of the sources' entity) concern nobody here.
    """

    def __init__(
        self, kafka: KafkaSettings, spec: RepartitionSpec, decode: Decode = decode_object
    ) -> None:
        self._kafka = kafka
        self._spec = spec
        self._decode = decode
        self._stopping = False
        self.counts: Counter[str] = Counter(dict.fromkeys(_COUNTED, 0))
        self._refuse_unfit_topics()

    def stop(self) -> None:
        """Return from `run` after the transaction under way. Safe in a signal handler."""
        self._stopping = True

    def run(self, *, until_end: bool = False) -> None:
        """Work until stopped, or until the sources are at their end.

        Kafka away is waited for, and what was under way begun anew. Raises Fenced once another
        process does this job.
        """
        while not self._stopping:
            try:
                self._incarnation(until_end=until_end)
            except (SourceUnavailable, SinkUnavailable) as error:
                log.warning("%s; beginning anew in %.1f s", error, error.retry_after_s)
                time.sleep(error.retry_after_s)
            else:
                return

    def _incarnation(self, *, until_end: bool) -> None:
        """Open everything, fence whoever had the job, and go on where its last commit ends."""
        with ExitStack() as stack:
            letters = KafkaDeadLetters(
                self._kafka, self._spec.dead_letter_topic, source_topic=self._spec.sources[0]
            )
            stack.callback(letters.close)
            with _transactional(self._spec):
                producer = KafkaProducer(
                    **self._kafka.client_config(),
                    transactional_id=self._spec.job,
                    transaction_timeout_ms=self._spec.transaction_timeout_ms,
                    max_request_size=_LARGEST_REQUEST,
                    linger_ms=5,
                    metrics_enabled=False,
                )
                stack.callback(producer.close, timeout=5)
                producer.init_transactions()
            with connecting(self._kafka):
                consumer = KafkaConsumer(**self._consumer_config())
            stack.callback(consumer.close, autocommit=False)
            with mapped():
                self._place(consumer)
            merged = MergedRecords(consumer, max_idle_ms=self._spec.max_idle_ms)
            self._loop(merged, producer, letters, until_end=until_end)

    def _loop(
        self,
        merged: MergedRecords,
        producer: KafkaProducer,
        letters: KafkaDeadLetters,
        *,
        until_end: bool,
    ) -> None:
        late = 0
        while not self._stopping:
            records = merged.take(self._spec.max_records)
            if merged.late_inputs > late:
                log.warning("an input did not deliver for max_idle_ms: its records come late")
                self.counts["late_inputs"] += merged.late_inputs - late
                late = merged.late_inputs
            if records:
                self._carry(records, producer, letters)
            elif until_end and merged.at_end():
                return

    def _carry(
        self, records: Sequence[Record], producer: KafkaProducer, letters: KafkaDeadLetters
    ) -> None:
        keyed, bad, without = self._keyed(records)
        if bad:
            letters.park(bad)
        with _transactional(self._spec):
            producer.begin_transaction()
            for key, record in keyed:
                producer.send(
                    self._spec.target,
                    key=key,
                    value=record.value,
                    headers=[
                        *((name, value or b"") for name, value in record.headers),
                        *origin_headers(record),
                    ],
                )
            producer.send_offsets_to_transaction(
                {
                    kafka_partition(*tp): OffsetAndMetadata(offset, "", -1)
                    for tp, offset in next_offsets(records).items()
                },
                self._spec.job,
            )
            producer.commit_transaction()
        self.counts.update(
            read=len(records),
            written=len(keyed),
            without_entity=without,
            dead_letters=len(bad),
            transactions=1,
        )

    def _keyed(
        self, records: Sequence[Record]
    ) -> tuple[list[tuple[bytes, Record]], list[DeadLetter], int]:
        keyed: list[tuple[bytes, Record]] = []
        bad: list[DeadLetter] = []
        without = 0
        field = self._spec.entity_field
        for record in records:
            if record.value is None:
                without += 1
                continue
            try:
                document = self._decode(record.value)
                if document.get(field) is None:
                    without += 1
                else:
                    keyed.append((entity_id_of(document, field).encode(), record))
            except InvalidEvent as cause:
                bad.append(DeadLetter(record, cause))
        return keyed, bad, without

    def _place(self, consumer: KafkaConsumer) -> None:
        """Assign every partition, and go to where the job's last transaction ends."""
        partitions = [
            kafka_partition(topic, partition)
            for topic in self._spec.sources
            for partition in sorted(consumer.partitions_for_topic(topic) or ())
        ]
        consumer.assign(partitions)
        firsts = consumer.beginning_offsets(partitions)
        for tp in partitions:
            committed = consumer.committed(tp)
            at = firsts[tp] if committed is None else committed
            if firsts[tp] > (committed or 0) and not (
                committed is None and self._spec.unproven_start
            ):
                raise BundleMismatch(
                    f"topic {tp.topic}",
                    f"partition {tp.partition} begins at offset {firsts[tp]}, and "
                    f"{committed or 0} was due: retention has taken what came before",
                    "lengthen its retention; for a first start from what is left give "
                    "--unproven-start",
                )
            consumer.seek(tp, at)

    def _consumer_config(self) -> dict[str, object]:
        return {
            **self._kafka.client_config(),
            "group_id": self._spec.job,  # of offsets alone: partitions are assigned by hand
            "enable_auto_commit": False,
            "auto_offset_reset": "none",
            "isolation_level": "read_committed",
            "allow_auto_create_topics": False,
            "max_partition_fetch_bytes": _FETCH_BYTES,
            "metrics_enabled": False,
        }

    def _refuse_unfit_topics(self) -> None:
        spec = self._spec
        if spec.target in spec.sources:
            raise ConfigError("to", f"{spec.target} is an input too", "name another topic")
        with admin(self._kafka) as client:
            known = set(client.list_topics())
            for field, topic in (*(("from", name) for name in spec.sources), ("to", spec.target)):
                if topic not in known:
                    raise ConfigError(field, f"Kafka knows no topic {topic!r}", "create it")
            configs = {name: topic_configs(client, name) for name in (*spec.sources, spec.target)}
        largest = max(int(configs[name]["max.message.bytes"]) for name in spec.sources)
        accepted = int(configs[spec.target]["max.message.bytes"])
        if accepted < largest:
            raise ConfigError(
                "to",
                f"{spec.target} takes {accepted} bytes, and records come up to {largest}",
                f"set its max.message.bytes to {largest}, and some for the origin's headers",
            )
        if "compact" in configs[spec.target]["cleanup.policy"]:
            raise BundleMismatch(
                f"topic {spec.target}",
                "cleanup.policy is compact, so records in the middle of a history may be gone",
                "set cleanup.policy=delete",
            )


@contextmanager
def _transactional(spec: RepartitionSpec) -> Iterator[None]:
    """Raise what a transactional producer raises as ours."""
    try:
        yield
    except FENCED as error:
        msg = f"another process repartitions as {spec.job} since: this one ends"
        raise Fenced(msg) from error
    except KafkaError as error:
        raise translate(error) from error

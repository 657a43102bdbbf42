"""The loop: it reads as the guarantee of DESIGN 4, and does nothing else."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from llm4es.bundle import Bundle
from llm4es.errors import (
    Fenced,
    InvalidEvent,
    NonFiniteEmbedding,
    SinkUnavailable,
    SourceUnavailable,
    StoreLost,
)
from llm4es.events import Record, TopicPartition, decode_object
from llm4es.features import FeatureRow, feature_row
from llm4es.windows import Window, settle
from stream_worker.folding import Coordinates, Folding, RecordFolder, coordinates_of
from stream_worker.formats.decoding import Decode
from stream_worker.log_checks import refuse_changed_log, refuse_other_topic, start_positions
from stream_worker.metrics import Metrics
from stream_worker.ports import (
    DeadLetters,
    Embedder,
    FeatureSink,
    RecordSource,
    WindowStore,
    WindowTransaction,
)

__all__ = ["Parts", "Worker", "WorkerPolicy"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a worker is put together from; `assembly` builds it from settings."""

    bundle: Bundle
    source: RecordSource
    store: WindowStore
    embedder: Embedder
    sink: FeatureSink
    dead_letters: DeadLetters
    metrics: Metrics
    decode: Decode = decode_object  # values of records


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPolicy:
    """How a worker goes about its batches."""

    max_records: int = 512
    poll_timeout_s: float = 0.2
    max_value_bytes: int = 1 << 20
    availability_delay: timedelta | None = timedelta(0)  # None: the log keeps its own timestamps
    every_event: bool = False
    deletes: bool = False  # tombstones delete; without a deletion key they are bad records
    until_end: bool = False
    unproven_start: bool = False


class Worker:
    """Folds a log into windows, and publishes a row for each entity that changed.

    `run` returns after `stop()`, or at the log's end where the policy says so; a batch under
    way is finished first. Errors that a person must see to are raised; a store or log that is
    away is waited for.
    """

    def __init__(self, parts: Parts, policy: WorkerPolicy) -> None:
        self._bundle = parts.bundle
        self._source = parts.source
        self._store = parts.store
        self._embedder = parts.embedder
        self._sink = parts.sink
        self._dead_letters = parts.dead_letters
        self._metrics = parts.metrics
        self._policy = policy
        self._folder = RecordFolder(
            parts.bundle,
            max_value_bytes=policy.max_value_bytes,
            availability_delay=policy.availability_delay,
            every_event=policy.every_event,
            deletes=policy.deletes,
            decode=parts.decode,
        )
        self._held: dict[TopicPartition, int] = {}  # next offsets that the store has shown
        self._unproven: set[tuple[str | None, int | None]] = set()
        self._lost = False
        self._stopping = False

    def stop(self) -> None:
        """Ask the loop to end after the batch under way. Safe in a signal handler."""
        self._stopping = True

    def run(self, on_batch: Callable[[], None] = lambda: None) -> None:
        """Work until stopped. `on_batch` is called after each poll, for a live display."""
        self._source.subscribe(self)
        while not self._stopping:
            with self._waiting_out():
                self._return_to_what_is_held()
                polled = self.step()
                if not polled and self._policy.until_end and self._source.remaining() == 0:
                    return
            on_batch()

    def step(self) -> int:
        """Poll one batch and carry it through; the number of its records."""
        records = self._source.poll(self._policy.max_records, self._policy.poll_timeout_s)
        if not records:
            return 0
        polled_at = time.monotonic()
        try:
            self._carry_through(records, polled_at)
        except Exception:
            self._rewind(records)
            raise
        self._source.commit(_next_offsets(records))  # 4. advisory: the windows decide
        self._metrics.batch(len(records), seconds=time.monotonic() - polled_at)
        return len(records)

    def assigned(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Look whether the log is still the one the windows were folded from, and where to go on.

        See DESIGN 4, "Stores may lose their tail" and "A log may change under us".
        """
        description = self._source.describe()
        topic = description.identity.topic
        refuse_other_topic(topic, self._store.topics())
        refuse_changed_log(description, self._store.identity(topic))
        stored = self._store.offsets(topic)
        positions = start_positions(
            description,
            partitions,
            stored=stored,
            committed=self._source.committed(partitions),
            unproven_start=self._policy.unproven_start,
        )
        unproven = {tp: at for tp, at in positions.items() if tp not in stored and at > 0}
        self._store.remember(description.identity, unproven)
        self._tell_unproven(self._store.unproven(topic), partitions)
        self._held |= {tp: stored.get(tp, 0) for tp in partitions}
        log.info("assigned: %s", ", ".join(f"{tp.partition}@{at}" for tp, at in positions.items()))
        return positions

    def revoked(self, partitions: Sequence[TopicPartition]) -> None:
        """Another worker may own them now, so what the store holds of them is its concern."""
        for tp in partitions:
            self._held.pop(tp, None)
        log.info("revoked: %s", ", ".join(str(tp.partition) for tp in partitions))

    def _carry_through(self, records: Sequence[Record], polled_at: float) -> None:
        with self._store.begin(self._held) as txn:  # raises where it holds less by now
            folding, rows, windows = self._fold_and_embed(records, txn)
            if folding.tombstones:
                self._sink.delete(list(folding.tombstones.values()))  # before what came after
            self._sink.journal(rows)  # 1. publish: offline first, then online
            self._sink.publish(_newest(rows))
            readable_s = time.monotonic() - polled_at
            if folding.letters:
                self._dead_letters.park(folding.letters)  # 2. park the bad ones
            for window in windows:
                txn.put(window)  # 3. leaving the block: windows, then their offsets
            txn.advance(_next_offsets(records))
        for tp, offset in _next_offsets(records).items():
            self._held[tp] = max(offset, self._held.get(tp, 0))
        self._metrics.folded(folding.outcomes, folding.redelivered)
        self._metrics.dead(folding.letters)
        self._metrics.published(
            len(rows), seconds=readable_s, unproven=self._count_unproven(folding, rows)
        )

    def _fold_and_embed(
        self, records: Sequence[Record], txn: WindowTransaction
    ) -> tuple[Folding, list[FeatureRow], list[Window]]:
        poison: dict[Coordinates, InvalidEvent] = {}
        while True:
            folding = self._folder.fold(records, txn.load, poison)
            try:
                return folding, *self._embed(folding)
            except NonFiniteEmbedding as error:
                poison |= self._find_poison(folding, error)

    def _embed(self, folding: Folding) -> tuple[list[FeatureRow], list[Window]]:
        """Rows of the states to publish, and the windows to store, finished chapters settled."""
        if not folding.states:
            return [], [folding.windows[entity_id] for entity_id in sorted(folding.changed)]
        embedded = self._embedder.embed(folding.states)
        rows = [
            feature_row(
                self._bundle,
                window,
                embedded.vectors[index],
                embedded.surprise[index],
                float(embedded.surprise_last[index]),
            )
            for index, window in enumerate(folding.states)
        ]
        latest = {window.entity_id: index for index, window in enumerate(folding.states)}
        windows = [
            settle(
                folding.windows[entity_id],
                embedded.finished[latest[entity_id]] if entity_id in latest else {},
                policy=self._bundle.manifest.window,
                half_lives=self._embedder.half_lives,
            )
            for entity_id in sorted(folding.changed)
        ]
        return rows, windows

    def _find_poison(
        self, folding: Folding, error: NonFiniteEmbedding
    ) -> dict[Coordinates, InvalidEvent]:
        """Try each event of the entities concerned as a chapter of its own.

        Raises the error itself where none is at fault alone: then the model is.
        """
        poison: dict[Coordinates, InvalidEvent] = {}
        for entity_id in {folding.states[row].entity_id for row in error.rows}:
            for record, event in folding.accepted[entity_id]:
                try:
                    self._embedder.embed([self._folder.fold_alone(record, event)])
                except NonFiniteEmbedding:
                    poison[coordinates_of(record)] = InvalidEvent(
                        "value", "the model's output for this event alone is not finite"
                    )
        if not poison:
            raise error
        return poison

    def _count_unproven(self, folding: Folding, rows: Sequence[FeatureRow]) -> int:
        if not self._unproven:
            return 0
        windows = (folding.windows[row.entity_id] for row in rows)
        return sum((window.topic, window.partition) in self._unproven for window in windows)

    def _tell_unproven(
        self, unproven: Mapping[TopicPartition, int], partitions: Sequence[TopicPartition]
    ) -> None:
        self._unproven |= set(unproven)
        for tp in partitions:
            if tp in unproven:
                log.warning(
                    "windows of partition %d of %s begin at offset %d, what came before is gone: "
                    "their rows are unproven",
                    *(tp.partition, tp.topic, unproven[tp]),
                )

    def _return_to_what_is_held(self) -> None:
        """Ask the store anew where to go on, once it was found to have lost its tail."""
        if self._lost:
            self._source.seek(self.assigned(sorted(self._held)))
            self._lost = False

    def _rewind(self, records: Sequence[Record]) -> None:
        """Go back to the batch's first records: nothing of it was committed."""
        first: dict[TopicPartition, int] = {}
        for record in records:
            first.setdefault(record.topic_partition, record.offset)
        self._source.seek(first)

    @contextmanager
    def _waiting_out(self) -> Iterator[None]:
        """Wait where a store or the log is away, or another worker took over; then go on."""
        try:
            yield
        except (SinkUnavailable, SourceUnavailable) as error:
            log.warning("%s; trying again in %.1f s", error, error.retry_after_s)
            self._metrics.retried()
            self._pause(error.retry_after_s)
        except Fenced as error:
            log.warning("%s; the batch is dropped and read again", error)
            self._metrics.fenced()
        except StoreLost as error:
            log.warning("%s; the log is read again from where the store stands", error)
            self._metrics.store_lost()
            self._lost = True

    def _pause(self, seconds: float) -> None:
        """Wait, but not past a stop."""
        until = time.monotonic() + seconds
        while not self._stopping and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))


def _next_offsets(records: Sequence[Record]) -> dict[TopicPartition, int]:
    return {record.topic_partition: record.offset + 1 for record in records}


def _newest(rows: Sequence[FeatureRow]) -> list[FeatureRow]:
    """The last row of each entity: rows of one entity come in the order of `as_of`."""
    return list({row.entity_id: row for row in rows}.values())

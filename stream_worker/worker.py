"""The loop: it reads as the guarantee of DESIGN 4, and does nothing else."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from llm4es.bundle import Bundle
from llm4es.errors import (
    Fenced,
    InvalidEvent,
    NonFiniteEmbedding,
    SinkUnavailable,
    SourceUnavailable,
)
from llm4es.events import Event, Record, TopicPartition, coordinates_id, parse_event
from llm4es.features import FeatureRow, feature_row
from llm4es.windows import Outcome, Window, fold, settle
from stream_worker.log_checks import refuse_changed_log, start_positions
from stream_worker.metrics import Metrics
from stream_worker.ports import (
    DeadLetter,
    DeadLetters,
    Embedder,
    FeatureSink,
    RecordSource,
    WindowStore,
)

__all__ = ["Parts", "Worker", "WorkerPolicy"]

log = logging.getLogger(__name__)

Coordinates = tuple[TopicPartition, int]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPolicy:
    """How a worker goes about its batches."""

    max_records: int = 512
    poll_timeout_s: float = 0.2
    max_value_bytes: int = 1 << 20
    availability_delay: timedelta = timedelta(0)  # where the log keeps no timestamps
    every_event: bool = False
    until_end: bool = False
    unproven_start: bool = False


@dataclass(slots=True)
class _Folding:
    """A batch, folded: windows in their last state, and the states that become rows."""

    windows: dict[str, Window]
    states: list[Window] = field(default_factory=list)
    letters: list[DeadLetter] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)
    accepted: dict[str, list[tuple[Record, Event]]] = field(default_factory=dict)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    redelivered: int = 0


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
        self._stopping = False

    def stop(self) -> None:
        """Ask the loop to end after the batch under way. Safe in a signal handler."""
        self._stopping = True

    def run(self, on_batch: Callable[[], None] = lambda: None) -> None:
        """Work until stopped. `on_batch` is called after each poll, for a live display."""
        self._source.subscribe(self)
        while not self._stopping:
            with self._waiting_out():
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
        refuse_changed_log(description, self._store.identity(topic))
        positions = start_positions(
            description,
            partitions,
            stored=self._store.offsets(topic),
            committed=self._source.committed(partitions),
            unproven_start=self._policy.unproven_start,
        )
        self._store.remember(description.identity)
        log.info("assigned: %s", ", ".join(f"{tp.partition}@{at}" for tp, at in positions.items()))
        return positions

    def revoked(self, partitions: Sequence[TopicPartition]) -> None:
        """Nothing of a partition outlives its batch here, so there is nothing to forget."""
        log.info("revoked: %s", ", ".join(str(tp.partition) for tp in partitions))

    def _carry_through(self, records: Sequence[Record], polled_at: float) -> None:
        with self._store.begin() as txn:
            poison: dict[Coordinates, InvalidEvent] = {}
            while True:
                folding = self._fold(records, txn.load, poison)
                try:
                    rows, windows = self._embed(folding)
                except NonFiniteEmbedding as error:
                    poison |= self._find_poison(folding, error)
                    continue
                break
            self._sink.journal(rows)  # 1. publish: offline first, then online
            self._sink.publish(_newest(rows))
            self._metrics.published(len(rows), seconds=time.monotonic() - polled_at)
            if folding.letters:  # 2. park the bad ones
                self._dead_letters.park(folding.letters)
                self._metrics.dead(folding.letters)
            for window in windows:  # 3. leaving the block: windows, then their offsets
                txn.put(window)
            txn.advance(_next_offsets(records))
        self._metrics.folded(folding.outcomes, folding.redelivered)

    def _fold(
        self,
        records: Sequence[Record],
        load: Callable[[Sequence[str]], dict[str, Window]],
        poison: Mapping[Coordinates, InvalidEvent],
    ) -> _Folding:
        letters: list[DeadLetter] = []
        parsed: list[tuple[Record, Event]] = []
        for record in records:
            try:
                if (cause := poison.get((record.topic_partition, record.offset))) is not None:
                    raise cause
                parsed.append((record, self._parse(record)))
            except InvalidEvent as cause:
                letters.append(DeadLetter(record, cause))
        entity_ids = sorted({event.entity_id for _, event in parsed})
        folding = _Folding(windows=load(entity_ids), letters=letters)
        for record, event in parsed:
            try:
                self._fold_one(folding, record, event)
            except InvalidEvent as cause:
                folding.letters.append(DeadLetter(record, cause))
        if not self._policy.every_event:
            folding.states = [folding.windows[entity_id] for entity_id in folding.accepted]
        return folding

    def _fold_one(self, folding: _Folding, record: Record, event: Event) -> None:
        window = folding.windows[event.entity_id]
        if window.topic is not None and (window.topic, window.partition) != record.topic_partition:
            raise InvalidEvent(
                "partition",
                f"the entity's records stand in partition {window.partition}, this one does not",
            )
        if record.offset < window.next_offset:
            folding.redelivered += 1
            return
        folded = fold(
            window,
            event,
            recorded_at=self._recorded_at(record, event),
            policy=self._bundle.manifest.window,
            measure=self._bundle.tokens.measure,
        )
        folding.outcomes[folded.outcome] += 1
        folding.windows[event.entity_id] = replace(
            folded.window,
            topic=record.topic,
            partition=record.partition,
            next_offset=record.offset + 1,
        )
        folding.changed.add(event.entity_id)
        if folded.outcome is Outcome.ACCEPTED:
            folding.accepted.setdefault(event.entity_id, []).append((record, event))
            if self._policy.every_event:
                folding.states.append(folding.windows[event.entity_id])

    def _parse(self, record: Record) -> Event:
        if record.value is None:
            raise InvalidEvent("value", "is null: this version cannot delete an entity yet")
        if len(record.value) > self._policy.max_value_bytes:
            raise InvalidEvent(
                "value",
                f"{len(record.value)} bytes, max_value_bytes is {self._policy.max_value_bytes}",
            )
        event = parse_event(
            record.value,
            self._bundle.schema,
            entity=self._bundle.manifest.entity,
            coordinates=coordinates_id(record.topic, record.partition, record.offset),
        )
        if record.key != event.entity_id.encode():
            raise InvalidEvent("key", "is not the entity's id in UTF-8")
        return event

    def _recorded_at(self, record: Record, event: Event) -> datetime:
        if record.timestamp is not None:
            return record.timestamp
        return event.occurred_at + self._policy.availability_delay

    def _embed(self, folding: _Folding) -> tuple[list[FeatureRow], list[Window]]:
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
        self, folding: _Folding, error: NonFiniteEmbedding
    ) -> dict[Coordinates, InvalidEvent]:
        """Try each event of the entities concerned as a chapter of its own.

        Raises the error itself where none is at fault alone: then the model is.
        """
        poison: dict[Coordinates, InvalidEvent] = {}
        for entity_id in {folding.states[row].entity_id for row in error.rows}:
            for record, event in folding.accepted[entity_id]:
                alone = fold(
                    Window(entity_id=entity_id),
                    event,
                    recorded_at=self._recorded_at(record, event),
                    policy=self._bundle.manifest.window,
                    measure=self._bundle.tokens.measure,
                ).window
                try:
                    self._embedder.embed([alone])
                except NonFiniteEmbedding:
                    poison[record.topic_partition, record.offset] = InvalidEvent(
                        "value", "the model's output for this event alone is not finite"
                    )
        if not poison:
            raise error
        return poison

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

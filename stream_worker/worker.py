"""The loop: it reads as the guarantee of DESIGN 4, and does nothing else."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from llm4es.bundle import Bundle
from llm4es.errors import Fenced, SinkUnavailable, SourceUnavailable, StoreLost
from llm4es.events import Record, TopicPartition, decode_object
from stream_worker.embedding import BatchReader
from stream_worker.folding import RecordFolder
from stream_worker.formats.decoding import Decode
from stream_worker.metrics import Metrics
from stream_worker.patience import Patience
from stream_worker.placing import Places
from stream_worker.ports import DeadLetters, Embedder, FeatureSink, RecordSource, WindowStore
from stream_worker.window_store.hot import HotWindows

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
    max_batch_tokens: int = 65_536  # given to the model at once, and between two signs of life
    drain_s: float = 10.0  # how long a batch may hold up a rebalance before it is given up
    retry_budget_s: float = 5.0  # of a batch whose sink is away, before it is read again
    hot_events: int = 100_000  # of the windows that are kept decoded
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
        self._source = parts.source
        self._store = parts.store
        self._sink = parts.sink
        self._embedder = parts.embedder
        self._dead_letters = parts.dead_letters
        self._metrics = parts.metrics
        self._policy = policy
        self._patience = Patience(
            policy.retry_budget_s, stopping=lambda: self._stopping, retried=parts.metrics.retried
        )
        self._hot = HotWindows(policy.hot_events)
        folder = RecordFolder(
            parts.bundle,
            max_value_bytes=policy.max_value_bytes,
            availability_delay=policy.availability_delay,
            every_event=policy.every_event,
            deletes=policy.deletes,
            decode=parts.decode,
        )
        self._reader = BatchReader(
            parts.bundle,
            folder,
            parts.embedder,
            max_tokens=policy.max_batch_tokens,
            between=self._show_life,
        )
        self._places = Places(
            parts.source,
            parts.store,
            parts.sink,
            self._hot,
            rows=self._reader.rows,
            between=self._show_life,
            unproven_start=policy.unproven_start,
        )
        self._alive_at = 0.0
        self._lost = False
        self._waits = False
        self._stopping = False

    @property
    def ready(self) -> bool:
        """Whether it has partitions, and waits for nothing."""
        return bool(self._places.held) and not self._waits

    def stop(self) -> None:
        """Ask the loop to end after the batch under way. Safe in a signal handler."""
        self._stopping = True

    def run(self, on_batch: Callable[[], None] = lambda: None) -> None:
        """Work until stopped. `on_batch` is called after each poll, for a live display."""
        self._source.subscribe(self._places)
        while not self._stopping:
            with self._waiting_out():
                if self._lost:
                    self._places.return_to_what_is_held()
                    self._lost = False
                polled = self.step()
                if not polled and self._policy.until_end and self._source.remaining() == 0:
                    self._places.look(now=True)
                    return
            on_batch()

    def step(self) -> int:
        """Poll one batch and carry it through; the number of its records."""
        self._alive_at = time.monotonic()
        records = self._source.poll(self._policy.max_records, self._policy.poll_timeout_s)
        self._metrics.polled(self._source.lag())
        if not records:
            self._places.look()
            return 0
        polled_at = time.monotonic()
        try:
            self._carry_through(records, polled_at)
        except Exception:
            self._hot.drop()  # what was written of the batch is not known
            self._rewind(records)
            raise
        self._source.commit(_next_offsets(records))  # 4. advisory: the windows decide
        self._metrics.batch(len(records), seconds=time.monotonic() - polled_at)
        return len(records)

    def _carry_through(self, records: Sequence[Record], polled_at: float) -> None:
        reached = _next_offsets(records)
        with self._store.begin(self._places.held) as txn:  # raises where it holds less by now
            batch = self._reader.read(records, lambda ids: self._hot.load(ids, txn))
            read_at = time.monotonic()
            if tombstones := list(batch.folding.tombstones.values()):
                # Before what came after it.
                self._patience.with_(lambda: self._sink.delete(tombstones))
                self._embedder.forget(each.entity_id for each in tombstones)
            self._patience.with_(lambda: self._sink.journal(batch.rows, _spans(records)))
            self._patience.with_(  # 1. publish: offline first, then online
                lambda: self._sink.publish(
                    batch.newest, reached=reached, held=self._places.published
                )
            )
            readable_at = time.monotonic()
            moment = datetime.now(UTC)
            if letters := batch.folding.letters:
                self._patience.with_(lambda: self._dead_letters.park(letters))  # 2. the bad ones
            for window in batch.windows:
                txn.put(window)  # 3. leaving the block: windows, then their offsets
            txn.advance(reached)
        self._hot.keep(batch.windows)
        self._places.reached(reached)
        self._metrics.folded(batch.folding.outcomes, batch.folding.redelivered)
        self._metrics.dead(letters)
        accepted = batch.folding.accepted.values()
        self._metrics.readable((record for each in accepted for record, _ in each), moment)
        self._metrics.read(
            tokens=batch.tokens,
            seconds=batch.seconds,
            coalesced=sum(map(len, accepted)) - len(batch.rows),
        )
        self._metrics.sank(readable_at - read_at)
        self._metrics.cached(
            hits=self._hot.hits,
            misses=self._hot.misses,
            memo_hits=getattr(self._embedder, "memo_hits", 0),
        )
        published = [batch.folding.windows[row.entity_id] for row in batch.rows]
        self._metrics.published(
            len(batch.rows),
            seconds=readable_at - polled_at,
            unproven=self._places.count_unproven(published),
        )

    def _show_life(self) -> None:
        """Tell the group that we live, where a batch takes long. Raises Fenced: it is not ours."""
        if time.monotonic() - self._alive_at > self._policy.drain_s:
            self._source.keep_alive()
            self._alive_at = time.monotonic()

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
            self._waits = False
        except (SinkUnavailable, SourceUnavailable) as error:
            self._waits = True
            log.warning("%s; trying again in %.1f s", error, error.retry_after_s)
            self._metrics.retried()
            self._patience.wait(error.retry_after_s)
        except Fenced as error:
            log.warning("%s; the batch is dropped and read again", error)
            self._metrics.fenced()
            # The next poll places what a rebalance gave; a loss that still stands is seen again.
            self._lost = False
        except StoreLost as error:
            log.warning("%s; the log is read again from where the store stands", error)
            self._metrics.store_lost()
            self._lost = True


def _next_offsets(records: Sequence[Record]) -> dict[TopicPartition, int]:
    last = {(record.topic, record.partition): record.offset for record in records}
    return {TopicPartition(*name): offset + 1 for name, offset in last.items()}


def _spans(records: Sequence[Record]) -> dict[TopicPartition, tuple[int, int]]:
    """First and next offset of each partition: records of one come in the order of offset."""
    first: dict[TopicPartition, int] = {}
    for record in records:
        first.setdefault(record.topic_partition, record.offset)
    return {tp: (first[tp], upto) for tp, upto in _next_offsets(records).items()}

"""Which partitions are read here, from where, and whether the stores still hold what they held.

DESIGN 4, "Stores may lose their tail" and "A log may change under us".
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from llm4es.errors import StoreLost
from llm4es.events import TopicPartition
from llm4es.features import FeatureRow
from llm4es.windows import Window
from stream_worker.log_checks import refuse_changed_log, refuse_other_topic, start_positions
from stream_worker.ports import FeatureSink, RecordSource, WindowStore
from stream_worker.window_store.batch import refuse_lost
from stream_worker.window_store.hot import HotWindows

__all__ = ["Places"]

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0  # at the stores, while no records come that would
_REPUBLISHED = 256  # rows of one batch when an online store has lost some


class Places:
    """The listener of a worker's source, and what it has seen the stores hold.

    `rows` gives the current rows of windows; `between` is called between two batches of them.
    """

    def __init__(
        self,
        source: RecordSource,
        store: WindowStore,
        sink: FeatureSink,
        hot: HotWindows,
        *,
        rows: Callable[[Sequence[Window]], list[FeatureRow]],
        between: Callable[[], None],
        unproven_start: bool,
    ) -> None:
        self._source = source
        self._store = store
        self._sink = sink
        self._hot = hot
        self._rows = rows
        self._between = between
        self._unproven_start = unproven_start
        self._unproven: set[tuple[str | None, int | None]] = set()
        self._looked_at = 0.0
        self.held: dict[TopicPartition, int] = {}  # next offsets that the store has shown
        self.published: dict[TopicPartition, int] = {}  # and the online store

    def assigned(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Look whether the log is still the one the windows were folded from, and where to go on.

        Where the online store is behind the windows, their rows are published again first.
        """
        self._hot.drop(partitions)
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
            unproven_start=self._unproven_start,
        )
        unproven = {tp: at for tp, at in positions.items() if tp not in stored and at > 0}
        self._store.remember(description.identity, unproven)
        self._tell_unproven(self._store.unproven(topic), partitions)
        self._publish_what_is_missing(topic, {tp: stored.get(tp, 0) for tp in partitions})
        self.held |= {tp: stored.get(tp, 0) for tp in partitions}
        log.info("assigned: %s", ", ".join(f"{tp.partition}@{at}" for tp, at in positions.items()))
        return positions

    def revoked(self, partitions: Sequence[TopicPartition]) -> None:
        """Another worker may own them now, so what the stores hold of them is its concern."""
        self._hot.drop(partitions)
        for tp in partitions:
            self.held.pop(tp, None)
            self.published.pop(tp, None)
        log.info("revoked: %s", ", ".join(str(tp.partition) for tp in partitions))

    def reached(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Note what both stores hold after a batch."""
        for tp, offset in next_offsets.items():
            self.held[tp] = max(offset, self.held.get(tp, 0))
            if tp in self.published:
                self.published[tp] = max(offset, self.published[tp])

    def return_to_what_is_held(self) -> None:
        """Ask the stores anew where to go on, once one was found to have lost its tail."""
        self._source.seek(self.assigned(sorted(self.held)))

    def look(self, *, now: bool = False) -> None:
        """Notice a loss though no batch comes: once a second, or `now`. Raises StoreLost."""
        if not now and time.monotonic() - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        for topic in {tp.topic for tp in self.held}:
            refuse_lost(topic, self.held, self._store.offsets(topic))
            published = self._sink.published(topic)
            for tp, at in self.published.items():
                if published is not None and published.get(tp, 0) < at:
                    msg = f"the online store has lost rows of partition {tp.partition} of {topic}"
                    raise StoreLost(msg)

    def count_unproven(self, windows: Iterable[Window]) -> int:
        """How many of the windows lack the beginning of the log."""
        if not self._unproven:
            return 0
        return sum((window.topic, window.partition) in self._unproven for window in windows)

    def _publish_what_is_missing(self, topic: str, stored: Mapping[TopicPartition, int]) -> None:
        published = self._sink.published(topic)
        if published is None:
            return
        behind = {tp: at for tp, at in stored.items() if published.get(tp, 0) < at}
        if behind:
            log.warning(
                "the online store is behind the windows of %s: their rows are published again",
                ", ".join(f"partition {tp.partition}" for tp in sorted(behind)),
            )
            self._sink.republish(self._current_rows(behind), behind)
        self.published |= {tp: max(at, published.get(tp, 0)) for tp, at in stored.items()}

    def _current_rows(self, partitions: Collection[TopicPartition]) -> Iterator[list[FeatureRow]]:
        """Journalled too: the offline log, as well, may be another than it was."""
        batch: list[Window] = []
        for window in self._store.scan(partitions):
            if window.last_event is not None:
                batch.append(window)
            if len(batch) == _REPUBLISHED:
                yield self._journalled(batch)
                batch = []
                self._between()
        if batch:
            yield self._journalled(batch)

    def _journalled(self, windows: Sequence[Window]) -> list[FeatureRow]:
        rows = self._rows(windows)
        self._sink.journal(rows)
        return rows

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

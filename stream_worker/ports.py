"""The five protocols that the worker is made of. Each docstring is the contract."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from llm4es.deletion import Tombstone
from llm4es.errors import InvalidEvent
from llm4es.events import NO_OFFSETS, NO_SPANS, OffsetSpans, Record, TopicPartition
from llm4es.features import Embedded, FeatureRow
from llm4es.windows import Window

__all__ = [
    "NO_OFFSETS",
    "AssignmentListener",
    "DeadLetter",
    "DeadLetters",
    "Embedder",
    "FeatureSink",
    "LogDescription",
    "LogIdentity",
    "PartitionSpan",
    "RecordSource",
    "Timestamps",
    "WindowStore",
    "WindowTransaction",
]


Timestamps = Literal["log_append", "create_bounded", "create", "none"]


@dataclass(frozen=True, slots=True)
class PartitionSpan:
    """Offsets that a partition holds now: [first, end)."""

    first: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogIdentity:
    """What must not change under windows that were folded from a log."""

    topic: str
    topic_id: str  # empty as long as nothing tells the log from another: a file without a line
    partitions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogDescription:
    """A log as its server describes it now."""

    identity: LogIdentity
    spans: Mapping[int, PartitionSpan]  # by partition
    compacted: bool  # some records may be gone for good, wherever they stood
    timestamps: Timestamps


class AssignmentListener(Protocol):
    """Told by the source, between two batches, which partitions are read here."""

    def assigned(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Give the offset to read each of them from. May refuse by raising."""
        ...

    def revoked(self, partitions: Sequence[TopicPartition]) -> None:
        """Forget what was kept of them: another worker may own them now."""
        ...


class RecordSource(Protocol):
    """A partitioned log. Raises SourceUnavailable where it cannot be read now.

    Raises BundleMismatch where records that were due next are gone before they were read.
    """

    def describe(self) -> LogDescription:
        """Ask the log what it is. Raises ConfigError where it does not exist."""
        ...

    def sample(self, count: int) -> Sequence[Record]:
        """Give some of the newest records, at most `count` per partition; moves nothing."""
        ...

    def subscribe(self, listener: AssignmentListener) -> None:
        """Start to read; `poll` tells the listener of each change of assignment."""
        ...

    def poll(self, max_records: int, timeout_s: float) -> Sequence[Record]:
        """Next records of the assigned partitions, each partition's in order of offset."""
        ...

    def committed(self, partitions: Iterable[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Offsets that the group has committed, where it has."""
        ...

    def commit(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Advance the group, perhaps after returning; `committed` and `close` wait for it.

        Advisory: the windows decide, so a failure is logged, not raised.
        """
        ...

    def seek(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read on from there."""
        ...

    def keep_alive(self) -> None:
        """Show the group that we live, in the middle of a batch; nothing is read.

        Raises Fenced where partitions were taken away: the batch is no longer ours to finish.
        """
        ...

    def lag(self) -> Mapping[TopicPartition, int]:
        """Records to come of each partition read here, as far as is known without asking."""
        ...

    def remaining(self) -> int | None:
        """Records between here and the end of the assigned partitions; None before assignment.

        0 for a member that the group has given none.
        """
        ...

    def close(self) -> None:
        """Leave the group; commit no more than `commit` was given."""
        ...


class WindowTransaction(Protocol):
    """Windows as they were at the batch's start, and what the batch makes of them."""

    def load(self, entity_ids: Iterable[str]) -> dict[str, Window]:
        """Read windows; an entity that has none gets an empty one of version 0."""
        ...

    def put(self, window: Window) -> None:
        """Write the window when the block ends, if its version still stands in the store."""
        ...

    def advance(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Write the store's offsets when the block ends, after all windows; none moves back."""
        ...


class WindowStore(Protocol):
    """Windows of one bundle, with the offsets up to which they hold the log.

    `begin` gives a block: leaving it writes the windows, each by compare-and-set on its version,
    then the offsets; an exception inside it writes nothing. Raises Fenced where another worker
    has written a window meanwhile, SinkUnavailable where the store cannot be reached, ConfigError
    where it is no window store or refuses us. A window that is `deleted` is kept under a keyed
    hash of its entity's id, and its id nowhere, until the entity has events again.
    """

    def begin(
        self, held: Mapping[TopicPartition, int] = NO_OFFSETS
    ) -> AbstractContextManager[WindowTransaction]:
        """Open a batch on a store that is known to hold the log up to `held`.

        It is looked at after windows are read, and again as offsets are written: StoreLost where
        less is there.
        """
        ...

    def read(self, entity_id: str) -> Window | None:
        """Read one window outside of any batch."""
        ...

    def scan(self, partitions: Collection[TopicPartition]) -> Iterator[Window]:
        """Give every window of these partitions, in no order; it looks at all there are."""
        ...

    def has_deleted(self) -> bool:
        """Whether it keeps what is left of deleted entities, which no scan gives."""
        ...

    def offsets(self, topic: str) -> dict[TopicPartition, int]:
        """Next offset per partition up to which this store holds the log."""
        ...

    def identity(self, topic: str) -> LogIdentity | None:
        """Which log the windows were folded from; None in a fresh store."""
        ...

    def topics(self) -> set[str]:
        """Topics that windows here were folded from."""
        ...

    def unproven(self, topic: str) -> dict[TopicPartition, int]:
        """Partitions whose beginning was gone when folding began, and where it began."""
        ...

    def remember(
        self, identity: LogIdentity, unproven: Mapping[TopicPartition, int] = NO_OFFSETS
    ) -> None:
        """Record which log the windows are folded from, and what of it lacks its beginning."""
        ...

    def close(self) -> None:
        """Release the connection."""
        ...


class Embedder(Protocol):
    """Windows in, vectors out; see `llm4es.engine.OnnxEmbedder` for the one that serves."""

    @property
    def half_lives(self) -> NDArray[np.float64]:
        """Half-lives (n,) by which sums (n,) of chapters decay."""
        ...

    def embed(self, windows: Sequence[Window]) -> Embedded:
        """B windows -> vectors (B, dim), surprise (B, columns), and finished chapters' sums.

        Row i is window i's. Raises NonFiniteEmbedding naming the rows.
        """
        ...

    def forget(self, entity_ids: Iterable[str]) -> None:
        """Drop what is kept of these entities: they are deleted."""
        ...


class FeatureSink(Protocol):
    """The offline log and the online store of one feature view."""

    def journal(self, rows: Sequence[FeatureRow], spans: OffsetSpans = NO_SPANS) -> None:
        """Return when the rows are durable in the offline log; several per entity may come.

        `spans` are the offsets that they were made from: an exact replay writes them once.
        """
        ...

    def publish(
        self,
        rows: Sequence[FeatureRow],
        *,
        reached: Mapping[TopicPartition, int] = NO_OFFSETS,
        held: Mapping[TopicPartition, int] = NO_OFFSETS,
    ) -> None:
        """Return only when every row is readable online, or superseded by a newer one.

        At most one row per entity. Idempotent: writing the same rows again changes nothing.
        Rows survive what the window store survives, where that is the sink's to say. Checks
        dimension and finiteness itself (Feast does not). `reached` is the log's next offsets
        that the rows stand for, noted behind them; `held` what was seen there before. Raises
        SinkUnavailable (retry after `retry_after_s`), StoreLost (less than `held` is there),
        SinkRejected (our bug: stop).
        """
        ...

    def republish(
        self, batches: Iterable[Sequence[FeatureRow]], reached: Mapping[TopicPartition, int]
    ) -> None:
        """Publish all current rows of some partitions, in batches, and note `reached` behind them.

        Raises as `publish` does; StoreLost where the store loses what it holds meanwhile.
        """
        ...

    def published(self, topic: str) -> Mapping[TopicPartition, int] | None:
        """Next offsets that rows online stand for; None where the store cannot note any."""
        ...

    def delete(self, tombstones: Sequence[Tombstone]) -> None:
        """Return when no row of these entities at or before `as_of` can be read any more.

        Nor comes one back: `journal` and `publish` leave such rows out from now on, in every
        process that writes here. A newer row stays. Idempotent. Raises SinkUnavailable.
        """
        ...

    def read(self, entity_ids: Sequence[str]) -> Sequence[FeatureRow | None]:
        """Online rows as a stock client sees them."""
        ...

    def close(self) -> None:
        """Roll what is journalled, and release the connections."""
        ...


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that can never be folded, and why."""

    record: Record
    cause: InvalidEvent


class DeadLetters(Protocol):
    """Where bad records wait for a person. At least once, told apart by coordinates."""

    def park(self, letters: Sequence[DeadLetter]) -> None:
        """Return when every letter is durable. Raises SinkUnavailable, ConfigError."""
        ...

    def close(self) -> None:
        """Release the connection."""
        ...

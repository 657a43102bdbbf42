"""Part of a log: from where to where, whose records, and how fast."""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from llm4es.errors import ConfigError
from llm4es.events import Record, TopicPartition
from stream_worker.ops.logs import ReplayableLog
from stream_worker.ports import AssignmentListener, LogDescription

__all__ = ["Span", "SpanSource", "TokenBucket", "resolve_offsets"]

_PAIR = re.compile(r"(\d+):(\d+)")
_SHORTEST_S = 0.001
_BATCH_S = 0.25
_GLANCE_S = 0.05  # how soon a stop is seen while tokens are waited for


@dataclass(frozen=True, slots=True)
class Span:
    """Offsets [start, end) of one partition, of which the log has [first, ...)."""

    first: int
    start: int
    end: int


def resolve_offsets(
    flag: str,
    text: str,
    source: ReplayableLog,
    description: LogDescription,
    moment_of: Callable[[Record], datetime | None],
) -> dict[int, int]:
    """Offsets by partition of `start`, `end`, one offset for all, `0:120,1:99`, or a time.

    A time is ISO 8601, UTC where it has no zone, and means the first record that is not older.
    Raises ConfigError naming the flag.
    """
    spans = description.spans
    if text == "start":
        return {partition: span.first for partition, span in spans.items()}
    if text == "end":
        return {partition: span.end for partition, span in spans.items()}
    if text.isdecimal():
        return dict.fromkeys(spans, int(text))
    pairs = [_PAIR.fullmatch(each.strip()) for each in text.split(",")]
    if all(pairs):
        told = {int(each[1]): int(each[2]) for each in pairs if each is not None}
        missing = sorted(set(spans) ^ set(told))
        if missing:
            raise ConfigError(
                flag,
                f"does not name each partition once: {', '.join(map(str, missing))}",
                "write PARTITION:OFFSET for each of them",
            )
        return told
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            flag,
            f"{text!r} is neither a time nor offsets",
            "write start, end, 1200, 0:120,1:99 or 2026-03-01T12:00:00Z",
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return source.offsets_at(moment, moment_of)


class TokenBucket:
    """Lets `rate` records a second through, a quarter of a second's worth or more at once.

    Not one by one: each batch waits for the disk, as those of a live worker beside it do.
    """

    def __init__(
        self,
        rate: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate = rate
        self._clock = clock
        self._sleep = sleep
        self._tokens = 0.0
        self._filled_at = clock()

    def available(self, timeout_s: float) -> int:
        """How many may pass now: a batch's worth, or none after `timeout_s`."""
        least = max(1.0, self._rate * _BATCH_S)
        until = self._clock() + timeout_s
        while True:
            now = self._clock()
            self._tokens = min(
                max(self._rate, 1.0), self._tokens + (now - self._filled_at) * self._rate
            )
            self._filled_at = now
            if self._tokens >= least:
                return int(self._tokens)
            if now >= until:
                return 0
            wait = max((least - self._tokens) / self._rate, _SHORTEST_S)
            self._sleep(min(wait, _GLANCE_S))

    def take(self, count: int) -> None:
        """Take tokens out for what has passed."""
        self._tokens -= count


class SpanSource:
    """`ports.RecordSource` over part of a log: no group is asked, and none committed.

    What comes before `starts` is passed over, so it has to be in the windows already, where it is
    wanted. `keys` lets only these entities' records through.
    """

    def __init__(
        self,
        source: ReplayableLog,
        *,
        starts: Mapping[TopicPartition, int],
        ends: Mapping[TopicPartition, int],
        keys: frozenset[bytes] | None = None,
        bucket: TokenBucket | None = None,
    ) -> None:
        self._source = source
        self._starts = starts
        self._ends = ends
        self._keys = keys
        self._bucket = bucket
        self._listener: AssignmentListener | None = None
        self._paused: set[TopicPartition] = set()

    def describe(self) -> LogDescription:
        """See `ports.RecordSource`."""
        return self._source.describe()

    def sample(self, count: int) -> Sequence[Record]:
        """See `ports.RecordSource`."""
        return self._source.sample(count)

    def subscribe(self, listener: AssignmentListener) -> None:
        """See `ports.RecordSource`."""
        self._listener = listener
        self._source.subscribe(self)

    def assigned(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Start where the listener says, but not before the span."""
        if self._listener is None:
            return {}
        told = self._listener.assigned(partitions)
        return {tp: max(at, self._starts[tp]) for tp, at in told.items()}

    def revoked(self, partitions: Sequence[TopicPartition]) -> None:
        """Tell the listener."""
        if self._listener is not None:
            self._listener.revoked(partitions)

    def poll(self, max_records: int, timeout_s: float) -> Sequence[Record]:
        """Next records of the span."""
        if self._bucket is not None:
            max_records = min(max_records, self._bucket.available(timeout_s))
            if max_records == 0:
                return []
        records = self._source.poll(max_records, timeout_s)
        if self._bucket is not None:
            self._bucket.take(len(records))
        self._pause_ended()
        return [
            record
            for record in records
            if record.offset < self._ends[record.topic_partition]
            and (self._keys is None or record.key in self._keys)
        ]

    def committed(self, partitions: Iterable[TopicPartition]) -> Mapping[TopicPartition, int]:  # noqa: ARG002
        """Nothing: there is no group."""
        return {}

    def commit(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Nothing: the replay's own windows know."""

    def seek(self, positions: Mapping[TopicPartition, int]) -> None:
        """See `ports.RecordSource`."""
        self._source.seek({tp: max(at, self._starts[tp]) for tp, at in positions.items()})

    def keep_alive(self) -> None:
        """Nobody waits for a sign of life."""

    def lag(self) -> Mapping[TopicPartition, int]:
        """Records of the span to come, by partition."""
        return {
            tp: max(0, self._ends[tp] - at)
            for tp, at in self._source.positions().items()
            if tp in self._ends
        }

    def remaining(self) -> int | None:
        """Records of the span to come; None before anything is assigned."""
        if self._source.remaining() is None:
            return None
        return sum(self.lag().values())

    def close(self) -> None:
        """See `ports.RecordSource`."""
        self._source.close()

    def _pause_ended(self) -> None:
        ended = {
            tp
            for tp, at in self._source.positions().items()
            if tp in self._ends and at >= self._ends[tp]
        }
        if new := ended - self._paused:
            self._source.pause(sorted(new))
            self._paused |= new

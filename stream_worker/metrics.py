"""What the worker counts, for Prometheus and for the live table."""

from collections import Counter as Tally
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server

from llm4es.windows import Outcome
from stream_worker.ports import DeadLetter

__all__ = ["Metrics", "Summary"]

_RECENT = 10_000  # batches whose freshness is kept for the quantiles of the live table
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a run so far."""

    records: int
    accepted: int
    duplicates: int
    late: int
    dead_letters: dict[str, int]  # by field
    rows: int
    busy_s: float  # from poll to commit, summed over batches
    freshness_p50_s: float  # of rows, from poll to readable online
    freshness_p99_s: float


class Metrics:
    """Counters in a registry of their own: two workers in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._records = self._counter("records", "Records polled")
        self._events = self._counter("events", "Events folded, by outcome", "outcome")
        self._late = self._counter("late_dropped", "Events older than the allowed lateness")
        self._dead = self._counter("dead_letters", "Records parked, by field", "field")
        self._rows = self._counter("embeddings", "Rows published")
        self._redelivered = self._counter("redelivered", "Records that were folded already")
        self._fenced = self._counter("fenced", "Batches dropped for another worker's sake")
        self._retries = self._counter("retries", "Batches read again, a store or log being away")
        self._freshness = Histogram(
            "llm4es_poll_to_readable_seconds",
            "From poll to readable online",
            registry=self.registry,
            buckets=_BUCKETS,
        )
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT)  # (seconds, rows)
        self._tally: Tally[str] = Tally()
        self._dead_by_field: Tally[str] = Tally()
        self._busy_s = 0.0

    def serve(self, port: int) -> None:
        """Serve the registry over HTTP."""
        start_http_server(port, registry=self.registry)

    def batch(self, records: int, *, seconds: float) -> None:
        """Count a batch that is done, `seconds` after it was polled."""
        self._records.inc(records)
        self._tally["records"] += records
        self._busy_s += seconds

    def published(self, rows: int, *, seconds: float) -> None:
        """Count rows that became readable online, `seconds` after their batch was polled."""
        self._rows.inc(rows)
        self._tally["rows"] += rows
        if rows:
            self._recent.append((seconds, rows))
        for _ in range(rows):
            self._freshness.observe(seconds)

    def folded(self, outcomes: Mapping[Outcome, int], redelivered: int) -> None:
        """Count a batch's events by what folding did, and those its windows held already."""
        for outcome, count in outcomes.items():
            self._events.labels(outcome).inc(count)
            self._tally[outcome] += count
        self._late.inc(outcomes.get(Outcome.LATE, 0))
        self._redelivered.inc(redelivered)

    def dead(self, letters: Sequence[DeadLetter]) -> None:
        """Count parked records by the field at fault."""
        for letter in letters:
            self._dead.labels(letter.cause.field).inc()
            self._dead_by_field[letter.cause.field] += 1

    def fenced(self) -> None:
        """Count a batch that was dropped because another worker wrote a window."""
        self._fenced.inc()

    def retried(self) -> None:
        """Count a batch that is read again because a store or the log was away."""
        self._retries.inc()

    def summary(self) -> Summary:
        """Give the figures so far; freshness is over the newest rows."""
        p50, p99 = self._quantiles()
        return Summary(
            records=self._tally["records"],
            accepted=self._tally[Outcome.ACCEPTED],
            duplicates=self._tally[Outcome.DUPLICATE],
            late=self._tally[Outcome.LATE],
            dead_letters=dict(self._dead_by_field),
            rows=self._tally["rows"],
            busy_s=self._busy_s,
            freshness_p50_s=p50,
            freshness_p99_s=p99,
        )

    def _quantiles(self) -> tuple[float, float]:
        if not self._recent:
            return 0.0, 0.0
        seconds = np.repeat([entry[0] for entry in self._recent], [e[1] for e in self._recent])
        p50, p99 = np.quantile(seconds, (0.5, 0.99))
        return float(p50), float(p99)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"llm4es_{name}", text, labels, registry=self.registry)

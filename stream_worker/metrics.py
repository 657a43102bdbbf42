"""What the worker counts, for Prometheus and for the live table."""

import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from llm4es.events import Record, TopicPartition
from llm4es.windows import Outcome
from stream_worker.ports import DeadLetter

__all__ = ["Metrics", "Summary"]

_RECENT = 10_000  # batches whose freshness is kept for the quantiles of the live table
_COUNTERS: Mapping[str, tuple[str, str | None]] = {  # name: (what it counts, told apart by)
    "records": ("Records polled", None),
    "events": ("Events folded, by outcome", "outcome"),
    "late_dropped": ("Events older than the allowed lateness", None),
    "dead_letters": ("Records parked, by field", "field"),
    "embeddings": ("Rows published", None),
    "coalesced": ("Accepted events that share a row with a later one of their batch", None),
    "batch_tokens": ("Tokens of the chapters that were given to the model", None),
    "inference_seconds": ("Time in the model", None),
    "sink_seconds": ("Time in the offline log and the online store", None),
    "window_cache_hits": ("Windows that were still decoded", None),
    "window_cache_misses": ("Windows that came from the store", None),
    "memo_hits": ("Finished chapters whose sums were remembered", None),
    "redelivered": ("Records that were folded already", None),
    "fenced": ("Batches dropped for another worker's sake", None),
    "retries": ("Batches read again, a store or log being away", None),
    "store_lost": ("Times the window store was found to have lost its tail", None),
    "unproven_rows": ("Rows published of windows that lack the log's beginning", None),
}
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
    unproven_rows: int  # of them, those whose windows lack the log's beginning
    busy_s: float  # from poll to commit, summed over batches
    freshness_p50_s: float  # of rows, from poll to readable online
    freshness_p99_s: float


class Metrics(Collector):
    """Counts in a registry of its own, from which Prometheus reads them: two workers do not mix.

    Prometheus' own counters are not used: once Feast is imported they count in files that all
    registries of a process share.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._tally: defaultdict[tuple[str, str], float] = defaultdict(int)  # by counter and label
        self._freshness = [0] * (len(_BUCKETS) + 1)  # rows by bucket, the last without a bound
        self._freshness_sum_s = 0.0
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT)  # (seconds, rows)
        self._busy_s = 0.0
        self._polled_at: float | None = None
        self._lag: dict[TopicPartition, int] = {}
        self._age = [0] * (len(_BUCKETS) + 1)  # events by bucket of record timestamp to readable
        self._age_sum_s = 0.0
        self._ages: deque[float] = deque(maxlen=_RECENT)

    @property
    def polled_s_ago(self) -> float | None:
        """How long ago the loop last polled; None before it has."""
        return None if self._polled_at is None else time.monotonic() - self._polled_at

    def polled(self, lag: Mapping[TopicPartition, int]) -> None:
        """Note that the loop goes round, and how many records of each partition are to come."""
        self._polled_at = time.monotonic()
        self._lag = dict(lag)

    def read(self, *, tokens: int, seconds: float, coalesced: int) -> None:
        """Count what the model was given, how long it took, and events that got no row."""
        self._count("batch_tokens", tokens)
        self._count("inference_seconds", seconds)
        self._count("coalesced", coalesced)

    def sank(self, seconds: float) -> None:
        """Count time in the sink."""
        self._count("sink_seconds", seconds)

    def cached(self, *, hits: int, misses: int, memo_hits: int) -> None:
        """Take over what the caches have counted so far."""
        for name, count in (
            ("window_cache_hits", hits),
            ("window_cache_misses", misses),
            ("memo_hits", memo_hits),
        ):
            self._tally[name, ""] = count

    def readable(self, records: Iterable[Record], now: datetime) -> None:
        """Count accepted events by how long after the log got them their rows were readable."""
        for record in records:
            if record.timestamp is not None:
                seconds = (now - record.timestamp).total_seconds()
                self._age[bisect_left(_BUCKETS, seconds)] += 1
                self._age_sum_s += seconds
                self._ages.append(seconds)

    def freshness(self) -> NDArray[np.float64]:
        """Seconds from record timestamp to readable online of the newest accepted events."""
        return np.array(self._ages, dtype=np.float64)

    def batch(self, records: int, *, seconds: float) -> None:
        """Count a batch that is done, `seconds` after it was polled."""
        self._count("records", records)
        self._busy_s += seconds

    def published(self, rows: int, *, seconds: float, unproven: int = 0) -> None:
        """Count rows that became readable online, `seconds` after their batch was polled."""
        if not rows:
            return
        self._count("embeddings", rows)
        self._count("unproven_rows", unproven)
        self._recent.append((seconds, rows))
        self._freshness[bisect_left(_BUCKETS, seconds)] += rows
        self._freshness_sum_s += rows * seconds

    def folded(self, outcomes: Mapping[Outcome, int], redelivered: int) -> None:
        """Count a batch's events by what folding did, and those its windows held already."""
        for outcome, count in outcomes.items():
            self._count("events", count, outcome)
        self._count("late_dropped", outcomes.get(Outcome.LATE, 0))
        self._count("redelivered", redelivered)

    def dead(self, letters: Sequence[DeadLetter]) -> None:
        """Count parked records by the field at fault."""
        for letter in letters:
            self._count("dead_letters", 1, letter.cause.field)

    def fenced(self) -> None:
        """Count a batch that was dropped because another worker wrote a window."""
        self._count("fenced", 1)

    def store_lost(self) -> None:
        """Count a window store that holds less than it did."""
        self._count("store_lost", 1)

    def retried(self) -> None:
        """Count a batch that is read again because a store or the log was away."""
        self._count("retries", 1)

    def summary(self) -> Summary:
        """Give the figures so far; freshness is over the newest rows."""
        p50, p99 = self._quantiles()
        return Summary(
            records=int(self._tally["records", ""]),
            accepted=int(self._tally["events", Outcome.ACCEPTED]),
            duplicates=int(self._tally["events", Outcome.DUPLICATE]),
            late=int(self._tally["events", Outcome.LATE]),
            dead_letters={field: int(n) for field, n in self._labelled("dead_letters")},
            rows=int(self._tally["embeddings", ""]),
            unproven_rows=int(self._tally["unproven_rows", ""]),
            busy_s=self._busy_s,
            freshness_p50_s=p50,
            freshness_p99_s=p99,
        )

    def collect(self) -> Iterator[Metric]:
        """Give the figures as Prometheus reads them, from a thread of its own."""
        for name, (text, label) in _COUNTERS.items():
            counter = CounterMetricFamily(f"llm4es_{name}", text, labels=[label] if label else [])
            if label is None:
                counter.add_metric([], self._tally[name, ""])
            for value, count in self._labelled(name) if label else ():
                counter.add_metric([value], count)
            yield counter
        for name, text, counts, sum_s in (
            ("poll_to_readable", "From poll to readable online, by row",
             self._freshness, self._freshness_sum_s),
            ("freshness", "From record timestamp to readable online, by event",
             self._age, self._age_sum_s),
        ):  # fmt: skip
            histogram = HistogramMetricFamily(f"llm4es_{name}_seconds", text)
            bounds = [*map(str, _BUCKETS), "+Inf"]
            below = list(accumulate(counts))
            histogram.add_metric([], list(zip(bounds, below, strict=True)), sum_s)
            yield histogram
        lag = GaugeMetricFamily("llm4es_lag", "Records still to come", labels=["partition"])
        for tp, count in sorted(self._lag.copy().items()):
            lag.add_metric([str(tp.partition)], count)
        yield lag
        ago = self.polled_s_ago
        if ago is not None:
            yield GaugeMetricFamily(
                "llm4es_polled_at_seconds", "When the loop last polled, Unix time",
                value=time.time() - ago,
            )  # fmt: skip

    def _count(self, name: str, count: float, label: str = "") -> None:
        self._tally[name, label] += count

    def _labelled(self, name: str) -> list[tuple[str, float]]:
        # A copy: the loop may be counting meanwhile.
        return [
            (label, n) for (known, label), n in sorted(self._tally.copy().items()) if known == name
        ]

    def _quantiles(self) -> tuple[float, float]:
        if not self._recent:
            return 0.0, 0.0
        seconds = np.repeat([entry[0] for entry in self._recent], [e[1] for e in self._recent])
        p50, p99 = np.quantile(seconds, (0.5, 0.99))
        return float(p50), float(p99)

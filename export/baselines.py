"""Baselines: what a history says without a language model.

All take histories ordered by key and the moments asked for, and give row i for `asked[i]`, made
of the events before `asked[i].before`.
"""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from export.embed import AsOf
from llm4es.bundle import Bundle
from llm4es.events import Event, FieldValue
from llm4es.schema import EventSchema, NumberField
from llm4es.windows import cut_chapters

__all__ = ["Aggregates", "Terms", "count_terms", "event_terms", "recency_frequency"]

Histories = Mapping[str, Sequence[Event]]

_DAY = 86_400.0
_WINDOWS = (timedelta(days=30), timedelta(days=7), timedelta(days=1))
_FREQUENT = 40  # values of a field that get columns of their own
_WORD = re.compile(r"\w\w+")
_BETWEEN = " ,|\t\n"  # columns; another format's labels stay, the same for all events
_MIN_ROWS = 2  # a term of one row tells nothing of another


@dataclass(frozen=True, slots=True)
class Terms:
    """Counts (N, terms) of what the rendered text says, and the terms' names."""

    counts: csr_matrix
    names: tuple[str, ...]

    def aligned(self, names: Sequence[str]) -> NDArray[np.float32]:
        """Counts (N, names) in the order of other terms' names; 0 where a name is unknown."""
        found = np.zeros((self.counts.shape[0], len(names)), dtype=np.float32)
        place = {name: column for column, name in enumerate(self.names)}
        known = [(place[name], column) for column, name in enumerate(names) if name in place]
        if known:
            ours, theirs = zip(*known, strict=True)
            found[:, list(theirs)] = self.counts[:, list(ours)].toarray()
        return found


class Aggregates:
    """Hand-made features: sums, means, extremes, counts and shares by field and event type.

    Over the whole history, and over the last 30, 7 and 1 days where `windows`; then the newest
    event as it is, and how long ago things were. Which values are frequent is counted on
    `histories`, unlabelled. Amounts are logged: sign * ln(1 + |x|).
    """

    def __init__(self, schema: EventSchema, histories: Histories, *, windows: bool) -> None:
        self._windows: tuple[timedelta | None, ...] = (None, *(_WINDOWS if windows else ()))
        self._types = {name: index for index, name in enumerate(schema.types)}
        self._numbers: dict[tuple[str, str], int] = {}
        counted: dict[tuple[str, str], Counter[str]] = {}
        for kind, spec in schema.types.items():
            for name, field in spec.fields.items():
                if isinstance(field, NumberField):
                    self._numbers[kind, name] = len(self._numbers)
                else:
                    counted[kind, name] = Counter()
        for history in histories.values():
            for event in history:
                for name, value in event.fields.items():
                    if (counter := counted.get((event.type, name))) is not None:
                        counter.update(_values(value))
        self._values: dict[tuple[str, str, str], int] = {}
        for (kind, name), counter in counted.items():
            for value, _ in sorted(counter.most_common(_FREQUENT)):
                self._values[kind, name, value] = len(self._values)
        self.names: tuple[str, ...] = tuple(self._names())

    def matrix(self, histories: Histories, asked: Sequence[AsOf]) -> NDArray[np.float32]:
        """Build the features (N, names)."""
        found = np.zeros((len(asked), len(self.names)), dtype=np.float32)
        for entity_id, rows in _by_entity(asked).items():
            history = histories.get(entity_id, ())
            if not history:
                continue
            table = _Table(history, self._types, self._numbers, self._values)
            for row in rows:
                found[row] = self._row(table, asked[row].before)
        result: NDArray[np.float32] = np.sign(found) * np.log1p(np.abs(found))
        return result

    def _row(self, table: "_Table", before: datetime) -> NDArray[np.float64]:
        end = bisect_left(table.times, before)
        if not end:
            return np.zeros(len(self.names))
        parts: list[NDArray[np.float64]] = []
        whole: NDArray[np.float64] | None = None
        for window in self._windows:
            start = 0 if window is None else bisect_left(table.times, before - window)
            counts, shares, numbers = table.summary(start, end)
            whole = numbers if whole is None else whole
            ratio = np.divide(
                numbers[2], whole[2], out=np.zeros(len(numbers[2])), where=whole[2] != 0
            )
            parts += [counts, shares, numbers.ravel(), ratio]
        parts.append(table.newest(end, before))
        return np.concatenate(parts)

    def _names(self) -> Iterator[str]:
        numbers = [f"{kind}.{name}" for kind, name in self._numbers]
        values = [f"{kind}.{name}={value}" for kind, name, value in self._values]
        flags = [*self._types, *values]
        for window in self._windows:
            over = "" if window is None else f" in {window.days}d"
            yield from (f"count {name}{over}" for name in flags)
            yield from (f"share {name}{over}" for name in flags)
            for statistic in ("count", "sum", "mean", "std", "min", "max", "mean over all"):
                yield from (f"{statistic} {name}{over}" for name in numbers)
        yield from (f"newest {name}" for name in (*flags, *numbers))
        yield from (
            "days since newest", "days since first", "newest gap", "newest hour sin",
            "newest hour cos",
        )  # fmt: skip
        yield from (f"days since {name}" for name in self._types)


class _Table:
    """One history as columns, with running sums."""

    def __init__(
        self,
        history: Sequence[Event],
        types: Mapping[str, int],
        numbers: Mapping[tuple[str, str], int],
        values: Mapping[tuple[str, str, str], int],
    ) -> None:
        self.times = [event.occurred_at for event in history]
        self._types = len(types)
        self._flags = np.zeros((len(history), len(types) + len(values)))
        self._numbers = np.full((len(history), len(numbers)), np.nan)
        for index, event in enumerate(history):
            self._flags[index, types[event.type]] = 1
            for name, value in event.fields.items():
                if (number := numbers.get((event.type, name))) is not None:
                    if isinstance(value, int | float):
                        self._numbers[index, number] = value
                    continue
                for one in _values(value):
                    if (flag := values.get((event.type, name, one))) is not None:
                        self._flags[index, len(types) + flag] += 1
        self._present = np.isfinite(self._numbers)
        self._filled = np.where(self._present, self._numbers, 0.0)
        self._sums = [
            np.concatenate([np.zeros((1, columns.shape[1])), np.cumsum(columns, axis=0)])
            for columns in (self._flags, self._present, self._filled, self._filled**2)
        ]

    def summary(
        self, start: int, end: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Counts and shares (flags,), and six statistics (6, numbers), of events [start, end)."""
        counts, present, sums, squares = (sums[end] - sums[start] for sums in self._sums)
        shares = counts / max(end - start, 1)
        n = np.maximum(present, 1)
        mean = sums / n
        std = np.sqrt(np.maximum(squares / n - mean**2, 0))
        some = present > 0
        chosen, values = self._present[start:end], self._numbers[start:end]
        low = np.where(chosen, values, np.inf).min(axis=0, initial=np.inf)
        high = np.where(chosen, values, -np.inf).max(axis=0, initial=-np.inf)
        extremes = (np.where(some, low, 0.0), np.where(some, high, 0.0))
        return counts, shares, np.stack([present, sums, mean, std, *extremes])

    def newest(self, end: int, before: datetime) -> NDArray[np.float64]:
        """Describe the newest event as it is, and how long ago each type was, in days."""
        last = self.times[end - 1]
        ages = np.zeros(self._types)
        for kind in range(self._types):
            seen = np.flatnonzero(self._flags[:end, kind])
            since = self.times[seen[-1]] if len(seen) else self.times[0]
            ages[kind] = (before - since).total_seconds() / _DAY
        gap = (last - self.times[end - 2]).total_seconds() / _DAY if end > 1 else 0.0
        hour = 2 * np.pi * (last.hour + last.minute / 60) / 24
        clock = [
            (before - last).total_seconds() / _DAY,
            (before - self.times[0]).total_seconds() / _DAY,
            gap,
            np.sin(hour),
            np.cos(hour),
        ]
        return np.concatenate([self._flags[end - 1], self._filled[end - 1], clock, ages])


def recency_frequency(histories: Histories, asked: Sequence[AsOf]) -> NDArray[np.float32]:
    """How many events, how long ago the newest and the first, how regular: (N, 8), logged."""
    found = np.zeros((len(asked), 8), dtype=np.float32)
    for entity_id, rows in _by_entity(asked).items():
        times = [event.occurred_at for event in histories.get(entity_id, ())]
        for row in rows:
            before = asked[row].before
            end = bisect_left(times, before)
            if not end:
                continue
            newest, first = (before - times[end - 1], before - times[0])
            counts = [end - bisect_left(times, before - window, 0, end) for window in _WINDOWS]
            gap = (times[end - 1] - times[end - 2]).total_seconds() if end > 1 else 0.0
            found[row] = [
                end, *counts, newest.total_seconds() / _DAY, first.total_seconds() / _DAY,
                (first - newest).total_seconds() / _DAY / end, gap / _DAY,
            ]  # fmt: skip
    result: NDArray[np.float32] = np.log1p(found)
    return result


def count_terms(
    bundle: Bundle, histories: Histories, asked: Sequence[AsOf], *, min_rows: int = _MIN_ROWS
) -> Terms:
    """Count values and words of the rendered lines, but for their times: what TF-IDF is of.

    Without times, for on the data that we measured these did worse with them; all of the history,
    whatever the window shows.
    """
    index: dict[str, int] = {}
    data: list[int] = []
    columns: list[int] = []
    ends = [0]
    rows: list[int] = []
    for entity_id, wanted in _by_entity(asked).items():
        history = histories.get(entity_id, ())
        terms = event_terms(bundle, history)
        times = [event.occurred_at for event in history]
        counts: Counter[int] = Counter()
        seen = 0
        for row in sorted(wanted, key=lambda row: asked[row].before):
            end = bisect_left(times, asked[row].before)
            for line in terms[seen:end]:
                counts.update(index.setdefault(term, len(index)) for term in line)
            seen = max(seen, end)
            columns.extend(counts.keys())
            data.extend(counts.values())
            ends.append(len(data))
            rows.append(row)
    shape = (len(asked), max(len(index), 1))
    matrix = csr_matrix((np.array(data, dtype=np.float32), columns, ends), shape=shape)
    matrix = matrix[np.argsort(rows)]
    kept = np.flatnonzero(np.asarray((matrix > 0).sum(axis=0)).ravel() >= min_rows)
    names = list(index)
    return Terms(matrix[:, kept], tuple(names[column] for column in kept if names))


def event_terms(bundle: Bundle, history: Sequence[Event]) -> list[list[str]]:
    """Name what each event's line says: `field=value`, and `field:word` of several words."""
    if not history:
        return []
    renderer = bundle.renderer
    times = set(bundle.manifest.rendering.time)
    found = []
    for chapter in cut_chapters(history, bundle.manifest.window, bundle.tokens.measure):
        for event, line in zip(chapter.events, renderer.lines(chapter.events), strict=True):
            terms = []
            for span in line.spans:
                if span.field in times:
                    continue
                value = line.text[span.start : span.end].strip(_BETWEEN)
                if not value:
                    continue
                name = f"{event.type}.{span.field}"
                terms.append(f"{name}={value}")
                words = _WORD.findall(value.lower())
                if len(words) > 1:
                    terms.extend(f"{name}:{word}" for word in words)
            found.append(terms)
    return found


def _values(value: FieldValue) -> tuple[str, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (str(value),)


def _by_entity(asked: Sequence[AsOf]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row, one in enumerate(asked):
        found.setdefault(one.entity_id, []).append(row)
    return found

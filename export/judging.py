"""Judging: how what a bundle serves in less precision compares with what its origin serves.

Never on raw cosines: those of any two entities are 0.9997. Vectors are taken less their mean over
entities, by their standard deviation over them.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.embed import AsOf
from export.labels import Task
from export.scoring import Features, Judge, predict, weighted_auc
from llm4es.bundle import Bundle
from llm4es.engine import OnnxEmbedder
from llm4es.events import Event
from llm4es.windows import Window, cut_chapters

__all__ = ["NEIGHBOURS", "Likeness", "Rows", "auc", "compare", "furthest", "served"]

NEIGHBOURS = 5
_STEPS = (6, 3, 0)  # events before the last, after each of which a window is read on


@dataclass(frozen=True, slots=True)
class Rows:
    """What was served for N questions."""

    vectors: NDArray[np.float32]  # (N, dim)
    surprise: NDArray[np.float32]  # (N, columns), the newest event's behind; none without surprise


@dataclass(frozen=True, slots=True)
class Likeness:
    """How alike two sets of rows are: 1 is the same."""

    cosine: float
    neighbours: float
    surprise_cosine: float | None


def served(
    embedder: OnnxEmbedder, histories: Mapping[str, Sequence[Event]], asked: Sequence[AsOf]
) -> Rows:
    """Embed N entities as of their moments, reading on event by event as a worker does.

    Keys and values in the bundle's cache precision are read again and again that way. An entity
    without events has zeros. Raises NonFiniteEmbedding.
    """
    bundle = embedder.bundle
    columns = len(embedder.layout.columns)
    vectors = np.zeros((len(asked), bundle.manifest.dim), dtype=np.float32)
    surprise = np.zeros((len(asked), columns + 1 if columns else 0), dtype=np.float32)
    by_entity: dict[str, list[int]] = {}
    for row, one in enumerate(asked):
        by_entity.setdefault(one.entity_id, []).append(row)
    for entity_id, rows in by_entity.items():
        history = _fitting(bundle, histories.get(entity_id, ()))
        times = [event.occurred_at for event in history]
        wanted: dict[int, list[int]] = {}
        for row in rows:
            wanted.setdefault(bisect_left(times, asked[row].before), []).append(row)
        for count in sorted({max(0, each - step) for each in wanted for step in _STEPS} - {0}):
            found = embedder.embed([_window(bundle, entity_id, history, count)])
            for row in wanted.get(count, ()):
                vectors[row] = found.vectors[0]
                if columns:
                    surprise[row] = [*found.surprise[0], found.surprise_last[0]]
        embedder.forget([entity_id])
    return Rows(vectors, surprise)


def compare(exact: Rows, found: Rows) -> Likeness:
    """Compare N rows of different entities with what they should be."""
    one, other = _standard(exact.vectors, found.vectors)
    surprise = None
    if exact.surprise.shape[1]:
        surprise = _cosine(*_standard(exact.surprise, found.surprise))
    kept = [
        len(set(mine) & set(due))
        for mine, due in zip(_nearest(other).tolist(), _nearest(one).tolist(), strict=True)
    ]
    return Likeness(_cosine(one, other), float(np.mean(kept)) / NEIGHBOURS, surprise)


def furthest(exact: Rows, found: Rows) -> float:
    """Largest difference of any row, relative to its largest value: what a tolerance bounds."""
    worst = 0.0
    for one, other in ((exact.vectors, found.vectors), (exact.surprise, found.surprise)):
        if one.size:
            sizes = np.maximum(np.abs(one).max(axis=1), np.finfo(np.float32).tiny)
            worst = max(worst, float((np.abs(one - other).max(axis=1) / sizes).max()))
    return worst


def auc(rows: Rows, task: Task) -> float:
    """ROC-AUC of logistic regression on all that is served, mean over the task's folds."""
    features = Features("served", np.column_stack([rows.vectors, rows.surprise]))
    scores = predict(features, task, task.splits, "logistic")
    return float(Judge(task, task.splits, resamples=0).by_fold(scores, weighted_auc).mean())


def _fitting(bundle: Bundle, history: Sequence[Event]) -> list[Event]:
    """Leave out what a worker would park: lines longer than a chapter may be."""
    measure, longest = bundle.tokens.measure, bundle.manifest.window.max_chapter_tokens
    return [event for event in history if measure(event, ()) <= longest]


def _window(bundle: Bundle, entity_id: str, history: Sequence[Event], count: int) -> Window:
    chapters = cut_chapters(history[:count], bundle.manifest.window, bundle.tokens.measure)
    return Window(entity_id=entity_id, chapters=chapters)


def _standard(
    exact: NDArray[np.float32], found: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both (N, d) less their means, by their deviations; where exact has none they are left out."""
    one, other = (each.astype(np.float64) for each in (exact, found))
    spread = one.std(axis=0)
    varying = spread > 1e-6 * np.abs(one).max(axis=0, initial=0)
    one, other = one[:, varying], other[:, varying]
    floor = 1e-3 * spread[varying]  # a column that no longer varies must not become noise
    return (one - one.mean(axis=0)) / spread[varying], (other - other.mean(axis=0)) / np.maximum(
        other.std(axis=0), floor
    )


def _cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Mean cosine of rows (N, d)."""
    return float((_unit(one) * _unit(other)).sum(axis=1).mean())


def _nearest(rows: NDArray[np.float64]) -> NDArray[np.int64]:
    """Each row's nearest others (N, NEIGHBOURS), by cosine."""
    likeness = _unit(rows) @ _unit(rows).T
    np.fill_diagonal(likeness, -np.inf)
    nearest: NDArray[np.int64] = np.argpartition(-likeness, NEIGHBOURS - 1, axis=1)
    return nearest[:, :NEIGHBOURS]


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units: NDArray[np.float64] = rows / np.where(lengths > 0, lengths, 1)
    return units

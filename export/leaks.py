"""Leaks: features that know what came after the label are refused."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from export.embed import AsOf
from export.labels import Task
from llm4es.errors import ConfigError
from llm4es.events import Event

__all__ = ["refuse_early_knowledge", "refuse_unseen_events"]

Histories = Mapping[str, Sequence[Event]]
Recompute = Callable[[Histories, Sequence[AsOf]], NDArray[np.float32]]


class Rows(Protocol):
    """Feature rows: an array, or a sparse matrix made dense by row."""

    def __getitem__(self, row: int, /) -> NDArray[np.float32]:
        """Give one row (width,)."""
        ...


_SAMPLED = 64  # a leak in a tenth of the rows escapes one time in 850
_TOLERANCE = 1e-4  # relative to a row's largest entry; another batch rounds at some 1e-7
_REMEDY = "make features of events before the label's time alone"


def refuse_unseen_events(
    name: str, seen: NDArray[np.int64], task: Task, histories: Histories
) -> None:
    """Refuse rows that saw more events (N,) than precede their labels. Raises ConfigError."""
    if task.times is None:
        return
    for row, count in enumerate(seen.tolist()):
        allowed = _allowed(task, histories, row)
        if count > allowed:
            raise ConfigError(
                "labels",
                f"{name}: row {row} ({task.entity_ids[row]} as of {task.times[row]}) was made of "
                f"{count} events, and {allowed} precede its label",
                _REMEDY,
            )


def refuse_early_knowledge(
    name: str,
    found: Rows,
    recompute: Recompute,
    task: Task,
    histories: Histories,
    *,
    asked: Sequence[AsOf],
    seed: int = 0,
) -> None:
    """Recompute a sample of rows from histories that end before their labels: nothing may change.

    `found` (N, width) is what is judged. Raises ConfigError.
    """
    if task.times is None:
        return
    rows = _sampled(task, histories, seed)
    if not rows:
        return
    ended = {
        task.entity_ids[row]: tuple(
            histories[task.entity_ids[row]][: _allowed(task, histories, row)]
        )
        for row in rows
    }
    again = recompute(ended, [asked[row] for row in rows])
    for row, expected in zip(rows, again, strict=True):
        size = max(float(np.abs(expected).max(initial=0.0)), 1.0)
        if float(np.abs(found[row] - expected).max(initial=0.0)) > _TOLERANCE * size:
            raise ConfigError(
                "labels",
                f"{name}: row {row} ({task.entity_ids[row]} as of {task.times[row]}) is another "
                "when the events after its label are taken away",
                _REMEDY,
            )


def _sampled(task: Task, histories: Histories, seed: int) -> list[int]:
    """Choose rows whose entity has later events too, at most one per entity."""
    chosen: dict[str, int] = {}
    for row in np.random.default_rng(seed).permutation(len(task.labels)).tolist():
        entity_id = task.entity_ids[row]
        later = len(histories.get(entity_id, ())) - _allowed(task, histories, row)
        if later and entity_id not in chosen:
            chosen[entity_id] = row
        if len(chosen) == _SAMPLED:
            break
    return sorted(chosen.values())


def _allowed(task: Task, histories: Histories, row: int) -> int:
    """Count the events that a row may know."""
    history = histories.get(task.entity_ids[row], ())
    if task.times is None:
        return len(history)
    find = bisect_right if task.inclusive else bisect_left
    return find(history, task.times[row], key=_occurred_at)


def _occurred_at(event: Event) -> datetime:
    return event.occurred_at

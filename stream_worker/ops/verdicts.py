"""What an audit says of one entity: its window and rows beside what the log makes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llm4es.features import FeatureRow
from llm4es.windows import Chapter, Window
from stream_worker.ops.recomputing import History

__all__ = ["Finding", "Seen", "judge", "row_difference"]

Place = Literal["window", "online", "offline"]
Kind = Literal["missing", "orphan", "stale", "value", "bundle", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as the log says; `difference` is relative, of values alone."""

    place: Place
    kind: Kind
    detail: str = ""
    difference: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What stands of an entity, and what the log says it should be."""

    history: History
    held: int  # next offset of its partition that the stores stood for before the log was read
    window: Window | None
    due_window: Window | None  # the log's, settled; None where the entity has none
    online: FeatureRow | None
    offline: Sequence[FeatureRow]  # oldest first
    rows: Mapping[int, FeatureRow]  # the log's, by index of the state


def judge(seen: Seen, bundle_id: str, tolerance: float) -> list[Finding] | None:
    """Give what is wrong; None where the entity moves on just now, and is to be looked at again."""
    if _moves(seen):
        return None
    return [
        *_judge_window(seen),
        *_judge_online(seen, bundle_id, tolerance),
        *_judge_offline(seen, bundle_id, tolerance),
    ]


def row_difference(found: FeatureRow, due: FeatureRow) -> float:
    """Largest difference of vectors and surprise, relative to the largest value that is due."""
    return max(
        _relative(found.embedding, due.embedding),
        _relative(found.surprise, due.surprise),
        _relative(np.array([found.surprise_last]), np.array([due.surprise_last])),
    )


def _moves(seen: Seen) -> bool:
    now, window = seen.history.now, seen.window
    return window is not None and now is not None and window.next_offset > now.next_offset


def _due(seen: Seen) -> int | None:
    """Index of the newest state that stores must have."""
    known = [index for index, end in enumerate(seen.history.ends) if end <= seen.held]
    return known[-1] if known else None


def _judge_window(seen: Seen) -> list[Finding]:
    due, found = seen.due_window, seen.window
    if due is None:
        gone = found is None or found.deleted
        return [] if gone else [Finding("window", "orphan", "the log has no record of it")]
    if found is None:
        return [Finding("window", "missing")] if due.next_offset <= seen.held else []
    if found.next_offset < due.next_offset:
        behind = f"at offset {found.next_offset} of {due.next_offset}"
        return [Finding("window", "stale", behind)] if due.next_offset <= seen.held else []
    problem = _window_problem(found, due)
    return [] if problem is None else [Finding("window", "value", problem)]


def _window_problem(found: Window, due: Window) -> str | None:
    if found.as_of != due.as_of:
        return f"as_of {found.as_of} instead of {due.as_of}"
    told = _events(found), _events(due)
    if told[0] != told[1]:
        return f"{told[0]} events instead of {told[1]}"
    if len(found.chapters) != len(due.chapters):
        return f"{len(found.chapters)} chapters instead of {len(due.chapters)}"
    for index, (one, other) in enumerate(zip(found.chapters, due.chapters, strict=True)):
        if not _same(one, other):
            return f"chapter {index} differs"
    return None


def _events(window: Window) -> int:
    sealed = 0 if window.sealed is None else window.sealed.count
    return sealed + sum(chapter.count for chapter in window.chapters)


def _same(one: Chapter, other: Chapter) -> bool:
    bounds = (one.first, one.last, one.count, one.tokens)
    if bounds != (other.first, other.last, other.count, other.tokens):
        return False
    return not (one.events and other.events) or list(one.events) == list(other.events)


def _judge_online(seen: Seen, bundle_id: str, tolerance: float) -> list[Finding]:
    row, history, due = seen.online, seen.history, _due(seen)
    if not history.states:
        return [] if row is None else [Finding("online", "orphan", f"as of {row.as_of}")]
    if row is None:
        return [] if due is None else [Finding("online", "missing")]
    found = _judge_row("online", row, seen, bundle_id, tolerance)
    if due is not None and row.as_of < history.states[due].as_of:  # type: ignore[operator]
        found.append(Finding("online", "stale", f"as of {row.as_of}"))
    return found


def _judge_offline(seen: Seen, bundle_id: str, tolerance: float) -> list[Finding]:
    history, due = seen.history, _due(seen)
    found: list[Finding] = []
    if not history.states:
        return [Finding("offline", "orphan", f"{len(seen.offline)} rows")] if seen.offline else []
    if due is not None and all(row.as_of != history.states[due].as_of for row in seen.offline):
        found.append(Finding("offline", "missing", f"as of {history.states[due].as_of}"))
    for row in seen.offline:
        found += _judge_row("offline", row, seen, bundle_id, tolerance)
    return found


def _judge_row(
    place: Place, row: FeatureRow, seen: Seen, bundle_id: str, tolerance: float
) -> list[Finding]:
    if row.bundle_id != bundle_id:
        return [Finding(place, "bundle", f"of bundle {row.bundle_id}")]
    index = next(
        (i for i, state in enumerate(seen.history.states) if state.as_of == row.as_of), None
    )
    if index is None:
        return [Finding(place, "unknown", f"the log gives no row as of {row.as_of}")]
    due = seen.rows.get(index)
    if due is None:  # not recomputed: one of many older rows
        return []
    difference = row_difference(row, due)
    exact = (row.event_count, row.last_event_id) == (due.event_count, due.last_event_id)
    if exact and difference <= tolerance:
        return []
    return [Finding(place, "value", f"as of {row.as_of}", difference)]


def _relative(found: NDArray[np.float32], due: NDArray[np.float32]) -> float:
    if found.shape != due.shape:
        return float("inf")
    if not found.size:
        return 0.0
    return float(np.abs(found - due).max() / max(float(np.abs(due).max()), 1.0))

"""Before: what the earlier events of a chapter say to the next one's line."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from statistics import median
from typing import NamedTuple

from llm4es.events import Event

__all__ = ["Before", "Spells", "middle", "past_median", "positive"]


class Before(NamedTuple):
    """What the chapter's earlier events say to a line."""

    previous: datetime | None
    medians: Mapping[str, float | None]  # by field: of the earlier values of the type
    spells: Mapping[str, datetime]  # by type: when its newest spell began, with this very event


class Spells:
    """When the newest spell of each type began."""

    def __init__(self, pauses: Mapping[str, timedelta]) -> None:
        self.begun: dict[str, datetime] = {}
        self._pauses = pauses
        self._last: dict[str, datetime] = {}

    def see(self, event: Event) -> None:
        """Go on to the chapter's next event."""
        pause = self._pauses.get(event.type)
        if pause is not None:
            last = self._last.get(event.type)
            if last is None or event.occurred_at - last > pause:
                self.begun[event.type] = event.occurred_at
            self._last[event.type] = event.occurred_at


def positive(event: Event, name: str) -> float | None:
    """A number field's value where it is above 0: what ratios are taken of."""
    value = event.fields.get(name)
    return value if isinstance(value, int | float) and value > 0 else None


def past_median(earlier: Sequence[Event], event_type: str, name: str) -> float | None:
    """Median of a field's values above 0 in the type's earlier events."""
    values = [
        value
        for known in earlier
        if known.type == event_type and (value := positive(known, name)) is not None
    ]
    return median(values) if values else None


def middle(ordered: Sequence[float]) -> float | None:
    """Median of values in order."""
    if not ordered:
        return None
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2

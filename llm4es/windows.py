"""Windows: what the embedding sees of an entity, as a pure function of its log.

A history is cut into chapters by content, as rsync and restic cut files: an event whose id
hashes to 0 modulo `chapter_events` is an anchor and opens a chapter; so does one more than
`max_age` after the one before it, and one that would take its chapter over
`max_chapter_tokens`. So an event that arrives late changes the chapters from the one that
covers its place to the next anchor, and no other.

Nothing here reads a clock, opens a store or knows a tokenizer: cutting takes a `measure`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from hashlib import blake2b
from typing import Protocol, Self

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from pydantic import Field, model_validator

from llm4es.errors import InvalidEvent, LLM4ESError
from llm4es.events import EPOCH, LATEST_TIME, Event, EventKey, entity_hash
from llm4es.schema import FrozenModel

__all__ = [
    "Chapter",
    "FinishedChapter",
    "Folded",
    "Measure",
    "Outcome",
    "SealedHistory",
    "Window",
    "WindowPolicy",
    "add_sums",
    "bury",
    "cut_chapters",
    "fold",
    "is_anchor",
    "next_as_of",
    "settle",
    "visible_chapters",
]

_MICROSECOND = timedelta(microseconds=1)
_DISTANT_PAST = datetime(1, 1, 2, tzinfo=UTC)


class Measure(Protocol):
    """Count the tokens of an event's line, given the events before it in its chapter."""

    def __call__(self, event: Event, earlier: Sequence[Event]) -> int:
        """Tokens of the line, its terminator included; the header is not counted."""
        ...


class WindowPolicy(FrozenModel):
    """How a history is cut, and how much of it is seen. Durations are seconds or ISO 8601."""

    chapter_events: int = Field(default=64, ge=1)
    max_chapter_tokens: int = Field(default=1024, ge=8)
    max_chapters: int | None = Field(default=None, ge=1)
    max_age: timedelta | None = Field(default=None, gt=timedelta(0))
    allowed_lateness: timedelta = Field(default=timedelta(days=1), ge=timedelta(0))
    max_clock_skew: timedelta = Field(default=timedelta(minutes=5), ge=timedelta(0))

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.max_chapters is not None and self.max_age is not None:
            msg = "max_chapters and max_age exclude each other: name one of them or neither"
            raise ValueError(msg)
        if self.max_clock_skew > self.allowed_lateness:
            msg = "max_clock_skew must not exceed allowed_lateness: else one fast clock, within"
            msg += " the skew, makes all honest events of an entity late"
            raise ValueError(msg)
        return self


class Chapter(msgspec.Struct, frozen=True, kw_only=True):
    """A run of events that the model reads in one context, behind the header.

    `events` is empty once a sealed chapter's events are forgotten. `ids_hash` and `sums`
    (float64, see `features.SumsLayout`) are there once the engine has read a finished chapter.
    """

    events: tuple[Event, ...]
    first: EventKey
    last: EventKey
    count: int
    tokens: int  # of its lines; the header is not counted
    ids_hash: bytes | None = None
    sums: NDArray[np.float64] | None = None


class SealedHistory(msgspec.Struct, frozen=True, kw_only=True):
    """Sealed chapters of an unlimited history, folded into one, oldest first."""

    chapters: int
    count: int
    sums: NDArray[np.float64]


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """One entity's history as one bundle sees it, and how far the log has been folded."""

    entity_id: str
    version: int = 0  # of the stored record: what compare-and-set compares
    topic: str | None = None  # physical coordinates: the only partition it may be fed from
    partition: int | None = None
    next_offset: int = 0
    as_of: datetime | None = None
    sealed: SealedHistory | None = None
    chapters: tuple[Chapter, ...] = ()  # oldest first; the last is open

    @property
    def newest(self) -> datetime | None:
        """Event time of the newest event."""
        return self.chapters[-1].last[0] if self.chapters else None

    @property
    def deleted(self) -> bool:
        """Whether a tombstone left it, and no event has come since."""
        return self.as_of is not None and not self.chapters and self.sealed is None

    @property
    def last_event(self) -> Event | None:
        """The newest event; the open chapter's events are never forgotten."""
        return self.chapters[-1].events[-1] if self.chapters else None


class Outcome(StrEnum):
    """What folding an event did."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    LATE = "late"
    DELETED = "deleted"  # a tombstone, not an event: the history is gone


class Folded(msgspec.Struct, frozen=True, kw_only=True):
    """A window after an event, and what became of the event."""

    window: Window
    outcome: Outcome


class FinishedChapter(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine found for a chapter that is no longer open."""

    ids_hash: bytes
    sums: NDArray[np.float64]


def is_anchor(event_id: str, chapter_events: int) -> bool:
    """Tell by its id alone whether an event opens a chapter (BLAKE2b-64, big-endian, modulo)."""
    digest = blake2b(event_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % chapter_events == 0


def next_as_of(
    recorded_at: datetime, occurred_at: datetime | None, previous: datetime | None
) -> datetime:
    """When the platform knew of an event: after it, not before the log, and rising.

    A tombstone has no `occurred_at`.
    """
    floor = previous + _MICROSECOND if previous is not None else _DISTANT_PAST
    after = occurred_at + _MICROSECOND if occurred_at is not None else _DISTANT_PAST
    return max(recorded_at, after, floor)


def cut_chapters(
    events: Sequence[Event], policy: WindowPolicy, measure: Measure
) -> tuple[Chapter, ...]:
    """Cut a whole history, ordered by key and without duplicates, into chapters."""
    return _Cutter(policy, measure).cut(events, until=())


def fold(
    window: Window,
    event: Event,
    *,
    recorded_at: datetime,
    policy: WindowPolicy,
    measure: Measure,
    surely_fits: Callable[[Event, int], bool] = lambda _event, _limit: False,
) -> Folded:
    """Put an event into its place.

    `recorded_at` is the record's timestamp. `surely_fits` may tell, for less than measuring
    costs, that an event's line has no more tokens than a limit. Coordinates and version are
    the caller's to advance. Raises InvalidEvent for an event too far in the future of its
    record, for one whose line alone is longer than a chapter may be, and for one whose `as_of`
    no store could keep.
    """
    if recorded_at >= LATEST_TIME:
        raise _outside(recorded_at)
    ahead = event.occurred_at - recorded_at
    if ahead > policy.max_clock_skew:
        raise InvalidEvent(
            "event_time", f"{ahead} after its record, more than max_clock_skew allows"
        )
    limit = policy.max_chapter_tokens
    if not surely_fits(event, limit) and measure(event, ()) > limit:
        raise InvalidEvent(
            "value", f"its line is longer than a chapter may be ({policy.max_chapter_tokens})"
        )
    newest = window.newest
    if newest is not None and newest - event.occurred_at > policy.allowed_lateness:
        return Folded(window=window, outcome=Outcome.LATE)
    chapters = _insert(window.chapters, event, _Cutter(policy, measure))
    if chapters is None:
        return Folded(window=window, outcome=Outcome.DUPLICATE)
    as_of = next_as_of(recorded_at, event.occurred_at, window.as_of)
    if not EPOCH <= as_of < LATEST_TIME:
        raise _outside(as_of)
    accepted = replace(window, as_of=as_of, chapters=chapters)
    return Folded(window=accepted, outcome=Outcome.ACCEPTED)


def bury(window: Window, *, recorded_at: datetime) -> Window:
    """Delete a history: what stays is what keeps it from coming back.

    That is its version, coordinates and `as_of`, which rises as for an event. Later events make
    a new history. Raises InvalidEvent for an `as_of` that no store could keep.
    """
    as_of = next_as_of(recorded_at, None, window.as_of)
    if not EPOCH <= as_of < LATEST_TIME:
        raise _outside(as_of)
    return replace(window, as_of=as_of, sealed=None, chapters=())


def visible_chapters(window: Window, policy: WindowPolicy) -> range:
    """Indices of the chapters that the embedding sees, beside `window.sealed`."""
    total = len(window.chapters)
    if policy.max_chapters is not None:
        return range(max(0, total - policy.max_chapters), total)
    newest = window.newest
    if policy.max_age is not None and newest is not None:
        hidden = sum(1 for c in window.chapters if newest - c.last[0] > policy.max_age)
        return range(hidden, total)
    return range(total)


def settle(
    window: Window,
    finished: Mapping[int, FinishedChapter],
    *,
    policy: WindowPolicy,
    half_lives: NDArray[np.float64],
) -> Window:
    """Store the sums of finished chapters, and forget what no future event can change.

    `finished` is by index into `window.chapters`. A chapter is sealed when its successor's
    opener is late: its events go, once its sums are there. Under `max_chapters` the newest
    that many sealed chapters stay, under `max_age` those that are seen; an unlimited history
    folds them into one.
    """
    chapters = [
        replace(chapter, ids_hash=done.ids_hash, sums=done.sums)
        if (done := finished.get(index)) is not None and index < len(window.chapters) - 1
        else chapter
        for index, chapter in enumerate(window.chapters)
    ]
    newest = window.newest
    if newest is None:
        return window
    sealed = sum(1 for opener in chapters[1:] if newest - opener.first[0] > policy.allowed_lateness)
    for index in range(sealed):
        if chapters[index].sums is not None:
            chapters[index] = replace(chapters[index], events=())
    if policy.max_chapters is not None:
        # At least that many sealed chapters are newer: it can never be seen again.
        return replace(window, chapters=tuple(chapters[max(0, sealed - policy.max_chapters) :]))
    if policy.max_age is not None:
        hidden = sum(1 for c in chapters[:sealed] if newest - c.last[0] > policy.max_age)
        return replace(window, chapters=tuple(chapters[hidden:]))
    folded = _stored(chapters[:sealed])
    return replace(
        window,
        sealed=_fold_sealed(window.sealed, chapters[:folded], half_lives),
        chapters=tuple(chapters[folded:]),
    )


def add_sums(
    older: NDArray[np.float64],
    newer: NDArray[np.float64],
    *,
    newer_events: int,
    half_lives: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Decay sums (n,) by the events that came after them, and add those events' sums (n,)."""
    return older * np.exp2(-newer_events / half_lives) + newer


def _stored(sealed: Sequence[Chapter]) -> int:
    """How many chapters, from the oldest on without a gap, have their sums."""
    for index, chapter in enumerate(sealed):
        if chapter.sums is None:
            return index
    return len(sealed)


def _fold_sealed(
    history: SealedHistory | None, chapters: Sequence[Chapter], half_lives: NDArray[np.float64]
) -> SealedHistory | None:
    for chapter in chapters:
        if chapter.sums is None:
            continue
        history = (
            SealedHistory(chapters=1, count=chapter.count, sums=chapter.sums)
            if history is None
            else SealedHistory(
                chapters=history.chapters + 1,
                count=history.count + chapter.count,
                sums=add_sums(
                    history.sums, chapter.sums, newer_events=chapter.count, half_lives=half_lives
                ),
            )
        )
    return history


def _insert(
    chapters: tuple[Chapter, ...], event: Event, cutter: "_Cutter"
) -> tuple[Chapter, ...] | None:
    """Chapters with the event in its place; None where its identity is there already."""
    if not chapters:
        return cutter.cut((event,), until=())
    if event.key > chapters[-1].last:
        return chapters[:-1] + cutter.append(chapters[-1], event)
    covering = max(
        (index for index, chapter in enumerate(chapters) if chapter.first <= event.key), default=0
    )
    head, tail = chapters[:covering], chapters[covering:]
    if any(known.key == event.key for known in tail[0].events):
        return None
    if not tail[0].events:
        # A sealed chapter's successor opens before any event that is not late.
        entity = entity_hash(event.entity_id)
        msg = f"an event falls into a chapter of entity {entity} (BLAKE2b-64) that is forgotten"
        raise LLM4ESError(msg)
    events = sorted([event, *(known for chapter in tail for known in chapter.events)], key=_key)
    later = tuple(chapter for chapter in tail if chapter.first > event.key)
    return head + cutter.cut(events, until=later)


def _outside(moment: datetime) -> InvalidEvent:
    return InvalidEvent(
        "timestamp",
        f"as_of would be in year {moment.year}, not in {EPOCH.year} to {LATEST_TIME.year - 1}",
    )


def _key(event: Event) -> EventKey:
    return event.key


@dataclass(frozen=True, slots=True)
class _Cutter:
    policy: WindowPolicy
    measure: Measure

    def cut(self, events: Sequence[Event], *, until: tuple[Chapter, ...]) -> tuple[Chapter, ...]:
        """Cut from an opener on; take over `until`'s chapters from the first shared opener on."""
        known = {chapter.first: index for index, chapter in enumerate(until)}
        done: list[Chapter] = []
        run: list[Event] = []
        tokens = 0
        for event in events:
            cost = self._cost(run, tokens, event)
            if cost is not None:
                run.append(event)
                tokens += cost
                continue
            if run:
                done.append(_chapter(run, tokens))
            if event.key in known:
                return (*done, *until[known[event.key] :])
            run, tokens = [event], self.measure(event, ())
        return (*done, _chapter(run, tokens))

    def append(self, chapter: Chapter, event: Event) -> tuple[Chapter, ...]:
        """Add the newest event: to the open chapter, or behind it as an opener."""
        cost = self._cost(chapter.events, chapter.tokens, event)
        if cost is None:
            return (chapter, _chapter([event], self.measure(event, ())))
        return (_chapter((*chapter.events, event), chapter.tokens + cost),)

    def _cost(self, run: Sequence[Event], tokens: int, event: Event) -> int | None:
        """Tokens that the event adds to the run before it; None where it opens a chapter."""
        if not run or is_anchor(event.event_id, self.policy.chapter_events):
            return None
        gap = event.occurred_at - run[-1].occurred_at
        if self.policy.max_age is not None and gap > self.policy.max_age:
            return None
        cost = self.measure(event, run)
        return cost if tokens + cost <= self.policy.max_chapter_tokens else None


def _chapter(events: Sequence[Event], tokens: int) -> Chapter:
    return Chapter(
        events=tuple(events),
        first=events[0].key,
        last=events[-1].key,
        count=len(events),
        tokens=tokens,
    )

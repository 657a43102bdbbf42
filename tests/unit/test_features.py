"""Sums of chapters are the direct definition, whatever the cut; settling forgets no truth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import accumulate, count, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from llm4es.bundle import Bundle, Pooling, SurpriseSpec
from llm4es.engine import reference
from llm4es.events import Event, EventKey
from llm4es.features import (
    HEADER_STATES,
    HEADER_TOKENS,
    SumsLayout,
    feature_row,
    service_name,
    token_weights,
    view_name,
)
from llm4es.surprise import EventSurprise
from llm4es.testing import modelless_bundle
from llm4es.windows import (
    Chapter,
    FinishedChapter,
    Window,
    WindowPolicy,
    fold,
    is_anchor,
    settle,
    visible_chapters,
)
from tests.histories import START, event, schema

HIDDEN = 3
SCALES = (math.inf, 16.0, 4.0, 0.5)
LATENESS = timedelta(seconds=60)
UNLIMITED = WindowPolicy(
    chapter_events=4, max_chapter_tokens=4096, allowed_lateness=LATENESS,
    max_clock_skew=timedelta(0),
)  # fmt: skip
POLICIES = (
    UNLIMITED,
    UNLIMITED.model_copy(update={"max_chapters": 1}),
    UNLIMITED.model_copy(update={"max_chapters": 3}),
    UNLIMITED.model_copy(update={"max_age": timedelta(seconds=20)}),
    UNLIMITED.model_copy(update={"max_age": timedelta(seconds=300)}),
)


def make_bundle(
    scales: tuple[float, ...] = SCALES, *, surprise: bool = True, policy: WindowPolicy = UNLIMITED
) -> Bundle:
    bundle = modelless_bundle(schema(), entity="customer", window=policy)
    manifest = bundle.manifest.model_copy(
        update={
            "hidden_size": HIDDEN,
            "pooling": Pooling(layers=(0,), scales=scales),
            "dim": HIDDEN * len(scales),
            "surprise": SurpriseSpec() if surprise else None,
        }
    )
    return replace(bundle, manifest=manifest)


@dataclass(frozen=True, slots=True)
class History:
    """What a model might say of E events of T tokens, and where they are cut into chapters."""

    states: NDArray[np.float64]  # (T, HIDDEN)
    token_events: NDArray[np.int64]  # (T,)
    surprise: EventSurprise  # of E events
    openers: tuple[int, ...]  # events that open a chapter; the first is 0

    @property
    def events(self) -> int:
        return len(self.surprise.present)

    def chapters(self) -> list[tuple[int, int]]:
        return list(pairwise((*self.openers, self.events)))


def make_history(
    layout: SumsLayout, tokens: Sequence[int], openers: Sequence[int], seed: int
) -> History:
    rng = np.random.default_rng(seed)
    shape = (len(tokens), len(layout.tracks.names))
    present = rng.random(shape) < 0.5
    present[:, 0] = True  # every event has a surprise in all
    nats, deviation, excess = (np.where(present, rng.normal(size=shape), 0.0) for _ in range(3))
    return History(
        states=rng.normal(size=(sum(tokens), HIDDEN)),
        token_events=np.repeat(np.arange(len(tokens)), tokens),
        surprise=EventSurprise(nats, deviation, excess, present),
        openers=(0, *sorted(set(openers) - {0})),
    )


@st.composite
def histories(draw: st.DrawFn, scales: tuple[float, ...] = SCALES) -> History:
    tokens = draw(st.lists(st.integers(1, 4), min_size=1, max_size=40))
    openers = draw(st.lists(st.integers(0, len(tokens) - 1), max_size=8))
    layout = SumsLayout(make_bundle(scales))
    return make_history(layout, tokens, openers, draw(st.integers(0, 2**16)))


def sums_of(layout: SumsLayout, history: History, start: int, end: int) -> NDArray[np.float64]:
    """Sums of the events [start, end) as a chapter of their own, relative to its last."""
    seen = history.surprise
    sums = np.zeros(layout.size)
    for index in range(start, end):
        states = history.states[history.token_events == index]
        pooled = states[-1:] if layout.ends_only else states
        own = slice(index, index + 1)
        surprise = EventSurprise(
            seen.nats[own], seen.deviation[own], seen.excess[own], seen.present[own]
        )
        sums = layout.add_event(
            sums, pooled.sum(axis=0), len(pooled), surprise if layout.columns else None
        )
    return sums


def window_of(history: History) -> Window:
    chapters = []
    for start, end in history.chapters():
        first, last = event(start).key, event(end - 1).key
        chapters.append(
            Chapter(events=(), first=first, last=last, count=end - start, tokens=end - start)
        )
    return Window(entity_id="c1", chapters=tuple(chapters))


def served(layout: SumsLayout, history: History) -> tuple[NDArray[np.float32], dict[str, float]]:
    """Vector and surprise by column, through the sums of the chapters."""
    window = window_of(history)
    sums = [sums_of(layout, history, start, end) for start, end in history.chapters()]
    vector, surprise = layout.finish(layout.total(window, sums, range(len(sums))))
    return vector, dict(zip(layout.columns, surprise.tolist(), strict=True))


def directly(layout: SumsLayout, history: History) -> dict[str, float]:
    """Surprise by column, each event weighed by its own distance from the newest."""
    after = np.arange(history.events)[::-1]
    expected = {}
    for track, name in enumerate(layout.tracks.names):
        has = history.surprise.present[:, track]
        for suffix, values in (
            ("", history.surprise.deviation),
            ("_excess", history.surprise.excess),
        ):
            for scale in layout.scales:
                weights = 0.5 ** (after / scale) * has
                total = weights.sum()
                mean = float(weights @ values[:, track] / total) if total else 0.0
                expected[f"{name}{suffix}_h{scale:g}"] = mean
    return expected


@given(histories())
@settings(max_examples=200)
def test_pooling_by_sums_of_chapters_is_the_direct_definition_wherever_it_is_cut(
    history: History,
) -> None:
    layout = SumsLayout(make_bundle())
    vector, surprise = served(layout, history)
    after = history.events - 1 - history.token_events
    np.testing.assert_allclose(
        vector, reference.embedding(history.states, after, SCALES), rtol=1e-5, atol=1e-6
    )
    expected = directly(layout, history)
    assert surprise.keys() == expected.keys()
    for name, value in expected.items():
        assert surprise[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@given(histories(scales=(math.inf,)))
def test_at_infinity_the_vector_is_the_plain_mean_of_the_tokens(history: History) -> None:
    layout = SumsLayout(make_bundle((math.inf,), surprise=False))
    vector, surprise = served(layout, replace(history, openers=(0,)))
    np.testing.assert_allclose(vector, history.states.mean(axis=0), rtol=1e-5, atol=1e-6)
    assert surprise == {}


@given(histories(), st.data())
def test_one_reading_gives_the_sums_after_each_of_its_events(
    history: History, data: st.DataObject
) -> None:
    layout = SumsLayout(make_bundle())
    prefixes = data.draw(st.lists(st.integers(1, history.events), min_size=1, max_size=6))
    weights = token_weights(layout, history.token_events, prefixes)
    assert weights.shape == (len(prefixes), len(SCALES), len(history.token_events))
    for index, events in enumerate(prefixes):
        inside = history.token_events < events
        assert not weights[index][:, ~inside].any()
        alone = token_weights(layout, history.token_events[inside], [events])[0]
        np.testing.assert_array_equal(weights[index][:, inside], alone)
        assert (weights[index][:, history.token_events == events - 1] == 1).all()


def pooled_by(**choice: object) -> SumsLayout:
    bundle = make_bundle((math.inf, 4.0), surprise=False)
    pooling = Pooling.model_validate(bundle.manifest.pooling.model_dump() | choice)
    arrays = {HEADER_STATES: np.array([3.0, 0.0, -6.0]), HEADER_TOKENS: np.array([2.0])}
    manifest = bundle.manifest.model_copy(update={"pooling": pooling})
    return SumsLayout(replace(bundle, manifest=manifest, arrays=arrays))


def test_the_header_counts_once_and_in_the_plain_mean_alone() -> None:
    layout, bare = pooled_by(pool_header=True), pooled_by()
    history = make_history(layout, (2, 1, 3), (2,), seed=1)
    vector = served(layout, history)[0].reshape(2, HIDDEN)
    plain = np.concatenate([history.states, [[1.5, 0, -3.0]] * 2]).mean(axis=0)
    np.testing.assert_allclose(vector[0], plain, rtol=1e-6)
    np.testing.assert_array_equal(vector[1], served(bare, history)[0][HIDDEN:])


def test_the_header_needs_the_plain_mean() -> None:
    with pytest.raises(ValidationError, match="name it among the scales"):
        Pooling(layers=(0,), scales=(4.0,), pool_header=True)


def test_of_ends_each_events_last_token_is_pooled() -> None:
    layout = pooled_by(tokens="ends")
    history = make_history(layout, (2, 1, 3), (2,), seed=2)
    vector = served(layout, history)[0].reshape(2, HIDDEN)
    np.testing.assert_allclose(vector[0], history.states[[1, 2, 5]].mean(axis=0), rtol=1e-6)


def test_the_columns_of_the_served_surprise_are_named_in_their_order() -> None:
    layout = SumsLayout(make_bundle((math.inf, 16.0)))
    assert layout.columns[:4] == ("all_hinf", "all_h16", "all_excess_hinf", "all_excess_h16")
    assert "payment_amount_excess_h16" in layout.columns
    assert "login_device_hinf" in layout.columns
    assert len(layout.columns) == len(layout.tracks.names) * 4
    assert layout.size == len(layout.half_lives)


def test_a_projection_is_applied_to_the_pooled_vector() -> None:
    bundle = make_bundle((math.inf,), surprise=False)
    mean, matrix = np.array([1.0, 2.0, 3.0]), np.array([[1.0, 0.0], [0.0, 2.0], [1.0, -1.0]])
    projected = replace(
        bundle,
        manifest=bundle.manifest.model_copy(update={"projected": True, "dim": 2}),
        arrays={"projection.mean": mean, "projection.matrix": matrix},
    )
    sums = np.array([2.0, 4.0, 8.0, 2.0])  # of two tokens, and their weight
    vector, _ = SumsLayout(projected).finish(sums)
    assert vector.tolist() == [1.0, -1.0]


def test_a_row_says_what_is_known_of_the_window() -> None:
    bundle = make_bundle((math.inf,), policy=POLICIES[2])
    window, _ = history_of([0, 1, 1, 1, 1], anchors=[1, 2, 3, 4])
    vector, surprise = np.ones(3, dtype=np.float32), np.zeros(2, dtype=np.float32)
    row = feature_row(bundle, window, vector, surprise, -0.5)
    last = window.chapters[-1].events[-1]
    assert row.entity_id == "c1"
    assert row.as_of == window.as_of
    assert row.as_of == START + timedelta(seconds=4, microseconds=1)
    assert row.event_count == 3  # of five chapters of one event, three are seen
    assert (row.last_event_id, row.last_event_time) == (last.event_id, last.occurred_at)
    assert row.surprise_last == -0.5
    assert row.bundle_id == bundle.id
    assert row.embedding is vector
    with pytest.raises(ValueError, match="no row"):
        feature_row(bundle, Window(entity_id="c1"), vector, surprise, 0.0)


def test_a_view_is_named_by_its_bundle_and_a_service_is_not() -> None:
    assert view_name("customer", "0123456789ab") == "customer_llm4es_0123456789ab"
    assert service_name("customer") == "customer_llm4es"


def one_token(event: Event, earlier: Sequence[Event]) -> int:  # noqa: ARG001 - a Measure
    return 1


def named(wanted: int, *, anchor: bool) -> str:
    """An id that opens a chapter or does not, another one for each number."""
    return next(
        name
        for attempt in count()
        if is_anchor(name := f"e{wanted}.{attempt}", UNLIMITED.chapter_events) is anchor
    )


def history_of(
    gaps: Sequence[float], anchors: Sequence[int], policy: WindowPolicy = UNLIMITED
) -> tuple[Window, list[Event]]:
    """Fold payments so many seconds apart; those at `anchors` open chapters."""
    window, events = Window(entity_id="c1"), []
    for index, second in enumerate(accumulate(gaps)):
        arrived = event(second, event_id=named(index, anchor=index in anchors))
        window = fold(
            window, arrived, recorded_at=arrived.occurred_at, policy=policy, measure=one_token
        ).window
        events.append(arrived)
    return window, events


Sums = Mapping[EventKey, NDArray[np.float64]]


def random_sums(layout: SumsLayout, window: Window) -> dict[EventKey, NDArray[np.float64]]:
    """Sums of each chapter, told apart by its opener; weights are above 0."""
    rng = np.random.default_rng(len(window.chapters))
    return {chapter.first: rng.uniform(0.5, 2.0, layout.size) for chapter in window.chapters}


def finished(window: Window, sums: Sums, known: Sequence[bool]) -> dict[int, FinishedChapter]:
    return {
        index: FinishedChapter(ids_hash=b"h", sums=sums[chapter.first])
        for index, (chapter, is_known) in enumerate(zip(window.chapters, known, strict=False))
        if is_known and index < len(window.chapters) - 1
    }


def seen(layout: SumsLayout, window: Window, policy: WindowPolicy, sums: Sums) -> Sequence[float]:
    visible = visible_chapters(window, policy)
    of_chapters = [sums[window.chapters[index].first] for index in visible]
    vector, surprise = layout.finish(layout.total(window, of_chapters, visible))
    return [*vector, *surprise]


def is_sealed(window: Window, index: int) -> bool:
    """Its successor's opener is late: DESIGN 2, word by word."""
    newest = window.newest
    assert newest is not None
    successors = window.chapters[index + 1 : index + 2]
    return any(chapter.first[0] < newest - LATENESS for chapter in successors)


@given(
    st.lists(st.sampled_from([0, 1, 5, 20, 60]), min_size=1, max_size=30),
    st.sets(st.integers(1, 29)),
    st.lists(st.booleans(), min_size=30, max_size=30),
    st.sampled_from(POLICIES),
)
@settings(max_examples=300)
def test_settling_forgets_only_what_is_sealed_and_changes_no_vector(
    gaps: list[int], anchors: set[int], known: list[bool], policy: WindowPolicy
) -> None:
    bundle = make_bundle((math.inf, 4.0), policy=policy)
    layout = SumsLayout(bundle)
    window, events = history_of(gaps, sorted(anchors), policy)
    sums = random_sums(layout, window)
    done = finished(window, sums, known)
    kept = settle(window, done, policy=policy, half_lives=layout.half_lives)

    left = {chapter.first: chapter for chapter in kept.chapters}
    for index, chapter in enumerate(window.chapters):
        if is_sealed(window, index):
            continue
        assert left[chapter.first].events == chapter.events
        assert (left[chapter.first].sums is not None) == (index in done)
    assert all(chapter.events or chapter.sums is not None for chapter in kept.chapters)
    np.testing.assert_allclose(
        seen(layout, kept, policy, sums), seen(layout, window, policy, sums), rtol=1e-6
    )
    blank = np.zeros(0, dtype=np.float32)
    assert feature_row(bundle, kept, blank, blank, 0.0) == feature_row(
        bundle, window, blank, blank, 0.0
    )
    assert settle(kept, {}, policy=policy, half_lives=layout.half_lives) == kept

    just_in_time = event(
        (events[-1].occurred_at - LATENESS - START).total_seconds(), event_id="just in time"
    )
    folds = [
        fold(w, just_in_time, recorded_at=START + LATENESS * 99, policy=policy, measure=one_token)
        for w in (window, kept)
    ]
    assert [c.first for c in folds[0].window.chapters][-len(folds[1].window.chapters) :] == [
        c.first for c in folds[1].window.chapters
    ]


@pytest.mark.parametrize(
    ("newest", "sealed"),
    [(100.0, 0), (100.000001, 1), (160.0, 1), (160.000001, 2), (1000.0, 2)],
)
def test_a_chapter_is_sealed_by_the_first_microsecond_that_makes_its_successor_late(
    newest: float, sealed: int
) -> None:
    layout = SumsLayout(make_bundle((4.0,)))
    window, _ = history_of([0, 10, 30, 60, newest - 100], anchors=[2, 3])  # openers 0, 40, 100
    assert [c.count for c in window.chapters] == [2, 1, 2]
    sums = random_sums(layout, window)
    done = finished(window, sums, [True] * 3)
    unlimited = settle(window, done, policy=UNLIMITED, half_lives=layout.half_lives)
    assert (unlimited.sealed.chapters if unlimited.sealed else 0) == sealed
    assert (unlimited.sealed.count if unlimited.sealed else 0) == [0, 2, 3][sealed]
    assert len(unlimited.chapters) == 3 - sealed
    one = settle(window, done, policy=POLICIES[1], half_lives=layout.half_lives)
    # The newest sealed chapter stays by itself, without its events, though it is hidden.
    assert [bool(c.events) for c in one.chapters] == [False] * (sealed > 0) + [True] * (3 - sealed)
    assert one.sealed is None


def test_under_max_age_a_sealed_chapter_stays_until_it_is_hidden() -> None:
    policy = POLICIES[4]  # 300 s
    layout = SumsLayout(make_bundle((4.0,), policy=policy))
    for newest, chapters in ((300.0, 3), (300.000001, 2)):
        window, _ = history_of([0, 10, 190, newest - 200], anchors=[1, 2], policy=policy)
        done = finished(window, random_sums(layout, window), [True] * 3)
        kept = settle(window, done, policy=policy, half_lives=layout.half_lives)
        assert len(kept.chapters) == chapters
        assert kept.sealed is None
        assert [bool(c.events) for c in kept.chapters] == [False] * (chapters - 1) + [True]


def test_an_unlimited_history_folds_oldest_first_and_stops_at_what_has_no_sums() -> None:
    layout = SumsLayout(make_bundle((4.0,)))
    window, _ = history_of([0, 10, 10, 10, 500], anchors=[1, 2, 3, 4])
    sums = random_sums(layout, window)
    for known, folded in (([True, True, False, True], 2), ([False, True, True, True], 0)):
        kept = settle(
            window, finished(window, sums, known), policy=UNLIMITED, half_lives=layout.half_lives
        )
        assert (kept.sealed.chapters if kept.sealed else 0) == folded
        assert [c.first for c in kept.chapters] == [c.first for c in window.chapters[folded:]]

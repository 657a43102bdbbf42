"""Windows are a pure function of the log: order of arrival and batches leave no trace."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from llm4es.errors import InvalidEvent, LLM4ESError
from llm4es.events import Event, FieldValue, entity_hash
from llm4es.rendering import RenderingSpec
from llm4es.testing import LengthEmbedder, modelless_bundle
from llm4es.windows import (
    Chapter,
    FinishedChapter,
    Outcome,
    Window,
    WindowPolicy,
    cut_chapters,
    fold,
    is_anchor,
    next_as_of,
    settle,
    visible_chapters,
)
from tests.histories import START, event, schema

LATENESS = timedelta(seconds=60)
POLICIES = (
    WindowPolicy(chapter_events=4, max_chapter_tokens=160, allowed_lateness=LATENESS,
                 max_clock_skew=timedelta(seconds=5)),
    WindowPolicy(chapter_events=4, max_chapter_tokens=120, allowed_lateness=LATENESS,
                 max_clock_skew=timedelta(seconds=5), max_chapters=2),
    WindowPolicy(chapter_events=8, max_chapter_tokens=400, allowed_lateness=LATENESS,
                 max_clock_skew=timedelta(seconds=5), max_age=timedelta(seconds=20)),
)  # fmt: skip
policies = st.sampled_from(POLICIES)
SPEC = RenderingSpec(time=("gap", "hour"), ratios=("amount",), spells={"login": timedelta(hours=1)})
TOKENS = modelless_bundle(schema(), entity="customer", window=POLICIES[0], rendering=SPEC).tokens


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    """Events in order, some at one instant, of both types, with values of many lengths."""
    gaps = draw(st.lists(st.sampled_from([0, 1, 3, 15, 30]), min_size=1, max_size=40))
    numbers = draw(st.permutations(range(len(gaps))))
    events = []
    for second, number in zip(accumulate(gaps), numbers, strict=True):
        login = draw(st.booleans())
        fields: dict[str, FieldValue] = (
            {"device": "d" * draw(st.integers(1, 9)), "ok": True}
            if login
            else {"amount": draw(st.sampled_from([1.0, 20.5, 999.0])), "goods": "g1", "note": None}
        )
        events.append(
            event(
                second, event_id=f"e{number}", kind="login" if login else "payment", fields=fields
            )
        )
    return sorted(events, key=lambda e: e.key)


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[list[Event], list[Event]]:
    """A history, and an order of arrival within the lateness, with duplicates."""
    history = draw(histories())
    delay = st.integers(0, int(LATENESS.total_seconds()))
    delayed = sorted(
        ((e.occurred_at + timedelta(seconds=draw(delay)), index) for index, e in enumerate(history))
    )
    order = [history[index] for _, index in delayed]
    for index in draw(st.lists(st.integers(0, len(order) - 1), max_size=5)):
        order.insert(draw(st.integers(index + 1, len(order))), order[index])
    return history, order


def folded(order: Sequence[Event], policy: WindowPolicy) -> tuple[Window, list[Outcome]]:
    window, outcomes = Window(entity_id="c1"), []
    for arrived in order:
        result = fold(
            window, arrived, recorded_at=arrived.occurred_at, policy=policy, measure=TOKENS.measure
        )
        window = result.window
        outcomes.append(result.outcome)
    return window, outcomes


def content(chapters: Sequence[Chapter]) -> list[tuple[object, ...]]:
    return [(c.events, c.first, c.last, c.count, c.tokens) for c in chapters]


@given(arrivals(), policies)
@settings(max_examples=300)
def test_any_order_of_arrival_gives_the_chapters_text_and_ids_of_the_sorted_history(
    drawn: tuple[list[Event], list[Event]], policy: WindowPolicy
) -> None:
    history, order = drawn
    window, outcomes = folded(order, policy)
    expected = cut_chapters(history, policy, TOKENS.measure)
    assert outcomes.count(Outcome.ACCEPTED) == len(history)
    assert content(window.chapters) == content(expected)
    for found, due in zip(window.chapters, expected, strict=True):
        assert TOKENS.renderer.lines(found.events) == TOKENS.renderer.lines(due.events)
        assert (
            TOKENS.tokenize(found.events).ids.tolist() == TOKENS.tokenize(due.events).ids.tolist()
        )


@given(histories(), policies)
@settings(max_examples=200)
def test_an_event_in_order_leaves_every_chapter_but_the_last_as_it_was(
    history: list[Event], policy: WindowPolicy
) -> None:
    before, _ = folded(history[:-1], policy)
    after, _ = folded(history, policy)
    assume(before.chapters)
    assert after.chapters[: len(before.chapters) - 1] == before.chapters[:-1]
    grown = after.chapters[len(before.chapters) - 1]
    assert grown.events[: before.chapters[-1].count] == before.chapters[-1].events
    assert len(after.chapters) - len(before.chapters) in {0, 1}


@given(histories(), policies, st.data())
@settings(max_examples=300)
def test_a_late_event_changes_no_chapter_before_its_own_and_none_from_the_next_anchor_on(
    history: list[Event], policy: WindowPolicy, data: st.DataObject
) -> None:
    assume(len(history) > 2)
    index = data.draw(st.integers(0, len(history) - 2))
    late = history[index]
    assume(late.occurred_at >= history[-1].occurred_at - policy.allowed_lateness)
    before, _ = folded([e for e in history if e is not late], policy)
    after, outcomes = folded([*(e for e in history if e is not late), late], policy)
    assert outcomes[-1] is Outcome.ACCEPTED
    covering = max((i for i, c in enumerate(before.chapters) if c.first <= late.key), default=0)
    assert after.chapters[:covering] == before.chapters[:covering]
    anchors = [
        e.key for e in history if e.key > late.key and is_anchor(e.event_id, policy.chapter_events)
    ]
    if anchors:
        assert [c for c in after.chapters if c.first >= anchors[0]] == [
            c for c in before.chapters if c.first >= anchors[0]
        ]


@given(histories(), policies)
@settings(max_examples=200)
def test_no_chapter_is_over_its_tokens_and_each_opener_has_a_reason(
    history: list[Event], policy: WindowPolicy
) -> None:
    chapters = cut_chapters(history, policy, TOKENS.measure)
    assert [e for c in chapters for e in c.events] == history
    for chapter in chapters:
        assert chapter.tokens == len(TOKENS.tokenize(chapter.events).ids)
        assert chapter.tokens <= policy.max_chapter_tokens
    for before, chapter in pairwise(chapters):
        opener = chapter.events[0]
        gap = opener.occurred_at - before.last[0]
        longer = before.tokens + TOKENS.measure(opener, before.events)
        assert (
            is_anchor(opener.event_id, policy.chapter_events)
            or (policy.max_age is not None and gap > policy.max_age)
            or longer > policy.max_chapter_tokens
        )
        assert not any(is_anchor(e.event_id, policy.chapter_events) for e in chapter.events[1:])


@given(arrivals(), policies, st.integers(1, 7))
@settings(max_examples=200)
def test_forgetting_sealed_chapters_changes_neither_window_nor_vector(
    drawn: tuple[list[Event], list[Event]], policy: WindowPolicy, every: int
) -> None:
    _, order = drawn
    bundle = modelless_bundle(schema(), entity="customer", window=policy, rendering=SPEC)
    embedder = LengthEmbedder(bundle)
    whole = kept = Window(entity_id="c1")
    for number, arrived in enumerate(order):
        whole, kept = (
            fold(w, arrived, recorded_at=arrived.occurred_at, policy=policy, measure=TOKENS.measure)
            .window
            for w in (whole, kept)
        )  # fmt: skip
        if number % every == 0:
            kept = settle(
                kept,
                embedder.embed([kept]).finished[0],
                policy=policy,
                half_lives=embedder.half_lives,
            )
    seen = [whole.chapters[index] for index in visible_chapters(whole, policy)]
    left = [kept.chapters[index] for index in visible_chapters(kept, policy)]
    assert [c.first for c in left] == [c.first for c in seen][len(seen) - len(left) :]
    assert sum(c.count for c in left) + (kept.sealed.count if kept.sealed else 0) == sum(
        c.count for c in seen
    )
    assert kept.as_of == whole.as_of
    np.testing.assert_allclose(
        embedder.embed([kept]).vectors, embedder.embed([whole]).vectors, rtol=1e-6
    )


def test_an_event_older_than_the_allowed_lateness_is_late_and_changes_nothing() -> None:
    policy = POLICIES[0]
    window, _ = folded([event(0), event(100)], policy)
    just_in_time, outcomes = folded([event(0), event(100), event(40)], policy)
    assert outcomes[-1] is Outcome.ACCEPTED
    assert sum(c.count for c in just_in_time.chapters) == 3
    late = fold(
        window,
        event(39.999999),
        recorded_at=START + timedelta(days=1),
        policy=policy,
        measure=TOKENS.measure,
    )
    assert late.outcome is Outcome.LATE
    assert late.window == window


def test_an_event_further_ahead_of_its_record_than_the_skew_is_bad() -> None:
    with pytest.raises(InvalidEvent, match="max_clock_skew"):
        fold(
            Window(entity_id="c1"),
            event(5.000001),
            recorded_at=START,
            policy=POLICIES[0],
            measure=TOKENS.measure,
        )


def test_a_line_longer_than_a_chapter_is_bad_and_changes_nothing() -> None:
    long = event(1, fields={"amount": 1.0, "goods": "g" * 250, "note": None})
    with pytest.raises(InvalidEvent, match="longer than a chapter"):
        folded([event(0), long], POLICIES[0])


def test_as_of_is_after_the_event_not_before_the_record_and_rises() -> None:
    microsecond = timedelta(microseconds=1)
    assert next_as_of(START, START, None) == START + microsecond
    assert next_as_of(START + timedelta(seconds=2), START, None) == START + timedelta(seconds=2)
    assert next_as_of(START, START, START + timedelta(hours=1)) == (
        START + timedelta(hours=1) + microsecond
    )


def test_only_an_accepted_event_that_is_no_duplicate_advances_as_of() -> None:
    window, _ = folded([event(0), event(100)], POLICIES[0])
    again, outcomes = folded([event(0), event(100), event(100), event(1)], POLICIES[0])
    assert outcomes[2:] == [Outcome.DUPLICATE, Outcome.LATE]
    assert again.as_of == window.as_of


def test_an_event_without_sums_is_never_forgotten() -> None:
    policy = POLICIES[0]
    window, _ = folded([event(s) for s in range(0, 600, 10)], policy)
    settled = settle(window, {}, policy=policy, half_lives=np.array([4.0]))
    assert content(settled.chapters) == content(window.chapters)
    second = {1: FinishedChapter(ids_hash=b"x", sums=np.array([1.0]))}
    gap = settle(window, second, policy=policy, half_lives=np.array([4.0]))
    assert gap.chapters[0].events  # the oldest has no sums yet,
    assert gap.sealed is None  # so nothing behind it is folded into the history
    assert replace(gap.chapters[1], events=window.chapters[1].events).count == len(
        window.chapters[1].events
    )


def test_policies_that_would_silence_an_entity_or_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="max_clock_skew"):
        WindowPolicy(allowed_lateness=timedelta(seconds=1), max_clock_skew=timedelta(seconds=2))
    with pytest.raises(ValueError, match="exclude each other"):
        WindowPolicy(max_chapters=1, max_age=timedelta(days=1))


@pytest.mark.parametrize(
    ("recorded_at", "occurred_at", "year"),
    [
        (datetime.max.replace(tzinfo=UTC), START, 9999),
        (datetime(2262, 1, 1, tzinfo=UTC), START, 2262),
        (datetime(1969, 6, 1, tzinfo=UTC), datetime(1969, 6, 1, tzinfo=UTC), 1969),
        (datetime(1, 1, 1, tzinfo=UTC), datetime(1700, 1, 1, tzinfo=UTC), 1700),
    ],
)
def test_an_event_whose_as_of_no_store_could_keep_is_bad(
    recorded_at: datetime, occurred_at: datetime, year: int
) -> None:
    policy = POLICIES[0].model_copy(update={"max_clock_skew": timedelta(days=999_999)})
    with pytest.raises(InvalidEvent, match=f"year {year}, not in 1970 to 2261") as caught:
        fold(
            Window(entity_id="c1"),
            replace(event(0), occurred_at=occurred_at),
            recorded_at=recorded_at,
            policy=policy,
            measure=TOKENS.measure,
        )
    assert caught.value.field == "timestamp"


def test_the_first_and_the_last_moment_of_what_stores_keep_are_accepted() -> None:
    for moment in (datetime(1970, 1, 1, tzinfo=UTC), datetime(2261, 12, 31, 23, tzinfo=UTC)):
        folded_in = fold(
            Window(entity_id="c1"),
            replace(event(0), occurred_at=moment),
            recorded_at=moment,
            policy=POLICIES[0],
            measure=TOKENS.measure,
        )
        assert folded_in.window.as_of == moment + timedelta(microseconds=1)


@pytest.mark.parametrize("more", [{}, {"max_chapters": 2}, {"max_age": timedelta.max}])
def test_durations_of_any_length_overflow_nowhere(more: dict[str, object]) -> None:
    policy = WindowPolicy.model_validate(
        {"allowed_lateness": timedelta.max, "max_clock_skew": timedelta.max, **more}
    )
    window, _ = folded([event(0), event(1), event(0.5)], policy)
    settled = settle(window, {}, policy=policy, half_lives=np.array([np.inf]))
    assert content(settled.chapters) == content(window.chapters)
    assert list(visible_chapters(window, policy)) == list(range(len(window.chapters)))


def test_an_error_about_an_entity_names_its_hash_and_not_its_id() -> None:
    policy = WindowPolicy(chapter_events=1 << 40)
    (chapter,) = cut_chapters([event(0), event(2)], policy, TOKENS.measure)
    broken = Window(entity_id="jane.roe", chapters=(replace(chapter, events=()),))
    with pytest.raises(LLM4ESError, match=entity_hash("jane.roe")) as caught:
        fold(
            broken,
            event(1, entity_id="jane.roe"),
            recorded_at=START + timedelta(seconds=1),
            policy=policy,
            measure=TOKENS.measure,
        )
    assert "jane.roe" not in str(caught.value)
    assert len(entity_hash("jane.roe")) == 16

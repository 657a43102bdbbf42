"""A tiny Llama, exported and read by the engine, against transformers' own model and numpy.

The weights are random: what is proven is the path from windows to vectors, not the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llm4es.bundle import Bundle
from llm4es.engine import reference
from llm4es.errors import NonFiniteEmbedding
from llm4es.events import Event
from llm4es.surprise import MEANS, PERCENTILES, SurpriseTracks
from llm4es.windows import Window, settle, visible_chapters
from tests.tiny_models import (
    DEPTH_CAP,
    POISON,
    POLICY,
    VARIANTS,
    Exported,
    assert_close,
    assert_same,
    embedder_of,
    events_of,
    make_bundle,
    one_chapter,
    window_of,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A model this small only loses by more of torch's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=list(VARIANTS.values()), ids=list(VARIANTS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return make_bundle(tmp_path_factory.mktemp("bundle"), request.param)


@pytest.fixture(scope="module")
def with_surprise(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return make_bundle(tmp_path_factory.mktemp("bundle"), next(iter(VARIANTS.values())))


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    variant = VARIANTS["last two side by side, as they are"]
    return make_bundle(tmp_path_factory.mktemp("bundle"), variant, poison=True)


def growing(bundle: Bundle, events: Sequence[Event]) -> list[Window]:
    """The window after each of the events, all in one chapter."""
    states = [window_of(bundle, events[: index + 1]) for index in range(len(events))]
    assert len(states[-1].chapters) == 1
    return states


def longest_chapter(bundle: Bundle) -> list[Event]:
    """An event whose line fills a chapter to its last token: one byte, one token."""
    (short,) = one_chapter("")
    room = bundle.manifest.window.max_chapter_tokens - bundle.tokens.measure(short, ())
    return one_chapter("n" * room)


@dataclass(frozen=True, slots=True)
class Expected:
    vector: NDArray[np.float64]
    surprise: dict[str, float]  # in all, by column
    surprise_last: float


def expect(exported: Exported, window: Window) -> Expected:
    """Chapter by chapter from transformers' model, pooled by the numpy reference."""
    bundle, header = exported.bundle, exported.bundle.tokens.header_ids
    pooling = bundle.manifest.pooling
    cells = SurpriseTracks(bundle.schema, bundle.renderer).cells
    states: list[NDArray[np.float64]] = []
    token_events: list[NDArray[np.int64]] = []
    deviations: list[float] = []
    excesses: list[float] = []
    for index in visible_chapters(window, bundle.manifest.window):
        events = window.chapters[index].events
        chapter = bundle.tokens.tokenize(events)
        ids = np.concatenate([header, chapter.ids])
        with torch.no_grad():
            out = exported.model(torch.from_numpy(ids)[None], output_hidden_states=True)
        hidden = [state[0, len(header) :].numpy() for state in out.hidden_states]
        states.append(reference.token_states(hidden, pooling))
        token_events.append(chapter.events + len(deviations))
        nats = reference.token_nats(out.logits[0].numpy(), ids)[len(header) :]
        for depth, one in enumerate(events):
            cell = cells.index((one.type, "all"))
            mean = bundle.arrays[MEANS][cell, min(depth, DEPTH_CAP)]
            deviations.append(float(nats[chapter.events == depth].sum() - mean))
            excesses.append(max(0.0, deviations[-1] - bundle.arrays[PERCENTILES][cell]))
    after = np.arange(len(deviations))[::-1]
    surprise = {}
    for scale in pooling.scales:
        weights = 0.5 ** (after / scale) / (0.5 ** (after / scale)).sum()
        surprise[f"all_h{scale:g}"] = float(weights @ deviations)
        surprise[f"all_excess_h{scale:g}"] = float(weights @ excesses)
    events_after = len(deviations) - 1 - np.concatenate(token_events)
    return Expected(
        vector=reference.embedding(np.concatenate(states), events_after, pooling.scales),
        surprise=surprise if bundle.manifest.surprise is not None else {},
        surprise_last=float(deviations[-1]) if bundle.manifest.surprise is not None else 0.0,
    )


def ragged(bundle: Bundle) -> list[Window]:
    """From one short event to many chapters, and one chapter as long as may be."""
    numbers = (1, 2, 3, 7, 20, 45)
    windows = [
        window_of(bundle, events_of(number, customer=index)) for index, number in enumerate(numbers)
    ]
    return [*windows, window_of(bundle, longest_chapter(bundle))]


def test_windows_of_every_length_are_what_transformers_and_the_definition_give(
    exported: Exported,
) -> None:
    bundle = exported.bundle
    windows = ragged(bundle)
    tokens = {chapter.tokens for window in windows for chapter in window.chapters}
    assert max(tokens) == POLICY.max_chapter_tokens
    assert min(tokens) < 40
    assert max(len(window.chapters) for window in windows) > 5
    embedder = embedder_of(exported)
    found = embedder.embed(windows)
    assert found.vectors.shape == (len(windows), bundle.manifest.dim)
    assert found.surprise.shape == (len(windows), len(embedder.layout.columns))
    for row, window in enumerate(windows):
        expected = expect(exported, window)
        assert_close(found.vectors[row], expected.vector)
        assert found.surprise_last[row] == pytest.approx(expected.surprise_last, rel=1e-4, abs=1e-3)
        by_name = dict(zip(embedder.layout.columns, found.surprise[row].tolist(), strict=True))
        for name, value in expected.surprise.items():
            assert by_name[name] == pytest.approx(value, rel=1e-4, abs=1e-3)


def test_surprise_by_field_adds_up_to_that_in_all(with_surprise: Exported) -> None:
    bundle = with_surprise.bundle
    events = events_of(4)
    tokens = bundle.tokens.tokenize(events)
    (reading,) = embedder_of(with_surprise).read_chapter([e.type for e in events], tokens, [4])
    assert reading.surprise is not None
    nats = reading.surprise.nats
    terminator = nats[:, 0] - nats[:, 1:].sum(axis=1)
    assert (terminator > 0).all()  # what no field has is the line's end
    assert (nats[reading.surprise.present] > 0).all()
    assert reading.last_surprise == reading.surprise.deviation[-1, 0]


def test_a_row_depends_on_neither_its_neighbours_nor_its_place_nor_what_was_remembered(
    exported: Exported,
) -> None:
    windows = ragged(exported.bundle)
    embedder = embedder_of(exported)
    together = embedder.embed(windows)
    remembering = embedder.embed(list(reversed(windows)))
    assert embedder.memo_hits > 0
    assert_same(together, list(reversed(range(len(windows)))), remembering)
    forgetful = embedder_of(exported, memo_bytes=0)
    for row, window in enumerate(windows):
        assert_same(together, [row], forgetful.embed([window]))
    assert forgetful.memo_hits == 0


def test_all_states_of_a_growing_chapter_come_from_one_reading(with_surprise: Exported) -> None:
    bundle = with_surprise.bundle
    states = growing(bundle, one_chapter(None, "a", None, "b"))
    embedder = embedder_of(with_surprise)
    together = embedder.embed([*states, states[1]])
    assert embedder.tokens_read == states[-1].chapters[0].tokens
    for row, window in enumerate(states):
        alone = embedder_of(with_surprise).embed([window])
        assert_same(together, [row], alone)
    np.testing.assert_array_equal(together.vectors[1], together.vectors[-1])


def test_the_prefixes_of_a_reading_equal_readings_of_their_own(exported: Exported) -> None:
    bundle = exported.bundle
    events = next(
        list(chapter.events)
        for chapter in window_of(bundle, events_of(60, customer=9)).chapters
        if chapter.count >= 4
    )
    embedder = embedder_of(exported)
    types = [e.type for e in events]
    prefixes = [len(events), 1, 3]  # in any order
    together = embedder.read_chapter(types, bundle.tokens.tokenize(events), prefixes)
    for end, reading in zip(prefixes, together, strict=True):
        tokens = bundle.tokens.tokenize(events[:end])
        (alone,) = embedder.read_chapter(types[:end], tokens, [end])
        assert_close(reading.sums, alone.sums)
        assert reading.last_surprise == pytest.approx(alone.last_surprise, rel=1e-4, abs=1e-3)


def test_a_window_whose_sums_are_stored_equals_one_that_is_read_in_full(
    exported: Exported,
) -> None:
    bundle = exported.bundle
    window = window_of(bundle, events_of(45, customer=4))
    embedder = embedder_of(exported)
    full = embedder.embed([window])
    assert set(full.finished[0]) == set(range(len(window.chapters) - 1))
    stored = settle(
        window, full.finished[0], policy=bundle.manifest.window, half_lives=embedder.half_lives
    )
    assert stored.sealed is not None
    assert stored.sealed.chapters > 1
    assert any(chapter.sums is not None for chapter in stored.chapters)
    fresh = embedder_of(exported)
    again = fresh.embed([stored])
    assert_same(again, [0], full)
    assert again.finished == ({},)
    # The open chapter alone was read again.
    assert fresh.tokens_read == window.chapters[-1].tokens


def test_finished_chapters_are_known_by_the_hash_of_their_ids(with_surprise: Exported) -> None:
    bundle = with_surprise.bundle
    window = window_of(bundle, events_of(20, customer=5))
    (finished,) = embedder_of(with_surprise).embed([window]).finished
    for index, done in finished.items():
        assert done.ids_hash == bundle.tokens.tokenize(window.chapters[index].events).ids_hash
        assert done.sums.dtype == np.float64


def test_two_customers_of_one_text_are_read_once(with_surprise: Exported) -> None:
    window = window_of(with_surprise.bundle, one_chapter(None, "a"))
    embedder = embedder_of(with_surprise)
    found = embedder.embed([window, window])
    assert embedder.tokens_read == window.chapters[0].tokens
    np.testing.assert_array_equal(found.vectors[0], found.vectors[1])


def test_no_windows_give_no_rows(with_surprise: Exported) -> None:
    found = embedder_of(with_surprise).embed([])
    assert found.vectors.shape == (0, with_surprise.bundle.manifest.dim)
    assert found.finished == ()


def test_rows_that_are_not_finite_are_named_and_no_other(poisoned: Exported) -> None:
    bundle = poisoned.bundle
    good = window_of(bundle, events_of(6, customer=1))
    bad = window_of(bundle, events_of(6, customer=2, note=POISON))
    embedder = embedder_of(poisoned)
    for windows, rows in (([bad], (0,)), ([good, bad, good, bad], (1, 3)), ([bad, good], (0,))):
        with pytest.raises(NonFiniteEmbedding) as caught:
            embedder.embed(windows)
        assert caught.value.rows == rows
    assert np.isfinite(embedder.embed([good]).vectors).all()


def test_an_event_that_spoils_its_chapter_leaves_the_states_before_it_finite(
    poisoned: Exported,
) -> None:
    bundle = poisoned.bundle
    events = one_chapter(None, None, POISON, None)
    states = growing(bundle, events)
    embedder = embedder_of(poisoned)
    with pytest.raises(NonFiniteEmbedding) as caught:
        embedder.embed(states)
    assert caught.value.rows == (2, 3)
    alone = [embedder.embed([state]) for state in states[:2]]
    assert_close(embedder.embed(states[:2]).vectors, np.concatenate([a.vectors for a in alone]))
    with pytest.raises(NonFiniteEmbedding):
        embedder.embed([window_of(bundle, [events[2]])])  # so the worker finds the culprit
    assert np.isfinite(embedder.embed([window_of(bundle, [events[3]])]).vectors).all()

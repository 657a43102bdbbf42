"""Reading on from a cache equals reading anew, whatever came in between."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from llm4es.bundle import Compute
from llm4es.engine import OnnxEmbedder
from llm4es.engine.kv_cache import ChapterCache, KeysValues
from llm4es.engine.reading import KvShape
from llm4es.events import Event
from llm4es.windows import Window, fold, is_anchor, settle
from tests.histories import START, event
from tests.tiny_models import (
    CHAPTER_EVENTS,
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

CUSTOMERS = 3
PLENTY = 1 << 26


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Exported]:
    """Two models of one shape: of what one has read the other must not know."""
    variant = next(iter(VARIANTS.values()))
    return [make_bundle(tmp_path_factory.mktemp("bundle"), variant, seed=n) for n in (1, 2)]


@pytest.fixture(scope="module")
def bundle(bundles: list[Exported]) -> Exported:
    return bundles[0]


@dataclass(frozen=True, slots=True)
class Arrival:
    """An event of a customer, `late` seconds before the newest, and what happens before it."""

    customer: int
    late: int
    amount: int
    goes_on: bool  # in the same batch as the one before
    trouble: str


arrivals = st.builds(
    Arrival,
    customer=st.integers(0, CUSTOMERS - 1),
    late=st.sampled_from((0, 0, 0, 0, 0, 150, 900)),
    amount=st.integers(1, 99_999),
    goes_on=st.booleans(),
    trouble=st.sampled_from(("",) * 12 + ("evict", "restart", "other bundle", "forget")),
)


class Machine:
    """A worker's windows and its embedder, and what becomes of them."""

    def __init__(self, bundles: Sequence[Exported], budget: int, spill: Path | None) -> None:
        self.bundles = bundles
        self.budget = budget
        self.spill = spill
        self.chosen = 0
        self.embedder = self._open()
        self.windows = {number: Window(entity_id=f"c{number}") for number in range(CUSTOMERS)}
        self.clock = [0] * CUSTOMERS
        self.seen = 0

    def _open(self) -> OnnxEmbedder:
        cache = ChapterCache(self.budget, spill_folder=self.spill, spill_bytes=PLENTY)
        return embedder_of(self.bundles[self.chosen], cache=cache)

    def suffer(self, trouble: str) -> None:
        if trouble == "evict":
            self.embedder.forget_all()
        elif trouble == "forget":
            self.embedder.forget(["c1"])
        elif trouble:
            if trouble == "other bundle":
                self.chosen = 1 - self.chosen
                # Sums of one bundle are nothing to another: its windows are its own.
                self.windows = {
                    number: replace(
                        window,
                        sealed=None,
                        chapters=tuple(
                            replace(chapter, sums=None, ids_hash=None)
                            for chapter in window.chapters
                            if chapter.events
                        ),
                    )
                    for number, window in self.windows.items()
                }
            self.embedder.close()
            self.embedder = self._open()

    def fold(self, one: Arrival) -> Window:
        bundle = self.bundles[0].bundle
        self.clock[one.customer] += 100
        self.seen += 1
        arrived = event(
            max(0, self.clock[one.customer] - one.late) + self.seen / 1000,
            entity_id=f"c{one.customer}",
            event_id=f"e{self.seen}",
            fields={"amount": one.amount / 100, "goods": "g1", "note": None},
        )
        self.windows[one.customer] = fold(
            self.windows[one.customer],
            arrived,
            recorded_at=START + timedelta(days=1),
            policy=bundle.manifest.window,
            measure=bundle.tokens.measure,
        ).window
        return self.windows[one.customer]

    def embed(self, states: Sequence[Window]) -> None:
        """Embed, compare with reading everything anew, and settle as the worker does."""
        found = self.embedder.embed(states)
        fresh = embedder_of(self.bundles[self.chosen], cache=ChapterCache(0), memo_bytes=0)
        assert_same(found, range(len(states)), fresh.embed(states))
        assert self.embedder.cache.bytes <= self.budget
        for row, window in enumerate(states):
            number = int(window.entity_id[1:])
            if window is self.windows[number]:
                self.windows[number] = settle(
                    window,
                    found.finished[row],
                    policy=self.bundles[0].bundle.manifest.window,
                    half_lives=self.embedder.half_lives,
                )


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    sequence=st.lists(arrivals, min_size=4, max_size=24),
    budget=st.sampled_from((0, 250_000, PLENTY)),
    spilling=st.booleans(),
)
def test_incremental_is_full_whatever_happens(
    bundles: list[Exported],
    tmp_path: Path,
    sequence: list[Arrival],
    budget: int,
    spilling: bool,  # noqa: FBT001 - hypothesis draws it
) -> None:
    machine = Machine(bundles, budget, tmp_path if spilling else None)
    batch: list[Window] = []
    for one in sequence:
        if batch and not one.goes_on:
            machine.embed(batch)
            batch = []
        if not batch:
            machine.suffer(one.trouble)
        batch.append(machine.fold(one))
    machine.embed(batch)


def test_a_new_event_costs_its_own_tokens_and_a_late_one_those_from_its_place_on(
    bundle: Exported,
) -> None:
    events = one_chapter(None, "a", None, "b", None)
    embedder = embedder_of(bundle)
    measure = bundle.bundle.tokens.measure
    embedder.embed([window_of(bundle.bundle, events[:4])])
    before = embedder.tokens_read
    embedder.embed([window_of(bundle.bundle, events)])
    assert embedder.tokens_read - before == measure(events[4], events[:4])
    names = (f"{events[3].event_id}.{number}" for number in count())
    name = next(name for name in names if not is_anchor(name, CHAPTER_EVENTS))
    late = [*events[:4], replace(events[3], event_id=name), events[4]]
    before = embedder.tokens_read
    embedder.embed([window_of(bundle.bundle, late)])
    tokens = bundle.bundle.tokens.tokenize(late)
    assert embedder.tokens_read - before == int((tokens.events >= 4).sum())
    before = embedder.tokens_read
    embedder.embed([window_of(bundle.bundle, late[:2])])  # an earlier state: all is known
    assert embedder.tokens_read == before


def test_many_customers_are_read_together_and_alike(bundle: Exported) -> None:
    histories = [events_of(4 + n % 5, customer=n) for n in range(40)]
    together, alone = embedder_of(bundle), embedder_of(bundle)
    for cut in (-1, None):
        windows = [window_of(bundle.bundle, history[:cut]) for history in histories]
        found = together.embed(windows)
        for row, window in enumerate(windows):
            one = alone.embed([window])
            assert_close(found.vectors[row], one.vectors[0])
            assert_close(found.surprise[row], one.surprise[0])
    assert together.tokens_read <= alone.tokens_read  # customers of one text are read once


def test_customers_whose_chapters_have_events_of_the_same_types_are_read_together(
    bundle: Exported,
) -> None:
    """Their jobs look alike but for what is in their arrays."""
    histories = [
        [replace(one, entity_id=f"c{n}") for one in one_chapter(*[f"{n}"] * 3)] for n in range(6)
    ]
    embedder = embedder_of(bundle)
    for cut in (1, 2, 3):
        windows = [window_of(bundle.bundle, history[:cut]) for history in histories]
        found = embedder.embed(windows)
        fresh = embedder_of(bundle, cache=ChapterCache(0))
        assert_same(found, range(len(windows)), fresh.embed(windows))
    assert len(embedder.cache) == len(histories)


def test_a_budget_holds_while_chapters_are_read_and_grow(bundle: Exported) -> None:
    budget = 600_000
    embedder = embedder_of(bundle, cache=ChapterCache(budget))
    highest = 0
    for number in range(12):
        for cut in (3, 6, 9):
            embedder.embed([window_of(bundle.bundle, one_chapter(*["x" * number] * cut))])
            embedder.embed([window_of(bundle.bundle, events_of(cut, customer=number))])
            highest = max(highest, embedder.cache.bytes)
    assert 0 < highest <= budget
    assert embedder.cache.evictions > 0
    embedder.forget_all()
    assert embedder.cache.bytes == 0


def test_memory_is_what_the_budget_says_and_goes_back_to_the_system() -> None:
    """Chapters worth three times the budget are kept one after another: the process stays small."""
    from llm4es.engine.kv_cache import OpenChapter  # noqa: PLC0415 - built here alone
    from llm4es.tokens import TokenizedChapter  # noqa: PLC0415

    shape, tokens, budget = KvShape(parts=60, heads=3, width=64), 512, 192 << 20
    nothing = np.zeros(0, dtype=np.int64)
    cache = ChapterCache(budget)
    before = _resident_bytes()
    filled = np.ones((60, 3, tokens, 64), dtype=np.float32)
    own = _resident_bytes()
    for number in range(20):
        size = KeysValues.bytes_for(shape, "fp32", KeysValues.rounded(tokens))
        assert cache.reserve(size)
        kv = KeysValues(shape, "fp32", tokens)
        kv.store(filled, 0, tokens)
        chapter = OpenChapter(kv, (), TokenizedChapter(nothing, nothing, nothing), [], np.zeros(4))
        cache.put(f"c{number}", chapter, reserved=size)
        del kv, chapter
        assert _resident_bytes() - own <= budget + (16 << 20)
    assert len(cache) > 2
    cache.drop_all()
    assert _resident_bytes() - own <= 16 << 20
    assert own >= before


def test_the_engine_keeps_within_its_budget_by_what_the_system_says(bundle: Exported) -> None:
    """The same customers, with memory for few of them and for all: only the latter grows."""
    small, large = 4 << 20, 256 << 20
    slack = 16 << 20
    grown = {}
    windows = [window_of(bundle.bundle, events_of(40, customer=n)) for n in range(250)]
    embedder_of(bundle).embed(windows[:20])  # whatever is loaded or allocated once
    for budget in (small, large):
        embedder = embedder_of(bundle, cache=ChapterCache(budget))
        before = _resident_bytes()
        for window in windows:
            embedder.embed([window])
        grown[budget] = _resident_bytes() - before
        assert embedder.cache.bytes <= budget
        embedder.close()
    assert grown[small] <= small + slack
    assert grown[large] > small + slack  # so it can be seen


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_smaller_cache_is_close_and_goes_on_as_the_manifest_says(
    tmp_path: Path, precision: str
) -> None:
    variant = next(iter(VARIANTS.values()))
    small = make_bundle(
        tmp_path,
        variant,
        compute=Compute(cache=precision, tolerance=2e-2),  # type: ignore[arg-type]
    )
    events = one_chapter(None, "a", None, "b", "c", None)
    embedder = embedder_of(small)
    for end in range(1, len(events) + 1):
        found = embedder.embed([window_of(small.bundle, events[:end])])
    assert embedder.tokens_read == len(small.bundle.tokens.tokenize(events).ids)
    fresh = embedder_of(small, cache=ChapterCache(0)).embed([window_of(small.bundle, events)])
    assert_close(found.vectors[0], fresh.vectors[0], tolerance=2e-2)
    assert not np.array_equal(found.vectors[0], fresh.vectors[0])
    assert len(embedder.cache) == 1


def test_what_is_spilled_comes_back_from_disk(bundle: Exported, tmp_path: Path) -> None:
    histories: list[list[Event]] = [events_of(6, customer=n) for n in range(6)]
    cache = ChapterCache(300_000, spill_folder=tmp_path, spill_bytes=PLENTY)
    embedder = embedder_of(bundle, cache=cache)
    for history in histories:
        embedder.embed([window_of(bundle.bundle, history[:-1])])
    assert cache.evictions > 0
    files = list(tmp_path.rglob("*"))
    assert any(path.is_file() for path in files)
    before = embedder.tokens_read
    found = embedder.embed([window_of(bundle.bundle, history) for history in histories])
    fresh = embedder_of(bundle, cache=ChapterCache(0), memo_bytes=0)
    assert_same(
        found,
        range(len(histories)),
        fresh.embed([window_of(bundle.bundle, history) for history in histories]),
    )
    opened = sum(window_of(bundle.bundle, h).chapters[-1].tokens for h in histories)
    assert embedder.tokens_read - before < opened
    embedder.close()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

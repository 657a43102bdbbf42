"""Embeddings as of many moments: what a worker would have served, straight from a log.

Each history is cut once and each chapter read once: a history's beginning has the chapters of the
whole one, but for its last, and the model is causal.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from llm4es.bundle import Bundle
from llm4es.engine import OnnxEmbedder, open_embedder
from llm4es.engine.embedder import ChapterReading
from llm4es.events import Event
from llm4es.features import token_weights
from llm4es.tokens import TokenizedChapter
from llm4es.windows import Chapter, Window, add_sums, cut_chapters, visible_chapters

__all__ = ["AsOf", "Embeddings", "embed_as_of", "static_embeddings"]

MODEL = "model"  # the bundle's folder of weights as transformers keeps them


@dataclass(frozen=True, slots=True)
class AsOf:
    """An entity at a moment: events that occurred before it are seen."""

    entity_id: str
    before: datetime


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Row i for asked[i]; an entity without events has zeros, and `events` 0."""

    vectors: NDArray[np.float32]  # (N, dim)
    surprise: NDArray[np.float32]  # (N, columns)
    surprise_last: NDArray[np.float32]  # (N,)
    token_bag: NDArray[np.float32]  # (N, scales * hidden): means of the static token embeddings
    events: NDArray[np.int64]  # (N,) that the window shows


@dataclass(frozen=True, slots=True)
class _Prefix:
    """A chapter's first events: what they give, and their static sums (S, hidden + 1)."""

    reading: ChapterReading
    bag: NDArray[np.float64]


def embed_as_of(
    bundle: Bundle,
    histories: Mapping[str, Sequence[Event]],
    asked: Sequence[AsOf],
    *,
    progress: Callable[[int], None] | None = None,
) -> Embeddings:
    """Embed N entities, each as of a moment of its own.

    `histories` are ordered by key and without duplicates. `progress` is told how many of `asked`
    are done. Events count as known when they occurred, as in training; what arrives late is a
    matter of serving.
    """
    reader = _Reader(bundle, open_embedder(bundle))
    by_entity: dict[str, list[int]] = {}
    for index, one in enumerate(asked):
        by_entity.setdefault(one.entity_id, []).append(index)
    done = 0
    for entity_id, rows in by_entity.items():
        history = reader.fitting(histories.get(entity_id, ()))
        times = [event.occurred_at for event in history]
        seen = {row: bisect_left(times, asked[row].before) for row in rows}
        reader.read(entity_id, history, seen)
        done += len(rows)
        if progress is not None:
            progress(done)
    return reader.found(len(asked))


def static_embeddings(bundle: Bundle) -> NDArray[np.float32]:
    """Embeddings of the model's tokens, before any layer: (vocabulary, hidden) float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(bundle.folder / MODEL, dtype=torch.float32)
    weights: NDArray[np.float32] = model.get_input_embeddings().weight.detach().numpy()
    return weights


class _Reader:
    def __init__(self, bundle: Bundle, embedder: OnnxEmbedder) -> None:
        self._bundle = bundle
        self._embedder = embedder
        self._policy = bundle.manifest.window
        self._static = static_embeddings(bundle)
        scales = len(embedder.layout.scales)
        self._bag_half_lives = np.broadcast_to(
            embedder.layout.scales[:, None], (scales, self._static.shape[1] + 1)
        )
        self._rows: dict[int, tuple[NDArray[np.float32], ...]] = {}
        self._events: dict[int, int] = {}

    def fitting(self, history: Sequence[Event]) -> list[Event]:
        """Leave out what a worker would park: lines longer than a chapter may be."""
        measure, longest = self._bundle.tokens.measure, self._policy.max_chapter_tokens
        return [event for event in history if measure(event, ()) <= longest]

    def read(self, entity_id: str, history: Sequence[Event], seen: Mapping[int, int]) -> None:
        """Find the rows of one entity: `seen` says how many of its events each one sees.

        Chapters that none of them sees are not read.
        """
        tokens = self._bundle.tokens
        chapters = cut_chapters(history, self._policy, tokens.measure) if history else ()
        by_count: dict[int, list[int]] = {}
        for row, count in seen.items():
            if count:
                by_count.setdefault(count, []).append(row)
        wanted: list[set[int]] = [set() for _ in chapters]  # of each, how many events
        asked: list[tuple[Window, range, list[int]]] = []
        for count, rows in by_count.items():
            window = _first_events(entity_id, chapters, count)
            visible = visible_chapters(window, self._policy)
            for index in visible:
                wanted[index].add(window.chapters[index].count)
            asked.append((window, visible, rows))
        prefixes = [
            self._read_chapter(chapter, sorted(counts)) if counts else {}
            for chapter, counts in zip(chapters, wanted, strict=True)
        ]
        for window, visible, rows in asked:
            shown = [prefixes[index][window.chapters[index].count] for index in visible]
            self._combine(window, visible, shown, rows)

    def found(self, count: int) -> Embeddings:
        """Give the rows in order, zeros where nothing was seen."""
        layout, dim = self._embedder.layout, self._bundle.manifest.dim
        widths = (dim, len(layout.columns), 1, self._bag_half_lives[:, 1:].size)
        tables = [np.zeros((count, width), dtype=np.float32) for width in widths]
        events = np.zeros(count, dtype=np.int64)
        for row, parts in self._rows.items():
            for table, part in zip(tables, parts, strict=True):
                table[row] = part
            events[row] = self._events[row]
        vectors, surprise, last, bag = tables
        return Embeddings(vectors, surprise, last[:, 0], bag, events)

    def _read_chapter(self, chapter: Chapter, counts: Sequence[int]) -> dict[int, _Prefix]:
        longest = chapter.events[: counts[-1]]
        tokens = self._bundle.tokens.tokenize(longest)
        types = [event.type for event in longest]
        readings = self._embedder.read_chapter(types, tokens, counts)
        return {
            count: _Prefix(reading, bag)
            for count, reading, bag in zip(
                counts, readings, self._bags(tokens, counts), strict=True
            )
        }

    def _bags(self, tokens: TokenizedChapter, counts: Sequence[int]) -> NDArray[np.float64]:
        """Static sums and their weights (P, S, hidden + 1) of a chapter's first events."""
        weights = token_weights(self._embedder.layout, tokens.events, counts)  # (P, S, T)
        sums = weights @ self._static[tokens.ids].astype(np.float64)
        return np.concatenate([sums, weights.sum(axis=-1, keepdims=True)], axis=-1)

    def _combine(
        self, window: Window, visible: range, shown: Sequence[_Prefix], rows: Sequence[int]
    ) -> None:
        layout = self._embedder.layout
        vector, surprise = layout.finish(
            layout.total(window, [each.reading.sums for each in shown], visible)
        )
        bag = np.zeros(self._bag_half_lives.shape)
        for index, each in zip(visible, shown, strict=True):
            bag = add_sums(
                bag,
                each.bag,
                newer_events=window.chapters[index].count,
                half_lives=self._bag_half_lives,
            )
        means = (bag[:, :-1] / bag[:, -1:]).astype(np.float32).ravel()
        last = np.array([shown[-1].reading.last_surprise], dtype=np.float32)
        for row in rows:
            self._rows[row] = (vector, surprise, last, means)
            self._events[row] = sum(window.chapters[index].count for index in visible)


def _first_events(entity_id: str, chapters: Sequence[Chapter], count: int) -> Window:
    """Give the window as it was when it held that many events, all of them in whole chapters."""
    shown = []
    for chapter in chapters:
        events = chapter.events[:count]
        shown.append(replace(chapter, events=events, last=events[-1].key, count=len(events)))
        count -= len(events)
        if not count:
            break
    return Window(entity_id=entity_id, chapters=tuple(shown))

"""Windows to vectors, through the bundle's graph, each chapter in a context of its own."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llm4es.bundle import Bundle
from llm4es.engine.providers import Device
from llm4es.engine.session import FullGraph
from llm4es.errors import BundleMismatch, NonFiniteEmbedding
from llm4es.features import Embedded, SumsLayout, token_weights
from llm4es.surprise import EventSurprise
from llm4es.tokens import TokenizedChapter
from llm4es.windows import FinishedChapter, Window, visible_chapters

__all__ = ["ChapterReading", "OnnxEmbedder", "default_threads", "open_embedder"]

_MEMO_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ChapterReading:
    """What the model makes of a chapter's first n events."""

    sums: NDArray[np.float64]  # (size,), see SumsLayout
    last_surprise: float  # deviation of the n-th event, in all
    surprise: EventSurprise | None  # of every event of the chapter that was read


@dataclass(slots=True)
class _Wanted:
    """A chapter state that some windows of a call need, known by its ids."""

    types: tuple[str, ...]
    tokens: TokenizedChapter
    users: list[tuple[int, int]] = field(default_factory=list)  # (window, chapter)


class OnnxEmbedder:
    """Embeds windows by reading whole chapters, and remembers those that are finished.

    A finished chapter is read once: its sums come from the window, else from a memo keyed by
    its ids, else from the model. Of the states of one chapter that a call asks for (one per
    event, say), the longest is read and gives the sums of all: the model is causal.
    """

    def __init__(self, bundle: Bundle, graph: FullGraph, *, memo_bytes: int = _MEMO_BYTES) -> None:
        self.bundle = bundle
        self.layout = SumsLayout(bundle)
        self._graph = graph
        self._memo: OrderedDict[bytes, NDArray[np.float64]] = OrderedDict()
        self._memo_entries = memo_bytes // (self.layout.size * 8)
        self.tokens_read = 0
        self.memo_hits = 0

    @property
    def providers(self) -> tuple[str, ...]:
        """Execution providers of onnxruntime in use, most wanted first."""
        return self._graph.providers

    @property
    def half_lives(self) -> NDArray[np.float64]:
        """Half-lives (n,) by which sums (n,) of chapters decay."""
        return self.layout.half_lives

    def embed(self, windows: Sequence[Window]) -> Embedded:
        """B windows of any length -> vectors (B, dim) float32, surprise (B, columns) float32.

        Row i is window i's. A row depends on its window's token ids alone, not on its batch
        neighbours nor on what was remembered (within the manifest's tolerance). Raises
        NonFiniteEmbedding with the rows it concerns.
        """
        known: dict[tuple[int, int], NDArray[np.float64]] = {}
        hashes: dict[tuple[int, int], bytes] = {}
        wanted: dict[bytes, _Wanted] = {}
        for row, window in enumerate(windows):
            self._gather(row, window, known, hashes, wanted)
        last = np.zeros(len(windows), dtype=np.float32)
        for content, reading in self._read_all(wanted).items():
            for row, index in wanted[content].users:
                known[row, index] = reading.sums
                if index == len(windows[row].chapters) - 1:
                    last[row] = reading.last_surprise
        self._refuse_non_finite(known)
        return self._combine(windows, known, hashes, last)

    def read_chapter(
        self, types: Sequence[str], chapter: TokenizedChapter, prefixes: Sequence[int]
    ) -> list[ChapterReading]:
        """Read a chapter once; give its state after each of the `prefixes` (events, from 1)."""
        layout, header = self.layout, self.bundle.tokens.header_ids
        weights = token_weights(layout, chapter.events, prefixes)  # (P, S, T)
        rows = weights.reshape(-1, len(chapter.ids))
        padded = np.zeros((1, len(rows), len(header) + len(chapter.ids)), dtype=np.float32)
        padded[0, :, len(header) :] = rows
        ids = np.concatenate([header, chapter.ids])[None, :]
        pooled, nats = self._graph.run(ids, padded)
        self.tokens_read += ids.size
        states = pooled[0].astype(np.float64).reshape(*weights.shape[:2], layout.state_dim)
        surprise = None
        spec = self.bundle.manifest.surprise
        if spec is not None and nats is not None:
            surprise = layout.tracks.judge(
                types, chapter, nats[0, len(header) :], spec, self.bundle.arrays
            )
        totals = weights.sum(axis=-1)
        return [
            ChapterReading(
                sums=layout.pack(
                    states[index], totals[index], surprise.head(count) if surprise else None
                ),
                last_surprise=float(surprise.deviation[count - 1, 0]) if surprise else 0.0,
                surprise=surprise,
            )
            for index, count in enumerate(prefixes)
        ]

    def _gather(
        self,
        row: int,
        window: Window,
        known: dict[tuple[int, int], NDArray[np.float64]],
        hashes: dict[tuple[int, int], bytes],
        wanted: dict[bytes, _Wanted],
    ) -> None:
        for index in visible_chapters(window, self.bundle.manifest.window):
            chapter = window.chapters[index]
            if chapter.sums is not None:
                known[row, index] = chapter.sums
                continue
            tokens = self.bundle.tokens.tokenize(chapter.events)
            if index < len(window.chapters) - 1:
                hashes[row, index] = tokens.ids_hash
                if (remembered := self._memo.get(tokens.ids_hash)) is not None:
                    self._memo.move_to_end(tokens.ids_hash)
                    self.memo_hits += 1
                    known[row, index] = remembered
                    continue
            content = tokens.ids.astype(">i4").tobytes()
            if content not in wanted:
                wanted[content] = _Wanted(tuple(e.type for e in chapter.events), tokens)
            wanted[content].users.append((row, index))

    def _read_all(self, wanted: dict[bytes, _Wanted]) -> dict[bytes, ChapterReading]:
        """Read every chapter state; states that are beginnings of another come with it."""
        readings: dict[bytes, ChapterReading] = {}
        for contents in _chains(sorted(wanted)):
            longest = wanted[contents[0]]
            prefixes = [len(wanted[content].types) for content in contents]
            found = self.read_chapter(longest.types, longest.tokens, prefixes)
            if not np.isfinite(found[0].sums).all():
                # NaN times a weight of 0 is NaN: a beginning may be finite when it is read alone.
                found = [self._read_alone(wanted[content]) for content in contents]
            readings.update(zip(contents, found, strict=True))
        return readings

    def _read_alone(self, one: _Wanted) -> ChapterReading:
        return self.read_chapter(one.types, one.tokens, [len(one.types)])[0]

    def _combine(
        self,
        windows: Sequence[Window],
        known: dict[tuple[int, int], NDArray[np.float64]],
        hashes: dict[tuple[int, int], bytes],
        last: NDArray[np.float32],
    ) -> Embedded:
        vectors = np.empty((len(windows), self.bundle.manifest.dim), dtype=np.float32)
        surprise = np.empty((len(windows), len(self.layout.columns)), dtype=np.float32)
        finished = []
        for row, window in enumerate(windows):
            visible = visible_chapters(window, self.bundle.manifest.window)
            sums = [known[row, index] for index in visible]
            vectors[row], surprise[row] = self.layout.finish(
                self.layout.total(window, sums, visible)
            )
            found = {
                index: FinishedChapter(ids_hash=hashes[row, index], sums=known[row, index])
                for index in visible
                if (row, index) in hashes
            }
            for done in found.values():
                self._remember(done)
            finished.append(found)
        return Embedded(vectors, surprise, last, tuple(finished))

    def _remember(self, done: FinishedChapter) -> None:
        self._memo[done.ids_hash] = done.sums
        self._memo.move_to_end(done.ids_hash)
        while len(self._memo) > self._memo_entries:
            self._memo.popitem(last=False)

    @staticmethod
    def _refuse_non_finite(known: dict[tuple[int, int], NDArray[np.float64]]) -> None:
        rows = sorted({row for (row, _), sums in known.items() if not np.isfinite(sums).all()})
        if rows:
            raise NonFiniteEmbedding(tuple(rows))


def open_embedder(
    bundle: Bundle, *, device: Device = "auto", threads: int | None = None
) -> OnnxEmbedder:
    """Open a bundle's graph. `threads` is all that this process may use by default.

    Raises ConfigError for a device that is not there, BundleMismatch for a graph or model that
    is not fit to serve.
    """
    graph = FullGraph(bundle.full_graph, device=device, threads=threads or default_threads())
    _refuse_broken_model(bundle, graph)
    return OnnxEmbedder(bundle, graph)


def _refuse_broken_model(bundle: Bundle, graph: FullGraph) -> None:
    """Read the header alone: what is not finite for that is no event's fault."""
    ids = bundle.tokens.header_ids[None, :]
    pooled, nats = graph.run(ids, np.ones((1, 1, ids.shape[1]), dtype=np.float32))
    if not np.isfinite(pooled).all() or (nats is not None and not np.isfinite(nats).all()):
        raise BundleMismatch(
            f"bundle {bundle.folder}",
            "the model's output is not finite even for the header",
            "train and export it again",
        )


def default_threads() -> int:
    """CPUs that this process may run on, a container's quota not counted."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chains(contents: Sequence[bytes]) -> list[list[bytes]]:
    """Group sorted ids so that in each group all are beginnings of the first.

    Sorted, every beginning stands before what continues it, so one pass from the end finds a
    longest content for each. Ids are 4 bytes each: a beginning ends between two of them.
    """
    chains: list[list[bytes]] = []
    for content in reversed(contents):
        if chains and chains[-1][0].startswith(content):
            chains[-1].append(content)
        else:
            chains.append([content])
    return chains

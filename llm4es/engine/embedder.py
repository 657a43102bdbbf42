"""Windows to vectors, through the bundle's graph, each chapter in a context of its own."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm4es.bundle import Bundle
from llm4es.engine.chapters import ChapterReader, Job
from llm4es.engine.cpus import default_threads
from llm4es.engine.kv_cache import ChapterCache
from llm4es.engine.opening import open_graph
from llm4es.engine.providers import Device
from llm4es.engine.reading import ChapterGraph
from llm4es.errors import NonFiniteEmbedding
from llm4es.events import Event
from llm4es.features import Embedded, SumsLayout
from llm4es.surprise import EventSurprise
from llm4es.tokens import TokenizedChapter
from llm4es.windows import FinishedChapter, Window, visible_chapters

__all__ = ["CACHE_BYTES", "ChapterReading", "OnnxEmbedder", "open_embedder"]

CACHE_BYTES = 1 << 30
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

    events: tuple[Event, ...]
    tokens: TokenizedChapter
    users: list[tuple[int, int]] = field(default_factory=list)  # (window, chapter)


@dataclass(slots=True)
class _Call:
    """What one call of `embed` asks for, and what is found."""

    windows: Sequence[Window]
    known: dict[tuple[int, int], NDArray[np.float64]] = field(default_factory=dict)
    hashes: dict[tuple[int, int], bytes] = field(default_factory=dict)
    wanted: dict[bytes, _Wanted] = field(default_factory=dict)
    open_now: dict[str, bytes] = field(default_factory=dict)  # entity -> its newest open chapter

    def entities(self, contents: Sequence[bytes]) -> dict[str, bytes]:
        """Entities that want any of these states, and the first state each of them wants."""
        found: dict[str, bytes] = {}
        for content in contents:
            for row, _ in self.wanted[content].users:
                found.setdefault(self.windows[row].entity_id, content)
        return found


class OnnxEmbedder:
    """Embeds windows, and reads of a chapter only what it has not read yet.

    An open chapter's keys and values are kept by entity (`ChapterCache`): a new event costs its
    own tokens, a late one those from its place on, a lost cache that chapter. A finished chapter
    is read once: its sums come from the window, else from a memo keyed by its ids, else from the
    model. Of the states of one chapter that a call asks for (one per event, say), the longest is
    read and gives the sums of all: the model is causal.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: ChapterGraph,
        *,
        cache: ChapterCache | None = None,
        memo_bytes: int = _MEMO_BYTES,
    ) -> None:
        self.bundle = bundle
        self.cache = cache if cache is not None else ChapterCache(CACHE_BYTES)
        self._reader = ChapterReader(bundle, graph, self.cache)
        self.layout: SumsLayout = self._reader.layout
        self._graph = graph
        self._memo: OrderedDict[bytes, NDArray[np.float64]] = OrderedDict()
        self._memo_entries = memo_bytes // (self.layout.size * 8)
        self.memo_hits = 0

    @property
    def tokens_read(self) -> int:
        """Tokens that the model has read since the start, headers not counted."""
        return self._reader.tokens_read

    @property
    def providers(self) -> tuple[str, ...]:
        """Execution providers in use, most wanted first."""
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
        call = _Call(windows)
        for row in range(len(windows)):
            self._gather(row, call)
        last = np.zeros(len(windows), dtype=np.float32)
        for content, reading in self._read_all(call).items():
            for row, index in call.wanted[content].users:
                call.known[row, index] = reading.sums
                if index == len(windows[row].chapters) - 1:
                    last[row] = reading.last_surprise
        self._refuse_non_finite(call.known)
        return self._combine(windows, call.known, call.hashes, last)

    def forget(self, entity_ids: Iterable[str]) -> None:
        """Release what is kept of some entities: another worker has them now, or nobody."""
        self.cache.drop(entity_ids)

    def forget_all(self) -> None:
        """Release what is kept of every entity."""
        self.cache.drop_all()

    def close(self) -> None:
        """Release memory and files."""
        self.cache.close()

    def read_chapter(
        self, types: Sequence[str], chapter: TokenizedChapter, prefixes: Sequence[int]
    ) -> list[ChapterReading]:
        """Read a chapter from its start; give its state after each of the `prefixes` (events).

        Nothing is kept of it. What is not finite is given as it is.
        """
        job = Job(tuple(types), chapter)
        self._reader.read([job])
        found = self._readings(job, prefixes)
        if job.states is None or not job.states[0].surprise:
            return found
        surprise = EventSurprise.joined([s.surprise for s in job.states if s.surprise is not None])
        return [
            ChapterReading(sums=one.sums, last_surprise=one.last_surprise, surprise=surprise)
            for one in found
        ]

    def _gather(self, row: int, call: _Call) -> None:
        window = call.windows[row]
        for index in visible_chapters(window, self.bundle.manifest.window):
            chapter = window.chapters[index]
            if chapter.sums is not None:
                call.known[row, index] = chapter.sums
                continue
            tokens = self._tokenize(window.entity_id, chapter.events)
            is_open = index == len(window.chapters) - 1
            if not is_open:
                call.hashes[row, index] = tokens.ids_hash
                if (remembered := self._memo.get(tokens.ids_hash)) is not None:
                    self._memo.move_to_end(tokens.ids_hash)
                    self.memo_hits += 1
                    call.known[row, index] = remembered
                    continue
            content = tokens.ids.astype(">i4").tobytes()
            if is_open:
                call.open_now[window.entity_id] = content
            if content not in call.wanted:
                call.wanted[content] = _Wanted(chapter.events, tokens)
            call.wanted[content].users.append((row, index))

    def _tokenize(self, entity_id: str, events: Sequence[Event]) -> TokenizedChapter:
        """Ids of a chapter; of the events that are kept already they are known."""
        kept = self.cache.peek(entity_id)
        shared = kept.shared(events) if kept is not None else 0
        if kept is None or not shared:
            return self.bundle.tokens.tokenize(events)
        known = kept.tokens.head(shared)
        if shared == len(events):
            return known
        return known.then(self.bundle.tokens.tokenize(events[shared:], earlier=events[:shared]))

    def _read_all(self, call: _Call) -> dict[bytes, ChapterReading]:
        """Read every chapter state; states that are beginnings of another come with it."""
        chains = _chains(sorted(call.wanted))
        jobs = self._jobs(call, chains)
        self._reader.read(jobs)
        readings: dict[bytes, ChapterReading] = {}
        for contents, job in zip(chains, jobs, strict=True):
            counts = [len(call.wanted[content].events) for content in contents]
            found = self._readings(job, counts)
            if job.states is None and len(contents) > 1:
                # NaN times a weight of 0 is NaN: a beginning may be finite when it is read alone.
                found = [self._read_alone(call.wanted[content]) for content in contents]
            readings.update(zip(contents, found, strict=True))
        return readings

    def _jobs(self, call: _Call, chains: Sequence[Sequence[bytes]]) -> list[Job]:
        """One job per chain, each with the kept chapter that begins it; each serves one job."""
        jobs = []
        claims: list[tuple[bool, int, int, str]] = []
        for number, contents in enumerate(chains):
            longest = call.wanted[contents[0]]
            wanting = call.entities(contents)
            # Whose newest state this is keeps it, best the one that needs all of it.
            keep = next((one for one in wanting if call.open_now.get(one) in contents), None)
            jobs.append(Job(_types(longest.events), longest.tokens, longest.events, keep=keep))
            for entity_id in wanting:
                kept = self.cache.peek(entity_id)
                if kept is not None and (shared := kept.shared(longest.events)):
                    claims.append((entity_id == keep, shared, number, entity_id))
        taken: set[str] = set()
        for _, shared, number, entity_id in sorted(claims, reverse=True):
            if entity_id not in taken and jobs[number].begun is None:
                taken.add(entity_id)
                jobs[number].begun, jobs[number].shared = entity_id, shared
        return jobs

    def _readings(self, job: Job, counts: Sequence[int]) -> list[ChapterReading]:
        if job.states is None:
            nothing = np.full(self.layout.size, np.nan)
            return [ChapterReading(nothing, np.nan, None) for _ in counts]
        sums = self._reader.sums(job, counts)
        readings = []
        for count in counts:
            surprise = job.states[count - 1].surprise
            last = float(surprise.deviation[0, 0]) if surprise is not None else 0.0
            readings.append(ChapterReading(sums[count], last, None))
        return readings

    def _read_alone(self, one: _Wanted) -> ChapterReading:
        return self.read_chapter(_types(one.events), one.tokens, [len(one.events)])[0]

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
    bundle: Bundle,
    *,
    device: Device = "auto",
    threads: int | None = None,
    cache_bytes: int = CACHE_BYTES,
    spill_folder: Path | None = None,
    spill_bytes: int = 0,
) -> OnnxEmbedder:
    """Open a bundle's graph. `threads` is all that this process may use by default.

    `cache_bytes` bounds the memory of open chapters; 0 reads each anew. What does not fit goes to
    `spill_folder`, as far as `spill_bytes` go. Raises ConfigError for a device that is not there,
    BundleMismatch for a graph or model that is not fit to serve.
    """
    graph = open_graph(bundle, device=device, threads=threads or default_threads())
    cache = ChapterCache(cache_bytes, spill_folder=spill_folder, spill_bytes=spill_bytes)
    return OnnxEmbedder(bundle, graph, cache=cache)


def _types(events: Sequence[Event]) -> tuple[str, ...]:
    return tuple(event.type for event in events)


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

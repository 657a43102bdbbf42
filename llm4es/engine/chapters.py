"""Reading chapters on: which tokens are new, which are read together, and what they give."""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm4es.bundle import Bundle
from llm4es.engine.kv_cache import ChapterCache, EventState, KeysValues, OpenChapter
from llm4es.engine.reading import ChapterGraph, Found, Reading
from llm4es.errors import BundleMismatch
from llm4es.events import Event
from llm4es.features import SumsLayout
from llm4es.tokens import TokenizedChapter

__all__ = ["ChapterReader", "Job"]

_TOGETHER_TOKENS = 96  # on a CPU, more new tokens than these keep the core busy by themselves
_TOGETHER_CHAPTERS = 64
_PADDED_TOKENS = 1024  # of a group on a CPU: what its layers hold stays in the caches
_PADDED_TOKENS_GPU = 16_384
_SCRATCH_BYTES = 96 << 20
_COPY_SHARE = 4  # copying keys must cost little against reading the weights, which is shared


@dataclass(slots=True, eq=False)
class Job:
    """A chapter to read, as far as `tokens` go, and under whose name it is kept afterwards.

    `begun` is the entity whose kept chapter begins it. After `ChapterReader.read`, `states` are
    those after each event, or None where the model's output is not finite.
    """

    types: tuple[str, ...]
    tokens: TokenizedChapter
    events: tuple[Event, ...] = ()
    keep: str | None = None
    begun: str | None = None
    shared: int = 0  # events that were read already
    states: list[EventState] | None = None
    known: tuple[int, NDArray[np.float64]] | None = None  # sums after so many events
    chapter: OpenChapter | None = None
    reserved: int = 0

    @property
    def before(self) -> int:
        """Tokens that were read already."""
        return int(np.searchsorted(self.tokens.events, self.shared))

    @property
    def new(self) -> int:
        """Tokens to read."""
        return len(self.tokens.ids) - self.before


class ChapterReader:
    """Reads chapters behind the header, from where they are known.

    The header is read once. Raises BundleMismatch where the model's output is not finite for it:
    that is no event's fault.
    """

    def __init__(self, bundle: Bundle, graph: ChapterGraph, cache: ChapterCache) -> None:
        self.layout = SumsLayout(bundle)
        self.graph = graph
        self.cache = cache
        self.tokens_read = 0
        self._bundle = bundle
        self._scratch = _Scratch()
        header = bundle.tokens.header_ids
        self._header_tokens = len(header)
        self._header_kv = graph.kv_shape.empty(1, len(header))
        found = graph.read(
            Reading(
                ids=header[None],
                weights=np.ones((1, 1, len(header)), dtype=np.float32),
                past=np.zeros(1, dtype=np.int64),
                new=np.array([len(header)]),
                kv=self._header_kv,
                opening=np.zeros((1, graph.hidden), dtype=np.float32),
                ends=np.array([[len(header) - 1]]),
            )
        )
        ends = found.end_states
        self._opening = ends[0, 0].copy() if ends is not None else np.zeros(0, dtype=np.float32)
        finite = np.isfinite(found.pooled).all() and np.isfinite(self._header_kv).all()
        if not finite or not np.isfinite(self._opening).all():
            raise BundleMismatch(
                f"bundle {bundle.folder}",
                "the model's output is not finite even for the header",
                "train and export it again",
            )

    def read(self, jobs: Sequence[Job]) -> None:
        """Read every job's chapter; jobs whose output is not finite have no states."""
        for group in self._grouped(jobs):
            lost = self._prepare(group)
            if group:
                self._read_group(group)
            for job in lost:  # what was known of it went for another's sake
                self._read_group([job])

    def sums(self, job: Job, counts: Sequence[int]) -> dict[int, NDArray[np.float64]]:
        """Sums (size,) after each of the first n events, n in `counts`."""
        if job.states is None:
            msg = "a chapter that is not finite has no sums"
            raise ValueError(msg)
        done, sums = job.known or (0, np.zeros(self.layout.size))
        if min(counts) < done:
            done, sums = 0, np.zeros(self.layout.size)
        found = {done: sums}
        for state in job.states[done : max(counts)]:
            weight = 1 if self.layout.ends_only else state.tokens
            sums = self.layout.add_event(sums, state.pooled, weight, state.surprise)
            done += 1
            found[done] = sums
        return {count: found[count] for count in counts}

    def keep(self, job: Job) -> None:
        """Keep a chapter that was read for its entity's next event, and give back the rest."""
        chapter = job.chapter
        if chapter is None or job.keep is None or job.states is None:
            self.cache.release(job.reserved)
        else:
            count = len(job.states)
            chapter.states, chapter.sums = job.states, self.sums(job, [count])[count]
            chapter.events, chapter.tokens = job.events, job.tokens
            self.cache.put(job.keep, chapter, reserved=job.reserved)
        job.chapter, job.reserved = None, 0

    def _prepare(self, group: list[Job]) -> list[Job]:
        """Take known beginnings out of the cache; jobs that lost theirs leave the group."""
        lost = []
        for job in list(group):
            planned = job.shared
            if job.begun is not None:
                job.chapter, job.reserved = self.cache.take(job.begun)
            job.shared = job.chapter.shared(job.events) if job.chapter is not None else 0
            if job.shared != planned:
                lost.append(job)
                group.remove(job)
        return lost

    def _room(self, job: Job) -> None:
        """Make room for the keys and values of a chapter that is to be kept."""
        tokens = self._header_tokens + len(job.tokens.ids)
        shape, precision = self.graph.kv_shape, self._bundle.manifest.compute.cache
        if job.chapter is not None and job.chapter.kv.capacity >= tokens:
            return
        size = KeysValues.bytes_for(shape, precision, KeysValues.rounded(tokens))
        if not self.cache.reserve(size):
            return
        job.reserved += size
        if job.chapter is not None:
            job.chapter.kv.grow(tokens)
            return
        kv = KeysValues(shape, precision, tokens)
        kv.store(self._header_kv[:, 0], 0, self._header_tokens)
        job.chapter = OpenChapter(kv, (), job.tokens.head(0), [], np.zeros(self.layout.size))

    def _read_group(self, group: Sequence[Job]) -> None:
        for job in group:
            if job.keep is not None:
                self._room(job)
        unread = [job for job in group if job.new]
        found = self._run(unread) if unread else None
        for job in group:
            chapter = job.chapter
            known = chapter.states if chapter is not None else []
            job.states = known[: job.shared]
            if chapter is not None and job.shared == len(known):
                job.known = (job.shared, chapter.sums)
            if job.new and found is not None:
                more = self._states(job, unread.index(job), found)
                job.states = job.states + more if more is not None else None
            self.keep(job)

    def _run(self, jobs: Sequence[Job]) -> Found:
        """Read the new tokens of B chapters, and put their keys and values where they are kept."""
        reading, in_place = self._reading(jobs)
        found = self.graph.read(reading)
        self.tokens_read += int(reading.new.sum())
        if not in_place:
            for row, job in enumerate(jobs):
                end = int(reading.past[row] + reading.new[row])
                if (
                    job.keep is not None
                    and job.chapter is not None
                    and job.chapter.kv.capacity >= end
                ):
                    job.chapter.kv.store(reading.kv[:, row], int(reading.past[row]), end)
                else:
                    self._let_go(job)
        return found

    def _let_go(self, job: Job) -> None:
        """Keep nothing of a chapter whose keys there was no room for; what is known serves yet."""
        job.keep = None

    def _reading(self, jobs: Sequence[Job]) -> tuple[Reading, bool]:
        new = np.array([job.new for job in jobs])
        past = np.array([self._header_tokens + job.before for job in jobs])
        count = max(len(job.types) - job.shared for job in jobs)
        batch, longest = len(jobs), int(new.max())
        ids = np.zeros((batch, longest), dtype=np.int64)
        weights = np.zeros((batch, count, longest), dtype=np.float32)
        ends = np.zeros((batch, count), dtype=np.int64)
        opening = np.zeros((batch, self.graph.hidden), dtype=np.float32)
        for row, job in enumerate(jobs):
            width = job.new
            ids[row, :width] = job.tokens.ids[job.before :]
            events = job.tokens.events[job.before :] - job.shared
            last = np.flatnonzero(np.append(events[1:] != events[:-1], True))
            ends[row] = width - 1
            ends[row, : len(last)] = last
            if self.layout.ends_only:
                weights[row, np.arange(len(last)), last] = 1
            else:
                weights[row, events, np.arange(width)] = 1
            if self.graph.surprise:
                opening[row] = self._state_before(job)
        kv = self._in_place(jobs)
        in_place = kv is not None
        if kv is None:
            kv = self._loaded(jobs, past, int(past.max()) + longest)
        return Reading(ids, weights, past, new, kv, opening, ends), in_place

    def _state_before(self, job: Job) -> NDArray[np.float32]:
        if not job.shared or job.chapter is None:
            return self._opening
        state = job.chapter.states[job.shared - 1].end_state
        return self._opening if state is None else state

    def _in_place(self, jobs: Sequence[Job]) -> NDArray[np.float32] | None:
        """The kept keys and values of a chapter that is read alone, if a graph can write there."""
        (job, *others) = jobs
        if others or job.chapter is None:
            return None
        enough = job.chapter.kv.capacity >= self._header_tokens + len(job.tokens.ids)
        return job.chapter.kv.in_place if enough else None

    def _loaded(
        self, jobs: Sequence[Job], past: NDArray[np.int64], capacity: int
    ) -> NDArray[np.float32]:
        """Copies of what B chapters hold, side by side."""
        shape = self.graph.kv_shape
        kv = self._scratch.room((shape.parts, len(jobs), shape.heads, capacity, shape.width))
        for row, job in enumerate(jobs):
            if job.chapter is not None and job.shared:
                job.chapter.kv.load(kv[:, row], int(past[row]))
            else:
                kv[:, row, :, : self._header_tokens] = self._header_kv[:, 0]
        return kv

    def _states(self, job: Job, row: int, found: Found) -> list[EventState] | None:
        """States after each new event; None where they are not finite."""
        events = job.tokens.events[job.before :] - job.shared
        more = TokenizedChapter(
            job.tokens.ids[job.before :], events, job.tokens.owners[job.before :]
        )
        types = job.types[job.shared :]
        pooled = found.pooled[row, : len(types)].copy()
        if not np.isfinite(pooled).all():
            self._scratch.clear()
            return None
        surprise = None
        spec = self._bundle.manifest.surprise
        if spec is not None and found.nats is not None:
            nats = found.nats[row, : len(more.ids)]
            if not np.isfinite(nats).all():
                self._scratch.clear()
                return None
            surprise = self.layout.tracks.judge(
                types, more, nats, spec, self._bundle.arrays, earlier=job.shared
            )
        ends = found.end_states[row].copy() if found.end_states is not None else None
        counts = np.bincount(events, minlength=len(types))
        return [
            EventState(
                pooled=pooled[index],
                tokens=int(counts[index]),
                end_state=ends[index] if ends is not None else None,
                surprise=surprise.of_event(index) if surprise is not None else None,
            )
            for index in range(len(types))
        ]

    def _grouped(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Small increments together, sorted by length; on a CPU, whole chapters one by one."""
        group: list[Job] = []
        # Known beginnings first: what is read from the start must not push them out.
        for job in sorted(jobs, key=lambda job: (not job.shared, job.new, job.before)):
            if group and not self._fits(group, job):
                yield group
                group = []
            group.append(job)
        if group:
            yield group

    def _fits(self, group: Sequence[Job], job: Job) -> bool:
        new = max(other.new for other in (*group, job))
        past = self._header_tokens + max(other.before for other in (*group, job))
        count = len(group) + 1
        copied = 4 * self.graph.kv_shape.values * (past + new)
        if not self.graph.on_cpu:
            return count * new <= _PADDED_TOKENS_GPU and count * copied <= _SCRATCH_BYTES * 16
        return (
            new <= _TOGETHER_TOKENS
            and count <= _TOGETHER_CHAPTERS
            and count * new <= _PADDED_TOKENS
            and count * copied <= _SCRATCH_BYTES
            and copied <= self.graph.weight_bytes // _COPY_SHARE
        )


class _Scratch:
    """Memory for keys and values that are read once, taken from the system once."""

    def __init__(self) -> None:
        self._flat = np.zeros(0, dtype=np.float32)

    def room(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """An array of that shape, with whatever stood there before."""
        count = int(np.prod(shape))
        if count > self._flat.size:
            memory = mmap.mmap(-1, count * self._flat.itemsize)
            self._flat = np.frombuffer(memory, dtype=np.float32)
        return self._flat[:count].reshape(shape)

    def clear(self) -> None:
        """Forget what is not finite: a weight of 0 would not."""
        self._flat[:] = 0

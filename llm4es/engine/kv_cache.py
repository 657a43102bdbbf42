"""Open chapters in memory: keys and values, and the sums after each event, within a byte budget.

A chapter is known by its entity and by its events: what is kept serves any chapter that begins
with the same events, as far as they are the same. So it can be lost, cut off or stale without
being wrong.
"""

import mmap
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llm4es.engine.reading import KvShape
from llm4es.events import Event
from llm4es.surprise import EventSurprise
from llm4es.tokens import TokenizedChapter

__all__ = ["ChapterCache", "EventState", "KeysValues", "OpenChapter", "Precision"]

Precision = Literal["fp32", "fp16", "int8"]

_STEP = 64  # tokens by which room grows, at least
_GROWTH = 4  # a quarter of what there is
_LARGEST_INT8 = 127.0
_OBJECT_BYTES = 1024  # of Python's objects around an event's arrays, and of the event itself


class KeysValues:
    """One chapter's keys and values, in the precision that the manifest names.

    In fp32 a graph writes them in place. In int8 each token and head of each layer has a scale of
    its own. Memory comes from the system and goes back to it: a budget is what the process takes.
    """

    def __init__(self, shape: KvShape, precision: Precision, tokens: int) -> None:
        self._shape = shape
        self._precision = precision
        self._allocate(self.rounded(tokens))

    @staticmethod
    def rounded(tokens: int) -> int:
        """Room for some more than so many tokens: growing copies what is there."""
        room = tokens + tokens // _GROWTH
        return -(-room // _STEP) * _STEP

    @staticmethod
    def bytes_for(shape: KvShape, precision: Precision, tokens: int) -> int:
        """Bytes of memory that a capacity of so many tokens takes."""
        rows = shape.parts * shape.heads * tokens
        per_row = {"fp32": 4 * shape.width, "fp16": 2 * shape.width, "int8": shape.width + 4}
        return _pages(rows * per_row[precision])

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.bytes_for(self._shape, self._precision, self.capacity)

    @property
    def in_place(self) -> NDArray[np.float32] | None:
        """What a graph may read and write itself: (parts, 1, heads, capacity, width) float32."""
        return self._values[:, None] if self._precision == "fp32" else None

    def grow(self, tokens: int) -> None:
        """Make room for so many tokens; what is there stays."""
        if tokens <= self.capacity:
            return
        values, scales, there = self._values, self._scales, self.capacity
        self._allocate(self.rounded(tokens))
        self._values[:, :, :there] = values
        if scales.size:
            self._scales[:, :, :there] = scales

    def load(self, into: NDArray[np.float32], tokens: int) -> None:
        """Copy the first tokens into (parts, heads, at least so many, width) float32."""
        into[:, :, :tokens] = self._values[:, :, :tokens]
        if self._scales.size:
            into[:, :, :tokens] *= self._scales[:, :, :tokens, None]

    def store(self, found: NDArray[np.float32], start: int, end: int) -> None:
        """Copy tokens from `start` to `end` out of (parts, heads, at least `end`, width)."""
        new = found[:, :, start:end]
        if self._precision == "int8":
            scales = np.maximum(np.abs(new).max(axis=-1), np.float32(1e-30)) / _LARGEST_INT8
            self._scales[:, :, start:end] = scales
            new = np.rint(new / scales[..., None])
        self._values[:, :, start:end] = new

    def write_away(self, path: Path) -> None:
        """Write everything into a file, and give the memory back."""
        with path.open("wb") as file:
            file.write(self._values.data)
            file.write(self._scales.data)
        self._allocate(0)

    def read_back(self, path: Path, capacity: int) -> None:
        """Read what `write_away` has written of so many tokens."""
        self._allocate(capacity)
        with path.open("rb", buffering=0) as file:
            file.readinto(self._values.data)
            file.readinto(self._scales.data)

    def _allocate(self, capacity: int) -> None:
        self.capacity = capacity
        shape = (self._shape.parts, self._shape.heads, capacity, self._shape.width)
        kind = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}[self._precision]
        count = int(np.prod(shape))
        scales = count // self._shape.width if self._precision == "int8" else 0
        memory = mmap.mmap(-1, max(self.nbytes, mmap.PAGESIZE))
        self._values: NDArray[Any] = np.frombuffer(memory, kind, count).reshape(shape)
        # Behind the values: (parts, heads, capacity) float32.
        self._scales: NDArray[np.float32] = np.frombuffer(
            memory, np.float32, scales, offset=count * self._values.itemsize
        ).reshape(*shape[:2], capacity if scales else 0)


@dataclass(frozen=True, slots=True, eq=False)
class EventState:
    """What one event adds to its chapter's sums, and where the model stood behind it."""

    pooled: NDArray[np.float32]  # (state_dim,)
    tokens: int
    end_state: NDArray[np.float32] | None  # (hidden,)
    surprise: EventSurprise | None  # of this event alone: (1, T)


@dataclass(slots=True, eq=False)
class OpenChapter:
    """A chapter as far as it was read: its tokens, and states and sums after its events."""

    kv: KeysValues
    events: tuple[Event, ...]
    tokens: TokenizedChapter
    states: list[EventState]
    sums: NDArray[np.float64]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.kv.nbytes + self.sums.nbytes + sum(map(_state_bytes, self.states))

    def shared(self, events: Sequence[Event]) -> int:
        """How many events this chapter and another begin with alike."""
        count = min(len(self.events), len(events))
        if self.events[:count] == tuple(events[:count]):
            return count
        return next(
            index
            for index, (one, other) in enumerate(zip(self.events, events, strict=False))
            if one != other
        )


class ChapterCache:
    """The open chapters of many entities, the least recently used first to go.

    Never more than `budget` bytes, what is being read included; what does not fit is not kept.
    With a folder and `spill_bytes`, chapters that must go are written there, and read back when
    their entity's next event comes.
    """

    def __init__(
        self, budget: int, *, spill_folder: Path | None = None, spill_bytes: int = 0
    ) -> None:
        self.budget = budget
        self.bytes = 0
        self.evictions = 0
        self._chapters: OrderedDict[str, OpenChapter] = OrderedDict()
        self._spill = _Spill(spill_folder, spill_bytes) if spill_folder and spill_bytes else None

    def __len__(self) -> int:
        return len(self._chapters)

    def peek(self, entity_id: str) -> OpenChapter | None:
        """Look at an entity's chapter without touching it; its keys may be on disk."""
        found = self._chapters.get(entity_id)
        return self._spill.peek(entity_id) if found is None and self._spill is not None else found

    def take(self, entity_id: str) -> tuple[OpenChapter | None, int]:
        """Take an entity's chapter out, to read on, and the bytes that stay reserved for it."""
        chapter = self._chapters.pop(entity_id, None)
        if chapter is not None:
            return chapter, chapter.nbytes
        spilled = self._spill.size(entity_id) if self._spill is not None else None
        if self._spill is None or spilled is None or not self.reserve(spilled):
            return None, 0
        return self._spill.take(entity_id), spilled

    def reserve(self, size: int) -> bool:
        """Let go of the least recently used until so many bytes are free, and reserve them.

        Tells whether there are so many. What is reserved goes back by `release` or `put`.
        """
        if size > self.budget:
            return False
        while self._chapters and self.bytes + size > self.budget:
            entity_id, chapter = self._chapters.popitem(last=False)
            self.bytes -= chapter.nbytes
            self.evictions += 1
            if self._spill is not None:
                self._spill.put(entity_id, chapter)
        if self.bytes + size > self.budget:
            return False
        self.bytes += size
        return True

    def release(self, size: int) -> None:
        """Give back what was reserved."""
        self.bytes -= size

    def put(self, entity_id: str, chapter: OpenChapter, *, reserved: int) -> None:
        """Keep a chapter as the newest, if it fits."""
        self.drop([entity_id])
        self.release(reserved)
        if self.reserve(chapter.nbytes):
            self._chapters[entity_id] = chapter

    def drop(self, entity_ids: Iterable[str]) -> None:
        """Forget what is kept of some entities."""
        for entity_id in entity_ids:
            chapter = self._chapters.pop(entity_id, None)
            if chapter is not None:
                self.bytes -= chapter.nbytes
            if self._spill is not None:
                self._spill.drop(entity_id)

    def drop_all(self) -> None:
        """Forget everything."""
        self.drop([*self._chapters, *(self._spill.entities() if self._spill is not None else ())])

    def close(self) -> None:
        """Forget everything, and remove what was spilled."""
        self.drop_all()
        if self._spill is not None:
            self._spill.close()


class _Spill:
    """Keys and values on local disk, in a folder of this process alone."""

    def __init__(self, folder: Path, budget: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(dir=folder, prefix="kv-"))
        self._budget = budget
        self._bytes = 0
        self._written = 0
        self._chapters: OrderedDict[str, _Spilled] = OrderedDict()

    def put(self, entity_id: str, chapter: OpenChapter) -> None:
        # What stays in memory beside keys and values counts too: so it is bounded as well.
        size = chapter.nbytes
        while self._chapters and self._bytes + size > self._budget:
            self.drop(next(iter(self._chapters)))
        if size > self._budget:
            return
        self._written += 1
        spilled = _Spilled(chapter, self._folder / str(self._written), chapter.kv.capacity, size)
        chapter.kv.write_away(spilled.path)
        self._chapters[entity_id] = spilled
        self._bytes += size

    def take(self, entity_id: str) -> OpenChapter | None:
        spilled = self._chapters.get(entity_id)
        if spilled is None:
            return None
        spilled.chapter.kv.read_back(spilled.path, spilled.capacity)
        self.drop(entity_id)
        return spilled.chapter

    def drop(self, entity_id: str) -> None:
        spilled = self._chapters.pop(entity_id, None)
        if spilled is not None:
            self._bytes -= spilled.size
            spilled.path.unlink(missing_ok=True)

    def peek(self, entity_id: str) -> OpenChapter | None:
        spilled = self._chapters.get(entity_id)
        return spilled.chapter if spilled is not None else None

    def entities(self) -> list[str]:
        return list(self._chapters)

    def size(self, entity_id: str) -> int | None:
        spilled = self._chapters.get(entity_id)
        return spilled.size if spilled is not None else None

    def close(self) -> None:
        self._chapters.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Spilled:
    chapter: OpenChapter
    path: Path
    capacity: int
    size: int


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _state_bytes(state: EventState) -> int:
    arrays: list[NDArray[Any] | None] = [state.pooled, state.end_state]
    if state.surprise is not None:
        one = state.surprise
        arrays += [one.nats, one.deviation, one.excess, one.present]
    return _OBJECT_BYTES + sum(array.nbytes for array in arrays if array is not None)

"""What the log says of some entities: every state of their windows, folded from its start."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llm4es.events import Record, TopicPartition
from llm4es.windows import Window
from stream_worker.folding import RecordFolder
from stream_worker.ops.logs import ReplayableLog, read_to_end

__all__ = ["History", "Sample", "read_histories"]


@dataclass(slots=True)
class History:
    """An entity's states in the order of the log: after each accepted event, and as it is now."""

    entity_id: str
    states: list[Window] = field(default_factory=list)  # since the newest tombstone
    now: Window | None = None  # after the last record, whatever it did
    ends: list[int] = field(default_factory=list)  # offset after each state's record
    partition: TopicPartition | None = None


class Sample:
    """The `size` entities with the smallest hashes: the same ones whoever comes first.

    Who was turned down never comes in later, so that what was kept of an entity is all of it.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = str(seed).encode()
        self._ranks: dict[str, int] = {}
        self._worst: str = ""

    def offer(self, entity_id: str) -> str | None:
        """Take an entity in, if its hash is small enough; give who has to go for it."""
        if entity_id in self._ranks:
            return None
        digest = hashlib.blake2b(entity_id.encode(), digest_size=8, key=self._seed).digest()
        rank = int.from_bytes(digest, "big")
        if len(self._ranks) >= self._size and rank > self._ranks[self._worst]:
            return entity_id
        self._ranks[entity_id] = rank
        gone: str | None = None
        if len(self._ranks) > self._size:
            gone = self._worst
            del self._ranks[gone]
        self._worst = max(self._ranks, key=lambda each: self._ranks[each])
        return gone

    def __contains__(self, entity_id: str) -> bool:
        return entity_id in self._ranks

    @property
    def entities(self) -> list[str]:
        """Who is in it."""
        return sorted(self._ranks)


def read_histories(
    source: ReplayableLog,
    folder: RecordFolder,
    sample: Sample,
    known: Iterable[str],
) -> dict[str, History]:
    """Fold the sampled entities' records from the log's start to its present end.

    `known` are entities that stores hold; those of the log are offered to the sample as well.
    `folder` must give a state for each event.
    """
    for held in known:
        sample.offer(held)
    kept: dict[str, list[Record]] = {}
    for records in read_to_end(source):
        for record in records:
            entity_id = _entity_of(record)
            if entity_id is None:
                continue
            kept.pop(sample.offer(entity_id) or "", None)
            if entity_id in sample:
                kept.setdefault(entity_id, []).append(record)
    return {
        entity_id: _fold(entity_id, kept.get(entity_id, []), folder)
        for entity_id in sample.entities
    }


def _entity_of(record: Record) -> str | None:
    try:
        return record.key.decode() if record.key else None
    except UnicodeDecodeError:
        return None


def _fold(entity_id: str, records: list[Record], folder: RecordFolder) -> History:
    history = History(entity_id)
    windows: dict[str, Window] = {}

    def load(ids: Sequence[str]) -> dict[str, Window]:
        return {each: windows.get(each, Window(entity_id=each)) for each in ids}

    for record in records:
        folding = folder.fold([record], load, {})
        if entity_id not in folding.changed:
            continue
        windows[entity_id] = folding.windows[entity_id]
        history.now = windows[entity_id]
        history.partition = record.topic_partition
        if history.now.deleted:
            history.states, history.ends = [], []
        elif folding.states:
            history.states.append(folding.states[-1])
            history.ends.append(record.offset + 1)
    return history

"""Records into windows: what a batch changes, and which of its records are bad."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from msgspec.structs import replace

from llm4es.bundle import Bundle
from llm4es.deletion import Tombstone
from llm4es.errors import InvalidEvent
from llm4es.events import (
    Event,
    Record,
    TopicPartition,
    coordinates_id,
    decode_object,
    entity_id_of_key,
    origin_of,
    parse_document,
)
from llm4es.windows import Outcome, Window, bury, fold
from stream_worker.formats.decoding import Decode
from stream_worker.ports import DeadLetter

__all__ = ["Coordinates", "Folding", "RecordFolder", "coordinates_of"]

Coordinates = tuple[TopicPartition, int]


@dataclass(slots=True)
class Folding:
    """A batch, folded: windows in their last state, and the states that become rows."""

    windows: dict[str, Window]
    states: list[Window] = field(default_factory=list)
    letters: list[DeadLetter] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)
    accepted: dict[str, list[tuple[Record, Event]]] = field(default_factory=dict)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    tombstones: dict[str, Tombstone] = field(default_factory=dict)
    redelivered: int = 0

    def delete(self, window: Window) -> None:
        """Take an entity's states out: no row at or before its tombstone may be published."""
        if window.as_of is not None:
            self.tombstones[window.entity_id] = Tombstone(
                entity_id=window.entity_id, as_of=window.as_of
            )
        self.states = [state for state in self.states if state.entity_id != window.entity_id]
        self.accepted.pop(window.entity_id, None)


@dataclass(frozen=True, slots=True)
class _Deletion:
    """What a record without a value asks for."""

    entity_id: str


def coordinates_of(record: Record) -> Coordinates:
    """Name a record by its place in the log."""
    return record.topic_partition, record.offset


class RecordFolder:
    """Folds batches into windows of one bundle.

    `availability_delay` is how long after it occurred an event is known, where the log keeps no
    timestamps; None where it keeps them: a record without one is bad then. Without `deletes` (no
    key is set for what deletion leaves) a tombstone is a bad record.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        max_value_bytes: int,
        availability_delay: timedelta | None,
        every_event: bool,
        deletes: bool = False,
        decode: Decode = decode_object,
    ) -> None:
        self._bundle = bundle
        self._max_value_bytes = max_value_bytes
        self._availability_delay = availability_delay
        self._every_event = every_event
        self._deletes = deletes
        self._decode = decode

    def fold(
        self,
        records: Sequence[Record],
        load: Callable[[Sequence[str]], dict[str, Window]],
        poison: Mapping[Coordinates, InvalidEvent],
    ) -> Folding:
        """Fold what is no duplicate and not late; what is bad, or poison, becomes a letter."""
        letters: list[DeadLetter] = []
        parsed: list[tuple[Record, Event | _Deletion]] = []
        for record in records:
            try:
                if poison and (cause := poison.get(coordinates_of(record))) is not None:
                    raise cause
                parsed.append((record, self._parse(record)))
            except InvalidEvent as cause:
                letters.append(DeadLetter(record, cause))
        entity_ids = sorted({event.entity_id for _, event in parsed})
        folding = Folding(windows=load(entity_ids), letters=letters)
        for record, event in parsed:
            try:
                self._fold_one(folding, record, event)
            except InvalidEvent as cause:
                folding.letters.append(DeadLetter(record, cause))
        if not self._every_event:
            folding.states = [folding.windows[entity_id] for entity_id in folding.accepted]
        return folding

    def fold_alone(self, record: Record, event: Event) -> Window:
        """Give the window that the event alone would make."""
        return self._fold_into(Window(entity_id=event.entity_id), record, event)[0]

    def _fold_one(self, folding: Folding, record: Record, event: Event | _Deletion) -> None:
        window = folding.windows[event.entity_id]
        here = window.partition == record.partition and window.topic == record.topic
        if window.topic is not None and not here:
            raise InvalidEvent(
                "partition",
                f"the entity's records stand in partition {window.partition} of {window.topic}, "
                f"this one in partition {record.partition} of {record.topic}",
            )
        if record.offset < window.next_offset:
            folding.redelivered += 1
            return
        folded, outcome = self._fold_into(window, record, event)
        folding.outcomes[outcome] += 1
        folding.windows[event.entity_id] = replace(
            folded,
            topic=record.topic,
            partition=record.partition,
            next_offset=record.offset + 1,
        )
        folding.changed.add(event.entity_id)
        if isinstance(event, _Deletion):
            folding.delete(folding.windows[event.entity_id])
        elif outcome is Outcome.ACCEPTED:
            folding.accepted.setdefault(event.entity_id, []).append((record, event))
            if self._every_event:
                folding.states.append(folding.windows[event.entity_id])

    def _fold_into(
        self, window: Window, record: Record, event: Event | _Deletion
    ) -> tuple[Window, Outcome]:
        if isinstance(event, _Deletion):
            return bury(window, recorded_at=self._recorded_at(record, None)), Outcome.DELETED
        folded = fold(
            window,
            event,
            recorded_at=self._recorded_at(record, event),
            policy=self._bundle.manifest.window,
            measure=self._bundle.tokens.measure,
            surely_fits=self._bundle.tokens.surely_fits,
        )
        return folded.window, folded.outcome

    def _parse(self, record: Record) -> Event | _Deletion:
        if record.value is None:
            if not self._deletes:
                raise InvalidEvent(
                    "value", "is null, a tombstone: set deletion_key and produce it again"
                )
            return _Deletion(entity_id_of_key(record.key))
        if len(record.value) > self._max_value_bytes:
            raise InvalidEvent(
                "value", f"{len(record.value)} bytes, max_value_bytes is {self._max_value_bytes}"
            )
        event = parse_document(
            self._decode(record.value),
            self._bundle.schema,
            entity=self._bundle.manifest.entity,
            coordinates=self._coordinates(record),
        )
        if record.key != event.entity_id.encode():
            raise InvalidEvent("key", "is not the entity's id in UTF-8")
        return event

    def _coordinates(self, record: Record) -> str | None:
        """Name the event where its payload does not."""
        if self._bundle.schema.event_id is not None:
            return None
        return coordinates_id(*origin_of(record)[:3])

    def _recorded_at(self, record: Record, event: Event | None) -> datetime:
        timestamp = origin_of(record).timestamp
        if timestamp is not None:
            return timestamp
        if self._availability_delay is None or event is None:
            raise InvalidEvent("timestamp", "the record has none, or one that is no time")
        return event.occurred_at + self._availability_delay

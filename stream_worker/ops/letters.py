"""Dead letters as ops handle them: read, told apart, tried again, and taken away."""

import base64
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llm4es.errors import ConfigError
from llm4es.events import Record
from stream_worker.ops.logs import read_to_end
from stream_worker.ops.writing import LogWriter, Outgoing
from stream_worker.sources.kafka import KafkaRecordSource
from stream_worker.sources.kafka_client import KafkaSettings, admin, kafka_partition, mapped

__all__ = ["Letter", "concerns", "read_letters", "take_away"]

_OURS = "llm4es."
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Letter:
    """A record that could not be folded, with its own coordinates and the reason."""

    record: Record  # of the dead-letter topic

    @property
    def coordinates(self) -> str:
        """Topic, partition and offset of the record itself."""
        return f"{self.told('topic')}/{self.told('partition')}/{self.told('offset')}"

    @property
    def key(self) -> bytes | None:
        """The record's own key."""
        return dict(self.record.headers).get(f"{_OURS}key")

    @property
    def headers(self) -> list[tuple[str, bytes]]:
        """The record's own headers."""
        return [
            (name, value or b"")
            for name, value in self.record.headers
            if not name.startswith(_OURS)
        ]

    @property
    def truncated(self) -> bool:
        """Whether only the beginning of its value is here: it cannot be tried again."""
        return f"{_OURS}truncated_from" in dict(self.record.headers)

    def told(self, name: str) -> str:
        """What the worker has noted: topic, partition, offset, field, reason."""
        return (dict(self.record.headers).get(f"{_OURS}{name}") or b"").decode(errors="replace")

    def document(self) -> dict[str, object]:
        """All of it; bytes are in base64, as in the file of dead letters."""
        return {
            "topic": self.told("topic"),
            "partition": int(self.told("partition") or -1),
            "offset": int(self.told("offset") or -1),
            "timestamp": self.record.timestamp,
            "field": self.told("field"),
            "reason": self.told("reason"),
            "headers": [(name, _base64(value)) for name, value in self.headers],
            "key": _base64(self.key),
            "value": _base64(self.record.value),
        }


def read_letters(settings: KafkaSettings, topic: str) -> Iterator[Letter]:
    """Give every letter of the topic, once per record: a letter may have been parked twice."""
    source = KafkaRecordSource(settings, topic, None)
    seen: set[str] = set()
    try:
        for records in read_to_end(source):
            for record in records:
                letter = Letter(record)
                if letter.coordinates not in seen:
                    seen.add(letter.coordinates)
                    yield letter
    finally:
        source.close()


def concerns(record: Record, entity_id: str) -> bool:
    """Whether an id stands, as a whole word, in a letter's key, value or headers."""
    word = re.compile(
        rb"(?<![0-9A-Za-z_-])" + re.escape(entity_id.encode()) + rb"(?![0-9A-Za-z_-])"
    )
    parts = [record.key, record.value, *(value for _, value in record.headers)]
    return any(part is not None and word.search(part) for part in parts)


def take_away(settings: KafkaSettings, topic: str, gone: Callable[[Record], bool]) -> int:
    """Take letters out of a topic, and give their number.

    Kafka deletes from a partition's beginning alone: what stays is appended anew, then all that
    was there before is deleted. Killed between the two, letters stand twice, which they may.
    """
    taken = 0
    for _ in range(_ROUNDS):  # the worker may park more meanwhile
        source = KafkaRecordSource(settings, topic, None)
        try:
            records = [record for batch in read_to_end(source) for record in batch]
            ends = source.positions()
        finally:
            source.close()
        found = [record for record in records if gone(record)]
        if not found:
            return taken
        taken += len(found)
        _append(settings, [record for record in records if not gone(record)])
        with admin(settings) as client, mapped():
            client.delete_records({kafka_partition(*tp): at for tp, at in ends.items()})
    raise ConfigError("dead_letter_topic", "letters of the entity keep coming", "run it again")


def _append(settings: KafkaSettings, records: list[Record]) -> None:
    writer = LogWriter(settings)
    try:
        writer.append(
            [
                Outgoing(
                    topic=record.topic,
                    partition=record.partition,
                    key=record.key,
                    value=record.value,
                    headers=[(name, value or b"") for name, value in record.headers],
                )
                for record in records
            ]
        )
    finally:
        writer.close()


def _base64(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()

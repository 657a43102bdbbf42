"""Where bad records wait: a Kafka topic, or a JSONL file beside the embedded log.

A letter is the record's original bytes, with its coordinates and the reason; at least once, so
a reader tells letters apart by their coordinates.
"""

import base64
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from llm4es.errors import ConfigError, SinkUnavailable
from stream_worker.ports import DeadLetter
from stream_worker.sources.kafka_client import (
    KafkaError,
    KafkaProducer,
    KafkaSettings,
    admin,
    topic_configs,
    translate,
)

__all__ = ["FileDeadLetters", "KafkaDeadLetters"]

_OVERHEAD_BYTES = 16 << 10  # headers and key that a letter has on top of its record
_FLUSH_TIMEOUT_S = 30.0


class KafkaDeadLetters:
    """Letters in a topic: value and headers of the record, and ours beside them.

    Headers: `llm4es.topic`, `.partition`, `.offset`, `.timestamp_ms`, `.field`, `.reason` and
    `.key` (the record's own; absent where it had none). The letter's key is its coordinates.
    Raises ConfigError at start for a topic that is not there, or too small for the source's
    largest record.
    """

    def __init__(self, settings: KafkaSettings, topic: str, *, source_topic: str) -> None:
        self._topic = topic
        largest = _refuse_small_topic(settings, topic, source_topic)
        try:
            self._producer = KafkaProducer(
                **settings.client_config(),
                acks="all",
                enable_idempotence=True,
                max_request_size=largest + _OVERHEAD_BYTES,
                metrics_enabled=False,
            )
        except KafkaError as error:
            raise translate(error) from error

    def park(self, letters: Sequence[DeadLetter]) -> None:
        """Send, and wait until the brokers have them all."""
        try:
            sent = [
                self._producer.send(
                    self._topic,
                    key=_coordinates(letter).encode(),
                    value=letter.record.value,
                    headers=_headers(letter),
                )
                for letter in letters
            ]
            self._producer.flush(timeout=_FLUSH_TIMEOUT_S)
            for future in sent:
                future.get(timeout=_FLUSH_TIMEOUT_S)
        except KafkaError as error:
            msg = f"dead letters cannot be parked in {self._topic} ({error})"
            raise SinkUnavailable(msg) from error

    def close(self) -> None:
        """Close the producer; nothing waits in it between batches."""
        self._producer.close(timeout=_FLUSH_TIMEOUT_S)


class FileDeadLetters:
    """Letters as lines of JSON; the record's bytes are in base64."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")

    def park(self, letters: Sequence[DeadLetter]) -> None:
        """Append, and wait until the disk has them."""
        try:
            for letter in letters:
                self._file.write(msgspec.json.encode(_document(letter)) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            msg = f"dead letters cannot be written ({error})"
            raise SinkUnavailable(msg) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _refuse_small_topic(settings: KafkaSettings, topic: str, source_topic: str) -> int:
    """Largest record of the source topic, which the dead-letter topic must accept."""
    with admin(settings) as client:
        if topic not in client.list_topics():
            raise ConfigError(
                "dead_letter_topic",
                f"Kafka knows no topic {topic!r}",
                "create it, with max.message.bytes a little above the source topic's",
            )
        largest = int(topic_configs(client, source_topic)["max.message.bytes"])
        accepted = int(topic_configs(client, topic)["max.message.bytes"])
    if accepted < largest + _OVERHEAD_BYTES:
        raise ConfigError(
            "dead_letter_topic",
            f"{topic} takes {accepted} bytes, and records of {source_topic} up to {largest}, to "
            "which a letter adds its headers",
            f"set max.message.bytes of {topic} to {largest + _OVERHEAD_BYTES}",
        )
    return largest


def _coordinates(letter: DeadLetter) -> str:
    record = letter.record
    return f"{record.topic}/{record.partition}/{record.offset}"


def _headers(letter: DeadLetter) -> list[tuple[str, bytes]]:
    record, cause = letter.record, letter.cause
    ours = {
        "topic": record.topic,
        "partition": str(record.partition),
        "offset": str(record.offset),
        "field": cause.field,
        "reason": cause.reason,
    }
    if record.timestamp is not None:
        ours["timestamp_ms"] = str(round(record.timestamp.timestamp() * 1000))
    headers = [(f"llm4es.{name}", value.encode()) for name, value in ours.items()]
    if record.key is not None:
        headers.append(("llm4es.key", record.key))
    return [*record.headers, *headers]


def _document(letter: DeadLetter) -> dict[str, object]:
    record, cause = letter.record, letter.cause
    return {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "timestamp": record.timestamp,
        "field": cause.field,
        "reason": cause.reason,
        "key": _base64(record.key),
        "value": _base64(record.value),
    }


def _base64(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()

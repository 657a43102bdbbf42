"""Where bad records wait: a Kafka topic, or a JSONL file beside the embedded log.

A letter is the record's original bytes, with its coordinates and the reason; at least once, so
a reader tells letters apart by their coordinates.
"""

import base64
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from llm4es.errors import ConfigError, SinkUnavailable, SourceUnavailable
from stream_worker.ports import DeadLetter
from stream_worker.sources.kafka_client import (
    TOO_LARGE,
    KafkaError,
    KafkaProducer,
    KafkaSettings,
    admin,
    connecting,
    topic_configs,
    translate,
)

__all__ = ["FileDeadLetters", "KafkaDeadLetters"]

log = logging.getLogger(__name__)

_Headers = list[tuple[str, bytes]]
_Parcel = tuple[DeadLetter, bytes | None, _Headers]

_OVERHEAD_BYTES = 16 << 10  # headers and key that a letter has on top of its record
_LARGEST_LETTER_BYTES = 64 << 20  # before compression; brokers take requests of 100 MB
_FLUSH_TIMEOUT_S = 30.0
_SEND_TIMEOUT_MS = 10_000  # for the topic's metadata


class KafkaDeadLetters:
    """Letters in a topic: value and headers of the record, and ours beside them.

    Headers: `llm4es.topic`, `.partition`, `.offset`, `.timestamp_ms`, `.field`, `.reason` and
    `.key` (the record's own; absent where it had none). `.null_headers` has the places, from 0,
    of the record's headers that were null, which stand here empty. The letter's key is its
    coordinates. A record that does not fit, however it is compressed, is cut, and
    `.truncated_from` says how many bytes its value had (ADR 0006).
    Raises ConfigError at start for a topic that is not there, or too small for the source's
    largest record.
    """

    def __init__(self, settings: KafkaSettings, topic: str, *, source_topic: str) -> None:
        self._settings = settings
        self._topic = topic
        self._source_topic = source_topic
        self._largest = _refuse_small_topic(settings, topic, source_topic)
        with connecting(settings):
            self._producer = KafkaProducer(
                **settings.client_config(),
                acks="all",
                # Letters may come twice, and to an idempotent producer of kafka-python a record
                # that is too large is fatal: it would send nothing more.
                enable_idempotence=False,
                max_block_ms=_SEND_TIMEOUT_MS,
                # Topics bound what is compressed: a record may be far larger when it is read.
                compression_type="gzip",
                max_request_size=_LARGEST_LETTER_BYTES + _OVERHEAD_BYTES,
                metrics_enabled=False,
            )

    def park(self, letters: Sequence[DeadLetter]) -> None:
        """Send, and wait until the brokers have them all."""
        whole: list[DeadLetter] = []
        cut: list[DeadLetter] = []
        for letter in letters:
            (cut if _size(letter) > _LARGEST_LETTER_BYTES else whole).append(letter)
        refused = self._send([(letter, *_whole(letter)) for letter in whole])
        for letter in (*cut, *refused):
            place = _coordinates(letter)
            log.warning("the dead letter of %s does not fit, and is cut", place)
        still = self._send([(each, *_cut(each, self._largest)) for each in (*cut, *refused)])
        if still:
            raise ConfigError(
                "dead_letter_topic",
                f"{self._topic} does not take even a cut letter",
                f"set its max.message.bytes to {self._largest + _OVERHEAD_BYTES}",
            )

    def close(self) -> None:
        """Close the producer; nothing waits in it between batches."""
        self._producer.close(timeout=_FLUSH_TIMEOUT_S)

    def _send(self, parcels: Sequence[_Parcel]) -> list[DeadLetter]:
        """Send, and give those that are too large for the topic."""
        refused = []
        try:
            sent = [
                (
                    letter,
                    self._producer.send(
                        self._topic,
                        key=_coordinates(letter).encode(),
                        value=value,
                        headers=headers,
                    ),
                )
                for letter, value, headers in parcels
            ]
            self._producer.flush(timeout=_FLUSH_TIMEOUT_S)
            for letter, future in sent:
                try:
                    future.get(timeout=_FLUSH_TIMEOUT_S)
                except TOO_LARGE:
                    refused.append(letter)
        except KafkaError as error:
            raise self._translated(error) from error
        return refused

    def _translated(self, error: KafkaError) -> ConfigError | SinkUnavailable:
        ours = translate(error)
        if isinstance(ours, ConfigError):
            return ConfigError("dead_letter_topic", f"{self._topic}: {ours.problem}", ours.remedy)
        try:
            # A topic that was deleted is told from brokers that are away by asking.
            _refuse_small_topic(self._settings, self._topic, self._source_topic)
        except ConfigError as found:
            return found
        except SourceUnavailable:
            pass
        return SinkUnavailable(f"dead letters cannot be parked in {self._topic} ({error})")


class FileDeadLetters:
    """Letters as lines of JSON; the record's bytes are in base64."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
        except OSError as error:
            raise ConfigError(
                "state_dir",
                f"{path} cannot be written ({error.strerror})",
                "name a folder that this user may write: --state-dir",
            ) from error

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


def _size(letter: DeadLetter) -> int:
    record = letter.record
    headers = sum(len(name) + len(value or b"") for name, value in record.headers)
    return len(record.value or b"") + len(record.key or b"") + headers


def _whole(letter: DeadLetter) -> tuple[bytes | None, _Headers]:
    record = letter.record
    headers = [(name, value or b"") for name, value in record.headers] + _headers(letter)
    if record.key is not None:
        headers.append(("llm4es.key", record.key))
    return record.value, headers


def _cut(letter: DeadLetter, largest: int) -> tuple[bytes, _Headers]:
    """Half of what the topic takes for the beginning of the value, a quarter for the key's."""
    record = letter.record
    value = record.value or b""
    headers = [*_headers(letter), ("llm4es.truncated_from", str(len(value)).encode())]
    if record.key is not None:
        headers.append(("llm4es.key", record.key[: largest // 4]))
    return value[: largest // 2], headers


def _headers(letter: DeadLetter) -> _Headers:
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
    null = [str(place) for place, (_, value) in enumerate(record.headers) if value is None]
    if null:
        ours["null_headers"] = ",".join(null)
    return [(f"llm4es.{name}", value.encode()) for name, value in ours.items()]


def _document(letter: DeadLetter) -> dict[str, object]:
    record, cause = letter.record, letter.cause
    return {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "timestamp": record.timestamp,
        "field": cause.field,
        "reason": cause.reason,
        "headers": [(name, _base64(value)) for name, value in record.headers],
        "key": _base64(record.key),
        "value": _base64(record.value),
    }


def _base64(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()

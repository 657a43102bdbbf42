"""The log as ops read it: by a group of nobody, so that no live worker's offsets move."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from llm4es.bundle import Bundle
from llm4es.errors import ConfigError, InvalidEvent
from llm4es.events import NO_OFFSETS, Record, TopicPartition, parse_event
from llm4es.feast import FeastSink
from stream_worker.connections import kafka_settings
from stream_worker.settings import WorkerSettings
from stream_worker.sources.files import FileLog, FileRecordSource
from stream_worker.sources.kafka import KafkaRecordSource
from stream_worker.sources.kafka_client import KafkaSettings

__all__ = [
    "ReplayableLog",
    "kafka_of",
    "moments_of",
    "open_log",
    "read_to_end",
    "refuse_file",
    "topic_of",
]

ReplayableLog = KafkaRecordSource | FileRecordSource

_POLL_S = 0.2
_POLLED = 4096


def kafka_of(settings: WorkerSettings, named: FeastSink) -> KafkaSettings:
    """How Kafka is reached."""
    return kafka_settings(settings, settings.bootstrap_servers or named.bootstrap_servers)


def topic_of(settings: WorkerSettings, named: FeastSink) -> str:
    """Topic of events."""
    return settings.topic or named.topic


def open_log(
    settings: WorkerSettings, bundle: Bundle, named: FeastSink, *, log: str | None = None
) -> ReplayableLog:
    """Open the settings' log, or files at `log` (a path or an address) instead.

    Raises ConfigError, SourceUnavailable.
    """
    if log is None and settings.source == "kafka":
        return KafkaRecordSource(kafka_of(settings, named), topic_of(settings, named), None)
    place: Path | str | None = settings.events if log is None else log
    if isinstance(place, str) and "://" not in place and Path(place).is_file():
        place = Path(place)
    if place is None:
        raise ConfigError("events", "--source file needs a log", "name it with --events")
    return FileRecordSource(
        FileLog(
            path=place,
            key_field=bundle.schema.entity(bundle.manifest.entity).field,
            partitions=settings.partitions,
            recorded_at_field=settings.recorded_at_field,
        )
    )


def refuse_file(settings: WorkerSettings, what: str) -> None:
    """Refuse what needs a topic that can be written to. Raises ConfigError."""
    if settings.source == "file":
        raise ConfigError("source", f"{what} is written into a topic, a file is only read", "kafka")


def moments_of(settings: WorkerSettings, bundle: Bundle) -> Callable[[Record], datetime | None]:
    """When the log got a record; where it keeps no timestamps, when its event was known."""
    delay = timedelta(milliseconds=settings.availability_delay_ms)

    def moment_of(record: Record) -> datetime | None:
        if record.timestamp is not None or record.value is None:
            return record.timestamp
        try:
            event = parse_event(
                record.value, bundle.schema, entity=bundle.manifest.entity, coordinates="0"
            )
        except InvalidEvent:
            return None
        return event.occurred_at + delay

    return moment_of


class _From:
    """A listener that reads from where it is told, else from each partition's start."""

    def __init__(self, firsts: Mapping[int, int], starts: Mapping[TopicPartition, int]) -> None:
        self._firsts = firsts
        self._starts = starts

    def assigned(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        return {
            tp: max(self._starts.get(tp, 0), self._firsts.get(tp.partition, 0)) for tp in partitions
        }

    def revoked(self, partitions: Sequence[TopicPartition]) -> None:
        """Nothing is kept of them."""


def read_to_end(
    source: ReplayableLog, *, starts: Mapping[TopicPartition, int] = NO_OFFSETS
) -> Iterator[list[Record]]:
    """Give every record up to the log's present end, in batches; once per opened source."""
    firsts = {partition: span.first for partition, span in source.describe().spans.items()}
    source.subscribe(_From(firsts, starts))
    while True:
        records = list(source.poll(_POLLED, _POLL_S))
        if records:
            yield records
        elif source.remaining() == 0:
            return

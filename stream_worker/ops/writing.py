"""What ops append to the topic of events: tombstones, and records that are tried again."""

from collections.abc import Sequence
from dataclasses import dataclass

from stream_worker.sources.kafka_client import (
    KafkaError,
    KafkaProducer,
    KafkaSettings,
    connecting,
    translate,
)

__all__ = ["LogWriter", "Outgoing"]

_LARGEST = 64 << 20
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A record to append; without a partition its key decides."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()
    partition: int | None = None
    timestamp_ms: int | None = None


class LogWriter:
    """Appends records, and returns when the brokers have them.

    Raises ConfigError, SourceUnavailable.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        with connecting(settings):
            self._producer = KafkaProducer(
                **settings.client_config(),
                acks="all",
                enable_idempotence=False,  # to it a record that is too large would be fatal
                max_request_size=_LARGEST,
                metrics_enabled=False,
            )

    def append(self, records: Sequence[Outgoing]) -> list[tuple[int, int]]:
        """Give partition and offset of each."""
        try:
            sent = [
                self._producer.send(
                    each.topic,
                    key=each.key,
                    value=each.value,
                    headers=list(each.headers),
                    partition=each.partition,
                    timestamp_ms=each.timestamp_ms,
                )
                for each in records
            ]
            self._producer.flush(timeout=_TIMEOUT_S)
            found = [future.get(timeout=_TIMEOUT_S) for future in sent]
        except KafkaError as error:
            raise translate(error) from error
        return [(each.partition, each.offset) for each in found]

    def close(self) -> None:
        """Close the producer; nothing waits in it."""
        self._producer.close(timeout=_TIMEOUT_S)

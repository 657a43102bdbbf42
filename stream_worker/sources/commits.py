"""A consumer group's offsets, committed while the worker goes on."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from llm4es.events import TopicPartition
from stream_worker.sources.kafka_client import (
    KafkaConsumer,
    KafkaError,
    OffsetAndMetadata,
    kafka_partition,
)

__all__ = ["CALL_MS", "GroupCommits"]

log = logging.getLogger(__name__)

# Of one question to the brokers. Without it kafka-python asks for ever, and as its heartbeats go on
# meanwhile, the whole group would wait for us.
CALL_MS = 10_000


class GroupCommits:
    """The group's offsets: one request on its way at a time, what comes meanwhile in the next.

    A failure is logged and not tried again by itself: the windows decide, and more come.
    """

    def __init__(self, consumer: KafkaConsumer) -> None:
        self._consumer = consumer
        self._open: dict[TopicPartition, int] = {}  # not known to be committed
        self._sent: tuple[dict[TopicPartition, int], Any] | None = None  # and kafka-python's future
        self._waiting = False  # some of the open ones were never sent

    def send(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Send these, now or behind the one on its way."""
        self._open |= next_offsets
        self._waiting = True
        self.look()

    def look(self) -> None:
        """Note how the one on its way ended; send what has waited for that."""
        if self._sent is not None:
            offsets, future = self._sent
            if not future.is_done:
                return
            self._sent = None
            if future.succeeded():
                self._open = {tp: at for tp, at in self._open.items() if offsets.get(tp) != at}
            else:
                _warn_of_offsets(future.exception)
        if self._waiting and self._open:
            self._waiting = False
            offsets = dict(self._open)
            try:
                self._sent = offsets, self._consumer.commit_async(_as_kafka_has_them(offsets))
            except KafkaError as error:
                _warn_of_offsets(error)

    def finish(self) -> None:
        """Commit what is open, and wait for it."""
        self.look()
        if not self._open:
            return
        self._sent, self._waiting = None, False
        try:
            self._consumer.commit(_as_kafka_has_them(self._open), timeout_ms=CALL_MS)
        except KafkaError as error:
            _warn_of_offsets(error)
        self._open = {}

    def forget(self, partitions: Iterable[TopicPartition]) -> None:
        """These are another worker's by now."""
        for tp in partitions:
            self._open.pop(tp, None)


def _as_kafka_has_them(next_offsets: Mapping[TopicPartition, int]) -> dict[Any, Any]:
    return {
        kafka_partition(*tp): OffsetAndMetadata(offset, "", -1)
        for tp, offset in next_offsets.items()
    }


def _warn_of_offsets(error: BaseException) -> None:
    log.warning("offsets were not committed (%s); the windows hold them", error)

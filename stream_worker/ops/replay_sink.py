"""Where a replay's rows and bad records go: never over what is newer, never into live notes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from llm4es.deletion import Tombstone
from llm4es.events import NO_OFFSETS, NO_SPANS, OffsetSpans, TopicPartition
from llm4es.features import FeatureRow
from stream_worker.ports import DeadLetter, FeatureSink

__all__ = ["Into", "LetterCount", "ReplaySink"]

Into = Literal["view", "offline", "nowhere"]


class ReplaySink:
    """`ports.FeatureSink` over a live view's, or over nothing.

    It notes no offsets online: what the live worker has noted there is its own.
    """

    def __init__(self, sink: FeatureSink | None, into: Into) -> None:
        self._sink = sink if into != "nowhere" else None
        self._online = into == "view"
        self.journalled = 0
        self.published_rows = 0

    def journal(self, rows: Sequence[FeatureRow], spans: OffsetSpans = NO_SPANS) -> None:
        """Append to the offline log, where rows go there."""
        if self._sink is not None:
            self._sink.journal(rows, spans)
            self.journalled += len(rows)

    def publish(
        self,
        rows: Sequence[FeatureRow],
        *,
        reached: Mapping[TopicPartition, int] = NO_OFFSETS,  # noqa: ARG002
        held: Mapping[TopicPartition, int] = NO_OFFSETS,  # noqa: ARG002
    ) -> None:
        """Publish each row that is newer than the one that stands, where rows go online."""
        if self._sink is not None and self._online:
            self._sink.publish(rows)
            self.published_rows += len(rows)

    def republish(
        self, batches: Iterable[Sequence[FeatureRow]], reached: Mapping[TopicPartition, int]
    ) -> None:
        """Nothing is ever missing: no offsets are noted."""

    def published(self, topic: str) -> Mapping[TopicPartition, int] | None:  # noqa: ARG002
        """Nothing is noted."""
        return None

    def delete(self, tombstones: Sequence[Tombstone]) -> None:
        """Delete what the log says is deleted; a newer row stays."""
        if self._sink is not None:
            self._sink.delete(tombstones)

    def read(self, entity_ids: Sequence[str]) -> Sequence[FeatureRow | None]:
        """Online rows, where there are any."""
        return [None] * len(entity_ids) if self._sink is None else self._sink.read(entity_ids)

    def close(self) -> None:
        """Nothing: who opened the sink closes it."""


class LetterCount:
    """`ports.DeadLetters` that counts: the live worker has parked them."""

    def __init__(self) -> None:
        self.by_field: dict[str, int] = {}

    def park(self, letters: Sequence[DeadLetter]) -> None:
        """Count."""
        for letter in letters:
            name = letter.cause.field
            self.by_field[name] = self.by_field.get(name, 0) + 1

    def close(self) -> None:
        """Nothing to let go."""

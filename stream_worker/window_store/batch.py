"""What a batch wants written, kept in memory until its block ends."""

from collections.abc import Callable, Iterable, Mapping

from llm4es.errors import StoreLost
from llm4es.events import TopicPartition
from llm4es.windows import Window

__all__ = ["Batch", "refuse_lost"]


class Batch:
    """See `ports.WindowTransaction`; the store writes `pending` and `next_offsets`."""

    def __init__(
        self,
        load: Callable[[Iterable[str]], dict[str, Window]],
        offsets: Callable[[str], dict[TopicPartition, int]],
        held: Mapping[TopicPartition, int],
    ) -> None:
        self._load = load
        self._offsets = offsets
        self.held = held
        self.pending: dict[str, Window] = {}
        self.next_offsets: dict[TopicPartition, int] = {}

    def load(self, entity_ids: Iterable[str]) -> dict[str, Window]:
        """Read windows; an entity that has none gets an empty one of version 0."""
        windows = self._load(entity_ids)
        # After the windows: a loss before they were read cannot hide behind what was looked at.
        for topic in {tp.topic for tp in self.held}:
            refuse_lost(topic, self.held, self._offsets(topic))
        return windows

    def put(self, window: Window) -> None:
        """Write the window when the block ends, if its version still stands in the store."""
        self.pending[window.entity_id] = window

    def advance(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Write the store's offsets when the block ends, after all windows."""
        self.next_offsets.update(next_offsets)


def refuse_lost(
    topic: str, held: Mapping[TopicPartition, int], found: Mapping[TopicPartition, int]
) -> None:
    """Raise StoreLost where the store is behind what it was known to hold of a topic."""
    for tp, at in held.items():
        if tp.topic == topic and found.get(tp, 0) < at:
            msg = (
                f"the window store holds partition {tp.partition} of {topic} up to "
                f"{found.get(tp, 0)}, and held it up to {at}"
            )
            raise StoreLost(msg)

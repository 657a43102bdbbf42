"""What a batch wants written, kept in memory until its block ends."""

from collections.abc import Callable, Iterable, Mapping

from llm4es.events import TopicPartition
from llm4es.windows import Window

__all__ = ["Batch"]


class Batch:
    """See `ports.WindowTransaction`; the store writes `pending` and `next_offsets`."""

    def __init__(self, load: Callable[[Iterable[str]], dict[str, Window]]) -> None:
        self._load = load
        self.pending: dict[str, Window] = {}
        self.next_offsets: dict[TopicPartition, int] = {}

    def load(self, entity_ids: Iterable[str]) -> dict[str, Window]:
        """Read windows; an entity that has none gets an empty one of version 0."""
        return self._load(entity_ids)

    def put(self, window: Window) -> None:
        """Write the window when the block ends, if its version still stands in the store."""
        self.pending[window.entity_id] = window

    def advance(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Write the store's offsets when the block ends, after all windows."""
        self.next_offsets.update(next_offsets)

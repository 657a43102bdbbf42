"""Windows that were written last, kept decoded: the next batch of their entities needs no store."""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence

from msgspec.structs import replace

from llm4es.events import TopicPartition
from llm4es.windows import Window
from stream_worker.ports import WindowTransaction

__all__ = ["HotWindows"]


class HotWindows:
    """The least recently used go first, so that at most `max_events` events are kept.

    What is kept is a copy of the store's record, of partitions that are read here: it must be
    dropped where another worker may have written since (`Fenced`, a partition that was taken
    away) and where the store may hold less (`StoreLost`).
    """

    def __init__(self, max_events: int) -> None:
        self._max_events = max_events
        self._windows: OrderedDict[str, Window] = OrderedDict()
        self.events = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._windows)

    def load(self, entity_ids: Sequence[str], txn: WindowTransaction) -> dict[str, Window]:
        """Give each entity's window: one that is kept, else the store's."""
        found = {each: self._windows[each] for each in entity_ids if each in self._windows}
        missing = [each for each in entity_ids if each not in found]
        self.hits += len(found)
        self.misses += len(missing)
        return found | txn.load(missing) if missing else found

    def keep(self, windows: Iterable[Window]) -> None:
        """Keep windows that were written just now, with the version that the store gave them."""
        for window in windows:
            self._forget(window.entity_id)
            self._windows[window.entity_id] = replace(window, version=window.version + 1)
            self.events += _size(window)
        while self.events > self._max_events and self._windows:
            self._forget(next(iter(self._windows)))

    def drop(self, partitions: Collection[TopicPartition] | None = None) -> None:
        """Forget the windows of these partitions, or all of them."""
        gone = [
            entity_id
            for entity_id, window in self._windows.items()
            if partitions is None or (window.topic, window.partition) in partitions
        ]
        for entity_id in gone:
            self._forget(entity_id)

    def _forget(self, entity_id: str) -> None:
        window = self._windows.pop(entity_id, None)
        if window is not None:
            self.events -= _size(window)


def _size(window: Window) -> int:
    return 1 + sum(len(chapter.events) for chapter in window.chapters)

"""What an audit puts right: windows and rows, as long as what was found wrong still stands."""

from collections.abc import Sequence

from msgspec.structs import replace

from llm4es.deletion import Tombstone
from llm4es.errors import Fenced, StoreLost
from llm4es.feast import FeastSink
from stream_worker.ops.verdicts import Finding, Seen
from stream_worker.ports import WindowStore

__all__ = ["Repairs"]


class Repairs:
    """Writes what the log gives to a view's stores. `deletes`: orphans may be taken away."""

    def __init__(self, store: WindowStore, sink: FeastSink, *, deletes: bool) -> None:
        self._store = store
        self._sink = sink
        self._deletes = deletes

    def put_right(self, seen: Seen, findings: Sequence[Finding]) -> bool:
        """Put right what can be: the window, then the rows. Whether all of it was."""
        done = True
        for place in ("window", "offline", "online"):
            wrong = [each for each in findings if each.place == place]
            if not wrong:
                continue
            if place == "window":
                done &= self._window(seen)
            elif place == "offline":
                done &= self._offline(seen, wrong)
            else:
                done &= self._online(seen)
        return done

    def _window(self, seen: Seen) -> bool:
        if seen.due_window is None:
            return False
        entity_id = seen.due_window.entity_id
        try:
            with self._store.begin() as txn:
                standing = txn.load([entity_id])[entity_id]
                if standing.version != (0 if seen.window is None else seen.window.version):
                    return False
                txn.put(replace(seen.due_window, version=standing.version))
        except (Fenced, StoreLost):
            return False
        return True

    def _offline(self, seen: Seen, wrong: list[Finding]) -> bool:
        if any(each.kind != "missing" for each in wrong) or not seen.rows:
            return False  # a wrong row has to be taken out of its part
        self._sink.journal([seen.rows[max(seen.rows)]])
        return True

    def _online(self, seen: Seen) -> bool:
        if seen.history.states:
            row = seen.rows[len(seen.history.states) - 1]
            stood = None if seen.online is None else seen.online.as_of
            return not self._sink.replace([row], [stood])
        if seen.online is None or not self._deletes:
            return False
        self._sink.delete([Tombstone(entity_id=seen.online.entity_id, as_of=seen.online.as_of)])
        return True

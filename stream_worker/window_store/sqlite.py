"""Windows in one SQLite file: for a single worker, with no server."""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llm4es.errors import Fenced, SinkUnavailable
from llm4es.events import TopicPartition
from llm4es.windows import Window
from stream_worker.ports import LogIdentity, WindowTransaction
from stream_worker.window_store.batch import Batch
from stream_worker.window_store.codec import decode_window, encode_window

__all__ = ["SqliteWindowStore"]

_TABLES = """
CREATE TABLE IF NOT EXISTS windows (
  bundle TEXT, entity TEXT, version INTEGER NOT NULL, record BLOB NOT NULL,
  PRIMARY KEY (bundle, entity)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS offsets (
  bundle TEXT, topic TEXT, partition INTEGER, next_offset INTEGER NOT NULL,
  PRIMARY KEY (bundle, topic, partition)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS logs (
  bundle TEXT, topic TEXT, topic_id TEXT NOT NULL, partitions INTEGER NOT NULL,
  PRIMARY KEY (bundle, topic)) WITHOUT ROWID;
"""
_BUSY_TIMEOUT_S = 10.0
_CHUNK = 500  # SQLite's limit on parameters of one statement is 999 in old builds


class SqliteWindowStore:
    """See `ports.WindowStore`. A batch's windows and offsets are one SQLite transaction."""

    def __init__(self, path: Path, bundle_id: str) -> None:
        self._bundle = bundle_id
        with _mapped():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.executescript(_TABLES)

    @contextmanager
    def begin(self) -> Iterator[WindowTransaction]:
        """Open a batch; the windows are written when the block ends without an exception."""
        transaction = Batch(self.load)
        yield transaction
        with _mapped():
            self._write(transaction.pending, transaction.next_offsets)

    def read(self, entity_id: str) -> Window | None:
        """Read one window outside of any batch."""
        window = self.load([entity_id])[entity_id]
        return window if window.version else None

    def load(self, entity_ids: Iterable[str]) -> dict[str, Window]:
        """Read windows; an entity that has none gets an empty one."""
        wanted = list(entity_ids)
        windows = {entity_id: Window(entity_id=entity_id) for entity_id in wanted}
        with _mapped():
            for start in range(0, len(wanted), _CHUNK):
                chunk = wanted[start : start + _CHUNK]
                marks = ",".join("?" * len(chunk))
                query = (
                    "SELECT entity, version, record FROM windows "  # noqa: S608 - marks only
                    f"WHERE bundle = ? AND entity IN ({marks})"
                )
                for entity, version, record in self._connection.execute(
                    query, [self._bundle, *chunk]
                ):
                    windows[entity] = decode_window(entity, version, record)
        return windows

    def offsets(self, topic: str) -> dict[TopicPartition, int]:
        """Next offset per partition up to which this store holds the log."""
        with _mapped():
            rows = self._connection.execute(
                "SELECT partition, next_offset FROM offsets WHERE bundle = ? AND topic = ?",
                (self._bundle, topic),
            ).fetchall()
        return {TopicPartition(topic, partition): at for partition, at in rows}

    def identity(self, topic: str) -> LogIdentity | None:
        """Which log the windows were folded from."""
        with _mapped():
            row = self._connection.execute(
                "SELECT topic_id, partitions FROM logs WHERE bundle = ? AND topic = ?",
                (self._bundle, topic),
            ).fetchone()
        return None if row is None else LogIdentity(topic=topic, topic_id=row[0], partitions=row[1])

    def remember(self, identity: LogIdentity) -> None:
        """Record which log the windows are folded from."""
        with _mapped():
            self._connection.execute(
                "INSERT OR REPLACE INTO logs VALUES (?, ?, ?, ?)",
                (self._bundle, identity.topic, identity.topic_id, identity.partitions),
            )

    def close(self) -> None:
        """Close the file; SQLite checkpoints its log."""
        with _mapped():
            self._connection.close()

    def _write(
        self, pending: Mapping[str, Window], next_offsets: Mapping[TopicPartition, int]
    ) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            for window in pending.values():
                self._compare_and_set(window)
            self._connection.executemany(
                "INSERT OR REPLACE INTO offsets VALUES (?, ?, ?, ?)",
                [(self._bundle, tp.topic, tp.partition, at) for tp, at in next_offsets.items()],
            )
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def _compare_and_set(self, window: Window) -> None:
        record = encode_window(window)
        if window.version == 0:
            done = self._connection.execute(
                "INSERT OR IGNORE INTO windows VALUES (?, ?, 1, ?)",
                (self._bundle, window.entity_id, record),
            )
        else:
            done = self._connection.execute(
                "UPDATE windows SET version = version + 1, record = ? "
                "WHERE bundle = ? AND entity = ? AND version = ?",
                (record, self._bundle, window.entity_id, window.version),
            )
        if done.rowcount != 1:
            msg = "another worker has written a window of this batch"
            raise Fenced(msg)


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        msg = f"the SQLite window store cannot be used ({error})"
        raise SinkUnavailable(msg) from error

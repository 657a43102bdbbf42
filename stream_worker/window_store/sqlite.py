"""Windows in one SQLite file: for a single worker, with no server."""

import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llm4es.deletion import DeletionKey
from llm4es.errors import ConfigError, Fenced, SinkUnavailable, StoreLost
from llm4es.events import TopicPartition
from llm4es.windows import Window
from stream_worker.ports import NO_OFFSETS, LogIdentity, WindowTransaction
from stream_worker.window_store.batch import Batch, refuse_lost
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
CREATE TABLE IF NOT EXISTS unproven (
  bundle TEXT, topic TEXT, partition INTEGER, first_offset INTEGER NOT NULL,
  PRIMARY KEY (bundle, topic, partition)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS deleted (
  bundle TEXT, entity_hash BLOB, version INTEGER NOT NULL, record BLOB NOT NULL,
  PRIMARY KEY (bundle, entity_hash)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS deletion_keys (
  bundle TEXT PRIMARY KEY, fingerprint BLOB NOT NULL) WITHOUT ROWID;
"""
_ADVANCE = """
INSERT INTO offsets VALUES (?, ?, ?, ?) ON CONFLICT (bundle, topic, partition)
DO UPDATE SET next_offset = MAX(next_offset, excluded.next_offset)
"""
_BUSY_TIMEOUT_S = 10.0
_CHUNK = 500  # SQLite's limit on parameters of one statement is 999 in old builds
_PRIMARY_CODE = 0xFF
_DAMAGED = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}
_UNUSABLE_PATH = {
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH,
}  # fmt: skip


class SqliteWindowStore:
    """See `ports.WindowStore`. A batch's windows and offsets are one SQLite transaction.

    `read_only` opens what is there, and leaves no trace. `deletion_key` is needed to keep windows
    that are deleted. Raises ConfigError for a path that cannot be used, or holds something
    else, and for another key than the file's.
    """

    def __init__(
        self,
        path: Path,
        bundle_id: str,
        *,
        read_only: bool = False,
        deletion_key: DeletionKey | None = None,
    ) -> None:
        self._bundle = bundle_id
        self._deletion_key = deletion_key
        try:
            with _mapped():
                self._connection = _open_to_read(path) if read_only else _open(path)
                self._agree_on_key(read_only=read_only)
        except OSError as error:
            raise _unusable(path, error) from error
        except SinkUnavailable as error:
            if _primary_code(error.__cause__) in _UNUSABLE_PATH:
                raise _unusable(path, error.__cause__) from error
            raise

    @contextmanager
    def begin(self, held: Mapping[TopicPartition, int] = NO_OFFSETS) -> Iterator[WindowTransaction]:
        """Open a batch; the windows are written when the block ends without an exception."""
        transaction = Batch(self.load, self.offsets, held)
        yield transaction
        with _mapped():
            self._write(transaction)

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
            if self._deletion_key is not None:
                for entity_id in wanted:
                    if windows[entity_id].version == 0:
                        windows[entity_id] = self._deleted(entity_id, self._deletion_key)
        return windows

    def scan(self, partitions: Collection[TopicPartition]) -> Iterator[Window]:
        """Give every window of these partitions."""
        after = ""
        while True:
            with _mapped():
                found = self._connection.execute(
                    "SELECT entity, version, record FROM windows "
                    "WHERE bundle = ? AND entity > ? ORDER BY entity LIMIT ?",
                    (self._bundle, after, _CHUNK),
                ).fetchall()
            for entity, version, record in found:
                window = decode_window(entity, version, record)
                if (window.topic, window.partition) in partitions:
                    yield window
            if len(found) < _CHUNK:
                return
            after = found[-1][0]

    def has_deleted(self) -> bool:
        """Whether it keeps what is left of deleted entities."""
        query = "SELECT 1 FROM deleted WHERE bundle = ? LIMIT 1"
        with _mapped():
            if not self._knows_deletion():
                return False
            return self._connection.execute(query, (self._bundle,)).fetchone() is not None

    def offsets(self, topic: str) -> dict[TopicPartition, int]:
        """Next offset per partition up to which this store holds the log."""
        return self._by_partition("SELECT partition, next_offset FROM offsets", topic)

    def unproven(self, topic: str) -> dict[TopicPartition, int]:
        """Partitions whose beginning was gone when folding began, and where it began."""
        return self._by_partition("SELECT partition, first_offset FROM unproven", topic)

    def identity(self, topic: str) -> LogIdentity | None:
        """Which log the windows were folded from."""
        with _mapped():
            row = self._connection.execute(
                "SELECT topic_id, partitions FROM logs WHERE bundle = ? AND topic = ?",
                (self._bundle, topic),
            ).fetchone()
        return None if row is None else LogIdentity(topic=topic, topic_id=row[0], partitions=row[1])

    def topics(self) -> set[str]:
        """Topics that windows here were folded from."""
        with _mapped():
            rows = self._connection.execute(
                "SELECT topic FROM logs WHERE bundle = ?", (self._bundle,)
            ).fetchall()
        return {topic for (topic,) in rows}

    def remember(
        self, identity: LogIdentity, unproven: Mapping[TopicPartition, int] = NO_OFFSETS
    ) -> None:
        """Record which log the windows are folded from, and what of it lacks its beginning."""
        with _mapped(), self._transaction():
            self._connection.execute(
                "INSERT OR REPLACE INTO logs VALUES (?, ?, ?, ?)",
                (self._bundle, identity.topic, identity.topic_id, identity.partitions),
            )
            self._connection.executemany(
                "INSERT OR REPLACE INTO unproven VALUES (?, ?, ?, ?)",
                [(self._bundle, tp.topic, tp.partition, at) for tp, at in unproven.items()],
            )

    def close(self) -> None:
        """Close the file; SQLite checkpoints its log."""
        with _mapped():
            self._connection.close()

    def _agree_on_key(self, *, read_only: bool) -> None:
        found = None
        try:
            if self._knows_deletion():
                key = self._deletion_key
                if key is not None and not read_only:
                    self._connection.execute(
                        "INSERT OR IGNORE INTO deletion_keys VALUES (?, ?)",
                        (self._bundle, key.fingerprint),
                    )
                found = self._connection.execute(
                    "SELECT fingerprint FROM deletion_keys WHERE bundle = ?", (self._bundle,)
                ).fetchone()
            DeletionKey.refuse_other(found[0] if found else None, self._deletion_key, "the file")
        except BaseException:
            self._connection.close()
            raise

    def _knows_deletion(self) -> bool:
        """Whether the file has the tables: one that is only read may be of an older version."""
        query = "SELECT 1 FROM sqlite_master WHERE name = 'deletion_keys'"
        return self._connection.execute(query).fetchone() is not None

    def _deleted(self, entity_id: str, key: DeletionKey) -> Window:
        row = self._connection.execute(
            "SELECT version, record FROM deleted WHERE bundle = ? AND entity_hash = ?",
            (self._bundle, key.hash(entity_id)),
        ).fetchone()
        return Window(entity_id=entity_id) if row is None else decode_window(entity_id, *row)

    def _by_partition(self, select: str, topic: str) -> dict[TopicPartition, int]:
        with _mapped():
            rows = self._connection.execute(
                f"{select} WHERE bundle = ? AND topic = ?", (self._bundle, topic)
            ).fetchall()
        return {TopicPartition(topic, partition): at for partition, at in rows}

    def _write(self, batch: Batch) -> None:
        with self._transaction():
            for topic in {tp.topic for tp in batch.held}:
                refuse_lost(topic, batch.held, self.offsets(topic))
            for window in batch.pending.values():
                self._compare_and_set(window)
            self._connection.executemany(
                _ADVANCE,
                [
                    (self._bundle, tp.topic, tp.partition, at)
                    for tp, at in batch.next_offsets.items()
                ],
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def _compare_and_set(self, window: Window) -> None:
        if window.deleted and self._deletion_key is None:
            raise DeletionKey.needed()
        record = encode_window(window)
        if not window.deleted and window.version and self._update(window, record):
            return
        places = self._places(window.entity_id)
        standing = 0
        for table, column, name in places:
            row = self._connection.execute(
                f"SELECT version FROM {table} WHERE bundle = ? AND {column} = ?",  # noqa: S608
                (self._bundle, name),
            ).fetchone()
            standing = row[0] if row is not None else standing
        if window.version and not standing:
            msg = "the window store has lost a window that was read from it"
            raise StoreLost(msg)
        if standing != window.version:
            msg = "another worker has written a window of this batch"
            raise Fenced(msg)
        for table, column, name in places:
            self._connection.execute(
                f"DELETE FROM {table} WHERE bundle = ? AND {column} = ?",  # noqa: S608
                (self._bundle, name),
            )
        table, _, name = places[-1] if window.deleted else places[0]
        self._connection.execute(
            f"INSERT INTO {table} VALUES (?, ?, ?, ?)",  # noqa: S608
            (self._bundle, name, window.version + 1, record),
        )

    def _update(self, window: Window, record: bytes) -> bool:
        done = self._connection.execute(
            "UPDATE windows SET version = version + 1, record = ? "
            "WHERE bundle = ? AND entity = ? AND version = ?",
            (record, self._bundle, window.entity_id, window.version),
        )
        return done.rowcount == 1

    def _places(self, entity_id: str) -> list[tuple[str, str, str | bytes]]:
        """Where a window may stand: table, column and name; deleted, it stands in the last."""
        places: list[tuple[str, str, str | bytes]] = [("windows", "entity", entity_id)]
        if self._deletion_key is not None:
            places.append(("deleted", "entity_hash", self._deletion_key.hash(entity_id)))
        return places


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(
        path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA secure_delete=ON")  # what is deleted is gone from the file
        connection.executescript(_TABLES)
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _open_to_read(path: Path) -> sqlite3.Connection:
    """Open without writing: beside a worker through its write-ahead log, else the file alone."""
    if not path.is_file():
        raise ConfigError(
            "window_store", f"there is no file {path}", "name the store that the worker writes"
        )
    mode = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=_BUSY_TIMEOUT_S,
        isolation_level=None, check_same_thread=False,
    )  # fmt: skip
    try:
        known = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'windows'").fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    if known is None:
        connection.close()
        raise ConfigError(
            "window_store", f"{path} holds no windows", "name the store that the worker writes"
        )
    return connection


def _unusable(path: Path, error: BaseException | None) -> ConfigError:
    reason = error.strerror if isinstance(error, OSError) else error
    return ConfigError(
        "window_store",
        f"{path} cannot be opened ({reason})",
        "name a file in a folder that this user may write: sqlite:PATH",
    )


def _primary_code(error: BaseException | None) -> int | None:
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & _PRIMARY_CODE


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if _primary_code(error) in _DAMAGED:
            raise ConfigError(
                "window_store",
                f"the file is damaged, or no SQLite database ({error})",
                "name another file with --window-store: it is folded anew from the log",
            ) from error
        msg = f"the SQLite window store cannot be used ({error})"
        raise SinkUnavailable(msg) from error

"""Rows in SQLite, as Feast's SQLite store keeps them, written by compare-and-set.

Feast keeps one table row per (entity, feature) and timestamps in whole seconds, and lets an
older row overwrite a newer one. The exact timestamp stands beside the features as one more row,
under a name that is no feature of the view: Feast reads it along and hands it to no one, and
it goes when the table goes. It holds as long as the features' own second says the same; where
stock Feast has written since, that second is what stands. (A stock write within the very second
of ours cannot be told from ours.) Where that row stands alone, its entity was deleted, and
`created_ts` says until when it keeps older rows out. What is noted of a topic stands in the table
too, under a key that is no entity's, so that it goes with the rows.

The write-ahead log with synchronous=NORMAL survives a kill; `sync` makes it survive a power cut.
"""

import math
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import numpy as np
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.helpers import compute_table_id
from feast.infra.online_stores.sqlite import SqliteOnlineStore, _quote_id
from feast.protos.feast.types.Value_pb2 import Value

from llm4es.deletion import Tombstone
from llm4es.errors import ConfigError, SinkRejected, SinkUnavailable, StoreLost
from llm4es.events import EPOCH
from llm4es.feast.entity_keys import entity_keys
from llm4es.feast.online import NO_MARKS, Marks, ViewTarget, encode_integer, encode_row
from llm4es.features import FeatureRow

__all__ = ["SqliteRows", "translate_sqlite_error"]

_MARKS = b"llm4es:marks:"
_EXACT = "__as_of_us"  # microseconds since 1970, in UTC
_BUSY_TIMEOUT_S = 10.0
_ASKED = 500  # entities of one query
_MILLION = 1_000_000
_PRIMARY_CODE = 0xFF
_PASSING = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PROTOCOL,
}  # fmt: skip


class SqliteRows:
    """Compare-and-set into the table of Feast's SQLite store, one transaction per batch.

    `read_only` opens what is there as it is.
    """

    def __init__(self, target: ViewTarget, *, read_only: bool = False) -> None:
        config = target.store.config
        self._target = target
        version = config.entity_key_serialization_version
        self._key = entity_keys(
            lambda entity_id: bytes(serialize_entity_key(target.entity_key(entity_id), version))
        )
        name = compute_table_id(
            config.project, target.view, config.registry.enable_online_feature_view_versioning
        )
        self._table = _quote_id(name)
        self._guards = _quote_id(f"{name}_guards")
        path = Path(SqliteOnlineStore._get_db_path(config))  # noqa: SLF001 - Feast's own answer
        if read_only and not path.is_file():
            raise _no_table(path, target)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            if not read_only:
                self._connection.execute("PRAGMA journal_mode=WAL")
                self._connection.execute("PRAGMA synchronous=NORMAL")
                self._connection.execute("PRAGMA secure_delete=ON")  # what is deleted is gone
            tables = self._connection.execute(
                "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (name,)
            ).fetchall()
        except (sqlite3.Error, OSError) as error:
            raise translate_sqlite_error(error) from error
        if not tables:
            self._connection.close()
            raise _no_table(path, target)
        self._upsert = (
            f"INSERT INTO {self._table} "  # noqa: S608 - the name is quoted, values are bound
            "(entity_key, feature_name, value, value_text, event_ts) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (entity_key, feature_name) DO UPDATE SET value = excluded.value, "
            "value_text = excluded.value_text, event_ts = excluded.event_ts, created_ts = NULL"
        )

    def write(
        self,
        rows: Sequence[FeatureRow],
        *,
        topic: str = "",
        held: Marks = NO_MARKS,
        ahead: Marks = NO_MARKS,
    ) -> list[str]:
        """See OnlineRows. Rows and marks are one transaction."""
        keys = [self._key(row.entity_id) for row in rows]
        superseded = []
        with self._transaction():
            standing = self._standing(keys)
            fresh: list[tuple[bytes, str, bytes, str | None, int]] = []
            for key, row in zip(keys, rows, strict=True):
                moment, stood = _microseconds(row.as_of), standing.get(key)
                if stood is None or stood < moment:
                    fresh += self._table_rows(key, row)
                elif stood > moment:
                    superseded.append(row.entity_id)
            self._connection.executemany(self._upsert, fresh)
            if held or ahead:
                self._move_marks(topic, held, ahead)
        return superseded

    def marks(self, topic: str) -> Marks | None:
        """See OnlineRows."""
        try:
            return self._marks(topic)
        except sqlite3.Error as error:
            raise translate_sqlite_error(error) from error

    def delete(self, tombstones: Sequence[Tombstone], *, guard_s: float) -> None:
        """See OnlineRows. What is deleted is overwritten in the file, too."""
        now = time.time()
        alone = f"feature_name = '{_EXACT}' AND created_ts IS NOT NULL"
        with self._transaction():
            self._connection.execute(
                f"CREATE INDEX IF NOT EXISTS {self._guards} ON {self._table} (created_ts) "
                f"WHERE {alone}"
            )
            self._connection.execute(
                f"DELETE FROM {self._table} WHERE {alone} AND created_ts < ?",  # noqa: S608
                (int(now),),
            )
            keys = [self._key(each.entity_id) for each in tombstones]
            standing = self._standing(keys)
            for key, each in zip(keys, tombstones, strict=True):
                if (stood := standing.get(key)) is not None and stood > _microseconds(each.as_of):
                    continue
                self._connection.execute(
                    f"DELETE FROM {self._table} WHERE entity_key = ?",  # noqa: S608
                    (key,),
                )
                self._connection.execute(
                    f"INSERT INTO {self._table} "  # noqa: S608
                    "(entity_key, feature_name, value, event_ts, created_ts) "
                    "VALUES (?, ?, ?, ?, ?)",
                    (key, *_exact(each.as_of), math.ceil(now + guard_s)),
                )

    def replace(self, rows: Sequence[FeatureRow], seen: Sequence[datetime | None]) -> list[str]:
        """See OnlineRows."""
        left = []
        keys = [self._key(row.entity_id) for row in rows]
        with self._transaction():
            standing = self._standing(keys)
            for key, row, moment in zip(keys, rows, seen, strict=True):
                if standing.get(key) != (None if moment is None else _microseconds(moment)):
                    left.append(row.entity_id)
                    continue
                self._connection.executemany(self._upsert, self._table_rows(key, row))
        return left

    def as_of(self, entity_ids: Sequence[str]) -> list[datetime | None]:
        """See OnlineRows; exact to the microsecond for rows of ours."""
        keys = [self._key(entity_id) for entity_id in entity_ids]
        try:
            standing = self._standing(keys)
        except sqlite3.Error as error:
            raise translate_sqlite_error(error) from error
        return [None if (moment := standing.get(key)) is None else _moment(moment) for key in keys]

    def sync(self) -> None:
        """Checkpoint the write-ahead log, which syncs it."""
        try:
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except sqlite3.Error as error:
            raise translate_sqlite_error(error) from error

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Hold the write lock from the first read on: what is compared is what is replaced."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise translate_sqlite_error(error) from error

    def _marks(self, topic: str) -> dict[str, int]:
        query = f"SELECT feature_name, value FROM {self._table} WHERE entity_key = ?"  # noqa: S608
        found = self._connection.execute(query, (_MARKS + topic.encode(),)).fetchall()
        return {name: Value.FromString(value).int64_val for name, value in found}

    def _move_marks(self, topic: str, held: Marks, ahead: Marks) -> None:
        found = self._marks(topic)
        if any(found.get(name, 0) < number for name, number in held.items()):
            msg = f"the online store has lost what it noted of {topic}, and so rows"
            raise StoreLost(msg)
        self._connection.executemany(
            self._upsert,
            [
                (_MARKS + topic.encode(), name, Value(int64_val=at).SerializeToString(), None, 0)
                for name, at in ahead.items()
                if found.get(name, 0) < at
            ],
        )

    def _standing(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """Microseconds of the row that stands, for the entities that have one."""
        standing: dict[bytes, int] = {}
        for start in range(0, len(keys), _ASKED):
            asked = keys[start : start + _ASKED]
            query = (
                "SELECT entity_key, MAX(CASE WHEN feature_name <> ? THEN event_ts END), "  # noqa: S608
                f"MAX(CASE WHEN feature_name = ? THEN value END) FROM {self._table} "
                f"WHERE entity_key IN ({','.join('?' * len(asked))}) GROUP BY entity_key"
            )
            for key, second, exact in self._connection.execute(query, (_EXACT, _EXACT, *asked)):
                if second is not None:
                    standing[key] = _reconcile(second, exact)
                elif exact is not None:  # of a deleted entity
                    standing[key] = Value.FromString(exact).int64_val
        return standing

    def _table_rows(
        self, key: bytes, row: FeatureRow
    ) -> list[tuple[bytes, str, bytes, str | None, int]]:
        name, exact, second = _exact(row.as_of)
        texts = {  # as Feast's `extract_text_and_num` gives them
            "surprise_last": str(float(np.float32(row.surprise_last))),
            "event_count": str(row.event_count),
            "last_event_id": row.last_event_id,
            "bundle_id": row.bundle_id,
            self._target.join_key: row.entity_id,
        }
        table_rows = [
            (key, feature, value, texts.get(feature), second)
            for feature, value in encode_row(row, self._target).items()
        ]
        table_rows.append((key, name, exact, None, second))
        return table_rows


def _no_table(path: Path, target: ViewTarget) -> ConfigError:
    return ConfigError(
        "online_store",
        f"{path} has no table of view {target.view.name}",
        f"run: feast -c {target.store.repo_path} apply",
    )


def translate_sqlite_error(error: Exception) -> SinkUnavailable | SinkRejected:
    """Say what an error of SQLite means for a batch: try again, or stop."""
    code = getattr(error, "sqlite_errorcode", None)
    passing = isinstance(error, OSError) or (code is not None and code & _PRIMARY_CODE in _PASSING)
    message = f"online store sqlite: {error}"
    return SinkUnavailable(message) if passing else SinkRejected(message)


def _exact(as_of: datetime) -> tuple[str, bytes, int]:
    """Name, value and second of the table row that has the exact timestamp."""
    moment = _microseconds(as_of)
    return _EXACT, encode_integer(moment), _feast_second(moment // _MILLION)


def _reconcile(second: int, exact: bytes | None) -> int:
    if exact is not None:
        ours: int = Value.FromString(exact).int64_val
        if _feast_second(ours // _MILLION) == second:
            return ours
    naive = datetime.fromtimestamp(second)  # noqa: DTZ006 - as Feast's converter reads it
    return _microseconds(naive.replace(tzinfo=UTC))


@lru_cache(maxsize=4096)
def _feast_second(second: int) -> int:
    """Turn a second since 1970 into what Feast's adapter stores: UTC taken for local time."""
    return int(datetime.fromtimestamp(second, UTC).replace(tzinfo=None).timestamp())


def _microseconds(moment: datetime) -> int:
    since = moment - EPOCH
    return (since.days * 86_400 + since.seconds) * _MILLION + since.microseconds


def _moment(microseconds: int) -> datetime:
    second, rest = divmod(microseconds, _MILLION)
    return datetime.fromtimestamp(second, UTC).replace(microsecond=rest)

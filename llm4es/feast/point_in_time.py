"""The point-in-time join over parts, in DuckDB: an ASOF join of keys first, then what it found.

What is joined are keys and timestamps, four columns; vectors are read once it is known which rows
are wanted. An entity row sees the newest feature row at or before its own timestamp, and none
where that one is older than the TTL. Timestamps of entity rows may have nanoseconds: compared
rounded down, aged rounded up, which gives what nanoseconds would.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import duckdb
import pandas as pd
import pyarrow as pa

from llm4es.errors import ConfigError
from llm4es.events import EPOCH
from llm4es.feast.object_store import LogFolder, ObjectPath

__all__ = [
    "MATCHED",
    "Asked",
    "PartsTable",
    "ask",
    "choose",
    "connect",
    "join",
    "quoted",
    "read_files",
    "retrying",
]

MATCHED = "__matched_us"  # timestamp of the row that was found, microseconds since 1970
_ROW, _FLOOR, _CEIL = "__row", "__floor", "__ceil"
_PLACE = "file_index, file_row_number"  # columns that DuckDB gives every file
_RETRIES = 50  # each loses to one merge: a reader that is slow may lose to many
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsTable:
    """Parquet files of one feature view, and how they are joined."""

    view: str
    list_files: Callable[[], Sequence[LogFolder]]
    schema: pa.Schema  # of the files, where there are none yet
    keys: Mapping[str, str]  # column of the files -> column of the entity rows
    timestamp: str
    created: str | None
    features: Mapping[str, str]  # column of the files -> name in the answer
    ttl: timedelta | None
    by_created: bool = False  # whether a row is known from its creation on
    deleted: Callable[[], Mapping[str, datetime]] = dict  # ids whose rows up to then are not read

    def nothing(self, rows: int) -> pa.Table:
        """What is known where there are no files: nulls."""
        columns = {MATCHED: pa.nulls(rows, pa.int64())}
        for name, called in self.features.items():
            columns[called] = pa.nulls(rows, self.schema.field(name).type)
        return pa.table(columns)


@dataclass(frozen=True, slots=True)
class Asked:
    """Entity rows as they are joined: their number, keys, and timestamps in microseconds."""

    table: pa.Table
    frame: pa.Table  # the caller's columns, timestamps in UTC
    first: pd.Timestamp | None
    last: pd.Timestamp | None


def ask(entities: pd.DataFrame, timestamp: str, keys: Sequence[str]) -> Asked:
    """Take entity rows apart. The caller's frame stays as it is; its index is not kept.

    Raises ConfigError where a row has no timestamp, or a key column is missing.
    """
    if missing := [key for key in keys if key not in entities.columns]:
        raise ConfigError(
            "entity_df", f"has no column {missing[0]}", "add the entity's id under its join key"
        )
    frame = entities.reset_index(drop=True)
    moments = pd.to_datetime(frame[timestamp], utc=True)
    if moments.isna().any():
        raise ConfigError(
            timestamp,
            f"row {int(moments.isna().to_numpy().argmax())} has none",
            "drop rows without a timestamp",
        )
    frame[timestamp] = moments
    floor, ceil = (getattr(moments.dt, way)("us").dt.as_unit("us") for way in ("floor", "ceil"))
    columns = {
        _ROW: pa.array(range(len(frame)), pa.int64()),
        _FLOOR: pa.array(floor.astype("int64")),
        _CEIL: pa.array(ceil.astype("int64")),
        **{key: pa.array(frame[key], from_pandas=True) for key in dict.fromkeys(keys)},
    }
    return Asked(
        pa.table(columns),
        pa.Table.from_pandas(frame, preserve_index=False),
        moments.min() if len(frame) else None,
        moments.max() if len(frame) else None,
    )


def connect() -> duckdb.DuckDBPyConnection:
    """A DuckDB of its own, which says times in UTC."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    # In a notebook without ipywidgets there is none, and saying so is an error.
    with suppress(duckdb.InvalidInputException):
        connection.execute("SET enable_progress_bar = false")
    return connection


def join(connection: duckdb.DuckDBPyConnection, asked: Asked, table: PartsTable) -> pa.Table:
    """Features of one view for each entity row, in order, and `MATCHED`; null where none is.

    Raises ConfigError where a key's type is not the log's.
    """
    deleted = table.deleted()  # before parts are listed, see `deletions`
    files = table.list_files()
    if not files:
        return table.nothing(len(asked.table))
    source = read_files(files)
    _reach(connection, files)
    connection.register("asked", asked.table)
    _refuse_other_keys(connection, asked, table, source)
    kept = _kept(connection, source, next(iter(table.keys), ""), table.timestamp, deleted)
    connection.execute(f"CREATE OR REPLACE TEMP TABLE matched AS {_matching(table, kept)}")
    named = "".join(
        f", payload.{quoted(name)} AS {quoted(called)}" for name, called in table.features.items()
    )
    columns = "".join(f"{quoted(name)}, " for name in table.features)
    answer: pa.Table = connection.sql(
        f"SELECT found.ts AS {MATCHED}"  # noqa: S608 - names are quoted
        f"{''.join(f', found.{quoted(called)}' for called in table.features.values())} "
        f"FROM asked LEFT JOIN (SELECT {_ROW}, ts{named} FROM matched JOIN "
        f"(SELECT {columns}{_PLACE} FROM {source}) payload USING ({_PLACE})) found "
        f"USING ({_ROW}) ORDER BY {_ROW}"
    ).to_arrow_table()
    # In one piece: some of Feast's own readers look at the first alone.
    return answer.combine_chunks()


def choose(
    connection: duckdb.DuckDBPyConnection,
    files: Sequence[LogFolder],
    columns: Sequence[str],
    *,
    one_per: Sequence[str],
    order: Sequence[str],
    timestamp: str,
    since: datetime | None,
    until: datetime | None,
    deleted: tuple[str, Mapping[str, datetime]] | None = None,
) -> pa.Table:
    """Columns of one row per `one_per`, the first by `order` (SQL), within dates."""
    source = read_files(files)
    _reach(connection, files)
    bounds = [
        f"epoch_us({quoted(timestamp)}) {sign} {_microseconds(moment)}"
        for sign, moment in ((">=", since), ("<=", until))
        if moment is not None
    ]
    where = " AND ".join(bounds) or "true"
    per = ", ".join(quoted(name) for name in one_per) or "1"
    by = ", ".join([*order, _PLACE])
    kept = _kept(connection, source, deleted[0], timestamp, deleted[1]) if deleted else source
    chosen = (
        f"SELECT {_PLACE} FROM {kept} WHERE {where} "  # noqa: S608 - names are quoted
        f"QUALIFY row_number() OVER (PARTITION BY {per} ORDER BY {by}) = 1"
    )
    names = ", ".join(quoted(name) for name in columns)
    found: pa.Table = connection.sql(
        f"SELECT {names} FROM (SELECT {names}, {_PLACE} FROM {source}) "  # noqa: S608
        f"SEMI JOIN ({chosen}) USING ({_PLACE})"
    ).to_arrow_table()
    return found.combine_chunks()


def read_files(files: Sequence[LogFolder]) -> str:
    """SQL that reads Parquet files; a folder's name adds no column."""
    listed = ", ".join("'" + str(file).replace("'", "''") + "'" for file in files)
    return f"read_parquet([{listed}], hive_partitioning = false)"


def retrying(work: Callable[[], _T]) -> _T:
    """Do it again where a part was merged or rewritten between looking and reading."""
    for _ in range(_RETRIES):
        with suppress(duckdb.IOException, FileNotFoundError):
            return work()
    return work()


def _reach(connection: duckdb.DuckDBPyConnection, files: Sequence[LogFolder]) -> None:
    """Let DuckDB read an object store through fsspec: its own way there is a download."""
    for file in files[:1]:  # they are of one log
        if isinstance(file, ObjectPath):
            connection.register_filesystem(file.filesystem)


def _kept(
    connection: duckdb.DuckDBPyConnection,
    source: str,
    key: str,
    timestamp: str,
    deleted: Mapping[str, datetime],
) -> str:
    """SQL of the source's rows that no tombstone forbids, and where they stand."""
    if not deleted or not key:
        return source
    ids = pa.array(list(deleted), pa.string())
    until = pa.array([_microseconds(each) for each in deleted.values()], pa.int64())
    connection.register("deleted", pa.table({"id": ids, "until": until}))
    return (
        f"(SELECT *, {_PLACE} FROM {source} rows WHERE NOT EXISTS (SELECT 1 FROM deleted WHERE "  # noqa: S608
        f"deleted.id = rows.{quoted(key)} AND epoch_us(rows.{quoted(timestamp)}) <= "
        "deleted.until))"
    )


def _matching(table: PartsTable, source: str) -> str:
    """SQL that gives, for each entity row that has one, its row of the files."""
    keys = ", ".join(quoted(key) for key in table.keys)
    found = f"SELECT {keys}, epoch_us({quoted(table.timestamp)}) AS ts, {_PLACE}"
    same = " AND ".join(
        f"asked.{quoted(theirs)} = found.{quoted(ours)}" for ours, theirs in table.keys.items()
    )
    picked = f"SELECT {_ROW}, {_CEIL}, ts, {_PLACE} FROM asked"  # noqa: S608
    if table.created is None:
        matched = (
            f"{picked} ASOF JOIN ({found} FROM {source}) found "
            f"ON {same} AND asked.{_FLOOR} >= found.ts"
        )
    else:  # of one moment, what was created last
        created = f"epoch_us({quoted(table.created)}) AS created"
        known = f"AND created <= {_FLOOR}" if table.by_created else ""
        matched = (
            f"{picked} JOIN ({found}, {created} FROM {source}) found "
            f"ON {same} AND asked.{_FLOOR} >= found.ts {known} "
            f"QUALIFY row_number() OVER (PARTITION BY {_ROW} ORDER BY ts DESC, created DESC, "
            f"{_PLACE}) = 1"
        )
    if table.ttl:
        age = table.ttl // timedelta(microseconds=1)
        matched = f"SELECT * FROM ({matched}) WHERE ts + {age} >= {_CEIL}"  # noqa: S608
    return matched


def quoted(name: str) -> str:
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def _refuse_other_keys(
    connection: duckdb.DuckDBPyConnection, asked: Asked, table: PartsTable, source: str
) -> None:
    """DuckDB would cast one to the other, row by row, until one cannot be."""
    schema = connection.sql(f"SELECT * FROM {source} LIMIT 0").to_arrow_table().schema  # noqa: S608
    for ours, theirs in table.keys.items():
        given, due = asked.table.schema.field(theirs).type, schema.field(ours).type
        if _kind(given) != _kind(due) and not pa.types.is_null(given):
            kind = "str" if _kind(due) == "text" else "int"
            raise ConfigError(
                f"entity_df column {theirs}",
                f"holds {given}, the log of {table.view} {due}",
                f"convert it, e.g. df[{theirs!r}].astype({kind})",
            )


def _kind(dtype: pa.DataType) -> str:
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    if pa.types.is_string(dtype) or pa.types.is_large_string(dtype):
        return "text"
    return "integer" if pa.types.is_integer(dtype) else str(dtype)


def _microseconds(moment: datetime) -> int:
    return (moment.astimezone(UTC) - EPOCH) // timedelta(microseconds=1)

"""The offline log's parts: Parquet files, one per day and flush, which appear by rename.

    <log>/part-0-schema.parquet             no rows: Feast reads a source's columns from its files
    <log>/dt=2026-03-01/<stem>.parquet      rows whose `event_timestamp` is of that day, in UTC
    <log>/**/.<stem>.parquet.*.tmp          a part being written; no reader's glob matches it

A part's stem names the offsets its rows were made from and hashes their (entity, timestamp)
pairs, so that an exact replay replaces a part by itself, and anything else stands beside it. Rows
that stand in two parts are identical: readers take one per (entity, timestamp), compaction leaves
one. Under one name there are never other rows, since readers find a row again by its number.
"""

import os
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from llm4es.events import OffsetSpans
from llm4es.feast.object_store import LogFolder
from llm4es.features import FeatureRow

__all__ = [
    "SCHEMA_PART",
    "TIMESTAMP",
    "day_folder",
    "ensure_log",
    "list_parts",
    "log_schema",
    "part_stem",
    "renamed_stem",
    "rows_to_batch",
    "sync_folder",
    "write_part",
    "write_parts",
]

TIMESTAMP = "event_timestamp"
_DAY = "dt="
SCHEMA_PART = "part-0-schema"
_VECTORS = ("embedding", "surprise")
_LABELS = ("last_event_id", "bundle_id")
_NAMED_SPANS = 3  # of a part's name; more of them are hashed
_DIGEST_BYTES = 6
_Place = TypeVar("_Place", bound=LogFolder)


def log_schema(join_key: str) -> pa.Schema:
    """Columns of the offline log of an entity's view."""
    moment = pa.timestamp("us", tz="UTC")
    return pa.schema(
        [
            (join_key, pa.string()),
            (TIMESTAMP, moment),
            ("embedding", pa.list_(pa.float32())),
            ("surprise", pa.list_(pa.float32())),
            ("surprise_last", pa.float32()),
            ("event_count", pa.int64()),
            ("last_event_id", pa.string()),
            ("last_event_time", moment),
            ("bundle_id", pa.string()),
        ]
    )


def rows_to_batch(rows: Sequence[FeatureRow], join_key: str) -> pa.RecordBatch:
    """N rows as one record batch of `log_schema`; their vectors are copied once."""
    columns = [
        pa.array([row.entity_id for row in rows], pa.string()),
        _moments([row.as_of for row in rows]),
        _vectors([row.embedding for row in rows]),
        _vectors([row.surprise for row in rows]),
        pa.array([row.surprise_last for row in rows], pa.float32()),
        pa.array([row.event_count for row in rows], pa.int64()),
        pa.array([row.last_event_id for row in rows], pa.string()),
        _moments([row.last_event_time for row in rows]),
        pa.array([row.bundle_id for row in rows], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=log_schema(join_key))


def list_parts(
    folder: _Place, *, since: datetime | None = None, until: datetime | None = None
) -> list[_Place]:
    """Parts of a log in the order of their names; none where the folder is not there.

    Days before `since` or after `until` are left out. Parts that stand in no day's folder, as
    a log of someone else's has them, are all there.
    """
    found: Iterable[Any] = folder.rglob("*.parquet")
    return sorted(
        path
        for path in found
        if not any(name.startswith((".", "_")) for name in path.relative_to(folder).parts)
        and _is_within(path, since, until)
    )


def ensure_log(folder: LogFolder, schema: pa.Schema) -> None:
    """Make the folder, and a part without rows: Feast reads a source's columns from its files."""
    if (folder / f"{SCHEMA_PART}.parquet").exists():
        return  # a log of a thousand parts is not listed for it
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
    if not list_parts(folder):
        write_part(folder, SCHEMA_PART, schema.empty_table())


def part_stem(table: pa.Table, keys: Sequence[str], spans: OffsetSpans, default: str) -> str:
    """Name a part after the offsets and the (entity, timestamp) pairs of its rows.

    Where no offsets are known the name is `default`.
    """
    if not spans:
        return default
    named = [
        f"{tp.partition}.{first:012d}-{upto:012d}" for tp, (first, upto) in sorted(spans.items())
    ]
    topics = "+".join(sorted({tp.topic for tp in spans}))
    if len(named) > _NAMED_SPANS:
        hashed = blake2b(" ".join(named).encode(), digest_size=_DIGEST_BYTES).hexdigest()
        named = [f"{len(named)}-partitions-{hashed}"]
    return f"{topics}-{'+'.join(named)}-{_digest(table, keys)}"


def renamed_stem(stem: str, table: pa.Table, keys: Sequence[str]) -> str:
    """Name what is left of a part: after the rows that it holds now."""
    return f"{stem.rpartition('-')[0] or stem}-{_digest(table, keys)}"


def write_parts(
    folder: LogFolder, stem: str, table: pa.Table, *, timestamp: str = TIMESTAMP
) -> None:
    """Write rows as one part for each of their days."""
    if not len(table):
        return
    # Floor, not a cast: before 1970 a cast would round up.
    days = (
        pc.floor_temporal(table[timestamp], unit="day").cast(pa.timestamp("us")).cast(pa.date32())
    )
    for day in sorted(set(days.unique().to_pylist())):
        within = (
            table
            if days.null_count == 0 and len(days.unique()) == 1
            else table.filter(pc.equal(days, pa.scalar(day)))
        )
        write_part(day_folder(folder, day), stem, within)


def day_folder(folder: LogFolder, day: date) -> LogFolder:
    """Where the parts of a day stand."""
    return folder / f"{_DAY}{day.isoformat()}"


def write_part(folder: LogFolder, stem: str, table: pa.Table) -> LogFolder:
    """Write rows as one part: whole and durable when it appears. The same stem replaces it."""
    if not isinstance(folder, Path):
        content = pa.BufferOutputStream()
        _write_parquet(table, content)
        there = folder / f"{stem}.parquet"
        there.put(content.getvalue().to_pybytes())
        return there
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    part = folder / f"{stem}.parquet"
    # Of this writer alone: two that start at once both write the part without rows.
    temporary = folder / f".{part.name}.{uuid.uuid4().hex[:8]}.tmp"
    with temporary.open("wb") as file:
        _write_parquet(table, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(part)
    sync_folder(folder)
    return part


def sync_folder(folder: LogFolder) -> None:
    """Make names in a folder durable; an object's name is."""
    if not isinstance(folder, Path):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_parquet(table: pa.Table, file: Any) -> None:  # noqa: ANN401 - any file of pyarrow's
    names = set(table.schema.names)
    parquet.write_table(
        table,
        file,
        compression="zstd",
        use_dictionary=[name for name in _LABELS if name in names],
        use_byte_stream_split=[f"{name}.list.element" for name in _VECTORS if name in names],
    )


def _digest(table: pa.Table, keys: Sequence[str]) -> str:
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for name in keys:
        moments = pa.types.is_timestamp(table.schema.field(name).type)
        for chunk in table[name].chunks:
            for value in chunk.cast(pa.int64() if moments else pa.string()).to_pylist():
                digest.update(f"{value}\n".encode())
    return digest.hexdigest()


def _is_within(path: LogFolder, since: datetime | None, until: datetime | None) -> bool:
    name = path.parent.name
    if not name.startswith(_DAY):
        return True
    day = name.removeprefix(_DAY)
    first = None if since is None else since.astimezone(UTC).date().isoformat()
    last = None if until is None else until.astimezone(UTC).date().isoformat()
    return (first is None or day >= first) and (last is None or day <= last)


def _vectors(vectors: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(vector) for vector in vectors)], dtype=np.int32)
    values = np.concatenate(vectors).astype(np.float32, copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _moments(moments: Sequence[datetime]) -> pa.Array:
    return pa.array(moments, pa.timestamp("us", tz="UTC"))

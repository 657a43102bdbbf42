"""The offline log's parts: Parquet files, one per day and flush, which appear by rename.

    <log>/part-0-schema.parquet             no rows: Feast reads a source's columns from its files
    <log>/dt=2026-03-01/<stem>.parquet      rows whose `event_timestamp` is of that day, in UTC
    <log>/**/.<stem>.parquet.*.tmp          a part being written; no reader's glob matches it

A part's stem names the offsets its rows were made from and hashes their (entity, timestamp)
pairs, so that an exact replay replaces a part by itself, and anything else stands beside it. Rows
that stand in two parts are identical: readers take one per (entity, timestamp), compaction leaves
one.
"""

import os
import uuid
from collections.abc import Sequence
from datetime import UTC, date, datetime
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from llm4es.events import OffsetSpans
from llm4es.features import FeatureRow

__all__ = [
    "SCHEMA_PART",
    "TIMESTAMP",
    "day_folder",
    "ensure_log",
    "list_parts",
    "log_schema",
    "part_stem",
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
    folder: Path, *, since: datetime | None = None, until: datetime | None = None
) -> list[Path]:
    """Parts of a log in the order of their names; none where the folder is not there.

    Days before `since` or after `until` are left out. Parts that stand in no day's folder, as
    a log of someone else's has them, are all there.
    """
    return sorted(
        path
        for path in folder.rglob("*.parquet")
        if not any(name.startswith((".", "_")) for name in path.relative_to(folder).parts)
        and _is_within(path, since, until)
    )


def ensure_log(folder: Path, schema: pa.Schema) -> None:
    """Make the folder, and a part without rows: Feast reads a source's columns from its files."""
    if (folder / f"{SCHEMA_PART}.parquet").exists():
        return  # a log of a thousand parts is not listed for it
    folder.mkdir(parents=True, exist_ok=True)
    if not list_parts(folder):
        write_part(folder, SCHEMA_PART, schema.empty_table())


def part_stem(table: pa.Table, keys: Sequence[str], spans: OffsetSpans, default: str) -> str:
    """Name a part after the offsets and the (entity, timestamp) pairs of its rows.

    Where no offsets are known the name is `default`.
    """
    if not spans:
        return default
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for name in keys:
        for chunk in table[name].chunks:
            for value in chunk.cast(pa.string() if name != TIMESTAMP else pa.int64()).to_pylist():
                digest.update(f"{value}\n".encode())
    named = [
        f"{tp.partition}.{first:012d}-{upto:012d}" for tp, (first, upto) in sorted(spans.items())
    ]
    topics = "+".join(sorted({tp.topic for tp in spans}))
    if len(named) > _NAMED_SPANS:
        hashed = blake2b(" ".join(named).encode(), digest_size=_DIGEST_BYTES).hexdigest()
        named = [f"{len(named)}-partitions-{hashed}"]
    return f"{topics}-{'+'.join(named)}-{digest.hexdigest()}"


def write_parts(folder: Path, stem: str, table: pa.Table, *, timestamp: str = TIMESTAMP) -> None:
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


def day_folder(folder: Path, day: date) -> Path:
    """Where the parts of a day stand."""
    return folder / f"{_DAY}{day.isoformat()}"


def write_part(folder: Path, stem: str, table: pa.Table) -> Path:
    """Write rows as one part: whole and durable when it appears. The same stem replaces it."""
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    part = folder / f"{stem}.parquet"
    # Of this writer alone: two that start at once both write the part without rows.
    temporary = folder / f".{part.name}.{uuid.uuid4().hex[:8]}.tmp"
    names = set(table.schema.names)
    with temporary.open("wb") as file:
        parquet.write_table(
            table,
            file,
            compression="zstd",
            use_dictionary=[name for name in _LABELS if name in names],
            use_byte_stream_split=[f"{name}.list.element" for name in _VECTORS if name in names],
        )
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(part)
    sync_folder(folder)
    return part


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_within(path: Path, since: datetime | None, until: datetime | None) -> bool:
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

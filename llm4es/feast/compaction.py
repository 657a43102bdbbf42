"""Compaction of an offline log: many small parts of a day become few, and no row stands twice.

A merged part is whole and durable before the parts it was made from are taken away. A kill between
leaves rows in two parts, identically, which readers take once and the next compaction puts right.
Rows that a tombstone forbids are left out; `rewrite_deleted` takes them out of every part.
Writers and readers go on meanwhile; readers that find a part gone look again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from llm4es.bundle import Bundle
from llm4es.errors import ConfigError, SinkUnavailable
from llm4es.feast.definitions import ViewSpec
from llm4es.feast.deletions import pending_deletions, rewriting, without_deleted
from llm4es.feast.object_store import LogFolder, opened, size_of
from llm4es.feast.offline_log import log_folder
from llm4es.feast.opening import open_target
from llm4es.feast.parts import SCHEMA_PART, TIMESTAMP, list_parts, write_parts

__all__ = ["Compaction", "compact", "compact_view"]

PART_ROWS = 500_000  # of a merged part; one that has as many is left alone


@dataclass(frozen=True, slots=True)
class Compaction:
    """What a compaction did."""

    view: str
    parts_before: int
    parts_after: int
    bytes_before: int
    bytes_after: int
    duplicates: int  # rows that stood twice, and stand once now


def compact_view(
    repo_path: Path,
    bundle: Bundle | ViewSpec,
    *,
    config_file: str = "feature_store.yaml",
    part_rows: int = PART_ROWS,
) -> Compaction:
    """Compact the offline log of a bundle's view.

    Waits while another process rewrites the log. Raises as `open_sink` does.
    """
    target, _ = open_target(repo_path, bundle, config_file)
    folder = log_folder(target.store.config, target.view.batch_source)
    if folder is None:
        raise ConfigError(
            "offline_path",
            f"view {target.view.name} has no folder on this machine as its batch source",
            "run it where the log stands",
        )
    try:
        return compact(folder, target.join_key, view=target.view.name, part_rows=part_rows)
    except OSError as error:
        raise SinkUnavailable(f"offline log {folder}: {error}") from error


def compact(
    folder: LogFolder, join_key: str, *, view: str = "", part_rows: int = PART_ROWS
) -> Compaction:
    """Merge the parts of each day into parts of at most `part_rows` rows, as long as there is gain.

    Rows are ordered by (entity, timestamp). One process at a time rewrites a log: another one
    waits. Raises OSError.
    """
    with rewriting(folder):
        _take_away_torn(folder)
        before = _data_parts(folder)
        bytes_before = sum(size_of(part) for part in before)
        deleted = pending_deletions(folder)
        duplicates = sum(
            _merge(folder, run, join_key, deleted)
            for run in _runs(folder, before, part_rows=part_rows)
        )
        after = _data_parts(folder)
        return Compaction(
            view=view,
            parts_before=len(before),
            parts_after=len(after),
            bytes_before=bytes_before,
            bytes_after=sum(size_of(part) for part in after),
            duplicates=duplicates,
        )


def _data_parts(folder: LogFolder) -> list[LogFolder]:
    return [part for part in list_parts(folder) if part.stem != SCHEMA_PART]


def _runs(
    folder: LogFolder, parts: Sequence[LogFolder], *, part_rows: int
) -> Iterator[list[LogFolder]]:
    """Parts of one day that are read together: two at least, or one that stands in no day."""
    for day, within in groupby(parts, key=lambda part: part.parent):
        run: list[LogFolder] = []
        rows = 0
        for part in within:
            count = parquet.read_metadata(opened(part)).num_rows
            if run and rows + count > part_rows:
                if len(run) > 1 or day == folder:
                    yield run
                run, rows = [], 0
            if count < part_rows or day == folder:
                run.append(part)
                rows += count
        if len(run) > 1 or (run and day == folder):
            yield run


def _merge(
    folder: LogFolder, run: Sequence[LogFolder], join_key: str, deleted: Mapping[str, datetime]
) -> int:
    """Write what some parts hold as one per day, then take them away; the rows that stood twice."""
    keys = [join_key, TIMESTAMP]
    tables = [parquet.ParquetFile(opened(part)).read() for part in run]
    every = pa.concat_tables(tables, promote_options="default")
    table = without_deleted(every, deleted, join_key=join_key, timestamp=TIMESTAMP)
    ordered = table.sort_by([(name, "ascending") for name in keys])
    once = ordered.filter(_first_of_each(ordered, keys))
    # With their number: a compaction that is killed and run again may have more to leave out.
    named = "\n".join([*(part.name for part in run), str(len(once))])
    digest = blake2b(named.encode(), digest_size=8).hexdigest()
    stem = f"compact-{digest}"
    write_parts(folder, stem, once)
    for part in run:
        if part.stem != stem:
            part.unlink(missing_ok=True)
    return len(table) - len(once)


def _first_of_each(table: pa.Table, keys: Sequence[str]) -> pa.Array:
    """Which rows of an ordered table differ from the one before them."""
    if len(table) < 2:  # noqa: PLR2004 - nothing to compare
        return pa.array([True] * len(table), pa.bool_())
    differs = None
    for name in keys:
        column = table[name].combine_chunks()
        other = pc.not_equal(column[1:], column[:-1])
        differs = other if differs is None else pc.or_(differs, other)
    return pa.concat_arrays([pa.array([True]), differs])


def _take_away_torn(folder: LogFolder) -> None:
    """Remove what compactions that were killed left half written; writers' own are theirs."""
    for path in folder.rglob(".compact-*.tmp"):
        path.unlink(missing_ok=True)

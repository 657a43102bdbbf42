"""What audits ask of a view's offline log: every row of some entities, journalled or rolled."""

from collections.abc import Collection
from datetime import UTC
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from llm4es.feast.deletions import pending_deletions
from llm4es.feast.journal import read_journals
from llm4es.feast.object_store import LogFolder, opened
from llm4es.feast.parts import TIMESTAMP, list_parts
from llm4es.features import FeatureRow

__all__ = ["offline_entities", "offline_rows"]


def offline_entities(folder: LogFolder, join_key: str) -> set[str]:
    """Entities that have rows in parts or journals."""
    found: set[str] = set()
    for table in (*read_journals(folder), *_parts(folder, [join_key])):
        found |= set(table[join_key].unique().to_pylist())
    return found - set(pending_deletions(folder))


def offline_rows(
    folder: LogFolder, join_key: str, entity_ids: Collection[str]
) -> dict[str, list[FeatureRow]]:
    """All offline rows of some entities, oldest first, journalled ones among them.

    Journals are read first: what is rolled meanwhile is in a part by then.
    """
    wanted = pa.array(sorted(entity_ids), pa.string())
    deleted = pending_deletions(folder)
    rows: dict[str, list[FeatureRow]] = {}
    for table in (*read_journals(folder), *_parts(folder, None)):
        for each in table.filter(pc.is_in(table[join_key], wanted)).to_pylist():
            row = _row(each, join_key)
            gone = deleted.get(row.entity_id)
            if gone is None or row.as_of > gone:
                rows.setdefault(row.entity_id, []).append(row)
    return {key: sorted(each, key=lambda row: row.as_of) for key, each in rows.items()}


def _parts(folder: LogFolder, columns: list[str] | None) -> list[pa.Table]:
    tables = []
    for part in list_parts(folder):
        try:
            tables.append(parquet.ParquetFile(opened(part)).read(columns=columns))
        except FileNotFoundError:  # compaction took it: its rows are in another one
            return _parts(folder, columns)
    return tables


def _row(told: dict[str, Any], join_key: str) -> FeatureRow:
    return FeatureRow(
        entity_id=told[join_key],
        as_of=told[TIMESTAMP].astimezone(UTC),
        embedding=np.array(told["embedding"], np.float32),
        surprise=np.array(told["surprise"], np.float32),
        surprise_last=told["surprise_last"],
        event_count=told["event_count"],
        last_event_id=told["last_event_id"],
        last_event_time=told["last_event_time"].astimezone(UTC),
        bundle_id=told["bundle_id"],
    )

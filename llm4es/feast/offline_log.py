"""The offline store: Feast's DuckDB store over a folder of Parquet parts, append-only.

Configured as `offline_store: {type: llm4es.feast.offline_log.LogOfflineStore}`. Stock Feast
rewrites one file per push, not atomically; here a push is one more part. A relative path is
relative to the feature repository, wherever the process runs. Rows that stand in two parts
(same entity and timestamp) are read once. Rows that a tombstone forbids are not read, and taken out
of the parts by `rewrite_deleted`. A log that is not there yet reads as empty.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import ibis
import numpy as np
import pandas as pd
import pyarrow as pa
from feast.data_source import DataSource
from feast.feature_view import FeatureView
from feast.field import Field
from feast.infra.offline_stores.duckdb import (
    DuckDBOfflineStore,
    DuckDBOfflineStoreConfig,
    _read_data_source,
    _write_data_source,
)
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.ibis import (
    IbisRetrievalJob,
    get_historical_features_ibis,
    pull_all_from_table_or_query_ibis,
    pull_latest_from_table_or_query_ibis,
)
from feast.infra.offline_stores.offline_store import RetrievalJob
from feast.infra.offline_stores.offline_utils import infer_event_timestamp_from_entity_df
from feast.infra.registry.base_registry import BaseRegistry
from feast.repo_config import RepoConfig
from feast.type_map import feast_value_type_to_pa
from ibis.expr.types import Table
from numpy.typing import NDArray
from pyarrow import parquet
from pydantic import StrictStr, field_validator

from llm4es.feast.deletions import Rewritten, pending_deletions, rewriting, settle_deletions
from llm4es.feast.journal import ensure_log, list_parts, log_schema, write_part

__all__ = ["LogOfflineStore", "LogOfflineStoreConfig", "log_folder", "rewrite_deleted"]

_ORDER = "__row"  # of the entity rows, while they are joined


class LogOfflineStoreConfig(DuckDBOfflineStoreConfig):
    """`needs_env` names variables the file is written with: Feast leaves an unset one as it is."""

    type: StrictStr = "llm4es.feast.offline_log.LogOfflineStore"
    needs_env: tuple[StrictStr, ...] = ()

    @field_validator("needs_env", mode="before")
    @classmethod
    def _are_set(cls, names: Sequence[str]) -> tuple[str, ...]:
        unset = [name for name in names if not os.environ.get(name)]
        if unset:
            msg = f"set {' and '.join(unset)}: this feature_store.yaml is written with them"
            raise ValueError(msg)
        return tuple(names)


class LogOfflineStore(DuckDBOfflineStore):
    """See the module's docstring. Reads see rolled parts, not what is still journalled."""

    @staticmethod
    def get_historical_features(  # noqa: PLR0917 - Feast's signature
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,  # noqa: FBT001, FBT002 - Feast's signature
        filter_by_created_timestamp: bool = False,  # noqa: FBT001, FBT002
    ) -> RetrievalJob:
        """Join as of each entity row; every row comes back, in order, null where nothing is known.

        Entity timestamps finer than a microsecond are accepted and rounded down, which changes
        no answer: the log has none that are finer.
        """
        if not isinstance(entity_df, pd.DataFrame):
            msg = "pass entity_df as a data frame: SQL, and none at all, need a warehouse"
            raise NotImplementedError(msg)
        schemas = {
            view.batch_source.name: _schema_of(view, view.batch_source)
            for view in feature_views
            if view.batch_source is not None
        }
        job = get_historical_features_ibis(
            config=config,
            feature_views=feature_views,
            feature_refs=feature_refs,
            entity_df=_ordered(entity_df),
            registry=registry,
            project=project,
            full_feature_names=full_feature_names,
            data_source_reader=partial(_read, schemas=schemas),
            data_source_writer=_write_data_source,
            staging_location=config.offline_store.staging_location,
            staging_location_endpoint_override=config.offline_store.staging_location_endpoint_override,
            filter_by_created_timestamp=filter_by_created_timestamp,
        )
        return _in_order(job)

    @staticmethod
    def pull_latest_from_table_or_query(  # noqa: PLR0917 - Feast's signature
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """Newest row per entity within the dates: what `materialize` asks for."""
        return pull_latest_from_table_or_query_ibis(
            config=config,
            data_source=data_source,
            join_key_columns=join_key_columns,
            feature_name_columns=feature_name_columns,
            timestamp_field=timestamp_field,
            created_timestamp_column=created_timestamp_column,
            start_date=start_date,
            end_date=end_date,
            data_source_reader=partial(_read, schemas={}),
            data_source_writer=_write_data_source,
            staging_location=config.offline_store.staging_location,
            staging_location_endpoint_override=config.offline_store.staging_location_endpoint_override,
        )

    @staticmethod
    def pull_all_from_table_or_query(  # noqa: PLR0917 - Feast's signature
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """Every row within the dates, each (entity, timestamp) once."""
        identity = (*join_key_columns, timestamp_field, created_timestamp_column)
        return pull_all_from_table_or_query_ibis(
            config=config,
            data_source=data_source,
            join_key_columns=join_key_columns,
            feature_name_columns=feature_name_columns,
            timestamp_field=timestamp_field,
            created_timestamp_column=created_timestamp_column,
            start_date=start_date,
            end_date=end_date,
            data_source_reader=partial(_read, schemas={}, once=tuple(filter(None, identity))),
            data_source_writer=_write_data_source,
            staging_location=config.offline_store.staging_location,
            staging_location_endpoint_override=config.offline_store.staging_location_endpoint_override,
        )

    @staticmethod
    def offline_write_batch(
        config: RepoConfig,
        feature_view: FeatureView,
        table: pa.Table,
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Append a part: what stock `push` and `write_to_offline_store` do here."""
        source = feature_view.batch_source
        folder = log_folder(config, source)
        if source is None or folder is None:
            DuckDBOfflineStore.offline_write_batch(config, feature_view, table, progress)
            return
        schema = _schema_of(feature_view, source)
        ensure_log(folder, schema)
        missing = set(schema.names) - set(table.column_names)
        if missing:
            msg = f"columns {', '.join(sorted(missing))} of {feature_view.name} are missing"
            raise ValueError(msg)
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        # Timestamps come from pandas in nanoseconds; the log has microseconds.
        rows = table.select(schema.names).cast(schema, safe=False)
        write_part(folder, f"part-{now}-push-{uuid4().hex[:8]}", rows)
        if progress:
            progress(len(rows))

    def get_table_column_names_and_types_from_data_source(
        self, config: RepoConfig, data_source: DataSource
    ) -> Iterable[tuple[str, str]]:
        """Columns of a source; a log that is not there yet is made, so that it has some."""
        folder = log_folder(config, data_source)
        join_key = data_source.tags.get("join_key")
        if folder is not None and join_key is not None:
            ensure_log(folder, log_schema(join_key))
        columns: Iterable[tuple[str, str]] = data_source.get_table_column_names_and_types(config)
        return columns


def log_folder(config: RepoConfig, source: DataSource | None) -> Path | None:
    """Folder of a source's log on this machine; None for a single file or a remote address."""
    if not isinstance(source, FileSource):
        return None
    path = FileSource.get_uri_for_file_path(config.repo_path, source.path)
    if "://" in path or path.endswith(".parquet"):
        return None
    return Path(path).absolute()


def _read(
    source: DataSource,
    repo_path: str,
    *,
    schemas: dict[str, pa.Schema],
    once: Sequence[str] = (),
) -> Table:
    """Read a source as Feast's ibis functions ask for it: a table not yet executed."""
    if not isinstance(source, FileSource):
        return _read_data_source(source, repo_path)
    path = FileSource.get_uri_for_file_path(repo_path, source.path)
    if "://" in path:
        return _read_data_source(source, repo_path)
    if Path(path).is_file():
        return ibis.read_parquet(path)
    parts = list_parts(Path(path))
    if not parts:
        join_key = source.tags.get("join_key", "entity_id")
        return ibis.memtable(schemas.get(source.name, log_schema(join_key)).empty_table())
    table = _without_deleted(ibis.read_parquet([str(part) for part in parts]), source, Path(path))
    return table.distinct(on=list(once), keep="first") if once else table


def _without_deleted(table: Table, source: FileSource, folder: Path) -> Table:
    pending = pending_deletions(folder)
    join_key = source.tags.get("join_key")
    if not pending or join_key is None:
        return table
    deleted = ibis.memtable(
        pa.table(
            {
                "__deleted": pa.array(pending, pa.string()),
                "__deleted_as_of": pa.array(pending.values(), pa.timestamp("us", tz="UTC")),
            }
        )
    )
    return table.anti_join(
        deleted,
        [
            table[join_key] == deleted["__deleted"],
            table[source.timestamp_field] <= deleted["__deleted_as_of"],
        ],
    )


def rewrite_deleted(folder: Path, *, join_key: str, timestamp_field: str) -> Rewritten:
    """Take rows that tombstones forbid out of a log's parts, each part at once by rename.

    Readers never see them in between, for until the last part is done they leave them out; then
    the ids, which are kept for that alone, go as well. Killed, it is run again. Run by one
    process at a time: another one waits. Journals of writers that live are theirs: a row in one
    is left out when it is rolled. Raises OSError.
    """
    with rewriting(folder):
        pending = pending_deletions(folder)
        parts = rows = 0
        for part in list_parts(folder) if pending else ():
            ids = parquet.read_table(part, columns=[join_key, timestamp_field])
            kept = _kept(ids, pending)
            if kept.all():
                continue
            write_part(part.parent, part.stem, parquet.read_table(part).filter(pa.array(kept)))
            parts += 1
            rows += int((~kept).sum())
        settle_deletions(folder, pending)
    return Rewritten(entities=len(pending), parts=parts, rows=rows)


def _kept(ids: pa.Table, pending: Mapping[str, datetime]) -> NDArray[np.bool_]:
    """Which rows, of two columns id and timestamp, no tombstone forbids."""
    return np.array(
        [
            (as_of := pending.get(entity_id)) is None or moment > as_of
            for entity_id, moment in zip(*(c.to_pylist() for c in ids.columns), strict=True)
        ],
        dtype=bool,
    )


def _schema_of(view: FeatureView, source: DataSource) -> pa.Schema:
    """Columns of a view's log: join keys, timestamp, features."""
    # Feast calls the join key a feature, too, of a stream feature view that it has read back.
    features = [feature for feature in view.features if feature.name not in view.join_keys]
    ours = log_schema(view.join_keys[0]) if view.join_keys else pa.schema([])
    if set(ours.names[2:]) == {feature.name for feature in features}:
        return ours
    return pa.schema(
        [
            *_columns(view.entity_columns),
            (source.timestamp_field, pa.timestamp("us", tz="UTC")),
            *_columns(features),
        ]
    )


def _columns(fields: Sequence[Field]) -> list[tuple[str, pa.DataType]]:
    return [(field.name, feast_value_type_to_pa(field.dtype.to_value_type())) for field in fields]


def _ordered(entity_df: pd.DataFrame) -> pd.DataFrame:
    """Copy the caller's frame, its timestamps in UTC microseconds, its rows numbered."""
    column = infer_event_timestamp_from_entity_df(
        dict(zip(entity_df.columns, entity_df.dtypes, strict=True))
    )
    frame = entity_df.reset_index(drop=True)
    moments = pd.to_datetime(frame[column], utc=True)
    frame[column] = moments.dt.floor("us").dt.as_unit("us")
    frame[_ORDER] = range(len(frame))
    return frame


def _in_order(job: RetrievalJob) -> RetrievalJob:
    if isinstance(job, IbisRetrievalJob):
        job.table = job.table.order_by(_ORDER).drop(_ORDER)
        if job.metadata is not None:
            job.metadata.keys.remove(_ORDER)
    return job

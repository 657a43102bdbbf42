"""The offline store: Feast's DuckDB store over a folder of Parquet parts, append-only.

Configured as `offline_store: {type: llm4es.feast.offline_log.LogOfflineStore}`. Stock Feast
rewrites one file per push, not atomically; here a push is one more part. A relative path is
relative to the feature repository, wherever the process runs. Rows that stand in two parts
(same entity and timestamp) are read once. Rows that a tombstone forbids are not read, and taken out
of the parts by `rewrite_deleted`. A log that is not there yet reads as empty.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

import ibis
import pandas as pd
import pyarrow as pa
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.feature_view import FeatureView
from feast.field import Field
from feast.infra.offline_stores.duckdb import (
    DuckDBOfflineStore,
    DuckDBOfflineStoreConfig,
    _write_data_source,
)
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import infer_event_timestamp_from_entity_df
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RepoConfig
from feast.saved_dataset import SavedDatasetStorage
from feast.type_map import feast_value_type_to_pa
from pyarrow import parquet
from pydantic import StrictStr, field_validator

from llm4es.errors import ConfigError
from llm4es.feast.deletions import (
    Rewritten,
    pending_deletions,
    rewriting,
    settle_deletions,
    sweep_torn,
    without_deleted,
    writing,
)
from llm4es.feast.object_store import LogFolder, object_folder, opened
from llm4es.feast.parts import (
    SCHEMA_PART,
    ensure_log,
    list_parts,
    log_schema,
    renamed_stem,
    sync_folder,
    write_part,
    write_parts,
)
from llm4es.feast.point_in_time import (
    MATCHED,
    PartsTable,
    ask,
    choose,
    connect,
    join,
    quoted,
    retrying,
)

__all__ = [
    "LogOfflineStore",
    "LogOfflineStoreConfig",
    "LogRetrievalJob",
    "log_folder",
    "parts_folder",
    "parts_table",
    "rewrite_deleted",
]


class LogOfflineStoreConfig(DuckDBOfflineStoreConfig):
    """`needs_env` names variables the file is written with: Feast leaves an unset one as it is."""

    type: StrictStr = "llm4es.feast.offline_log.LogOfflineStore"
    # Of logs in an object store: what needs a file system, relative to the repository.
    journal_folder: StrictStr = "data/journals"
    needs_env: tuple[StrictStr, ...] = ()

    @field_validator("needs_env", mode="before")
    @classmethod
    def _are_set(cls, names: Sequence[str]) -> tuple[str, ...]:
        unset = [name for name in names if not os.environ.get(name)]
        if unset:
            msg = f"set {' and '.join(unset)}: this feature_store.yaml is written with them"
            raise ValueError(msg)
        return tuple(names)


class LogRetrievalJob(RetrievalJob):
    """A query that is answered when it is asked for, each time from the parts that stand then."""

    def __init__(
        self,
        query: Callable[[], pa.Table],
        *,
        repo_path: Path | None,
        metadata: RetrievalMetadata | None = None,
        full_feature_names: bool = False,
        on_demand: Sequence[OnDemandFeatureView] = (),
    ) -> None:
        super().__init__()
        self._query = query
        self._repo_path = repo_path
        self._metadata = metadata
        self._full_feature_names = full_feature_names
        self._on_demand = list(on_demand)

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:  # noqa: ARG002 - Feast's
        return retrying(self._query)

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        frame: pd.DataFrame = self._to_arrow_internal(timeout).to_pandas()
        return frame

    @property
    def full_feature_names(self) -> bool:
        """Whether columns have the view's name in front."""
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        """Views that Feast computes from the answer."""
        return self._on_demand

    @property
    def metadata(self) -> RetrievalMetadata | None:
        """What was asked for."""
        return self._metadata

    def persist(
        self,
        storage: SavedDatasetStorage,
        allow_overwrite: bool = False,  # noqa: FBT001, FBT002 - Feast's signature
        timeout: int | None = None,
    ) -> None:
        """Write the answer where a saved data set stands."""
        table = ibis.memtable(self.to_arrow(timeout=timeout))
        _write_data_source(
            table, storage.to_data_source(), str(self._repo_path), "overwrite", allow_overwrite
        )


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

        Entity timestamps may be as fine as nanoseconds; they come back in UTC as they were. The
        caller's frame is left as it is. Raises ConfigError for a column that cannot be joined.
        """
        if not isinstance(entity_df, pd.DataFrame):
            msg = "pass entity_df as a data frame: SQL, and none at all, need a warehouse"
            raise NotImplementedError(msg)
        if any(parts_folder(config, view.batch_source) is None for view in feature_views):
            return DuckDBOfflineStore.get_historical_features(
                config, feature_views, feature_refs, entity_df, registry, project,
                full_feature_names, filter_by_created_timestamp,
            )  # fmt: skip
        timestamp = infer_event_timestamp_from_entity_df(
            dict(zip(entity_df.columns, entity_df.dtypes, strict=True))
        )
        tables = [
            parts_table(
                config,
                view,
                [ref.split(":")[1] for ref in feature_refs if ref.startswith(f"{_name(view)}:")],
                prefix=f"{view.projection.name_alias or view.name}__" if full_feature_names else "",
                by_created=filter_by_created_timestamp,
            )
            for view in feature_views
        ]
        keys = [key for table in tables for key in table.keys.values()]
        asked = ask(entity_df, timestamp, keys)
        features = [name for table in tables for name in table.features.values()]
        if clash := set(features) & set(asked.frame.column_names):
            msg = (
                f"entity_df has a column {min(clash)}, and so has a view: rename it, or ask with "
                "full_feature_names=True"
            )
            raise ValueError(msg)

        def query() -> pa.Table:
            found = asked.frame
            with connect() as connection:
                for table in tables:
                    for name, column in zip(
                        table.features.values(),
                        join(connection, asked, table).drop_columns([MATCHED]).columns,
                        strict=True,
                    ):
                        found = found.append_column(name, column)
            return found

        return LogRetrievalJob(
            query,
            repo_path=config.repo_path,
            metadata=RetrievalMetadata(
                features=feature_refs,
                keys=[name for name in entity_df.columns if name != timestamp],
                min_event_timestamp=asked.first and asked.first.to_pydatetime(warn=False),
                max_event_timestamp=asked.last and asked.last.to_pydatetime(warn=False),
            ),
            full_feature_names=full_feature_names,
            on_demand=OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry),
        )

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
        if parts_folder(config, data_source) is None:
            return DuckDBOfflineStore.pull_latest_from_table_or_query(
                config, data_source, join_key_columns, feature_name_columns, timestamp_field,
                created_timestamp_column, start_date, end_date,
            )  # fmt: skip
        newest = filter(None, (timestamp_field, created_timestamp_column))
        return _pull(
            config,
            data_source,
            [*join_key_columns, *feature_name_columns],
            (timestamp_field, created_timestamp_column),
            one_per=join_key_columns,
            order=[f"{quoted(name)} DESC" for name in newest],
            dates=(start_date, end_date),
            key=next(iter(join_key_columns), ""),
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
        if parts_folder(config, data_source) is None:
            return DuckDBOfflineStore.pull_all_from_table_or_query(
                config, data_source, join_key_columns, feature_name_columns, timestamp_field,
                created_timestamp_column, start_date, end_date,
            )  # fmt: skip
        identity = filter(None, (*join_key_columns, timestamp_field, created_timestamp_column))
        return _pull(
            config,
            data_source,
            [*join_key_columns, *feature_name_columns],
            (timestamp_field, created_timestamp_column),
            one_per=list(identity),
            order=[],
            dates=(start_date, end_date),
            key=next(iter(join_key_columns), ""),
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
        stem = f"part-{now}-push-{uuid4().hex[:8]}"
        with writing(folder):
            write_parts(folder, stem, rows, timestamp=source.timestamp_field)
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
        # Feast itself would call the days' folders a column.
        parts = list_parts(folder) if folder is not None else []
        if parts:
            schema = parquet.read_schema(opened(parts[0]))
            return zip(schema.names, map(str, schema.types), strict=True)
        columns: Iterable[tuple[str, str]] = data_source.get_table_column_names_and_types(config)
        return columns


def log_folder(config: RepoConfig, source: DataSource | None) -> LogFolder | None:
    """Folder of a source's log, here or in an object store; None for a single file.

    Raises ConfigError for an address that fsspec has no package for.
    """
    if not isinstance(source, FileSource):
        return None
    path = source.path.removeprefix("file://")
    if "://" not in path:  # Feast itself takes some addresses for relative paths
        path = FileSource.get_uri_for_file_path(config.repo_path, path)
    if path.endswith(".parquet"):
        return None
    if "://" not in path:
        return Path(path).absolute()
    journals = getattr(config.offline_store, "journal_folder", "data/journals")
    address = path.rstrip("/")
    hashed = blake2b(address.encode(), digest_size=4).hexdigest()
    control = Path(config.repo_path or "", journals, f"{address.rpartition('/')[2]}-{hashed}")
    try:
        return object_folder(
            address, control.absolute(), endpoint=source.s3_endpoint_override or None
        )
    except OSError as error:
        raise ConfigError("offline_path", f"{address}: {error}", "install what it names") from error


def parts_folder(config: RepoConfig, source: DataSource | None) -> LogFolder | None:
    """Folder, or single file here, of a Parquet source; None for any other source."""
    folder = log_folder(config, source)
    if folder is not None or not isinstance(source, FileSource):
        return folder
    if source.file_format is not None and not isinstance(source.file_format, ParquetFormat):
        return None
    path = FileSource.get_uri_for_file_path(config.repo_path, source.path)
    return None if "://" in path else Path(path).absolute()


def parts_table(
    config: RepoConfig,
    view: FeatureView,
    features: Sequence[str],
    *,
    prefix: str = "",
    by_created: bool = False,
) -> PartsTable:
    """Describe a view's parts for a join; `prefix` goes in front of the answer's columns."""
    source = view.batch_source
    place = parts_folder(config, source)
    if source is None or place is None:
        raise ConfigError(
            f"feature view {view.name}", "has no folder here as its batch source", "name one"
        )
    column_of = {new: old for old, new in source.field_mapping.items()}
    keys = view.projection.join_key_map or {each.name: each.name for each in view.entity_columns}
    return PartsTable(
        view=view.name,
        list_files=partial(_files, place),
        schema=_schema_of(view, source),
        keys={column_of.get(ours, ours): theirs for ours, theirs in keys.items()},
        timestamp=column_of.get(source.timestamp_field, source.timestamp_field),
        created=source.created_timestamp_column or None,
        features={column_of.get(name, name): f"{prefix}{name}" for name in features},
        ttl=view.ttl,
        by_created=by_created,
        deleted=partial(pending_deletions, place),
    )


def _name(view: FeatureView) -> str:
    return str(view.projection.name_to_use())  # type: ignore[no-untyped-call]


def _files(place: LogFolder) -> list[LogFolder]:
    if place.is_file():
        return [place]
    # The part without rows says what columns there are; it need not be read with the others.
    parts = list_parts(place)
    return parts if len(parts) == 1 else [part for part in parts if part.stem != SCHEMA_PART]


def _pull(
    config: RepoConfig,
    source: DataSource,
    columns: Sequence[str],
    times: tuple[str, str | None],
    *,
    one_per: Sequence[str],
    order: Sequence[str],
    dates: tuple[datetime | None, datetime | None],
    key: str,
) -> RetrievalJob:
    place = parts_folder(config, source)
    join_key = source.tags.get("join_key")
    wanted = [*columns, *filter(None, times)]

    def query() -> pa.Table:
        deleted = pending_deletions(place) if place is not None else {}  # before parts are listed
        files = _files(place) if place is not None else []
        if not files and join_key is not None:
            return log_schema(join_key).empty_table().select(wanted)
        with connect() as connection:
            return choose(
                connection,
                files,
                wanted,
                one_per=one_per,
                order=order,
                timestamp=times[0],
                since=dates[0],
                until=dates[1],
                deleted=(key, deleted),
            )

    return LogRetrievalJob(query, repo_path=config.repo_path)


def rewrite_deleted(folder: LogFolder, *, join_key: str, timestamp_field: str) -> Rewritten:
    """Take rows that tombstones forbid out of a log's parts.

    What is left of a part is whole and durable under a name of its own before the part goes.
    Readers never see those rows in between, for until the last part is done they leave them out;
    then the ids, which are kept for that alone, go as well. Killed, it is run again. Run by one
    process at a time: another one waits, and so does a compaction. Journals of writers that live
    are theirs: a row in one is left out when it is rolled. Raises OSError.
    """
    keys = [join_key, timestamp_field]
    with rewriting(folder):
        pending = pending_deletions(folder)
        left_out = partial(
            without_deleted, pending=pending, join_key=join_key, timestamp=timestamp_field
        )
        changed: set[LogFolder] = set()
        parts = rows = 0
        for part in list_parts(folder) if pending else ():
            ids = parquet.ParquetFile(opened(part)).read(columns=keys)
            forbidden = len(ids) - len(left_out(ids))
            if not forbidden:
                continue
            kept = left_out(parquet.ParquetFile(opened(part)).read())
            if len(kept):
                write_part(part.parent, renamed_stem(part.stem, kept, keys), kept)
            part.unlink()
            changed.add(part.parent)
            parts += 1
            rows += forbidden
        if pending:
            sweep_torn(folder, but=SCHEMA_PART)
        for each in changed:  # a part that a power cut brought back would be read again
            sync_folder(each)
        settle_deletions(folder, pending)
    return Rewritten(entities=len(pending), parts=parts, rows=rows)


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

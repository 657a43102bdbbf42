"""The sink: rows into the offline log and the online store of one feature view, in that order.

Feast warns, or says nothing, where it drops a row, keeps NaN or keeps a vector of a wrong
length; so everything is checked here, when the sink is opened and for each row.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from feast import FeatureStore, FeatureView, KafkaSource
from feast.errors import FeastError, FeastObjectNotFoundException, FeatureViewNotFoundException
from feast.repo_config import FeastConfigError
from pydantic import ValidationError
from yaml import YAMLError

from llm4es.bundle import Bundle
from llm4es.errors import BundleMismatch, ConfigError, SinkRejected, SinkUnavailable
from llm4es.feast.definitions import (
    FIELDS,
    TIMESTAMP_FIELD,
    ViewSpec,
    join_key_of,
    view_spec,
    view_tags,
)
from llm4es.feast.journal import OfflineJournal
from llm4es.feast.offline_log import log_folder
from llm4es.feast.online import OnlineRows, PortableRows, ViewTarget
from llm4es.features import FeatureRow, view_name

__all__ = ["FeastSink", "open_sink"]

log = logging.getLogger(__name__)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CHECKED_TAGS = (
    "bundle_id",
    "dim",
    "entity",
    "scales",
    "surprise_columns",
    "schema_sha256",
    "rendering_sha256",
)


class FeastSink:
    """`stream_worker.ports.FeatureSink` over Feast; built by `open_sink`.

    `superseded` counts rows that were not published since a newer one stood.
    """

    def __init__(
        self, target: ViewTarget, spec: ViewSpec, journal: OfflineJournal, online: OnlineRows
    ) -> None:
        self._target = target
        self._bundle_id = spec.manifest.id
        self._dim = spec.manifest.dim
        self._columns = len(spec.surprise_columns)
        self._journal = journal
        self._online = online
        self.superseded = 0

    @property
    def topic(self) -> str:
        """Topic of the view's stream source. Raises ConfigError where it has none."""
        return self._stream("topic")

    @property
    def bootstrap_servers(self) -> str:
        """Brokers of the view's stream source. Raises ConfigError where it has none."""
        return self._stream("kafka_bootstrap_servers")

    def journal(self, rows: Sequence[FeatureRow]) -> None:
        """Return when the rows are durable in the offline log; several per entity may come.

        Readers see them when they are rolled. Raises SinkUnavailable, SinkRejected.
        """
        self._refuse_broken(rows)
        self._journal.append(rows)

    def publish(self, rows: Sequence[FeatureRow]) -> None:
        """Return only when every row is readable online, or superseded by a newer one.

        At most one row per entity. Idempotent. Raises SinkUnavailable, SinkRejected.
        """
        self._refuse_broken(rows)
        entity, times = (
            Counter(row.entity_id for row in rows).most_common(1)[0] if rows else ("", 0)
        )
        if times > 1:
            raise SinkRejected(f"entity {entity!r} has {times} rows in one call")
        self.superseded += len(self._online.write(rows)) if rows else 0

    def read(self, entity_ids: Sequence[str]) -> list[FeatureRow | None]:
        """Online rows as a stock client sees them; `as_of` as exactly as the store knows it.

        `last_event_time` is in whole seconds. Raises SinkUnavailable.
        """
        if not entity_ids:
            return []
        moments = self._online.as_of(entity_ids)
        view = self._target.view.name
        try:
            found = self._target.store.get_online_features(
                features=[f"{view}:{name}" for name in FIELDS],
                entity_rows=[{self._target.join_key: entity_id} for entity_id in entity_ids],
            ).to_dict()
        except Exception as error:
            # Vendors' errors come through Feast as they are.
            raise SinkUnavailable(f"online store: {error!r}") from error
        return [
            None if moment is None else _row(entity_id, moment, found, index)
            for index, (entity_id, moment) in enumerate(zip(entity_ids, moments, strict=True))
        ]

    def roll(self) -> None:
        """Return when every journalled row is in a part that readers see."""
        self._journal.roll()

    def sync(self) -> None:
        """Return when what was published survives a power cut, where that is ours to say."""
        self._online.sync()

    def close(self) -> None:
        """Roll what is journalled, and release the connections."""
        try:
            self._journal.close()
        finally:
            self._online.close()

    def _stream(self, option: str) -> str:
        source = self._target.view.stream_source
        value = getattr(source.kafka_options, option) if isinstance(source, KafkaSource) else ""
        if not value:
            name = {"topic": "topic", "kafka_bootstrap_servers": "bootstrap_servers"}[option]
            raise ConfigError(
                name,
                f"feature view {self._target.view.name} names none",
                "set it, or give the view a KafkaSource and run: feast apply",
            )
        return str(value)

    def _refuse_broken(self, rows: Sequence[FeatureRow]) -> None:
        for row in rows:
            problem = self._problem(row)
            if problem is not None:
                raise SinkRejected(f"row of {row.entity_id!r} at {row.as_of}: {problem}")

    def _problem(self, row: FeatureRow) -> str | None:
        for name, vector, size in (
            ("embedding", row.embedding, self._dim),
            ("surprise", row.surprise, self._columns),
        ):
            if vector.shape != (size,) or vector.dtype != np.float32:
                return f"{name} is {vector.dtype} {vector.shape}, the view has float32 ({size},)"
            if not np.isfinite(vector).all():
                return f"{name} is not finite"
        zoned = row.as_of.tzinfo is not None and row.last_event_time.tzinfo is not None
        broken = (
            ("surprise_last is not finite", not np.isfinite(row.surprise_last)),
            (f"it is not of the view's bundle {self._bundle_id}", row.bundle_id != self._bundle_id),
            ("it has no entity id", not row.entity_id),
            ("its times have no zone, or lie before 1970", not zoned or row.as_of < _EPOCH),
        )
        return next((problem for problem, found in broken if found), None)


def open_sink(
    repo_path: Path,
    bundle: Bundle | ViewSpec,
    *,
    config_file: str = "feature_store.yaml",
    writer_id: str,
    roll_rows: int = 20_000,
    roll_s: float = 5.0,
) -> FeastSink:
    """Open the feature view of a bundle, as Feast's registry has it, for writing.

    `config_file` is relative to the repository. `writer_id` goes into the names of parts.
    Raises ConfigError (no repository, no such view, a setting that breaks serving),
    BundleMismatch (the view is another bundle's), SinkUnavailable.
    """
    spec = bundle if isinstance(bundle, ViewSpec) else view_spec(bundle)
    store = _open_store(repo_path, config_file)
    apply = f"feast -c {repo_path} -f {repo_path / config_file} apply"
    view = _find_view(store, spec, apply)
    _refuse_other_view(view, spec, apply)
    _look_at_settings(store, view)
    folder = log_folder(store.config, view.batch_source)
    if folder is None:
        raise ConfigError(
            "offline_path",
            f"view {view.name} has no folder on this machine as its batch source",
            f"define it with a folder, then run: {apply}",
        )
    join_key = join_key_of(spec.manifest.entity)
    target = ViewTarget(store, view, join_key)
    online = _open_rows(target)
    try:
        journal = OfflineJournal(
            folder, join_key=join_key, writer_id=writer_id, roll_rows=roll_rows, roll_s=roll_s
        )
    except SinkUnavailable:
        online.close()
        raise
    return FeastSink(target, spec, journal, online)


def _open_store(repo_path: Path, config_file: str) -> FeatureStore:
    path = repo_path.absolute() / config_file
    try:
        return FeatureStore(repo_path=str(repo_path.absolute()), fs_yaml_file=path)
    except OSError as error:
        raise ConfigError(
            "feature_repo", f"{path} cannot be read ({error.strerror})", "name a Feast repository"
        ) from error
    except (
        FeastConfigError,
        FeastError,
        ValidationError,
        YAMLError,
        ValueError,
        TypeError,
    ) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(str(path), problem, "mend the file") from error


def _find_view(store: FeatureStore, spec: ViewSpec, apply: str) -> FeatureView:
    name = view_name(spec.manifest.entity, spec.manifest.id)
    try:
        with warnings.catch_warnings():  # see definitions.define
            warnings.simplefilter("ignore", RuntimeWarning)
            view = store.registry.get_any_feature_view(name, store.project, allow_cache=False)
    except (FeatureViewNotFoundException, FeastObjectNotFoundException, FileNotFoundError) as error:
        raise ConfigError(
            "feature_repo",
            f"the registry has no feature view {name}",
            f"set LLM4ES_BUNDLE to this bundle's folder and run: {apply}",
        ) from error
    except Exception as error:
        # A registry may be a file, a database or a bucket.
        raise SinkUnavailable(f"Feast registry: {error!r}") from error
    if not isinstance(view, FeatureView):
        raise BundleMismatch(f"feature view {name}", f"is a {type(view).__name__}", f"run: {apply}")
    return view


def _refuse_other_view(view: FeatureView, spec: ViewSpec, apply: str) -> None:
    remedy = f"give the worker the bundle the view was made for, or run: {apply}"
    expected = view_tags(spec)
    for tag in _CHECKED_TAGS:
        if view.tags.get(tag) != expected[tag]:
            raise BundleMismatch(
                f"feature view {view.name}",
                f"has {tag} {view.tags.get(tag)!r}, the bundle {expected[tag]!r}",
                remedy,
            )
    if view.join_keys != [join_key_of(spec.manifest.entity)]:
        raise BundleMismatch(f"feature view {view.name}", f"is joined by {view.join_keys}", remedy)
    fields = {feature.name: feature.dtype for feature in view.features}
    for name, dtype in FIELDS.items():
        if fields.get(name) != dtype:
            raise BundleMismatch(
                f"feature view {view.name}",
                f"has {name} as {fields.get(name)}, not {dtype}",
                remedy,
            )
    if view.batch_source is None or view.batch_source.timestamp_field != TIMESTAMP_FIELD:
        raise BundleMismatch(
            f"feature view {view.name}", f"has no batch source timed by {TIMESTAMP_FIELD}", remedy
        )


def _look_at_settings(store: FeatureStore, view: FeatureView) -> None:
    for service in store.list_feature_services():
        names = {projection.name for projection in service.feature_view_projections}
        if getattr(service, "precompute_online", False) and view.name in names:
            raise ConfigError(
                f"feature service {service.name}",
                "precompute_online reads every entity on every write, and would serve stale rows",
                "take it off and run: feast apply",
            )
    kind = store.config.offline_store.type
    if kind in {"dask", "file"}:
        log.warning(
            "offline_store %s drops entity rows without a match, collapses duplicates, and a push "
            "can destroy the log: use type: llm4es.feast.offline_log.LogOfflineStore",
            kind,
        )
    if getattr(store.config.online_store, "skip_dedup", False):
        log.warning(
            "online_store has skip_dedup: our rows stay guarded, but a push or materialize of "
            "Feast's may replace newer ones by older"
        )


def _open_rows(target: ViewTarget) -> OnlineRows:
    """Choose the writer by the kind of store; each imports its vendor only when it is meant."""
    config = target.store.config.online_store
    kind = getattr(config, "type", None)
    if kind == "redis":
        from llm4es.feast.redis_rows import RedisRows  # noqa: PLC0415

        return RedisRows(target)
    plain = not config.vector_enabled and not config.enable_openai_compatible_store
    if kind is not None and kind.rpartition(".")[2] in {"sqlite", "SqliteOnlineStore"} and plain:
        from llm4es.feast.sqlite_rows import SqliteRows  # noqa: PLC0415

        return SqliteRows(target)
    if kind is None:
        raise ConfigError("online_store", "the repository has none", "configure one")
    return PortableRows(target)


def _row(entity_id: str, as_of: datetime, found: dict[str, list[Any]], index: int) -> FeatureRow:
    return FeatureRow(
        entity_id=entity_id,
        as_of=as_of,
        embedding=np.array(found["embedding"][index], np.float32),
        surprise=np.array(found["surprise"][index], np.float32),
        surprise_last=found["surprise_last"][index],
        event_count=found["event_count"][index],
        last_event_id=found["last_event_id"][index],
        last_event_time=found["last_event_time"][index].astimezone(UTC),
        bundle_id=found["bundle_id"][index],
    )

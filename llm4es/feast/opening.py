"""A bundle's feature view, looked up in Feast's registry and checked before anything is trusted."""

import logging
import warnings
from pathlib import Path

from feast import FeatureStore, FeatureView, KafkaSource
from feast.data_format import JsonFormat
from feast.errors import FeastError, FeastObjectNotFoundException, FeatureViewNotFoundException
from feast.repo_config import FeastConfigError
from pydantic import ValidationError
from yaml import YAMLError

from llm4es.bundle import Bundle
from llm4es.errors import BundleMismatch, ConfigError, SinkUnavailable
from llm4es.feast.definitions import (
    FIELDS,
    TIMESTAMP_FIELD,
    ViewSpec,
    format_of,
    join_key_of,
    view_spec,
    view_tags,
)
from llm4es.feast.online import OnlineRows, PortableRows, ViewTarget
from llm4es.features import view_name

__all__ = ["apply_command", "open_rows", "open_store", "open_target"]

log = logging.getLogger(__name__)

_CHECKED_TAGS = (
    "bundle_id",
    "dim",
    "entity",
    "scales",
    "surprise_columns",
    "schema_sha256",
    "rendering_sha256",
)


def open_target(
    repo_path: Path, bundle: Bundle | ViewSpec, config_file: str
) -> tuple[ViewTarget, ViewSpec]:
    """Find the view of a bundle. `config_file` is relative to the repository.

    Raises ConfigError (no repository, no such view, a setting that breaks serving),
    BundleMismatch (the view is another bundle's), SinkUnavailable.
    """
    spec = bundle if isinstance(bundle, ViewSpec) else view_spec(bundle)
    store = open_store(repo_path, config_file)
    apply = apply_command(repo_path, config_file)
    view = _find_view(store, spec, apply)
    _refuse_other_view(view, spec, apply)
    _refuse_other_source(view, spec, apply)
    _look_at_settings(store, view)
    return ViewTarget(store, view, join_key_of(spec.manifest.entity)), spec


def apply_command(repo_path: Path, config_file: str) -> str:
    """What to type to register the definitions anew."""
    return f"feast -c {repo_path} -f {repo_path / config_file} apply"


def open_store(repo_path: Path, config_file: str) -> FeatureStore:
    """Open a Feast repository. Raises ConfigError naming the file, and what is wrong in it."""
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
            f"name this bundle's folder in LLM4ES_BUNDLES and run: {apply}",
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


def _refuse_other_source(view: FeatureView, spec: ViewSpec, apply: str) -> None:
    """Compare what the registry says of the events with what the bundle was trained on."""
    source = view.stream_source
    if not isinstance(source, KafkaSource):
        return
    field = source.tags.get("event_time_field")
    if field is not None and field != spec.schema.event_time.field:
        raise BundleMismatch(
            f"data source {source.name}",
            f"takes event time from {field!r}, the bundle from {spec.schema.event_time.field!r}",
            f"run: {apply}",
        )
    told = source.kafka_options.message_format
    if isinstance(told, JsonFormat) and told.schema_json != format_of(spec.schema):
        raise BundleMismatch(
            f"data source {source.name}", "describes other fields than the bundle", f"run: {apply}"
        )
    watermark = source.kafka_options.watermark_delay_threshold
    lateness = spec.manifest.window.allowed_lateness
    if watermark is not None and watermark != lateness:
        log.warning(
            "data source %s has a watermark of %s; the bundle's windows allow %s, and that counts",
            *(source.name, watermark, lateness),
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


def open_rows(target: ViewTarget, *, read_only: bool = False) -> OnlineRows:
    """Choose the adapter by the kind of store; each imports its vendor only when it is meant.

    `read_only` makes nothing that is not there.
    """
    config = target.store.config.online_store
    kind = getattr(config, "type", None)
    if kind == "redis":
        from llm4es.feast.redis_rows import RedisRows  # noqa: PLC0415

        return RedisRows(target)
    plain = not config.vector_enabled and not config.enable_openai_compatible_store
    if kind is not None and kind.rpartition(".")[2] in {"sqlite", "SqliteOnlineStore"} and plain:
        from llm4es.feast.sqlite_rows import SqliteRows  # noqa: PLC0415

        return SqliteRows(target, read_only=read_only)
    if kind is None:
        raise ConfigError("online_store", "the repository has none", "configure one")
    return PortableRows(target)

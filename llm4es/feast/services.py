"""The stable service of an entity: which bundle it points to, and how ops move it.

Readers ask for the service, never for a bundle's view. Moving it is one write to the registry;
a reader sees the view it left or the view it came to, never a mixture, within the registry's
`cache_ttl_seconds`. (Stock Feast raises FeatureViewNotFoundException where a reader fetched the
service before the move and asks with it after: fetch it and ask again.) The next `feast apply`
points it to what the repository says: name the bundle in LLM4ES_SERVING there, too.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from feast import FeatureStore, FeatureView, StreamFeatureView
from feast.errors import FeastObjectNotFoundException
from feast.infra.registry.file import FileRegistryStore
from feast.protos.feast.core.Registry_pb2 import Registry as RegistryProto

from llm4es.errors import ConfigError
from llm4es.feast.definitions import make_service
from llm4es.features import service_name, view_name

__all__ = [
    "AtomicFileRegistryStore",
    "bundle_views",
    "drop_view",
    "replace_registry_whole",
    "served_view",
    "switch_service",
]


class AtomicFileRegistryStore(FileRegistryStore):
    """Feast's registry in a file, replaced whole: its own truncates the file that others read.

    Configured as `registry: {registry_store_type: llm4es.feast.services.AtomicFileRegistryStore,
    path: ...}`; the functions of this module use it for every registry in a file.
    """

    def _write_registry(self, registry_proto: RegistryProto) -> None:
        registry_proto.version_id = str(uuid4())
        registry_proto.last_updated.FromDatetime(datetime.now(UTC))
        path: Path = self._filepath
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
        with temporary.open("wb") as file:
            file.write(registry_proto.SerializeToString())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def bundle_views(store: FeatureStore, entity: str) -> dict[str, FeatureView]:
    """Views of an entity's bundles that are registered, by bundle id."""
    with _quietly():
        views = [*store.list_stream_feature_views(), *store.list_feature_views()]
    return {
        view.tags["bundle_id"]: view
        for view in views
        if view.tags.get("entity") == entity and "bundle_id" in view.tags
    }


def served_view(store: FeatureStore, entity: str) -> FeatureView:
    """View that an entity's stable service points to.

    Raises ConfigError where the registry has no such service, or it points to none or several.
    """
    name = service_name(entity)
    remedy = "set LLM4ES_BUNDLES to bundles of this entity and run: feast apply"
    try:
        service = store.registry.get_feature_service(name, store.project)
        with _quietly():
            views = [
                store.registry.get_any_feature_view(projection.name, store.project)
                for projection in service.feature_view_projections
            ]
    except FeastObjectNotFoundException as error:
        raise ConfigError("entity", f"{error}", remedy) from error
    # A user may have put views of other kinds beside ours.
    ours = [
        view
        for view in views
        if isinstance(view, FeatureView)
        and view.tags.get("entity") == entity
        and "bundle_id" in view.tags
    ]
    if len(ours) != 1:
        raise ConfigError(
            f"feature service {name}", f"points to {len(ours)} bundles' views, not to one", remedy
        )
    return ours[0]


def switch_service(store: FeatureStore, entity: str, bundle_id: str) -> str | None:
    """Point an entity's stable service at the view of a bundle; the id it pointed to before.

    One write: of a file by renaming, of an SQL registry by one transaction, of an object by one
    PUT. Idempotent. Raises ConfigError where the registry has no view of that bundle.
    """
    views = bundle_views(store, entity)
    if bundle_id not in views:
        raise ConfigError(
            "bundle",
            f"the registry has no view {view_name(entity, bundle_id)}",
            f"it has {', '.join(sorted(views)) or 'none'}; add the bundle's folder to "
            "LLM4ES_BUNDLES and run: feast apply",
        )
    try:
        before = served_view(store, entity).tags["bundle_id"]
    except ConfigError:
        before = None
    if before != bundle_id:
        replace_registry_whole(store)
        store.registry.apply_feature_service(make_service(views[bundle_id]), store.project)
        store.refresh_registry()  # type: ignore[no-untyped-call]
    return before


def drop_view(store: FeatureStore, entity: str, bundle_id: str) -> bool:
    """Take a bundle's view and sources out of the registry, and its rows out of the online store.

    Its offline log stays. False where there is no such view (any more). Raises ConfigError as
    long as a feature service points to it.
    """
    view = bundle_views(store, entity).get(bundle_id)
    if view is None:
        return False
    for service in store.list_feature_services():
        if view.name in {projection.name for projection in service.feature_view_projections}:
            raise ConfigError(
                f"feature service {service.name}",
                f"still points to {view.name}",
                "switch it to another bundle first",
            )
    replace_registry_whole(store)
    sources = [view.batch_source]
    if isinstance(view, StreamFeatureView):
        sources.append(view.stream_source)
    with _quietly():
        store.apply(objects=[], objects_to_delete=[view, *filter(None, sources)], partial=False)
    return True


def replace_registry_whole(store: FeatureStore) -> None:
    """Have a registry in a file replaced by each write, not rewritten in place."""
    registry: Any = store.registry
    if type(getattr(registry, "_registry_store", None)) is FileRegistryStore:
        registry._registry_store = AtomicFileRegistryStore(  # noqa: SLF001 - no public way
            store.config.registry, Path(store.repo_path)
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what Feast warns of stream feature views: the parts used are measured and tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield

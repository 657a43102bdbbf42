"""What a roll-out does to Feast: a view beside the one that serves, the service's move, the end."""

import warnings
from pathlib import Path

from feast import FeatureStore, FeatureView, FileSource, KafkaSource

from llm4es.errors import ConfigError
from llm4es.feast.definitions import ViewSpec, define, join_key_of
from llm4es.feast.online import ViewTarget
from llm4es.feast.online_reader import OnlineReader
from llm4es.feast.opening import apply_command, open_rows, open_store
from llm4es.feast.services import (
    bundle_views,
    drop_view,
    replace_registry_whole,
    served_view,
    switch_service,
)

__all__ = ["Serving"]


class Serving:
    """The views of an entity's bundles, and which of them its stable service points to.

    Asks the registry anew each time: several people, and `feast apply`, may be at it. Raises
    ConfigError where there is no repository, no service of this entity, or no such view.
    """

    def __init__(self, repo_path: Path, entity: str, *, config_file: str) -> None:
        self._store: FeatureStore = open_store(repo_path, config_file)
        self._entity = entity
        self._apply = apply_command(repo_path, config_file)

    @property
    def served(self) -> str:
        """Id of the bundle that readers of the stable service get."""
        self._refresh()
        return str(served_view(self._store, self._entity).tags["bundle_id"])

    @property
    def bundles(self) -> set[str]:
        """Ids of the bundles that have a view."""
        self._refresh()
        return set(bundle_views(self._store, self._entity))

    @property
    def topic(self) -> str:
        """Topic of the view that serves."""
        return str(self._source().kafka_options.topic)

    @property
    def bootstrap_servers(self) -> str:
        """Brokers of the view that serves."""
        return str(self._source().kafka_options.kafka_bootstrap_servers)

    def register(self, spec: ViewSpec) -> None:
        """Register a bundle's view beside the one that serves; the service stays. Idempotent.

        Topic, brokers, TTL and the folder of offline logs are those of the view that serves.
        """
        serving = served_view(self._store, self._entity)
        log = serving.batch_source
        if not isinstance(log, FileSource):
            raise ConfigError(
                f"feature view {serving.name}",
                "has no folder as its batch source",
                f"define both bundles in LLM4ES_BUNDLES and run: {self._apply}",
            )
        made = define(
            spec,
            topic=self.topic,
            bootstrap_servers=self.bootstrap_servers,
            offline_path=str(log.path).rstrip("/").rpartition("/")[0],
            ttl=serving.ttl,
        )
        replace_registry_whole(self._store)
        with warnings.catch_warnings():  # see definitions.define
            warnings.simplefilter("ignore", RuntimeWarning)
            self._store.apply([made.entity, made.source, made.view])

    def switch(self, bundle_id: str) -> None:
        """Point the stable service at a bundle's view: one write. Idempotent."""
        switch_service(self._store, self._entity, bundle_id)

    def drop(self, bundle_id: str) -> None:
        """Remove a bundle's view and its online rows; its offline log stays. Idempotent."""
        drop_view(self._store, self._entity, bundle_id)
        self._refresh()

    def reader(self, bundle_id: str) -> OnlineReader:
        """Open a bundle's rows for reading."""
        self._refresh()
        view = bundle_views(self._store, self._entity).get(bundle_id)
        if view is None:
            raise ConfigError("bundle", f"{bundle_id} has no view", f"run: {self._apply}")
        target = ViewTarget(self._store, view, join_key_of(self._entity))
        return OnlineReader(target, open_rows(target, read_only=True))

    def _source(self) -> KafkaSource:
        view: FeatureView = served_view(self._store, self._entity)
        if not isinstance(view.stream_source, KafkaSource):
            raise ConfigError(
                f"feature view {view.name}",
                "names no topic",
                f"define both bundles in LLM4ES_BUNDLES and run: {self._apply}",
            )
        return view.stream_source

    def _refresh(self) -> None:
        self._store.refresh_registry()  # type: ignore[no-untyped-call]

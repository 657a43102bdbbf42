"""What Feast is told of a bundle: entity, stream source, one view per bundle, a stable service.

A view is a `StreamFeatureView` on the topic of events; what trains and backfills read is its
`batch_source`, our offline log. Feast never runs this stream itself: the worker does, and reads
topic and servers from the registry. All of it survives `feast apply` and needs no Spark.
"""

import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
from feast import (
    Entity,
    FeatureService,
    FeatureView,
    Field,
    FileSource,
    KafkaSource,
    StreamFeatureView,
)
from feast.data_format import JsonFormat, ParquetFormat, StreamFormat
from feast.types import Array, FeastType, Float32, Int64, String, UnixTimestamp
from feast.value_type import ValueType
from pydantic import ValidationError

from llm4es.bundle import Bundle, Manifest
from llm4es.errors import BundleMismatch, ConfigError
from llm4es.features import SumsLayout, service_name, view_name
from llm4es.rendering import Renderer, bucket_name
from llm4es.schema import EventSchema, NumberField, QuantileBuckets, first_problem, load_schema
from llm4es.surprise import SurpriseTracks

__all__ = [
    "FIELDS",
    "TIMESTAMP_FIELD",
    "Definition",
    "Definitions",
    "ViewSpec",
    "define",
    "define_all",
    "format_of",
    "join_key_of",
    "make_service",
    "read_pairs",
    "read_view_spec",
    "view_spec",
    "view_tags",
]

TIMESTAMP_FIELD = "event_timestamp"  # FeatureRow.as_of
FIELDS: dict[str, FeastType] = {
    "embedding": Array(Float32),
    "surprise": Array(Float32),
    "surprise_last": Float32,
    "event_count": Int64,
    "last_event_id": String,
    "last_event_time": UnixTimestamp,  # online in whole seconds: Feast keeps no more
    "bundle_id": String,
}
Definition = Entity | KafkaSource | StreamFeatureView | FeatureService
_REMEDY = "export the bundle again, or copy it whole"


@dataclass(frozen=True, slots=True)
class ViewSpec:
    """What a view says of its bundle; no weights are needed for it."""

    manifest: Manifest
    schema: EventSchema
    surprise_columns: tuple[str, ...]  # names of the served array, () where there is none


@dataclass(frozen=True, slots=True)
class Definitions:
    """The objects to `feast apply` for one bundle."""

    entity: Entity
    source: KafkaSource
    view: StreamFeatureView
    service: FeatureService

    @property
    def objects(self) -> Sequence[Definition]:
        """All of them, for `FeatureStore.apply`."""
        return [self.entity, self.source, self.view, self.service]


def view_spec(bundle: Bundle) -> ViewSpec:
    """Describe a bundle that is loaded."""
    return ViewSpec(bundle.manifest, bundle.schema, SumsLayout(bundle).columns)


def read_view_spec(folder: Path) -> ViewSpec:
    """Describe a bundle from its manifest and schema alone; its weights are not looked at.

    Raises BundleMismatch where the manifest is not there or not readable, ConfigError for the
    schema.
    """
    path = folder / "manifest.json"
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BundleMismatch(
            f"bundle {folder}",
            f"has no manifest.json ({error.strerror})",
            "set LLM4ES_BUNDLE to a bundle's folder, or make one: python -m export quickstart",
        ) from error
    except ValidationError as error:
        field, problem = first_problem(error)
        raise BundleMismatch(
            f"bundle {folder}", f"manifest.json: {field}: {problem}", _REMEDY
        ) from error
    schema = load_schema(folder / "schema.yaml")
    if schema.sha256 != manifest.schema_sha256:
        raise BundleMismatch(
            f"bundle {folder}", "its schema is not the one it was trained with", _REMEDY
        )
    return ViewSpec(manifest, schema, _surprise_columns(manifest, schema))


def define(
    spec: ViewSpec,
    *,
    topic: str,
    bootstrap_servers: str,
    offline_path: str,
    watermark_s: float | None = None,
    ttl: timedelta | None = None,
    message_format: StreamFormat | None = None,
) -> Definitions:
    """Define entity, source, view and service of one bundle.

    `offline_path` is the folder under which the view's offline log stands, one folder per view;
    a relative one is relative to the feature repository, wherever a reader runs. `watermark_s`
    is how late an event may come; by default what the bundle's windows allow, which is what
    counts. `ttl` bounds point-in-time joins; without it rows are valid for ever. Online, Feast
    enforces none; `EmbeddingReader` does. `message_format` is how values of the topic are written,
    as the worker reads them: JSON by default, `AvroFormat(schema_json=...)`, or `ProtoFormat` with
    the full name of a message as its class path.

    Applied by `FeatureStore.apply`, a bundle's view stands beside those of others, and the service
    moves to it. The command `feast apply` also takes away what its repository no longer defines,
    the online rows of those views included: a repository defines all that serve (`define_all`).
    """
    manifest = spec.manifest
    name = view_name(manifest.entity, manifest.id)
    join_key = join_key_of(manifest.entity)
    tags = view_tags(spec)
    entity = Entity(
        name=manifest.entity,
        join_keys=[join_key],
        value_type=ValueType.STRING,
        description=f"The {manifest.entity} that events are about",
    )
    log = FileSource(
        name=f"{name}_offline_log",
        path=f"{offline_path.rstrip('/')}/{name}",
        file_format=ParquetFormat(),
        timestamp_field=TIMESTAMP_FIELD,
        description="Every row that was served, as of when it was known",
        tags={"join_key": join_key},
    )
    lateness_s = manifest.window.allowed_lateness.total_seconds()
    source = KafkaSource(
        name=f"{name}_events",
        kafka_bootstrap_servers=bootstrap_servers,
        topic=topic,
        timestamp_field=TIMESTAMP_FIELD,
        message_format=message_format or JsonFormat(schema_json=format_of(spec.schema)),
        watermark_delay_threshold=timedelta(
            seconds=lateness_s if watermark_s is None else watermark_s
        ),
        batch_source=log,
        description=f"Events of {manifest.entity}s, keyed by {manifest.entity}",
        tags={"event_time_field": spec.schema.event_time.field},
    )
    with warnings.catch_warnings():  # "experimental": the parts used here are measured and tested
        warnings.simplefilter("ignore", RuntimeWarning)
        view = StreamFeatureView(
            name=name,
            entities=[entity],
            ttl=ttl or timedelta(0),
            schema=[Field(name=column, dtype=dtype) for column, dtype in FIELDS.items()],
            source=source,
            online=True,
            offline=True,
            tags=tags,
            description=f"Embedding and surprise by bundle {manifest.id} ({manifest.base_model})",
            # These two and the join key are what Feast makes of them when it reads a view back:
            # else each `feast apply` finds a changed schema and counts up the view's version.
            udf_string=None,
            mode="python",
        )
    view.features.append(Field(name=join_key, dtype=String))
    return Definitions(entity, source, view, make_service(view))


def define_all(
    specs: Sequence[ViewSpec],
    *,
    topics: Mapping[str, str],
    bootstrap_servers: str,
    offline_path: str,
    serving: Mapping[str, str] | None = None,
    ttl: timedelta | None = None,
) -> list[Definition]:
    """Define all that a repository serves: several bundles, of one entity or of several.

    `topics` names the topic of each entity. `serving` names the bundle that an entity's stable
    service points to; by default the first of that entity in `specs`. Both are by entity.
    Raises ConfigError where an entity has no topic, or a bundle is named twice or not at all.
    """
    serving = serving or {}
    entities = {spec.manifest.entity for spec in specs}
    by_id = {spec.manifest.id: spec for spec in specs}
    for bundle_id, times in Counter(spec.manifest.id for spec in specs).items():
        if times > 1:
            raise ConfigError("bundles", f"bundle {bundle_id} is named {times} times", "name once")
    for entity, bundle_id in serving.items():
        spec = by_id.get(bundle_id)
        if spec is None or spec.manifest.entity != entity:
            raise ConfigError(
                "serving",
                f"{entity}={bundle_id} names no bundle of that entity",
                f"name one of {_joined(sorted(by_id))}, or add its folder to the bundles",
            )
    if missing := entities - set(topics):
        entity = min(missing)
        raise ConfigError("topics", f"entity {entity} has none", f"name it: {entity}=TOPIC")
    entity_of: dict[str, Entity] = {}
    service_of: dict[str, FeatureService] = {}
    found: list[Definition] = []
    for spec in specs:
        entity = spec.manifest.entity
        made = define(
            spec,
            topic=topics[entity],
            bootstrap_servers=bootstrap_servers,
            offline_path=offline_path,
            ttl=ttl,
        )
        entity_of.setdefault(entity, made.entity)
        if serving.get(entity, spec.manifest.id) == spec.manifest.id:
            service_of.setdefault(entity, made.service)
        found += [made.source, made.view]
    return [*entity_of.values(), *found, *service_of.values()]


def make_service(view: FeatureView) -> FeatureService:
    """Define the stable service of a view's entity, pointing at this view."""
    return FeatureService(
        name=service_name(view.tags["entity"]),
        features=[view],
        tags={"bundle_id": view.tags["bundle_id"]},
        description="The name readers use; ops move it from one bundle's view to the next",
    )


def read_pairs(name: str, text: str) -> dict[str, str]:
    """Read `entity=value,entity=value`. Raises ConfigError naming the setting."""
    pairs = [pair.strip().partition("=") for pair in text.split(",") if pair.strip()]
    for entity, sign, value in pairs:
        if not (entity and sign and value):
            raise ConfigError(
                name, f"{entity}{sign}{value} is no ENTITY=VALUE", "write customer=..,terminal=.."
            )
    return {entity: value for entity, _, value in pairs}


def view_tags(spec: ViewSpec) -> dict[str, str]:
    """Tags of a bundle's view: what a worker checks at its start and a reader looks up."""
    manifest = spec.manifest
    scales = manifest.model_dump(mode="json")["pooling"]["scales"]
    return {
        "bundle_id": manifest.id,
        "dim": str(manifest.dim),
        "entity": manifest.entity,
        "scales": _joined(scales),
        "surprise_columns": _joined(spec.surprise_columns),
        "schema_sha256": manifest.schema_sha256,
        "rendering_sha256": manifest.rendering_sha256,
        "licence": manifest.licence,
    }


def join_key_of(entity: str) -> str:
    """Name of the column that holds an entity's id: customer -> customer_id."""
    return f"{entity}_id"


def _surprise_columns(manifest: Manifest, schema: EventSchema) -> tuple[str, ...]:
    if manifest.surprise is None:
        return ()
    # Learnt edges change an event's text, never the names of its columns.
    edges = {
        bucket_name(kind, name): np.zeros(0)
        for kind, event_type in schema.types.items()
        for name, field in event_type.fields.items()
        if isinstance(field, NumberField) and isinstance(field.buckets, QuantileBuckets)
    }
    renderer = Renderer(schema, manifest.rendering, edges)
    return SurpriseTracks(schema, renderer).columns(manifest.pooling.scales)


def format_of(schema: EventSchema) -> str:
    """Names and kinds of an event's fields, as the source's format tells them."""
    fields = {
        name: field.kind for kind in schema.types.values() for name, field in kind.fields.items()
    }
    return json.dumps({"name": schema.name, "fields": fields}, sort_keys=True)


def _joined(values: Sequence[object]) -> str:
    return ",".join(str(value) for value in values)

"""The Feast plugin: the only part that imports Feast."""

from llm4es.feast.auditing import offline_entities, offline_rows
from llm4es.feast.compaction import Compaction, compact_view
from llm4es.feast.definitions import (
    Definitions,
    ViewSpec,
    define,
    define_all,
    read_pairs,
    read_view_spec,
    view_spec,
)
from llm4es.feast.embedding_reader import (
    EmbeddingReader,
    Embeddings,
    Status,
    open_embedding_reader,
)
from llm4es.feast.online_reader import OnlineReader, open_reader
from llm4es.feast.reader import read_as_of
from llm4es.feast.services import bundle_views, drop_view, served_view, switch_service
from llm4es.feast.serving import Serving
from llm4es.feast.sink import FeastSink, open_sink
from llm4es.feast.training import EntityFeatures, TrainingSet, training_frame

__all__ = [
    "Compaction",
    "Definitions",
    "EmbeddingReader",
    "Embeddings",
    "EntityFeatures",
    "FeastSink",
    "OnlineReader",
    "Serving",
    "Status",
    "TrainingSet",
    "ViewSpec",
    "bundle_views",
    "compact_view",
    "define",
    "define_all",
    "drop_view",
    "offline_entities",
    "offline_rows",
    "open_embedding_reader",
    "open_reader",
    "open_sink",
    "read_as_of",
    "read_pairs",
    "read_view_spec",
    "served_view",
    "switch_service",
    "training_frame",
    "view_spec",
]

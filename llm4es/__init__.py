"""LLM4ES (arXiv 2508.05688) as a live feature: what a window is, its text, and its vector.

Nothing here opens a socket or imports Feast, Kafka, Redis, torch or onnxruntime;
`llm4es.engine` adds onnxruntime and `llm4es.feast` adds Feast.
"""

from llm4es.bundle import Bundle, Manifest, load_bundle
from llm4es.errors import (
    BundleMismatch,
    ConfigError,
    Fenced,
    InvalidEvent,
    LLM4ESError,
    NonFiniteEmbedding,
    SinkRejected,
    SinkUnavailable,
    SourceUnavailable,
    StoreLost,
)
from llm4es.events import Event, Record, parse_event
from llm4es.features import FeatureRow, service_name, view_name
from llm4es.rendering import Renderer, RenderingSpec
from llm4es.schema import EventSchema, load_schema
from llm4es.windows import Window, WindowPolicy, fold

__all__ = [
    "Bundle",
    "BundleMismatch",
    "ConfigError",
    "Event",
    "EventSchema",
    "FeatureRow",
    "Fenced",
    "InvalidEvent",
    "LLM4ESError",
    "Manifest",
    "NonFiniteEmbedding",
    "Record",
    "Renderer",
    "RenderingSpec",
    "SinkRejected",
    "SinkUnavailable",
    "SourceUnavailable",
    "StoreLost",
    "Window",
    "WindowPolicy",
    "fold",
    "load_bundle",
    "load_schema",
    "parse_event",
    "service_name",
    "view_name",
]

"""The Feast plugin: the only part that imports Feast."""

from llm4es.feast.definitions import Definitions, ViewSpec, define, read_view_spec, view_spec
from llm4es.feast.reader import read_as_of
from llm4es.feast.sink import FeastSink, open_sink

__all__ = [
    "Definitions",
    "FeastSink",
    "ViewSpec",
    "define",
    "open_sink",
    "read_as_of",
    "read_view_spec",
    "view_spec",
]

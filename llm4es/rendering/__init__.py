"""Rendering: the text a model reads for a chapter.

One line per event, in the paper's table format (arXiv 2508.05688, section 3) or another. An
event's line depends on the event, the spec, and at most the events before it in its chapter,
so that a late event changes the text of one chapter and of no other.
"""

from llm4es.rendering.formats import FORMATS, FormatName
from llm4es.rendering.renderer import (
    Line,
    Renderer,
    RenderingSpec,
    Span,
    TimeColumn,
    bucket_name,
    quantile_edges,
)

__all__ = [
    "FORMATS",
    "FormatName",
    "Line",
    "Renderer",
    "RenderingSpec",
    "Span",
    "TimeColumn",
    "bucket_name",
    "quantile_edges",
]

"""The embedding engine: windows in, vectors out. `session` alone imports onnxruntime."""

from llm4es.engine.cpus import default_threads
from llm4es.engine.embedder import OnnxEmbedder, open_embedder
from llm4es.engine.providers import choose_providers

__all__ = ["OnnxEmbedder", "choose_providers", "default_threads", "open_embedder"]

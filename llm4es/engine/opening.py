"""Opening a bundle's graph by the provider that is chosen for it."""

import logging
from importlib.util import find_spec

from llm4es.bundle import Bundle
from llm4es.engine.providers import CPU, OPENVINO, Device, choose_providers
from llm4es.engine.reading import ChapterGraph
from llm4es.errors import ConfigError

__all__ = ["open_graph"]

log = logging.getLogger(__name__)


def open_graph(bundle: Bundle, *, device: Device, threads: int) -> ChapterGraph:
    """Open the graph of a bundle that suits the device and gives the manifest's precision.

    In place on onnxruntime's CPU, else the portable one. Raises ConfigError for a device that is
    not there or does not give that precision, BundleMismatch for another graph.
    """
    precision = bundle.manifest.compute.precision
    available = [OPENVINO] if find_spec("openvino") is not None else []
    # Each vendor is imported where it is asked for: either is enough.
    if device != "openvino":
        from llm4es.engine import session  # noqa: PLC0415

        available = [*session.offered_providers(), *available]
    wanted = choose_providers(device, available, precision)
    if wanted[0] == OPENVINO:
        from llm4es.engine.openvino_graph import OpenVinoGraph  # noqa: PLC0415

        return OpenVinoGraph(bundle.portable_graph, precision=precision, threads=threads)
    cached, portable = bundle.cached_graph, bundle.portable_graph
    if wanted[0] == CPU:
        return session.OnnxGraph(cached, in_place=True, providers=wanted, threads=threads)
    graph = session.OnnxGraph(portable, in_place=False, providers=wanted, threads=threads)
    if wanted[0] in graph.providers:
        return graph
    problem = f"{wanted[0]} did not start; onnxruntime fell back to {graph.providers[0]}"
    remedy = "mend its driver and libraries, or use device: cpu"
    if device != "auto":
        raise ConfigError("device", problem, remedy)
    # The GPU build offers CUDA on a machine without a GPU, too.
    log.warning("%s; %s", problem, remedy)
    return session.OnnxGraph(cached, in_place=True, providers=(CPU,), threads=threads)

"""The only module that imports onnxruntime."""

import logging
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm4es.bundle import CACHED_GRAPH, PORTABLE_GRAPH, Bundle
from llm4es.engine.providers import (
    CPU,
    Device,
    choose_providers,
    provider_options,
    refuse_two_runtimes,
)
from llm4es.engine.reading import Found, KvShape, Reading
from llm4es.errors import BundleMismatch, ConfigError

try:
    import onnxruntime as ort
except ImportError as error:
    raise ConfigError(
        "onnxruntime",
        f"cannot be imported ({error})",
        "install the extra `cpu` or `gpu`: pip install 'llm4es[cpu]'",
    ) from error

__all__ = ["OnnxGraph", "open_cpu_graphs", "open_graph"]

log = logging.getLogger(__name__)

_INPUTS = {"input_ids", "token_weights", "past_lengths", "new_lengths"}
_WITH_SURPRISE = {"opening", "ends"}
_SHOWN_REASON = 300  # characters of onnxruntime's own message


class OnnxGraph:
    """A graph of `export.graphs`, run by onnxruntime; see `reading.ChapterGraph`.

    In place, keys and values are bound to the buffer that holds them and are never copied; the
    portable graph gives the new ones, and they are copied behind the old ones. Raises ConfigError
    for a device that is not there, BundleMismatch for another graph.
    """

    def __init__(
        self, path: Path, *, in_place: bool, providers: tuple[str, ...], threads: int
    ) -> None:
        self._path = path
        self._in_place = in_place
        self._session = _open(path, providers, threads)
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        self.on_cpu = self.providers[0] == CPU
        shapes = {entry.name: entry.shape for entry in self._session.get_inputs()}
        self._parts = [f"past.{number}" for number in range(sum("past." in n for n in shapes))]
        self.surprise = set(shapes) >= _WITH_SURPRISE
        wanted = _INPUTS | set(self._parts) | (_WITH_SURPRISE if self.surprise else set())
        if not self._parts or set(shapes) != wanted:
            raise BundleMismatch(
                str(path), "its inputs are not those of this code", "export the bundle again"
            )
        _, heads, _, width = shapes[self._parts[0]]
        self.kv_shape = KvShape(len(self._parts), heads, width)
        self.hidden: int = shapes["opening"][1] if self.surprise else 0
        self.weight_bytes = sum(file.stat().st_size for file in path.parent.glob("*.bin"))
        self._outputs = [entry.name for entry in self._session.get_outputs()]

    def read(self, reading: Reading) -> Found:
        """Read B chapters on; see `reading.ChapterGraph`."""
        try:
            found = self._run_in_place(reading) if self._in_place else self._run(reading)
        except Exception as error:  # onnxruntime raises pybind types of its own
            reason = " ".join(str(error).split())[:_SHOWN_REASON]
            raise BundleMismatch(
                str(self._path),
                f"onnxruntime cannot run it ({reason})",
                "where memory is short lower --max-records; else export the bundle again",
            ) from error
        return Found(found["pooled"], found.get("token_nats"), found.get("end_states"))

    def _run_in_place(self, reading: Reading) -> dict[str, NDArray[np.float32]]:
        binding = self._session.io_binding()
        for name, array in self._small(reading).items():
            binding.bind_cpu_input(name, array)
        shape = reading.kv.shape[1:]
        for number, name in enumerate(self._parts):
            place = reading.kv[number].ctypes.data
            binding.bind_input(name, "cpu", 0, np.float32, shape, place)
            binding.bind_output(f"present.{number}", "cpu", 0, np.float32, shape, place)
        results = [name for name in self._outputs if not name.startswith("present.")]
        for name in results:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        # Outputs come in the order in which they were bound.
        values = binding.get_outputs()[len(self._parts) :]
        return {name: value.numpy() for name, value in zip(results, values, strict=True)}

    def _run(self, reading: Reading) -> dict[str, NDArray[np.float32]]:
        longest = int(reading.past.max())
        inputs: dict[str, Any] = self._small(reading) | {
            name: np.ascontiguousarray(reading.kv[number, :, :, :longest])
            for number, name in enumerate(self._parts)
        }
        found = dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))
        for number in range(len(self._parts)):
            put_new(reading, number, found.pop(f"present.{number}"))
        return found

    def _small(self, reading: Reading) -> dict[str, NDArray[Any]]:
        """Everything but keys and values."""
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": reading.ids,
            "token_weights": reading.weights,
            "past_lengths": reading.past,
            "new_lengths": reading.new,
        }
        if self.surprise:
            inputs |= {"opening": reading.opening, "ends": reading.ends}
        return inputs


def put_new(reading: Reading, part: int, new: NDArray[np.float32]) -> None:
    """Put new keys or values (B, heads, L, width) behind the old ones."""
    for row, (past, count) in enumerate(zip(reading.past, reading.new, strict=True)):
        reading.kv[part, row, :, past : past + count] = new[row, :, :count]


def open_graph(bundle: Bundle, *, device: Device, threads: int) -> OnnxGraph:
    """Open the graph of a bundle that suits the device: in place on a CPU, else the portable one.

    Raises ConfigError for a device that is not there, BundleMismatch for another graph.
    """
    refuse_two_runtimes([d.metadata["Name"] for d in metadata.distributions()])
    wanted = choose_providers(device, ort.get_available_providers())
    if wanted[0] == CPU:
        return OnnxGraph(bundle.cached_graph, in_place=True, providers=wanted, threads=threads)
    graph = OnnxGraph(bundle.portable_graph, in_place=False, providers=wanted, threads=threads)
    if wanted[0] in graph.providers:
        return graph
    problem = f"{wanted[0]} did not start; onnxruntime fell back to {graph.providers[0]}"
    remedy = "mend its driver and libraries, or use device: cpu"
    if device != "auto":
        raise ConfigError("device", problem, remedy)
    # The GPU build offers CUDA on a machine without a GPU, too.
    log.warning("%s; %s", problem, remedy)
    return OnnxGraph(bundle.cached_graph, in_place=True, providers=(CPU,), threads=threads)


def open_cpu_graphs(folder: Path, *, threads: int) -> dict[str, OnnxGraph]:
    """Open every graph of a bundle's folder on the CPU, by its name: for comparing them."""
    return {
        name: OnnxGraph(
            folder / name, in_place=name == CACHED_GRAPH, providers=(CPU,), threads=threads
        )
        for name in (CACHED_GRAPH, PORTABLE_GRAPH)
    }


def _open(path: Path, providers: tuple[str, ...], threads: int) -> Any:  # noqa: ANN401 - no types
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads would take the core that parses and writes the next rows.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(
            str(path), options, providers=[(name, provider_options(name)) for name in providers]
        )
    except Exception as error:  # onnxruntime raises pybind types of its own
        raise BundleMismatch(
            str(path), f"onnxruntime cannot load it ({error})", "export the bundle again"
        ) from error

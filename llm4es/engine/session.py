"""The only module that imports onnxruntime."""

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm4es.bundle import CACHED_GRAPH, PORTABLE_GRAPH
from llm4es.engine.providers import CPU, provider_options, refuse_two_runtimes
from llm4es.engine.reading import Found, GraphShape, Reading, put_new
from llm4es.errors import BundleMismatch, ConfigError

try:
    import onnxruntime as ort
except ImportError as error:
    raise ConfigError(
        "onnxruntime",
        f"cannot be imported ({error})",
        "install the extra `cpu` or `gpu`: pip install 'llm4es[cpu]'",
    ) from error

__all__ = ["OnnxGraph", "offered_providers", "open_cpu_graphs"]

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
        shape = GraphShape.of(
            path, {entry.name: entry.shape for entry in self._session.get_inputs()}
        )
        self.kv_shape, self.hidden, self.surprise = shape.kv, shape.hidden, shape.surprise
        self.weight_bytes = shape.weight_bytes
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
        for name, array in reading.small(surprise=self.surprise).items():
            binding.bind_cpu_input(name, array)
        shape = reading.kv.shape[1:]
        for number in range(self.kv_shape.parts):
            place = reading.kv[number].ctypes.data
            binding.bind_input(f"past.{number}", "cpu", 0, np.float32, shape, place)
            binding.bind_output(f"present.{number}", "cpu", 0, np.float32, shape, place)
        results = [name for name in self._outputs if not name.startswith("present.")]
        for name in results:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        # Outputs come in the order in which they were bound.
        values = binding.get_outputs()[self.kv_shape.parts :]
        return {name: value.numpy() for name, value in zip(results, values, strict=True)}

    def _run(self, reading: Reading) -> dict[str, NDArray[np.float32]]:
        inputs: dict[str, Any] = reading.small(surprise=self.surprise) | {
            f"past.{part}": keys for part, keys in enumerate(reading.pasts())
        }
        found = dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))
        for part in range(self.kv_shape.parts):
            put_new(reading, part, found.pop(f"present.{part}"))
        return found


def offered_providers() -> tuple[str, ...]:
    """Providers that onnxruntime has. Raises ConfigError where two builds of it are installed."""
    refuse_two_runtimes([d.metadata["Name"] for d in metadata.distributions()])
    return tuple(ort.get_available_providers())


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

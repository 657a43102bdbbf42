"""The only module that imports openvino."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm4es.bundle import ComputePrecision
from llm4es.engine.providers import OPENVINO
from llm4es.engine.reading import Found, GraphShape, Reading, put_new
from llm4es.errors import BundleMismatch, ConfigError

try:
    import openvino
except ImportError as error:
    raise ConfigError(
        "device",
        f"openvino cannot be imported ({error})",
        "install the extra `openvino`, or use device: cpu",
    ) from error

__all__ = ["OpenVinoGraph"]

# Left to itself it computes in bf16 where the CPU has it, and in fp16 on some.
_HINTS: dict[ComputePrecision, str] = {"fp32": "f32", "bf16": "bf16"}
_SHOWN_REASON = 300  # characters of OpenVINO's own message


class OpenVinoGraph:
    """The portable graph of `export.graphs`, run by OpenVINO on the CPU; see `ChapterGraph`.

    Raises ConfigError for a precision that this CPU does not have, BundleMismatch for another
    graph.
    """

    providers: tuple[str, ...] = (OPENVINO,)
    on_cpu = True

    def __init__(self, path: Path, *, precision: ComputePrecision, threads: int) -> None:
        self._path = path
        core = openvino.Core()
        hint = _HINTS[precision]
        able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and "BF16" not in able:
            raise ConfigError(
                "device",
                "the bundle's manifest asks for bf16, and this CPU does not have it",
                "serve it where the CPU has AVX-512 BF16 or AMX, or use the bundle it was made of",
            )
        settings = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # the threads that parse and write want the cores, too
        }
        try:
            compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
        except Exception as error:  # OpenVINO raises pybind types of its own
            raise BundleMismatch(
                str(path), f"OpenVINO cannot load it ({_brief(error)})", "export the bundle again"
            ) from error
        given = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if given != hint:
            raise ConfigError(
                "device",
                f"openvino would compute in {given}, not in {precision}",
                "use device: cpu",
            )
        shape = GraphShape.of(
            path,
            {
                each.any_name: [
                    int(axis.get_length()) if axis.is_static else None
                    for axis in each.partial_shape
                ]
                for each in compiled.inputs
            },
        )
        self.kv_shape, self.hidden, self.surprise = shape.kv, shape.hidden, shape.surprise
        self.weight_bytes = shape.weight_bytes
        self._outputs = ["pooled", *(["token_nats", "end_states"] if self.surprise else [])]
        self._request = compiled.create_infer_request()

    def read(self, reading: Reading) -> Found:
        """Read B chapters on; see `reading.ChapterGraph`."""
        inputs = reading.small(surprise=self.surprise) | {
            f"past.{part}": keys for part, keys in enumerate(reading.pasts())
        }
        try:
            # It does not look itself whether they fit, and answers all the same.
            if reading.weights.shape[::2] != reading.ids.shape:
                msg = f"weights {reading.weights.shape} for ids {reading.ids.shape}"
                raise ValueError(msg)  # noqa: TRY301 - told like OpenVINO's own
            for name, array in inputs.items():
                self._request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
            self._request.infer()
        except Exception as error:  # OpenVINO raises pybind types of its own
            raise BundleMismatch(
                str(self._path),
                f"OpenVINO cannot run it ({_brief(error)})",
                "where memory is short lower --max-records; else export the bundle again",
            ) from error
        for part in range(self.kv_shape.parts):
            put_new(reading, part, self._request.get_tensor(f"present.{part}").data)
        # What a request gave is overwritten by its next answer.
        found: dict[str, NDArray[np.float32]] = {
            name: self._request.get_tensor(name).data.copy() for name in self._outputs
        }
        return Found(found["pooled"], found.get("token_nats"), found.get("end_states"))


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:_SHOWN_REASON]

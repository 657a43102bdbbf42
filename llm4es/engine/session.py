"""The only module that imports onnxruntime."""

import logging
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm4es.engine.providers import Device, choose_providers, refuse_two_runtimes
from llm4es.errors import BundleMismatch, ConfigError

try:
    import onnxruntime as ort
except ImportError as error:
    raise ConfigError(
        "onnxruntime",
        f"cannot be imported ({error})",
        "install the extra `cpu` or `gpu`: pip install 'llm4es[cpu]'",
    ) from error

__all__ = ["FullGraph"]

log = logging.getLogger(__name__)

_INPUTS = {"input_ids", "token_weights"}
_SHOWN_REASON = 300  # characters of onnxruntime's own message


class FullGraph:
    """The graph that reads whole chapters, header included.

    `input_ids (B, L) int64, token_weights (B, R, L) float32 -> pooled (B, R, state_dim) float32`
    and, where the bundle gives surprise, `token_nats (B, L) float32`, 0 for the first token.
    Raises ConfigError for a device that is not there, BundleMismatch for another graph.
    """

    def __init__(self, path: Path, *, device: Device, threads: int) -> None:
        self._path = path
        refuse_two_runtimes([d.metadata["Name"] for d in metadata.distributions()])
        wanted = choose_providers(device, ort.get_available_providers())
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Spinning threads would take the core that parses and writes the next rows.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(str(path), options, providers=list(wanted))
        except Exception as error:  # onnxruntime raises pybind types of its own
            raise BundleMismatch(
                str(path), f"onnxruntime cannot load it ({error})", "export the bundle again"
            ) from error
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        if wanted[0] not in self.providers:
            problem = f"{wanted[0]} did not start; onnxruntime fell back to {self.providers[0]}"
            remedy = "mend its driver and libraries, or use device: cpu"
            if device != "auto":
                raise ConfigError("device", problem, remedy)
            # The GPU build offers CUDA on a machine without a GPU, too.
            log.warning("%s; %s", problem, remedy)
        if {entry.name for entry in self._session.get_inputs()} != _INPUTS:
            raise BundleMismatch(
                str(path), "its inputs are not those of this code", "export the bundle again"
            )
        self._outputs = [entry.name for entry in self._session.get_outputs()]

    def run(
        self, input_ids: NDArray[np.int64], token_weights: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Read B chapters of one length L: pooled (B, R, state_dim), nats (B, L) or None.

        Raises BundleMismatch where onnxruntime cannot run the graph on this machine.
        """
        inputs = {"input_ids": input_ids, "token_weights": token_weights}
        try:
            outputs = self._session.run(self._outputs, inputs)
        except Exception as error:  # onnxruntime raises pybind types of its own
            reason = " ".join(str(error).split())[:_SHOWN_REASON]
            raise BundleMismatch(
                str(self._path),
                f"onnxruntime cannot run it ({reason})",
                "where memory is short lower --max-records; else export the bundle again",
            ) from error
        found = dict(zip(self._outputs, outputs, strict=True))
        return found["pooled"], found.get("token_nats")

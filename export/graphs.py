"""Graphs: a causal language model, its pooling and its surprise, as one ONNX file.

Neither hidden states nor logits leave the graph: one vector per row of token weights does, and
one float per token. No attention mask is needed: the model is causal, padding stands on the
right, and weights of padding are 0.
"""

import copy
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
import transformers
from optimum.exporters.onnx import export as optimum_export
from optimum.exporters.onnx.config import TextEncoderOnnxConfig
from optimum.utils import NormalizedTextConfig
from torch.jit._trace import TracerWarning
from transformers import PreTrainedModel

from llm4es.bundle import Pooling
from llm4es.errors import LLM4ESError

if TYPE_CHECKING:
    from collections import OrderedDict

__all__ = ["OPSET", "WEIGHTS", "PooledModel", "export_graph"]

OPSET = 18
WEIGHTS = "weights.bin"
_RMS_EPSILON = 1e-6  # as in llm4es.engine.reference
_INLINE_BYTES = 1024  # smaller constants stay in the graph: shape inference wants to see them
_TRACED_SHAPE = (2, 3, 16)  # batch, rows of weights, tokens: all three differ, so none is taken
#                             for another, and all three are dynamic


class PooledModel(PreTrainedModel):
    """A causal model with its pooling behind it.

    `input_ids (B, L) int64, token_weights (B, R, L) float32 -> pooled (B, R, state_dim) float32`
    and, with `surprise`, `token_nats (B, L) float32`: minus the log-probability of each token
    given those before it, 0 for the first.
    """

    _supports_sdpa = True  # whatever attention the model inside has: the wrapper has none

    def __init__(self, model: PreTrainedModel, pooling: Pooling, *, surprise: bool) -> None:
        super().__init__(copy.deepcopy(model.config))
        # Without surprise the output layer stays outside, and so out of the graph.
        self.reader = model if surprise else model.base_model
        self.pooling = pooling
        self.surprise = surprise

    def forward(
        self, input_ids: torch.Tensor, token_weights: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Read B chapters of one length L."""
        found = self.reader(
            input_ids=input_ids, output_hidden_states=True, use_cache=False, return_dict=True
        )
        states = [self._normalise(found.hidden_states[layer]) for layer in self.pooling.layers]
        if self.pooling.combine == "average":
            pooled = torch.stack(states).mean(dim=0)
        else:
            pooled = torch.cat(states, dim=-1)
        outputs = {"pooled": torch.matmul(token_weights, pooled)}
        if self.surprise:
            outputs["token_nats"] = _token_nats(found.logits.float(), input_ids)
        return outputs

    def _normalise(self, state: torch.Tensor) -> torch.Tensor:
        state = state.float()
        if self.pooling.normalise == "none":
            return state
        return state * torch.rsqrt(state.square().mean(dim=-1, keepdim=True) + _RMS_EPSILON)


def export_graph(
    model: PreTrainedModel, pooling: Pooling, folder: Path, *, surprise: bool, name: str
) -> Path:
    """Write `folder/name` with every weight in `folder/weights.bin`, and return its path.

    The model is left as it was, in evaluation mode. Raises LLM4ESError where it cannot be
    exported.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wrapper: PreTrainedModel = PooledModel(model, pooling, surprise=surprise)
    wrapper.eval()
    config = _GraphConfig(model.config, task="feature-extraction")
    config.surprise = surprise
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".graph-") as scratch:
        raw = Path(scratch) / "raw.onnx"
        with _as_it_was(model), _quietly():
            try:
                optimum_export(model=wrapper, config=config, output=raw, opset=OPSET)
            except Exception as error:  # torch's exporter and optimum raise whatever they like
                msg = f"a {model.config.model_type} model cannot be exported ({error})"
                raise LLM4ESError(msg) from error
        graph = onnx.load(str(raw))
    _scrub(graph)
    target = folder / name
    # onnx appends to weights that are there already, so they must not be.
    (folder / WEIGHTS).unlink(missing_ok=True)
    onnx.save_model(
        graph,
        str(target),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=WEIGHTS,
        size_threshold=_INLINE_BYTES,
    )
    return target


class _GraphConfig(TextEncoderOnnxConfig):  # type: ignore[misc]  # optimum has no types
    """Names and dynamic axes of inputs and outputs, and the example that is traced."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    surprise = False

    @property
    def inputs(self) -> "OrderedDict[str, dict[int, str]] | dict[str, dict[int, str]]":
        return {
            "input_ids": {0: "batch", 1: "tokens"},
            "token_weights": {0: "batch", 1: "rows", 2: "tokens"},
        }

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        named = {"pooled": {0: "batch", 1: "rows"}}
        return named | ({"token_nats": {0: "batch", 1: "tokens"}} if self.surprise else {})

    def generate_dummy_inputs(self, framework: str = "pt", **_shapes: object) -> dict[str, Any]:
        """Ids 1, 2, 3 ... and equal weights, as torch tensors or numpy arrays."""
        batch, rows, tokens = _TRACED_SHAPE
        ids = np.tile(np.arange(1, tokens + 1, dtype=np.int64), (batch, 1))
        weights = np.ones((batch, rows, tokens), dtype=np.float32)
        if framework == "np":
            return {"input_ids": ids, "token_weights": weights}
        return {
            "input_ids": torch.from_numpy(ids),
            "token_weights": torch.from_numpy(weights),
        }


def _token_nats(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits (B, L, V) and ids (B, L) to nats (B, L)."""
    before = logits[:, :-1]
    chosen = torch.gather(before, 2, input_ids[:, 1:, None])[..., 0]
    nats = torch.logsumexp(before, dim=-1) - chosen
    return torch.cat([torch.zeros_like(input_ids[:, :1], dtype=nats.dtype), nats], dim=1)


def _scrub(graph: onnx.ModelProto) -> None:
    """Forget where each node came from: stack traces hold paths of the machine that exported."""
    graph.doc_string = ""
    for node in graph.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Undo what optimum sets in the model's configuration while it exports."""
    was = {name: getattr(model.config, name, None) for name in ("use_cache", "return_dict")}
    training = model.training
    try:
        yield
    finally:
        for name, value in was.items():
            setattr(model.config, name, value)
        model.train(training)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the tracer: it warns of every shape that it follows, and of its own age."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TracerWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        transformers.logging.set_verbosity(level)

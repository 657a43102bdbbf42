"""Graphs: a causal language model, its keys and values, its pooling and its surprise, as ONNX.

Neither hidden states nor logits leave a graph: one vector per row of token weights does, one
float per token, and what the next call wants to know of this one.

Two graphs share one file of weights. `cached.onnx` calls onnxruntime's GroupQueryAttention, which
writes new keys and values into the buffer that holds the old ones. `portable.onnx` says the same
in plain operators, for whatever does not know that one: it gives the new keys and values, and its
caller puts them into place.
"""

import copy
import hashlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import onnx
import torch
import transformers
from onnx.external_data_helper import set_external_data
from optimum.exporters.onnx import export as optimum_export
from optimum.exporters.onnx.config import TextEncoderOnnxConfig
from optimum.utils import NormalizedTextConfig
from torch.jit._trace import TracerWarning
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from export.rotary import Angles, one_operator
from export.shapes import join_reshapes, share_shapes
from llm4es.bundle import CACHED_GRAPH, PORTABLE_GRAPH, WEIGHTS, Pooling
from llm4es.errors import LLM4ESError

if TYPE_CHECKING:
    from collections import OrderedDict

__all__ = ["OPSET", "VOCABULARY_SLICE", "ReadingModel", "SharedWeights", "export_graphs"]

OPSET = 18
VOCABULARY_SLICE = 16_384  # entries whose logits are there at once
_ATTENTION = "llm4es"
_RMS_EPSILON = 1e-6  # as in llm4es.engine.reference
_INLINE_BYTES = 1024  # smaller constants stay in the graph: shape inference wants to see them
_ALIGNMENT = 4096  # of tensors in the file of weights: they are mapped, not read
# Examples that are traced. All differ, so that none is taken for another.
_BATCH, _ROWS, _TOKENS, _PAST = 2, 3, 16, 5

Present = tuple[torch.Tensor, torch.Tensor]
Attend = Callable[..., tuple[torch.Tensor, Present]]


@dataclass(slots=True)
class _Reading:
    """What attention needs to know while the model is traced, and what it leaves behind."""

    attend: Attend
    past: list[Present]
    ids: torch.Tensor  # (B, L) int64
    past_lengths: torch.Tensor  # (B,) int64
    new_lengths: torch.Tensor  # (B,) int64
    angles: Angles | None = None
    present: dict[int, Present] = field(default_factory=dict)


_READING: ContextVar[_Reading] = ContextVar("reading")


class ReadingModel(PreTrainedModel):
    """A causal model that goes on where keys and values end, with its pooling behind it.

    Of B chapters, padded on the right, L new tokens at most:

        input_ids (B, L) int64          token_weights (B, R, L) float32
        past_lengths (B,) int64         new_lengths (B,) int64, from 1 to L
        past.N (B, key heads, P, head dim) float32: keys where N is even, values where it is
                                        odd, of layer N // 2
        opening (B, hidden) float32     last state before the new tokens   } with surprise
        ends (B, E) int64               places among the new tokens        }

    gives `pooled (B, R, state_dim)`, `present.N`, and with surprise
    `token_nats (B, L)`: minus the log-probability of each token given those before it, and
    `end_states (B, E, hidden)`: the last states at `ends`, for a later call to open with.
    """

    _supports_sdpa = True  # whatever attention the model inside has: the wrapper has none

    def __init__(
        self, model: PreTrainedModel, pooling: Pooling, attend: Attend, *, surprise: bool
    ) -> None:
        super().__init__(copy.deepcopy(model.config))
        self.reader = model.base_model
        self.pooling = pooling
        # Without surprise the output layer stays outside, and so out of the graph.
        self.head = model.get_output_embeddings() if surprise else None
        self._attend = attend

    def forward(  # noqa: PLR0917 - the tracer names inputs by their place
        self,
        input_ids: torch.Tensor,
        token_weights: torch.Tensor,
        past_lengths: torch.Tensor,
        new_lengths: torch.Tensor,
        past: list[torch.Tensor],
        opening: torch.Tensor | None = None,
        ends: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Read on."""
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)[None, :]  # (1, L)
        # Padding stands where the last token does: no position is one that the model lacks.
        within = torch.minimum(steps, new_lengths[:, None] - 1)
        layers = list(zip(past[::2], past[1::2], strict=True))
        reading = _Reading(self._attend, layers, input_ids, past_lengths, new_lengths)
        token = _READING.set(reading)
        try:
            found = self.reader(
                input_ids=input_ids,
                position_ids=past_lengths[:, None] + within,
                output_hidden_states=True,
                use_cache=False,
                return_dict=True,
            )
        finally:
            _READING.reset(token)
        states = [self._normalise(found.hidden_states[layer]) for layer in self.pooling.layers]
        if self.pooling.combine == "average":
            pooled = torch.stack(states).mean(dim=0)
        else:
            pooled = torch.cat(states, dim=-1)
        # A weight of 0 does not make padding vanish that is not a number.
        real = steps < new_lengths[:, None]
        pooled = torch.where(real[..., None], pooled, torch.zeros_like(pooled))
        outputs: dict[str, Any] = {"pooled": torch.matmul(token_weights, pooled)}
        if self.head is not None and opening is not None and ends is not None:
            last = found.hidden_states[-1].float()
            before = torch.cat([opening[:, None], last[:, :-1]], dim=1)
            outputs["token_nats"] = _token_nats(before, input_ids, self.head)
            outputs["end_states"] = torch.gather(
                last, 1, ends[..., None].expand(-1, -1, last.shape[-1])
            )
        outputs["present"] = [
            part for layer in sorted(reading.present) for part in reading.present[layer]
        ]
        return outputs

    def _normalise(self, state: torch.Tensor) -> torch.Tensor:
        state = state.float()
        if self.pooling.normalise == "none":
            return state
        return state * torch.rsqrt(state.square().mean(dim=-1, keepdim=True) + _RMS_EPSILON)


def export_graphs(
    model: PreTrainedModel, pooling: Pooling, folder: Path, *, surprise: bool
) -> None:
    """Write both graphs and their weights into the bundle's folder.

    The model is left as it was, in evaluation mode. Raises LLM4ESError where it cannot be
    exported.
    """
    graphs = {CACHED_GRAPH: _fused, PORTABLE_GRAPH: _in_plain_operators}
    (folder / WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
    with (folder / WEIGHTS).open("wb") as file:
        weights = SharedWeights(file)
        for name, attend in graphs.items():
            wrapper = ReadingModel(model, pooling, attend, surprise=surprise)
            with one_operator(wrapper, _angles) if attend is _fused else nullcontext():
                graph = _trace(model, wrapper)
            _scrub(graph)
            share_shapes(graph)
            join_reshapes(graph)
            weights.move(graph)
            onnx.save_model(graph, str(folder / name))


def _trace(model: PreTrainedModel, wrapper: PreTrainedModel) -> onnx.ModelProto:
    wrapper.eval()
    config = _GraphConfig(model.config, task="feature-extraction")
    config.surprise = wrapper.head is not None
    config.shape = _attention_shape(model)
    with tempfile.TemporaryDirectory(prefix="llm4es-graph-") as scratch:
        raw = Path(scratch) / "raw.onnx"
        with _as_it_was(model), _quietly():
            try:
                model.set_attn_implementation(_ATTENTION)
                optimum_export(model=wrapper, config=config, output=raw, opset=OPSET)
            except Exception as error:  # torch's exporter and optimum raise whatever they like
                msg = f"a {model.config.model_type} model cannot be exported ({error})"
                raise LLM4ESError(msg) from error
        return onnx.load(str(raw))


def _attention_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Layers, key heads, and the width of one."""
    config = model.config
    heads = int(config.num_attention_heads)
    width = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return int(config.num_hidden_layers), int(key_heads), int(width)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (B, H, L, D), positions applied
    key: torch.Tensor,  # (B, K, L, D)
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float | None = None,
    **_others: object,
) -> tuple[torch.Tensor, None]:
    """Stand in for the model's own attention, in the form transformers asks for."""
    reading = _READING.get()
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # a number on every architecture
    output, present = reading.attend(
        query, key, value, reading.past[layer], reading, scaling or int(query.shape[-1]) ** -0.5
    )
    reading.present[layer] = present
    return output, None


AttentionInterface.register(_ATTENTION, _attention)


def _in_plain_operators(  # noqa: PLR0917 - of the kind `Attend`
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past: Present,
    reading: _Reading,
    scale: float,
) -> tuple[torch.Tensor, Present]:
    """Attend to pasts of many lengths and to the new tokens; give the new keys and values."""
    batch, tokens = reading.ids.shape
    heads, key_heads, width = _fixed(query, key)
    keys, values = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
    old = torch.arange(past[0].shape[2])[None, None, :] < reading.past_lengths[:, None, None]
    steps = torch.arange(tokens)
    new = (steps[None, :] <= steps[:, None])[None]  # (1, L, L)
    seen = torch.cat(
        [old.expand(batch, tokens, -1), new.expand(batch, -1, -1)], dim=2
    )  # (B, L, P + L)
    grouped = query.reshape(batch, key_heads, heads // key_heads * tokens, width)
    scores = torch.matmul(grouped, keys.transpose(2, 3)) * scale
    scores = scores.reshape(batch, heads, tokens, -1)
    scores = torch.where(seen[:, None], scores, torch.full_like(scores, -3.0e38))
    shares = torch.softmax(scores, dim=-1).reshape(batch, key_heads, -1, scores.shape[-1])
    output = torch.matmul(shares, values).reshape(batch, heads, tokens, width)
    return output.transpose(1, 2), (key, value)


def _fused(  # noqa: PLR0917 - of the kind `Attend`
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past: Present,
    reading: _Reading,
    scale: float,
) -> tuple[torch.Tensor, Present]:
    """The same as one operator, that puts new keys and values behind the old ones."""
    batch, tokens = reading.ids.shape
    heads, key_heads, width = _fixed(query, key)
    totals = reading.past_lengths + reading.new_lengths
    output, *present = _GroupQueryAttention.apply(
        query.transpose(1, 2).reshape(batch, tokens, heads * width),
        key.transpose(1, 2).reshape(batch, tokens, key_heads * width),
        value.transpose(1, 2).reshape(batch, tokens, key_heads * width),
        *past,
        (totals - 1).to(torch.int32),
        totals.max().to(torch.int32),
        reading.new_lengths.to(torch.int32),
        heads,
        key_heads,
        scale,
    )
    return output.reshape(batch, tokens, heads, width), (present[0], present[1])


def _angles(cosines: torch.Tensor, sines: torch.Tensor) -> Angles:
    """Give what all layers turn by, made when the first of them asks."""
    reading = _READING.get()
    if reading.angles is None:
        reading.angles = Angles.of(cosines, sines, reading.ids)
    return reading.angles


def _fixed(query: torch.Tensor, key: torch.Tensor) -> tuple[int, int, int]:
    """Heads, key heads and their width as plain numbers: the tracer would keep them open."""
    return int(query.shape[1]), int(key.shape[1]), int(query.shape[3])


class _GroupQueryAttention(torch.autograd.Function):
    """com.microsoft.GroupQueryAttention, as the tracer sees it: its shapes and its name."""

    @staticmethod
    def forward(_context: Any, *inputs: Any) -> Any:  # noqa: ANN401 - torch's signature
        query, _, _, past_key, past_value = inputs[:5]
        return torch.zeros_like(query), past_key.clone(), past_value.clone()

    @staticmethod
    def symbolic(g: Any, *inputs: Any) -> Any:  # noqa: ANN401 - torch's signature
        query, key, value, past_key, past_value, last, total, new, heads, key_heads, scale = inputs
        absent = g.op("prim::Constant")
        absent.setType(torch._C.OptionalType.ofTensor())  # noqa: SLF001 - how torch spells "none"
        found = g.op(
            "com.microsoft::GroupQueryAttention",
            *(query, key, value, past_key, past_value, last, total),
            *([absent] * 9),
            new,
            num_heads_i=heads,
            kv_num_heads_i=key_heads,
            scale_f=scale,
            outputs=3,
        )
        for output, like in zip(found, (query, past_key, past_value), strict=True):
            output.setType(like.type())
        return found


def _token_nats(
    before: torch.Tensor, input_ids: torch.Tensor, head: torch.nn.Module
) -> torch.Tensor:
    """States (B, L, hidden) and the ids that follow them (B, L) to nats (B, L).

    The norm is summed over slices of the vocabulary: logits of 150,000 entries would take more
    memory than the model.
    """
    parameters = dict(head.named_parameters())
    weight, bias = parameters["weight"].float(), parameters.get("bias")
    states, ids = before.reshape(-1, before.shape[-1]), input_ids.reshape(-1)
    top = norm = torch.zeros(0)
    for start in range(0, int(weight.shape[0]), VOCABULARY_SLICE):
        part = slice(start, start + VOCABULARY_SLICE)
        logits = functional.linear(states, weight[part], None if bias is None else bias[part])
        highest = logits.max(dim=-1).values
        if start:
            highest = torch.maximum(top, highest)
        sums = torch.exp(logits - highest[:, None]).sum(dim=-1)
        norm = norm * torch.exp(top - highest) + sums if start else sums
        top = highest
    chosen = (states * torch.index_select(weight, 0, ids)).sum(dim=-1)
    if bias is not None:
        chosen = chosen + torch.index_select(bias, 0, ids)
    return (top + torch.log(norm) - chosen).reshape(input_ids.shape)


class _GraphConfig(TextEncoderOnnxConfig):  # type: ignore[misc]  # optimum has no types
    """Names and dynamic axes of inputs and outputs, and the example that is traced."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    surprise = False
    shape = (1, 1, 1)  # layers, key heads, their width

    @property
    def inputs(self) -> "OrderedDict[str, dict[int, str]] | dict[str, dict[int, str]]":
        named = {
            "input_ids": {0: "batch", 1: "tokens"},
            "token_weights": {0: "batch", 1: "rows", 2: "tokens"},
            "past_lengths": {0: "batch"},
            "new_lengths": {0: "batch"},
        }
        named |= {name: {0: "batch", 2: "capacity"} for name in self._layers("past")}
        if self.surprise:
            named |= {"opening": {0: "batch"}, "ends": {0: "batch", 1: "events"}}
        return named

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        named = {"pooled": {0: "batch", 1: "rows"}}
        if self.surprise:
            named |= {
                "token_nats": {0: "batch", 1: "tokens"},
                "end_states": {0: "batch", 1: "events"},
            }
        return named | {name: {0: "batch", 2: "written"} for name in self._layers("present")}

    def generate_dummy_inputs(self, framework: str = "pt", **_shapes: object) -> dict[str, Any]:
        """Ids 1, 2, 3 ... behind a short past, and equal weights."""
        layers, key_heads, width = self.shape
        ids = torch.arange(1, _TOKENS + 1).repeat(_BATCH, 1)
        cache = torch.zeros(_BATCH, key_heads, _PAST, width)
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "token_weights": torch.ones(_BATCH, _ROWS, _TOKENS),
            "past_lengths": torch.tensor([_PAST, _PAST - 2]),
            "new_lengths": torch.tensor([_TOKENS, _TOKENS - 3]),
            "past": [cache.clone() for _ in range(2 * layers)],
        }
        if self.surprise:
            hidden = int(self._config.hidden_size)
            inputs |= {
                "opening": torch.ones(_BATCH, hidden),
                "ends": torch.zeros(_BATCH, _ROWS + 1, dtype=torch.int64),
            }
        return inputs if framework == "pt" else _as_arrays(inputs)

    def _layers(self, what: str) -> list[str]:
        return [f"{what}.{number}" for number in range(2 * self.shape[0])]


def _as_arrays(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [part.numpy() for part in value] if isinstance(value, list) else value.numpy()
        for name, value in inputs.items()
    }


@dataclass(slots=True)
class SharedWeights:
    """One file for the tensors of several graphs, each written once."""

    file: BinaryIO
    places: dict[bytes, int] = field(default_factory=dict)  # hash of a tensor's bytes -> offset

    def move(self, graph: onnx.ModelProto) -> None:
        """Move what is large out of the graph, and say in the graph where it is."""
        for tensor in _constants(graph):
            content = onnx.numpy_helper.to_array(tensor).tobytes()
            if len(content) <= _INLINE_BYTES:
                continue
            digest = hashlib.sha256(content).digest()
            if digest not in self.places:
                self.file.write(b"\0" * (-self.file.tell() % _ALIGNMENT))
                self.places[digest] = self.file.tell()
                self.file.write(content)
            tensor.raw_data = b""
            set_external_data(
                tensor, Path(WEIGHTS).name, offset=self.places[digest], length=len(content)
            )
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL


def _constants(graph: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from graph.graph.initializer
    for node in graph.graph.node:
        yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))


def _scrub(graph: onnx.ModelProto) -> None:
    """Forget where each node came from: stack traces hold paths of the machine that exported."""
    graph.doc_string = ""
    for node in graph.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Undo what is set in the model's configuration while it is exported."""
    was = {name: getattr(model.config, name, None) for name in ("use_cache", "return_dict")}
    attention = model.config._attn_implementation  # noqa: SLF001 - transformers has no other name
    training = model.training
    try:
        yield
    finally:
        for name, value in was.items():
            setattr(model.config, name, value)
        model.set_attn_implementation(attention)
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

"""Quantizing: a bundle's graphs anew, in less precision. Figures are `export.judging`'s matter.

Only products with a constant matrix inside the model's layers change. Embedding table, norms,
attention, keys and values, pooling and the output layer stay in fp32.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.graphs import SharedWeights
from llm4es.bundle import (
    ARRAYS,
    CACHED_GRAPH,
    PORTABLE_GRAPH,
    SCHEMA,
    TOKENIZER,
    WEIGHTS,
    Bundle,
    ComputePrecision,
)
from llm4es.errors import ConfigError, LLM4ESError

__all__ = ["BLOCK", "write_variant"]

BLOCK = 32  # weights that share a scale, where weights alone are quantized
_LAYER = re.compile(r"/reader/(layers|h)\.\d+/")
_MICROSOFT = "com.microsoft"
_LEAST = np.float32(1e-30)  # a scale of a row of zeros


@dataclass(slots=True)
class _Edit:
    """One graph being rewritten: what is put in front of a node, and what is made once."""

    nodes: list[NodeProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)

    def constant(self, name: str, array: NDArray[np.generic]) -> str:
        """Add a constant, once."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:  # noqa: ANN401 - onnx takes many kinds
        """Add a node, unless it was made for another's sake."""
        if output not in self.made:
            self.made.add(output)
            name = f"{output}/{kind}"
            self.nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output


# (edit, activations (..., K), weights (K, N), their name, output (..., N))
_Product = Callable[[_Edit, str, NDArray[np.float32], str, str], None]


def write_variant(
    source: Bundle, precision: ComputePrecision, folder: Path, *, keep: str | None = None
) -> None:
    """Write everything but the manifest of a bundle in another precision into an empty folder.

    Products whose node's name has a match of the expression `keep` stay in fp32. Raises
    ConfigError for an expression that fits nothing or is none, LLM4ESError where the model has
    no product that could be quantized.
    """
    for name in (TOKENIZER, SCHEMA, ARRAYS):
        shutil.copyfile(source.folder / name, folder / name)
    if (source.folder / "model").is_dir():
        shutil.copytree(source.folder / "model", folder / "model")
    kept = _expression(keep)
    (folder / WEIGHTS).parent.mkdir()
    if precision in {"fp32", "bf16"}:  # bf16 is what OpenVINO makes of fp32 files
        for name in (CACHED_GRAPH, PORTABLE_GRAPH, WEIGHTS):
            shutil.copyfile(source.folder / name, folder / name)
        return
    product = _PRODUCTS[precision]
    with (folder / WEIGHTS).open("wb") as file:
        weights = SharedWeights(file)
        for name in (CACHED_GRAPH, PORTABLE_GRAPH):
            graph = onnx.load(str(source.folder / name))
            _rewrite(graph, product, kept)
            weights.move(graph)
            onnx.save_model(graph, str(folder / name))


def _expression(keep: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(keep) if keep is not None else None
    except re.error as error:
        raise ConfigError("keep", f"{keep!r} is no expression ({error})", "mend it") from error


def _rewrite(graph: onnx.ModelProto, product: _Product, kept: re.Pattern[str] | None) -> None:
    constants = {each.name: each for each in graph.graph.initializer}
    edit, replaced, spared = _Edit(), set(), 0
    for node in graph.graph.node:
        weights = _matrix(node, constants)
        if weights is None:
            edit.nodes.append(node)
        elif kept is not None and kept.search(node.name):
            edit.nodes.append(node)
            spared += 1
        else:
            out = node.output[0]
            biased = len(node.input) > 2  # noqa: PLR2004 - a Gemm's third is its bias
            product(
                edit, node.input[0], weights, node.input[1], f"{out}/product" if biased else out
            )
            if biased:
                edit.node("Add", [f"{out}/product", node.input[2]], out)
            replaced.add(node.input[1])
    if not replaced:
        msg = "no product of this model's layers can be quantized"
        raise LLM4ESError(msg)
    if kept is not None and not spared:
        first = next(node.name for node in graph.graph.node if _matrix(node, constants) is not None)
        raise ConfigError(
            "keep", f"{kept.pattern!r} fits no product", f"they are named like {first}"
        )
    used = {name for node in edit.nodes for name in node.input}
    initializers = [each for each in constants.values() if each.name in used]
    del graph.graph.node[:]
    graph.graph.node.extend(edit.nodes)
    del graph.graph.initializer[:]
    graph.graph.initializer.extend([*initializers, *edit.initializers.values()])
    if _MICROSOFT not in {each.domain for each in graph.opset_import}:
        graph.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))


def _matrix(node: NodeProto, constants: dict[str, TensorProto]) -> NDArray[np.float32] | None:
    """The constant matrix (K, N) of a layer's product; None where a node is none."""
    if node.op_type not in {"MatMul", "Gemm"} or _LAYER.search(node.name) is None:
        return None
    found = constants.get(node.input[1])
    if found is None or len(found.dims) != 2:  # noqa: PLR2004 - a matrix
        return None
    options = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    if options.get("transA") or {options.get("alpha", 1.0), options.get("beta", 1.0)} != {1.0}:
        return None
    matrix: NDArray[np.float32] = numpy_helper.to_array(found)
    return matrix.T if options.get("transB") else matrix


def _half(edit: _Edit, states: str, weights: NDArray[np.float32], name: str, out: str) -> None:
    """Both sides in fp16; a sum is the provider's, at least as exact as fp16."""
    half = edit.node("Cast", [states], f"{states}/fp16", to=TensorProto.FLOAT16)
    with np.errstate(over="ignore"):  # an infinity is seen when the variant is judged
        narrow = edit.constant(f"{name}/fp16", weights.astype(np.float16))
    product = edit.node("MatMul", [half, narrow], f"{out}/fp16")
    edit.node("Cast", [product], out, to=TensorProto.FLOAT)


def _bytes(edit: _Edit, states: str, weights: NDArray[np.float32], name: str, out: str) -> None:
    """Bytes, with a scale for each token and each column: a row knows nothing of its mates.

    Both sides are unsigned with 128 for zero: signed ones saturate on CPUs without VNNI.
    """
    last = edit.constant("int8/last", np.array([-1], dtype=np.int64))
    size = edit.node("Abs", [states], f"{states}/size")
    largest = edit.node("ReduceMax", [size, last], f"{states}/largest", keepdims=1)
    least = edit.constant("int8/least", np.array(_LEAST))
    some = edit.node("Max", [largest, least], f"{states}/some")
    steps = edit.constant("int8/steps", np.array(127, dtype=np.float32))
    scale = edit.node("Div", [some, steps], f"{states}/scale")
    scaled = edit.node("Div", [states, scale], f"{states}/scaled")
    rounded = edit.node("Round", [scaled], f"{states}/rounded")
    middle = edit.constant("int8/middle", np.array(128, dtype=np.float32))
    shifted = edit.node("Add", [rounded, middle], f"{states}/shifted")
    small = edit.node("Cast", [shifted], f"{states}/uint8", to=TensorProto.UINT8)
    zero = edit.constant("int8/zero", np.array(128, dtype=np.uint8))
    columns = np.maximum(np.abs(weights).max(axis=0), _LEAST) / np.float32(127)  # (N,)
    narrow = (np.rint(weights / columns) + 128).astype(np.uint8)
    inputs = [small, edit.constant(f"{name}/uint8", narrow), zero, zero]
    product = edit.node("MatMulInteger", inputs, f"{out}/int32")
    real = edit.node("Cast", [product], f"{out}/float", to=TensorProto.FLOAT)
    by_row = edit.node("Mul", [real, scale], f"{out}/by_row")
    edit.node("Mul", [by_row, edit.constant(f"{name}/scales", columns)], out)


def _blocks(bits: int) -> _Product:
    """Weights alone, a scale for each block of a column; activations and sums stay fp32."""
    middle = 1 << (bits - 1)

    def product(
        edit: _Edit, states: str, weights: NDArray[np.float32], name: str, out: str
    ) -> None:
        inner, columns = weights.shape
        count = -(-inner // BLOCK)
        blocks = np.pad(weights.T, ((0, 0), (0, count * BLOCK - inner)))
        blocks = blocks.reshape(columns, count, BLOCK)  # (N, blocks, 32)
        scales = np.maximum(np.abs(blocks).max(axis=-1), _LEAST) / np.float32(middle - 1)
        found = (np.rint(blocks / scales[..., None]) + middle).astype(np.uint8)
        if bits == _NIBBLE:
            found = found[..., ::2] | (found[..., 1::2] << _NIBBLE)
        edit.node(
            "MatMulNBits",
            [
                states,
                edit.constant(f"{name}/int{bits}", found),
                edit.constant(f"{name}/scales{bits}", scales.reshape(-1)),
            ],
            out,
            domain=_MICROSOFT,
            K=inner,
            N=columns,
            bits=bits,
            block_size=BLOCK,
            accuracy_level=1,  # fp32: a row depends on nothing but itself, and weights alone lose
        )

    return product


_NIBBLE = 4  # bits
_PRODUCTS: dict[ComputePrecision, _Product] = {
    "fp16": _half,
    "int8": _bytes,
    "int8-weights": _blocks(8),
    "int4-weights": _blocks(_NIBBLE),
}

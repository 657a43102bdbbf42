"""Shapes that a traced graph asks for again and again, asked for once.

Transformers reads batch and length off the states of every layer. All of them are those of
`input_ids`, which a runtime cannot know: it would ask, cut and join them anew in each layer. Nor
can it know that states which are cut into heads and joined again are as they were.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

__all__ = ["join_reshapes", "share_shapes"]

_IDS = "input_ids"
_SHAPED_AS_THE_FIRST = {"GroupQueryAttention", "RotaryEmbedding"}  # their first output is
_NAMES = {0: f"{_IDS}.batch", 1: f"{_IDS}.tokens"}  # by its place in the shape
_ELEMENTWISE = {"Add", "Cast", "Div", "Identity", "Mul", "Pow", "Sub"}
_OF_THE_FIRST = {"LayerNormalization", "MatMul"}  # that is what leads what comes out


def share_shapes(graph: onnx.ModelProto) -> None:
    """Read batch and length off `input_ids` wherever states that follow its shape are asked."""
    nodes = graph.graph.node
    made = {output: node for node in nodes for output in node.output}
    numbers = _numbers(graph)
    known: dict[str, bool] = {}
    instead = {}
    for node in nodes:
        asked = made.get(node.input[0]) if node.op_type == "Gather" else None
        if asked is None or asked.op_type != "Shape":
            continue
        place = numbers.get(node.input[1])
        if place in _NAMES and _follows(asked.input[0], made, known):
            instead[node.output[0]] = _NAMES[place]
    for node in nodes:
        for number, name in enumerate(node.input):
            node.input[number] = instead.get(name, name)
    for node in _asking():
        nodes.insert(0, node)
    _prune(graph.graph)


def join_reshapes(graph: onnx.ModelProto) -> None:
    """Leave out what turns axes about and back again, and reshapes that another one follows.

    And those that give what they were given, (B, L, width). After `share_shapes`.
    """
    nodes = graph.graph.node
    made = {output: node for node in nodes for output in node.output}
    widths = {one.name: one.dims[1] for one in graph.graph.initializer if len(one.dims) == 2}  # noqa: PLR2004
    sizes = _sizes(graph, made)
    known: dict[str, bool] = {}
    instead: dict[str, str] = {}
    for node in nodes:
        for number, name in enumerate(node.input):
            node.input[number] = instead.get(name, name)
        source = made.get(node.input[0]) if node.input else None
        if node.op_type == "Transpose" and source is not None and source.op_type == "Transpose":
            axes, before = (list(each.attribute[0].ints) for each in (node, source))
            if [before[axis] for axis in axes] == sorted(axes):
                instead[node.output[0]] = source.input[0]
        elif node.op_type == "Reshape" and (wanted := sizes.get(node.input[1])) is not None:
            if source is not None and source.op_type == "Reshape":
                node.input[0] = source.input[0]
            width = _width(node.input[0], made, widths, known)
            if width is not None and wanted in ((*_NAMES.values(), width), (*_NAMES.values(), -1)):
                instead[node.output[0]] = node.input[0]
    _prune(graph.graph)


def _width(
    name: str,
    made: Mapping[str, onnx.NodeProto],
    widths: Mapping[str, int],
    known: dict[str, bool],
) -> int | None:
    """Last size of states (B, L, width), where they are known to be such."""
    node = made.get(name)
    if node is None:
        return None
    if node.op_type == "MatMul" and _follows(node.input[0], made, known):
        return widths.get(node.input[1])
    if node.op_type in _SHAPED_AS_THE_FIRST and name == node.output[0]:
        return _width(node.input[0], made, widths, known)
    return None


def _sizes(
    graph: onnx.ModelProto, made: Mapping[str, onnx.NodeProto]
) -> dict[str, tuple[str | int, ...]]:
    """Shapes that are joined of batch, length and numbers that are not 0, by their names."""
    numbers = _lists(graph)

    def part(name: str) -> str | int | None:
        node = made.get(name)
        if node is not None and node.op_type == "Unsqueeze":
            return node.input[0] if node.input[0] in _NAMES.values() else None
        found = numbers.get(name, ())
        return found[0] or None if len(found) == 1 else None

    joined = {
        node.output[0]: tuple(part(name) for name in node.input)
        for node in graph.graph.node
        if node.op_type == "Concat"
    }
    return {
        name: tuple(one for one in parts if one is not None)
        for name, parts in joined.items()
        if None not in parts
    }


def _follows(name: str, made: Mapping[str, onnx.NodeProto], known: dict[str, bool]) -> bool:
    """Whether a tensor's first two dimensions are those of `input_ids`."""
    if name == _IDS:
        return True
    if name not in known:
        node = made.get(name)
        known[name] = False
        if node is not None and node.op_type in _ELEMENTWISE:
            known[name] = any(_follows(one, made, known) for one in node.input)
        elif node is not None and node.op_type in _OF_THE_FIRST:
            known[name] = _follows(node.input[0], made, known)
        elif node is not None and node.op_type == "Gather":  # what an id is embedded as
            known[name] = node.input[1] == _IDS
    return known[name]


def _numbers(graph: onnx.ModelProto) -> dict[str, int]:
    """Constants that are one integer."""
    return {name: int(found) for name, found in _integers(graph) if not found.ndim}


def _lists(graph: onnx.ModelProto) -> dict[str, list[int]]:
    """Constants that are a list of integers."""
    return {name: found.tolist() for name, found in _integers(graph) if found.ndim == 1}


def _integers(graph: onnx.ModelProto) -> Iterator[tuple[str, NDArray[np.int64]]]:
    tensors = [(tensor.name, tensor) for tensor in graph.graph.initializer]
    tensors += [
        (node.output[0], node.attribute[0].t)
        for node in graph.graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    ]
    for name, tensor in tensors:
        if tensor.data_type == onnx.TensorProto.INT64:
            yield name, numpy_helper.to_array(tensor)


def _asking() -> Iterator[onnx.NodeProto]:
    """What reads them off, last node first."""
    shape = f"{_IDS}.shape"
    for place, name in _NAMES.items():
        index = f"{name}.place"
        yield helper.make_node("Gather", [shape, index], [name], name=name, axis=0)
        value = numpy_helper.from_array(np.array(place, dtype=np.int64))
        yield helper.make_node("Constant", [], [index], name=index, value=value)
    yield helper.make_node("Shape", [_IDS], [shape], name=shape)


def _prune(graph: onnx.GraphProto) -> None:
    """Leave out what nobody reads any more."""
    read = {output.name for output in graph.output}
    for number in reversed(range(len(graph.node))):
        node = graph.node[number]
        if read.isdisjoint(node.output):
            del graph.node[number]
        else:
            read.update(node.input)

"""Shapes that a traced graph asks for again and again, asked for once.

Transformers reads batch and length off the states of every layer. All of them are those of
`input_ids`, which a runtime cannot know: it would ask, cut and join them anew in each layer.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["share_shapes"]

_IDS = "input_ids"
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
    tensors = [(tensor.name, tensor) for tensor in graph.graph.initializer]
    tensors += [
        (node.output[0], node.attribute[0].t)
        for node in graph.graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    ]
    return {
        name: int(numpy_helper.to_array(tensor).item())
        for name, tensor in tensors
        if tensor.data_type == onnx.TensorProto.INT64 and not tensor.dims
    }


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

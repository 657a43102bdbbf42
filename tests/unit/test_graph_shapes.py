"""Shapes asked once: what follows `input_ids`, and what does not."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.shapes import share_shapes


def _graph(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """Size of a state's first dimension, whatever the state is made of."""
    constants = [
        numpy_helper.from_array(np.array(0), "first"),
        numpy_helper.from_array(np.zeros((9, 4), dtype=np.float32), "embeddings"),
        numpy_helper.from_array(np.zeros((4, 4), dtype=np.float32), "matrix"),
    ]
    asking = [
        helper.make_node("Shape", ["state"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["size"]),
        helper.make_node("Identity", ["size"], ["told"]),
    ]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "L"]),
        helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["B", "R", "L"]),
    ]
    told = helper.make_tensor_value_info("told", TensorProto.INT64, [])
    graph = helper.make_graph([*nodes, *asking], "graph", inputs, [told], constants)
    return helper.make_model(graph)


def _asked(model: onnx.ModelProto) -> set[str]:
    return {node.input[0] for node in model.graph.node if node.op_type == "Shape"}


_EMBEDDED = helper.make_node("Gather", ["embeddings", "input_ids"], ["embedded"])


def test_what_is_made_of_the_ids_is_asked_of_the_ids() -> None:
    product = helper.make_node("MatMul", ["embedded", "matrix"], ["product"])
    model = _graph(_EMBEDDED, product, helper.make_node("Add", ["embedded", "product"], ["state"]))

    share_shapes(model)

    assert _asked(model) == {"input_ids"}
    onnx.checker.check_model(model)
    # Nobody reads the states themselves here.
    assert not {"Add", "MatMul"} & {node.op_type for node in model.graph.node}


def test_a_shape_that_may_be_another_is_left() -> None:
    for state in (
        helper.make_node("MatMul", ["weights", "embedded"], ["state"]),
        helper.make_node("Transpose", ["embedded"], ["state"], perm=[1, 0, 2]),
        helper.make_node("Identity", ["weights"], ["state"]),
    ):
        model = _graph(_EMBEDDED, state)
        share_shapes(model)
        assert "state" in _asked(model)

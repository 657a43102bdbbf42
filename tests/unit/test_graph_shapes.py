"""Shapes asked once, and reshapes left out: what follows `input_ids`, and what does not."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.shapes import join_reshapes, share_shapes


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
    outputs = [
        helper.make_tensor_value_info("told", TensorProto.INT64, []),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, [None] * 3),
    ]
    graph = helper.make_graph([*nodes, *asking], "graph", inputs, outputs, constants)
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


def test_a_shape_that_may_be_another_is_left() -> None:
    for state in (
        helper.make_node("MatMul", ["weights", "embedded"], ["state"]),
        helper.make_node("Transpose", ["embedded"], ["state"], perm=[1, 0, 2]),
        helper.make_node("Identity", ["weights"], ["state"]),
    ):
        model = _graph(_EMBEDDED, state)
        share_shapes(model)
        assert "state" in _asked(model)


def _cut_and_joined(*sizes: str) -> list[onnx.NodeProto]:
    """States (B, L, 4) cut into two heads, turned about and back, and joined as `sizes` say."""
    constants = {"second": 1, "at": [0], "rest": [-1], "head": [2], "width": [4], "half": [2]}
    return [
        *(
            helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value)))
            for name, value in constants.items()
        ),
        _EMBEDDED,
        helper.make_node("MatMul", ["embedded", "matrix"], ["product"]),
        helper.make_node("Shape", ["embedded"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "first"], ["batch.size"]),
        helper.make_node("Gather", ["sizes", "second"], ["tokens.size"]),
        helper.make_node("Unsqueeze", ["batch.size", "at"], ["batch"]),
        helper.make_node("Unsqueeze", ["tokens.size", "at"], ["tokens"]),
        helper.make_node("Concat", ["batch", "tokens", "rest", "head"], ["in_heads"], axis=0),
        helper.make_node("Concat", sizes, ["whole"], axis=0),
        helper.make_node("Reshape", ["product", "in_heads"], ["cut"]),
        helper.make_node("Transpose", ["cut"], ["about"], perm=[0, 2, 1, 3]),
        helper.make_node("Transpose", ["about"], ["back"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["back", "whole"], ["joined"]),
        helper.make_node("Identity", ["joined"], ["state"]),
    ]


@pytest.mark.parametrize("last", ["width", "rest"])
def test_states_that_are_cut_and_joined_again_are_as_they_were(last: str) -> None:
    model = _graph(*_cut_and_joined("batch", "tokens", last))

    share_shapes(model)
    join_reshapes(model)

    assert not {"Reshape", "Transpose"} & {node.op_type for node in model.graph.node}
    (told,) = (node for node in model.graph.node if node.output[0] == "state")
    assert told.input[0] == "product"


def test_a_reshape_that_changes_something_stays() -> None:
    model = _graph(*_cut_and_joined("batch", "rest", "half"))

    share_shapes(model)
    join_reshapes(model)

    (reshape,) = (node for node in model.graph.node if node.op_type == "Reshape")
    assert list(reshape.input) == ["product", "whole"]
    assert "Transpose" not in {node.op_type for node in model.graph.node}

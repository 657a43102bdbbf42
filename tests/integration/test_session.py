"""A graph that onnxruntime loads and cannot run is refused in one line."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from llm4es.engine.session import FullGraph
from llm4es.errors import BundleMismatch

IDS, ROWS, VALUES = "input_ids", "token_weights", "values"


def test_a_graph_that_fails_as_it_runs_is_refused(tmp_path: Path) -> None:
    table = helper.make_tensor(VALUES, TensorProto.FLOAT, [2], [0.0, 1.0])
    graph = helper.make_graph(
        [
            helper.make_node("Gather", [VALUES, IDS], ["found"]),
            helper.make_node("Unsqueeze", ["found", "axes"], ["wide"]),
            helper.make_node("MatMul", [ROWS, "wide"], ["pooled"]),
        ],
        "small",
        [
            helper.make_tensor_value_info(IDS, TensorProto.INT64, ["B", "L"]),
            helper.make_tensor_value_info(ROWS, TensorProto.FLOAT, ["B", "R", "L"]),
        ],
        [helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["B", "R", 1])],
        [table, helper.make_tensor("axes", TensorProto.INT64, [1], [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "full.onnx"
    onnx.save(model, str(path))
    opened = FullGraph(path, device="cpu", threads=1)
    weights = np.ones((1, 1, 2), dtype=np.float32)
    assert opened.run(np.array([[0, 1]]), weights)[0].tolist() == [[[1.0]]]
    with pytest.raises(BundleMismatch, match=r"full\.onnx: onnxruntime cannot run .*export") as no:
        opened.run(np.array([[0, 99]]), weights)
    assert "\n" not in str(no.value)

"""A graph that onnxruntime cannot load or run is refused in one line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from llm4es.bundle import CACHED_GRAPH
from llm4es.engine.opening import open_graph
from llm4es.engine.reading import ChapterGraph, Reading, read_whole
from llm4es.engine.session import OnnxGraph, open_cpu_graphs
from llm4es.errors import BundleMismatch, ConfigError
from tests.tiny_models import VARIANTS, Exported, make_bundle

CPU = ("CPUExecutionProvider",)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return make_bundle(tmp_path_factory.mktemp("bundle"), next(iter(VARIANTS.values())))


def reading_of(graph: ChapterGraph, ids: list[int]) -> Reading:
    return Reading(
        ids=np.array([ids]),
        weights=np.ones((1, 1, len(ids)), dtype=np.float32),
        past=np.zeros(1, dtype=np.int64),
        new=np.array([len(ids)]),
        kv=graph.kv_shape.empty(1, 16),
        opening=np.zeros((1, graph.hidden), dtype=np.float32),
        ends=np.array([[len(ids) - 1]]),
    )


def test_both_graphs_say_the_same_and_leave_the_same_keys_behind(exported: Exported) -> None:
    cached, portable = open_cpu_graphs(exported.bundle.folder, threads=1).values()
    one, other = reading_of(cached, [1, 2, 3]), reading_of(portable, [1, 2, 3])
    found, expected = cached.read(one), portable.read(other)
    np.testing.assert_allclose(found.pooled, expected.pooled, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.kv, other.kv, rtol=1e-4, atol=1e-5)
    assert np.abs(one.kv[:, :, :, :3]).min() > 0
    assert not one.kv[:, :, :, 3:].any()


def test_a_graph_that_fails_as_it_runs_is_refused(exported: Exported) -> None:
    graph = open_graph(exported.bundle, device="cpu", threads=1)
    weights = np.ones((1, 2), dtype=np.float32)
    assert read_whole(graph, np.array([0, 1]), weights)[0].shape[0] == 1
    with pytest.raises(
        BundleMismatch, match=r"cached\.onnx: onnxruntime cannot run .*export"
    ) as no:
        read_whole(graph, np.array([0, 99_999]), weights)
    assert "\n" not in str(no.value)
    broken = replace(reading_of(graph, [1, 2]), weights=np.ones((1, 1, 3), dtype=np.float32))
    with pytest.raises(BundleMismatch, match="cannot run"):
        graph.read(broken)


def test_a_graph_of_other_inputs_is_refused(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B"]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "cached.onnx"
    onnx.save(model, str(path))
    with pytest.raises(BundleMismatch, match="its inputs are not those of this code"):
        OnnxGraph(path, in_place=True, providers=CPU, threads=1)


def test_a_device_that_is_not_there_is_refused(exported: Exported) -> None:
    with pytest.raises(ConfigError, match=r"device: cuda asks for .*gpu"):
        open_graph(exported.bundle, device="cuda", threads=1)
    graph = open_graph(exported.bundle, device="auto", threads=1)
    assert graph.providers == CPU
    assert graph.on_cpu
    assert (exported.bundle.folder / CACHED_GRAPH).is_file()

"""OpenVINO serves what onnxruntime serves, and says so where it cannot."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llm4es.bundle import Bundle, Compute
from llm4es.engine import OnnxEmbedder
from llm4es.engine.kv_cache import ChapterCache
from llm4es.engine.opening import open_graph
from llm4es.engine.providers import CPU, OPENVINO
from llm4es.engine.reading import Reading, read_whole
from llm4es.errors import BundleMismatch, ConfigError
from tests.tiny_models import (
    VARIANTS,
    Exported,
    assert_close,
    assert_same,
    embedder_of,
    events_of,
    make_bundle,
    one_chapter,
    window_of,
)


@pytest.fixture(scope="module", params=[*VARIANTS.values()], ids=[*VARIANTS])
def exported(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Exported:
    return make_bundle(tmp_path_factory.mktemp("bundle"), request.param)


@pytest.fixture(scope="module")
def with_surprise(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return make_bundle(tmp_path_factory.mktemp("bundle"), next(iter(VARIANTS.values())))


def openvino_embedder(exported: Exported, cache: ChapterCache | None = None) -> OnnxEmbedder:
    graph = open_graph(exported.bundle, device="openvino", threads=1)
    assert graph.providers == (OPENVINO,)
    return OnnxEmbedder(exported.bundle, graph, cache=cache)


def test_vectors_and_surprise_are_those_of_onnxruntime(exported: Exported) -> None:
    windows = [window_of(exported.bundle, events_of(4 + 3 * n, customer=n)) for n in range(5)]
    found = openvino_embedder(exported).embed(windows)
    assert_same(found, range(len(windows)), embedder_of(exported).embed(windows))


def test_reading_on_equals_reading_anew(with_surprise: Exported) -> None:
    events = one_chapter(None, "a", None, "b", "c", None)
    embedder = openvino_embedder(with_surprise)
    anew = openvino_embedder(with_surprise, ChapterCache(0))
    for end in range(1, len(events) + 1):
        windows = [window_of(with_surprise.bundle, events[:end])]
        assert_same(embedder.embed(windows), [0], anew.embed(windows))
    assert embedder.tokens_read == len(with_surprise.bundle.tokens.tokenize(events).ids)


def test_many_pasts_of_many_lengths_are_read_together(with_surprise: Exported) -> None:
    bundle = with_surprise.bundle
    histories = [events_of(4 + n % 5, customer=n) for n in range(12)]
    embedder = openvino_embedder(with_surprise)
    for cut in (-1, None):
        windows = [window_of(bundle, history[:cut]) for history in histories]
        found = embedder.embed(windows)
        expected = embedder_of(with_surprise, cache=ChapterCache(0)).embed(windows)
        assert_same(found, range(len(windows)), expected)


def test_what_an_earlier_answer_held_is_not_overwritten(with_surprise: Exported) -> None:
    graph = open_graph(with_surprise.bundle, device="openvino", threads=1)
    weights = np.ones((1, 3), dtype=np.float32)
    pooled, _ = read_whole(graph, np.array([1, 2, 3]), weights)
    kept = pooled.copy()
    read_whole(graph, np.array([9, 8, 7]), weights)
    np.testing.assert_array_equal(pooled, kept)


def test_a_graph_that_fails_as_it_runs_is_refused_in_one_line(with_surprise: Exported) -> None:
    graph = open_graph(with_surprise.bundle, device="openvino", threads=1)
    reading = Reading(
        ids=np.array([[1, 2]]),
        weights=np.ones((1, 1, 3), dtype=np.float32),
        past=np.zeros(1, dtype=np.int64),
        new=np.array([2]),
        kv=graph.kv_shape.empty(1, 4),
        opening=np.zeros((1, graph.hidden), dtype=np.float32),
        ends=np.array([[1]]),
    )
    with pytest.raises(BundleMismatch, match=r"portable\.onnx: OpenVINO cannot run it") as no:
        graph.read(reading)
    assert "\n" not in str(no.value)


def test_a_file_that_is_no_graph_is_refused(with_surprise: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "graphs"
    folder.mkdir()
    (folder / "portable.onnx").write_bytes(b"no graph")
    broken = replace(with_surprise.bundle, folder=tmp_path)
    with pytest.raises(BundleMismatch, match=r"portable\.onnx: OpenVINO cannot load it"):
        open_graph(broken, device="openvino", threads=1)


def test_half_the_digits_are_given_only_where_the_manifest_says_so(tmp_path: Path) -> None:
    """bf16 where this CPU has it, and a refusal where it does not; onnxruntime has none."""
    half = make_bundle(
        tmp_path,
        next(iter(VARIANTS.values())),
        compute=Compute(precision="bf16", tolerance=5e-2),
    )
    with pytest.raises(ConfigError, match="cpu does not compute in bf16"):
        open_graph(half.bundle, device="cpu", threads=1)
    windows = [window_of(half.bundle, events_of(9))]
    exact = embedder_of(Exported(_as_fp32(half), half.model)).embed(windows)
    try:
        graph = open_graph(half.bundle, device="auto", threads=1)
    except ConfigError as refused:
        assert "this CPU does not have it" in refused.problem  # noqa: PT017 - as the machine is
        return
    assert graph.providers == (OPENVINO,)
    found = OnnxEmbedder(half.bundle, graph).embed(windows)
    assert_close(found.vectors, exact.vectors, tolerance=5e-2)
    assert np.abs(found.vectors - exact.vectors).max() > 1e-4 * np.abs(exact.vectors).max()


def _as_fp32(half: Exported) -> Bundle:
    manifest = half.bundle.manifest.model_copy(update={"compute": Compute()})
    return replace(half.bundle, manifest=manifest)


def test_it_is_not_chosen_by_itself_where_onnxruntime_is_there(with_surprise: Exported) -> None:
    assert open_graph(with_surprise.bundle, device="auto", threads=1).providers == (CPU,)

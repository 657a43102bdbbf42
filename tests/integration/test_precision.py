"""Bundles in less precision: made, judged, served, and refused where they lose too much."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from export.commands.precision import Cache, Precision
from export.corpus import read_log
from export.judging import Rows, compare, furthest
from export.labels import LabelColumns
from export.pooling import repool
from export.recipe import load_recipe
from export.variants import AUC_LOSS, COSINE, KEPT_NEIGHBOURS, Wanted, make_variant
from llm4es.bundle import Bundle, CachePrecision, ComputePrecision, load_bundle
from llm4es.engine import OnnxEmbedder, open_embedder
from llm4es.engine.kv_cache import ChapterCache
from llm4es.engine.opening import open_graph
from llm4es.errors import ConfigError
from tests.commands import run
from tests.integration.conftest import Sample
from tests.tiny_models import assert_close, window_of

QUIET = Console(quiet=True)
EVENTS = 12  # of each entity, that are served one by one
ENTITIES = 36


@pytest.fixture(scope="module")
def wanted(sample: Sample, bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Wanted:
    return Wanted(
        bundle=bundle_folder,
        out=tmp_path_factory.mktemp("variants") / "bundle",
        events=sample.events,
        entities=ENTITIES,
    )


@pytest.fixture(scope="module")
def make(wanted: Wanted) -> Callable[..., Bundle]:
    made: dict[str, Bundle] = {}

    def variant(**changes: Any) -> Bundle:  # noqa: ANN401 - fields of many kinds
        name = json.dumps(changes, sort_keys=True, default=str)
        if name not in made:
            out = wanted.out.with_name(str(len(made)))
            made[name] = make_variant(replace(wanted, out=out, **changes), QUIET)
        return made[name]

    return variant


def served(bundle: Bundle, sample: Sample, embedder: OnnxEmbedder) -> np.ndarray:
    log = read_log(sample.events, bundle.schema, entity="customer")
    histories = [history[:EVENTS] for _, history in sorted(log.histories.items())][:8]
    rows = []
    for history in histories:
        for end in range(1, len(history) + 1):
            window = window_of(bundle, history[:end])
            found = embedder.embed([window])
        rows.append(np.concatenate([found.vectors[0], found.surprise[0]]))
    return np.stack(rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp16"},
        {"precision": "int8"},
        {"precision": "int8-weights"},
        {"precision": "int4-weights", "cache": "fp16"},
        {"cache": "fp16"},
        {"cache": "int8"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_variant_loads_serves_and_is_another_bundle(
    make: Callable[..., Bundle], wanted: Wanted, sample: Sample, changes: dict[str, str]
) -> None:
    origin = load_bundle(wanted.bundle)
    bundle = make(**changes)
    compute = bundle.manifest.compute
    assert bundle.id != origin.id
    assert compute.precision == changes.get("precision", "fp32")
    assert compute.cache == changes.get("cache", "fp32")
    judged = compute.judged
    assert judged is not None
    assert (judged.origin, judged.entities, judged.auc_loss) == (origin.id, ENTITIES, None)
    assert COSINE <= judged.cosine <= 1
    assert KEPT_NEIGHBOURS <= judged.neighbours <= 1
    assert not judged.forced
    cached = OnnxEmbedder(bundle, open_graph(bundle, device="auto", threads=1))
    anew = OnnxEmbedder(
        bundle, open_graph(bundle, device="auto", threads=1), cache=ChapterCache(0), memo_bytes=0
    )
    found, expected = served(bundle, sample, cached), served(bundle, sample, anew)
    for row, one in enumerate(found):
        assert_close(one, expected[row], tolerance=compute.tolerance)
    exact = served(origin, sample, open_embedder(origin, device="cpu", threads=1))
    assert not np.array_equal(found, exact)
    assert_close(found, exact, tolerance=0.1)


def test_bf16_is_made_where_the_cpu_has_it_and_refused_elsewhere(
    make: Callable[..., Bundle], sample: Sample
) -> None:
    try:
        bundle = make(precision="bf16", force=True)
    except ConfigError as refused:
        assert "this CPU does not have it" in refused.problem  # noqa: PT017 - as the machine is
        return
    assert open_graph(bundle, device="auto", threads=1).providers == ("OpenVINO",)
    assert np.isfinite(served(bundle, sample, open_embedder(bundle, threads=1))).all()
    with pytest.raises(ConfigError, match="cpu does not compute in bf16"):
        open_graph(bundle, device="cpu", threads=1)


@pytest.fixture(scope="module")
def with_outlier(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same function, with an activation a thousand times as large, as pretrained ones have."""
    folder = tmp_path_factory.mktemp("outlier")
    shutil.copytree(bundle_folder, folder / "weights")
    path = folder / "weights/model/model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("up_proj.weight")]:
        down = name.replace("up_proj", "down_proj")
        tensors[name][3] *= 1000  # (inner, hidden)
        tensors[down][:, 3] /= 1000
    save_file(tensors, path, metadata={"format": "pt"})
    repool(folder / "weights", load_recipe("quickstart").pooling, folder / "bundle")
    return folder / "bundle"


def test_one_that_loses_too_much_is_refused_and_leaves_nothing_behind(
    wanted: Wanted, with_outlier: Path, tmp_path: Path
) -> None:
    bad = replace(wanted, bundle=with_outlier, out=tmp_path / "int8", precision="int8")
    with pytest.raises(ConfigError, match="int8 loses too much: std-centred cosine") as refused:
        make_variant(bad, QUIET)
    assert "--keep" in refused.value.remedy
    assert not list(tmp_path.iterdir())
    let_through = make_variant(replace(bad, force=True), QUIET)
    assert "let through by force" in (let_through.folder / "README.md").read_text()
    forced = let_through.manifest.compute.judged
    assert forced is not None
    assert forced.forced
    assert forced.cosine < COSINE
    spared = make_variant(replace(bad, out=tmp_path / "spared", keep="down_proj"), QUIET)
    judged = spared.manifest.compute.judged
    assert judged is not None
    assert not judged.forced
    assert judged.cosine >= COSINE


def test_weights_take_less_room_and_products_that_are_kept_stay(
    make: Callable[..., Bundle], wanted: Wanted
) -> None:
    def products(bundle: Bundle) -> list[str]:
        graph = onnx.load(str(bundle.cached_graph), load_external_data=False).graph
        return [node.op_type for node in graph.node]

    origin, all_of_them = load_bundle(wanted.bundle), make(precision="int4-weights")
    kept = make(precision="int4-weights", keep="down_proj")
    layers = products(all_of_them).count("MatMulNBits") // 7
    assert layers > 1
    assert products(kept).count("MatMulNBits") == 6 * layers
    assert products(origin).count("MatMulNBits") == 0
    sizes = [(one.folder / "graphs/weights.bin").stat().st_size for one in (all_of_them, kept)]
    assert sizes[0] < sizes[1] < (origin.folder / "graphs/weights.bin").stat().st_size
    nothing = replace(wanted, out=wanted.out.with_name("nothing"), precision="fp16", keep="nowhere")
    with pytest.raises(ConfigError, match=r"'nowhere' fits no product; they are named like /"):
        make_variant(nothing, QUIET)


def test_labels_say_what_is_lost_downstream(make: Callable[..., Bundle], sample: Sample) -> None:
    bundle = make(precision="fp16", labels=sample.folder / "labels.parquet", columns=LabelColumns())
    judged = bundle.manifest.compute.judged
    assert judged is not None
    assert judged.auc_loss is not None
    assert abs(judged.auc_loss) <= AUC_LOSS


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, "fp32 is what there is"),
        ({"precision": "int8", "keep": "("}, "is no expression"),
    ],
)
def test_what_makes_no_sense_is_refused(
    wanted: Wanted, changes: dict[str, str], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_variant(replace(wanted, out=wanted.out.with_name("none"), **changes), QUIET)  # type: ignore[arg-type]


def test_a_variant_is_no_origin_and_is_not_written_over(
    make: Callable[..., Bundle], wanted: Wanted
) -> None:
    variant = make(precision="fp16")
    again = replace(wanted, out=wanted.out.with_name("again"), cache="int8")
    with pytest.raises(ConfigError, match="name the fp32 bundle"):
        make_variant(replace(again, bundle=variant.folder), QUIET)
    with pytest.raises(ConfigError, match="is there"):
        make_variant(replace(again, out=variant.folder), QUIET)


def test_the_command_offers_what_a_manifest_may_say() -> None:
    """It says so anew: a bundle's module is too slow to import for a page of help."""
    assert {each.value for each in Precision} == set(get_args(ComputePrecision))
    assert {each.value for each in Cache} == set(get_args(CachePrecision))


def test_the_command_prints_figures_and_refuses_in_one_line(wanted: Wanted, tmp_path: Path) -> None:
    command = ["export", "quantize", "--bundle", str(wanted.bundle), "--events", str(wanted.events)]
    command += ["--entities", "30", "--json", "--precision"]
    done = run([*command, "fp16", "--out", str(tmp_path / "fp16")])
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["bundle"] == load_bundle(tmp_path / "fp16").id
    assert (told["precision"], told["cache"], told["entities"]) == ("fp16", "fp32", 30)
    done = run([*command, "int8", "--out", str(tmp_path / "int8"), "--keep", "nowhere"])
    assert done.returncode == 2
    assert "'nowhere' fits no product" in done.stderr
    assert not (tmp_path / "int8").exists()


def test_likeness_sees_what_a_raw_cosine_does_not() -> None:
    """All vectors share one large part, which hides that the rest is noise."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=32) * 100
    rows = (shared + rng.normal(size=(200, 32))).astype(np.float32)
    noise = (shared + rng.normal(size=(200, 32))).astype(np.float32)
    nothing = np.zeros((200, 0), dtype=np.float32)
    same = compare(Rows(rows, rows), Rows(rows, rows))
    assert same.cosine == pytest.approx(1)
    assert same.neighbours == 1
    assert same.surprise_cosine == pytest.approx(1)
    raw = (rows * noise).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(noise, axis=1)
    other = compare(Rows(rows, nothing), Rows(noise, nothing))
    assert raw.min() > 0.999
    assert abs(other.cosine) < 0.1
    assert other.neighbours < 0.2
    assert other.surprise_cosine is None
    changed = rows.copy()
    changed[3, 5] += np.abs(rows[3]).max() / 8
    assert furthest(Rows(rows, nothing), Rows(changed, nothing)) == pytest.approx(1 / 8, rel=1e-3)

"""A bundle's id covers what makes its vectors, and nothing else; whatever differs is refused."""

import json
import math
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from llm4es.bundle import Bundle, Manifest, Pooling, SurpriseSpec, load_bundle, seal_bundle
from llm4es.errors import BundleMismatch, ConfigError
from llm4es.rendering import RenderingSpec
from llm4es.testing import byte_tokenizer, modelless_bundle
from llm4es.windows import WindowPolicy
from tests.histories import SCHEMA_YAML, event, schema

POLICY = WindowPolicy(
    chapter_events=7,
    max_age=timedelta(days=90, microseconds=1),
    allowed_lateness=timedelta(hours=36),
    max_clock_skew=timedelta(seconds=0.5),
)


def bare_manifest() -> Manifest:
    """The manifest of a bundle that is not sealed yet."""
    made = modelless_bundle(
        schema(), entity="customer", window=POLICY, rendering=RenderingSpec(ratios=("amount",))
    ).manifest
    return made.model_copy(
        update={
            "id": "",
            "pooling": Pooling(layers=(0, -1), scales=(math.inf, 16.0, 0.1)),
            "surprise": SurpriseSpec(depth_cap=4),
            "parity": {"pooled": 3.1e-7},
        }
    )


def write_bundle(folder: Path, manifest: Manifest | None = None) -> Manifest:
    (folder / "graphs").mkdir(parents=True)
    (folder / "graphs" / "full.onnx").write_bytes(b"a graph")
    (folder / "graphs" / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "schema.yaml").write_text(SCHEMA_YAML)
    save_file({"surprise.p95": np.arange(4.0)}, folder / "arrays.safetensors")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "provenance.json").write_text('{"host": "here"}')
    (folder / "README.md").write_text("# A model card\n")
    return seal_bundle(folder, manifest or bare_manifest())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest as a text editor would."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_what_was_sealed_is_what_is_loaded(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert isinstance(bundle, Bundle)
    bare = bundle.manifest.model_copy(update={"id": "", "files": {}})
    assert bare == bare_manifest()
    assert len(bundle.id) == 12
    assert set(bundle.id) <= set("0123456789abcdef")
    assert sorted(bundle.manifest.files) == [
        "arrays.safetensors", "graphs/full.onnx", "graphs/weights.bin", "schema.yaml",
        "tokenizer.json",
    ]  # fmt: skip
    assert bundle.schema == schema()
    assert bundle.arrays["surprise.p95"].tolist() == [0, 1, 2, 3]
    assert len(bundle.tokens.tokenize([event(0)]).ids) > 0


def test_infinity_is_spelt_in_plain_json_and_survives(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    document = json.loads(text, parse_constant=pytest.fail)  # called for Infinity and NaN
    assert document["pooling"]["scales"] == ["inf", 16.0, 0.1]
    assert load_bundle(folder).manifest.pooling.scales == (math.inf, 16.0, 0.1)


def test_the_same_content_has_the_same_id_wherever_and_whenever_it_is_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = load_bundle(folder)
    monkeypatch.setenv("HOSTNAME", "elsewhere")
    monkeypatch.chdir(tmp_path)
    again = write_bundle(tmp_path / "another" / "name")
    assert again.id == here.id
    manifest = (folder / "manifest.json").read_bytes()
    assert (tmp_path / "another" / "name" / "manifest.json").read_bytes() == manifest
    for secret in (str(tmp_path), os.uname().nodename):
        assert secret.encode() not in manifest


def test_copying_renaming_and_what_lies_beside_the_bundle_leave_the_id(
    folder: Path, tmp_path: Path
) -> None:
    sealed = load_bundle(folder).id
    copy = Path(shutil.copytree(folder, tmp_path / "renamed"))
    for path in copy.rglob("*"):
        os.utime(path, (0, 0))
    (copy / "provenance.json").write_text('{"host": "there", "at": "2031-01-01"}')
    (copy / "README.md").unlink()
    (copy / "model").mkdir()
    (copy / "model" / "config.json").write_text("{}")
    rewrite(copy, lambda document: document)  # another spelling of the same manifest
    assert load_bundle(copy).id == sealed
    resealed = seal_bundle(copy, load_bundle(copy).manifest)
    assert resealed.id == sealed


COVERED = [
    "tokenizer.json", "schema.yaml", "arrays.safetensors", "graphs/full.onnx",
    "graphs/weights.bin",
]  # fmt: skip


@pytest.mark.parametrize("name", COVERED)
def test_a_covered_file_that_changes_by_one_byte_is_refused_and_is_another_id(
    folder: Path, name: str
) -> None:
    before = load_bundle(folder).manifest
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleMismatch, match=name) as caught:
        load_bundle(folder)
    assert str(folder) in caught.value.what
    assert "export the bundle again" in caught.value.remedy
    assert seal_bundle(folder, before).id != before.id


@pytest.mark.parametrize(
    "change",
    [
        {"entity": "terminal"},
        {"licence": "MIT"},
        {"base_model": "another"},
        {"bos_id": 3},
        {"window": WindowPolicy(chapter_events=8)},
        {"rendering": RenderingSpec(time=("hour",))},
        {"pooling": Pooling(layers=(0, -1), scales=(16.0, math.inf, 0.1))},
        {"surprise": None},
        {"parity": {"pooled": 3.2e-7}},
        {"rendering_sha256": "0" * 64},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_the_manifest_says_is_in_the_id(
    folder: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    other = write_bundle(tmp_path / "other", bare_manifest().model_copy(update=change))
    assert other.id != load_bundle(folder).id


def swap_weights_and_graph(folder: Path) -> None:
    graph, weights = folder / "graphs" / "full.onnx", folder / "graphs" / "weights.bin"
    graph.rename(folder / "kept")
    weights.rename(graph)
    (folder / "kept").rename(weights)


def set_file(folder: Path, name: str) -> None:
    rewrite(folder, lambda document: document["files"].update({name: "0" * 64}))


TAMPERING: dict[str, Callable[[Path], object]] = {
    "a graph is gone": lambda f: (f / "graphs" / "full.onnx").unlink(),
    "all graphs are gone": lambda f: shutil.rmtree(f / "graphs"),
    "a graph came along": lambda f: (f / "graphs" / "more.onnx").write_bytes(b"x"),
    "a folder came along": lambda f: (f / "graphs" / "more").mkdir(),
    "two files changed places": swap_weights_and_graph,
    "the tokenizer is gone": lambda f: (f / "tokenizer.json").unlink(),
    "the schema is gone": lambda f: (f / "schema.yaml").unlink(),
    "the arrays are gone": lambda f: (f / "arrays.safetensors").unlink(),
    "the manifest is gone": lambda f: (f / "manifest.json").unlink(),
    "the folder is gone": shutil.rmtree,
    "the manifest is no JSON": lambda f: (f / "manifest.json").write_text("{"),
    "the manifest is no text": lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"),
    "a field changed": lambda f: rewrite(f, lambda d: d.update(licence="MIT")),
    "a scale changed": lambda f: rewrite(f, lambda d: d["pooling"].update(scales=["inf", 17.0])),
    "the id changed": lambda f: rewrite(f, lambda d: d.update(id="0123456789ab")),
    "the id is gone": lambda f: rewrite(f, lambda d: d.pop("id")),
    "an unknown key": lambda f: rewrite(f, lambda d: d.update(colour="red")),
    "a key is gone": lambda f: rewrite(f, lambda d: d.pop("pooling")),
    "another format": lambda f: rewrite(f, lambda d: d.update(format=1)),
    "a file's hash changed": lambda f: set_file(f, "graphs/full.onnx"),
    "a file too many is named": lambda f: set_file(f, "../elsewhere"),
    "no file is named": lambda f: rewrite(f, lambda d: d.update(files={})),
}


@pytest.mark.parametrize("tamper", TAMPERING.values(), ids=TAMPERING.keys())
def test_each_kind_of_tampering_is_refused(folder: Path, tamper: Callable[[Path], object]) -> None:
    tamper(folder)
    with pytest.raises(BundleMismatch, match="bundle"):
        load_bundle(folder)


@pytest.mark.parametrize("what", ["schema", "rendering"])
def test_a_sealed_bundle_whose_schema_or_rendering_is_not_the_one_it_was_trained_with(
    tmp_path: Path, what: str
) -> None:
    wrong = bare_manifest().model_copy(update={f"{what}_sha256": "0" * 64})
    write_bundle(tmp_path / "bundle", wrong)
    with pytest.raises(BundleMismatch, match=f"its {what} is not the one it was trained with"):
        load_bundle(tmp_path / "bundle")


def test_arrays_that_are_no_safetensors_are_refused(folder: Path) -> None:
    manifest = load_bundle(folder).manifest
    (folder / "arrays.safetensors").write_bytes(b"not at all")
    seal_bundle(folder, manifest)
    with pytest.raises(BundleMismatch, match="arrays"):
        load_bundle(folder)


def test_an_entity_that_the_schema_does_not_have_is_a_config_error(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", bare_manifest().model_copy(update={"entity": "shop"}))
    with pytest.raises(ConfigError, match="choose one of: customer, terminal"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("scales", [(), (0.0,), (-1.0,), (4.0, 4.0), (math.nan,)])
def test_scales_that_are_no_half_lives_are_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError):
        Pooling(layers=(0,), scales=scales)

"""Recipes end to end: what is learnt is what is served, and a kill costs little."""

import io
import json
import math
import random
import shutil
import signal
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from export.build import Request, build_bundle
from export.corpus import cut_corpus, read_log
from export.embed import AsOf, embed_as_of
from export.recipe import load_recipe, shipped_recipes
from llm4es.bundle import Bundle, load_bundle
from llm4es.engine import open_embedder
from llm4es.errors import ConfigError
from llm4es.events import Event
from llm4es.features import feature_row
from llm4es.schema import load_schema
from llm4es.windows import Window, fold
from tests.commands import Background, run
from tests.integration.conftest import Sample

QUICK: dict[str, Any] = {
    "shape": {
        "hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64, "vocabulary": 600,
    },
    "window": {"chapter_events": 16, "max_chapter_tokens": 192},
    "training": {
        "epochs": 1, "steps": 60, "learning_rate": 0.003, "batch_chapters": 4, "save_steps": 10,
    },
}  # fmt: skip


def write_recipe(path: Path, changes: Mapping[str, Any]) -> Path:
    document = {name: dict(value) if isinstance(value, dict) else value
                for name, value in QUICK.items()}  # fmt: skip
    for name, value in changes.items():
        document[name] = document.get(name, {}) | value if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(document))
    return path


def command(sample: Sample, recipe: Path, out: Path) -> list[str]:
    return [
        "export", "finetune", "--recipe", str(recipe), "--events", str(sample.events),
        "--out", str(out), "--json",
    ]  # fmt: skip


def built(sample: Sample, recipe: Path, out: Path) -> dict[str, Any]:
    done = run(command(sample, recipe, out), timeout_s=200)
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def test_a_training_that_was_killed_goes_on_and_ends_like_one_that_was_not(
    sample: Sample, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", {})
    whole = built(sample, recipe, tmp_path / "whole")
    out = tmp_path / "killed"
    moment = random.choice(range(10, 50, 10))
    with Background(tmp_path / "first", command(sample, recipe, out)) as first:
        deadline = time.monotonic() + 120
        while not list(
            tmp_path.glob(f".killed-training-*/checkpoints/checkpoint-{moment}/trainer_state.json")
        ):
            assert first.process.poll() is None, first.err.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
    assert not out.exists()
    tear_another(next(tmp_path.glob(f".killed-training-*/checkpoints/checkpoint-{moment}")))
    done = run(command(sample, recipe, out), timeout_s=200)
    assert done.returncode == 0, done.stderr
    assert "going on from checkpoint-" in done.stderr
    assert "going on from checkpoint-59" not in done.stderr, "it was never whole"
    resumed = json.loads(done.stdout)
    assert resumed["steps"] == whole["steps"]
    assert resumed["held_out_loss"] == pytest.approx(whole["held_out_loss"], rel=0.01)
    assert not list(tmp_path.glob(".killed-*")), "what a training kept is gone with its end"


@pytest.mark.parametrize("label", ["payment", "purchase"])
def test_a_training_that_had_ended_is_not_gone_on_with_and_another_schema_begins_anew(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    schema = tmp_path / "schema.yaml"
    shutil.copyfile(sample.schema, schema)
    recipe = write_recipe(tmp_path / "recipe.yaml", {"training": {"steps": 13, "save_steps": 20}})
    told = io.StringIO()

    def build(name: str) -> Bundle:
        wanted = Request(
            events=sample.events,
            schema=schema,
            entity="customer",
            out=tmp_path / name,
            recipe=load_recipe(str(recipe)),
        )
        return build_bundle(wanted, Console(file=told)).bundle

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("export.build.export_bundled", die)
        with pytest.raises(KeyboardInterrupt):
            build("cut")
    schema.write_text(schema.read_text().replace("label: payment", f"label: {label}", 1))
    cut, whole = build("cut"), build("whole")
    assert ("going on from checkpoint-13" in told.getvalue()) == (label == "payment")
    assert cut.manifest.training == whole.manifest.training
    assert cut.id == whole.id


def tear_another(checkpoint: Path) -> None:
    """Leave what a kill in the middle of the last file's write leaves, newer than all others."""
    torn = checkpoint.with_name("checkpoint-59")
    shutil.copytree(checkpoint, torn)
    (torn / "trainer_state.json").write_text("")


def test_adapters_are_merged_and_the_bundle_serves(
    bundle_folder: Path, sample: Sample, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        {
            "model": str(bundle_folder / "model"),
            "training": {"steps": 3, "lora": {"rank": 4}, "gradient_checkpointing": True},
        },
    )
    facts = built(sample, recipe, tmp_path / "adapted")
    bundle = load_bundle(tmp_path / "adapted")
    assert facts["steps"] == 3
    before = load_bundle(bundle_folder)
    assert bundle.manifest.files["graphs/weights.bin"] != before.manifest.files[
        "graphs/weights.bin"
    ]  # fmt: skip
    found = newest(bundle, histories(bundle, sample))
    assert np.isfinite(found).all()


def test_a_projection_is_learnt_on_training_entities_and_whitens_them(
    sample: Sample, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        {"training": {"steps": 5}, "projection": {"dim": 8, "whiten": True}, "why": "eight do"},
    )
    facts = built(sample, recipe, tmp_path / "projected")
    bundle = load_bundle(tmp_path / "projected")
    assert facts["dim"] == bundle.manifest.dim == 8
    assert bundle.manifest.why == "eight do"
    assert "| why so | eight do |" in (tmp_path / "projected/README.md").read_text()
    vectors = newest(bundle, histories(bundle, sample))
    assert vectors.shape[1] == 8
    # Held-out customers are among them, so about one.
    assert 0.5 < float(vectors.std(axis=0).mean()) < 2.0


def test_early_stop_keeps_the_best_and_stops_where_nothing_is_learnt(
    sample: Sample, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        {"training": {"steps": 400, "learning_rate": 1e-9, "patience": 2, "save_steps": 5}},
    )
    assert built(sample, recipe, tmp_path / "stopped")["steps"] < 400


def test_losses_are_told_to_the_tracker_that_is_asked_for_and_installed(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def request(tracker: str) -> Request:
        changes = {"training": {"steps": 2, "track": tracker}}
        return Request(
            events=sample.events,
            schema=sample.schema,
            entity="customer",
            out=tmp_path / "tracked",
            recipe=load_recipe(str(write_recipe(tmp_path / "recipe.yaml", changes))),
        )

    build_bundle(request("tensorboard"), Console(quiet=True))
    told = EventAccumulator(str(tmp_path / "tracked-runs")).Reload()
    assert [each.step for each in told.Scalars("train/loss")] == [1]
    monkeypatch.setattr("export.finetune.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"training.track: wandb is not installed.*tracking"):
        build_bundle(request("wandb"), Console(quiet=True))


def test_the_ids_that_train_are_the_ids_that_are_served(
    bundle_folder: Path, sample: Sample
) -> None:
    bundle = load_bundle(bundle_folder)
    log = read_log(sample.events, load_schema(sample.schema), entity="customer")
    corpus = cut_corpus(log.histories, frozenset(), bundle.manifest.window, bundle.tokens)
    trained: dict[str, list[list[int]]] = {}
    for chapter in corpus.train:
        trained.setdefault(chapter.entity_id, []).append(chapter.tokens.ids.tolist())
    for entity_id, window in served(bundle, sample).items():
        texts = [bundle.renderer.lines(chapter.events) for chapter in window.chapters]
        ids = [bundle.tokens.tokenize(chapter.events).ids.tolist() for chapter in window.chapters]
        assert ids == trained[entity_id]
        history = [event for chapter in window.chapters for event in chapter.events]
        assert [e.key for e in history] == [e.key for e in log.histories[entity_id]]
        assert all(texts)


@pytest.mark.parametrize("max_chapters", [None, 2])
def test_embedding_as_of_a_moment_is_what_a_worker_serves_then(
    bundle_folder: Path, sample: Sample, tmp_path: Path, max_chapters: int | None
) -> None:
    if max_chapters is not None:
        changes = {"window": {"max_chapters": max_chapters}, "training": {"steps": 2}}
        recipe = write_recipe(tmp_path / "recipe.yaml", changes)
        bundle_folder = tmp_path / "bundle"
        built(sample, recipe, bundle_folder)
    bundle = load_bundle(bundle_folder)
    embedder = open_embedder(bundle)
    found = histories(bundle, sample)
    customers = sorted(found)[:3]
    asked, windows = [], []
    for customer in customers:
        window = Window(entity_id=customer)
        for event in found[customer]:
            window = fold(
                window,
                event,
                recorded_at=event.occurred_at,
                policy=bundle.manifest.window,
                measure=bundle.tokens.measure,
            ).window
            asked.append(AsOf(customer, event.occurred_at + timedelta(microseconds=1)))
            windows.append(window)
    rows = embed_as_of(bundle, found, [*asked, AsOf("nobody", asked[0].before)])
    due = embedder.embed(windows)
    np.testing.assert_allclose(rows.vectors[:-1], due.vectors, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows.surprise[:-1], due.surprise, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(rows.surprise_last[:-1], due.surprise_last, rtol=1e-3, atol=1e-4)
    counts = [
        feature_row(bundle, window, due.vectors[0], due.surprise[0], 0.0).event_count
        for window in windows
    ]
    assert rows.events.tolist() == [*counts, 0]
    hidden = [len(window.chapters) > (max_chapters or math.inf) for window in windows]
    assert any(hidden) == (max_chapters is not None)
    assert not rows.vectors[-1].any()
    assert not rows.token_bag[-1].any()


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_valid(name: str) -> None:
    assert load_recipe(name).window.max_chapter_tokens > 0


def test_a_recipe_that_is_wrong_names_its_field(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", {"training": {"epochz": 1}})
    with pytest.raises(ConfigError, match=r"training\.epochz"):
        load_recipe(str(path))
    with pytest.raises(ConfigError, match="lora adapts an existing model"):
        load_recipe(str(write_recipe(path, {"training": {"lora": {}}})))


def histories(bundle: Bundle, sample: Sample) -> Mapping[str, tuple[Event, ...]]:
    return read_log(sample.events, bundle.schema, entity="customer").histories


def served(bundle: Bundle, sample: Sample) -> dict[str, Window]:
    windows: dict[str, Window] = {}
    for entity_id, history in histories(bundle, sample).items():
        window = Window(entity_id=entity_id)
        for event in history:
            window = fold(
                window,
                event,
                recorded_at=event.occurred_at,
                policy=bundle.manifest.window,
                measure=bundle.tokens.measure,
            ).window
        windows[entity_id] = window
    return windows


def newest(bundle: Bundle, found: Mapping[str, tuple[Event, ...]]) -> np.ndarray[Any, Any]:
    asked = [
        AsOf(entity_id, history[-1].occurred_at + timedelta(microseconds=1))
        for entity_id, history in found.items()
    ]
    return embed_as_of(bundle, found, asked).vectors

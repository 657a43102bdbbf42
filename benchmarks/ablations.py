"""Ablations: what each choice of the method is worth, one changed at a time.

    python -m benchmarks.ablations [--json] [--only pooling|training|pretrained] [--steps N]

`pooling` changes how the states of one trained model are pooled (bundles of benchmarks.quality,
trained here if they are not there); `training` trains a model anew for each choice, for a few
hundred steps, so its figures compare with one another alone; `pretrained` has SmolLM2-135M and a
model from scratch read the same last events, with and without learning from the log (more than an
hour of one core). Ratios are ROC-AUC by logistic regression on the folds that come with the data.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.engine_bundles import smol_source
from benchmarks.machine import machine
from benchmarks.quality import ROOT, Places
from export.build import Request, build_bundle
from export.chapter_texts import other_renderers, training_texts
from export.corpus import EventLog, read_log
from export.embed import Embeddings, embed_as_of
from export.enrich import enrich_by_rule
from export.labels import LabelColumns, Task, read_task
from export.pooling import repool
from export.recipe import Pooled, Recipe, load_recipe
from export.scoring import Features, Judge, predict, weighted_auc
from llm4es.bundle import Bundle, load_bundle, scale_name
from llm4es.features import SumsLayout
from llm4es.schema import load_schema

EVERY_SCALE = (math.inf, 64.0, 16.0, 4.0, 1.0)
_SEEN_EVENTS = 12  # of a chapter in the middle: two of them are what SmolLM2 reads in an hour

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Ground:
    """A log and a task on it."""

    folder: Path
    log: EventLog
    task: Task

    def embedded(self, bundle: Bundle) -> Embeddings:
        """Rows of the task's labels."""
        end = max(history[-1].occurred_at for history in self.log.histories.values())
        return embed_as_of(bundle, self.log.histories, self.task.asked(end))

    def auc(self, matrix: NDArray[np.float32]) -> float:
        """ROC-AUC of logistic regression, mean over the folds."""
        scores = predict(Features("x", matrix), self.task, self.task.splits, "logistic")
        judge = Judge(self.task, self.task.splits, resamples=0)
        return float(judge.by_fold(scores, weighted_auc).mean())


def main(
    *,
    data: Annotated[Path, typer.Option(help="Folder of movielens and fdh")] = ROOT.parent
    / "shared/data",
    out: Annotated[Path, typer.Option(help="Folder for bundles")] = ROOT / "build/quality",
    only: Annotated[str | None, typer.Option(help="pooling, training or pretrained")] = None,
    steps: Annotated[int, typer.Option(help="Of each training", min=1)] = 300,
    smollm2: Annotated[str | None, typer.Option(help="SmolLM2: folder or .gguf")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Change one choice at a time, and print what comes of it."""
    places = Places(data, out)
    ratios: dict[str, float] = {}
    parts = []
    if only in {None, "pooling"}:
        parts += [_ratings_pooling(places), _fraud_pooling(places)]
    if only in {None, "training"}:
        parts.append(_trainings(places, steps))
    if only in {None, "pretrained"}:
        parts.append(_pretrained(places, steps, smol_source(smollm2)))
    for part in parts:
        for name, value in part:
            console.print(f"{name:48} {value:.4f}")
            ratios[name] = value
    if as_json:
        typer.echo(json.dumps({"ratios": ratios, "machine": machine()}))
        return
    table = Table("choice", "ROC-AUC", title="ablations")
    for name, value in ratios.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)


def _ratings(places: Places) -> Ground:
    folder = places.prepared("movielens-100k", "movielens")
    schema = load_schema(folder / "schema.yaml")
    return Ground(
        folder,
        read_log(folder / "events.parquet", schema, entity="user"),
        read_task(folder / "labels.parquet", LabelColumns(), entity_field="user_id", kind="user"),
    )


def _bundle(places: Places, name: str, folder: Path, entity: str, recipe: str) -> Bundle:
    out = places.out / "bundles" / name
    if not out.is_dir():
        places.built(name, folder, entity, load_recipe(recipe))
    return load_bundle(out)


def _pooled(places: Places, bundle: Bundle, name: str, pooled: Pooled) -> Bundle:
    out = places.out / "pooled" / f"{bundle.id}-{name}"
    return load_bundle(out) if out.is_dir() else repool(bundle.folder, pooled, out)


def _ratings_pooling(places: Places) -> Iterator[tuple[str, float]]:
    """Layers, their norm, which tokens, the header: gender of MovieLens users."""
    ground = _ratings(places)
    bundle = _bundle(places, "ratings", ground.folder, "user", "movielens")
    hidden = bundle.manifest.hidden_size
    plain = (math.inf,)
    for norm in ("rms", "none"):
        pooled = Pooled(scales=plain, layers="all", normalise=norm)
        vectors = ground.embedded(_pooled(places, bundle, norm, pooled)).vectors
        layers = vectors.reshape(len(vectors), -1, hidden)
        yield f"gender_{norm}_side_by_side", ground.auc(vectors)
        yield f"gender_{norm}_average", ground.auc(layers.mean(axis=1))
        if norm == "rms":
            for layer in range(layers.shape[1]):
                yield f"gender_layer_{layer}", ground.auc(layers[:, layer])
            yield "gender_first_and_last", ground.auc(layers[:, [0, -1]].reshape(len(vectors), -1))
    for name, pooled in (
        ("header_in", Pooled(scales=plain, layers="all", pool_header=True)),
        ("ends_of_events", Pooled(scales=plain, layers="all", tokens="ends")),
        ("last_token", Pooled(scales=(0.01,), layers="all", tokens="ends")),
    ):
        yield (
            f"gender_{name}",
            ground.auc(ground.embedded(_pooled(places, bundle, name, pooled)).vectors),
        )


def _fraud_pooling(places: Places) -> Iterator[tuple[str, float]]:
    """Scales, layers and surprise: accounts compromised within a week."""
    folder = places.prepared("fraud-handbook", "fdh")
    schema = load_schema(folder / "schema.yaml")
    ground = Ground(
        folder,
        read_log(folder / "events.parquet", schema, entity="customer"),
        read_task(
            folder / "labels_account.parquet",
            LabelColumns(only="lite", weight="weight"),
            entity_field="customer_id",
            kind="point-in-time",
        ),
    )
    bundle = _bundle(places, "fraud", folder, "customer", "handbook")
    pooled = Pooled(scales=EVERY_SCALE, layers=(0, -1))
    every = _pooled(places, bundle, "scales", pooled)
    found = ground.embedded(every)
    count, hidden = len(found.vectors), bundle.manifest.hidden_size
    cube = found.vectors.reshape(count, len(EVERY_SCALE), 2, hidden)
    for index, scale in enumerate(EVERY_SCALE):
        yield f"account_{scale_name(scale)}", ground.auc(cube[:, index].reshape(count, -1))
    for taken in (2, 3, 4, 5):
        name = "_".join(scale_name(scale) for scale in EVERY_SCALE[:taken])
        yield f"account_{name}", ground.auc(cube[:, :taken].reshape(count, -1))
    yield "account_layer_0", ground.auc(cube[:, :, 0].reshape(count, -1))
    yield "account_last_layer", ground.auc(cube[:, :, 1].reshape(count, -1))
    columns = np.array(SumsLayout(every).columns)
    in_all = np.char.startswith(columns, "all")
    excess = np.char.find(columns, "_excess_") >= 0
    yield "account_surprise", ground.auc(found.surprise)
    yield "account_surprise_in_all", ground.auc(found.surprise[:, in_all])
    yield "account_surprise_by_field", ground.auc(found.surprise[:, ~in_all])
    yield "account_surprise_without_excess", ground.auc(found.surprise[:, ~excess])
    yield "account_both", ground.auc(np.column_stack([found.vectors, found.surprise]))


def _trainings(places: Places, steps: int) -> Iterator[tuple[str, float]]:
    """Models trained alike but for one choice: gender of MovieLens users."""
    ground = _ratings(places)
    base = load_recipe("movielens").changed(steps=steps)
    choices: dict[str, dict[str, Any]] = {
        "base": {},
        "untrained": {"training": {"steps": 1, "learning_rate": 1e-12}},
        "random_start": {"start": "random"},
        "with_time": {"rendering": {"time": ("gap", "hour")}},
        "chapters_of_24": {"window": {"chapter_events": 24}},
        "one_chapter_at_most": {"window": {"max_chapters": 1}},
        "four_chapters_at_most": {"window": {"max_chapters": 4}},
    }
    for name, change in choices.items():
        yield f"trained_{name}", _trained(places, ground, name, _changed(base, change))
    few = _few_values(ground, places.out / "few-values")
    for log, place in (("rich", ground), ("few_values", few)):
        for enriched in (False, True):
            name = f"{log}_{'enriched' if enriched else 'bare'}"
            yield f"trained_{name}", _trained(places, place, name, base, enriched=enriched)


def _pretrained(places: Places, steps: int, smollm2: str) -> Iterator[tuple[str, float]]:
    """A pretrained model and one from scratch, both shown the last events of a user alone."""
    ground = _ratings(places)
    domain = load_recipe("movielens")
    seen = {
        "window": {"chapter_events": _SEEN_EVENTS, "max_chapters": 2},
        "rendering": domain.rendering.model_dump(),
        "pooling": domain.pooling.model_dump() | {"layers": (0, -1)},
        "surprise": None,
    }
    few = {"held_out_share": 0.03}  # their loss alone would take a quarter of an hour
    untrained, trained = {"steps": 1, "learning_rate": 1e-12}, {"steps": steps}
    lora = load_recipe("smollm2-lora").changed(model=smollm2)
    for name, recipe in (("scratch", domain), ("smollm2", lora)):
        for kind, change in (("untrained", untrained), ("trained", trained)):
            changed = _changed(recipe, seen | {"training": few | change})
            yield f"{name}_{kind}", _trained(places, ground, f"{name}-{kind}", changed)


def _changed(recipe: Recipe, change: dict[str, Any]) -> Recipe:
    document = recipe.model_dump()
    for name, value in change.items():
        document[name] = document[name] | value if isinstance(value, dict) else value
    return Recipe.model_validate(document)


def _trained(
    places: Places, ground: Ground, name: str, recipe: Recipe, *, enriched: bool = False
) -> float:
    """Train, embed, and judge gender."""
    events, schema = ground.folder / "events.parquet", ground.folder / "schema.yaml"
    texts = None
    if enriched:
        texts = places.out / "ablated" / f"{name}.jsonl"
        meaning = load_schema(schema)
        chapters = training_texts(ground.log, meaning, recipe, max_events=96)
        enrich_by_rule(chapters, other_renderers(ground.log, meaning, recipe), texts, console)
    built = build_bundle(
        Request(
            events=events,
            schema=schema,
            entity="user",
            out=places.out / "ablated" / name,
            recipe=recipe,
            enriched=texts,
        ),
        console,
    )
    return ground.auc(ground.embedded(built.bundle).vectors)


def _few_values(ground: Ground, folder: Path) -> Ground:
    """The same users and moments, but of an event the rating alone is told: five values."""
    folder.mkdir(parents=True, exist_ok=True)
    document = yaml.safe_load((ground.folder / "schema.yaml").read_text(encoding="utf-8"))
    for kind in document["types"].values():
        for name, field in kind["fields"].items():
            field["render"] = name == "rating"
    (folder / "schema.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    events = folder / "events.parquet"
    events.write_bytes((ground.folder / "events.parquet").read_bytes())
    schema = load_schema(folder / "schema.yaml")
    return Ground(folder, read_log(events, schema, entity="user"), ground.task)


if __name__ == "__main__":
    typer.run(main)

"""A study: from a published data set to a bundle and a report on each of its tasks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import yaml
from rich.console import Console

from export import report
from export.build import Request as BuildRequest
from export.build import build_bundle
from export.datasets.registry import prepare
from export.evaluate import Evaluated, Request, evaluate
from export.insight import measure_cost
from export.labels import LabelColumns
from export.recipe import load_recipe
from llm4es.errors import ConfigError

__all__ = ["RECIPES", "Study", "study"]

RECIPES = {
    "movielens-100k": "movielens",
    "movielens-1m": "movielens",
    "fraud-handbook": "handbook",
}
_USUAL_RECIPE = "domain-tiny"
_BINARY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What to study, and how. Without a recipe the data set's own is taken."""

    name: str
    taken: Path  # the folder of the official files
    out: Path
    recipe: str | None = None
    steps: int | None = None
    repeats: int = 0
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    name: str
    labels: Path
    columns: LabelColumns
    inclusive: bool


def study(wanted: Study, console: Console) -> Iterator[Evaluated]:
    """Prepare, train, and evaluate task by task; a report stands in `out` when one is yielded.

    A label of several values gives a task for each of them. Raises ConfigError.
    """
    data = wanted.out / "data"
    prepare(wanted.name, wanted.taken, data)
    tasks = yaml.safe_load((data / "tasks.yaml").read_text(encoding="utf-8"))["tasks"]
    entity = tasks[0]["entity"]
    recipe = load_recipe(wanted.recipe or RECIPES.get(wanted.name, _USUAL_RECIPE))
    build_bundle(
        BuildRequest(
            events=data / "events.parquet",
            schema=data / "schema.yaml",
            entity=entity,
            out=wanted.out / "bundle",
            recipe=recipe.changed(steps=wanted.steps),
        ),
        console,
    )
    for task in tasks:
        if task["entity"] != entity:
            console.print(f"{task['name']} is of {task['entity']}s: another bundle's")
            continue
        for asked in _questions(task, data):
            found = evaluate(
                Request(
                    bundle=wanted.out / "bundle",
                    events=data / "events.parquet",
                    labels=asked.labels,
                    columns=asked.columns,
                    inclusive=asked.inclusive and _has_times(asked.labels),
                    repeats=0 if task["split"] == "split" else wanted.repeats,
                    threads=wanted.threads,
                ),
                console,
            )
            cost = measure_cost(found)
            report.write_json(found, cost, wanted.out / f"{asked.name}.json")
            report.write_report(found, cost, wanted.out / f"{asked.name}.html")
            yield found


def _questions(task: dict[str, str | bool], data: Path) -> Iterator[_Asked]:
    labels = data / str(task["file"])
    column = str(task["label"])
    values = sorted(set(pq.read_table(labels, columns=[column])[column].to_pylist()))
    if len(values) < _BINARY:
        raise ConfigError("labels", f"{column!r} has one value", "there is nothing to tell apart")
    asked = _Asked(
        name=str(task["name"]),
        labels=labels,
        columns=LabelColumns(label=column, only="lite" if task["lite"] else None),
        inclusive=bool(task["inclusive"]),
    )
    if values == [0, 1]:
        yield asked
        return
    for value in values:
        columns = replace(asked.columns, positive=str(value))
        yield replace(asked, name=f"{asked.name}-{value}", columns=columns)


def _has_times(labels: Path) -> bool:
    return "event_timestamp" in pq.read_schema(labels).names

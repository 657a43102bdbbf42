"""From one bundle to the next: `rollout`."""

from pathlib import Path
from typing import Annotated

import typer

from stream_worker.commands.options import Result, log_to_stderr, with_settings
from stream_worker.settings import WorkerSettings

__all__ = ["app"]

app = typer.Typer()


rollout = typer.Typer(
    name="rollout",
    help="Move readers from the bundle that serves to the one that --bundle names.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(rollout)
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would do, and do nothing")]


@rollout.command(name="plan")
@with_settings
def plan_rollout(settings: WorkerSettings, *, as_json: Result = False) -> None:
    """Say which steps lead to the end; change nothing."""
    _rollout(settings, "plan", as_json=as_json, dry_run=True)


@rollout.command(name="start")
@with_settings
def start_rollout(
    settings: WorkerSettings, *, dry_run: _DryRun = False, as_json: Result = False
) -> None:
    """Register the new view beside the old one; its workers are started by you."""
    _rollout(settings, "start", as_json=as_json, dry_run=dry_run)


@rollout.command(name="status")
@with_settings
def status_of_rollout(
    settings: WorkerSettings,
    *,
    labels: Annotated[
        Path | None, typer.Option(help="Labels by entity (.parquet, .csv): compare ROC-AUC too")
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="Entities whose vectors are compared")] = 1000,
    as_json: Result = False,
) -> None:
    """Compare the two bundles' online rows: complete, as fresh, how alike, how good."""
    from stream_worker.ops.rollout_report import show_status  # noqa: PLC0415 - heavy

    log_to_stderr(verbose=False)
    show_status(settings, labels=labels, sample=sample, as_json=as_json)


@rollout.command(name="switch")
@with_settings
def switch_rollout(
    settings: WorkerSettings,
    *,
    wait_s: Annotated[float, typer.Option(min=0, help="How long to wait for the windows")] = 60.0,
    force: Annotated[bool, typer.Option("--force", help="Even where rows are missing")] = False,
    dry_run: _DryRun = False,
    as_json: Result = False,
) -> None:
    """Point the stable service at the new bundle, once no entity would lose its row."""
    _rollout(settings, "switch", as_json=as_json, dry_run=dry_run, wait_s=wait_s, force=force)


@rollout.command(name="abort")
@with_settings
def abort_rollout(
    settings: WorkerSettings, *, dry_run: _DryRun = False, as_json: Result = False
) -> None:
    """Point the stable service back at once, then remove the new view and its rows."""
    _rollout(settings, "abort", as_json=as_json, dry_run=dry_run)


@rollout.command(name="finish")
@with_settings
def finish_rollout(
    settings: WorkerSettings, *, dry_run: _DryRun = False, as_json: Result = False
) -> None:
    """Remove the old view and its online rows; there is no way back after that."""
    _rollout(settings, "finish", as_json=as_json, dry_run=dry_run)


def _rollout(
    settings: WorkerSettings,
    verb: str,
    *,
    as_json: bool,
    dry_run: bool,
    **options: float,
) -> None:
    from stream_worker.ops.rollout_report import take_steps  # noqa: PLC0415 - heavy

    log_to_stderr(verbose=False)
    take_steps(settings, verb, dry_run=dry_run, as_json=as_json, **options)

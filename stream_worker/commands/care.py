"""What is served, kept right: `audit`, `forget`, `expire`, `dlq`."""

from pathlib import Path
from typing import Annotated

import typer

from stream_worker.commands.options import Result, log_to_stderr, with_settings
from stream_worker.settings import WorkerSettings

__all__ = ["app"]

app = typer.Typer()


@app.command()
@with_settings
def audit(
    settings: WorkerSettings,
    *,
    sample: Annotated[int, typer.Option(min=1, help="Entities to look at")] = 100,
    seed: Annotated[int, typer.Option(help="Which ones: another seed, others")] = 0,
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="Share that may differ before it exits with 1")
    ] = 0.0,
    repair: Annotated[bool, typer.Option("--repair", help="Put right what differs")] = False,
    every_s: Annotated[
        float | None, typer.Option("--every", min=1, help="Seconds; go on, and serve gauges")
    ] = None,
    log: Annotated[
        str | None, typer.Option(help="Read files instead: a path, folder or address (s3://...)")
    ] = None,
    as_json: Result = False,
) -> None:
    """Recompute a sample of entities from the log, and compare windows and rows with it."""
    from stream_worker.ops.audit import AuditRequest, audit_view  # noqa: PLC0415 - heavy

    log_to_stderr(verbose=False)
    request = AuditRequest(sample=sample, seed=seed, repair=repair, tolerance=tolerance, log=log)
    audit_view(settings, request, every_s=every_s, as_json=as_json)


@app.command()
@with_settings
def forget(
    settings: WorkerSettings,
    *,
    entity: Annotated[str, typer.Argument(help="Id of the entity")],
    wait_s: Annotated[
        float, typer.Option("--wait", min=0, help="Seconds to wait for the worker to carry it out")
    ] = 60.0,
    as_json: Result = False,
) -> None:
    """Delete an entity everywhere but in the log itself, and give a receipt."""
    from stream_worker.ops.forget import forget_from_view  # noqa: PLC0415 - heavy

    log_to_stderr(verbose=False)
    forget_from_view(settings, entity, wait_s=wait_s, as_json=as_json)


@app.command()
@with_settings
def expire(
    settings: WorkerSettings,
    *,
    idle: Annotated[float, typer.Option(min=0, help="Days without any record of the entity")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count them, write nothing")] = False,
    as_json: Result = False,
) -> None:
    """Delete entities that have been silent, by tombstones in the log."""
    from stream_worker.ops.forget import expire_view  # noqa: PLC0415 - heavy

    log_to_stderr(verbose=False)
    expire_view(settings, days=idle, dry_run=dry_run, as_json=as_json)


dlq = typer.Typer(help="Dead letters: list, show, export, retry.", no_args_is_help=True)
app.add_typer(dlq, name="dlq")


@dlq.command(name="list")
@with_settings
def dlq_list(settings: WorkerSettings, *, as_json: Result = False) -> None:
    """Count dead letters by field and reason."""
    from stream_worker.ops.dlq import list_letters  # noqa: PLC0415 - heavy

    log_to_stderr(verbose=False)
    list_letters(settings, as_json=as_json)


@dlq.command(name="show")
@with_settings
def dlq_show(
    settings: WorkerSettings,
    *,
    place: Annotated[str, typer.Argument(help="PARTITION:OFFSET of the record itself")],
    as_json: Result = False,
) -> None:
    """Show one dead letter whole, its entity's id and its value too."""
    from stream_worker.ops.dlq import show_letter  # noqa: PLC0415 - heavy

    log_to_stderr(verbose=False)
    show_letter(settings, place, as_json=as_json)


@dlq.command(name="export")
@with_settings
def dlq_export(
    settings: WorkerSettings,
    *,
    out: Annotated[Path, typer.Option(help="File to write", dir_okay=False)],
    as_json: Result = False,
) -> None:
    """Write all dead letters as lines of JSON."""
    from stream_worker.ops.dlq import export_letters  # noqa: PLC0415 - heavy

    log_to_stderr(verbose=False)
    export_letters(settings, out, as_json=as_json)


@dlq.command(name="retry")
@with_settings
def dlq_retry(
    settings: WorkerSettings,
    *,
    field: Annotated[str | None, typer.Option(help="Only letters of this field")] = None,
    repaired: Annotated[
        Path | None, typer.Option(help="Only these, mended: lines as `dlq export` writes them")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Those tried before, too")] = False,
    as_json: Result = False,
) -> None:
    """Produce dead letters that are acceptable now to the topic they came from."""
    from stream_worker.ops.dlq import retry_view  # noqa: PLC0415 - heavy

    log_to_stderr(verbose=False)
    retry_view(settings, field=field, repaired=repaired, again=again, as_json=as_json)

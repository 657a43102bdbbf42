"""Whole logs: `compact`, `backfill`, `replay`, `repartition`, `snapshot`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from stream_worker.commands.options import Result, log_to_stderr, with_settings
from stream_worker.settings import WorkerSettings

__all__ = ["app"]

app = typer.Typer()


@app.command()
@with_settings
def compact(settings: WorkerSettings, *, as_json: Result = False) -> None:
    """Merge the small parts of the offline log; safe beside a worker, and to kill."""
    from stream_worker.ops.compaction import compact_log  # noqa: PLC0415 - heavy

    log_to_stderr(verbose=False)
    compact_log(settings, as_json=as_json)


@app.command()
@with_settings
def backfill(
    settings: WorkerSettings,
    *,
    engine: Annotated[
        Literal["process", "ray"], typer.Option(help="This process, or Ray's actors (extra: ray)")
    ] = "process",
    actors: Annotated[
        int | None, typer.Option(min=1, help="Ray's actors [default: the cluster's CPUs]")
    ] = None,
    as_json: Result = False,
) -> None:
    """Carry a complete log into a fresh bundle's windows and rows, whole histories at once."""
    from stream_worker.ops.backfill import run_backfill  # noqa: PLC0415 - heavy

    log_to_stderr(verbose=False)
    run_backfill(settings, engine=engine, actors=actors, as_json=as_json)


@app.command()
@with_settings
def replay(
    settings: WorkerSettings,
    *,
    since: Annotated[
        str, typer.Option("--from", help="start, an offset, PARTITION:OFFSET,..., or a time (ISO)")
    ] = "start",
    upto: Annotated[str, typer.Option("--to", help="end, or as --from; not included")] = "end",
    into: Annotated[
        str, typer.Option(help="Where rows go: the bundle's VIEW (or view), offline, nowhere")
    ] = "nowhere",
    entities: Annotated[
        Path | None, typer.Option(help="File of entity ids, one a line: no other's rows")
    ] = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Records a second at most")] = None,
    log: Annotated[
        str | None, typer.Option(help="Read files instead: a path, folder or address (s3://...)")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after a stop or kill")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would do")] = False,
    as_json: Result = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more")] = False,
) -> None:
    """Compute the rows of a span of the log again; live rows and offsets stay as they are."""
    from stream_worker.ops.replay import replay_log  # noqa: PLC0415 - heavy
    from stream_worker.ops.replay_plan import ReplayRequest  # noqa: PLC0415

    log_to_stderr(verbose=verbose)
    request = ReplayRequest(
        since=since,
        upto=upto,
        into=into,
        entities=entities,
        every_event=settings.every_event,
        rate=rate,
        resume=resume,
        log=log,
    )
    replay_log(settings, request, dry_run=dry_run, as_json=as_json)


@app.command()
@with_settings
def repartition(
    settings: WorkerSettings,
    *,
    entity: Annotated[str, typer.Option(help="Entity the new log is keyed by")],
    sources: Annotated[list[str], typer.Option("--from", help="Topic to read; may be repeated")],
    target: Annotated[str, typer.Option("--to", help="Topic to write")],
    schema: Annotated[
        Path | None, typer.Option(help="Event schema [default: the bundle's]", show_default=False)
    ] = None,
    max_idle_ms: Annotated[
        int, typer.Option(min=0, help="Longest wait for an input that does not deliver")
    ] = 5_000,
    as_json: Result = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more")] = False,
) -> None:
    """Write the log of another entity from logs of events, each record exactly once."""
    from stream_worker.ops.repartitioning import run_repartition  # noqa: PLC0415 - heavy

    log_to_stderr(verbose=verbose)
    run_repartition(
        settings,
        entity,
        sources=sources,
        target=target,
        schema=schema,
        max_idle_ms=max_idle_ms,
        as_json=as_json,
    )


@app.command()
@with_settings
def snapshot(
    settings: WorkerSettings,
    *,
    out: Annotated[Path, typer.Option(help="File to write", dir_okay=False)],
    as_json: Result = False,
) -> None:
    """Write the window store into one file, from which `run --from-snapshot` starts."""
    from stream_worker.ops.snapshot_command import snapshot_store  # noqa: PLC0415 - heavy

    log_to_stderr(verbose=False)
    snapshot_store(settings, out, as_json=as_json)

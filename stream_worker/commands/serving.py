"""Serve, and look at what is served: `run`, `inspect`."""

from typing import Annotated

import typer

from stream_worker.commands.options import Result, log_to_stderr, with_settings
from stream_worker.settings import WorkerSettings

__all__ = ["app"]

app = typer.Typer()


@app.command()
@with_settings
def run(
    settings: WorkerSettings,
    *,
    live: Annotated[bool, typer.Option("--live", help="Show a live table on stderr")] = False,
    as_json: Result = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more")] = False,
) -> None:
    """Fold a log into windows and publish a fresh row for each entity that changed."""
    from stream_worker.running import run_worker  # noqa: PLC0415 - heavy

    log_to_stderr(verbose=verbose, as_json=settings.log_format == "json")
    run_worker(settings, live=live, as_json=as_json)


@app.command(name="inspect")
@with_settings
def inspect_entity(
    settings: WorkerSettings,
    *,
    entity: Annotated[str, typer.Argument(help="Id of the entity")],
    as_json: Result = False,
) -> None:
    """Show an entity's chapters, their text with each event's surprise, and its online row."""
    from stream_worker.inspecting import show_entity  # noqa: PLC0415 - heavy

    log_to_stderr(verbose=False)
    show_entity(settings, entity, as_json=as_json)

"""`python -m stream_worker compact`: merge the small parts of a view's offline log."""

import json
from dataclasses import asdict

import typer
from rich.console import Console
from rich.table import Table

from llm4es.feast import compact_view, read_view_spec
from stream_worker.settings import WorkerSettings

__all__ = ["compact_log"]


def compact_log(settings: WorkerSettings, *, as_json: bool) -> None:
    """Compact the log of the bundle's view and print what that did."""
    done = compact_view(
        settings.feature_repo,
        read_view_spec(settings.bundle),
        config_file=settings.feature_store_file,
    )
    if as_json:
        typer.echo(json.dumps(asdict(done)))
        return
    table = Table(title=f"offline log of {done.view}")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right")
    table.add_row("parts", f"{done.parts_before:,}", f"{done.parts_after:,}")
    table.add_row("bytes", f"{done.bytes_before:,}", f"{done.bytes_after:,}")
    table.add_row("rows that stood twice", f"{done.duplicates:,}", "0")
    Console().print(table)

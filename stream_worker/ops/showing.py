"""Results on stdout: a table for a terminal, JSON for a pipe."""

import msgspec
import typer
from rich.console import Console
from rich.table import Table

__all__ = ["show"]


def show(document: object, table: Table, *, as_json: bool) -> None:
    """Print a result."""
    if as_json:
        typer.echo(msgspec.json.encode(document).decode())
    else:
        Console(markup=False, emoji=False).print(table)

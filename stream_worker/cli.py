"""The command line: every command of `stream_worker.commands` under one name.

Heavy imports happen inside the commands: `--help` answers at once.
"""

import typer

from stream_worker.commands import care, logs, rolling, serving

__all__ = ["app", "main"]

app = typer.Typer(
    name="stream_worker",
    help="Keep embeddings fresh: events from a log, rows into Feast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help answers twice as fast
)
for part in (serving, logs, care, rolling):
    app.add_typer(part.app)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="stream_worker")

"""What the commands share: options, where things lie, and how a refusal is said."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

__all__ = [
    "BUNDLE",
    "ENRICHED",
    "FINETUNED",
    "SAMPLE",
    "Entity",
    "Epochs",
    "Events",
    "Json",
    "Schema",
    "Seed",
    "Steps",
    "log_to_stderr",
    "refusing",
    "sources",
    "write_sample",
]

SAMPLE = Path("build/demo/sample")
BUNDLE = Path("build/demo/bundle")
FINETUNED = Path("build/finetuned")
ENRICHED = Path("build/enriched.jsonl")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")]
Events = Annotated[
    Path | None,
    typer.Option(
        help=f"Log of events, .jsonl, .csv or .parquet [default: simulated into {SAMPLE}]"
    ),
]
Schema = Annotated[
    Path | None, typer.Option(help="Event schema [default: schema.yaml beside the events]")
]
Entity = Annotated[str, typer.Option(help="Whose histories are embedded")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the training chapters", min=0)]
Steps = Annotated[int | None, typer.Option(help="Steps, instead of epochs", min=1)]
Seed = Annotated[int | None, typer.Option(help="Seed of everything that is drawn")]


def write_sample(
    out: Path, *, customers: int = 240, days: int = 75, seed: int = 7
) -> tuple[int, int, int]:
    """Simulate a log with schema and labels into a folder: its records, payments and frauds."""
    from export.datasets.simulator import simulate, write_simulation  # noqa: PLC0415 - heavy

    drawn = simulate(customers=customers, days=days, seed=seed)
    write_simulation(drawn, out)
    return len(drawn.events), len(drawn.labels), sum(label["label"] for label in drawn.labels)


def sources(events: Path | None, schema: Path | None) -> tuple[Path, Path]:
    """Log and schema that were named, or those of the sample, simulated if it is not there."""
    if events is None:
        events = SAMPLE / "events.jsonl"
        if not events.is_file():
            write_sample(SAMPLE)
    return events, schema or events.with_name("schema.yaml")


@contextmanager
def refusing() -> Iterator[None]:
    """One clear line and the exit code of the error tree."""
    from llm4es.errors import LLM4ESError  # noqa: PLC0415 - heavy

    try:
        yield
    except LLM4ESError as error:
        logging.getLogger(__name__).debug("refused", exc_info=error)
        _fail(" ".join(str(error).split()), error.exit_code)


def _fail(line: str, code: int) -> NoReturn:
    typer.echo(f"export: {line}", err=True)
    raise typer.Exit(code)


def log_to_stderr() -> None:
    """Say warnings on stderr: stdout is for results."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )

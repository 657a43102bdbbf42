"""The commands that make bundles. Heavy imports happen inside them: `--help` answers at once."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from export.build import Built, Request

__all__ = ["app", "main"]

_SAMPLE = Path("build/demo/sample")
_BUNDLE = Path("build/demo/bundle")
_FINETUNED = Path("build/finetuned")

_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")]
_Events = Annotated[
    Path | None,
    typer.Option(help=f"Log of events, .jsonl or .parquet [default: simulated into {_SAMPLE}]"),
]
_Schema = Annotated[
    Path | None, typer.Option(help="Event schema [default: schema.yaml beside the events]")
]
_Entity = Annotated[str, typer.Option(help="Whose histories are embedded")]
_Epochs = Annotated[float | None, typer.Option(help="Passes over the training chapters", min=0)]
_Steps = Annotated[int | None, typer.Option(help="Steps, instead of epochs", min=1)]
_Seed = Annotated[int | None, typer.Option(help="Seed of everything that is drawn")]

app = typer.Typer(
    name="export",
    help="From event logs to a bundle worth serving.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help answers twice as fast
)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="export")


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="Folder for log, schema and labels")] = _SAMPLE,
    customers: Annotated[int, typer.Option(help="Customers, 10 at least", min=10)] = 240,
    days: Annotated[int, typer.Option(help="Days, 21 at least", min=21)] = 75,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes")] = 7,
) -> None:
    """Write simulated card payments with logins, chargebacks and labelled fraud."""
    from export.datasets.simulator import simulate as draw  # noqa: PLC0415 - heavy
    from export.datasets.simulator import write_simulation  # noqa: PLC0415

    drawn = draw(customers=customers, days=days, seed=seed)
    write_simulation(drawn, out)
    frauds = sum(label["label"] for label in drawn.labels)
    typer.echo(
        f"{len(drawn.events):,} records of {customers:,} customers over {days} days, "
        f"{len(drawn.labels):,} payments, {frauds:,} of them fraud: {out}"
    )


@app.command()
def quickstart(
    *,
    events: _Events = None,
    schema: _Schema = None,
    entity: _Entity = "customer",
    out: Annotated[
        Path, typer.Option(help="Folder of the bundle, replaced if it is one")
    ] = _BUNDLE,
    epochs: _Epochs = None,
    steps: _Steps = None,
    seed: _Seed = None,
    as_json: _Json = False,
) -> None:
    """Train a small language model on a log from scratch, and export a bundle: a minute's work."""
    from export.recipe import QUICKSTART  # noqa: PLC0415 - heavy

    recipe = QUICKSTART.with_training(epochs=epochs, steps=steps, seed=seed)
    _log_to_stderr()
    with _refusing():
        from export.build import Request  # noqa: PLC0415 - heavy

        log, words = _sources(events, schema)
        _build(
            Request(events=log, schema=words, entity=entity, out=out, recipe=recipe),
            as_json=as_json,
        )


@app.command()
def finetune(
    *,
    model: Annotated[str, typer.Option(help="Hugging Face hub id, folder, or .gguf file")],
    events: _Events = None,
    schema: _Schema = None,
    entity: _Entity = "customer",
    out: Annotated[
        Path, typer.Option(help="Folder of the bundle, replaced if it is one")
    ] = _FINETUNED,
    epochs: _Epochs = None,
    steps: _Steps = None,
    seed: _Seed = None,
    as_json: _Json = False,
) -> None:
    """Go on training an existing causal language model on a log, and export a bundle."""
    from export.recipe import FINETUNE  # noqa: PLC0415 - heavy

    recipe = FINETUNE.with_training(epochs=epochs, steps=steps, seed=seed)
    _log_to_stderr()
    with _refusing():
        from export.build import Request  # noqa: PLC0415 - heavy

        log, words = _sources(events, schema)
        _build(
            Request(events=log, schema=words, entity=entity, out=out, recipe=recipe, model=model),
            as_json=as_json,
        )


def _sources(events: Path | None, schema: Path | None) -> tuple[Path, Path]:
    """Log and schema that were named, or those of the sample, simulated if it is not there."""
    if events is None:
        events = _SAMPLE / "events.jsonl"
        if not events.is_file():
            simulate(out=_SAMPLE)
    return events, schema or events.with_name("schema.yaml")


def _build(request: "Request", *, as_json: bool) -> None:
    from rich.console import Console  # noqa: PLC0415 - heavy

    from export.build import build_bundle  # noqa: PLC0415 - heavy

    _print(build_bundle(request, Console(stderr=True)), as_json=as_json)


def _print(built: "Built", *, as_json: bool) -> None:
    import msgspec  # noqa: PLC0415 - only now needed
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    manifest = built.bundle.manifest
    training = manifest.training
    tokens = sum(len(c.tokens.ids) for c in (*built.corpus.train, *built.corpus.held_out))
    facts = {
        "bundle": manifest.id,
        "folder": str(built.bundle.folder),
        "base_model": manifest.base_model,
        "parameters": built.parameters,
        "entities": len(built.log.histories),
        "events": built.log.events,
        "tokens_per_event": round(tokens / built.log.events, 2),
        "steps": training.steps,
        "train_loss": training.train_loss,
        "held_out_loss": training.held_out_loss,
        "dim": manifest.dim,
        "surprise_columns": len(built.surprise_columns),
        "parity": dict(manifest.parity),
        "seconds": round(built.seconds, 1),
    }
    if as_json:
        typer.echo(msgspec.json.encode(facts))
        return
    table = Table(show_header=False, title=f"bundle {manifest.id}")
    for name, value in facts.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{each} {size:.1e}" for each, size in value.items())
        else:
            shown = f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(name.replace("_", " "), shown)
    Console().print(table)


@contextmanager
def _refusing() -> Iterator[None]:
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


def _log_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )

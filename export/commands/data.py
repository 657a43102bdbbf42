"""Logs: simulated, prepared from what is published, described."""

from pathlib import Path
from typing import Annotated

import typer

from export.commands.shared import SAMPLE, log_to_stderr, refusing, write_sample

__all__ = ["app"]

app = typer.Typer(rich_markup_mode=None)


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="Folder for log, schema and labels")] = SAMPLE,
    customers: Annotated[int, typer.Option(help="Customers, 10 at least", min=10)] = 240,
    days: Annotated[int, typer.Option(help="Days, 21 at least", min=21)] = 75,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes")] = 7,
) -> None:
    """Write simulated card payments with logins, chargebacks and labelled fraud."""
    records, payments, frauds = write_sample(out, customers=customers, days=days, seed=seed)
    typer.echo(
        f"{records:,} records of {customers:,} customers over {days} days, "
        f"{payments:,} payments, {frauds:,} of them fraud: {out}"
    )


@app.command()
def prepare(
    *,
    name: Annotated[str, typer.Argument(help="Data set (docs/datasets.md), or log for any other")],
    source: Annotated[
        Path, typer.Option("--from", help="Folder of the official files, or a log of your own")
    ],
    out: Annotated[Path, typer.Option(help="Folder for events, schema and labels")],
    schema: Annotated[Path | None, typer.Option(help="Event schema, for log alone")] = None,
) -> None:
    """Turn a published data set, or any log, into events, an event schema and labels."""
    log_to_stderr()
    with refusing():
        from export.datasets.registry import prepare_any  # noqa: PLC0415 - heavy

        made = prepare_any(name, source, out, schema)
    labels = "".join(f", {rows:,} rows in {file}" for file, rows in made.labels.items())
    typer.echo(f"{made.events:,} events{labels}: {made.folder}")


@app.command("schema")
def propose(
    *,
    log: Annotated[Path, typer.Argument(help="Log: .parquet, .csv or .jsonl, or a folder of one")],
    sample: Annotated[int, typer.Option(help="Records to look at", min=1)] = 20_000,
    entity: Annotated[str | None, typer.Option(help="Field of the entity's id [guessed]")] = None,
    time: Annotated[str | None, typer.Option(help="Field of the event time [guessed]")] = None,
) -> None:
    """Propose an event schema for a log, as YAML with comments to edit."""
    log_to_stderr()
    with refusing():
        from export.proposal import propose_schema  # noqa: PLC0415 - heavy

        proposal = propose_schema(log, sample=sample, entity=entity, time=time)
    typer.echo(proposal.yaml, nl=False)
    problem = f" ({proposal.first_problem})" if proposal.first_problem else ""
    typer.echo(f"{proposal.parsed:,} of {proposal.sampled:,} records fit{problem}", err=True)

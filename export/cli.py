"""The commands that make bundles. Heavy imports happen inside them: `--help` answers at once."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from export.build import Built
    from export.recipe import Recipe

__all__ = ["app", "main"]

_SAMPLE = Path("build/demo/sample")
_BUNDLE = Path("build/demo/bundle")
_FINETUNED = Path("build/finetuned")
_ENRICHED = Path("build/enriched.jsonl")

_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")]
_Events = Annotated[
    Path | None,
    typer.Option(
        help=f"Log of events, .jsonl, .csv or .parquet [default: simulated into {_SAMPLE}]"
    ),
]
_Schema = Annotated[
    Path | None, typer.Option(help="Event schema [default: schema.yaml beside the events]")
]
_Entity = Annotated[str, typer.Option(help="Whose histories are embedded")]
_Epochs = Annotated[float | None, typer.Option(help="Passes over the training chapters", min=0)]
_Steps = Annotated[int | None, typer.Option(help="Steps, instead of epochs", min=1)]
_Seed = Annotated[int | None, typer.Option(help="Seed of everything that is drawn")]


class TaskKind(StrEnum):
    """What a label is of."""

    USER = "user"
    POINT_IN_TIME = "point-in-time"


class Scorer(StrEnum):
    """What learns the label from features."""

    LIGHTGBM = "lightgbm"
    LOGISTIC = "logistic"


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
    _log_to_stderr()
    with _refusing():
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
    _log_to_stderr()
    with _refusing():
        from export.proposal import propose_schema  # noqa: PLC0415 - heavy

        proposal = propose_schema(log, sample=sample, entity=entity, time=time)
    typer.echo(proposal.yaml, nl=False)
    problem = f" ({proposal.first_problem})" if proposal.first_problem else ""
    typer.echo(f"{proposal.parsed:,} of {proposal.sampled:,} records fit{problem}", err=True)


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
    from export.recipe import load_recipe  # noqa: PLC0415 - heavy

    _log_to_stderr()
    with _refusing():
        recipe = load_recipe("quickstart").changed(epochs=epochs, steps=steps, seed=seed)
        _build(recipe, events, schema, entity, out, as_json=as_json)


@app.command()
def finetune(
    *,
    recipe: Annotated[
        str, typer.Option(help="A shipped recipe (see `recipes`) or a .yaml file of yours")
    ] = "finetune",
    model: Annotated[
        str | None,
        typer.Option(help="Hugging Face hub id, folder, or .gguf file, instead of the recipe's"),
    ] = None,
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
    """Train by a recipe, an existing causal language model or a new one, and export a bundle.

    A run that was killed goes on where it was when it is started again.
    """
    from export.recipe import load_recipe  # noqa: PLC0415 - heavy

    _log_to_stderr()
    with _refusing():
        chosen = load_recipe(recipe).changed(model=model, epochs=epochs, steps=steps, seed=seed)
        _build(chosen, events, schema, entity, out, as_json=as_json)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="The recipe to print, to begin yours")] = None,
) -> None:
    """List the shipped recipes, or print one with its comments."""
    from export.recipe import recipe_text, shipped_recipes  # noqa: PLC0415 - heavy

    with _refusing():
        typer.echo(recipe_text(name) if name else "\n".join(shipped_recipes()))


@app.command()
def evaluate(
    *,
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle to judge")] = _BUNDLE,
    events: Annotated[Path, typer.Option(help="Log of events, .jsonl or .parquet")] = _SAMPLE
    / "events.jsonl",
    labels: Annotated[
        Path, typer.Option(help="Rows of entity and label (0 or 1), .parquet or .csv")
    ] = _SAMPLE / "labels.parquet",
    task: Annotated[
        TaskKind | None,
        typer.Option(help="[default: user where each entity has one row, else point-in-time]"),
    ] = None,
    label: Annotated[str, typer.Option(help="Column of the label")] = "label",
    only: Annotated[str | None, typer.Option(help="Boolean column: keep its true rows")] = None,
    inclusive: Annotated[
        bool, typer.Option("--inclusive", help="Events at the label's own time are seen too")
    ] = False,
    test_from: Annotated[
        datetime | None,
        typer.Option(help="Test on labels from this UTC time on, train on those known before"),
    ] = None,
    folds: Annotated[int, typer.Option(help="Folds, where the labels have none", min=2)] = 5,
    repeats: Annotated[int, typer.Option(help="Reshuffled folds besides", min=0)] = 0,
    scorer: Annotated[
        list[Scorer] | None, typer.Option(help="May be given twice [default: both]")
    ] = None,
    coles: Annotated[
        bool, typer.Option("--coles", help="Train CoLES as a baseline (extra: coles)")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads of the scorers", min=1)] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures here as JSON")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the report here, one page of HTML")
    ] = None,
) -> None:
    """Judge a bundle on labels, against baselines: usual column names are found by themselves."""
    from rich.console import Console  # noqa: PLC0415 - heavy

    _log_to_stderr()
    with _refusing():
        from export import report  # noqa: PLC0415 - heavy
        from export.evaluate import Request, evaluate  # noqa: PLC0415
        from export.insight import measure_cost  # noqa: PLC0415
        from export.labels import LabelColumns  # noqa: PLC0415

        console = Console(stderr=True)
        found = evaluate(
            Request(
                bundle=bundle,
                events=events,
                labels=labels,
                columns=LabelColumns(label=label, only=only),
                kind=None if task is None else task.value,
                inclusive=inclusive,
                test_from=None if test_from is None else test_from.replace(tzinfo=UTC),
                folds=folds,
                repeats=repeats,
                scorers=tuple(each.value for each in scorer or Scorer),
                coles=coles,
                threads=threads,
            ),
            console,
        )
        with console.status("measuring cost, drawing the report"):
            cost = measure_cost(found)
            if json_file is not None:
                report.write_json(found, cost, json_file)
            if html is not None:
                report.write_report(found, cost, html)
    Console().print(report.score_table(found))


@app.command()
def enrich(
    *,
    model: Annotated[
        str, typer.Option(help="Of the endpoint; without one a hub id, folder or .gguf file")
    ],
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible server, http://host/v1. It is sent the chapters' text, and the "
            "key in LLM4ES_API_KEY if there is one"
        ),
    ] = None,
    events: _Events = None,
    schema: _Schema = None,
    entity: _Entity = "customer",
    recipe: Annotated[
        str, typer.Option(help="Whose training chapters: rendering, cutting, who is held out")
    ] = "quickstart",
    style: Annotated[
        list[str] | None, typer.Option(help="json, yaml, html, markdown, sentence or paraphrase")
    ] = None,
    summary: Annotated[bool, typer.Option(help="Ask for a line that sums a chapter up")] = False,
    prompts: Annotated[Path | None, typer.Option(help="Prompts of your own, YAML")] = None,
    out: Annotated[Path, typer.Option(help="Enriched chapters, JSONL")] = _ENRICHED,
    cache: Annotated[
        Path, typer.Option(help="Answers, each paid for once: a killed run goes on")
    ] = Path("build/enrich-cache"),
    max_events: Annotated[int, typer.Option(help="Events of a chapter at most", min=1)] = 48,
    max_requests: Annotated[int | None, typer.Option(help="Budget of a run", min=0)] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Budget of a run, prompts and answers", min=0)
    ] = None,
    max_answer_tokens: Annotated[int, typer.Option(help="Longest answer", min=1)] = 2048,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.6,
    top_p: Annotated[float, typer.Option(min=0.01, max=1)] = 0.9,
    parallel: Annotated[int, typer.Option(help="Requests at a time, to an endpoint", min=1)] = 4,
    timeout_s: Annotated[float, typer.Option(help="Of one request", min=1)] = 120.0,
    seed: _Seed = None,
    as_json: _Json = False,
) -> None:
    """Let a language model rewrite training chapters, and keep what stays true to them."""
    _log_to_stderr()
    with _refusing():
        import msgspec  # noqa: PLC0415 - heavy, like all that follow
        from rich.console import Console  # noqa: PLC0415

        from export import enrich as work  # noqa: PLC0415
        from export import paraphrasers  # noqa: PLC0415
        from export.chapter_texts import training_texts  # noqa: PLC0415
        from export.corpus import read_log  # noqa: PLC0415
        from export.recipe import load_recipe  # noqa: PLC0415
        from llm4es.schema import load_schema  # noqa: PLC0415

        words = work.load_prompts(prompts)
        chosen = load_recipe(recipe)
        log_file, schema_file = _sources(events, schema)
        meaning = load_schema(schema_file)
        sampling = paraphrasers.Sampling(
            temperature=temperature,
            top_p=top_p,
            max_answer_tokens=max_answer_tokens,
            seed=chosen.training.seed if seed is None else seed,
        )
        log = read_log(log_file, meaning, entity=entity)
        chapters = training_texts(log, meaning, chosen, max_events=max_events)
        if endpoint is None:
            name, ask = paraphrasers.open_local_model(model, sampling)
        else:
            name, ask = (
                model,
                paraphrasers.Endpoint(
                    endpoint,
                    model,
                    sampling,
                    key=paraphrasers.EndpointSecrets().api_key,
                    timeout_s=timeout_s,
                    parallel=parallel,
                ),
            )
        done = work.enrich(
            chapters,
            work.Wanted(
                model=name,
                ask=ask,
                sampling=sampling,
                prompts=words,
                log=meaning.name,
                styles=tuple(style or words.styles),
                summary=summary,
            ),
            cache=work.AnswerCache(cache),
            budget=work.Budget(max_requests=max_requests, max_tokens=max_tokens),
            out=out,
            console=Console(stderr=True),
            parallel=1 if endpoint is None else parallel,
        )
    facts = {"out": str(out), **msgspec.to_builtins(done)}
    if as_json:
        typer.echo(msgspec.json.encode(facts))
    else:
        typer.echo("\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items()))


def _sources(events: Path | None, schema: Path | None) -> tuple[Path, Path]:
    """Log and schema that were named, or those of the sample, simulated if it is not there."""
    if events is None:
        events = _SAMPLE / "events.jsonl"
        if not events.is_file():
            simulate(out=_SAMPLE)
    return events, schema or events.with_name("schema.yaml")


def _build(
    recipe: "Recipe",
    events: Path | None,
    schema: Path | None,
    entity: str,
    out: Path,
    *,
    as_json: bool,
) -> None:
    from rich.console import Console  # noqa: PLC0415 - heavy

    from export.build import Request, build_bundle  # noqa: PLC0415 - heavy

    log, words = _sources(events, schema)
    request = Request(events=log, schema=words, entity=entity, out=out, recipe=recipe)
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

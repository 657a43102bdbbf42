"""Bundles: trained by a recipe and exported."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.commands.shared import (
    BUNDLE,
    FINETUNED,
    Entity,
    Epochs,
    Events,
    Json,
    Schema,
    Seed,
    Steps,
    log_to_stderr,
    refusing,
    sources,
)

__all__ = ["app"]

if TYPE_CHECKING:
    from export.beside import LogPlace
    from export.build import Built
    from export.recipe import Recipe

app = typer.Typer(rich_markup_mode=None)


@app.command()
def quickstart(
    *,
    events: Events = None,
    schema: Schema = None,
    entity: Entity = "customer",
    out: Annotated[Path, typer.Option(help="Folder of the bundle, replaced if it is one")] = BUNDLE,
    epochs: Epochs = None,
    steps: Steps = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Train a small language model on a log from scratch, and export a bundle: a minute's work."""
    from export.recipe import load_recipe  # noqa: PLC0415 - heavy

    log_to_stderr()
    with refusing():
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
    events: Events = None,
    schema: Schema = None,
    entity: Entity = "customer",
    out: Annotated[
        Path, typer.Option(help="Folder of the bundle, replaced if it is one")
    ] = FINETUNED,
    enriched: Annotated[
        Path | None, typer.Option(help="Training chapters in other words, by `enrich`")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            help="Another log to learn with the same tokenizer: ENTITY=EVENTS or "
            "ENTITY=EVENTS,SCHEMA [default: schema.yaml beside it]; may be repeated"
        ),
    ] = None,
    epochs: Epochs = None,
    steps: Steps = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Train by a recipe, an existing causal language model or a new one, and export a bundle.

    A run that was killed goes on where it was when it is started again.
    """
    from export.recipe import load_recipe  # noqa: PLC0415 - heavy

    log_to_stderr()
    with refusing():
        chosen = load_recipe(recipe).changed(model=model, epochs=epochs, steps=steps, seed=seed)
        _build(
            chosen, events, schema, entity, out, enriched=enriched, also=also or (), as_json=as_json
        )


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="The recipe to print, to begin yours")] = None,
) -> None:
    """List the shipped recipes, or print one with its comments."""
    from export.recipe import recipe_text, shipped_recipes  # noqa: PLC0415 - heavy

    with refusing():
        typer.echo(recipe_text(name) if name else "\n".join(shipped_recipes()))


@app.command()
def repool(
    *,
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle whose weights are taken")],
    recipe: Annotated[str, typer.Option(help="Recipe whose `pooling` is wanted")],
    out: Annotated[Path, typer.Option(help="Folder of the new bundle")],
) -> None:
    """Export a bundle's weights with another pooling, without training: another bundle."""
    from export.recipe import load_recipe  # noqa: PLC0415 - heavy

    log_to_stderr()
    with refusing():
        from export.pooling import repool as run  # noqa: PLC0415 - heavy

        made = run(bundle, load_recipe(recipe).pooling, out)
    typer.echo(f"bundle {made.id}, {made.manifest.dim} dimensions: {out}")


def _build(
    recipe: "Recipe",
    events: Path | None,
    schema: Path | None,
    entity: str,
    out: Path,
    *,
    as_json: bool,
    enriched: Path | None = None,
    also: Sequence[str] = (),
) -> None:
    from rich.console import Console  # noqa: PLC0415 - heavy

    from export.build import Request, build_bundle  # noqa: PLC0415 - heavy

    log, words = sources(events, schema)
    request = Request(
        events=log,
        schema=words,
        entity=entity,
        out=out,
        recipe=recipe,
        enriched=enriched,
        beside=tuple(_place(each) for each in also),
    )
    _print(build_bundle(request, Console(stderr=True)), as_json=as_json)


def _place(text: str) -> "LogPlace":
    """Read ENTITY=EVENTS[,SCHEMA]. Raises ConfigError."""
    from export.beside import LogPlace  # noqa: PLC0415 - heavy
    from llm4es.errors import ConfigError  # noqa: PLC0415

    entity, _, paths = text.partition("=")
    events, _, schema = paths.partition(",")
    if not entity or not events:
        raise ConfigError(
            "also", f"{text!r} is no log", "write ENTITY=EVENTS or ENTITY=EVENTS,SCHEMA"
        )
    log = Path(events)
    return LogPlace(
        events=log, schema=Path(schema) if schema else log.with_name("schema.yaml"), entity=entity
    )


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
        "training_seconds": round(built.trained.seconds, 1),
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

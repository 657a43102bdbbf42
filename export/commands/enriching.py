"""Enrichment: training chapters in other words."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.commands.shared import (
    ENRICHED,
    Entity,
    Events,
    Json,
    Schema,
    Seed,
    log_to_stderr,
    refusing,
    sources,
)

__all__ = ["app"]

if TYPE_CHECKING:
    from export.enrich import Enriched

app = typer.Typer(rich_markup_mode=None)


@app.command()
def enrich(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="Of the endpoint; without one a hub id, folder or .gguf file. Without a model the "
            "other formats are written by rule"
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible server, http://host/v1. It is sent the chapters' text, and the "
            "key in LLM4ES_API_KEY if there is one"
        ),
    ] = None,
    events: Events = None,
    schema: Schema = None,
    entity: Entity = "customer",
    recipe: Annotated[
        str, typer.Option(help="Whose training chapters: rendering, cutting, who is held out")
    ] = "quickstart",
    style: Annotated[
        list[str] | None, typer.Option(help="json, yaml, html, markdown, sentence or paraphrase")
    ] = None,
    summary: Annotated[bool, typer.Option(help="Ask for a line that sums a chapter up")] = False,
    prompts: Annotated[Path | None, typer.Option(help="Prompts of your own, YAML")] = None,
    out: Annotated[Path, typer.Option(help="Enriched chapters, JSONL")] = ENRICHED,
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
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Let a language model rewrite training chapters, and keep what stays true to them."""
    log_to_stderr()
    with refusing():
        from rich.console import Console  # noqa: PLC0415 - heavy, like all that follow

        from export import enrich as work  # noqa: PLC0415
        from export import paraphrasers  # noqa: PLC0415
        from export.chapter_texts import other_renderers, training_texts  # noqa: PLC0415
        from export.corpus import read_log  # noqa: PLC0415
        from export.recipe import load_recipe  # noqa: PLC0415
        from llm4es.schema import load_schema  # noqa: PLC0415

        chosen = load_recipe(recipe)
        log_file, schema_file = sources(events, schema)
        meaning = load_schema(schema_file)
        log = read_log(log_file, meaning, entity=entity)
        chapters = training_texts(log, meaning, chosen, max_events=max_events)
        console = Console(stderr=True)
        if model is None:
            renderers = other_renderers(log, meaning, chosen, styles=style)
            _print(out, work.enrich_by_rule(chapters, renderers, out, console), as_json=as_json)
            return
        words = work.load_prompts(prompts)
        sampling = paraphrasers.Sampling(
            temperature=temperature,
            top_p=top_p,
            max_answer_tokens=max_answer_tokens,
            seed=chosen.training.seed if seed is None else seed,
        )
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
            console=console,
            parallel=1 if endpoint is None else parallel,
        )
    _print(out, done, as_json=as_json)


def _print(out: Path, done: "Enriched", *, as_json: bool) -> None:
    import msgspec  # noqa: PLC0415 - only now needed

    facts = {"out": str(out), **msgspec.to_builtins(done)}
    if as_json:
        typer.echo(msgspec.json.encode(facts))
    else:
        typer.echo("\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items()))

"""Precision: a bundle's variants."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.commands.shared import BUNDLE, SAMPLE, Json, log_to_stderr, refusing

__all__ = ["app"]

if TYPE_CHECKING:
    from llm4es.bundle import Bundle

app = typer.Typer(rich_markup_mode=None)


class Precision(StrEnum):
    """What products inside the layers are computed in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT8_WEIGHTS = "int8-weights"
    INT4_WEIGHTS = "int4-weights"


class Cache(StrEnum):
    """What keys and values of open chapters are kept in."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


@app.command()
def quantize(
    *,
    bundle: Annotated[Path, typer.Option(help="Folder of the fp32 bundle")] = BUNDLE,
    out: Annotated[Path, typer.Option(help="Folder of the new bundle")],
    precision: Annotated[
        Precision, typer.Option(help="Of matrix products inside the layers")
    ] = Precision.FP32,
    cache: Annotated[
        Cache, typer.Option(help="Of the keys and values that a worker keeps")
    ] = Cache.FP32,
    keep: Annotated[
        str | None,
        typer.Option(help="Regular expression: products whose name it fits stay in fp32"),
    ] = None,
    events: Annotated[Path, typer.Option(help="Log to judge it on, .jsonl or .parquet")] = SAMPLE
    / "events.jsonl",
    entities: Annotated[int, typer.Option(help="Entities drawn from it", min=1)] = 200,
    labels: Annotated[
        Path | None, typer.Option(help="Rows of entity and label (0 or 1), .parquet or .csv")
    ] = None,
    label: Annotated[str, typer.Option(help="Column of the label")] = "label",
    positive: Annotated[
        str | None, typer.Option(help="Value of the label that counts as 1, all others as 0")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Let it through whatever it loses; its manifest says so")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a bundle in less precision, and judge it: one that loses too much is refused."""
    from rich.console import Console  # noqa: PLC0415 - heavy

    log_to_stderr()
    with refusing():
        from export.labels import LabelColumns  # noqa: PLC0415 - heavy
        from export.variants import Wanted, make_variant  # noqa: PLC0415

        made = make_variant(
            Wanted(
                bundle=bundle,
                out=out,
                events=events,
                labels=labels,
                columns=LabelColumns(label=label, positive=positive),
                precision=precision.value,
                cache=cache.value,
                keep=keep,
                entities=entities,
                force=force,
            ),
            Console(stderr=True),
        )
    _print(made, as_json=as_json)


def _print(made: "Bundle", *, as_json: bool) -> None:
    import json  # noqa: PLC0415 - only now needed

    compute = made.manifest.compute
    size = sum(file.stat().st_size for file in (made.folder / "graphs").iterdir())
    facts = {
        "bundle": made.id,
        "folder": str(made.folder),
        "megabytes": round(size / 1e6, 1),
        **compute.model_dump(mode="json", exclude={"judged"}),
        **(compute.judged.model_dump(mode="json") if compute.judged is not None else {}),
    }
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        shown = (f"{name.replace('_', ' ')}: {value}" for name, value in facts.items())
        typer.echo("\n".join(shown))

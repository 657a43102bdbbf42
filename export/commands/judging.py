"""Evaluation: what a bundle is worth on labels."""

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.commands.shared import BUNDLE, SAMPLE, log_to_stderr, refusing

__all__ = ["app"]

if TYPE_CHECKING:
    from export.evaluate import View

app = typer.Typer(rich_markup_mode=None)


class TaskKind(StrEnum):
    """What a label is of."""

    USER = "user"
    POINT_IN_TIME = "point-in-time"


class Scorer(StrEnum):
    """What learns the label from features."""

    LIGHTGBM = "lightgbm"
    LOGISTIC = "logistic"


@app.command()
def evaluate(
    *,
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle to judge")] = BUNDLE,
    events: Annotated[Path, typer.Option(help="Log of events, .jsonl or .parquet")] = SAMPLE
    / "events.jsonl",
    labels: Annotated[
        Path, typer.Option(help="Rows of entity and label (0 or 1), .parquet or .csv")
    ] = SAMPLE / "labels.parquet",
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="Bundle of another entity whose ids stand in the labels too"),
    ] = None,
    beside_events: Annotated[
        list[Path] | None, typer.Option(help="Its log; once for each --beside")
    ] = None,
    task: Annotated[
        TaskKind | None,
        typer.Option(help="[default: user where each entity has one row, else point-in-time]"),
    ] = None,
    label: Annotated[str, typer.Option(help="Column of the label")] = "label",
    positive: Annotated[
        str | None, typer.Option(help="Value of the label that counts as 1, all others as 0")
    ] = None,
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

    log_to_stderr()
    with refusing():
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
                columns=LabelColumns(label=label, only=only, positive=positive),
                beside=_views(beside or [], beside_events or []),
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
def study(
    *,
    name: Annotated[str, typer.Argument(help="Data set (docs/datasets.md)")],
    source: Annotated[Path, typer.Option("--from", help="Folder of the official files")],
    out: Annotated[Path, typer.Option(help="Folder for data, bundle and reports")],
    recipe: Annotated[
        str | None, typer.Option(help="Shipped recipe or .yaml file [default: the data set's]")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps, instead of epochs", min=1)] = None,
    repeats: Annotated[int, typer.Option(help="Reshuffled folds besides", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads of the scorers", min=1)] = 1,
) -> None:
    """Go from a published data set to a bundle and a report (HTML, JSON) on each of its tasks."""
    from rich.console import Console  # noqa: PLC0415 - heavy

    log_to_stderr()
    with refusing():
        from export import report  # noqa: PLC0415 - heavy
        from export.study import Study  # noqa: PLC0415
        from export.study import study as run  # noqa: PLC0415

        wanted = Study(
            name=name,
            taken=source,
            out=out,
            recipe=recipe,
            steps=steps,
            repeats=repeats,
            threads=threads,
        )
        for found in run(wanted, Console(stderr=True)):
            Console().print(report.score_table(found))


def _views(bundles: list[Path], logs: list[Path]) -> "tuple[View, ...]":
    from export.evaluate import View  # noqa: PLC0415 - heavy
    from llm4es.errors import ConfigError  # noqa: PLC0415

    if len(bundles) != len(logs):
        raise ConfigError(
            "beside", f"{len(bundles)} bundles and {len(logs)} logs", "give one log for each bundle"
        )
    return tuple(View(bundle, log) for bundle, log in zip(bundles, logs, strict=True))

"""The report: one HTML page that asks nothing of any other server."""

import json
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.table import Table

from export.evaluate import Evaluated, summary
from export.figures import auc_bars, curves, learning_curve, map_figure, size_curve
from export.insight import (
    Cost,
    map_rows,
    neighbourhoods,
    shaded_history,
    training_curve,
)
from export.scoring import LIGHTGBM, PENALTIES, TERM_PENALTIES
from export.segments import segments

__all__ = ["render_report", "score_table", "write_json", "write_report"]

_FULL_SHADE = 6.0  # nats above the usual


def write_report(evaluated: Evaluated, cost: Cost, path: Path) -> None:
    """Write the page to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_report(evaluated, cost), encoding="utf-8")


def write_json(evaluated: Evaluated, cost: Cost, path: Path) -> None:
    """Write every figure, but for the rows, to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {**summary(evaluated), "cost": asdict(cost)}
    path.write_text(json.dumps(document, indent=2, default=list) + "\n", encoding="utf-8")


def score_table(evaluated: Evaluated) -> Table:
    """Lay the scores out for a terminal."""
    facts = summary(evaluated)
    table = Table(
        title=f"bundle {facts['bundle']}, {facts['task']['label']}, {facts['task']['splits']}"
    )
    table.add_column("features")
    table.add_column("scorer")
    names = ("ROC-AUC", "95 %", "± folds", "AP", "95 %")
    for name in (*names, "reshuffled") if evaluated.scores[0].repeated else names:
        table.add_column(name, justify="right")
    for score in evaluated.scores:
        auc, precision = score.roc_auc, score.average_precision
        again = [f"{sum(score.repeated) / len(score.repeated):.3f}"] if score.repeated else []
        table.add_row(
            score.features,
            score.scorer,
            f"{auc.mean:.3f}",
            f"{auc.low:.3f} to {auc.high:.3f}",
            f"{auc.std:.3f}",
            f"{precision.mean:.3f}",
            f"{precision.low:.3f} to {precision.high:.3f}",
            *again,
            style="dim" if score.baseline else None,
        )
    control = facts["shuffled_labels_roc_auc"]
    table.caption = f"labels shuffled within folds: {control['mean']:.3f} (0.5 is due)"
    return table


def render_report(evaluated: Evaluated, cost: Cost) -> str:
    """Draw, describe and lay out everything that was found."""
    environment = Environment(
        loader=PackageLoader("export", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shade"] = _shade
    looks = training_curve(evaluated)
    places, rows = map_rows(evaluated)
    figures = {
        "bars": auc_bars(evaluated),
        "curves": curves(evaluated),
        "sizes": size_curve(evaluated),
        "learning": learning_curve(looks) if looks else "",
        "map": map_figure(places, evaluated.task.labels[rows]) if len(rows) else "",
    }
    return environment.get_template("report.html.j2").render(
        facts=summary(evaluated),
        manifest=evaluated.bundle.manifest,
        evaluated=evaluated,
        best={
            evaluated.best(name).features: evaluated.best(name).scorer for name in evaluated.names
        },
        # Ours, drawn by matplotlib from numbers and names of columns.
        figures={name: Markup(svg) for name, svg in figures.items()},  # noqa: S704
        cost=cost,
        neighbourhoods=neighbourhoods(evaluated),
        history=shaded_history(evaluated),
        segments=segments(evaluated),
        several=len({score.scorer for score in evaluated.scores}) > 1,
        settings=LIGHTGBM,
        penalties=PENALTIES,
        term_penalties=TERM_PENALTIES,
    )


def _shade(surprise: float) -> str:
    """Give a background for so many nats above the usual; none for what was expected."""
    share = max(0.0, min(1.0, surprise / _FULL_SHADE))
    return f"rgba(209, 73, 91, {0.75 * share:.2f})"

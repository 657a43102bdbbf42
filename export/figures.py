"""Figures: SVG to stand in the report's page, without a word from elsewhere."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from export.evaluate import Evaluated, Score

__all__ = ["auc_bars", "curves", "learning_curve", "map_figure", "size_curve"]

_COLOURS = ("#0b5d8f", "#d1495b", "#2e8b57", "#edae49", "#6a4c93", "#8d6e63", "#607d8b", "#c2185b",
            "#00838f", "#9e9d24")  # fmt: skip
_GRID = np.linspace(0, 1, 201)
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "svg.hashsalt": "llm4es",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6e8",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_NOTHING_MORE = {"Date": None, "Creator": None, "Format": None, "Type": None}


def auc_bars(evaluated: Evaluated) -> str:
    """ROC-AUC of each choice by its better scorer, with the bootstrap's interval."""
    best = [evaluated.best(name) for name in evaluated.names]
    with _figure(7.6, 0.36 * len(best) + 0.9) as (figure, (axes,)):
        for place, score in enumerate(reversed(best)):
            interval = score.roc_auc
            axes.plot([interval.low, interval.high], [place, place], color="#90a4ae", lw=2)
            axes.plot(interval.mean, place, "o", color=_COLOURS[1 if score.baseline else 0])
        axes.set_yticks(range(len(best)), [score.features for score in reversed(best)])
        axes.set_xlabel("ROC-AUC, mean over folds, 95 % interval (blue: ours, red: baselines)")
        return _svg(figure)


def curves(evaluated: Evaluated) -> str:
    """ROC and precision-recall of each choice by its better scorer, averaged over folds."""
    with _figure(10.4, 4.4, columns=2) as (figure, (left, right)):
        for colour, name in zip(_COLOURS, evaluated.names, strict=False):
            score = evaluated.best(name)
            style = "--" if score.baseline else "-"
            found = _averaged(evaluated, score)
            left.plot(_GRID, found[0], color=colour, ls=style, lw=1.4, label=name)
            right.plot(_GRID, found[1], color=colour, ls=style, lw=1.4)
        left.plot([0, 1], [0, 1], color="#b0bec5", lw=0.8)
        left.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
        right.set(xlabel="recall", ylabel="precision", title="precision and recall", ylim=(0, 1.02))
        figure.legend(loc="outside lower center", ncols=3)
        return _svg(figure)


def learning_curve(looks: Sequence[Mapping[str, Any]]) -> str:
    """Loss by step, of training chapters and of held-out entities."""
    with _figure(5.2, 3.2) as (figure, (axes,)):
        for colour, key in zip(_COLOURS, ("train_loss", "held_out_loss"), strict=False):
            points = [(look["step"], look[key]) for look in looks if look.get(key) is not None]
            if points:
                mark = "o-" if key == "held_out_loss" else "-"
                steps, losses = zip(*points, strict=True)
                label = key.removesuffix("_loss").replace("_", " ")
                axes.plot(steps, losses, mark, color=colour, label=label, ms=3)
        axes.set(xlabel="step", ylabel="loss, nats per token")
        axes.legend()
        return _svg(figure)


def size_curve(evaluated: Evaluated) -> str:
    """ROC-AUC by how many labelled entities there are to learn from."""
    with _figure(5.2, 3.2) as (figure, (axes,)):
        for colour, (name, points) in zip(_COLOURS, evaluated.sizes.items(), strict=False):
            if points:
                counts, aucs = zip(*points, strict=True)
                axes.plot(counts, aucs, "o-", color=colour, label=name, ms=4)
        axes.set_xscale("log")
        ticks = sorted({count for points in evaluated.sizes.values() for count, _ in points})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel="labelled entities learnt from", ylabel="ROC-AUC, logistic regression")
        axes.legend()
        return _svg(figure)


def map_figure(places: NDArray[np.float64], labels: NDArray[np.int8]) -> str:
    """Rows in the plane, coloured by label."""
    with _figure(6.4, 5.2) as (figure, (axes,)):
        for label, colour, size in ((0, "#b0bec5", 8), (1, _COLOURS[1], 12)):
            chosen = places[labels == label]
            name = f"label {label} ({len(chosen):,})"
            axes.scatter(chosen[:, 0], chosen[:, 1], s=size, color=colour, lw=0, label=name,
                         alpha=0.8)  # fmt: skip
        axes.set_axis_off()
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure)


def _averaged(evaluated: Evaluated, score: Score) -> tuple[NDArray[np.float64], ...]:
    """True positive rate by false positive rate, and precision by recall, over `_GRID`."""
    task = evaluated.task
    rates, precisions = [], []
    for _, test in task.splits.pairs:
        known = (task.labels[test], score.predictions[test])
        false, true, _ = roc_curve(*known, sample_weight=task.weights[test])
        rates.append(np.interp(_GRID, false, true))
        precision, recall, _ = precision_recall_curve(*known, sample_weight=task.weights[test])
        precisions.append(np.interp(_GRID, recall[::-1], precision[::-1]))
    return np.mean(rates, axis=0), np.mean(precisions, axis=0)


@contextmanager
def _figure(
    width: float, height: float, *, columns: int = 1
) -> Iterator[tuple[Figure, list[Axes]]]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)
        yield figure, list(axes[0])


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=_NOTHING_MORE)
    # The page is HTML: neither prolog nor document type, which names an address.
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), count=1, flags=re.DOTALL)

"""Quality: bundles made from the real data, and what their embeddings are worth on its labels.

    python -m benchmarks.quality [--json] [--only ratings|fraud] [--threads N]

Needs ../shared/data (or --data), and an hour and a half of one core. Figures are ROC-AUC or average
precision, each of the scorer that does better at it, LightGBM or logistic regression, on the folds
and splits that come with the data (of transactions LightGBM's, as the data's own baselines have
it): each is a share of what is possible, so it stands as it is among the ratios.
`gender_zero_shot_auc` is the same model with nothing learnt from the log but its tokenizer. Each
evaluation's table, and paired differences, are told on stderr.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from export.build import Request, build_bundle
from export.choices import AGGREGATES, EMBEDDING, SURPRISE, TERMS, TOKEN_BAG
from export.datasets.registry import prepare
from export.embed import AsOf, Embeddings, embed_as_of
from export.evaluate import Evaluated, View, evaluate
from export.evaluate import Request as Question
from export.labels import LabelColumns
from export.recipe import Recipe, load_recipe
from export.report import score_table
from export.scoring import Judge, ScorerName, weighted_auc
from llm4es.bundle import Bundle
from llm4es.events import Event

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 5
_RESAMPLES = 200
BOTH = f"{EMBEDDING} + {SURPRISE}"
ALL_THREE = f"{BOTH} + {AGGREGATES}"
TERMINAL = "terminal view"
# The customer's embedding beside it did worse on the last fifth of the training period too: its
# thousands of columns say little of a terminal.
TWO_VIEWS = f"{SURPRISE} + {TERMINAL}"

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Places:
    """Where data comes from, and where bundles go."""

    data: Path
    out: Path
    threads: int = 1

    def prepared(self, name: str, folder: str) -> Path:
        """Prepare a data set of the shared folder."""
        out = self.out / folder
        prepare(name, self.data / folder, out)
        return out

    def built(
        self, name: str, folder: Path, entity: str, recipe: Recipe, *, suffix: str = ""
    ) -> Path:
        """Train and export on events and schema of that suffix; the bundle's folder."""
        out = self.out / "bundles" / name
        request = Request(
            events=folder / f"events{suffix}.parquet",
            schema=folder / f"schema{suffix}.yaml",
            entity=entity,
            out=out,
            recipe=recipe,
        )
        build_bundle(request, console)
        return out


def main(
    *,
    data: Annotated[Path, typer.Option(help="Folder of movielens and fdh")] = ROOT.parent
    / "shared/data",
    out: Annotated[Path, typer.Option(help="Folder for bundles")] = ROOT / "build/quality",
    only: Annotated[str | None, typer.Option(help="ratings or fraud")] = None,
    threads: Annotated[int, typer.Option(help="Of LightGBM", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Build, evaluate, and print the figures."""
    started = time.monotonic()
    places = Places(data, out, threads)
    ratios: dict[str, float] = {}
    if only in {None, "ratings"}:
        ratios |= ratings(places)
    if only in {None, "fraud"}:
        ratios |= fraud(places)
    if as_json:
        minutes = round((time.monotonic() - started) / 60, 1)
        typer.echo(json.dumps({"ratios": ratios, "minutes": minutes, "machine": machine()}))
        return
    table = Table(title="quality")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in ratios.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)


class Remembered:
    """Embeds as `embed_as_of` does, and keeps the rows of each bundle for who asks again."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[dict[AsOf, int], Embeddings]] = {}

    def __call__(
        self,
        bundle: Bundle,
        histories: Mapping[str, Sequence[Event]],
        asked: Sequence[AsOf],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Embeddings:
        """Give row i for `asked[i]`."""
        rows, found = self._known.get(bundle.id, ({}, None))
        if found is None or any(one not in rows for one in asked):
            found = embed_as_of(bundle, histories, asked, progress=progress)
            rows = {one: row for row, one in enumerate(asked)}
            self._known[bundle.id] = (rows, found)
        taken = np.array([rows[one] for one in asked])
        return Embeddings(**{each.name: getattr(found, each.name)[taken] for each in fields(found)})


def told(question: Question, remembered: Remembered | None = None) -> Evaluated:
    """Evaluate, and show all that was compared."""
    started = time.monotonic()
    found = evaluate(question, console, embed=remembered or embed_as_of)
    console.print(f"{question.labels.name}: {(time.monotonic() - started) / 60:.1f} minutes")
    console.print(score_table(found))
    for each in found.comparisons:
        auc, precision = each.roc_auc, each.average_precision
        console.print(
            f"{each.ours} against {each.theirs}: {auc.low:+.3f} to {auc.high:+.3f} {each.verdict}, "
            f"average precision {precision.low:+.3f} to {precision.high:+.3f}"
        )
    return found


def ratings(places: Places) -> dict[str, float]:
    """MovieLens-100K: gender and age of users."""
    folder = places.prepared("movielens-100k", "movielens")
    recipe = load_recipe("movielens")
    bundle = places.built("ratings", folder, "user", recipe)
    untrained = recipe.changed(steps=1).model_dump() | {"start": "random"}
    untrained["training"]["learning_rate"] = 1e-12
    zero = places.built("ratings-untrained", folder, "user", Recipe.model_validate(untrained))

    def asked(of: Path, label: str, *, choices: tuple[str, ...], repeats: int = 0) -> Evaluated:
        return told(
            Question(
                bundle=of,
                events=folder / "events.parquet",
                labels=folder / "labels.parquet",
                columns=LabelColumns(label=label),
                kind="user",
                choices=choices,
                repeats=repeats,
                resamples=_RESAMPLES,
                curves=False,
                threads=places.threads,
            )
        )

    usual = (EMBEDDING, BOTH, TOKEN_BAG, AGGREGATES, ALL_THREE, TERMS)
    gender = asked(bundle, "label", choices=usual, repeats=REPEATS)
    zero_shot = asked(zero, "label", choices=(EMBEDDING,))
    best = gender.best(EMBEDDING)
    learnt = Judge(gender.task, gender.task.splits, resamples=_RESAMPLES).difference(
        best.predictions, zero_shot.best(EMBEDDING).predictions, weighted_auc
    )
    console.print(f"trained against zero-shot: {learnt.low:+.3f} to {learnt.high:+.3f}")
    return {
        "gender_auc": best.roc_auc.mean,
        "gender_auc_repeats": sum(best.repeated) / len(best.repeated),
        "gender_token_bag_auc": gender.best(TOKEN_BAG).roc_auc.mean,
        "gender_zero_shot_auc": zero_shot.best(EMBEDDING).roc_auc.mean,
        "age_auc": asked(bundle, "label_age_ge_30", choices=usual).best(EMBEDDING).roc_auc.mean,
    }


def fraud(places: Places) -> dict[str, float]:
    """Fraud Detection Handbook: accounts by week, and single transactions, lite rows."""
    folder = places.prepared("fraud-handbook", "fdh")
    bundle = places.built("fraud", folder, "customer", load_recipe("handbook"))
    recipe = load_recipe("handbook-terminal")
    terminals = places.built("terminal", folder, "terminal", recipe, suffix="_terminal")
    view = View(terminals, folder / "events_terminal.parquet")
    transactions = folder / "labels_tx.parquet"
    remembered = Remembered()

    def asked(
        labels: Path,
        *choices: str,
        scorers: tuple[ScorerName, ...] = ("lightgbm",),
        inclusive: bool = True,
        beside: tuple[View, ...] = (),
    ) -> Evaluated:
        return told(
            Question(
                bundle=bundle,
                events=folder / "events.parquet",
                labels=labels,
                columns=LabelColumns(only="lite", weight="weight"),
                beside=beside,
                kind="point-in-time",
                inclusive=inclusive,
                scorers=scorers,
                choices=choices,
                resamples=_RESAMPLES,
                curves=False,
                threads=places.threads,
            ),
            remembered,
        )

    account = asked(
        folder / "labels_account.parquet",
        *(EMBEDDING, SURPRISE, BOTH, TOKEN_BAG, AGGREGATES, ALL_THREE),
        scorers=("lightgbm", "logistic"),
        inclusive=False,
    )
    every = (BOTH, ALL_THREE, TOKEN_BAG, AGGREGATES)
    everything = asked(transactions, *every, TERMINAL, TWO_VIEWS, beside=(view,))
    own_history = asked(_without_scenario_2(transactions), *every, SURPRISE)

    def precision(of: Evaluated, features: str) -> float:
        return of.best(features, by="ap").average_precision.mean

    return {
        "fdh_account_auc": account.best(EMBEDDING).roc_auc.mean,
        "fdh_account_ap": precision(account, EMBEDDING),
        "fdh_account_surprise_auc": account.best(SURPRISE).roc_auc.mean,
        "fdh_account_both_auc": account.best(BOTH).roc_auc.mean,
        "fdh_account_both_ap": precision(account, BOTH),
        "fdh_tx13_ap": precision(own_history, BOTH),
        "fdh_tx_ap": precision(everything, BOTH),
        "fdh_tx_two_views_ap": precision(everything, TWO_VIEWS),
    }


def _without_scenario_2(labels: Path) -> Path:
    """Labels whose frauds the customer's own history can tell: compromised terminals left out."""
    table = pq.read_table(labels)
    kept = [scenario != 2 for scenario in table["scenario"].to_pylist()]  # noqa: PLR2004
    path = labels.with_name("labels_tx13.parquet")
    pq.write_table(table.filter(kept), path)
    return path


if __name__ == "__main__":
    typer.run(main)

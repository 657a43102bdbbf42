"""Fraud from two views: what a customer's history and a terminal's history know of a payment.

    python -m examples.fraud_from_two_views [--home build/two_views] [--customers N] [--days N]

Simulates payments, trains a model of each entity, streams the log through two workers into Feast,
fetches a point-in-time training set from both views by `training_frame`, trains LightGBM on it and
scores payments by what the online store serves. The notebook beside it is the same with plots.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import typer
from feast import FeatureStore
from lightgbm import LGBMClassifier
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score, roc_auc_score

from examples.two_views import CUSTOMER, ENTITIES, ROOT, TERMINAL, TwoViews
from llm4es.feast import TrainingSet, training_frame

__all__ = ["CHOICES", "FraudModel", "Judged", "Split", "judge", "serve", "split", "training_set"]

TRAINED_SHARE = 0.6  # of the payments by time; labels not known by then are not trained on
COMPONENTS = 16  # of an embedding, for a model that learns from some hundred frauds
CHOICES: dict[str, tuple[str, ...]] = {
    "the payment alone": (),
    "+ the customer's view": (CUSTOMER,),
    "+ the terminal's view": (TERMINAL,),
    "+ both views": ENTITIES,
}
FEATURES = ("embedding", "surprise", "surprise_last")
Floats = NDArray[np.float32]


def training_set(store: FeatureStore, payments: pd.DataFrame) -> TrainingSet:
    """What both views knew of each payment once the customer's worker had seen it.

    `payments` has customer_id, terminal_id, event_timestamp, event_id and label_available_at.
    """
    return training_frame(
        store,
        payments,
        entities=ENTITIES,
        join_as="at",
        event_id="event_id",
        label_available_at="label_available_at",
    )


@dataclass(frozen=True, slots=True)
class Split:
    """Which rows are trained on and tested on: later ones, and no label before it was known."""

    moment: datetime
    train: NDArray[np.bool_]
    test: NDArray[np.bool_]


def split(found: TrainingSet) -> Split:
    """Cut by time."""
    times = found.frame["event_timestamp"]
    moment = pd.Timestamp(times.quantile(TRAINED_SHARE)).to_pydatetime()
    return Split(moment, found.known_by(moment), (times > moment).to_numpy())


class FraudModel:
    """LightGBM over the payment's own fields and some of the views.

    Embeddings are compressed by components learnt on the training rows; what is served goes
    through the very same ones.
    """

    def __init__(self, views: Sequence[str]) -> None:
        self._views = tuple(views)
        self._components: dict[str, PCA] = {}
        self._categories: dict[str, pd.Index[Any]] = {}
        self._model = LGBMClassifier(
            n_estimators=150,
            learning_rate=0.05,
            num_leaves=15,
            min_child_samples=10,
            colsample_bytree=0.3,
            scale_pos_weight=5.0,
            random_state=0,
            n_jobs=1,
            verbosity=-1,
            deterministic=True,
            force_row_wise=True,
        )

    def fit(
        self,
        payments: pd.DataFrame,
        views: dict[str, dict[str, Floats]],
        rows: NDArray[np.bool_],
    ) -> "FraudModel":
        """Learn from some of n payments; `views` has an array (n, width) per entity and feature."""
        self._categories = {
            name: payments.loc[rows, name].astype("category").cat.categories
            for name in ("category", "channel", "country")
            if name in payments
        }
        for entity in self._views:
            vectors = np.nan_to_num(views[entity]["embedding"][rows])
            count = min(COMPONENTS, *vectors.shape)
            self._components[entity] = PCA(count, random_state=0).fit(vectors)
        matrix = self._matrix(payments, views)
        self._model.fit(matrix[rows], payments["label"].to_numpy()[rows])
        return self

    def predict(
        self, payments: pd.DataFrame, views: dict[str, dict[str, Floats]]
    ) -> NDArray[np.float64]:
        """Score of n payments (n,): the higher, the more like fraud."""
        told = np.asarray(self._model.predict_proba(self._matrix(payments, views)))
        scores: NDArray[np.float64] = told[:, 1]
        return scores

    def _matrix(
        self, payments: pd.DataFrame, views: dict[str, dict[str, Floats]]
    ) -> NDArray[np.float64]:
        hours = pd.to_datetime(payments["event_timestamp"], utc=True).dt.hour
        own = [payments["amount"].to_numpy(float), hours.to_numpy(float)]
        own += [
            pd.Categorical(payments[name], categories=known).codes.astype(float)
            for name, known in self._categories.items()
        ]
        parts = [np.column_stack(own)]
        for entity in self._views:
            view = views[entity]
            vectors = self._components[entity].transform(np.nan_to_num(view["embedding"]))
            parts += [vectors, view["surprise"], view["surprise_last"].reshape(len(own[0]), 1)]
        return np.column_stack(parts)


def offline_views(found: TrainingSet) -> dict[str, dict[str, Floats]]:
    """Arrays of each entity's view, row i of entity row i."""
    return {
        entity: {name: each.matrix(_part(name)).data for name in FEATURES}
        for entity, each in found.entities.items()
    }


def _part(name: str) -> Literal["embedding", "surprise", "surprise_last"]:
    return {"embedding": "embedding", "surprise": "surprise"}.get(name, "surprise_last")  # type: ignore[return-value]


def online_views(store: FeatureStore, payments: pd.DataFrame) -> dict[str, dict[str, Floats]]:
    """The same arrays, as the online store serves them now; NaN for an entity without a row."""
    found = {}
    for entity in ENTITIES:
        key = f"{entity}_id"
        service = store.get_feature_service(f"{entity}_llm4es")
        rows = store.get_online_features(
            features=service, entity_rows=[{key: each} for each in payments[key]]
        ).to_dict()
        found[entity] = {name: _stacked(rows[name]) for name in FEATURES}
    return found


def _stacked(values: Sequence[Any]) -> Floats:
    """Lists or numbers, None among them, as (n, width) float32."""
    width = max(np.size(value) for value in values if value is not None)
    empty = np.full(width, np.nan, np.float32)
    return np.array(
        [empty if value is None else np.reshape(value, width) for value in values], np.float32
    )


@dataclass(frozen=True, slots=True)
class Judged:
    """How well a choice of views tells fraud apart on the later payments."""

    features: str
    roc_auc: float
    average_precision: float
    scores: NDArray[np.float64]  # of the tested payments
    model: FraudModel


def judge(found: TrainingSet, cut: Split) -> list[Judged]:
    """Train and test every choice of views."""
    views = offline_views(found)
    label = found.frame["label"].to_numpy()
    # Of a sample, how many payments each one stands for.
    weight = found.frame["weight"].to_numpy()[cut.test] if "weight" in found.frame else None
    judged = []
    for name, chosen in CHOICES.items():
        model = FraudModel(chosen).fit(found.frame, views, cut.train)
        scores = model.predict(found.frame, views)[cut.test]
        judged.append(
            Judged(
                name,
                float(roc_auc_score(label[cut.test], scores, sample_weight=weight)),
                float(average_precision_score(label[cut.test], scores, sample_weight=weight)),
                scores,
                model,
            )
        )
    return judged


@dataclass(frozen=True, slots=True)
class Served:
    """Payments scored from the online store, and how that compares with the training set."""

    payments: pd.DataFrame  # with `score`
    compared: int  # of them, rows whose payment both views have seen last
    largest_difference: float  # between what was served and what was trained on, in any feature


def serve(store: FeatureStore, model: FraudModel, found: TrainingSet) -> Served:
    """Score each customer's newest payment by what is online.

    Where that payment is the newest event of both entities, the online row must be what the
    training set has: the same numbers in training and in serving.
    """
    newest = found.frame.drop_duplicates("customer_id", keep="last")
    served = online_views(store, newest)
    scores = model.predict(newest, served)
    trained = offline_views(found)
    rows = newest.index.to_numpy()
    same = np.ones(len(rows), np.bool_)
    for entity in ENTITIES:
        online = store.get_online_features(
            features=[f"{found.entities[entity].view}:last_event_id"],
            entity_rows=[{f"{entity}_id": each} for each in newest[f"{entity}_id"]],
        ).to_dict()["last_event_id"]
        same &= np.array(online, object) == newest["event_id"].to_numpy()
    differences = [
        np.abs(served[entity][name][same] - trained[entity][name][rows][same])
        for entity in ENTITIES
        for name in FEATURES
    ]
    largest = max((float(each.max()) for each in differences if each.size), default=0.0)
    ordered = newest.assign(score=scores).sort_values("score", ascending=False)
    return Served(ordered, int(same.sum()), largest)


def main(
    home: Annotated[Path, typer.Option(help="Folder to leave everything in")] = Path(
        "build/two_views"
    ),
    customers: Annotated[int, typer.Option(help="Customers to simulate")] = 240,
    days: Annotated[int, typer.Option(help="Days to simulate")] = 75,
    steps: Annotated[int | None, typer.Option(help="Training steps [default: 5 epochs]")] = None,
) -> None:
    """Run the steps, and show what each view is worth."""
    warnings.simplefilter("ignore")  # Feast's own deprecations are not the reader's concern
    started = time.monotonic()
    place = TwoViews((ROOT / home).resolve())
    place.clear()
    logs = place.simulate(customers=customers, days=days)
    place.train(logs, steps=steps)
    place.apply()
    rows = place.stream(logs)
    print(f"rows in Feast: {rows}")
    store = FeatureStore(repo_path=str(place.repo))
    report(store, place.payments())
    print(f"{time.monotonic() - started:,.0f} s")


def report(store: FeatureStore, payments: pd.DataFrame) -> tuple[list[Judged], Served]:
    """Print the comparison, and what is served; give both."""
    found = training_set(store, payments)
    cut = split(found)
    judged = judge(found, cut)
    frauds = int(found.frame["label"][cut.test].sum())
    console = Console(highlight=False)
    console.print(
        f"{cut.train.sum():,} payments to train on (labels known by {cut.moment:%Y-%m-%d}), "
        f"{cut.test.sum():,} later ones to test on, {frauds} of them fraud"
    )
    table = Table("features", "ROC-AUC", "average precision", title="a fraud model on two views")
    for each in judged:
        table.add_row(each.features, f"{each.roc_auc:.3f}", f"{each.average_precision:.3f}")
    console.print(table)
    served = serve(store, judged[-1].model, found)
    console.print(
        f"scored {len(served.payments):,} customers' newest payments from the online store; "
        f"{served.compared} of them compared with the training set: "
        f"largest difference {served.largest_difference:.1e}"
    )
    return judged, served


if __name__ == "__main__":
    typer.run(main)

"""A fraud model on features as of each payment, from stock `get_historical_features`.

Each label row carries its payment's event id. A model that scores a payment once it is seen
joins at the payment's own `as_of`, which the offline log holds beside `last_event_id`; one that
must decide before joins at the payment's time, when the row as of then cannot know the payment.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import average_precision_score, roc_auc_score

__all__ = ["Comparison", "Score", "compare"]

ENTITY = "customer"
TRAINED_SHARE = 0.6  # of the payments by time; labels not known by then are not trained on
COMPONENTS = 32  # of the embedding, for a model that learns from some hundred frauds
FEATURES = ("embedding", "surprise", "surprise_last", "last_event_id")


@dataclass(frozen=True, slots=True)
class Score:
    """How well one choice of features tells fraud apart on the later payments."""

    features: str
    roc_auc: float
    average_precision: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same model on several choices of features."""

    split: datetime
    train: int
    test: int
    test_frauds: int
    scores: list[Score]


def compare(repo: Path, sample: Path) -> Comparison:
    """Fetch the training set as of each payment, and score each choice of features.

    `repo` is the Feast repository; `sample` holds events.jsonl and labels.parquet.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Feast's own deprecations are not the reader's concern
        labels = _labels(sample)
        seen = _as_of_payment(repo, labels)
        before = _as_of_time(repo, seen)
    split = seen["event_time"].quantile(TRAINED_SHARE)
    train = (seen["label_available_at"] <= split).to_numpy()
    test = (seen["event_time"] > split).to_numpy()
    label = seen["label"].to_numpy()
    payment = _payment(seen)
    embedding = _compressed(_matrix(seen["embedding"]), train)
    past = _compressed(_matrix(before["embedding"]), train)
    surprise = np.column_stack([_matrix(seen["surprise"]), seen["surprise_last"]])
    choices = {
        "the current payment alone": [payment],
        "+ the embedding as of before it": [payment, past],
        "+ the embedding once it is seen": [payment, embedding],
        "+ the embedding and the surprise": [payment, embedding, surprise],
        "+ the surprise alone": [payment, surprise],
    }
    return Comparison(
        split=pd.Timestamp(split).to_pydatetime(),
        train=int(train.sum()),
        test=int(test.sum()),
        test_frauds=int(label[test].sum()),
        scores=[_score(name, parts, label, train, test) for name, parts in choices.items()],
    )


def _labels(sample: Path) -> pd.DataFrame:
    """Labels with the payment's own fields beside them, one row per payment."""
    with (sample / "events.jsonl").open(encoding="utf-8") as lines:
        records = pd.DataFrame([r for r in map(json.loads, lines) if r["type"] == "payment"])
    fields = records.drop_duplicates("event_id")[["event_id", "category", "channel", "country"]]
    return pd.read_parquet(sample / "labels.parquet").merge(fields, on="event_id", validate="1:1")


def _as_of_payment(repo: Path, labels: pd.DataFrame) -> pd.DataFrame:
    """Features at each payment's own `as_of`."""
    from feast import FeatureStore  # noqa: PLC0415 - heavy

    from llm4es.feast import read_as_of  # noqa: PLC0415

    store = FeatureStore(repo_path=str(repo))
    as_of = read_as_of(store, ENTITY)
    joined = labels.merge(as_of, on=["customer_id", "event_id"], validate="1:1")
    return _historical(repo, joined.rename(columns={"as_of": "event_timestamp"}))


def _as_of_time(repo: Path, seen: pd.DataFrame) -> pd.DataFrame:
    """Features of the same payments as they were before each."""
    entities = seen[["customer_id", "event_id"]].assign(event_timestamp=seen["event_time"])
    return _historical(repo, entities)


def _historical(repo: Path, entities: pd.DataFrame) -> pd.DataFrame:
    """Stock Feast's point-in-time join, in the order of the payments' ids."""
    from feast import FeatureStore  # noqa: PLC0415 - heavy

    store = FeatureStore(repo_path=str(repo))
    service = store.get_feature_service(f"{ENTITY}_llm4es")
    view = service.feature_view_projections[0].name
    job = store.get_historical_features(
        entity_df=entities, features=[f"{view}:{name}" for name in FEATURES]
    )
    frame: pd.DataFrame = job.to_df()
    return frame.sort_values("event_id", ignore_index=True)


def _payment(frame: pd.DataFrame) -> NDArray[np.float64]:
    """The current payment's own fields (rows, 5)."""
    hour = frame["event_time"].dt.hour
    codes = [
        frame[name].astype("category").cat.codes for name in ("category", "channel", "country")
    ]
    return np.column_stack([frame["amount"], hour, *codes]).astype(np.float64)


def _matrix(column: "pd.Series[Any]") -> NDArray[np.float64]:
    """Arrays of one length as rows; a customer without a past has none, and gets zeros."""
    width = next(len(value) for value in column if value is not None)
    empty = np.zeros(width)
    return np.array([empty if value is None else value for value in column], dtype=np.float64)


def _compressed(vectors: NDArray[np.float64], train: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Principal components, learnt on the training rows: trees need few columns for few frauds."""
    found: NDArray[np.float64] = (
        PCA(COMPONENTS, random_state=0).fit(vectors[train]).transform(vectors)
    )
    return found


def _score(
    name: str,
    parts: Sequence[NDArray[np.float64]],
    label: NDArray[np.int64],
    train: NDArray[np.bool_],
    test: NDArray[np.bool_],
) -> Score:
    features = np.column_stack(parts)
    model = HistGradientBoostingClassifier(
        max_iter=100, learning_rate=0.06, max_leaf_nodes=15, l2_regularization=1.0,
        max_features=0.3, class_weight="balanced", random_state=0,
    )  # fmt: skip
    model.fit(features[train], label[train])
    scores = model.predict_proba(features[test])[:, 1]
    return Score(
        name,
        float(roc_auc_score(label[test], scores)),
        float(average_precision_score(label[test], scores)),
    )

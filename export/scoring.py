"""Scoring: how well features tell labels apart, and how sure one can be of it."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import lightgbm
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, issparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler

from export.labels import Splits, Task

__all__ = [
    "LIGHTGBM",
    "PENALTIES",
    "TERM_PENALTIES",
    "Features",
    "Interval",
    "Judge",
    "Metric",
    "ScorerName",
    "predict",
    "weighted_auc",
    "weighted_precision",
]

ScorerName = Literal["lightgbm", "logistic"]
Metric = Callable[[NDArray[np.int8], NDArray[np.float32], NDArray[np.float64]], NDArray[np.float64]]

_LEAF = 50
# The authors' downstream. MaxAbsScaler, which they put before it, changes no tree.
LIGHTGBM = {
    "objective": "binary",
    "learning_rate": 0.02,
    "bagging_fraction": 0.5,
    "bagging_freq": 1,
    "feature_fraction": 0.75,
    "max_depth": 6,
    "lambda_l1": 1.0,
    "lambda_l2": 1.0,
    "min_data_in_leaf": _LEAF,
    "seed": 42,
    "deterministic": True,
    "force_col_wise": True,  # else it times both, and the choice may differ from run to run
    "verbosity": -1,
}
_TREES = 500
PENALTIES = (0.001, 0.01, 0.1, 1.0)  # C of standardised features, chosen within training rows
TERM_PENALTIES = (1.0, 10.0, 100.0)  # C of TF-IDF
_INNER_FOLDS = 3
_CLIP = 8.0  # standard deviations: one wild value must not decide a line
_RESAMPLES_AT_ONCE = 50


@dataclass(frozen=True, slots=True)
class Features:
    """One choice of features, row i for label row i; counts of terms become TF-IDF by fold."""

    name: str
    matrix: NDArray[np.float32] | csr_matrix
    baseline: bool = False

    @property
    def sparse(self) -> bool:
        """Counts of terms, for logistic regression alone."""
        return bool(issparse(self.matrix))


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over folds, its spread over them, and what a resampled population makes of it."""

    mean: float
    std: float  # over folds; 0 with one split
    low: float  # 2.5th percentile of the bootstrap
    high: float


def predict(
    features: Features, task: Task, splits: Splits, scorer: ScorerName, *, threads: int = 1
) -> NDArray[np.float32]:
    """Probabilities (N,) of rows when they were test rows; NaN where a row never was."""
    scores = np.full(len(task.labels), np.nan, dtype=np.float32)
    fit = _fit_trees if scorer == "lightgbm" else _fit_line
    for train, test in splits.pairs:
        scores[test] = fit(features, task, train, test, threads)
    return scores


def weighted_auc(
    labels: NDArray[np.int8], scores: NDArray[np.float32], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """ROC-AUC (R,) of n rows under each of R rows of weights (R, n); ties count half."""
    positive, negative = _by_score(labels, scores, weights)
    below = negative.sum(axis=1, keepdims=True) - np.cumsum(negative, axis=1)
    won = (positive * (below + negative / 2)).sum(axis=1)
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    return _quotient(won, pairs)


def weighted_precision(
    labels: NDArray[np.int8], scores: NDArray[np.float32], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Average precision (R,) of n rows under each of R rows of weights (R, n)."""
    positive, negative = _by_score(labels, scores, weights)
    found = np.cumsum(positive, axis=1)
    taken = found + np.cumsum(negative, axis=1)
    precision = np.divide(found, taken, out=np.zeros_like(found), where=taken > 0)
    return _quotient((positive * precision).sum(axis=1), positive.sum(axis=1))


class Judge:
    """Metrics of scores over folds, and the same after drawing the entities anew.

    All scores are judged on the same draws, so that differences between them are paired.
    """

    def __init__(self, task: Task, splits: Splits, *, resamples: int = 1000, seed: int = 0) -> None:
        self._task = task
        self._tests = [test for _, test in splits.pairs]
        rng = np.random.default_rng(seed)
        groups = task.groups
        count = int(groups.max()) + 1
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
        self._groups = groups
        self._draws = np.concatenate([np.ones((1, count), dtype=np.int64), drawn])

    def by_draw(self, scores: NDArray[np.float32], metric: Metric) -> NDArray[np.float64]:
        """Mean over folds (1 + resamples,): first of the rows as they are, then of each draw."""
        found = [self._fold(test, scores, metric, self._draws) for test in self._tests]
        with warnings.catch_warnings():
            # A draw may leave a fold without a positive, or all of them.
            warnings.simplefilter("ignore", RuntimeWarning)
            means: NDArray[np.float64] = np.nanmean(np.array(found), axis=0)
        return means

    def by_fold(self, scores: NDArray[np.float32], metric: Metric) -> NDArray[np.float64]:
        """The metric of each fold's test rows (folds,)."""
        whole = self._draws[:1]
        return np.array([self._fold(test, scores, metric, whole)[0] for test in self._tests])

    def interval(self, scores: NDArray[np.float32], metric: Metric) -> Interval:
        """Mean, spread over folds, and the bootstrap's 95 % interval."""
        folds = self.by_fold(scores, metric)
        return _interval(self.by_draw(scores, metric), float(folds.std()))

    def difference(
        self, ours: NDArray[np.float32], theirs: NDArray[np.float32], metric: Metric
    ) -> Interval:
        """How much better one score is than another, paired by fold and by draw."""
        folds = self.by_fold(ours, metric) - self.by_fold(theirs, metric)
        return _interval(
            self.by_draw(ours, metric) - self.by_draw(theirs, metric), float(folds.std())
        )

    def _fold(
        self,
        test: NDArray[np.int64],
        scores: NDArray[np.float32],
        metric: Metric,
        draws: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        task = self._task
        found = [
            metric(
                task.labels[test],
                scores[test],
                draws[start : start + _RESAMPLES_AT_ONCE][:, self._groups[test]]
                * task.weights[test],
            )
            for start in range(0, len(draws), _RESAMPLES_AT_ONCE)
        ]
        return np.concatenate(found)


def _interval(by_draw: NDArray[np.float64], std: float) -> Interval:
    drawn = by_draw[1:][np.isfinite(by_draw[1:])]
    low, high = np.percentile(drawn, (2.5, 97.5)) if len(drawn) else (np.nan, np.nan)
    return Interval(float(by_draw[0]), std, float(low), float(high))


def _quotient(upper: NDArray[np.float64], lower: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide; NaN where there is nothing to divide by, as in a draw without a positive."""
    found: NDArray[np.float64] = np.full(len(upper), np.nan)
    np.divide(upper, lower, out=found, where=lower > 0)
    return found


def _by_score(
    labels: NDArray[np.int8], scores: NDArray[np.float32], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights of positives and of negatives (R, distinct scores), the highest score first."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    positive = labels[order] == 1
    by_rank = weights[:, order].astype(np.float64)
    return (
        np.add.reduceat(by_rank * positive, starts, axis=1),
        np.add.reduceat(by_rank * ~positive, starts, axis=1),
    )


def _fit_trees(
    features: Features,
    task: Task,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    threads: int,
) -> NDArray[np.float32]:
    matrix = features.matrix
    if len(train) < 2 * _LEAF or not np.ptp(matrix[train], axis=0).any():
        # LightGBM stops with an error where there is no split to be tried.
        prior = np.average(task.labels[train], weights=task.weights[train])
        return np.full(len(test), prior, dtype=np.float32)
    data = lightgbm.Dataset(matrix[train], task.labels[train], weight=task.weights[train])
    model = lightgbm.train({**LIGHTGBM, "num_threads": threads}, data, num_boost_round=_TREES)
    return np.asarray(model.predict(matrix[test], num_threads=threads), dtype=np.float32)


def _fit_line(
    features: Features,
    task: Task,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    _threads: int,
) -> NDArray[np.float32]:
    """Logistic regression with the C that did best on inner folds of the training rows."""
    penalties = TERM_PENALTIES if features.sparse else PENALTIES
    groups = task.groups[train]
    inner = StratifiedGroupKFold(_INNER_FOLDS, shuffle=True, random_state=0)
    judged: list[list[float]] = []
    if len(np.unique(groups)) >= _INNER_FOLDS and _rarest(task, train) >= _INNER_FOLDS:
        for learnt, kept in inner.split(train, task.labels[train], groups):
            rows, others = train[learnt], train[kept]
            if min(_rarest(task, rows), _rarest(task, others)):
                found = _lines(features, task, rows, others, penalties)
                weights = task.weights[None, others]
                judged.append(
                    [float(weighted_auc(task.labels[others], each, weights)[0]) for each in found]
                )
    best = int(np.argmax(np.mean(judged, axis=0))) if judged else len(penalties) // 2
    return _lines(features, task, train, test, (penalties[best],))[0]


def _rarest(task: Task, rows: NDArray[np.int64]) -> int:
    """Entities of the rarer class: what folds are short of first."""
    groups = task.groups
    return min(len(np.unique(groups[rows][task.labels[rows] == label])) for label in (0, 1))


def _lines(
    features: Features,
    task: Task,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    penalties: Sequence[float],
) -> list[NDArray[np.float32]]:
    """Probabilities of the test rows under each C; scales are learnt from the training rows."""
    if features.sparse:
        terms = TfidfTransformer(sublinear_tf=True).fit(features.matrix[train])
        learnt, judged = (terms.transform(features.matrix[rows]) for rows in (train, test))
    else:
        scaler = StandardScaler().fit(features.matrix[train])
        learnt, judged = (
            np.clip(scaler.transform(features.matrix[rows]), -_CLIP, _CLIP)
            for rows in (train, test)
        )
    weights = task.weights[train] / task.weights[train].mean()
    model = LogisticRegression(max_iter=300, tol=1e-3, warm_start=True)
    found = []
    for penalty in penalties:
        model.set_params(C=penalty)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a line is judged as it is
            model.fit(learnt, task.labels[train], sample_weight=weights)
        found.append(model.predict_proba(judged)[:, 1].astype(np.float32))
    return found

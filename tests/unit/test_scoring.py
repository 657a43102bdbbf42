"""Metrics against scikit-learn's, intervals against what is known, splits against leaks."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.metrics import average_precision_score, roc_auc_score

from export.labels import LabelColumns, Task, drawn_splits, read_task, shuffle_labels
from export.scoring import Features, Judge, ScorerName, predict, weighted_auc, weighted_precision
from llm4es.errors import ConfigError

START = datetime(2026, 1, 1, tzinfo=UTC)


def write_labels(folder: Path, **columns: Any) -> Path:  # noqa: ANN401 - of any type
    path = folder / "labels.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def user_task(folder: Path, labels: NDArray[np.int64], **columns: Any) -> Task:  # noqa: ANN401
    path = write_labels(
        folder, entity_id=[f"u{row}" for row in range(len(labels))], label=labels, **columns
    )
    return read_task(path, LabelColumns(), entity_field="entity_id")


def noisy(labels: NDArray[np.int64], *, noise: float, seed: int) -> NDArray[np.float32]:
    """One column that tells the label, and four that do not."""
    rng = np.random.default_rng(seed)
    told = labels + noise * rng.normal(size=len(labels))
    return np.column_stack([told, rng.normal(size=(len(labels), 4))]).astype(np.float32)


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_are_those_of_scikit_learn_with_weights_and_ties(*, ties: bool) -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 300).astype(np.int8)
    scores = (rng.normal(size=300) + labels).astype(np.float32)
    scores = np.round(scores) if ties else scores
    weights = rng.uniform(0.1, 20, (3, 300))
    for row in range(3):
        expected = (
            roc_auc_score(labels, scores, sample_weight=weights[row]),
            average_precision_score(labels, scores, sample_weight=weights[row]),
        )
        found = (
            weighted_auc(labels, scores, weights)[row],
            weighted_precision(labels, scores, weights)[row],
        )
        assert found == pytest.approx(expected, abs=1e-6)


def test_a_draw_without_a_positive_gives_no_number() -> None:
    labels = np.array([1, 0, 0], dtype=np.int8)
    scores = np.array([0.9, 0.2, 0.1], dtype=np.float32)
    weights = np.array([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    assert np.isnan(weighted_auc(labels, scores, weights)[0])
    assert np.isnan(weighted_precision(labels, scores, weights)[0])
    assert weighted_auc(labels, scores, weights)[1] == 1.0


@pytest.mark.parametrize("scorer", ["lightgbm", "logistic"])
def test_scorers_find_what_is_there_and_never_score_a_row_they_learnt_from(
    scorer: ScorerName, tmp_path: Path
) -> None:
    labels = np.random.default_rng(1).integers(0, 2, 600)
    task = user_task(tmp_path, labels, fold=np.arange(600) % 3)
    features = Features("told", noisy(labels, noise=0.5, seed=2))
    scores = predict(features, task, task.splits, scorer)
    judge = Judge(task, task.splits, resamples=200)
    found = judge.interval(scores, weighted_auc)
    assert found.low < found.mean < found.high
    assert 0.87 < found.mean < 0.94  # two standard deviations apart is 0.921, and 400 rows are few
    assert len(judge.by_fold(scores, weighted_auc)) == 3
    changed = features.matrix.copy()
    changed[task.splits.pairs[0][1]] = 0  # a fold's own rows do not decide its model
    others = predict(Features("changed", changed), task, task.splits, scorer)
    constant = others[task.splits.pairs[0][1]]
    assert np.ptp(constant) == 0


def test_terms_are_told_apart_by_logistic_regression(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 200)
    counts = rng.poisson(1, (200, 30)).astype(np.float32)
    counts[:, 0] += 3 * labels
    task = user_task(tmp_path, labels)
    scores = predict(Features("terms", csr_matrix(counts)), task, task.splits, "logistic")
    assert Judge(task, task.splits, resamples=0).by_fold(scores, weighted_auc).mean() > 0.85


def test_a_difference_is_paired_and_knows_a_tie(tmp_path: Path) -> None:
    labels = np.random.default_rng(4).integers(0, 2, 500)
    task = user_task(tmp_path, labels)
    good, bad, same = (
        predict(Features("x", noisy(labels, noise=noise, seed=seed)), task, task.splits, "logistic")
        for noise, seed in ((0.5, 1), (2.0, 2), (2.0, 3))
    )
    judge = Judge(task, task.splits, resamples=300)
    assert judge.difference(good, bad, weighted_auc).low > 0.1
    tie = judge.difference(bad, same, weighted_auc)
    assert tie.low < 0 < tie.high
    nothing = judge.difference(bad, bad, weighted_auc)
    assert (nothing.mean, nothing.low, nothing.high) == (0, 0, 0)


def test_intervals_are_of_entities_not_of_rows(tmp_path: Path) -> None:
    """Ten copies of each row are no more evidence than one."""
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 2, 150)
    scores = (labels + rng.normal(size=150)).astype(np.float32)
    widths = []
    for copies in (1, 10):
        path = write_labels(
            tmp_path,
            entity_id=np.repeat(np.arange(150), copies),
            event_time=[START + timedelta(days=day) for day in range(copies)] * 150,
            label=np.repeat(labels, copies),
            fold=np.repeat(np.arange(150) % 2, copies),
        )
        task = read_task(path, LabelColumns(), entity_field="entity_id", kind="point-in-time")
        found = Judge(task, task.splits).interval(np.repeat(scores, copies), weighted_auc)
        widths.append(found.high - found.low)
    assert widths[1] == pytest.approx(widths[0], rel=0.15)


def test_folds_keep_entities_together_and_reshuffling_changes_them(tmp_path: Path) -> None:
    path = write_labels(
        tmp_path,
        entity_id=np.repeat(np.arange(40), 5),
        event_time=[START + timedelta(days=day) for day in range(5)] * 40,
        label=np.arange(200) % 7 == 0,
    )
    with pytest.raises(ConfigError, match="not of 0 and 1"):
        read_task(path, LabelColumns(label="entity_id"), entity_field="entity_id")
    task = read_task(path, LabelColumns(), entity_field="entity_id")
    assert task.kind == "point-in-time"
    for train, test in task.splits.pairs:
        assert not {task.entity_ids[row] for row in train} & {task.entity_ids[row] for row in test}
    tested = np.sort(np.concatenate([test for _, test in task.splits.pairs]))
    assert tested.tolist() == list(range(200))
    again, other = (drawn_splits(task, folds=5, seed=seed) for seed in (42, 43))
    assert again.pairs[0][1].tolist() == task.splits.pairs[0][1].tolist()
    assert other.pairs[0][1].tolist() != task.splits.pairs[0][1].tolist()


def test_an_entity_in_two_folds_is_refused(tmp_path: Path) -> None:
    path = write_labels(
        tmp_path,
        entity_id=["a", "b", "a", "b"],
        event_time=[START] * 4,
        label=[0, 1, 1, 0],
        fold=[0, 1, 1, 0],
    )
    with pytest.raises(ConfigError, match="in two folds"):
        read_task(path, LabelColumns(), entity_field="entity_id")


def test_a_split_by_time_wants_labels_that_were_known(tmp_path: Path) -> None:
    days = [START + timedelta(days=day) for day in range(8)]
    columns: dict[str, Any] = {
        "entity_id": ["a", "b"] * 4,
        "event_time": days,
        "label": [0, 0, 1, 1, 0, 0, 0, 1],
        "split": ["history", "train", "train", "train", "gap", "test", "test", "test"],
    }
    known = [day + timedelta(days=1) for day in days]
    task = read_task(
        write_labels(tmp_path, **columns, label_available_at=known),
        LabelColumns(),
        entity_field="entity_id",
    )
    ((train, test),) = task.splits.pairs
    assert (train.tolist(), test.tolist()) == ([1, 2, 3], [5, 6, 7])
    late = [day + timedelta(days=3) for day in days]
    path = write_labels(tmp_path, **columns, label_available_at=late)
    with pytest.raises(ConfigError, match="after the first test row"):
        read_task(path, LabelColumns(), entity_field="entity_id")
    task = read_task(path, LabelColumns(), entity_field="entity_id", test_from=days[6])
    ((train, test),) = task.splits.pairs
    assert (train.tolist(), test.tolist()) == ([0, 1, 2], [6, 7])


def test_shuffling_keeps_each_folds_positives(tmp_path: Path) -> None:
    labels = np.random.default_rng(8).integers(0, 2, 100)
    task = user_task(tmp_path, labels)
    lot = shuffle_labels(task, seed=1)
    assert lot.labels.tolist() != task.labels.tolist()
    for _, test in task.splits.pairs:
        assert lot.labels[test].sum() == task.labels[test].sum()


def test_files_that_cannot_be_judged_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name a file"):
        read_task(tmp_path / "labels.xlsx", LabelColumns(), entity_field="entity_id")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_task(tmp_path / "labels.parquet", LabelColumns(), entity_field="entity_id")
    path = write_labels(tmp_path, user=["a", "b"], label=[0, 1])
    with pytest.raises(ConfigError, match="neither entity_id nor customer_id"):
        read_task(path, LabelColumns(), entity_field="customer_id")
    with pytest.raises(ConfigError, match="it has: user, label"):
        read_task(path, LabelColumns(entity="user", only="lite"), entity_field="customer_id")
    with pytest.raises(ConfigError, match="cannot be drawn"):
        read_task(path, LabelColumns(entity="user"), entity_field="customer_id")
    with pytest.raises(ConfigError, match="no column of times"):
        read_task(path, LabelColumns(entity="user"), entity_field="user", kind="point-in-time")

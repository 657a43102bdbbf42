"""Two bundles' online rows, compared: how complete, fresh and good the new ones are."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow.csv as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llm4es.errors import ConfigError
from llm4es.features import FeatureRow

__all__ = ["Comparison", "compare_rows", "read_labels"]

_CHUNK = 500  # entities that are read at once
_NEIGHBOURS = 10
_FOLDS = 5


class Rows(Protocol):
    """What reads online rows."""

    def read(self, entity_ids: Sequence[str]) -> Sequence[FeatureRow | None]:
        """Rows, in the order of the ids."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How the new bundle's rows stand to the old one's."""

    entities: int  # that have a row of the old bundle
    missing: int  # of them, those that have none of the new one
    behind: int  # of them, those whose new row knows less than the old one
    behind_worst_s: float
    neighbour_overlap: float | None  # of the 10 nearest by std-centred cosine, on a sample
    sampled: int
    labelled: int = 0
    auc_old: float | None = None  # logistic regression, five folds
    auc_new: float | None = None

    @property
    def coverage(self) -> float:
        """Share of the entities that have a row of the new bundle."""
        return 1.0 if self.entities == 0 else 1 - self.missing / self.entities


def compare_rows(
    entity_ids: Iterable[str],
    old: Rows,
    new: Rows,
    *,
    sample: int = 1000,
    labels: dict[str, int] | None = None,
) -> Comparison:
    """Compare the rows of all entities; vectors of a sample, and of the labelled ones.

    The sample is the same each time: the entities whose ids hash lowest.
    """
    labels = labels or {}
    missing = behind = entities = 0
    worst_s = 0.0
    kept: list[tuple[bytes, FeatureRow, FeatureRow]] = []
    known: list[tuple[int, FeatureRow, FeatureRow]] = []
    for before, after in _pairs(entity_ids, old, new):
        entities += 1
        if after is None:
            missing += 1
            continue
        lacks_s = (before.as_of - after.as_of).total_seconds()
        behind += lacks_s > 0
        worst_s = max(worst_s, lacks_s)
        kept.append((_place(before.entity_id), before, after))
        if len(kept) > 2 * sample:
            kept = sorted(kept, key=lambda each: each[0])[:sample]
        if before.entity_id in labels:
            known.append((labels[before.entity_id], before, after))
    kept = sorted(kept, key=lambda each: each[0])[:sample]
    target = np.array([label for label, _, _ in known])
    return Comparison(
        entities=entities,
        missing=missing,
        behind=behind,
        behind_worst_s=worst_s,
        sampled=len(kept),
        neighbour_overlap=_overlap(
            _vectors(row for _, row, _ in kept), _vectors(row for _, _, row in kept)
        ),
        labelled=len(known),
        auc_old=_auc(_features(row for _, row, _ in known), target),
        auc_new=_auc(_features(row for _, _, row in known), target),
    )


def read_labels(path: Path, join_key: str) -> dict[str, int]:
    """Read labels, 0 or 1, by entity, from Parquet or CSV; an entity's last row stands.

    Raises ConfigError where the file or a column is not there.
    """
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else pc.read_csv(path)
        key = join_key if join_key in table.column_names else "entity_id"
        ids, labels = table[key].to_pylist(), table["label"].to_pylist()
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(
            "labels", f"{path}: {error}", f"give .parquet or .csv with {join_key} and label"
        ) from error
    return {str(entity): int(label) for entity, label in zip(ids, labels, strict=True)}


def _pairs(
    entity_ids: Iterable[str], old: Rows, new: Rows
) -> Iterator[tuple[FeatureRow, FeatureRow | None]]:
    """Rows of the entities that the old bundle has a row of; the old one is read first."""
    remaining = iter(entity_ids)
    while chunk := list(islice(remaining, _CHUNK)):
        for before, after in zip(old.read(chunk), new.read(chunk), strict=True):
            if before is not None:
                yield before, after


def _place(entity_id: str) -> bytes:
    return blake2b(entity_id.encode(), digest_size=8).digest()


def _vectors(rows: Iterable[FeatureRow]) -> NDArray[np.float64]:
    return np.array([row.embedding for row in rows], np.float64)


def _features(rows: Iterable[FeatureRow]) -> NDArray[np.float64]:
    return np.array([[*row.embedding, *row.surprise] for row in rows], np.float64)


def _overlap(old: NDArray[np.float64], new: NDArray[np.float64]) -> float | None:
    """Mean share of the nearest neighbours (n, dim) that two spaces have in common."""
    if len(old) <= 1:
        return None
    count = min(_NEIGHBOURS, len(old) - 1)
    near_old, near_new = _nearest(old, count), _nearest(new, count)
    shared = [len(set(a) & set(b)) for a, b in zip(near_old, near_new, strict=True)]
    return float(np.mean(shared) / count)


def _nearest(vectors: NDArray[np.float64], count: int) -> list[list[int]]:
    centred = vectors - vectors.mean(0)
    scale = centred.std(0)
    centred /= np.where(scale > 0, scale, 1)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    centred /= np.where(length > 0, length, 1)
    cosine = centred @ centred.T
    np.fill_diagonal(cosine, -np.inf)
    nearest: list[list[int]] = np.argpartition(-cosine, count - 1, axis=1)[:, :count].tolist()
    return nearest


def _auc(features: NDArray[np.float64], labels: NDArray[np.int_]) -> float | None:
    """Mean ROC-AUC over folds; None where there are too few of either label."""
    if len(labels) == 0 or np.bincount(labels, minlength=2).min() < _FOLDS:
        return None
    try:
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - extra `train`
        from sklearn.model_selection import StratifiedKFold, cross_val_score  # noqa: PLC0415
        from sklearn.pipeline import make_pipeline  # noqa: PLC0415
        from sklearn.preprocessing import StandardScaler  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            "labels", "scikit-learn is needed", "pip install 'llm4es[train]'"
        ) from error
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=42)
    scores = cross_val_score(model, features, labels, cv=folds, scoring="roc_auc")
    return float(np.mean(scores))

"""Drift: what is served now, beside what was served of held-out entities when the model was made.

A model that has grown old is surprised more. A bundle keeps, in its arrays, mean and standard
deviation of the held-out entities' embeddings (dim,) and surprise (columns,).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llm4es.bundle import Bundle
from llm4es.features import (
    SNAPSHOT_EMBEDDING,
    SNAPSHOT_SURPRISE,
    FeatureRow,
    SumsLayout,
)

__all__ = ["Drift", "measure_drift"]

_LEAST = 2  # rows: fewer have no spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """In standard deviations of the bundle's held-out entities."""

    rows: int
    embedding_shift: float  # of the mean, root mean square over dimensions
    embedding_spread: float  # standard deviation now over then, median over dimensions
    surprise_shift: Mapping[str, float]  # of the mean, by column: in all and by field, per scale


def measure_drift(bundle: Bundle, rows: Sequence[FeatureRow]) -> Drift | None:
    """Compare rows with the bundle's snapshot; None where it has none, or there are too few."""
    embedding = bundle.arrays.get(SNAPSHOT_EMBEDDING)
    if embedding is None or len(rows) < _LEAST:
        return None
    vectors = np.stack([row.embedding for row in rows]).astype(np.float64)
    mean, std = embedding[0], np.maximum(embedding[1], 1e-9)
    shift = (vectors.mean(axis=0) - mean) / std
    surprise: dict[str, float] = {}
    snapshot = bundle.arrays.get(SNAPSHOT_SURPRISE)
    if snapshot is not None:
        nats = np.stack([row.surprise for row in rows]).astype(np.float64).mean(axis=0)
        moved = (nats - snapshot[0]) / np.maximum(snapshot[1], 1e-9)
        surprise = dict(zip(SumsLayout(bundle).columns, map(float, moved), strict=True))
    return Drift(
        rows=len(rows),
        embedding_shift=float(np.sqrt(np.mean(shift**2))),
        embedding_spread=float(np.median(vectors.std(axis=0) / std)),
        surprise_shift=surprise,
    )

"""What a bundle serves of held-out entities, kept in it: what later audits measure drift against.

Held-out ones, because the model is less surprised by what it was trained on: against that, the
first day of service would look like drift.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from export.embed import AsOf, embed_as_of
from llm4es.bundle import Bundle
from llm4es.events import Event
from llm4es.features import SNAPSHOT_EMBEDDING, SNAPSHOT_SURPRISE

__all__ = ["take_snapshot"]

_EVER = datetime.max.replace(tzinfo=UTC)
_LEAST = 2  # entities: fewer have no spread
_MOST = 1_000  # more make it no better, and each costs a pass over its history


def take_snapshot(
    bundle: Bundle, histories: Mapping[str, Sequence[Event]], *, seed: int
) -> dict[str, NDArray[np.float64]]:
    """Mean and standard deviation of embedding (2, dim) and surprise (2, columns) at the end.

    Of a thousand entities at most. Empty where there are too few with events; without surprise
    where the bundle gives none.
    """
    known = sorted(entity_id for entity_id, history in histories.items() if history)
    if len(known) > _MOST:
        known = sorted(np.random.default_rng(seed).choice(known, _MOST, replace=False).tolist())
    found = embed_as_of(bundle, histories, [AsOf(entity_id, _EVER) for entity_id in known])
    seen = found.events > 0
    if seen.sum() < _LEAST:
        return {}
    snapshot = {SNAPSHOT_EMBEDDING: _moments(found.vectors[seen])}
    if found.surprise.shape[1]:
        snapshot[SNAPSHOT_SURPRISE] = _moments(found.surprise[seen])
    return snapshot


def _moments(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean and standard deviation (2, n) of rows (N, n)."""
    exact = rows.astype(np.float64)
    return np.stack([exact.mean(axis=0), exact.std(axis=0)])

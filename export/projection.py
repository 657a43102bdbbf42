"""Projection: a linear map of the pooled vector, learnt on training entities."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from export.embed import AsOf, embed_as_of
from export.recipe import Projection
from llm4es.bundle import Bundle
from llm4es.errors import ConfigError
from llm4es.events import Event
from llm4es.features import PROJECTION_MATRIX, PROJECTION_MEAN

__all__ = ["learn_projection"]

_EVER = datetime.max.replace(tzinfo=UTC)


def learn_projection(
    bundle: Bundle, histories: Mapping[str, Sequence[Event]], spec: Projection, *, seed: int
) -> dict[str, NDArray[np.float64]]:
    """Learn mean (n,) and matrix (n, dim) from the newest vectors of the entities given.

    `bundle` is not projected yet. Raises ConfigError where there are fewer entities, or numbers
    in a vector, than dimensions wanted.
    """
    asked = [AsOf(entity_id, _EVER) for entity_id in histories]
    vectors = embed_as_of(bundle, histories, asked).vectors.astype(np.float64)
    if spec.dim > min(vectors.shape):
        raise ConfigError(
            "projection.dim",
            f"{spec.dim} of {vectors.shape[1]} numbers, learnt on {len(asked)} entities",
            f"take {min(vectors.shape)} at most",
        )
    pca = PCA(spec.dim, svd_solver="randomized", random_state=seed).fit(vectors)
    matrix = pca.components_.T
    if spec.whiten:
        matrix = matrix / np.sqrt(np.maximum(pca.explained_variance_, np.finfo(np.float64).eps))
    return {PROJECTION_MEAN: pca.mean_, PROJECTION_MATRIX: np.ascontiguousarray(matrix)}

"""Calibration: what surprise is usual, by event type, field and depth, on held-out entities."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from export.corpus import TrainingChapter
from llm4es.bundle import SurpriseSpec
from llm4es.surprise import MEANS, PERCENTILES, SurpriseTracks

__all__ = ["ReadNats", "calibrate"]

ReadNats = Callable[[TrainingChapter], NDArray[np.float32]]

_PERCENTILE = 95.0
_PRIOR_EVENTS = 16.0  # a depth seen this often is worth as much as the mean over all depths


def calibrate(
    chapters: Iterable[TrainingChapter],
    tracks: SurpriseTracks,
    spec: SurpriseSpec,
    read_nats: ReadNats,
) -> dict[str, NDArray[np.float64]]:
    """Learn means (cells, depth_cap + 1) and 95th percentiles (cells,) of the deviation.

    `read_nats` gives the nats (T,) of a chapter's tokens. A depth that was seldom seen is drawn
    towards its cell's mean over all depths; a cell that was never seen gets zeros.
    """
    depths: list[list[int]] = [[] for _ in tracks.cells]
    nats: list[list[float]] = [[] for _ in tracks.cells]
    for chapter in chapters:
        found = tracks.cell_nats(chapter.types, chapter.tokens, read_nats(chapter))
        for depth, (cells, judged) in enumerate(found):
            for cell, value in zip(cells.tolist(), judged.tolist(), strict=True):
                depths[cell].append(min(depth, spec.depth_cap))
                nats[cell].append(value)
    means = np.zeros((len(tracks.cells), spec.depth_cap + 1))
    percentiles = np.zeros(len(tracks.cells))
    for cell, values in enumerate(nats):
        if values:
            means[cell], percentiles[cell] = _learn(depths[cell], values, spec.depth_cap + 1)
    return {MEANS: means, PERCENTILES: percentiles}


def _learn(
    depths: Sequence[int], nats: Sequence[float], buckets: int
) -> tuple[NDArray[np.float64], float]:
    """Mean by depth (buckets,), and the percentile of what is left once it is taken off."""
    at, values = np.array(depths), np.array(nats)
    counts = np.bincount(at, minlength=buckets)
    sums = np.bincount(at, weights=values, minlength=buckets)
    means: NDArray[np.float64] = (sums + _PRIOR_EVENTS * values.mean()) / (counts + _PRIOR_EVENTS)
    return means, float(np.percentile(values - means[at], _PERCENTILE))

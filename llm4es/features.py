"""Features: from the sums of chapters to the row that Feast serves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from llm4es.bundle import Bundle
from llm4es.surprise import EventSurprise, SurpriseTracks
from llm4es.windows import FinishedChapter, Window, add_sums, visible_chapters

__all__ = [
    "Embedded",
    "FeatureRow",
    "SumsLayout",
    "feature_row",
    "service_name",
    "token_weights",
    "view_name",
]

HEADER_STATES = "header.states"  # (state_dim,) summed over the header's tokens
HEADER_TOKENS = "header.tokens"  # (1,) how many they are
PROJECTION_MEAN = "projection.mean"
PROJECTION_MATRIX = "projection.matrix"
# Mean and standard deviation over held-out entities, for drift: (2, dim) and (2, columns).
SNAPSHOT_EMBEDDING = "snapshot.embedding"
SNAPSHOT_SURPRISE = "snapshot.surprise"


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureRow:
    """What is known of an entity at `as_of`: one row of its feature view."""

    entity_id: str
    as_of: datetime  # Feast's event_timestamp, UTC, strictly rising per entity
    embedding: NDArray[np.float32]  # (dim,)
    surprise: NDArray[np.float32]  # (columns,), empty where the bundle gives none
    surprise_last: float  # deviation of the newest event, in all, in nats
    event_count: int  # events that the embedding sees
    last_event_id: str
    last_event_time: datetime
    bundle_id: str


@dataclass(frozen=True, slots=True)
class Embedded:
    """What the engine gives for B windows: row i belongs to window i."""

    vectors: NDArray[np.float32]  # (B, dim)
    surprise: NDArray[np.float32]  # (B, columns)
    surprise_last: NDArray[np.float32]  # (B,)
    finished: tuple[Mapping[int, FinishedChapter], ...]  # by index of the window's chapter


class SumsLayout:
    """Where things stand in a chapter's sums, one flat float64 vector (size,).

        S x state_dim   sums of token states, per scale
        S               their weights
        T x 2 x S       sums of deviation and excess, per track and scale
        T x S           their weights

    Everything is relative to the chapter's own last event; each entry decays by its own scale's
    half-life with the events that come after it, so that sums of chapters can be added.
    """

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self._bundle = bundle
        self.scales = np.array(manifest.pooling.scales)
        self.ends_only = manifest.pooling.tokens == "ends"
        self.state_dim = manifest.pooling.state_dim(manifest.hidden_size)
        self.tracks = SurpriseTracks(bundle.schema, bundle.renderer)
        count = len(self.scales)
        tracks = len(self.tracks.names) if manifest.surprise is not None else 0
        self.columns = self.tracks.columns(manifest.pooling.scales) if tracks else ()
        self._states = (count, self.state_dim)
        self._surprises = (tracks, 2, count)
        sizes = (count * self.state_dim, count, tracks * 2 * count, tracks * count)
        self._ends = tuple(int(end) for end in np.cumsum(sizes))
        self.size = self._ends[-1]
        self.half_lives: NDArray[np.float64] = np.concatenate(
            [
                np.repeat(self.scales, self.state_dim),
                self.scales,
                np.tile(self.scales, tracks * 2),
                np.tile(self.scales, tracks),
            ]
        )

        self._decay = np.exp2(-1 / self.half_lives)

    def pack(
        self, states: NDArray[np.float64], weights: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Build sums without surprise from pooled states (S, state_dim) and weights (S,)."""
        return np.concatenate([states.ravel(), weights])

    def add_event(
        self,
        sums: NDArray[np.float64],
        pooled: NDArray[np.float32],
        weight: float,
        surprise: EventSurprise | None,
    ) -> NDArray[np.float64]:
        """Go on from sums (size,) by one event.

        `pooled` (state_dim,) is the sum of its tokens' states, `weight` how many they are, and
        `surprise` its own (E = 1).
        """
        added: NDArray[np.float64] = sums * self._decay
        states, weights, surprises = self._ends[:3]
        added[:states].reshape(self._states)[...] += pooled
        added[states:weights] += weight
        if surprise is not None:
            judged = added[weights:surprises].reshape(self._surprises)
            judged[:, 0] += surprise.deviation[0][:, None]
            judged[:, 1] += surprise.excess[0][:, None]
            tracks, _, count = self._surprises
            added[surprises:].reshape(tracks, count)[...] += surprise.present[0][:, None]
        return added

    def total(
        self, window: Window, sums: Sequence[NDArray[np.float64]], visible: range
    ) -> NDArray[np.float64]:
        """Add the sums of what a window shows, oldest first, in float64."""
        total = np.zeros(self.size)
        if window.sealed is not None:
            total += window.sealed.sums
        for index, chapter_sums in zip(visible, sums, strict=True):
            total = add_sums(
                total,
                chapter_sums,
                newer_events=window.chapters[index].count,
                half_lives=self.half_lives,
            )
        return total

    def finish(self, sums: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Sums over weights, scale by scale: the vector (dim,) and the surprise (columns,)."""
        states, weights, surprise, presence = np.split(sums, self._ends[:-1])
        if self._bundle.manifest.pooling.pool_header:
            states, weights = self._with_header(states, weights)
        vector = (states.reshape(self._states) / weights[:, None]).ravel()
        if self._bundle.manifest.projected:
            arrays = self._bundle.arrays
            vector = (vector - arrays[PROJECTION_MEAN]) @ arrays[PROJECTION_MATRIX]
        tracks, _, scales = self._surprises
        by_track = presence.reshape(tracks, 1, scales)
        means = np.divide(
            surprise.reshape(self._surprises),
            by_track,
            out=np.zeros(self._surprises),
            where=by_track > 0,
        )
        return vector.astype(np.float32), means.ravel().astype(np.float32)

    def _with_header(
        self, states: NDArray[np.float64], weights: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        plain = np.isinf(self.scales)
        arrays = self._bundle.arrays
        return (
            states.reshape(self._states) + plain[:, None] * arrays[HEADER_STATES],
            weights + plain * arrays[HEADER_TOKENS],
        )


def token_weights(
    layout: SumsLayout, token_events: NDArray[np.int64], prefix_events: Sequence[int]
) -> NDArray[np.float64]:
    """Weights (prefixes, S, T) of a chapter's tokens as its first n events see them.

    Where the bundle pools the ends of events, all other tokens weigh nothing. A token that comes
    after the prefix weighs nothing: with a causal model the states before it
    are what they would be without it, so one pass gives the sums after each of its events.
    """
    after = np.asarray(prefix_events)[:, None, None] - 1 - token_events[None, None, :]
    pooled = after >= 0
    if layout.ends_only:
        pooled &= np.append(token_events[1:] != token_events[:-1], True)
    weights: NDArray[np.float64] = np.where(
        pooled, np.exp2(-np.maximum(after, 0) / layout.scales[None, :, None]), 0.0
    )
    return weights


def feature_row(
    bundle: Bundle,
    window: Window,
    vector: NDArray[np.float32],
    surprise: NDArray[np.float32],
    surprise_last: float,
) -> FeatureRow:
    """Put a window and what the engine gave for it into a row."""
    last = window.last_event
    if last is None or window.as_of is None:
        msg = "a window without events has no row"
        raise ValueError(msg)
    seen = sum(
        window.chapters[index].count for index in visible_chapters(window, bundle.manifest.window)
    )
    return FeatureRow(
        entity_id=window.entity_id,
        as_of=window.as_of,
        embedding=vector,
        surprise=surprise,
        surprise_last=surprise_last,
        event_count=seen + (window.sealed.count if window.sealed is not None else 0),
        last_event_id=last.event_id,
        last_event_time=last.occurred_at,
        bundle_id=bundle.id,
    )


def view_name(entity: str, bundle_id: str) -> str:
    """Name of a bundle's feature view; new weights are a new view, for Feast sees no change."""
    return f"{entity}_llm4es_{bundle_id}"


def service_name(entity: str) -> str:
    """Stable name that readers use; ops move it from one bundle's view to the next."""
    return f"{entity}_llm4es"

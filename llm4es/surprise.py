"""Surprise: how unexpected an event was to the model that was trained to predict it.

Minus the log-probability of an event's tokens, given its chapter so far, in nats: summed over
all its tokens, and over those of each field. Depth is the number of earlier events in the
chapter; the mean by depth, learnt on held-out entities, is taken off (the *deviation*), and
what is above the 95th percentile of that is the *excess*.

A *cell* is (event type, "all" or a field): what means and percentiles are learnt for. A *track*
is what is served: "all" over the events of every type, and each field.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm4es.bundle import SurpriseSpec, scale_name
from llm4es.rendering import Renderer
from llm4es.schema import EventSchema
from llm4es.tokens import ALL_FIELDS, TokenizedChapter

__all__ = ["ALL", "MEANS", "PERCENTILES", "EventSurprise", "SurpriseTracks"]

ALL = "all"
MEANS = "surprise.means"  # (cells, depth_cap + 1)
PERCENTILES = "surprise.p95"  # (cells,)


@dataclass(frozen=True, slots=True)
class EventSurprise:
    """Surprise of a chapter's E events on T tracks, all (E, T) float64.

    Where an event has no such field, `present` is False and the rest is 0.
    """

    nats: NDArray[np.float64]
    deviation: NDArray[np.float64]
    excess: NDArray[np.float64]
    present: NDArray[np.bool_]

    @staticmethod
    def joined(parts: Sequence["EventSurprise"]) -> "EventSurprise":
        """Surprise of events that follow one another."""
        return EventSurprise(
            np.concatenate([part.nats for part in parts]),
            np.concatenate([part.deviation for part in parts]),
            np.concatenate([part.excess for part in parts]),
            np.concatenate([part.present for part in parts]),
        )

    def of_event(self, index: int) -> "EventSurprise":
        """Give the same for one event alone."""
        own = slice(index, index + 1)
        return EventSurprise(
            self.nats[own], self.deviation[own], self.excess[own], self.present[own]
        )


class SurpriseTracks:
    """Names the cells and tracks of a schema and rendering, and sorts nats into them."""

    def __init__(self, schema: EventSchema, renderer: Renderer) -> None:
        several = len(schema.types) > 1
        self.cells: list[tuple[str, str]] = []
        self.names: list[str] = [ALL]
        self._cells_of: dict[str, NDArray[np.int64]] = {}  # type -> cells of all and its fields
        self._tracks_of: dict[str, NDArray[np.int64]] = {}  # type -> tracks of the same
        for kind in schema.types:
            fields = renderer.fields(kind)
            self._cells_of[kind] = len(self.cells) + np.arange(len(fields) + 1)
            self._tracks_of[kind] = np.array(
                [0, *(len(self.names) + index for index in range(len(fields)))]
            )
            self.cells += [(kind, ALL), *((kind, field) for field in fields)]
            self.names += [f"{kind}_{field}" if several else field for field in fields]

    def columns(self, scales: Sequence[float]) -> tuple[str, ...]:
        """Names of the served array: tracks, then deviation and excess, then scales."""
        return tuple(
            f"{name}{statistic}_{scale_name(scale)}"
            for name in self.names
            for statistic in ("", "_excess")
            for scale in scales
        )

    def cell_nats(
        self, types: Sequence[str], chapter: TokenizedChapter, token_nats: NDArray[np.float32]
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """For each event its cells (f + 1,) and their nats (f + 1,): in all, then by field."""
        nats = token_nats.astype(np.float64)
        totals = np.bincount(chapter.events, weights=nats, minlength=len(types))
        widest = max(len(cells) for cells in self._cells_of.values())
        table = np.zeros((len(types), widest))
        owned = chapter.owners != ALL_FIELDS
        np.add.at(table, (chapter.events[owned], chapter.owners[owned] + 1), nats[owned])
        table[:, 0] = totals
        return [
            (cells := self._cells_of[kind], table[index, : len(cells)])
            for index, kind in enumerate(types)
        ]

    def judge(
        self,
        types: Sequence[str],
        chapter: TokenizedChapter,
        token_nats: NDArray[np.float32],
        spec: SurpriseSpec,
        arrays: Mapping[str, NDArray[np.float64]],
        *,
        earlier: int = 0,
    ) -> EventSurprise:
        """Surprise of each event of a chapter, from the nats (T,) of its tokens.

        `earlier` events of the chapter stand before those given.
        """
        shape = (len(types), len(self.names))
        nats, deviation, excess = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        present = np.zeros(shape, dtype=np.bool_)
        means, percentiles = arrays[MEANS], arrays[PERCENTILES]
        for depth, (kind, (cells, found)) in enumerate(
            zip(types, self.cell_nats(types, chapter, token_nats), strict=True)
        ):
            tracks = self._tracks_of[kind]
            nats[depth, tracks] = found
            usual = means[cells, min(earlier + depth, spec.depth_cap)]
            deviation[depth, tracks] = found - usual
            excess[depth, tracks] = np.maximum(deviation[depth, tracks] - percentiles[cells], 0.0)
            present[depth, tracks] = True
        return EventSurprise(nats, deviation, excess, present)

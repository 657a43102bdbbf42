"""What a graph reads and gives, whoever runs it: shapes, and the contract of `ChapterGraph`."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["ChapterGraph", "Found", "KvShape", "Reading", "read_whole"]


@dataclass(frozen=True, slots=True)
class KvShape:
    """Keys and values of one token: `parts` (keys and values of each layer) x heads x width."""

    parts: int
    heads: int
    width: int

    @property
    def values(self) -> int:
        """Numbers that one token leaves behind."""
        return self.parts * self.heads * self.width

    def empty(self, batch: int, capacity: int) -> NDArray[np.float32]:
        """Room for the keys and values of some chapters: (parts, batch, heads, capacity, width)."""
        return np.zeros((self.parts, batch, self.heads, capacity, self.width), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Reading:
    """B chapters to read on, L new tokens at most, padded on the right.

    `kv` holds the `past` tokens' keys and values, and has room for L more behind the longest past:
    padding wants its place too. Graphs with
    surprise need `opening`, the last state before the new tokens (zeros where there is none), and
    `ends`, the places among them whose states are wanted.
    """

    ids: NDArray[np.int64]  # (B, L)
    weights: NDArray[np.float32]  # (B, R, L)
    past: NDArray[np.int64]  # (B,)
    new: NDArray[np.int64]  # (B,) from 1 to L
    kv: NDArray[np.float32]  # (parts, B, heads, capacity, width)
    opening: NDArray[np.float32]  # (B, hidden)
    ends: NDArray[np.int64]  # (B, E)


@dataclass(frozen=True, slots=True)
class Found:
    """What came out; `nats` is 0-based on the new tokens, and None without surprise."""

    pooled: NDArray[np.float32]  # (B, R, state_dim)
    nats: NDArray[np.float32] | None  # (B, L)
    end_states: NDArray[np.float32] | None  # (B, E, hidden)


class ChapterGraph(Protocol):
    """A graph that goes on where keys and values end."""

    kv_shape: KvShape
    hidden: int
    surprise: bool
    providers: tuple[str, ...]  # most wanted first
    weight_bytes: int
    on_cpu: bool

    def read(self, reading: Reading) -> Found:
        """Read B chapters on; their new keys and values stand in `reading.kv` afterwards.

        A row depends on its own chapter alone. Raises BundleMismatch where the graph cannot run
        on this machine.
        """
        ...


def read_whole(
    graph: ChapterGraph, ids: NDArray[np.int64], weights: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Read one context from its first token: ids (L,), weights (R, L).

    Gives pooled (R, state_dim) and, with surprise, nats (L,), 0 for the first token.
    """
    found = graph.read(
        Reading(
            ids=ids[None],
            weights=weights[None],
            past=np.zeros(1, dtype=np.int64),
            new=np.array([len(ids)]),
            kv=graph.kv_shape.empty(1, len(ids)),
            opening=np.zeros((1, graph.hidden), dtype=np.float32),
            ends=np.array([[len(ids) - 1]]),
        )
    )
    if found.nats is None:
        return found.pooled[0], None
    nats = found.nats[0].copy()
    nats[0] = 0.0  # nothing stood before it
    return found.pooled[0], nats

"""What a graph reads and gives, whoever runs it: shapes, and the contract of `ChapterGraph`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from llm4es.errors import BundleMismatch

__all__ = ["ChapterGraph", "Found", "GraphShape", "KvShape", "Reading", "put_new", "read_whole"]

_INPUTS = {"input_ids", "token_weights", "past_lengths", "new_lengths"}
_WITH_SURPRISE = {"opening", "ends"}


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

    def small(self, *, surprise: bool) -> dict[str, NDArray[Any]]:
        """Every input of a graph but keys and values, by its name."""
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": self.ids,
            "token_weights": self.weights,
            "past_lengths": self.past,
            "new_lengths": self.new,
        }
        return inputs | ({"opening": self.opening, "ends": self.ends} if surprise else {})

    def pasts(self) -> Iterator[NDArray[np.float32]]:
        """Copies of old keys and values, part by part, no longer than the longest past."""
        longest = int(self.past.max())
        return (np.ascontiguousarray(part[:, :, :longest]) for part in self.kv)


@dataclass(frozen=True, slots=True)
class GraphShape:
    """What a graph's inputs and its file of weights say of it."""

    kv: KvShape
    hidden: int  # 0 without surprise
    surprise: bool
    weight_bytes: int

    @classmethod
    def of(cls, path: Path, inputs: Mapping[str, Sequence[Any]]) -> Self:
        """Of a graph's file and the shapes of its inputs. Raises BundleMismatch for others."""
        parts = [f"past.{number}" for number in range(sum("past." in name for name in inputs))]
        surprise = set(inputs) >= _WITH_SURPRISE
        if not parts or set(inputs) != _INPUTS | set(parts) | (
            _WITH_SURPRISE if surprise else set()
        ):
            raise BundleMismatch(
                str(path), "its inputs are not those of this code", "export the bundle again"
            )
        _, heads, _, width = inputs[parts[0]]
        return cls(
            kv=KvShape(len(parts), heads, width),
            hidden=inputs["opening"][1] if surprise else 0,
            surprise=surprise,
            weight_bytes=sum(file.stat().st_size for file in path.parent.glob("*.bin")),
        )


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


def put_new(reading: Reading, part: int, new: NDArray[np.float32]) -> None:
    """Put new keys or values (B, heads, L, width) behind the old ones."""
    for row, (past, count) in enumerate(zip(reading.past, reading.new, strict=True)):
        reading.kv[part, row, :, past : past + count] = new[row, :, :count]


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

"""Parity: the exported graph against transformers' own model, through the numpy reference."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from llm4es.bundle import Pooling
from llm4es.engine.reading import ChapterGraph, Reading, read_whole
from llm4es.engine.reference import token_nats, token_states
from llm4es.errors import LLM4ESError

__all__ = ["LIMIT", "measure_parity", "random_chapters", "refuse_disparity"]

LIMIT = 1e-4
_ROWS = 3  # of token weights
_BATCH = 3  # chapters read together: logits of many long ones would not fit


def measure_parity(
    graphs: Mapping[str, ChapterGraph],
    model: PreTrainedModel,
    pooling: Pooling,
    chapters: Sequence[NDArray[np.int64]],
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Largest relative difference over chapters of ids (L,), header included, of any lengths.

    Each is read at once, and in two steps, its keys and values kept between them; the first few
    also in one batch, with pasts of many lengths. Relative to the largest value of the chapter;
    by the name of the graph's output, the worst of all graphs.
    """
    rng = np.random.default_rng(seed)
    weights = [rng.random((_ROWS, len(ids)), dtype=np.float32) for ids in chapters]
    expected = [_expect(model, pooling, *each) for each in zip(chapters, weights, strict=True)]
    worst: dict[str, float] = {}
    for graph in graphs.values():
        for ids, rows, wanted in zip(chapters, weights, expected, strict=True):
            _note(worst, read_whole(graph, ids, rows), wanted)
        for batch in _batches(chapters):
            ids_, rows_ = [chapters[i] for i in batch], [weights[i] for i in batch]
            splits = [int(rng.integers(1, len(ids))) for ids in ids_]
            for index, one in zip(batch, _in_steps(graph, ids_, rows_, splits), strict=True):
                _note(worst, one, expected[index])
    # Two digits say what there is to say, and keep noise out of the bundle's id.
    return {name: float(f"{value:.1e}") for name, value in worst.items()}


def refuse_disparity(parity: dict[str, float]) -> None:
    """Raise LLM4ESError where the graph does not compute what the model does."""
    for name, value in parity.items():
        if not value <= LIMIT:
            msg = f"the graph's {name} differ from the model's by {value:.1e} of their size"
            msg += f" (at most {LIMIT:.0e}): this architecture does not survive the export"
            raise LLM4ESError(msg)


def random_chapters(
    header: NDArray[np.int64], *, vocabulary: int, max_tokens: int, seed: int = 0
) -> list[NDArray[np.int64]]:
    """Chapters of random ids behind the header, from one token to as many as are allowed."""
    rng = np.random.default_rng(seed)
    lengths = sorted({1, 2, 17, max_tokens // 2, max_tokens})
    return [np.concatenate([header, rng.integers(0, vocabulary, length)]) for length in lengths]


def _expect(
    model: PreTrainedModel, pooling: Pooling, ids: NDArray[np.int64], rows: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    with torch.no_grad():
        found = model(torch.from_numpy(ids)[None], output_hidden_states=True, use_cache=False)
    states = token_states([state[0].numpy() for state in found.hidden_states], pooling)
    return rows @ states, token_nats(found.logits[0].numpy(), ids)


def _batches(chapters: Sequence[NDArray[np.int64]]) -> Iterator[list[int]]:
    """Indices of the chapters that can be read in two steps, some at a time."""
    long = [index for index, ids in enumerate(chapters) if len(ids) > 1]
    for start in range(0, len(long), _BATCH):
        yield long[start : start + _BATCH]


def _in_steps(
    graph: ChapterGraph,
    chapters: Sequence[NDArray[np.int64]],
    weights: Sequence[NDArray[np.float32]],
    splits: Sequence[int],
) -> list[tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
    """Read B chapters up to their splits, and then what is left, each time in one batch."""
    lengths = [len(ids) for ids in chapters]
    kv = graph.kv_shape.empty(len(chapters), 2 * max(lengths))
    opening = np.zeros((len(chapters), graph.hidden), dtype=np.float32)
    pooled: list[NDArray[np.float32]] = []
    nats: list[list[NDArray[np.float32]]] = [[] for _ in chapters]
    for starts, ends in ((np.zeros_like(splits), np.array(splits)), (np.array(splits), lengths)):
        ids, rows = _pad(
            [ids[a:b] for ids, a, b in zip(chapters, starts, ends, strict=True)],
            [rows[:, a:b] for rows, a, b in zip(weights, starts, ends, strict=True)],
        )
        new = np.array(ends) - starts
        found = graph.read(Reading(ids, rows, starts, new, kv, opening, new[:, None] - 1))
        pooled.append(found.pooled)
        if found.nats is not None and found.end_states is not None:
            opening = found.end_states[:, 0]
            for row, count in enumerate(new):
                nats[row].append(found.nats[row, :count])
    return [(sums, _opened(parts)) for sums, parts in zip(pooled[0] + pooled[1], nats, strict=True)]


def _opened(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32] | None:
    """Nats of a whole chapter; nothing stood before its first token."""
    if not parts:
        return None
    nats = np.concatenate(parts)
    nats[0] = 0.0
    return nats


def _pad(
    chapters: Sequence[NDArray[np.int64]], weights: Sequence[NDArray[np.float32]]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ragged ids (L,) and weights (R, L) to (B, longest) and (B, R, longest)."""
    longest = max(len(ids) for ids in chapters)
    ids_ = [np.pad(ids, (0, longest - len(ids))) for ids in chapters]
    rows_ = [np.pad(rows, ((0, 0), (0, longest - rows.shape[1]))) for rows in weights]
    return np.stack(ids_), np.stack(rows_)


def _note(
    worst: dict[str, float],
    found: tuple[NDArray[np.float32], NDArray[np.float32] | None],
    expected: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> None:
    for name, one, wanted in zip(("pooled", "token_nats"), found, expected, strict=True):
        if one is not None:
            worst[name] = max(worst.get(name, 0.0), _relative(one, wanted))


def _relative(found: NDArray[np.float32], expected: NDArray[np.float64]) -> float:
    """Largest difference over the largest value; NaN counts as infinitely wrong."""
    difference = float(np.abs(found - expected).max())
    size = float(np.abs(expected).max()) or 1.0
    return difference / size if np.isfinite(difference) else float("inf")

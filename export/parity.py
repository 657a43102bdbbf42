"""Parity: the exported graph against transformers' own model, through the numpy reference."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from llm4es.bundle import Pooling
from llm4es.engine.reference import token_nats, token_states
from llm4es.engine.session import FullGraph
from llm4es.errors import LLM4ESError

__all__ = ["LIMIT", "measure_parity", "random_chapters", "refuse_disparity"]

LIMIT = 1e-4
_ROWS = 3  # of token weights
_BATCH = 3  # chapters read together: logits of many long ones would not fit


def measure_parity(
    graph: FullGraph,
    model: PreTrainedModel,
    pooling: Pooling,
    chapters: Sequence[NDArray[np.int64]],
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Largest relative difference over chapters of ids (L,), header included, of any lengths.

    Each is read alone, and the first few in one batch padded on the right. Relative to the
    largest value of the chapter; by the name of the graph's output.
    """
    rng = np.random.default_rng(seed)
    weights = [rng.random((_ROWS, len(ids)), dtype=np.float32) for ids in chapters]
    worst: dict[str, float] = {}
    batch = _pad(chapters[:_BATCH], weights[:_BATCH])
    together = graph.run(*batch)
    for index, (ids, rows) in enumerate(zip(chapters, weights, strict=True)):
        expected = _expect(model, pooling, ids, rows)
        found = [_row(graph.run(ids[None], rows[None]), 0)]
        if index < _BATCH:
            found.append(_row(together, index))
        for pooled, nats in found:
            _note(worst, "pooled", pooled, expected[0])
            if nats is not None:
                _note(worst, "token_nats", nats[: len(ids)], expected[1])
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


def _row(
    outputs: tuple[NDArray[np.float32], NDArray[np.float32] | None], index: int
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    pooled, nats = outputs
    return pooled[index], None if nats is None else nats[index]


def _pad(
    chapters: Sequence[NDArray[np.int64]], weights: Sequence[NDArray[np.float32]]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ragged ids (L,) and weights (R, L) to (B, longest) and (B, R, longest)."""
    longest = max(len(ids) for ids in chapters)
    ids_ = [np.pad(ids, (0, longest - len(ids))) for ids in chapters]
    rows_ = [np.pad(rows, ((0, 0), (0, longest - rows.shape[1]))) for rows in weights]
    return np.stack(ids_), np.stack(rows_)


def _note(
    worst: dict[str, float], name: str, found: NDArray[np.float32], expected: NDArray[np.float64]
) -> None:
    worst[name] = max(worst.get(name, 0.0), _relative(found, expected))


def _relative(found: NDArray[np.float32], expected: NDArray[np.float64]) -> float:
    """Largest difference over the largest value; NaN counts as infinitely wrong."""
    difference = float(np.abs(found - expected).max())
    size = float(np.abs(expected).max()) or 1.0
    return difference / size if np.isfinite(difference) else float("inf")

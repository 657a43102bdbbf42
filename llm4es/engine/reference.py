"""The definition of embedding and surprise, in plain numpy: what the engine is tested against.

No chapters' sums, no decay of sums, no memo: every token of the history is weighed by its own
distance in events from the newest one.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llm4es.bundle import Pooling

__all__ = ["embedding", "token_nats", "token_states"]

_RMS_EPSILON = 1e-6


def token_states(
    hidden_states: Sequence[NDArray[np.float32]], pooling: Pooling
) -> NDArray[np.float64]:
    """Layers' states, each (T, hidden), to what is pooled: (T, state_dim)."""
    chosen = [hidden_states[layer].astype(np.float64) for layer in pooling.layers]
    if pooling.normalise == "rms":
        chosen = [
            state / np.sqrt(np.mean(state**2, axis=-1, keepdims=True) + _RMS_EPSILON)
            for state in chosen
        ]
    if pooling.combine == "average":
        average: NDArray[np.float64] = np.mean(chosen, axis=0)
        return average
    return np.concatenate(chosen, axis=-1)


def embedding(
    states: NDArray[np.float64], events_after: NDArray[np.int64], scales: Sequence[float]
) -> NDArray[np.float64]:
    """States (T, d) of a whole history and the events after each token's own (T,): (S * d,)."""
    vectors = []
    for scale in scales:
        weights = 0.5 ** (events_after / scale)
        vectors.append(weights @ states / weights.sum())
    return np.concatenate(vectors)


def token_nats(logits: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Minus the log-probability of each token (T,) given those before it; 0 for the first."""
    scores = logits[:-1].astype(np.float64)
    top = scores.max(axis=-1, keepdims=True)
    norms = top[:, 0] + np.log(np.exp(scores - top).sum(axis=-1))
    return np.concatenate([[0.0], norms - scores[np.arange(len(ids) - 1), ids[1:]]])

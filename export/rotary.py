"""Rotary positions as one operator of onnxruntime, where a model turns its states as Llama does.

Transformers' formula becomes seven operators for the queries and seven for the keys of every
layer; to read one more event, which has few tokens, costs operators as much as it costs numbers.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers import PreTrainedModel

__all__ = ["Angles", "one_operator", "turns_halves"]

_NAME = "apply_rotary_pos_emb"  # in the module of every model that has rotary positions
_Rotation = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Angles(NamedTuple):
    """Cosines and sines of every token, as the operator wants them."""

    ids: torch.Tensor  # (B, L)
    places: torch.Tensor  # (B, L) int64, rows of the two below
    cosines: torch.Tensor  # (B * L, D / 2)
    sines: torch.Tensor

    @classmethod
    def of(cls, cosines: torch.Tensor, sines: torch.Tensor, ids: torch.Tensor) -> "Angles":
        """Take a model's own, (B, L, D) with equal halves, for ids (B, L)."""
        batch, tokens = ids.shape
        half = int(cosines.shape[-1]) // 2
        places = torch.arange(batch * tokens).reshape(batch, tokens)
        return cls(
            ids, places, cosines[..., :half].reshape(-1, half), sines[..., :half].reshape(-1, half)
        )


@contextmanager
def one_operator(
    model: PreTrainedModel, angles: Callable[[torch.Tensor, torch.Tensor], Angles]
) -> Iterator[None]:
    """Have queries and keys turned by the operator while a model is traced.

    `angles` gives what all layers share, from the model's cosines and sines. A model that turns
    in another way, or a part of each head, is left as it is.
    """
    modules = {sys.modules[type(each).__module__] for each in model.modules()}
    with ExitStack() as stack:
        for module in modules:
            original: _Rotation | None = getattr(module, _NAME, None)
            if original is not None and turns_halves(original):
                rotation = _by_operator(original, angles)
                stack.enter_context(mock.patch.object(module, _NAME, rotation))
        yield


def _by_operator(
    original: _Rotation, angles: Callable[[torch.Tensor, torch.Tensor], Angles]
) -> _Rotation:
    def rotation(
        query: torch.Tensor,
        key: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        *others: Any,  # noqa: ANN401 - whatever a model's own takes
        **named: Any,  # noqa: ANN401
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if others or named or int(cosines.shape[-1]) != int(query.shape[-1]):
            return original(query, key, cosines, sines, *others, **named)
        shared = angles(cosines, sines)
        return _turned(query, shared), _turned(key, shared)

    return rotation


def _turned(states: torch.Tensor, angles: Angles) -> torch.Tensor:
    """Turn states (B, H, L, D), which the operator wants as (B, L, H * D)."""
    heads, width = int(states.shape[1]), int(states.shape[3])
    batch, tokens = angles.ids.shape
    rows = states.transpose(1, 2).reshape(batch, tokens, heads * width)
    turned: torch.Tensor = _RotaryEmbedding.apply(rows, angles.places, angles.cosines, angles.sines)
    return turned.reshape(batch, tokens, heads, width).transpose(1, 2)


def turns_halves(rotation: _Rotation) -> bool:
    """Whether a model's own function turns the halves of a head against each other."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    query, key = some(2, 3, 5, 8), some(2, 1, 5, 8)
    cosines, sines = (some(2, 5, 4).repeat(1, 1, 2) for _ in range(2))
    try:
        found = rotation(query, key, cosines, sines)
    except Exception:  # noqa: BLE001 - a function of that name may take anything
        return False
    expected = (_halves_turned(each, cosines, sines) for each in (query, key))
    return all(torch.allclose(one, other) for one, other in zip(found, expected, strict=True))


def _halves_turned(
    states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cosines[:, None] + torch.cat([-second, first], dim=-1) * sines[:, None]


class _RotaryEmbedding(torch.autograd.Function):
    """com.microsoft.RotaryEmbedding, as the tracer sees it: its shapes and its name."""

    @staticmethod
    def forward(_context: Any, rows: Any, *_angles: Any) -> Any:  # noqa: ANN401 - torch's signature
        return torch.zeros_like(rows)

    @staticmethod
    def symbolic(g: Any, *inputs: Any) -> Any:  # noqa: ANN401 - torch's signature
        found = g.op("com.microsoft::RotaryEmbedding", *inputs)
        found.setType(inputs[0].type())
        return found

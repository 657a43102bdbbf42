"""Recipes: every choice that makes a bundle, in one frozen object."""

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

from llm4es.bundle import SurpriseSpec
from llm4es.rendering import RenderingSpec
from llm4es.windows import WindowPolicy

__all__ = ["FINETUNE", "QUICKSTART", "Recipe", "Shape", "Training"]


_RENDERING = RenderingSpec(time=("gap", "hour"))
_SURPRISE = SurpriseSpec(depth_cap=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama from scratch: small, for lines made of a few thousand words."""

    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    intermediate_size: int = 352
    vocabulary: int = 2048

    def __str__(self) -> str:
        return f"llama {self.layers}x{self.hidden_size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Next-token prediction with AdamW: cosine schedule, warm-up, batches grouped by length."""

    epochs: float
    learning_rate: float
    batch_chapters: int
    steps: int | None = None  # instead of epochs
    warmup_share: float = 0.05
    weight_decay: float = 0.01
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    held_out_share: float = 0.15  # of the entities
    seed: int = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a window is cut, worded, learnt, pooled and judged."""

    window: WindowPolicy
    training: Training
    rendering: RenderingSpec = _RENDERING
    scales: tuple[float, ...] = (math.inf, 16.0, 4.0)
    layers: tuple[int, ...] = (0, -1)  # of the hidden states: the token's own, and the last
    combine: Literal["average", "side_by_side"] = "side_by_side"
    surprise: SurpriseSpec | None = _SURPRISE
    shape: Shape = Shape()  # of a model from scratch; an existing one has its own

    def with_training(
        self, *, epochs: float | None = None, steps: int | None = None, seed: int | None = None
    ) -> Self:
        """The same, but for what is given."""
        own = self.training
        changed = replace(
            own,
            epochs=own.epochs if epochs is None else epochs,
            steps=own.steps if steps is None else steps,
            seed=own.seed if seed is None else seed,
        )
        return replace(self, training=changed)


# From scratch, in a minute on two cores.
QUICKSTART = Recipe(
    window=WindowPolicy(chapter_events=32, max_chapter_tokens=384),
    training=Training(epochs=6, learning_rate=3e-3, batch_chapters=8),
)

# An existing model: a general tokenizer needs some 30 tokens an event.
FINETUNE = Recipe(
    window=WindowPolicy(chapter_events=16, max_chapter_tokens=1024),
    training=Training(epochs=1, learning_rate=2e-5, batch_chapters=4),
)

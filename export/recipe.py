"""Recipes: every choice that makes a bundle, in one frozen object, read from YAML.

Those shipped are `export/recipes/*.yaml`, each with the reason of its choices beside them;
docs/method.md has the numbers.
"""

import math
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from llm4es.bundle import SurpriseSpec
from llm4es.errors import ConfigError
from llm4es.rendering import RenderingSpec
from llm4es.schema import FrozenModel, first_problem
from llm4es.windows import WindowPolicy

__all__ = [
    "PRESETS",
    "Lora",
    "Pooled",
    "Projection",
    "Recipe",
    "Shape",
    "Training",
    "load_recipe",
    "recipe_text",
    "shipped_recipes",
]

_FOLDER = files("export").joinpath("recipes")


class Shape(FrozenModel):
    """A Llama from scratch: small, for lines made of a few thousand words."""

    hidden_size: int = Field(ge=8)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=8)
    vocabulary: int = Field(ge=257)  # every byte, and the begin

    def __str__(self) -> str:
        return f"llama {self.layers}x{self.hidden_size}"


PRESETS = {
    "micro": Shape(hidden_size=128, layers=3, heads=4, intermediate_size=352, vocabulary=2048),
    "tiny": Shape(hidden_size=256, layers=4, heads=4, intermediate_size=704, vocabulary=4096),
    "small": Shape(hidden_size=384, layers=6, heads=6, intermediate_size=1024, vocabulary=4096),
    "base": Shape(hidden_size=512, layers=8, heads=8, intermediate_size=1408, vocabulary=8192),
}


class Lora(FrozenModel):
    """Low-rank adapters (peft) in place of all weights; merged before the export."""

    rank: int = Field(default=8, ge=1)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class Training(FrozenModel):
    """Next-token prediction with AdamW: cosine schedule, warm-up, batches grouped by length."""

    epochs: float = Field(gt=0)
    learning_rate: float = Field(gt=0)
    batch_chapters: int = Field(ge=1)
    accumulate: int = Field(default=1, ge=1)  # batches of one step
    steps: int | None = Field(default=None, ge=1)  # instead of epochs
    warmup_share: float = Field(default=0.05, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    beta2: float = Field(default=0.95, gt=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    held_out_share: float = Field(default=0.15, gt=0, lt=1)  # of the entities
    before: datetime | None = None  # events from here on are not learnt from; UTC without a zone
    seed: int = 7
    precision: Literal["fp32", "bf16", "auto"] = "fp32"  # auto: bf16 where it is native
    gradient_checkpointing: bool = False
    lora: Lora | None = None
    save_steps: int = Field(default=200, ge=1)  # how much a kill costs at most
    patience: int | None = Field(default=None, ge=1)  # looks at held-out loss without a better one
    track: Literal["tensorboard", "wandb"] | None = None  # extra: tracking

    @field_validator("before")
    @classmethod
    def _in_utc(cls, before: datetime | None) -> datetime | None:
        naive = before is not None and before.tzinfo is None
        return before.replace(tzinfo=UTC) if before is not None and naive else before


class Pooled(FrozenModel):
    """How states become the vector; layers count from the front, or from the back if negative."""

    scales: tuple[float, ...] = (math.inf, 16.0, 4.0)
    layers: tuple[int, ...] | Literal["all"] = (0, -1)
    combine: Literal["average", "side_by_side"] = "side_by_side"
    normalise: Literal["none", "rms"] = "rms"
    tokens: Literal["all", "ends"] = "all"
    pool_header: bool = False


class Projection(FrozenModel):
    """A linear map of the pooled vector, learnt on training entities: PCA, whitened or not."""

    dim: int = Field(ge=1)
    whiten: bool = False


class Recipe(FrozenModel):
    """How a window is cut, worded, learnt, pooled and judged."""

    window: WindowPolicy
    training: Training
    rendering: RenderingSpec = RenderingSpec(time=("gap", "hour"))
    pooling: Pooled = Pooled()
    projection: Projection | None = None
    surprise: SurpriseSpec | None = SurpriseSpec(depth_cap=16)
    model: str | None = None  # hub id, folder or .gguf file; none: from scratch, of `shape`
    shape: Shape | Literal["micro", "tiny", "small", "base"] = "micro"
    start: Literal["svd", "random"] = "svd"  # of a new model's token embeddings
    why: str | None = None  # these choices, for whoever reads the bundle's manifest

    @model_validator(mode="after")
    def _adapters_need_a_model(self) -> Self:
        if self.training.lora is not None and self.model is None:
            msg = "lora adapts an existing model: name one under `model`"
            raise ValueError(msg)
        return self

    @property
    def new_shape(self) -> Shape:
        """The shape of a model from scratch."""
        return PRESETS[self.shape] if isinstance(self.shape, str) else self.shape

    def changed(
        self,
        *,
        model: str | None = None,
        epochs: float | None = None,
        steps: int | None = None,
        seed: int | None = None,
    ) -> "Recipe":
        """The same, but for what is given; checked anew. Raises ConfigError."""
        given = {"epochs": epochs, "steps": steps, "seed": seed}
        training = self.training.model_dump() | {k: v for k, v in given.items() if v is not None}
        document = self.model_dump() | {"training": training}
        return _validate(document | ({} if model is None else {"model": model}), "recipe")


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in _FOLDER.iterdir()
        if entry.name.endswith(".yaml")
    )


def recipe_text(name: str) -> str:
    """Read a shipped recipe by name, or one's own from a .yaml file. Raises ConfigError."""
    if name in shipped_recipes():
        return _FOLDER.joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    if not name.endswith((".yaml", ".yml")):
        known = ", ".join(shipped_recipes())
        raise ConfigError("recipe", f"there is no {name!r}", f"choose {known}, or a .yaml file")
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        problem = f"{name} cannot be read ({error})"
        raise ConfigError("recipe", problem, "name a file that is there") from error


def load_recipe(name: str) -> Recipe:
    """Load a recipe by `recipe_text`'s rules, and check it. Raises ConfigError."""
    try:
        document = yaml.safe_load(recipe_text(name))
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError("recipe", f"{name} is not YAML ({problem})", "mend the file") from error
    return _validate(document, f"recipe {name}")


def _validate(document: object, where: str) -> Recipe:
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        field, problem = first_problem(error)
        raise ConfigError(
            f"{where}: {field}", problem, "mend the recipe (docs/method.md)"
        ) from error

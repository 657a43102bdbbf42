"""Readers: a causal model with the way text becomes its ids, from nothing or from elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from export.corpus import rough_chapters
from export.models import (
    BEGIN,
    Pretrained,
    load_pretrained,
    new_llama,
    train_tokenizer,
    wrap_tokenizer,
)
from export.recipe import Recipe
from llm4es.errors import ConfigError
from llm4es.events import Event
from llm4es.rendering import Renderer
from llm4es.tokens import ChapterTokenizer, load_tokenizer

__all__ = ["Reader", "open_reader"]

_OWN_LICENCE = "other"  # of a model from scratch: whoever owns the log decides


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A model to train, in fp32, and its tokenizer as training and serving use it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    tokens: ChapterTokenizer
    name: str  # of the base model, without a path
    licence: str
    bos_id: int | None


def open_reader(
    source: str | None,
    recipe: Recipe,
    renderer: Renderer,
    histories: Sequence[Sequence[Event]],
    tokenizer_file: Path,
) -> Reader:
    """Load the model that `source` names, or make one with a tokenizer trained on `histories`.

    The tokenizer is written to `tokenizer_file` and read back from there, as a bundle's is.
    Raises ConfigError.
    """
    if source is None:
        return _from_scratch(recipe, renderer, histories, tokenizer_file)
    return _existing(load_pretrained(source), recipe, renderer, tokenizer_file)


def _existing(
    found: Pretrained, recipe: Recipe, renderer: Renderer, tokenizer_file: Path
) -> Reader:
    found.tokenizer.backend_tokenizer.save(str(tokenizer_file))
    tokens = ChapterTokenizer(renderer, load_tokenizer(tokenizer_file), found.bos_id)
    needed = len(tokens.header_ids) + recipe.window.max_chapter_tokens
    if found.positions is not None and needed > found.positions:
        raise ConfigError(
            "window.max_chapter_tokens",
            f"header and chapter take up to {needed} tokens, {found.name} reads {found.positions}",
            "allow shorter chapters, or take a model with a longer context",
        )
    return Reader(
        model=found.model,
        tokenizer=found.tokenizer,
        tokens=tokens,
        name=found.name,
        licence=found.licence,
        bos_id=found.bos_id,
    )


def _from_scratch(
    recipe: Recipe,
    renderer: Renderer,
    histories: Sequence[Sequence[Event]],
    tokenizer_file: Path,
) -> Reader:
    lines = (
        line.text
        for history in histories
        for chapter in rough_chapters(history, recipe.window)
        for line in renderer.lines(chapter)
    )
    made = train_tokenizer(lines, renderer.header, vocabulary=recipe.shape.vocabulary)
    made.save(str(tokenizer_file))
    bos_id = made.token_to_id(BEGIN)
    tokens = ChapterTokenizer(renderer, load_tokenizer(tokenizer_file), bos_id)
    model = new_llama(
        recipe.shape,
        vocabulary=made.get_vocab_size(),
        positions=len(tokens.header_ids) + recipe.window.max_chapter_tokens,
        bos_id=bos_id,
    )
    return Reader(
        model=model,
        tokenizer=wrap_tokenizer(made),
        tokens=tokens,
        name=str(recipe.shape),
        licence=_OWN_LICENCE,
        bos_id=bos_id,
    )

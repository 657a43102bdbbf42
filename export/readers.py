"""Readers: a causal model with the way text becomes its ids, from nothing or from elsewhere."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from export.beside import OtherLog
from export.corpus import rough_chapters
from export.models import (
    BEGIN,
    Pretrained,
    load_pretrained,
    new_llama,
    start_from_counts,
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
    recipe: Recipe,
    renderer: Renderer,
    histories: Sequence[Sequence[Event]],
    tokenizer_file: Path,
    *,
    more_lines: Iterable[str] = (),
    beside: Sequence[OtherLog] = (),
) -> Reader:
    """Load the recipe's model, or make one with a tokenizer trained on `histories`.

    `more_lines` are of other formats, `beside` other logs: a tokenizer that is trained knows them
    too.

    The tokenizer is written to `tokenizer_file` and read back from there, as a bundle's is.
    Raises ConfigError.
    """
    if recipe.model is None:
        return _from_scratch(
            recipe, renderer, histories, tokenizer_file, more_lines=more_lines, beside=beside
        )
    return _existing(load_pretrained(recipe.model), recipe, renderer, tokenizer_file, beside)


def _existing(
    found: Pretrained,
    recipe: Recipe,
    renderer: Renderer,
    tokenizer_file: Path,
    beside: Sequence[OtherLog],
) -> Reader:
    found.tokenizer.backend_tokenizer.save(str(tokenizer_file))
    tokens = ChapterTokenizer(renderer, load_tokenizer(tokenizer_file), found.bos_id)
    needed = _longest_header(tokens, beside) + recipe.window.max_chapter_tokens
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
    *,
    more_lines: Iterable[str],
    beside: Sequence[OtherLog],
) -> Reader:
    lines = (
        line.text
        for history in histories
        for chapter in rough_chapters(history, recipe.window)
        for line in renderer.lines(chapter)
    )
    made = train_tokenizer(
        chain(lines, more_lines, *(other.lines(recipe.window) for other in beside)),
        renderer.header,
        separators=renderer.separators,
        vocabulary=recipe.new_shape.vocabulary,
    )
    made.save(str(tokenizer_file))
    bos_id = made.token_to_id(BEGIN)
    tokens = ChapterTokenizer(renderer, load_tokenizer(tokenizer_file), bos_id)
    model = new_llama(
        recipe.new_shape,
        vocabulary=made.get_vocab_size(),
        positions=_longest_header(tokens, beside) + recipe.window.max_chapter_tokens,
        bos_id=bos_id,
    )
    if recipe.start == "svd":
        start_from_counts(
            model,
            [
                *(_ids(history, recipe, tokens) for history in histories),
                *(
                    _ids(history, recipe, tokens.of(other.renderer))
                    for other in beside
                    for history in other.histories.values()
                ),
            ],
            seed=recipe.training.seed,
        )
    return Reader(
        model=model,
        tokenizer=wrap_tokenizer(made),
        tokens=tokens,
        name=str(recipe.new_shape),
        licence=_OWN_LICENCE,
        bos_id=bos_id,
    )


def _longest_header(tokens: ChapterTokenizer, beside: Sequence[OtherLog]) -> int:
    every = [tokens, *(tokens.of(other.renderer) for other in beside)]
    return max(len(each.header_ids) for each in every)


def _ids(history: Sequence[Event], recipe: Recipe, tokens: ChapterTokenizer) -> NDArray[np.int64]:
    """Every token of a history, as it is read."""
    chapters = rough_chapters(history, recipe.window)
    return np.concatenate([tokens.tokenize(chapter).ids for chapter in chapters])

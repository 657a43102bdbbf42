"""Cells: how one column of an event is written, prepared once per event type."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llm4es.events import Event, FieldValue
from llm4es.rendering.before import Before, positive
from llm4es.rendering.formats import Format
from llm4es.rendering.words import (
    NOTHING_BEFORE,
    TimeColumn,
    age,
    number_words,
    ratio,
    time_words,
)
from llm4es.schema import CategoriesField, CategoryField, FieldSpec, FlagField, NumberField

__all__ = [
    "CACHED_WORDS",
    "Cell",
    "field_cell",
    "ratio_cell",
    "spell_cell",
    "time_cell",
]

CACHED_WORDS = 8192


Cell = Callable[[Event, Before], str]


def time_cell(column: TimeColumn, form: Format) -> Cell:
    """Write an event's time, or how long it came after the one before."""
    words, word = time_words(column), form.word
    return lambda event, before: word(words(event.occurred_at, before.previous))


def ratio_cell(name: str, form: Format) -> Cell:
    """Write a number over the median of the chapter's earlier ones of the same type."""
    nothing = form.word(NOTHING_BEFORE)

    def cell(event: Event, before: Before) -> str:
        value, usual = positive(event, name), before.medians[name]
        return nothing if value is None or usual is None else form.word(ratio(value, usual))

    return cell


def spell_cell(event_type: str, form: Format) -> Cell:
    """Write how long ago the type's newest spell began."""
    nothing = form.word(NOTHING_BEFORE)

    def cell(event: Event, before: Before) -> str:
        begun = before.spells.get(event_type)
        return nothing if begun is None else form.word(age(event.occurred_at - begun))

    return cell


def field_cell(
    name: str, field: FieldSpec, edges: NDArray[np.float64] | None, form: Format
) -> Cell:
    """Write a field's value; `edges` (n,) are those of its buckets, if it has such."""
    shown = _value_words(field, edges, form)
    null = form.null

    def cell(event: Event, _before: Before) -> str:
        value = event.fields.get(name)
        return null if value is None else shown(value)

    return cell


def _value_words(
    field: FieldSpec, edges: NDArray[np.float64] | None, form: Format
) -> Callable[[FieldValue], str]:
    if isinstance(field, NumberField):
        number = number_words(field, None if edges is None else edges.tolist())
        # A bucket's name is a word; everything else that a number is written as is a number.
        bucket = form.word if edges is not None else str
        return lambda value: bucket(number(value)) if isinstance(value, int | float) else ""
    if isinstance(field, FlagField):
        no, yes = map(form.word, field.words)
        return lambda value: yes if value else no
    if isinstance(field, CategoryField):
        names, word = field.names, form.word
        return lambda value: word(names.get(str(value), str(value)))
    if isinstance(field, CategoriesField):
        return _list_words(field, form)
    return lambda value: form.word(str(value))


def _list_words(field: CategoriesField, form: Format) -> Callable[[FieldValue], str]:
    names = field.names

    @lru_cache(CACHED_WORDS)
    def words(value: FieldValue) -> str:
        codes = value if isinstance(value, tuple) else (str(value),)
        return form.words([names.get(code, code) for code in codes])

    return words

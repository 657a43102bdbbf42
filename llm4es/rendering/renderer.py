"""The renderer: columns of a schema and a spec, and the lines they make."""

import hashlib
from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from typing import Annotated, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from llm4es.errors import ConfigError
from llm4es.events import Event
from llm4es.rendering.before import Before, Spells, middle, past_median, positive
from llm4es.rendering.cells import (
    CACHED_WORDS,
    Cell,
    field_cell,
    ratio_cell,
    spell_cell,
    time_cell,
)
from llm4es.rendering.formats import FORMATS, FormatName
from llm4es.rendering.words import TIME_LABELS, TimeColumn
from llm4es.schema import (
    CategoriesField,
    CategoryField,
    EventSchema,
    EventType,
    FieldSpec,
    FlagField,
    FrozenModel,
    NumberField,
    QuantileBuckets,
    canonical_json,
)

__all__ = [
    "Line",
    "Renderer",
    "RenderingSpec",
    "Span",
    "TimeColumn",
    "bucket_name",
    "quantile_edges",
]

_REVISION = 1  # of the code in this package: part of the hash, raised when a line would change
# Bytes at most: of an escaped byte; of a time, a ratio or a usual number; of any other number.
_LONGEST_ESCAPE, _LONGEST_SHORT, _LONGEST_NUMBER = 6, 32, 330
_SHORT = 1e15
_LISTS_REVISION = b"lists:2"  # of how lists are written, part of the hash where there are any


class RenderingSpec(FrozenModel):
    """What of an event is written, beside the schema's fields, and in which format.

    `time` are columns in front of the fields. `ratios` names number fields that get a further
    column: the value over the median of the chapter's earlier values of the same type.
    """

    format: FormatName = "table"
    time: tuple[TimeColumn, ...] = ("gap", "hour")
    ratios: tuple[str, ...] = Field(default=())
    # exclude_if: the hashes of renderings without spells stand
    spells: Mapping[str, Annotated[timedelta, Field(gt=timedelta(0))]] = Field(
        default_factory=dict, exclude_if=lambda spells: not spells
    )

    @model_validator(mode="after")
    def _columns_once(self) -> Self:
        for name, columns in (("time", self.time), ("ratios", self.ratios)):
            if len(set(columns)) != len(columns):
                msg = f"{name} names a column twice"
                raise ValueError(msg)
        return self


class Span(NamedTuple):
    """The characters [start, end) of a line that belong to a field, what leads to it included."""

    field: str
    start: int
    end: int


class Line(NamedTuple):
    """An event's text, ending in the terminator, which belongs to no field."""

    text: str
    spans: tuple[Span, ...]


class _Column(NamedTuple):
    name: str
    label: str
    cell: Cell


@dataclass(frozen=True, slots=True)
class _Plan:
    """What there is to write for an event of one type, prepared once."""

    names: tuple[str, ...]
    labels: tuple[str, ...]  # the type's own not among them
    columns: tuple[tuple[str, str, Cell], ...]  # (name, front, cell)
    ratios: tuple[str, ...]
    longest: int  # bytes of a line at most, but for the values of the fields named next
    fields: tuple[str, ...]


class Renderer:
    """Renders events of one schema by one spec.

    `learnt` maps `bucket_name(type, field)` to rising edges (n,) float64 for the fields whose
    schema asks for quantile buckets. Raises ConfigError for a spec that does not fit the
    schema.
    """

    def __init__(
        self,
        schema: EventSchema,
        spec: RenderingSpec,
        learnt: Mapping[str, NDArray[np.float64]] | None = None,
    ) -> None:
        self._schema = schema
        self._spec = spec
        form = FORMATS[spec.format]
        # Most words come again and again.
        self._format = replace(form, word=lru_cache(CACHED_WORDS)(form.word))
        self._edges = _edges(schema, learnt or {})
        numbers = {
            name
            for kind in schema.types.values()
            for name, field in kind.fields.items()
            if isinstance(field, NumberField)
        }
        _refuse_strange("ratios", spec.ratios, numbers, "number field")
        _refuse_strange("spells", spec.spells, schema.types, "event type")
        self._several = len(schema.types) > 1
        self._plans = {name: self._plan(name, kind) for name, kind in schema.types.items()}

    @property
    def header(self) -> str:
        """What stands before every chapter, the same for all entities: labels, or a title."""
        heads = [
            ((kind.label or name) if self._several else None, self._plans[name].labels)
            for name, kind in self._schema.types.items()
        ]
        return self._format.header(self._schema.name, heads)

    @property
    def labels(self) -> frozenset[str]:
        """Words of the columns of all types, as they are before a format escapes them."""
        return frozenset(label for plan in self._plans.values() for label in plan.labels)

    @property
    def terminator(self) -> str:
        """What every line ends in."""
        return self._format.terminator

    @property
    def separators(self) -> str:
        """Regular expression of where columns begin, for the splits of a tokenizer of our own.

        A split belongs in front of each match, so that a column is one word with what leads to
        it, and the last one with the terminator too: no token is spent on what every line has.
        Inside values the same signs are escaped, or splitting there loses nothing.
        """
        return self._format.separators

    @property
    def sha256(self) -> str:
        """Hash of all that a line depends on, beside the event and the schema."""
        digest = hashlib.sha256(f"{_REVISION}:".encode() + canonical_json(self._spec))
        if any(isinstance(field, CategoriesField) for field in _fields(self._schema)):
            digest.update(_LISTS_REVISION)
        for name in sorted(self._edges):
            digest.update(name.encode() + self._edges[name].astype("<f8").tobytes())
        return digest.hexdigest()

    def fields(self, event_type: str) -> tuple[str, ...]:
        """Names of a type's columns in order: what surprise is told apart by."""
        return self._plans[event_type].names

    def line(self, event: Event, earlier: Sequence[Event]) -> Line:
        """Render one event behind the earlier ones of its chapter."""
        plan = self._plans[event.type]
        return self._write(plan, event, self._before(plan, event, earlier))

    def text(self, event: Event, earlier: Sequence[Event]) -> str:
        """Give the text alone of the event's line, behind the earlier ones of its chapter."""
        plan = self._plans[event.type]
        before = self._before(plan, event, earlier)
        cells = [front + cell(event, before) for _, front, cell in plan.columns]
        return "".join(cells) + self._format.terminator

    def longest(self, event: Event) -> int:
        """Bytes that the event's line has at most, whatever stands before it; never too few."""
        plan = self._plans[event.type]
        length = plan.longest
        for name in plan.fields:
            value = event.fields.get(name)
            if isinstance(value, str):
                length += _LONGEST_ESCAPE * len(value.encode())
            elif isinstance(value, tuple):
                length += _LONGEST_ESCAPE * sum(len(item.encode()) + 1 for item in value)
            elif isinstance(value, int | float) and not -_SHORT < value < _SHORT:
                length += _LONGEST_NUMBER
        return length

    def lines(self, events: Sequence[Event]) -> list[Line]:
        """Render a chapter's events, oldest first."""
        lines = []
        previous = None
        past: dict[str, dict[str, list[float]]] = {
            kind: {name: [] for name in plan.ratios} for kind, plan in self._plans.items()
        }
        spells = Spells(self._spec.spells)
        for event in events:
            values = past[event.type]
            medians = {name: middle(values[name]) for name in values}
            spells.see(event)
            before = Before(previous, medians, spells.begun)
            lines.append(self._write(self._plans[event.type], event, before))
            previous = event.occurred_at
            for name, ordered in values.items():
                if (value := positive(event, name)) is not None:
                    insort(ordered, value)
        return lines

    def _before(self, plan: _Plan, event: Event, earlier: Sequence[Event]) -> Before:
        spells = Spells(self._spec.spells)
        if self._spec.spells:
            for each in (*earlier, event):
                spells.see(each)
        return Before(
            previous=earlier[-1].occurred_at if earlier else None,
            medians={name: past_median(earlier, event.type, name) for name in plan.ratios},
            spells=spells.begun,
        )

    def _write(self, plan: _Plan, event: Event, before: Before) -> Line:
        text = ""
        start = 0
        spans = []
        for name, front, cell in plan.columns:
            text += front + cell(event, before)
            end = len(text)
            spans.append(Span(name, start, end))
            start = end
        return Line(text + self._format.terminator, tuple(spans))

    def _plan(self, event_type: str, kind: EventType) -> _Plan:
        form = self._format
        columns = [
            _Column(column, TIME_LABELS[column], time_cell(column, form))
            for column in self._spec.time
        ]
        for name, field in kind.fields.items():
            if field.render:
                unit = f" ({field.unit})" if isinstance(field, NumberField) and field.unit else ""
                cell = field_cell(name, field, self._edges.get(bucket_name(event_type, name)), form)
                columns.append(_Column(name, f"{field.label or name}{unit}", cell))
        ratios = tuple(name for name in self._spec.ratios if name in kind.fields)
        columns += [
            _Column(f"{name}_ratio", f"{name} over median so far", ratio_cell(name, form))
            for name in ratios
        ]
        for name in self._spec.spells:
            label = f"since first {self._schema.types[name].label or name} of a spell"
            columns.append(_Column(f"{name}_spell", label, spell_cell(name, form)))
        labels = tuple(column.label for column in columns)
        if self._several:
            word = form.word(kind.label or event_type)
            columns.insert(0, _Column("type", "type", lambda _event, _before: word))
        _refuse_one_name_twice(event_type, [column.name for column in columns])
        if form.keyed:
            _refuse_one_label_twice(event_type, [column.label for column in columns], self._spec)
        prepared = tuple(
            (column.name, form.front(column.label, position, self._several), column.cell)
            for position, column in enumerate(columns)
        )
        fronts = sum(len(front.encode()) for _, front, _ in prepared) + len(form.terminator)
        return _Plan(
            names=tuple(column.name for column in columns),
            labels=labels,
            columns=prepared,
            ratios=ratios,
            longest=fronts
            + sum(map(_longest_word, kind.fields.values()))
            + _LONGEST_SHORT * len(columns),
            fields=tuple(name for name, field in kind.fields.items() if field.render),
        )


def bucket_name(event_type: str, field: str) -> str:
    """Name of a field's learnt edges among the bundle's arrays."""
    return f"buckets.{event_type}.{field}"


def quantile_edges(
    values: Sequence[float] | NDArray[np.float64], buckets: QuantileBuckets
) -> NDArray[np.float64]:
    """Edges (n,), strictly rising, learnt from a field's values; at 0 where there are none."""
    if not len(values):
        return np.zeros(1)
    return np.unique(np.quantile(np.asarray(values, dtype=np.float64), buckets.shares))


def _longest_word(field: FieldSpec) -> int:
    """Bytes of what a schema writes for a value, escaped, beside the value itself."""
    if isinstance(field, FlagField):
        words: Iterable[str] = field.words
    elif isinstance(field, CategoryField | CategoriesField):
        words = field.names.values()
    else:
        return 0
    longest = max((len(word.encode()) for word in words), default=0)
    many = field.max_items if isinstance(field, CategoriesField) else 1
    return _LONGEST_ESCAPE * longest * many


def _fields(schema: EventSchema) -> Iterable[FieldSpec]:
    return (field for kind in schema.types.values() for field in kind.fields.values())


def _edges(
    schema: EventSchema, learnt: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]]:
    edges: dict[str, NDArray[np.float64]] = {}
    for type_name, kind in schema.types.items():
        for name, field in kind.fields.items():
            buckets = field.buckets if isinstance(field, NumberField) else None
            key = bucket_name(type_name, name)
            if isinstance(buckets, tuple):
                edges[key] = np.asarray(buckets, dtype=np.float64)
            elif isinstance(buckets, QuantileBuckets):
                if key not in learnt:
                    raise ConfigError(
                        key, "the schema asks for learnt buckets", "learn them, or name the edges"
                    )
                edges[key] = np.asarray(learnt[key], dtype=np.float64)
    return edges


def _refuse_strange(column: str, names: Iterable[str], known: Iterable[str], what: str) -> None:
    choices = sorted(known)
    for name in names:
        if name not in choices:
            remedy = f"choose from: {', '.join(choices)}"
            raise ConfigError(f"rendering.{column}", f"{name!r} is no {what}", remedy)


def _refuse_one_name_twice(event_type: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            "rendering",
            f"two columns of {event_type!r} are named {twice[0]!r}",
            "give the field another name, or leave the other column out",
        )


def _refuse_one_label_twice(event_type: str, labels: Sequence[str], spec: RenderingSpec) -> None:
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(
            "rendering.format",
            f"two columns of {event_type!r} are called {twice[0]!r} in {spec.format}",
            "give the field another label, or leave the time column out",
        )

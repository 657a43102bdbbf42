"""Rendering: the text a model reads for a chapter.

The paper's table format (arXiv 2508.05688, section 3): a header of field labels joined by `|`,
then one line per event, its values joined by `, `. An event's line depends on the event, the
spec, and at most the events before it in its chapter, so that a late event changes the text of
one chapter and of no other.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from llm4es.errors import ConfigError
from llm4es.events import Event, FieldValue
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

__all__ = ["Line", "Renderer", "RenderingSpec", "Span", "TimeColumn", "bucket_name"]

TimeColumn = Literal["gap", "hour", "weekday", "day", "date", "datetime"]

_REVISION = 1  # of the code below: part of the hash, raised when a line would change
_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r", ",": "\\,", "|": "\\|"})
_TIME_LABELS: Mapping[TimeColumn, str] = {
    "gap": "since previous",
    "hour": "hour",
    "weekday": "weekday",
    "day": "day",
    "date": "date",
    "datetime": "time",
}
_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_UNITS = (("d", 86_400.0), ("h", 3_600.0), ("m", 60.0))
_NOTHING_BEFORE = "-"
_EPOCH_DAY = 719_163  # proleptic ordinal of 1970-01-01


class RenderingSpec(FrozenModel):
    """What of an event is written, beside the schema's fields.

    `time` are columns in front of the fields. `ratios` names number fields that get a further
    column: the value over the median of the chapter's earlier values of the same type.
    """

    format: Literal["table"] = "table"
    time: tuple[TimeColumn, ...] = ("gap", "hour")
    ratios: tuple[str, ...] = Field(default=())

    @model_validator(mode="after")
    def _columns_once(self) -> Self:
        for name, columns in (("time", self.time), ("ratios", self.ratios)):
            if len(set(columns)) != len(columns):
                msg = f"{name} names a column twice"
                raise ValueError(msg)
        return self


@dataclass(frozen=True, slots=True)
class Span:
    """The characters [start, end) of a line that belong to a field, its separator included."""

    field: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Line:
    """An event's text, ending in the terminator, which belongs to no field."""

    text: str
    spans: tuple[Span, ...]


class Renderer:
    """Renders events of one schema by one spec.

    `learnt` maps `bucket_name(type, field)` to rising edges (n,) float64 for the fields whose
    schema asks for quantile buckets. Raises ConfigError for a spec that does not fit the
    schema.
    """

    separator = ", "
    terminator = "\n"
    label_separator = "|"

    def __init__(
        self,
        schema: EventSchema,
        spec: RenderingSpec,
        learnt: Mapping[str, NDArray[np.float64]] | None = None,
    ) -> None:
        self._schema = schema
        self._spec = spec
        self._several = len(schema.types) > 1
        self._edges = _edges(schema, learnt or {})
        numbers = {
            name
            for kind in schema.types.values()
            for name, field in kind.fields.items()
            if isinstance(field, NumberField)
        }
        for name in spec.ratios:
            if name not in numbers:
                known = ", ".join(sorted(numbers))
                raise ConfigError(
                    "rendering.ratios", f"{name!r} is no number field", f"choose from: {known}"
                )

    @property
    def header(self) -> str:
        """The lines of labels that stand before every chapter, the same for all entities."""
        lines = []
        for name, kind in self._schema.types.items():
            labels = self.label_separator.join(self._labels(kind))
            front = f"{_escape(kind.label or name)}: " if self._several else ""
            lines.append(f"{front}{labels}{self.terminator}")
        return "".join(lines)

    @property
    def sha256(self) -> str:
        """Hash of all that a line depends on, beside the event and the schema."""
        digest = hashlib.sha256(f"{_REVISION}:".encode() + canonical_json(self._spec))
        for name in sorted(self._edges):
            digest.update(name.encode() + self._edges[name].astype("<f8").tobytes())
        return digest.hexdigest()

    def fields(self, event_type: str) -> tuple[str, ...]:
        """Names of a type's columns in order: what surprise is told apart by."""
        kind = self._schema.types[event_type]
        front = ("type",) if self._several else ()
        shown = tuple(name for name, field in kind.fields.items() if field.render)
        ratios = tuple(f"{name}_ratio" for name in self._ratios(kind))
        return (*front, *self._spec.time, *shown, *ratios)

    def line(self, event: Event, earlier: Sequence[Event]) -> Line:
        """Render one event behind the earlier ones of its chapter."""
        kind = self._schema.types[event.type]
        values = [_escape(kind.label or event.type)] if self._several else []
        values += [_time_value(column, event, earlier) for column in self._spec.time]
        values += [
            self._value(event.type, name, field, event.fields.get(name))
            for name, field in kind.fields.items()
            if field.render
        ]
        values += [_ratio(name, event, earlier) for name in self._ratios(kind)]
        spans = []
        start = 0
        for index, (name, value) in enumerate(zip(self.fields(event.type), values, strict=True)):
            end = start + len(value) + (len(self.separator) if index else 0)
            spans.append(Span(name, start, end))
            start = end
        return Line(self.separator.join(values) + self.terminator, tuple(spans))

    def lines(self, events: Sequence[Event]) -> list[Line]:
        """Render a chapter's events, oldest first."""
        return [self.line(event, events[:index]) for index, event in enumerate(events)]

    def _labels(self, kind: EventType) -> list[str]:
        labels = [_TIME_LABELS[column] for column in self._spec.time]
        for name, field in kind.fields.items():
            if field.render:
                unit = f" ({field.unit})" if isinstance(field, NumberField) and field.unit else ""
                labels.append(_escape(f"{field.label or name}{unit}"))
        labels += [_escape(f"{name} over median so far") for name in self._ratios(kind)]
        return labels

    def _ratios(self, kind: EventType) -> tuple[str, ...]:
        return tuple(name for name in self._spec.ratios if name in kind.fields)

    def _value(self, event_type: str, name: str, field: FieldSpec, value: FieldValue) -> str:
        if value is None:
            return ""
        if isinstance(field, NumberField) and isinstance(value, int | float):
            edges = self._edges.get(bucket_name(event_type, name))
            return _number(value, field.decimals) if edges is None else _bucket(value, edges)
        if isinstance(field, FlagField):
            return _escape(field.words[bool(value)])
        if isinstance(field, CategoriesField) and isinstance(value, tuple):
            return _escape(" + ".join(field.names.get(code, code) for code in value))
        text = str(value)
        return _escape(field.names.get(text, text) if isinstance(field, CategoryField) else text)


def bucket_name(event_type: str, field: str) -> str:
    """Name of a field's learnt edges among the bundle's arrays."""
    return f"buckets.{event_type}.{field}"


def _edges(
    schema: EventSchema, learnt: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]]:
    edges: dict[str, NDArray[np.float64]] = {}
    for type_name, kind in schema.types.items():
        for name, field in kind.fields.items():
            if not isinstance(field, NumberField) or field.buckets is None:
                continue
            key = bucket_name(type_name, name)
            if isinstance(field.buckets, QuantileBuckets):
                if key not in learnt:
                    raise ConfigError(
                        key, "the schema asks for learnt buckets", "learn them, or name the edges"
                    )
                edges[key] = np.asarray(learnt[key], dtype=np.float64)
            else:
                edges[key] = np.asarray(field.buckets, dtype=np.float64)
    return edges


def _escape(value: str) -> str:
    return value.translate(_ESCAPES)


def _number(value: float, decimals: int | None) -> str:
    if decimals is None:
        return format(value, "d") if isinstance(value, int) else format(value, ".15g")
    # Adding 0.0 turns the -0.0 that rounding leaves into 0.0.
    return format(round(value, decimals) + 0.0, f".{decimals}f")


def _bucket(value: float, edges: NDArray[np.float64]) -> str:
    return f"b{int(np.searchsorted(edges, value, side='right'))}"


def _time_value(column: TimeColumn, event: Event, earlier: Sequence[Event]) -> str:
    moment = event.occurred_at
    if column == "gap":
        return _gap(moment - earlier[-1].occurred_at) if earlier else _NOTHING_BEFORE
    if column == "weekday":
        return _WEEKDAYS[moment.weekday()]
    return _clock(column, moment)


def _clock(column: TimeColumn, moment: datetime) -> str:
    if column == "hour":
        return f"{moment.hour:02d}h"
    if column == "day":
        return str(moment.toordinal() - _EPOCH_DAY)
    return moment.strftime("%Y-%m-%d" if column == "date" else "%Y-%m-%d %H:%M")


def _gap(gap: timedelta) -> str:
    """Render a duration in its largest unit, to one digit from ten on: 7m, 20h, 30d."""
    seconds = gap.total_seconds()
    for unit, size in _UNITS:
        if seconds >= size:
            return f"{_coarse(int(seconds // size))}{unit}"
    return "0m"


def _coarse(count: int) -> int:
    magnitude = int("1".ljust(len(str(count)), "0"))
    return count // magnitude * magnitude


def _ratio(name: str, event: Event, earlier: Sequence[Event]) -> str:
    """Value over the median so far, in half-steps of powers of two: x1, x1.4, x2, x2.8."""
    past = [
        value
        for known in earlier
        if known.type == event.type
        and isinstance(value := known.fields.get(name), int | float)
        and value > 0
    ]
    value = event.fields.get(name)
    if not past or not isinstance(value, int | float) or value <= 0:
        return _NOTHING_BEFORE
    halves = max(-12, min(12, round(2 * math.log2(value / median(past)))))
    return f"x{2 ** (halves / 2):.2g}"

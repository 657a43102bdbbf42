"""What a column of a sample holds, and how an event schema would say it."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Self

import numpy as np

from export.personal_data import personal_reason

__all__ = ["Column", "Fact", "describe_column", "epoch_unit", "is_time", "quoted"]

Kind = Literal["text", "integer", "number", "flag", "list", "moment", "mixed", "nothing"]

# A flag is an integer too, in Python: it comes first.
_KINDS: tuple[tuple[type, Kind], ...] = (
    (bool, "flag"),
    (int, "integer"),
    (float, "number"),
    (str, "text"),
    (datetime, "moment"),
    (list, "list"),
)

_TIME_SHARE = 0.98
_ISO = re.compile(r"\d{4}-\d{2}-\d{2}([T ].*)?")
_TIME_NAME = re.compile(r"time|date|dttm|epoch|(^|_)(ts|at)(_|$)|stamp")
# From 1980 to 2100.
_EPOCHS = (
    ("s", 3.1e8, 4.2e9),
    ("ms", 3.1e11, 4.2e12),
    ("us", 3.1e14, 4.2e15),
    ("ns", 3.1e17, 4.2e18),
)
_LABEL = re.compile(r"fraud|(^|_)(label|target|churn|default|outcome|y|is_?bad)(_|$)|scenario")
_CODE = re.compile(
    r"(^|_)(mcc|code|category|cat|type|kind|channel|currency|country|status|group|class|segment|"
    r"brand|device|method|reason|result|rk)(_|$)"
)
_IDENTIFIER = re.compile(r"(^|_)(id|uuid|guid|key|hash)$")
_UNITS = re.compile(
    r"_(eur|usd|gbp|chf|rub|jpy|cny|inr|brl|pln|ms|sec|min|km|kg|mb|gb|pct|percent)$"
)
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_WORDS = {"yes", "no", "true", "false", "on", "off", "null", "y", "n"}
_WHOLE = re.compile(r"[+-]?(0|[1-9]\d{0,17})")
_DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?")
_SEPARATORS = (", ", "|", ";")

_MOST_CODES = 2_000
_RECORDS_PER_CODE = 4
_LONGEST_CODE = 64
_SHOWN = 6
_HEAVY = 8.0  # 99th percentile of the size over its median
_MANY = 50  # distinct values from which buckets are worth having
_MOST_DECIMALS = 4
_CONSTANT_ROWS = 50
_SHORTEST_LIMIT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One field over the sample; `cells` has None where it is missing, one cell per record."""

    name: str
    cells: Sequence[Any]
    kind: Kind
    counts: Counter[str]
    in_csv: bool  # where text is all there is, so that `cells` were read as what they look like

    @classmethod
    def of(cls, name: str, cells: Sequence[Any], *, text_only: bool) -> Self:
        """Read cells as what they look like, if text is all that the file can hold."""
        held = _read(cells) if text_only else cells
        there = [cell for cell in held if cell is not None]
        texts = (str(c) for c in there if not isinstance(c, list | dict))
        return cls(
            name=name, cells=held, kind=_kind(there), counts=Counter(texts), in_csv=text_only
        )

    @property
    def rows(self) -> int:
        """Records of the sample."""
        return len(self.cells)

    @property
    def values(self) -> list[Any]:
        """What is not missing."""
        return [cell for cell in self.cells if cell is not None]

    @property
    def distinct(self) -> int:
        """Different values."""
        return len(self.counts)

    @property
    def filled(self) -> float:
        """Share of the records that have it."""
        return len(self.values) / max(self.rows, 1)

    @property
    def is_id(self) -> bool:
        """Whether it can name something: text or integers."""
        return self.kind in {"text", "integer"}

    @property
    def repeats(self) -> bool:
        """Whether a value stands in two records on average, or more."""
        return self.is_id and 0 < 2 * self.distinct <= len(self.values)

    @property
    def personal(self) -> str:
        """What it looks like, if that is personal data."""
        return personal_reason(self.name, self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A field's keys in YAML's flow style, with a remark; or why it is left out."""

    spec: str = ""
    comment: str = ""
    left_out: str = ""


def quoted(text: str) -> str:
    """Spell text as YAML that reads as itself."""
    plain = _PLAIN.fullmatch(text) is not None and text.lower() not in _WORDS
    return text if plain else json.dumps(text, ensure_ascii=False)


def is_time(column: Column) -> bool:
    """Whether nearly every value is a moment that `parse_event` reads."""
    if column.kind == "moment" or epoch_unit(column):
        return True
    values = column.values
    return column.kind == "text" and sum(map(_is_iso, values)) >= _TIME_SHARE * len(values)


def epoch_unit(column: Column) -> str:
    """The unit of seconds since 1970 that its numbers are in, "" if they are none."""
    if column.kind not in {"integer", "number"} or not _TIME_NAME.search(column.name.lower()):
        return ""
    low, high = min(column.values), max(column.values)
    fits = (unit for unit, first, last in _EPOCHS if first <= low <= high <= last)
    return next(fits, "")


def describe_column(column: Column) -> Fact:
    """Say how a schema would take a field, or why it should not."""
    if reason := _unwanted(column):
        return Fact(left_out=reason)
    if column.kind == "flag":
        yes = sum(column.values) / len(column.values)
        return Fact(spec="kind: flag", comment=f"true in {yes:.1%}")
    if column.kind == "list":
        return _list(column)
    if column.kind in {"integer", "number"}:
        return _number(column)
    return _text(column)


def _unwanted(column: Column) -> str:
    """Why a field is left out, "" if it is not."""
    constant = column.distinct == 1 and column.filled == 1 and column.rows >= _CONSTANT_ROWS
    only = _shown(next(iter(column.counts), ""))
    reasons = (
        (column.kind == "nothing", "always null"),
        (bool(column.personal), f"looks like {column.personal}"),
        (
            _LABEL.search(column.name.lower()) is not None,
            "looks like a label: an embedding that reads it leaks the answer",
        ),
        (is_time(column), "a second time; the gap to the event time is no field"),
        (column.kind == "mixed", "of several types, or nested: flatten it"),
        (constant, f"always {only}"),
    )
    return next((reason for holds, reason in reasons if holds), "")


def _list(column: Column) -> Fact:
    codes = Counter(code for value in column.values for code in value)
    longest = max((len(value) for value in column.values), default=0)
    return Fact(spec=f"kind: categories, max_items: {max(16, 2 * longest)}", comment=_codes(codes))


def _number(column: Column) -> Fact:
    name = column.name.lower()
    if _IDENTIFIER.search(name) and column.kind == "integer":
        return Fact(
            left_out=f"an id ({column.distinct:,} values): a number means nothing to a model; name "
            "it as an entity, or as a category of integer codes"
        )
    if _CODE.search(name) and column.kind == "integer" and column.distinct <= _MOST_CODES:
        codes = "" if column.in_csv else ", codes: integer"
        return Fact(spec=f"kind: category{codes}", comment=_codes(column.counts))
    values = np.array(column.values, np.float64)
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    spec = "kind: number"
    if unit := _UNITS.search(name):
        spec += f", unit: {unit[1].upper() if len(unit[1]) == len('EUR') else unit[1]}"
    if column.kind == "number":
        spec += f", decimals: {_decimals(values)}"
    comment = f"{low:.6g} to {high:.6g}, median {middle:.6g}"
    size = np.abs(values)
    far, usual = np.quantile(size, 0.99), np.median(size)
    if column.distinct > _MANY and far > _HEAVY * usual:
        spec += ", buckets: {quantiles: 32, tail: [0.98, 0.99, 0.995, 0.999]}"
        comment += "; heavy-tailed: buckets are learnt on training entities"
    return Fact(spec=spec, comment=comment)


def _text(column: Column) -> Fact:
    values: list[str] = column.values
    name = column.name.lower()
    longest = max(map(len, values))
    if _IDENTIFIER.search(name) and column.distinct > _MANY:
        return Fact(
            spec=f"kind: text, max_length: {_limit(longest)}, render: false",
            comment=f"{column.distinct:,} ids: kept, but no part of the text",
        )
    for separator in _SEPARATORS:
        parts = Counter(part for value in values for part in value.split(separator))
        listed = sum(separator in value for value in values) / len(values)
        if listed > 1 / 4 and len(parts) < column.distinct:
            if separator == "|" and column.in_csv:
                return Fact(spec="kind: categories", comment=_codes(parts))
            hint = f"lists, parted by {separator!r}: as real lists they could be categories"
            return Fact(spec=f"kind: text, max_length: {_limit(longest)}", comment=hint)
    few = column.distinct <= _MOST_CODES and len(values) >= _RECORDS_PER_CODE * column.distinct
    if longest <= _LONGEST_CODE and (few or _CODE.search(name)):
        return Fact(spec="kind: category", comment=_codes(column.counts))
    comment = f"{column.distinct:,} texts, up to {longest} characters"
    return Fact(spec=f"kind: text, max_length: {_limit(longest)}", comment=comment)


def _codes(counts: Counter[str]) -> str:
    shown = ", ".join(f"{_shown(code)} ({n:,})" for code, n in counts.most_common(_SHOWN))
    more = ", ..." if len(counts) > _SHOWN else ""
    return f"{len(counts):,} codes: {shown}{more}"


def _shown(text: str) -> str:
    """Text that stays on its line, in a comment."""
    return json.dumps(text[:32], ensure_ascii=False).strip('"')


def _limit(longest: int) -> int:
    """Twice the longest that was seen, as a power of two."""
    power: int = 1 << (2 * longest - 1).bit_length()
    return max(power, _SHORTEST_LIMIT)


def _decimals(values: "np.ndarray[Any, np.dtype[np.float64]]") -> int:
    """How many are needed; the last digits of a float32 are none."""
    for decimals in range(_MOST_DECIMALS):
        off = np.abs(values - np.round(values, decimals))
        exact = float(np.mean(off <= 1e-6 * np.maximum(1.0, np.abs(values))))
        if exact > 1 - 1e-3:
            return decimals
    return _MOST_DECIMALS


def _kind(values: Sequence[Any]) -> Kind:
    found: set[Kind] = {_kind_of(value) for value in values}
    if found == {"integer", "number"}:
        return "number"
    if len(found) > 1:
        return "mixed"
    return found.pop() if found else "nothing"


def _kind_of(value: object) -> Kind:
    if isinstance(value, list) and not all(isinstance(item, str) for item in value):
        return "mixed"
    return next((kind for cls, kind in _KINDS if isinstance(value, cls)), "mixed")


def _read(cells: Sequence[Any]) -> Sequence[Any]:
    """Cells of a .csv as the numbers or flags that all of them look like."""
    texts: list[str] = [cell for cell in cells if cell is not None]
    if texts and all(map(_WHOLE.fullmatch, texts)):
        return [None if cell is None else int(cell) for cell in cells]
    if texts and all(map(_DECIMAL.fullmatch, texts)) and not any(map(_is_padded, texts)):
        return [None if cell is None else float(cell) for cell in cells]
    if {text.lower() for text in texts} == {"true", "false"}:
        return [None if cell is None else cell.lower() == "true" for cell in cells]
    return cells


def _is_padded(text: str) -> bool:
    """Whether zeros in front say that it is a code, no number."""
    return text.startswith("0") and len(text) > 1 and text[1].isdigit()


def _is_iso(text: str) -> bool:
    if _ISO.fullmatch(text) is None:
        return False
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True

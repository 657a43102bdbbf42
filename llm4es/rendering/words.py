"""Words: what numbers, times and ratios are called, before a format escapes them."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Literal

from llm4es.schema import LogBuckets, NumberField

__all__ = [
    "NOTHING_BEFORE",
    "TIME_LABELS",
    "TimeColumn",
    "age",
    "number_words",
    "ratio",
    "time_words",
]

TimeColumn = Literal["gap", "gap_log", "hour", "weekday", "day", "date", "datetime"]

NOTHING_BEFORE = "-"
TIME_LABELS: Mapping[TimeColumn, str] = {
    "gap": "since previous",
    "gap_log": "log10 of seconds since previous",
    "hour": "hour",
    "weekday": "weekday",
    "day": "day",
    "date": "date",
    "datetime": "time",
}
_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_HOUR = 60  # minutes
_DAY = 86_400  # seconds
_CACHED_GAPS = 8_192
_EPOCH_DAY = 719_163  # proleptic ordinal of 1970-01-01
# Lower edges in whole seconds, the same on every machine, and their names in two digits.
_AGES = tuple(
    (round(_DAY * days), f"{float(f'{days:.2g}'):g}d")
    for days in (2 ** (step / 4) for step in range(56))
)
_LARGEST_LOG = 709  # ln of the largest double


def number_words(field: NumberField, edges: Sequence[float] | None) -> Callable[[float], str]:
    """How a field's numbers are written; `edges` are those of its buckets, if it has such."""
    if isinstance(field.buckets, LogBuckets):
        log = field.buckets.log
        return _natural_log_words() if log == "natural" else _decade_words(log)
    if edges is not None:
        return lambda value: f"b{bisect_right(edges, float(value))}"
    if field.significant is not None:
        kept = f".{field.significant - 1}e"
        # Adding 0.0 turns the -0.0 that rounding leaves into 0.0.
        return lambda value: format(float(format(value, kept)) + 0.0, ".15g")
    if field.decimals is not None:
        decimals, shown = field.decimals, f".{field.decimals}f"
        return lambda value: format(round(value, decimals) + 0.0, shown)
    return _as_is


def _as_is(value: float) -> str:
    return format(value, "d") if isinstance(value, int) else format(value, ".15g")


def _decade_words(per_decade: int) -> Callable[[float], str]:
    """Lower edges of buckets at equal ratios, in two digits: 100, 220, 460.

    The exponent comes from decimal digits, not from a logarithm: the same on every machine.
    """
    starts = [10 ** (step / per_decade) for step in range(per_decade)]
    names = [f"{start:.1f}" for start in starts]

    def word(value: float) -> str:
        if value == 0:
            return "0"
        mantissa, exponent = f"{abs(value):.15e}".split("e")
        name = names[bisect_right(starts, float(mantissa)) - 1]
        return format(math.copysign(float(f"{name}e{exponent}"), value), ".15g")

    return word


def _natural_log_words() -> Callable[[float], str]:
    starts = [math.expm1(log) for log in range(1, _LARGEST_LOG + 1)]

    def word(value: float) -> str:
        log = bisect_right(starts, abs(value))
        return str(-log if value < 0 else log)

    return word


def time_words(column: TimeColumn) -> Callable[[datetime, datetime | None], str]:
    """How a time column writes an event's time; some look at the previous event's too."""
    return _TIME_WORDS[column]


def _gap(moment: datetime, previous: datetime | None) -> str:
    """Write a duration in its largest unit, to one digit from ten on: 7m, 20h, 30d."""
    if previous is None:
        return NOTHING_BEFORE
    gap = moment - previous
    return _coarse_gap(gap.days, gap.seconds // 60)


@lru_cache(_CACHED_GAPS)
def _coarse_gap(days: int, minutes: int) -> str:
    if days > 0:
        return f"{_coarse(days)}d"
    if days < 0 or minutes == 0:
        return "0m"
    return f"{_coarse(minutes // 60)}h" if minutes >= _HOUR else f"{_coarse(minutes)}m"


def _coarse(count: int) -> int:
    magnitude = int("1".ljust(len(str(count)), "0"))
    return count // magnitude * magnitude


def _gap_log(moment: datetime, previous: datetime | None) -> str:
    if previous is None:
        return NOTHING_BEFORE
    return f"{math.log10(1.0 + (moment - previous) / timedelta(seconds=1)):.1f}"


_TIME_WORDS: Mapping[TimeColumn, Callable[[datetime, datetime | None], str]] = {
    "gap": _gap,
    "gap_log": _gap_log,
    "hour": lambda moment, _: f"{moment.hour:02d}h",
    "weekday": lambda moment, _: _WEEKDAYS[moment.weekday()],
    "day": lambda moment, _: str(moment.toordinal() - _EPOCH_DAY),
    "date": lambda moment, _: f"{moment:%Y-%m-%d}",
    "datetime": lambda moment, _: f"{moment:%Y-%m-%d %H:%M}",
}


def age(duration: timedelta) -> str:
    """Write whole hours below a day, from there on quarter-steps of powers of two: 2d, 2.4d."""
    seconds = duration.days * _DAY + duration.seconds
    if seconds < _DAY:
        return f"{seconds // 3600}h"
    return _AGES[bisect_right(_AGES, seconds, key=lambda edge: edge[0]) - 1][1]


def ratio(value: float, median: float) -> str:
    """Write value over median, both above 0, in half-steps of powers of two: x1, x1.4, x2."""
    quotient = max(1e-9, min(1e9, value / median))  # of two doubles it may be 0 or infinite
    halves = max(-12, min(12, round(2 * math.log2(quotient))))
    return f"x{2 ** (halves / 2):.2g}"

"""Faithful: whether other words for a chapter still say the same events.

What can be judged without trusting a model: one line per event, in order, with exactly that
event's numbers. Names may be paraphrased; numbers and order may not change.
"""

import html
import re
from collections import Counter
from collections.abc import Collection, Sequence
from decimal import Decimal
from typing import Literal, NamedTuple

__all__ = ["Judged", "Reason", "judge"]

Reason = Literal["empty", "events", "numbers", "summary", "unchanged"]

_SUMMARY = "summary:"
_FENCE = "```"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# A minus is a sign unless it stands behind a letter or digit (2026-03-01).
_NUMBER = re.compile(
    r"(?<![\w.])-\d+(?:\.\d+)?(?:e[+-]?\d+)?|\d+(?:\.\d+)?(?:e[+-]?\d+)?", re.IGNORECASE
)


class Judged(NamedTuple):
    """The lines that may be trained on; or none, and why not."""

    text: str
    reason: Reason | None


def judge(
    lines: Sequence[str], answer: str, *, labels: Collection[str] = (), summary: bool = False
) -> Judged:
    """Judge an answer by a chapter's lines.

    Blank lines and code fences around are taken off. `labels` are those of the columns: where one
    holds a number, an answer may say it. `summary` allows one line more, which may repeat the
    chapter's numbers and must add none.
    """
    numbered = sorted((each for each in labels if _numbers(each)), key=len, reverse=True)
    rows = [row.strip() for row in answer.split("\n")]
    rows = [row for row in rows if row and not row.startswith(_FENCE)]
    if not rows:
        return Judged("", "empty")
    closing = rows.pop() if summary and rows[-1].lower().startswith(_SUMMARY) else None
    if len(rows) != len(lines):
        return Judged("", "events")
    due = [_numbers(line.replace("\\,", ",")) for line in lines]
    found = [_numbers(_without(numbered, html.unescape(row))) for row in rows]
    if found != due:
        return Judged("", "numbers")
    if closing is not None and not set(_numbers(closing)) <= set().union(*due):
        return Judged("", "summary")
    if rows == [line.strip() for line in lines]:
        return Judged("", "unchanged")
    kept = rows if closing is None else [*rows, closing]
    return Judged("".join(f"{row}\n" for row in kept), None)


def _without(labels: Sequence[str], text: str) -> str:
    for label in labels:
        text = text.replace(label, "")
    return text


def _numbers(text: str) -> Counter[Decimal]:
    return Counter(Decimal(found) for found in _NUMBER.findall(_THOUSANDS.sub("", text)))

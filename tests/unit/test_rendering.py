"""Rendering: lines that can be read back, and each way to write numbers and times."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from html.parser import HTMLParser
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llm4es.errors import ConfigError
from llm4es.events import FieldValue
from llm4es.rendering import (
    FormatName,
    Renderer,
    RenderingSpec,
    TimeColumn,
    bucket_name,
    quantile_edges,
)
from llm4es.schema import EventSchema, QuantileBuckets, load_schema
from tests.histories import event, schema

FORMATS: tuple[FormatName, ...] = get_args(FormatName)
DAY = timedelta(days=1)

EVERY_KIND = """
name: notes
entities: {writer: {field: writer_id}}
event_time: {field: at}
types:
  note:
    fields:
      n: {kind: number, nullable: true}
      code: {kind: category}
      tags: {kind: categories, nullable: true}
      ok: {kind: flag}
      text: {kind: text, nullable: true}
"""

# What formats are made of, so that values which look like them come up at once.
TRICKY = st.text(st.sampled_from(list("ab \\,|;+-<>&\"'{}[]:#.\n\r\u0085\u2028")), max_size=6)
FORGED = st.sampled_from(
    [
        "null",
        "no",
        "1",
        "\\e",
        "\\0",
        "<i></i>",
        "a + b",
        "a, b",
        "a; b",
        "a | b",
        "</td><td>",
        '", "',
    ]
)
WORDS = TRICKY | st.text(max_size=12) | FORGED
NUMBERS = st.integers(-(10**6), 10**6)
VALUES = st.fixed_dictionaries(
    {
        "n": st.none()
        | st.integers(-(10**6), 10**6)
        | st.integers(-(10**6), 10**6).map(lambda n: n / 8),
        "code": WORDS,
        "tags": st.none() | st.lists(WORDS, max_size=3).map(tuple),
        "ok": st.booleans(),
        "text": st.none() | WORDS,
    }
)


@pytest.mark.parametrize("format_name", FORMATS)
@given(values=VALUES)
def test_a_line_can_be_read_back_whatever_its_values(
    format_name: FormatName, values: dict[str, FieldValue]
) -> None:
    renderer = Renderer(load_schema(EVERY_KIND), RenderingSpec(format=format_name, time=()))
    line = renderer.line(event(0, kind="note", fields=values), ()).text
    assert line.count("\n") == 1
    due = dict(values) | {"ok": "yes" if values["ok"] else "no"}
    if format_name == "table":  # the paper's has nothing to tell them apart by
        due |= {"tags": values["tags"] or None, "text": values["text"] or None}
    assert READERS[format_name](renderer.header, line) == due


@pytest.mark.parametrize("format_name", FORMATS)
@given(values=VALUES)
def test_spans_cover_a_line_but_its_terminator(
    format_name: FormatName, values: dict[str, FieldValue]
) -> None:
    spec = RenderingSpec(
        format=format_name, time=("gap", "weekday"), ratios=("n",), spells={"note": DAY}
    )
    renderer = Renderer(load_schema(EVERY_KIND), spec)
    line = renderer.line(event(0, kind="note", fields=values), ())
    assert [span.field for span in line.spans] == list(renderer.fields("note"))
    assert [span.start for span in line.spans] == [0, *(span.end for span in line.spans[:-1])]
    assert line.text[line.spans[-1].end :] == renderer.terminator
    assert len(re.findall(re.escape(renderer.terminator), line.text)) == 1


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 9)), max_size=12))
def test_a_line_is_the_same_alone_and_among_its_chapters(kinds: list[tuple[bool, int]]) -> None:
    spells = {"login": timedelta(minutes=2)}
    spec = RenderingSpec(time=("gap", "gap_log"), ratios=("amount",), spells=spells)
    renderer = Renderer(schema(), spec)
    events = [
        event(60 * at, fields={"amount": amount, "goods": "g1", "note": None})
        if payment
        else event(60 * at, kind="login")
        for at, (payment, amount) in enumerate(kinds)
    ]
    alone = [renderer.line(one, events[:index]) for index, one in enumerate(events)]
    assert renderer.lines(events) == alone
    for index, (one, line) in enumerate(zip(events, alone, strict=True)):
        assert renderer.text(one, events[:index]) == line.text
        assert len(line.text.encode()) <= renderer.longest(one)


@pytest.mark.parametrize("form", FORMATS)
@given(amount=st.floats(allow_nan=False, allow_infinity=False), note=st.text(max_size=30))
def test_no_line_is_longer_than_it_is_said_to_be(
    form: FormatName, amount: float, note: str
) -> None:
    spec = RenderingSpec(format=form, ratios=("amount",), spells={"payment": DAY})
    renderer = Renderer(schema(), spec)
    one = event(0, fields={"amount": amount, "goods": note, "note": note})
    assert len(renderer.text(one, [event(-1)]).encode()) <= renderer.longest(one)


@pytest.mark.parametrize(
    ("options", "value", "expected"),
    [
        ("", 3, "3"),
        ("", 0.1, "0.1"),
        (", decimals: 1", 2.25, "2.2"),
        (", significant: 2", 1234.5, "1200"),
        (", significant: 2", 0.0012345, "0.0012"),
        (", significant: 3", -99.97, "-100"),
        (", significant: 1", 0, "0"),
        (", buckets: [1, 10]", 10, "b2"),
        (", buckets: {log: 3}", 0, "0"),
        (", buckets: {log: 3}", 100, "100"),
        (", buckets: {log: 3}", 99.999, "46"),
        (", buckets: {log: 3}", -250, "-220"),
        (", buckets: {log: 3}", 0.00025, "0.00022"),
        (", buckets: {log: 1}", 2**64, "1e+19"),
        (", buckets: {log: natural}", 1.7, "0"),
        (", buckets: {log: natural}", 1.72, "1"),
        (", buckets: {log: natural}", -1000, "-6"),
        (", buckets: {log: natural}", 1e308, "709"),
    ],
)
def test_each_way_to_write_a_number(options: str, value: float, expected: str) -> None:
    renderer = Renderer(number_schema(options), RenderingSpec(time=()))
    assert renderer.line(event(0, kind="one", fields={"x": value}), ()).text == f"{expected}\n"


@given(st.integers(1, 20), st.floats(1e-9, 1e9), st.floats(1e-9, 1e9))
def test_log_buckets_rise_with_their_values(log: int, one: float, other: float) -> None:
    renderer = Renderer(number_schema(f", buckets: {{log: {log}}}"), RenderingSpec(time=()))
    low, high = (
        float(renderer.line(event(0, kind="one", fields={"x": x}), ()).text)
        for x in sorted((one, other))
    )
    assert low <= high
    assert low <= min(one, other) * 1.06  # names are rounded to two digits


def test_a_log_bucket_has_a_name_of_its_own() -> None:
    renderer = Renderer(number_schema(", buckets: {log: 20}"), RenderingSpec(time=()))
    values = [1.0001 * 10 ** (step / 20) for step in range(60)]
    lines = {renderer.line(event(0, kind="one", fields={"x": x}), ()).text for x in values}
    assert len(lines) == len(values)


def test_a_finer_upper_tail_has_edges_of_its_own() -> None:
    buckets = QuantileBuckets(quantiles=4, tail=(0.98, 0.99, 0.999))
    assert buckets.shares == (0.25, 0.5, 0.75, 0.98, 0.99, 0.999)
    edges = quantile_edges(np.arange(1001.0), buckets)
    assert edges.tolist() == pytest.approx([250, 500, 750, 980, 990, 999])
    asked = number_schema(", buckets: {quantiles: 4, tail: [0.98, 0.99, 0.999]}")
    renderer = Renderer(asked, RenderingSpec(time=()), {bucket_name("one", "x"): edges})
    lines = [
        renderer.line(event(0, kind="one", fields={"x": x}), ()).text for x in (760, 985, 2000)
    ]
    assert lines == ["b3\n", "b4\n", "b6\n"]


def test_edges_without_a_tail_are_what_they_were() -> None:
    values = np.random.default_rng(7).lognormal(size=500)
    edges = quantile_edges(values, QuantileBuckets(quantiles=24))
    assert edges.tolist() == np.unique(np.quantile(values, np.arange(1, 24) / 24)).tolist()
    assert quantile_edges([], QuantileBuckets(quantiles=4)).tolist() == [0.0]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (", significant: 2, decimals: 1", "significant and decimals exclude each other"),
        (", significant: 2, buckets: [1]", "significant and buckets exclude each other"),
        (", significant: 16", "significant: .*less than or equal to 15"),
        (", buckets: [2, 1]", "must rise"),
        (", buckets: []", "buckets"),
        (", buckets: {quantiles: 1}", "buckets.quantiles.quantiles: .*greater than or equal to 2"),
        (", buckets: {quantiles: 4, tail: [0.99, 0.98]}", "tail: .*rise strictly"),
        (", buckets: {quantiles: 4, tail: [1.5]}", "tail: .*between 0 and 1"),
        (", buckets: {log: 21}", "log"),
        (", buckets: {log: 3, tail: [0.99]}", "tail"),
    ],
)
def test_a_number_that_cannot_be_written_so_is_refused(options: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        number_schema(options)


def test_options_change_the_schemas_hash_and_their_absence_does_not() -> None:
    hashes = {
        number_schema(options).sha256
        for options in (
            "",
            ", significant: 2",
            ", significant: 3",
            ", buckets: {log: 3}",
            ", buckets: {log: natural}",
            ", buckets: {quantiles: 4}",
            ", buckets: {quantiles: 4, tail: [0.99]}",
        )
    }
    assert len(hashes) == 7
    assert number_schema(", significant: null").sha256 == number_schema("").sha256


@pytest.mark.parametrize("format_name", FORMATS)
def test_format_and_time_are_part_of_the_hash(format_name: FormatName) -> None:
    hashes = {
        Renderer(schema(), spec).sha256
        for spec in (
            RenderingSpec(),
            RenderingSpec(format=format_name, time=("gap_log",)),
            RenderingSpec(format=format_name, time=()),
        )
    }
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0.0"), (1, "0.3"), (9, "1.0"), (86_400, "4.9")]
)
def test_the_gaps_logarithm(seconds: float, expected: str) -> None:
    renderer = Renderer(schema(), RenderingSpec(time=("gap_log",)))
    first, second = renderer.lines([event(0), event(seconds)])
    assert first.text.split(", ")[1] == "-"
    assert second.text.split(", ")[1] == expected


def test_labels_that_a_keyed_format_could_not_tell_apart_are_refused() -> None:
    twice = load_schema(EVERY_KIND.replace("code: {", "code: {label: hour, "))
    Renderer(twice, RenderingSpec(format="markdown"))
    with pytest.raises(ConfigError, match="two columns of 'note' are called 'hour'"):
        Renderer(twice, RenderingSpec(format="json"))


def test_an_unknown_format_or_time_is_refused() -> None:
    with pytest.raises(ValueError, match="format"):
        RenderingSpec.model_validate({"format": "sql"})
    with pytest.raises(ValueError, match="time"):
        RenderingSpec.model_validate({"time": ["minute"]})
    columns: tuple[TimeColumn, ...] = ("hour", "hour")
    with pytest.raises(ValueError, match="names a column twice"):
        RenderingSpec(time=columns)


def number_schema(options: str) -> EventSchema:
    return load_schema(f"""
name: numbers
entities: {{owner: {{field: owner_id}}}}
event_time: {{field: at}}
types:
  one: {{fields: {{x: {{kind: number{options}}}}}}}
""")


Values = Mapping[str, FieldValue]
LABELS = ("n", "code", "tags", "ok", "text")


def read_json(_header: str, line: str) -> Values:
    return with_tuple(json.loads(line))


def read_yaml(header: str, line: str) -> Values:
    (found,) = yaml.safe_load(header + line)["notes"]
    return with_tuple(found)


def with_tuple(found: dict[str, Any]) -> Values:
    return {**found, "tags": None if found["tags"] is None else tuple(found["tags"])}


def read_cells(cells: Sequence[str]) -> Values:
    """Values of words that are escaped with a backslash."""
    assert len(cells) == len(LABELS)
    n, code, tags, ok, text = cells
    return {
        "n": float(n) if n else None,
        "code": plain(code),
        "tags": items(tags),
        "ok": ok,
        "text": None if text == "" else plain(text),
    }


def items(tags: str) -> tuple[str, ...] | None:
    if tags in {"", "\\0"}:
        return () if tags else None
    return tuple(plain(item) for item in unescaped_split(tags, " + "))


def unescaped_split(text: str, separator: str) -> list[str]:
    signs = re.findall(rf"\\.|{re.escape(separator)}|.", text, re.DOTALL)
    return "".join("\n" if sign == separator else sign for sign in signs).split("\n")


def plain(word: str) -> str:
    signs = {"n": "\n", "r": "\r", "e": ""}
    return re.sub(r"\\(.)", lambda found: signs.get(found[1], found[1]), word)


def read_table(_header: str, line: str) -> Values:
    return read_cells(unescaped_split(line.removesuffix("\n"), ", "))


def read_markdown(_header: str, line: str) -> Values:
    return read_cells(line.removeprefix("| ").removesuffix(" |\n").split(" | "))


def read_sentence(_header: str, line: str) -> Values:
    parts = unescaped_split(line.removesuffix(".\n"), "; ")
    return read_cells(
        [part.removeprefix(f"{label} is ") for part, label in zip(parts, LABELS, strict=True)]
    )


class Row(HTMLParser):
    """A row's cells as backslashed words, so that they are read as those of other formats."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        if tag == "td":
            self.cells.append("")
        elif tag in {"i", "ul"}:
            self.cells[-1] += {"i": "\\e", "ul": "\\0"}[tag]

    def handle_data(self, data: str) -> None:
        if self.cells and data != "\n":
            self.cells[-1] += data.replace("\\", "\\\\")

    def handle_entityref(self, name: str) -> None:
        self.cells[-1] += {"lt": "<", "gt": ">", "amp": "&"}[name]

    def handle_charref(self, name: str) -> None:
        self.cells[-1] += {"10": "\\n", "13": "\\r", "43": "\\+"}[name]


def read_html(_header: str, line: str) -> Values:
    row = Row()
    row.feed(line)
    row.close()
    return read_cells(row.cells)


READERS = {
    "json": read_json,
    "yaml": read_yaml,
    "html": read_html,
    "markdown": read_markdown,
    "sentence": read_sentence,
    "table": read_table,
}

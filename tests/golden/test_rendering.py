"""Byte-exact text: what the model was trained on must never change by accident."""

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llm4es.errors import ConfigError
from llm4es.rendering import Line, Renderer, RenderingSpec, TimeColumn
from llm4es.schema import canonical_json, load_schema
from tests.histories import SCHEMA_YAML, event, schema

ONE_TYPE = """
name: rides
entities: {rider: {field: rider_id}}
event_time: {field: at}
types:
  ride:
    fields:
      km: {kind: number, label: distance, unit: km, buckets: [1, 5, 20]}
      tags: {kind: categories, names: {n: night}}
      secret: {kind: text, render: false}
"""


def text(renderer: Renderer, seconds: list[float], **fields: float) -> list[str]:
    events = [
        event(s, fields={"amount": fields.get(f"a{i}", 10.0), "goods": "g1", "note": None})
        for i, s in enumerate(seconds)
    ]
    return [line.text for line in renderer.lines(events)]


def test_the_papers_table_with_several_types() -> None:
    renderer = Renderer(schema(), RenderingSpec(time=("gap", "hour"), ratios=("amount",)))
    assert renderer.header == (
        "payment: since previous|hour|amount (EUR)|goods|note|amount over median so far\n"
        "login: since previous|hour|device|ok\n"
    )
    events = [
        event(0),
        event(90, fields={"amount": 20, "goods": "g2", "note": 'a, b|c\\d\n"é"'}),
        event(3600 * 25, kind="login"),
        event(3600 * 26, fields={"amount": 0.0049, "goods": "g1", "note": ""}),
    ]
    assert [line.text for line in renderer.lines(events)] == [
        "payment, -, 12h, 9.99, groceries, , -\n",
        'payment, 1m, 12h, 20.00, g2, a\\, b\\|c\\\\d\\n"é", x2\n',
        "login, 1d, 13h, phone, yes\n",
        "payment, 1h, 14h, 0.00, groceries, , x0.016\n",
    ]


def test_one_type_needs_no_name_and_fields_that_are_not_rendered_stay_out() -> None:
    rides = load_schema(ONE_TYPE)
    renderer = Renderer(rides, RenderingSpec(time=()))
    assert renderer.header == "distance (km)|tags\n"
    ride = event(0, kind="ride", fields={"km": 5.0, "tags": ("n", "wet"), "secret": "s3cret"})
    assert renderer.line(ride, ()).text == "b2, night + wet\n"
    assert renderer.fields("ride") == ("km", "tags")


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("gap", ["-", "0m"]),
        ("hour", ["12h", "12h"]),
        ("weekday", ["Sun", "Sun"]),
        ("day", ["20513", "20513"]),
        ("date", ["2026-03-01", "2026-03-01"]),
        ("datetime", ["2026-03-01 12:00", "2026-03-01 12:00"]),
    ],
)
def test_each_time_column(column: TimeColumn, expected: list[str]) -> None:
    renderer = Renderer(schema(), RenderingSpec(time=(column,)))
    assert [line.split(", ")[1] for line in text(renderer, [0, 59])] == expected


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (timedelta(minutes=1), "1m"),
        (timedelta(minutes=59), "50m"),
        (timedelta(hours=1), "1h"),
        (timedelta(hours=23, minutes=59), "20h"),
        (timedelta(days=1), "1d"),
        (timedelta(days=365), "300d"),
    ],
)
def test_gaps_are_told_in_their_largest_unit(gap: timedelta, expected: str) -> None:
    renderer = Renderer(schema(), RenderingSpec(time=("gap",)))
    assert text(renderer, [0, gap.total_seconds()])[1].split(", ")[1] == expected


def test_a_spell_goes_on_until_none_of_its_type_came_for_longer_than_the_pause() -> None:
    spec = RenderingSpec(time=(), spells={"login": timedelta(days=3)})
    renderer = Renderer(schema(), spec)
    assert renderer.header == (
        "payment: amount (EUR)|goods|note|since first login of a spell\n"
        "login: device|ok|since first login of a spell\n"
    )
    day = 86_400
    events = [
        event(0),
        event(day, kind="login"),
        event(1.5 * day),
        event(4 * day, kind="login"),  # three days later, and no more
        event(7.5 * day),
        event(8 * day, kind="login"),
        event(9 * day),
        event(40 * day),
    ]
    assert [line.text.strip().rsplit(", ", 1)[1] for line in renderer.lines(events)] == [
        "-", "0h", "12h", "2.8d", "5.7d", "0h", "1d", "32d",
    ]  # fmt: skip


def test_a_spell_of_no_type_or_no_length_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rendering.spells: 'logon' is no event type"):
        Renderer(schema(), RenderingSpec(spells={"logon": timedelta(days=1)}))
    with pytest.raises(ValidationError, match="greater than 0"):
        RenderingSpec(spells={"login": timedelta(0)})


def test_two_columns_of_one_name_are_refused_in_every_format() -> None:
    hour = SCHEMA_YAML.replace("device: {kind: category}", "hour: {kind: category}")
    with pytest.raises(ConfigError, match="two columns of 'login' are named 'hour'"):
        Renderer(load_schema(hour), RenderingSpec(time=("hour",)))


def test_the_hash_of_a_rendering_without_spells_is_what_it_was_before_there_were_any() -> None:
    assert b"spells" not in canonical_json(RenderingSpec())
    choices: list[dict[str, Any]] = [{}, *({"spells": {"login": f"P{days}D"}} for days in (1, 2))]
    hashes = {Renderer(schema(), RenderingSpec(**each)).sha256 for each in choices}
    assert len(hashes) == 3


def test_spans_cover_a_line_but_its_terminator_and_own_the_separator_before_them() -> None:
    line = Renderer(schema(), RenderingSpec()).line(event(0), ())
    assert spelt(line) == {
        "type": "payment",
        "gap": ", -",
        "hour": ", 12h",
        "amount": ", 9.99",
        "goods": ", groceries",
        "note": ", ",
    }
    assert line.spans[-1].end == len(line.text) - 1


@given(st.text(max_size=50), st.text(max_size=50))
def test_no_value_can_forge_a_separator_or_collide_with_another(one: str, other: str) -> None:
    renderer = Renderer(schema(), RenderingSpec(time=()))
    lines = [
        renderer.line(event(0, fields={"amount": 1, "goods": a, "note": b}), ()).text
        for a, b in ((one, other), (other, one))
    ]
    assert all(line.count("\n") == 1 and line.endswith("\n") for line in lines)
    assert (lines[0] == lines[1]) == (one == other)


def test_learnt_buckets_are_asked_for_and_change_the_hash() -> None:
    learnt = load_schema(SCHEMA_YAML.replace("decimals: 2", "buckets: {quantiles: 4}"))
    with pytest.raises(ConfigError, match="learnt"):
        Renderer(learnt, RenderingSpec())
    name = "buckets.payment.amount"
    first = Renderer(learnt, RenderingSpec(), {name: np.array([1.0, 10.0])})
    second = Renderer(learnt, RenderingSpec(), {name: np.array([1.0, 11.0])})
    assert first.sha256 != second.sha256
    assert text(first, [0, 1], a0=0.5, a1=10.0)[0].split(", ")[3] == "b0"
    assert text(first, [0, 1], a0=0.5, a1=10.0)[1].split(", ")[3] == "b2"


def test_a_ratio_of_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="no number field"):
        Renderer(schema(), RenderingSpec(ratios=("goods",)))


def spelt(line: Line) -> dict[str, str]:
    return {span.field: line.text[span.start : span.end] for span in line.spans}

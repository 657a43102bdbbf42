"""Byte-exact lines of every format: enriched and plain text may be stored for years."""

import pytest

from llm4es.rendering import FormatName, Renderer, RenderingSpec
from llm4es.schema import load_schema
from tests.histories import SCHEMA_YAML, event, schema

LISTS = """
name: rides
entities: {rider: {field: rider_id}}
event_time: {field: at}
types:
  ride:
    fields:
      km: {kind: number, label: distance, unit: km, significant: 2}
      tags: {kind: categories, names: {n: night}}
"""

HEADERS = {
    "json": '{"log": "shop"}\n',
    "yaml": "shop:\n",
    "html": (
        "<table>\n"
        "<tr><th>payment</th><th>since previous</th><th>amount (EUR)</th><th>goods</th>"
        "<th>note</th></tr>\n"
        "<tr><th>login</th><th>since previous</th><th>device</th><th>ok</th></tr>\n"
    ),
    "markdown": (
        "| payment | since previous | amount (EUR) | goods | note |\n|---|---|---|---|---|\n"
        "| login | since previous | device | ok |\n|---|---|---|---|\n"
    ),
    "sentence": "shop, one event a line, oldest first:\n",
    "table": "payment: since previous|amount (EUR)|goods|note\nlogin: since previous|device|ok\n",
}

LINES = {
    "json": [
        (
            '{"type": "payment", "since previous": "-", "amount (EUR)": 9.99, '
            '"goods": "groceries", "note": null}\n'
        ),
        (
            '{"type": "payment", "since previous": "1m", "amount (EUR)": -20.00, '
            '"goods": "g2", "note": "a, b|c; \\\\d\\n<i>\\"é\\""}\n'
        ),
        '{"type": "login", "since previous": "1d", "device": "phone", "ok": "yes"}\n',
    ],
    "yaml": [
        (
            '- {type: payment, since previous: "-", amount (EUR): 9.99, '
            "goods: groceries, note: null}\n"
        ),
        (
            '- {type: payment, since previous: "1m", amount (EUR): -20.00, goods: g2, '
            'note: "a, b|c; \\\\d\\n<i>\\"é\\""}\n'
        ),
        '- {type: login, since previous: "1d", device: phone, ok: "yes"}\n',
    ],
    "html": [
        "<tr><td>payment</td><td>-</td><td>9.99</td><td>groceries</td><td></td></tr>\n",
        (
            "<tr><td>payment</td><td>1m</td><td>-20.00</td><td>g2</td>"
            '<td>a, b|c; \\d&#10;&lt;i&gt;"é"</td></tr>\n'
        ),
        "<tr><td>login</td><td>1d</td><td>phone</td><td>yes</td></tr>\n",
    ],
    "markdown": [
        "| payment | - | 9.99 | groceries |  |\n",
        '| payment | 1m | -20.00 | g2 | a, b\\|c; \\\\d\\n<i>"é" |\n',
        "| login | 1d | phone | yes |\n",
    ],
    "sentence": [
        "payment: since previous is -; amount (EUR) is 9.99; goods is groceries; note is .\n",
        (
            "payment: since previous is 1m; amount (EUR) is -20.00; goods is g2; "
            'note is a, b|c\\; \\\\d\\n<i>"é".\n'
        ),
        "login: since previous is 1d; device is phone; ok is yes.\n",
    ],
    "table": [
        "payment, -, 9.99, groceries, \n",
        'payment, 1m, -20.00, g2, a\\, b\\|c; \\\\d\\n<i>"é"\n',
        "login, 1d, phone, yes\n",
    ],
}

LISTED = {
    "json": '{"distance (km)": 13, "tags": ["night", "a+b", ""]}\n',
    "yaml": '- {distance (km): 13, tags: [night, a+b, ""]}\n',
    "html": "<tr><td>13</td><td>night + a&#43;b + <i></i></td></tr>\n",
    "markdown": "| 13 | night + a\\+b + \\e |\n",
    "sentence": "distance (km) is 13; tags is night + a\\+b + \\e.\n",
    "table": "13, night + a\\+b + \\e\n",
}


@pytest.mark.parametrize("format_name", LINES)
def test_every_format_to_the_byte(format_name: FormatName) -> None:
    renderer = Renderer(schema(), RenderingSpec(format=format_name, time=("gap",)))
    events = [
        event(0),
        event(90, fields={"amount": -20, "goods": "g2", "note": 'a, b|c; \\d\n<i>"é"'}),
        event(3600 * 25, kind="login"),
    ]
    assert renderer.header == HEADERS[format_name]
    assert [line.text for line in renderer.lines(events)] == LINES[format_name]


@pytest.mark.parametrize("format_name", LISTED)
def test_lists_and_schemas_of_one_type_to_the_byte(format_name: FormatName) -> None:
    renderer = Renderer(load_schema(LISTS), RenderingSpec(format=format_name, time=()))
    ride = event(0, kind="ride", fields={"km": 12.6, "tags": ("n", "a+b", "")})
    assert renderer.line(ride, ()).text == LISTED[format_name]


def test_hashes_of_what_was_rendered_before_there_were_formats() -> None:
    assert schema().sha256 == ("cd6cdd120e25d0b2faea023a08800f939697a387d95123e0f6bd36af96aed3cf")
    assert Renderer(schema(), RenderingSpec()).sha256 == (
        "041e2bf421c1cac5a7c1ec292d7a95125bd5ac72b99758f22e5cfa9f3bd0d0aa"
    )
    learnt = load_schema(SCHEMA_YAML.replace("decimals: 2", "buckets: {quantiles: 24}"))
    assert learnt.sha256 == "2004fe5ac66e7d2a8ed5d13f4bed0b92b6deee7de01df413fd78666c69fcf217"

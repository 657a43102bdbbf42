"""Propose an event schema from a sample of a log, as YAML with comments to edit.

What cannot be known from a sample (units, words for codes, what an entity is) is guessed from
names and values, and every guess says so. What looks like personal data or like a label is left
out.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from export.columns import Column, Fact, describe_column, epoch_unit, is_time, quoted
from export.records import parse_raw, parts_of, raw_batches, raw_records, sample_values
from llm4es.errors import ConfigError, InvalidEvent
from llm4es.events import coordinates_id
from llm4es.schema import load_schema

__all__ = ["Proposal", "propose_schema"]

_MOST_TYPES = 32
_ONCE = 0.95  # share of distinct values from which an id tells records, not entities
_FILLED = 0.99

_ENTITY = re.compile(
    r"customer|client|user|member|subscriber|patient|player|person|account|card|household|"
    r"(^|_)(uid|cl_id|entity|entity_id)(_|$)"
)
_OTHER_ENTITY = re.compile(
    r"terminal|merchant|shop|store|seller|driver|vehicle|(^|_)(atm|pos)(_|$)"
)
_EVENT_ID = re.compile(
    r"(event|transaction|tx|trx|payment|operation|message|record|order)_?(id|uuid|no)$|"
    r"^(id|uuid)$"
)
_TYPE = re.compile(r"^(type|event|event_?type|event_?name|kind|action)$")
_TIMES = (
    r"occurred",
    r"event_?time",
    r"event_?(ts|date)",
    r"(tx|trx|transaction|payment)_?(date_?time|time|ts|date)",
    r"timestamp",
    r"date_?time|dttm",
    r"(^|_)(time|ts|at)(_|$)",
    r"date",
    r"created",
    r"",
)
_NOT_TIMES = re.compile(r"record|receiv|ingest|load|updat|modif|availab|birth|dob|expir|valid|due")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A schema's YAML, and how much of the sample it reads."""

    yaml: str
    sampled: int
    parsed: int
    first_problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Roles:
    time: Column
    entities: Mapping[str, Column]  # the main one first
    event_id: Column | None
    type: Column | None


def propose_schema(
    path: Path, *, sample: int = 20_000, entity: str | None = None, time: str | None = None
) -> Proposal:
    """Propose a schema from the first `sample` records of a .parquet, .csv or .jsonl log.

    `entity` and `time` name the fields that hold these, where the guess would be wrong. The YAML
    loads with `load_schema`. Raises ConfigError for a log that cannot be read, and where no field
    looks like an entity's id or an event time.
    """
    files = parts_of(path)
    records = list(islice(sample_values(files), sample))
    if not records:
        raise ConfigError("events", f"{path} holds no record", "name a log")
    columns = _columns(records, text_only=files[0].suffix == ".csv")
    roles = _roles(columns, entity, time)
    text = "".join(f"{line}\n" for line in _lines(path, records, columns, roles))
    return _tried(text, files, sample, next(iter(roles.entities)))


def _columns(records: Sequence[Mapping[str, Any]], *, text_only: bool) -> dict[str, Column]:
    values: dict[str, list[Any]] = {}
    for number, record in enumerate(records):
        for name, value in record.items():
            values.setdefault(name, [None] * number).append(value)
        for held in values.values():
            if len(held) <= number:
                held.append(None)
    return {name: Column.of(name, held, text_only=text_only) for name, held in values.items()}


def _roles(columns: Mapping[str, Column], entity: str | None, time: str | None) -> _Roles:
    when = _named(columns, time, "time") if time else _time_column(columns)
    rest = {name: column for name, column in columns.items() if name != when.name}
    main = _named(rest, entity, "entity") if entity else _entity_column(rest)
    rest.pop(main.name)
    others = [
        column
        for name, column in rest.items()
        if _OTHER_ENTITY.search(name.lower()) and name.lower().endswith("id") and column.repeats
    ]
    event_ids = [
        column
        for name, column in rest.items()
        if _EVENT_ID.search(name.lower())
        and column.is_id
        and column.filled == 1
        and column.distinct >= _ONCE * column.rows
    ]
    types = [
        column
        for name, column in rest.items()
        if _TYPE.match(name.lower())
        and column.kind == "text"
        and column.filled == 1
        and 1 < column.distinct <= _MOST_TYPES
        and _splits(column, rest)
    ]
    return _Roles(
        time=when,
        entities={_entity_name(column.name): column for column in (main, *others)},
        event_id=event_ids[0] if event_ids else None,
        type=types[0] if types else None,
    )


def _named(columns: Mapping[str, Column], name: str, role: str) -> Column:
    if name not in columns:
        raise ConfigError(
            role, f"the log has no field {name!r}", f"choose from: {', '.join(columns)}"
        )
    return columns[name]


def _time_column(columns: Mapping[str, Column]) -> Column:
    times = [c for c in columns.values() if c.filled >= _FILLED and is_time(c)]
    for hint in _TIMES:
        for column in times:
            name = column.name.lower()
            if re.search(hint, name) and not _NOT_TIMES.search(name):
                return column
    if times:
        return times[0]
    raise ConfigError(
        "time",
        f"no field is ISO 8601 text, a timestamp or an epoch (there are: {', '.join(columns)})",
        "name the field with --time, or write times so",
    )


def _entity_column(columns: Mapping[str, Column]) -> Column:
    ids = [c for c in columns.values() if c.is_id and c.filled >= _FILLED and not is_time(c)]
    for column in ids:
        if _ENTITY.search(column.name.lower()) and column.distinct < _ONCE * column.rows:
            return column
    for column in ids:
        if column.name.lower().endswith("id") and column.repeats:
            return column
    raise ConfigError(
        "entity",
        f"no field looks like an entity's id (there are: {', '.join(columns)})",
        "name the field with --entity",
    )


def _entity_name(field: str) -> str:
    name = re.sub(r"\W", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", field).lower())
    name = re.sub(r"_?(id|uuid|key|code)$", "", name) or "entity"
    return name if name.isidentifier() else f"e_{name}"


def _splits(kind: Column, columns: Mapping[str, Column]) -> bool:
    """Whether some field is there in records of one type and never in those of another."""
    for column in columns.values():
        there = {t for t, v in zip(kind.cells, column.cells, strict=True) if v is not None}
        if 0 < len(there) < kind.distinct:
            return True
    return False


def _lines(
    path: Path,
    records: Sequence[Mapping[str, Any]],
    columns: Mapping[str, Column],
    roles: _Roles,
) -> Iterator[str]:
    stem = re.sub(r"\W+", "_", path.stem.lower()).strip("_")
    yield f"# Proposed by `python -m export schema` from the first {len(records):,} records of"
    yield f"# {path.name}. Read every line: guesses are from names and values alone. A schema is an"
    yield "# allow-list, what it does not name is never kept. docs/schema.md lists every key."
    yield f"name: {stem if re.match(r'[a-z]', stem) else f'log_{stem}'.rstrip('_')}"
    yield ""
    yield "entities:  # whom a record concerns; a bundle embeds one of them"
    for name, column in roles.entities.items():
        mean = column.rows * column.filled / max(column.distinct, 1)
        warning = (
            f"; looks like {column.personal}: hash it before it is logged"
            if column.personal
            else ""
        )
        yield (
            f"  {name}: {{field: {quoted(column.name)}}}"
            f"  # {column.distinct:,} of them, {mean:,.1f} records each{warning}"
        )
    if roles.event_id is not None:
        yield f"event_id: {quoted(roles.event_id.name)}  # {_twice(roles.event_id)}"
    else:
        yield "# event_id: FIELD  # none found: a record's place in the log will identify it"
    yield f"event_time: {_time(roles.time)}"
    if roles.type is not None:
        yield f"type_field: {quoted(roles.type.name)}"
    special = {column.name for column in (roles.time, *roles.entities.values())}
    special |= {column.name for column in (roles.event_id, roles.type) if column is not None}
    facts = {
        name: describe_column(column) for name, column in columns.items() if name not in special
    }
    yield ""
    yield "types:"
    if roles.type is None:
        yield from _type("event", facts, columns, [True] * len(records), "")
    else:
        for kind, count in roles.type.counts.most_common():
            chosen = [cell == kind for cell in roles.type.cells]
            yield from _type(kind, facts, columns, chosen, f"  # {count:,} records")
    left_out = [(name, fact.left_out) for name, fact in facts.items() if fact.left_out]
    if left_out:
        yield ""
        yield "# Left out:"
        yield from (f"#   {quoted(name)}: {reason}" for name, reason in left_out)


def _twice(column: Column) -> str:
    again = column.rows - column.distinct
    return f"{again:,} records repeat one: producers' duplicates" if again else "no two alike"


def _time(column: Column) -> str:
    unit = epoch_unit(column)
    form = f"format: epoch, unit: {unit}" if unit else "format: iso8601"
    return f"{{field: {quoted(column.name)}, {form}}}"


def _type(
    kind: str,
    facts: Mapping[str, Fact],
    columns: Mapping[str, Column],
    chosen: Sequence[bool],
    comment: str,
) -> Iterator[str]:
    yield f"  {quoted(kind)}:{comment}"
    lines = []
    for name, fact in facts.items():
        cells = [cell for cell, is_of in zip(columns[name].cells, chosen, strict=True) if is_of]
        missing = sum(cell is None for cell in cells)
        if fact.left_out or missing == len(cells):
            continue
        nullable = ", nullable: true" if missing else ""
        note = f"{missing:,} of {len(cells):,} are missing; " if missing else ""
        remark = (note + fact.comment).removesuffix("; ")
        lines.append(
            f"      {quoted(name)}: {{{fact.spec}{nullable}}}" + (f"  # {remark}" if remark else "")
        )
    yield "    fields:" if lines else "    fields: {}"
    yield from lines


def _tried(text: str, files: Sequence[Path], sample: int, entity: str) -> Proposal:
    """Read the sample by the proposal, as everything after it will."""
    schema = load_schema(text)
    field = schema.entity(entity).field
    sampled = parsed = 0
    first_problem = ""
    batches = (b for file in files for b in raw_batches(file, None, on_bad_row=lambda _row: None))
    raws = (raw for batch in batches for raw in raw_records(batch, schema, files[0].suffix))
    for number, raw in enumerate(islice(raws, sample)):
        sampled += 1
        try:
            parse_raw(raw, schema, entity=entity, coordinates=coordinates_id("sample", 0, number))
            parsed += 1
        except InvalidEvent as error:
            first_problem = first_problem or f"record {number}: {error} (entity field {field})"
    return Proposal(yaml=text, sampled=sampled, parsed=parsed, first_problem=first_problem)

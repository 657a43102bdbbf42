"""Logs larger than memory: one entity's history at a time.

Records are sorted by (entity, place in the log) in DuckDB, which spills to disk beyond its memory
limit, and become events only when their entity's turn comes. What is held in memory is DuckDB's
limit, a few batches, and one history.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import msgspec
import pyarrow as pa

from export.records import Raw, named_columns, parse_raw, parts_of, raw_batches, raw_records
from llm4es.errors import ConfigError, InvalidEvent
from llm4es.events import Event, coordinates_id, decode_object, entity_id_of
from llm4es.schema import EventSchema

__all__ = ["LogCounts", "iterate_histories", "sort_batches", "write_sorted_log"]

logger = logging.getLogger(__name__)

_KEY, _PART, _OFFSET = "_llm4es_key", "_llm4es_part", "_llm4es_offset"
_ROWS = 2048


@dataclass(slots=True, kw_only=True)
class LogCounts:
    """What a pass over a log has met; final when the pass has ended."""

    records: int = 0
    events: int = 0
    duplicates: int = 0
    without_entity: int = 0  # records that concern no entity of this kind
    invalid: int = 0
    first_problem: str = ""

    def refuse(self, problem: str) -> None:
        """Count a record that is no event."""
        self.invalid += 1
        self.first_problem = self.first_problem or problem

    def refuse_row(self, problem: str) -> None:
        """Count a row that is not even a record, which nothing else has counted."""
        self.records += 1
        self.refuse(problem)


def iterate_histories(
    path: Path,
    schema: EventSchema,
    *,
    entity: str,
    counts: LogCounts | None = None,
    memory_mb: int = 512,
) -> Iterator[tuple[str, tuple[Event, ...]]]:
    """Yield (entity id, its events ordered by key), by rising id, in flat memory.

    `path` is a .parquet, .csv or .jsonl file, or a folder of such parts. The rules are those of
    `read_log`: of two records with one identity the first in the log stands, a record that does
    not parse is skipped and counted in a warning. `counts` is filled on the way. Raises ConfigError
    for a log that cannot be read and for one that holds no event of the entity.
    """
    seen = LogCounts() if counts is None else counts
    field = schema.entity(entity).field
    files = parts_of(path)
    shape = _shape(files, schema, field)
    keyed = _keyed(files, shape, schema, field, seen)
    with sort_batches(shape, keyed, (_KEY, _PART, _OFFSET), memory_mb=memory_mb) as batches:
        rows = _rows(batches, schema, files[0].suffix)
        for entity_id, group in groupby(rows, key=itemgetter(0)):
            found: dict[tuple[object, ...], Event] = {}
            for _, part, offset, raw in group:
                at = coordinates_id(path.name, part, offset)
                try:
                    event = parse_raw(raw, schema, entity=entity, coordinates=at)
                except InvalidEvent as error:
                    seen.refuse(f"{files[part].name}, record {offset}: {error}")
                    continue
                seen.duplicates += event.key in found
                found.setdefault(event.key, event)
            if found:
                seen.events += len(found)
                yield entity_id, tuple(sorted(found.values(), key=lambda event: event.key))
    _report(seen, path, f"event of entity {entity!r}")


def write_sorted_log(
    path: Path, schema: EventSchema, out: Path, *, memory_mb: int = 512
) -> LogCounts:
    """Write the records of a log that are events, with the schema's fields alone, sorted by time.

    `out` is a .jsonl. A record counts as one when it is an event of any entity. Raises ConfigError
    as `iterate_histories` does.
    """
    seen = LogCounts()
    files = parts_of(path)
    shape = pa.schema(
        [("at", pa.timestamp("us", tz="UTC")), ("n", pa.int64()), ("value", pa.binary())]
    )

    def timed() -> Iterator[pa.RecordBatch]:
        number = 0
        for part, file in enumerate(files):
            for batch in raw_batches(file, named_columns(schema), on_bad_row=seen.refuse_row):
                kept = []
                for raw in raw_records(batch, schema, file.suffix):
                    number += 1
                    event = _any_event(raw, schema, coordinates_id(path.name, part, number), seen)
                    if event is not None:
                        kept.append((event.occurred_at, number, _allowed(raw, schema)))
                yield pa.RecordBatch.from_arrays(
                    [
                        pa.array(column, kind)
                        for column, kind in zip(zip(*kept, strict=True), shape.types, strict=True)
                    ]
                    if kept
                    else [pa.array([], kind) for kind in shape.types],
                    schema=shape,
                )
        seen.records += number

    with (
        sort_batches(shape, timed(), ("at", "n"), memory_mb=memory_mb) as batches,
        out.open("wb") as log,
    ):
        for batch in batches:
            for value in batch.column("value").to_pylist():
                seen.events += 1
                log.write(value + b"\n")
    _report(seen, path, "event")
    return seen


@contextmanager
def sort_batches(
    shape: pa.Schema,
    batches: Iterator[pa.RecordBatch],
    keys: tuple[str, ...],
    *,
    memory_mb: int,
) -> Iterator[Iterator[pa.RecordBatch]]:
    """Sort batches of one shape by columns, on disk where `memory_mb` do not do.

    What the source raises is raised here as it is; DuckDB's own errors become ConfigError.
    """
    raised: list[Exception] = []

    def watched() -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except Exception as error:
            raised.append(error)  # Arrow would hand on its text alone
            raise

    order = ", ".join(f'"{key}"' for key in keys)
    with TemporaryDirectory(prefix="llm4es-sort-") as spill:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "threads": 1,  # parsing, not sorting, is what takes time
            "memory_limit": f"{memory_mb}MB",
            "temp_directory": spill,
        }
        with duckdb.connect(config=settings) as database:
            database.execute("SET enable_progress_bar = false")  # it would be drawn on stdout
            try:
                source = database.from_arrow(pa.RecordBatchReader.from_batches(shape, watched()))
                yield source.order(order).to_arrow_reader(_ROWS)
            except (duckdb.Error, pa.ArrowException, OSError) as error:
                if raised:
                    raise raised[0] from None
                raise ConfigError(
                    "events", f"cannot be sorted ({error})", "free disk space (TMPDIR) or memory"
                ) from error


def _shape(files: tuple[Path, ...], schema: EventSchema, field: str) -> pa.Schema:
    """Columns that are sorted: the keys, then those of the files, which must agree."""
    names = named_columns(schema)
    found = []
    for file in files:
        first = next(raw_batches(file, names, on_bad_row=lambda _problem: None), None)
        if first is not None:
            found.append(first.schema.remove_metadata())
    if not found:
        raise ConfigError("events", f"{files[0].parent} holds no record", "name a log")
    if any(not each.equals(found[0]) for each in found):
        raise ConfigError("events", "parts differ in columns or types", "write them alike")
    if files[0].suffix != ".jsonl":
        _check_columns(found[0], schema, field, files[0])
    keys = [(_KEY, pa.string()), (_PART, pa.int32()), (_OFFSET, pa.int64())]
    return pa.schema([*(pa.field(*key) for key in keys), *found[0]])


def _check_columns(shape: pa.Schema, schema: EventSchema, field: str, file: Path) -> None:
    for name in (field, schema.event_time.field, schema.event_id, schema.type_field):
        if name is not None and name not in shape.names:
            raise ConfigError(
                name, f"{file} has no such column", "name a column that is there in the schema"
            )
    kind = shape.field(field).type
    if not (
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    ):
        raise ConfigError(field, f"an id is text or an integer, not {kind}", "write it so")


def _keyed(
    files: tuple[Path, ...], shape: pa.Schema, schema: EventSchema, field: str, counts: LogCounts
) -> Iterator[pa.RecordBatch]:
    for part, file in enumerate(files):
        offset = 0
        for batch in raw_batches(file, named_columns(schema), on_bad_row=counts.refuse_row):
            if file.suffix == ".jsonl":
                keys = pa.array(
                    _keys(batch, field, f"{file.name}, record", offset, counts), pa.string()
                )
            else:
                keys = batch.column(field).cast(pa.string())
                counts.without_entity += keys.null_count
            places = pa.array(range(offset, offset + batch.num_rows), pa.int64())
            parts = pa.array([part] * batch.num_rows, pa.int32())
            columns = [keys, parts, places, *batch.columns]
            keyed = pa.RecordBatch.from_arrays(columns, schema=shape)
            counts.records += batch.num_rows
            offset += batch.num_rows
            yield keyed.filter(keys.is_valid())


def _keys(
    batch: pa.RecordBatch, field: str, where: str, offset: int, counts: LogCounts
) -> Iterator[str | None]:
    for number, line in enumerate(batch.column("value").to_pylist(), start=offset):
        key = None
        try:
            document = decode_object(line)
            if document.get(field) is None:
                counts.without_entity += 1
            else:
                key = entity_id_of(document, field)
        except InvalidEvent as error:
            counts.refuse(f"{where} {number}: {error}")
        yield key


def _rows(
    batches: Iterator[pa.RecordBatch], schema: EventSchema, suffix: str
) -> Iterator[tuple[str, int, int, Raw]]:
    for batch in batches:
        keys = (batch.column(name).to_pylist() for name in (_KEY, _PART, _OFFSET))
        yield from zip(*keys, raw_records(batch, schema, suffix), strict=True)


def _any_event(raw: Raw, schema: EventSchema, at: str, counts: LogCounts) -> Event | None:
    problem = ""
    for entity in schema.entities:
        try:
            return parse_raw(raw, schema, entity=entity, coordinates=at)
        except InvalidEvent as error:
            problem = problem or str(error)
    counts.refuse(f"{at}: {problem}")
    return None


def _allowed(raw: Raw, schema: EventSchema) -> bytes:
    document: dict[str, Any] = decode_object(raw) if isinstance(raw, bytes) else raw
    names = named_columns(schema)
    return msgspec.json.encode(
        {name: value for name, value in document.items() if name in names and value is not None}
    )


def _report(counts: LogCounts, path: Path, what: str) -> None:
    if counts.invalid:
        logger.warning(
            "%d of %d records are no events and are left out (%s)",
            counts.invalid,
            counts.records,
            counts.first_problem,
        )
    if not counts.events:
        raise ConfigError(
            "events",
            f"{path} holds no {what} ({counts.records} records read)",
            "name a log that fits the schema",
        )

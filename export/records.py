"""Records: the files of a log as Arrow batches, and what `parse_event` or `parse_document` takes.

A log is one .parquet, .csv or .jsonl file, or a folder of such parts, read in the order of their
names. Only columns that an event schema names are read.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from llm4es.errors import ConfigError, InvalidEvent
from llm4es.events import Event, decode_object, parse_document, parse_event
from llm4es.schema import (
    CategoriesField,
    CategoryField,
    EventSchema,
    FieldSpec,
    FlagField,
    NumberField,
)

__all__ = [
    "SUFFIXES",
    "Raw",
    "named_columns",
    "parse_raw",
    "parts_of",
    "raw_batches",
    "raw_records",
    "sample_values",
]

Raw = bytes | dict[str, Any]  # a line of JSON, or a record that needs no decoding

SUFFIXES = (".parquet", ".csv", ".jsonl")

_ROWS = 4096
_CSV_BLOCK = 1 << 20
_LIST_SEPARATOR = "|"
_FLAGS = {"true": True, "false": False, "1": True, "0": False}


def parts_of(path: Path) -> tuple[Path, ...]:
    """Files of a log: itself, or those of a folder, which must be of one kind.

    Raises ConfigError for what is no log.
    """
    files = (
        sorted(each for each in path.iterdir() if each.suffix in SUFFIXES)
        if path.is_dir()
        else [path]
    )
    kinds = {file.suffix for file in files}
    if len(kinds) != 1 or not kinds <= set(SUFFIXES):
        found = ", ".join(sorted(kinds)) or "nothing"
        known = ", ".join(SUFFIXES)
        raise ConfigError(
            "events",
            f"{path} is no log ({found})",
            f"name a file, or a folder of parts, of: {known}",
        )
    for file in files:
        if not file.is_file():
            raise ConfigError("events", f"{file} is not there", "name a log")
    return tuple(files)


def named_columns(schema: EventSchema) -> frozenset[str]:
    """Every field that a schema reads: nothing else of a record leaves this module."""
    names = {key.field for key in schema.entities.values()} | {schema.event_time.field}
    names |= {name for name in (schema.event_id, schema.type_field) if name is not None}
    return frozenset(names.union(*(kind.fields for kind in schema.types.values())))


def raw_batches(
    file: Path, names: frozenset[str] | None, *, on_bad_row: Callable[[str], None]
) -> Iterator[pa.RecordBatch]:
    """Read a part in batches: columns of a table that are in `names` (None: all), or the one binary
    column `value` of a .jsonl. Cells of a .csv are text; its empty ones are null.

    `on_bad_row` is told of rows of a .csv that have another number of cells. Raises ConfigError.
    """  # noqa: D205 - the first sentence needs both lines
    try:
        if file.suffix == ".jsonl":
            yield from _lines(file)
        elif file.suffix == ".parquet":
            table = pq.ParquetFile(file)
            there = [n for n in table.schema_arrow.names if names is None or n in names]
            yield from map(_decoded, table.iter_batches(_ROWS, columns=there))
        else:
            yield from _cells(file, names, on_bad_row)
    except (OSError, pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise ConfigError("events", f"{file} cannot be read ({error})", "name a log") from error


def raw_records(batch: pa.RecordBatch, schema: EventSchema, suffix: str) -> Sequence[Raw]:
    """Records of a batch of `raw_batches`, with the values that JSON would have given."""
    if suffix == ".jsonl":
        lines: list[Raw] = batch.column("value").to_pylist()
        return lines
    names = [name for name in batch.schema.names if name in named_columns(schema)]
    columns = [
        _typed_text(batch.column(name).to_pylist(), _reader_of(name, schema))
        if suffix == ".csv"
        else _plain(batch.column(name), keep_time=name == schema.event_time.field)
        for name in names
    ]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def parse_raw(raw: Raw, schema: EventSchema, *, entity: str, coordinates: str) -> Event:
    """Make the event of a record. Raises InvalidEvent."""
    if isinstance(raw, bytes):
        return parse_event(raw, schema, entity=entity, coordinates=coordinates)
    return parse_document(raw, schema, entity=entity, coordinates=coordinates)


def sample_values(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Every field of each record, whatever it holds: what a schema is proposed from.

    Lines that are no JSON object are passed over. Times of columnar files stay `datetime`s.
    """
    for file in files:
        for batch in raw_batches(file, None, on_bad_row=lambda _problem: None):
            if file.suffix == ".jsonl":
                for line in batch.column("value").to_pylist():
                    with suppress(InvalidEvent):
                        yield decode_object(line)
                continue
            columns = [
                column.to_pylist() if file.suffix == ".csv" else _plain(column, keep_time=True)
                for column in batch.columns
            ]
            for row in zip(*columns, strict=True):
                yield dict(zip(batch.schema.names, row, strict=True))


def _lines(file: Path) -> Iterator[pa.RecordBatch]:
    with file.open("rb") as lines:
        held: list[bytes] = []
        for line in lines:
            held.append(line.rstrip(b"\r\n"))
            if len(held) == _ROWS:
                yield pa.RecordBatch.from_pydict({"value": pa.array(held, pa.binary())})
                held = []
        if held:
            yield pa.RecordBatch.from_pydict({"value": pa.array(held, pa.binary())})


def _decoded(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Spell dictionaries out: they differ from batch to batch, and a column must have one type."""
    columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _cells(
    file: Path, names: frozenset[str] | None, on_bad_row: Callable[[str], None]
) -> Iterator[pa.RecordBatch]:
    def skip(row: Any) -> str:  # noqa: ANN401 - pyarrow ships no types
        on_bad_row(f"{row.actual_columns} cells, {row.expected_columns} are due")
        return "skip"

    parse = pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip)
    read = pa_csv.ReadOptions(block_size=_CSV_BLOCK, use_threads=False)
    first = pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=lambda _row: "skip")
    header = pa_csv.open_csv(file, read_options=read, parse_options=first).schema.names
    there = [name for name in header if names is None or name in names]
    text = pa_csv.ConvertOptions(
        column_types=dict.fromkeys(there, pa.string()),
        include_columns=there,
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    for batch in pa_csv.open_csv(
        file, read_options=read, parse_options=parse, convert_options=text
    ):
        yield from (batch.slice(start, _ROWS) for start in range(0, batch.num_rows, _ROWS))


def _plain(column: pa.Array, *, keep_time: bool) -> list[Any]:
    """Values as `msgspec.json` would have written and read them; NaN is null."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        moments: list[Any] = column.cast(pa.timestamp("us", tz=kind.tz), safe=False).to_pylist()
        return moments if keep_time else [msgspec.to_builtins(moment) for moment in moments]
    values: list[Any] = column.to_pylist()
    if pa.types.is_floating(kind):
        return [v if v is not None and math.isfinite(v) else None for v in values]
    simple = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_string(kind)
    return values if simple else [msgspec.to_builtins(value) for value in values]


def _typed_text(cells: list[str | None], read: Callable[[str], Any]) -> list[Any]:
    return [None if cell is None else read(cell) for cell in cells]


def _reader_of(name: str, schema: EventSchema) -> Callable[[str], Any]:
    """How a cell of a .csv is read; one that does not fit stays text, and `parse_event` says so."""
    if name == schema.event_time.field:
        return _number if schema.event_time.format == "epoch" else str
    for kind in schema.types.values():
        if name in kind.fields:
            return _reader(kind.fields[name])
    return str


def _reader(spec: FieldSpec) -> Callable[[str], Any]:
    if isinstance(spec, NumberField) or (
        isinstance(spec, CategoryField) and spec.codes == "integer"
    ):
        return _number
    if isinstance(spec, FlagField):
        return lambda cell: _FLAGS.get(cell.strip().lower(), cell)
    if isinstance(spec, CategoriesField):
        return lambda cell: cell.split(_LIST_SEPARATOR)
    return str


def _number(cell: str) -> int | float | str:
    for read in (int, float):
        try:
            return read(cell)
        except ValueError:
            continue
    return cell

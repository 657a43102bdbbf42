"""Where data sets come from, what their files must look like, and the folder they become."""

import hashlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from llm4es.errors import ConfigError
from llm4es.schema import load_schema

__all__ = [
    "EVENTS",
    "Prepared",
    "Source",
    "Task",
    "copy_schema",
    "describe",
    "find",
    "find_all",
    "find_if_there",
    "read_table",
    "table_columns",
    "unpacked",
    "workbench",
    "write_query",
]

EVENTS = "events.parquet"

_BLOCK = 1 << 20
_BATCH = 1 << 14
_UTC = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A data set as its makers publish it. Nothing is downloaded: the user does that."""

    name: str
    title: str
    home: str  # where to get it
    licence: str
    citation: str
    expects: str  # files, as the documentation shows them
    archives: Mapping[str, str] = field(
        default_factory=dict
    )  # official archive -> MD5, where it is stable
    events: int | None = None  # documented size
    notes: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a label file asks. `inclusive`: events at the label's own time may be seen."""

    name: str
    file: str
    entity: str
    label: str = "label"
    inclusive: bool = True
    split: str = "fold"  # the column that says who is trained on
    lite: bool = False  # it has the columns lite and weight, for slow models
    metrics: tuple[str, ...] = ("roc_auc",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What stands in the folder."""

    folder: Path
    events: int
    labels: Mapping[str, int]  # file -> rows


def find_if_there(folder: Path, *names: str) -> Path | None:
    """The file of one of these names in `folder` or a folder below, plain or as .gz."""
    for name in names:
        for pattern in (name, f"{name}.gz", f"*/{name}", f"*/{name}.gz"):
            hits = sorted(folder.glob(pattern))
            if hits:
                return hits[0]
    return None


def find(source: Source, folder: Path, *names: str) -> Path:
    """Find as `find_if_there`. Raises ConfigError that says where to get the file and to put it."""
    hit = find_if_there(folder, *names)
    if hit is None:
        raise ConfigError(
            "from",
            f"{folder} holds no {' or '.join(names)}",
            f"get {source.title} at {source.home} and put {source.expects} into {folder}",
        )
    return hit


def find_all(source: Source, folder: Path, pattern: str) -> list[Path]:
    """Every file of a pattern, in `folder` or below. Raises ConfigError as `find` does."""
    hits = sorted(folder.glob(pattern)) or sorted(folder.glob(f"*/{pattern}"))
    if not hits:
        find(source, folder, pattern)
    return hits


@contextmanager
def unpacked(source: Source, folder: Path) -> Iterator[Path]:
    """Give a folder to read from: `folder`, or an official archive's content that lies in it.

    Raises ConfigError for an archive whose MD5 is not the documented one.
    """
    for name, md5 in source.archives.items():
        archive = folder / name
        if archive.is_file():
            if _md5(archive) != md5:
                raise ConfigError(
                    "from",
                    f"{archive} is not the published archive (MD5 {_md5(archive)}, {md5} is due)",
                    f"get it again at {source.home}",
                )
            with TemporaryDirectory(prefix="llm4es-unpack-") as content:
                zipfile.ZipFile(archive).extractall(content)
                yield Path(content)
            return
    yield folder


@contextmanager
def workbench(memory_mb: int = 1024) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database that keeps the order of files, and spills to disk beyond its memory."""
    with TemporaryDirectory(prefix="llm4es-prepare-") as spill:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "threads": 1,
            "memory_limit": f"{memory_mb}MB",
            "temp_directory": spill,
        }
        with duckdb.connect(config=settings) as database:
            database.execute("SET enable_progress_bar = false")  # it would be drawn on stdout
            try:
                yield database
            except duckdb.Error as error:
                raise ConfigError(
                    "from",
                    f"the files are not as published ({str(error).splitlines()[0]})",
                    "get them again (docs/datasets.md)",
                ) from error


def read_table(
    database: duckdb.DuckDBPyConnection,
    view: str,
    paths: Sequence[Path],
    columns: Sequence[str],
    *,
    delimiter: str = ",",
    header: bool = True,
    filename: bool = False,
) -> None:
    """Make a view of official text files, every cell as text.

    With a header, columns are taken by name (others are let be), else by place; `filename` adds
    the column of that name. Raises ConfigError for a file that lacks one.
    """
    files = [str(path) for path in paths]
    read = (
        database.read_csv(
            files,
            header=True,
            delimiter=delimiter,
            all_varchar=True,
            union_by_name=True,
            filename=filename,
        )
        if header
        else database.read_csv(
            files,
            header=False,
            delimiter=delimiter,
            all_varchar=True,
            names=list(columns),
            quotechar="",
        )
    )
    missing = [name for name in columns if name not in read.columns]
    if missing:
        raise ConfigError(
            "from",
            f"{paths[0]} has no column {', '.join(missing)} (it has {', '.join(read.columns)})",
            "get the published file (docs/datasets.md)",
        )
    read.create_view(view)


def table_columns(database: duckdb.DuckDBPyConnection, path: Path) -> list[str]:
    """Names in the header of a text file."""
    return list(database.read_csv(str(path), header=True, all_varchar=True).columns)


def write_query(database: duckdb.DuckDBPyConnection, query: str, out: Path) -> int:
    """Write a query's rows as Parquet, in its order, and say how many there were.

    Times are naive UTC in DuckDB and get their zone here.
    """
    reader: pa.RecordBatchReader = database.sql(query).to_arrow_reader(_BATCH)
    shape = pa.schema(
        [pa.field(f.name, _UTC if pa.types.is_timestamp(f.type) else f.type) for f in reader.schema]
    )
    rows = 0
    with pq.ParquetWriter(out, shape) as writer:
        for batch in reader:
            writer.write_table(pa.Table.from_batches([batch]).cast(shape))
            rows += batch.num_rows
    return rows


def copy_schema(
    resource: str, out: Path, names: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """Write a shipped event schema to `out`, with words for a category's codes where given.

    `names` maps a field to (code -> word), as official files define them.
    """
    text = files("export.datasets").joinpath(resource).read_text(encoding="utf-8")
    for name, words in (names or {}).items():
        filled = yaml.safe_dump(
            dict(words), allow_unicode=True, default_flow_style=True, width=10**6
        )
        text = text.replace(f"names: {{}}  # of {name}", f"names: {filled.strip()}")
    load_schema(text)
    out.write_text(text, encoding="utf-8")


def describe(source: Source, tasks: Sequence[Task], prepared: Prepared) -> None:
    """Write source.md for people and tasks.yaml for an evaluation."""
    size = f"{prepared.events:,} events"
    if source.events is not None:
        same = "as documented" if prepared.events == source.events else "NOT as documented"
        size += f" ({same}: {source.events:,})"
    labels = "".join(f"- {name}: {rows:,} rows\n" for name, rows in prepared.labels.items())
    archives = "".join(f"- {name}: MD5 {md5}\n" for name, md5 in source.archives.items())
    (prepared.folder / "source.md").write_text(
        f"# {source.title}\n\n"
        f"- Source: {source.home}\n- Licence: {source.licence}\n- Cite: {source.citation}\n"
        f"- {EVENTS}: {size}\n{labels}{archives}"
        f"\n{source.notes}\n\nPrepared by `python -m export prepare {source.name}`. "
        "Never commit it, or pass it on, unless the licence says you may.\n",
        encoding="utf-8",
    )
    document = [
        {
            "name": task.name,
            "file": task.file,
            "entity": task.entity,
            "label": task.label,
            "inclusive": task.inclusive,
            "split": task.split,
            "lite": task.lite,
            "metrics": list(task.metrics),
        }
        for task in tasks
        if task.file in prepared.labels
    ]
    text = yaml.safe_dump({"tasks": document}, sort_keys=False)
    (prepared.folder / "tasks.yaml").write_text(text, encoding="utf-8")


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()

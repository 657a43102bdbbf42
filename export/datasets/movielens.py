"""MovieLens-100K and 1M: GroupLens' own files, and a folder of Parquet as in ../shared/data."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import duckdb
import pyarrow as pa

from export.datasets.sources import (
    EVENTS,
    Prepared,
    Source,
    Task,
    copy_schema,
    describe,
    find,
    find_if_there,
    read_table,
    unpacked,
    workbench,
    write_query,
)
from llm4es.errors import ConfigError

__all__ = ["MOVIELENS_1M", "MOVIELENS_100K", "prepare_movielens_1m", "prepare_movielens_100k"]

_LICENCE = (
    "GroupLens' usage licence: research use with acknowledgement, no redistribution, no "
    "commercial use without permission"
)
_CITATION = "F. M. Harper, J. A. Konstan: The MovieLens Datasets, ACM TiiS 5(4), 2015"
_NOTES = (
    "Gender, age, occupation and zip code are no event fields: the labels come from them. Three "
    "events in four share their second with another of the same user, in an order without meaning."
)
MOVIELENS_100K = Source(
    name="movielens-100k",
    title="MovieLens-100K",
    home="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
    licence=_LICENCE,
    citation=_CITATION,
    expects="ml-100k.zip, or its u.data, u.item, u.genre and u.user",
    archives={"ml-100k.zip": "0e33842e24a9c977be4e0107933c0723"},
    events=100_000,
    notes=_NOTES,
)
MOVIELENS_1M = Source(
    name="movielens-1m",
    title="MovieLens-1M",
    home="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
    licence=_LICENCE,
    citation=_CITATION,
    expects="ml-1m.zip, or its ratings.dat, movies.dat and users.dat",
    archives={"ml-1m.zip": "c4d9eecfca2ab87c1945afe126590906"},
    events=1_000_209,
    notes=_NOTES + " Ages are classes (25 means 25 to 34), so that the age label is 35 and more.",
)

_LABELS = "labels.parquet"
_RATINGS = ("user_id", "item_id", "rating", "at_s")
_TITLE = re.compile(r"(.*?)\s*\((\d{4})\)\s*")
_FLAGS_FROM = 5  # first genre flag of a line of u.item

_EVENTS_SQL = """
    SELECT user_id, printf('%s-%05d', user_id, CAST(item_id AS INTEGER)) AS event_id,
        make_timestamp(CAST(at_s AS BIGINT) * 1000000) AS occurred_at, title,
        release_year, genres, CAST(rating AS TINYINT) AS rating
    FROM ratings JOIN items USING (item_id) ORDER BY occurred_at, event_id"""
_LABELS_SQL = """
    SELECT user_id, event_timestamp, label, {age}, CAST((row_number() OVER
        (PARTITION BY label ORDER BY md5(user_id), user_id) - 1) % 5 AS TINYINT) AS fold
    FROM (SELECT user_id, CAST(gender = 'F' AS TINYINT) AS label, CAST(age AS SMALLINT) AS age,
        make_timestamp((max(CAST(at_s AS BIGINT)) + 1) * 1000000) AS event_timestamp
        FROM ratings JOIN users USING (user_id) GROUP BY user_id, gender, age)
    ORDER BY event_timestamp, user_id"""


def prepare_movielens_100k(folder: Path, out: Path) -> Prepared:
    """Read u.data, u.item, u.genre and u.user, or events.parquet and labels.parquet."""
    source, old = MOVIELENS_100K, "label_age_ge_30"
    with workbench() as database, unpacked(source, folder) as place:
        if find_if_there(place, "u.data") is None and (place / EVENTS).is_file():
            events, labels = _from_parquet(database, place, out)
        else:
            ratings = find(source, place, "u.data")
            read_table(database, "ratings", [ratings], _RATINGS, delimiter="\t", header=False)
            users = find(source, place, "u.user")
            columns = ("user_id", "age", "gender", "occupation", "zip")
            read_table(database, "users", [users], columns, delimiter="|", header=False)
            genres = _lines(find(source, place, "u.genre"), "|")
            items = find(source, place, "u.item")
            _register_items(database, _items_100k(items, [name for name, *_ in genres]))
            events = write_query(database, _EVENTS_SQL, out / EVENTS)
            age = f"CAST(age >= 30 AS TINYINT) AS {old}"
            labels = write_query(database, _LABELS_SQL.format(age=age), out / _LABELS)
    return _finish(source, out, events, labels, old)


def prepare_movielens_1m(folder: Path, out: Path) -> Prepared:
    """Read ratings.dat, movies.dat and users.dat, whose cells are parted by `::`."""
    source, old = MOVIELENS_1M, "label_age_ge_35"
    with workbench() as database, unpacked(source, folder) as place:
        ratings = find(source, place, "ratings.dat")
        read_table(database, "ratings", [ratings], _RATINGS, delimiter="::", header=False)
        users = find(source, place, "users.dat")
        columns = ("user_id", "gender", "age", "occupation", "zip")
        read_table(database, "users", [users], columns, delimiter="::", header=False)
        movies = _lines(find(source, place, "movies.dat"), "::")
        _register_items(database, ((n, title, genres.split("|")) for n, title, genres in movies))
        events = write_query(database, _EVENTS_SQL, out / EVENTS)
        age = f"CAST(age >= 35 AS TINYINT) AS {old}"
        labels = write_query(database, _LABELS_SQL.format(age=age), out / _LABELS)
    return _finish(source, out, events, labels, old)


def _from_parquet(database: duckdb.DuckDBPyConnection, folder: Path, out: Path) -> tuple[int, int]:
    """Take events, labels and folds as they are; ids become text, genres a list."""
    database.read_parquet(str(folder / EVENTS)).create_view("ratings")
    database.read_parquet(str(folder / _LABELS)).create_view("target")
    events = write_query(
        database,
        """SELECT CAST(entity_id AS VARCHAR) AS user_id,
            printf('%d-%05d', entity_id, item_id) AS event_id,
            make_timestamp(epoch_us(event_time)) AS occurred_at, title, release_year,
            list_filter(string_split(genres, ', '), lambda genre: genre <> '') AS genres, rating
        FROM ratings ORDER BY occurred_at, event_id""",
        out / EVENTS,
    )
    labels = write_query(
        database,
        """SELECT CAST(entity_id AS VARCHAR) AS user_id,
            make_timestamp(epoch_us(event_timestamp)) AS event_timestamp, label, label_age_ge_30,
            fold
        FROM target ORDER BY event_timestamp, user_id""",
        out / _LABELS,
    )
    return events, labels


def _items_100k(path: Path, genres: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    for cells in _lines(path, "|"):
        flags = cells[_FLAGS_FROM:]
        if len(flags) != len(genres):
            raise ConfigError(
                "from",
                f"{path} has {len(flags)} genres, u.genre {len(genres)}",
                f"get both at {MOVIELENS_100K.home}",
            )
        named = [name for name, flag in zip(genres, flags, strict=True) if flag == "1"]
        yield cells[0], cells[1], named


def _register_items(
    database: duckdb.DuckDBPyConnection, items: Iterable[tuple[str, str, list[str]]]
) -> None:
    rows = []
    for item_id, full, genres in items:
        parts = _TITLE.fullmatch(full)
        title, year = (parts[1], int(parts[2])) if parts else (full.strip(), None)
        rows.append({"item_id": item_id, "title": title, "release_year": year, "genres": genres})
    shape = pa.schema(
        [
            ("item_id", pa.string()),
            ("title", pa.string()),
            ("release_year", pa.int16()),
            ("genres", pa.list_(pa.string())),
        ]
    )
    database.register("items", pa.Table.from_pylist(rows, schema=shape))


def _lines(path: Path, separator: str) -> list[list[str]]:
    """Cells of an official file, which is in Latin-1."""
    text = path.read_text(encoding="latin-1")
    return [line.split(separator) for line in text.splitlines() if line]


def _finish(source: Source, out: Path, events: int, labels: int, old: str) -> Prepared:
    copy_schema("movielens.yaml", out / "schema.yaml")
    prepared = Prepared(folder=out, events=events, labels={_LABELS: labels})
    tasks = [
        Task(name="gender", file=_LABELS, entity="user"),
        Task(name=old.removeprefix("label_"), file=_LABELS, entity="user", label=old),
    ]
    describe(source, tasks, prepared)
    return prepared

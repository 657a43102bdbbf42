"""Feast's paths: what ours cost beside stock Feast's, and beside what the stores can do at all.

    python -m benchmarks.feast_paths [--json] [--only offline|join|redis|sqlite]

Medians of one run, baselines and ours taken in turns. Needs `redis-server`.

    flush_1000_over_1     seconds per row of the 1,000th flush of the offline log over the 1st
    pit_over_duckdb       100,000 entity rows x 1,000,000 feature rows x 64: ours over stock DuckDB
    pit_over_dask         2,000 x 20,000 x 64 (dask does not end on more): ours over stock dask
    redis_write_vs_push   rows/s in batches of 16 at 384 dimensions: ours over FeatureStore.push
    redis_write_vs_raw    the same over a pipelined HSET of the same bytes, made before
    sqlite_write_vs_push  the same on SQLite over push
    sqlite_write_vs_raw   the same over an upsert of the same table rows, made before, unchecked
    ..._push_of_20        both again, in a repository of 20 more views: push reads all it has
    read_vs_feast         100 entities: seconds of get_online_features over EmbeddingReader's
    read_over_raw         EmbeddingReader's seconds over a pipelined HMGET of the same bytes
"""

import json
import resource
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import typer
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, PushSource
from feast.data_source import PushMode
from feast.types import Array, Float32
from feast.value_type import ValueType
from pyarrow import parquet
from redis import Redis
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from dev.servers import RedisServer
from llm4es.events import TopicPartition
from llm4es.feast import EmbeddingReader, define, open_sink, served_view
from llm4es.feast.definitions import ViewSpec, make_service, view_tags
from llm4es.feast.journal import OfflineJournal
from llm4es.feast.online import ViewTarget, encode_row, encode_timestamp
from llm4es.feast.parts import list_parts, rows_to_batch, write_parts
from llm4es.feast.redis_rows import RedisRows
from llm4es.feast.sqlite_rows import SqliteRows
from llm4es.features import FeatureRow
from tests.feast_parts import make_repo, make_spec

DIM = 384
START = datetime(2026, 3, 1, tzinfo=UTC)
OURS = "llm4es.feast.offline_log.LogOfflineStore"
BATCH, READ = 16, 100
FLUSHES, FLUSHED_ROWS, ENDS = 1_000, 200, 50
JOIN_DIM = 64
OTHERS = 20  # views of others
EVENTS = TopicPartition("events", 0)  # of the marks that a worker's writes leave

console = Console(stderr=True)
Figures = dict[str, float]


def main(
    *,
    only: Annotated[str | None, typer.Option(help="offline, join, redis or sqlite")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Measure, and print the figures."""
    warnings.simplefilter("ignore")  # Feast's own deprecations
    parts: dict[str, Callable[[Path], tuple[Figures, Figures]]] = {
        "offline": offline,
        "join": joins,
        "redis": redis,
        "sqlite": sqlite,
    }
    ratios: Figures = {}
    figures: Figures = {}
    for name, measure in parts.items():
        if only in {None, name}:
            folder = Path(tempfile.mkdtemp(prefix="feast-paths-"))
            try:
                with console.status(name):
                    found = measure(folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            ratios |= found[0]
            figures |= found[1]
    if as_json:
        typer.echo(json.dumps({"ratios": ratios, "figures": figures, "machine": machine()}))
        return
    for title, values in (("ratios", ratios), ("figures of this machine", figures)):
        table = Table("figure", "value", title=title)
        table.columns[1].justify = "right"
        for name, value in values.items():
            table.add_row(name, f"{value:,.2f}")
        Console().print(table)


def rows(spec: ViewSpec, count: int, *, step: int = 0, entities: int = 10_000) -> list[FeatureRow]:
    """Rows of one batch: entities in turn, each later than the batch before."""
    rng = np.random.default_rng(step)
    vectors = rng.normal(size=(count, spec.manifest.dim)).astype(np.float32)
    surprise = rng.normal(size=(count, len(spec.surprise_columns))).astype(np.float32)
    return [
        FeatureRow(
            entity_id=f"customer-{(step * count + n) % entities}",
            as_of=START + timedelta(seconds=step, microseconds=n),
            embedding=vectors[n],
            surprise=surprise[n],
            surprise_last=0.5,
            event_count=step + 1,
            last_event_id=f"event-{step}-{n}",
            last_event_time=START + timedelta(seconds=step),
            bundle_id=spec.manifest.id,
        )
        for n in range(count)
    ]


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turns(works: Sequence[Callable[[int], object]], repeats: int) -> list[float]:
    """Median seconds of each, all once in every round; a round before is not counted.

    Each round has an order of its own: what comes after a long work finds caches cold, and is the
    first to be put aside on a machine that others use.
    """
    taken: list[list[float]] = [[] for _ in works]
    order = np.random.default_rng(0)
    for number in range(repeats + 1):
        for index in order.permutation(len(works)):
            taken[index].append(timed(partial(works[index], number)))
    return [median(each[1:]) for each in taken]


def offline(folder: Path) -> tuple[Figures, Figures]:
    """Flushes of the offline log, one part each."""
    spec = make_spec(folder / "bundle", dim=DIM)
    log = folder / "log"
    journal = OfflineJournal(
        log, join_key="customer_id", writer_id="bench", roll_rows=10**9, roll_s=10**6
    )
    taken, rss = [], []
    for number in range(FLUSHES):
        batch = rows(spec, FLUSHED_ROWS, step=number)
        first = number * FLUSHED_ROWS
        span = {EVENTS: (first, first + FLUSHED_ROWS)}

        def flush(batch: list[FeatureRow] = batch, span: Any = span) -> None:  # noqa: ANN401
            journal.append(batch, span)
            journal.roll()

        taken.append(timed(flush))
        if number in {ENDS, FLUSHES - 1}:
            rss.append(resident_mb())
    journal.close()
    size = sum(part.stat().st_size for part in list_parts(log))
    before, last = (median(each) for each in (taken[1 : ENDS + 1], taken[-ENDS:]))
    width = len(spec.surprise_columns) + DIM
    return {"flush_1000_over_1": last / before}, {
        "flush_ms_of_200_rows": last * 1000,
        "flush_rss_grown_mb": rss[1] - rss[0],
        "bytes_per_row": size / (FLUSHES * FLUSHED_ROWS),
        "bytes_per_row_of_floats_alone": width * 4.0,
    }


def resident_mb() -> float:
    """Memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def joins(folder: Path) -> tuple[Figures, Figures]:
    """The point-in-time join, ours on parts by day and stock's on the one file it writes."""
    large, small = (folder / "large", folder / "small")
    asked, stores = join_world(large, 1_000_000, 100_000, ("duckdb",))
    ours, duckdb = in_turns([lambda _, s=store: fetch(s, asked) for store in stores], 3)  # type: ignore[misc]
    few, others = join_world(small, 20_000, 2_000, ("dask",))
    ours_small, dask = in_turns([lambda _, s=store: fetch(s, few) for store in others], 1)  # type: ignore[misc]
    return {"pit_over_duckdb": ours / duckdb, "pit_over_dask": ours_small / dask}, {
        "pit_100k_x_1m_s": ours,
        "pit_100k_x_1m_duckdb_s": duckdb,
        "pit_2k_x_20k_s": ours_small,
        "pit_2k_x_20k_dask_s": dask,
    }


def fetch(store: FeatureStore, asked: pd.DataFrame) -> None:
    """What a training job fetches."""
    store.get_historical_features(entity_df=asked, features=["view:embedding"]).to_arrow()


def join_world(
    folder: Path, feature_rows: int, entity_rows: int, others: Sequence[str]
) -> tuple[pd.DataFrame, list[FeatureStore]]:
    """The same rows for each store, ours first: 30 days of an entity each 50 rows."""
    rng = np.random.default_rng(8)
    days, entities = 30, feature_rows // 50
    start = int(START.timestamp() * 1e6)
    moments = np.sort(rng.integers(0, days * 86_400_000_000, feature_rows)) + start
    flat = rng.normal(size=feature_rows * JOIN_DIM).astype(np.float32)
    offsets = np.arange(0, len(flat) + 1, JOIN_DIM, dtype=np.int32)
    table = pa.table(
        {
            "customer_id": [f"c{n}" for n in rng.integers(entities, size=feature_rows)],
            "event_timestamp": pa.array(moments, pa.timestamp("us", "UTC")),
            "embedding": pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat)),
        }
    )
    asked = pd.DataFrame(
        {
            "customer_id": [f"c{n}" for n in rng.integers(entities, size=entity_rows)],
            "event_timestamp": pd.to_datetime(
                rng.integers(0, days * 86_400_000_000, entity_rows) + start, unit="us", utc=True
            ),
        }
    )
    stores = []
    for offline_store in (OURS, *others):
        repo = make_repo(folder / offline_store, offline=offline_store)
        place = repo / "data/view"
        place.parent.mkdir()
        if offline_store == OURS:
            step = max(1, feature_rows // 50)
            for number, at in enumerate(range(0, feature_rows, step)):
                write_parts(place, f"part-{number}", table.slice(at, step))
        else:
            place = place.with_suffix(".parquet")
            parquet.write_table(table, place)
        stores.append(FeatureStore(repo_path=str(repo)))
        entity = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
        source = FileSource(name="log", path=str(place), timestamp_field="event_timestamp")
        view = FeatureView(
            name="view",
            entities=[entity],
            schema=[Field(name="embedding", dtype=Array(Float32))],
            source=source,
            ttl=timedelta(days=10),
        )
        stores[-1].apply([entity, source, view])
    return asked, stores


def online_world(folder: Path, redis_url: str | None) -> tuple[FeatureStore, ViewSpec]:
    """Our view on a push source, so that stock `push` can write it, too."""
    spec = make_spec(folder / "bundle", dim=DIM)
    store = FeatureStore(repo_path=str(make_repo(folder / "repo", redis_url=redis_url)))
    made = define(spec, topic="t", bootstrap_servers="b:1", offline_path="data/log")
    view = FeatureView(
        name=made.view.name,
        entities=[made.entity],
        schema=made.view.schema,
        source=PushSource(name="push", batch_source=made.view.batch_source),
        tags=view_tags(spec),
    )
    store.apply([made.entity, view, make_service(view)])
    return store, spec


def among_others(
    store: FeatureStore, spec: ViewSpec, write: Callable[[int], object], name: str
) -> Figures:
    """Rows/s of our writes over push's, where the repository has views of others too."""
    (ours,) = store.list_feature_views()
    entity = store.get_entity(ours.entities[0])
    store.apply(
        [
            FeatureView(
                name=f"other_{number}",
                entities=[entity],
                schema=ours.schema,
                source=ours.batch_source,
            )
            for number in range(OTHERS)
        ]
    )
    pushed = frames(spec, 31, first=1_000)
    push, written = in_turns(
        [lambda n: store.push("push", pushed[n], to=PushMode.ONLINE), write], len(pushed) - 1
    )
    return {f"{name}_write_vs_push_of_{OTHERS}": push / written}


def frames(spec: ViewSpec, count: int, *, first: int = 0) -> list[pd.DataFrame]:
    """Batches for `push`, as data frames, of entities of its own: it leaves out what is not new."""
    found = []
    for number in range(first, first + count):
        frame = rows_to_batch(rows(spec, BATCH, step=number), "customer_id").to_pandas()
        frame["customer_id"] = "pushed-" + frame["customer_id"]
        frame["event_timestamp"] = frame["event_timestamp"].astype("datetime64[ns, UTC]")
        found.append(frame)
    return found


def redis(folder: Path) -> tuple[Figures, Figures]:
    """Writes and reads on a Redis of its own."""
    with RedisServer(folder / "redis") as server:
        store, spec = online_world(folder, server.address)
        sink = open_sink(folder / "repo", spec, writer_id="bench")
        repeats = 150
        pushed = frames(spec, repeats + 1)
        ours = [rows(spec, BATCH, step=10_000 + n) for n in range(repeats + 1)]
        view = store.get_feature_view(sink._target.view.name)  # noqa: SLF001
        target = ViewTarget(store, view, "customer_id")
        encoder = RedisRows(target)
        again = [
            [replace(each, entity_id=f"raw-{each.entity_id}") for each in batch] for batch in ours
        ]
        prepared = [[hash_of(encoder, target, each) for each in batch] for batch in again]
        client: Any = Redis.from_url(server.url, socket_timeout=5)  # as the repository has it

        def raw_write(number: int) -> None:
            pipe = client.pipeline(transaction=False)
            for key, values in prepared[number]:
                pipe.execute_command("HSET", key, *values)
            pipe.execute()

        push, write, raw = in_turns(
            [
                lambda n: store.push("push", pushed[n], to=PushMode.ONLINE),
                lambda n: sink.publish(ours[n], reached={EVENTS: n + 1}),
                raw_write,
            ],
            repeats,
        )
        later = [rows(spec, BATCH, step=15_000 + n) for n in range(repeats)]
        others = among_others(store, spec, lambda n: sink.publish(later[n]), "redis")
        there = rows(spec, READ, step=20_000)
        sink.publish(there)
        found = reads(store, [each.entity_id for each in there], client)
        client.close()
        encoder.close()
        sink.close()
    read_ratios, read_figures = found
    ratios = {"redis_write_vs_push": push / write, "redis_write_vs_raw": raw / write}
    return ratios | others | read_ratios, {
        "redis_push_rows_s": BATCH / push,
        "redis_write_rows_s": BATCH / write,
        "redis_raw_rows_s": BATCH / raw,
    } | read_figures


def hash_of(encoder: RedisRows, target: ViewTarget, each: FeatureRow) -> tuple[bytes, list[bytes]]:
    """Key of a row's hash, and its fields and values, as ours writes them."""
    pairs = [encoder._timestamp_field, encode_timestamp(each.as_of)[2]]  # noqa: SLF001
    values = encode_row(each, target)
    for name, field in encoder._fields.items():
        pairs += [field, values[name]]
    return encoder._key(each.entity_id), pairs  # noqa: SLF001


def reads(store: FeatureStore, ids: list[str], client: Any) -> tuple[Figures, Figures]:  # noqa: ANN401
    """A hundred entities: stock Feast, our reader, and the bare command."""
    reader = EmbeddingReader(store, served_view(store, "customer"))
    keys = [reader._key(each) for each in ids]  # noqa: SLF001
    fields = reader._fields
    service = store.get_feature_service("customer_llm4es")
    entity_rows = [{"customer_id": each} for each in ids]

    def raw_read(_: int) -> None:
        pipe = client.pipeline(transaction=False)
        for key in keys:
            pipe.execute_command("HMGET", key, *fields)
        pipe.execute()

    feast, ours, raw = in_turns(
        [
            lambda _: store.get_online_features(
                features=service, entity_rows=entity_rows
            ).to_dict(),
            lambda _: reader.read(ids),
            raw_read,
        ],
        200,
    )
    reader.close()
    return {"read_vs_feast": feast / ours, "read_over_raw": ours / raw}, {
        "read_feast_ms": feast * 1000,
        "read_ms": ours * 1000,
        "read_raw_ms": raw * 1000,
    }


def sqlite(folder: Path) -> tuple[Figures, Figures]:
    """Writes on SQLite."""
    store, spec = online_world(folder, None)
    sink = open_sink(folder / "repo", spec, writer_id="bench")
    repeats = 40
    pushed = frames(spec, repeats + 1)
    ours = [rows(spec, BATCH, step=10_000 + n) for n in range(repeats + 1)]
    view = store.get_feature_view(sink._target.view.name)  # noqa: SLF001
    encoder = SqliteRows(ViewTarget(store, view, "customer_id"))
    again = [[(f"raw-{each.entity_id}", each) for each in batch] for batch in ours]
    prepared = [
        list(chain(*(encoder._table_rows(encoder._key(name), each) for name, each in batch)))  # noqa: SLF001
        for batch in again
    ]
    client = encoder._connection  # noqa: SLF001 - with the settings of ours

    def raw_write(number: int) -> None:
        client.execute("BEGIN IMMEDIATE")
        client.executemany(encoder._upsert, prepared[number])  # noqa: SLF001
        client.execute("COMMIT")

    push, write, raw = in_turns(
        [
            lambda n: store.push("push", pushed[n], to=PushMode.ONLINE),
            lambda n: sink.publish(ours[n], reached={EVENTS: n + 1}),
            raw_write,
        ],
        repeats,
    )
    later = [rows(spec, BATCH, step=15_000 + n) for n in range(repeats)]
    others = among_others(store, spec, lambda n: sink.publish(later[n]), "sqlite")
    encoder.close()
    sink.close()
    return {"sqlite_write_vs_push": push / write, "sqlite_write_vs_raw": raw / write} | others, {
        "sqlite_push_rows_s": BATCH / push,
        "sqlite_write_rows_s": BATCH / write,
        "sqlite_raw_rows_s": BATCH / raw,
    }


if __name__ == "__main__":
    typer.run(main)

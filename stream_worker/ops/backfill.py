"""`backfill`: a complete log into fresh windows and current rows, by one process or by Ray.

Records are cut into buckets by entity; each is folded and embedded whole, from nothing, by the
worker's own code. Buckets lie on disk, and a few at a time are in memory. One process writes: rows
to the offline log and online, then windows, and the offsets last of all. So a backfill that was
killed is begun anew and passes over what stands, and workers go on where it ended.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
from rich.console import Console
from rich.progress import track

from llm4es.bundle import load_bundle
from llm4es.engine import open_embedder
from llm4es.errors import ConfigError
from llm4es.events import Record, TopicPartition
from llm4es.feast import FeastSink
from llm4es.features import FeatureRow, view_name
from llm4es.windows import Outcome
from stream_worker.assembly import assembled_around, value_format_of, worker_policy
from stream_worker.formats.decoding import ValueFormat
from stream_worker.ops.buckets import BucketReader, Filled, Opener, fill_here
from stream_worker.ops.disk_buckets import DiskBuckets
from stream_worker.ops.locking import locked
from stream_worker.ops.logs import ReplayableLog
from stream_worker.ops.ray_pool import ray_pool
from stream_worker.settings import WorkerSettings
from stream_worker.worker import Parts

__all__ = ["BACKFILLS", "Backfilled", "Engine", "backfill", "run_backfill"]

BACKFILLS = "backfills"  # in the state folder: records of those under way
Engine = Literal["process", "ray"]
_POLLED = 10_000

Fill = Callable[[Iterable[Sequence[Record]]], Iterator[Filled]]


@dataclass(frozen=True, slots=True)
class Backfilled:
    """What was done."""

    records: int
    entities: int
    rows: int
    dead_letters: int
    passed_over: int  # entities that stood already
    outcomes: Mapping[str, int]


def run_backfill(
    settings: WorkerSettings, *, engine: Engine, actors: int | None, as_json: bool
) -> None:
    """Backfill the bundle's view and windows, and print what was done."""
    bundle = load_bundle(settings.bundle)
    unused = cast("Any", None)  # the model is opened where buckets are read
    gpus = 1 if settings.device in {"cuda", "tensorrt"} else 0
    with assembled_around(settings, bundle, lambda _: unused) as built:
        form = value_format_of(settings, cast("FeastSink", built.parts.sink))
        opener = _opener(settings, form, threads=1 if engine == "ray" else settings.threads)
        folder = settings.state_dir / BACKFILLS / view_name(bundle.manifest.entity, bundle.id)
        with locked(folder, "backfill"), _filling(opener, engine, actors, gpus) as fill:
            done = backfill(built.parts, fill, folder / "buckets")
    if as_json:
        print(msgspec.json.encode(asdict(done)).decode())  # noqa: T201 - the result
    else:
        Console().print(
            f"{done.records:,} records, {done.entities:,} entities, {done.rows:,} rows, "
            f"{done.dead_letters:,} dead letters; {done.passed_over:,} entities stood already"
        )


def backfill(parts: Parts, fill: Fill, folder: Path) -> Backfilled:
    """Carry a complete log through to rows and windows; `folder` holds it meanwhile, by bucket.

    Raises ConfigError where the log's beginning is gone, or the window store was already read
    into by workers of this bundle.
    """
    ends = _refuse_unfit(parts)
    buckets = DiskBuckets(folder, expected=sum(ends.values()))
    outcomes: Counter[Outcome] = Counter()
    entities = rows = letters = passed = 0
    try:
        records = _cut(parts, ends, buckets)
        count = buckets.finish()
        parts.store.remember(parts.source.describe().identity)
        for filled in track(
            fill(buckets.read()), total=count, console=Console(stderr=True), description="buckets"
        ):
            written, stood = _write(parts, filled)
            entities += written
            passed += stood
            rows += len(filled.rows)
            letters += len(filled.parked)
            outcomes.update(filled.outcomes)
    finally:
        buckets.remove()
    parts.sink.publish((), reached=ends)
    with parts.store.begin() as txn:
        txn.advance(ends)
    parts.source.commit(ends)
    return Backfilled(
        records, entities, rows, letters, passed, {str(each): n for each, n in outcomes.items()}
    )


def _write(parts: Parts, filled: Filled) -> tuple[int, int]:
    """Write what is not there yet: entities written, and entities that stood."""
    windows = {window.entity_id: window for window in filled.windows}
    with parts.store.begin() as txn:
        known = txn.load(windows)
        fresh = {each for each in windows if known[each].next_offset < windows[each].next_offset}
        rows = [row for row in filled.rows if row.entity_id in fresh]
        if tombstones := [t for t in filled.tombstones if t.entity_id in fresh]:
            parts.sink.delete(tombstones)
        parts.sink.journal(rows)
        parts.sink.publish(_newest(rows))
        if filled.parked:
            parts.dead_letters.park(filled.letters)
        for entity_id in fresh:
            txn.put(windows[entity_id])
    return len(fresh), len(windows) - len(fresh)


def _newest(rows: Sequence[FeatureRow]) -> list[FeatureRow]:
    return list({row.entity_id: row for row in rows}.values())


def _refuse_unfit(parts: Parts) -> dict[TopicPartition, int]:
    description = parts.source.describe()
    topic = description.identity.topic
    for partition, span in description.spans.items():
        if span.first > 0:
            raise ConfigError(
                "topic",
                f"the beginning of partition {partition} is gone (it starts at {span.first})",
                "backfill from a complete log: --source file --events LOG",
            )
    if parts.store.offsets(topic):
        raise ConfigError(
            "window_store",
            "workers of this bundle have read from this log, or a backfill has ended",
            "let the workers go on: python -m stream_worker run",
        )
    return {
        TopicPartition(topic, partition): span.end for partition, span in description.spans.items()
    }


class _FromStart:
    """Assigns every partition from its beginning."""

    def assigned(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        return dict.fromkeys(partitions, 0)

    def revoked(self, partitions: Sequence[TopicPartition]) -> None:
        pass


def _cut(parts: Parts, ends: Mapping[TopicPartition, int], buckets: DiskBuckets) -> int:
    """Cut the log as it is now into buckets by entity; the number of its records."""
    source = cast("ReplayableLog", parts.source)
    source.subscribe(_FromStart())
    count = 0
    while not _reached(source.positions(), ends):  # the last offset may be a transaction's end
        records = [
            record
            for record in source.poll(_POLLED, 1.0)
            if record.offset < ends[record.topic_partition]
        ]
        buckets.add(records)
        count += len(records)
    return count


def _reached(positions: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int]) -> bool:
    return all(positions.get(tp, 0) >= end for tp, end in ends.items())


def _opener(settings: WorkerSettings, form: ValueFormat, *, threads: int | None) -> Opener:
    folder, device, policy = settings.bundle.resolve(), settings.device, worker_policy(settings)

    def open_reader() -> BucketReader:  # goes to other processes, so without the settings
        bundle = load_bundle(folder)
        embedder = open_embedder(bundle, device=device, threads=threads, cache_bytes=0)
        return BucketReader(bundle, embedder, policy, form)

    return open_reader


@contextmanager
def _filling(opener: Opener, engine: Engine, actors: int | None, gpus: float) -> Iterator[Fill]:
    if engine == "process":
        yield lambda buckets: fill_here(opener, buckets)
        return
    pool: AbstractContextManager[Any] = ray_pool(opener, actors=actors, gpus=gpus)
    with pool as opened:
        yield opened.fill

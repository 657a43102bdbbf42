"""`backfill`: a complete log into fresh windows and current rows, by one process or by Ray.

Records are cut into buckets by entity; each is folded and embedded whole, from nothing, by the
worker's own code. One process writes: rows to the offline log and online, then windows, and the
offsets last of all. So a backfill that was killed is begun anew and passes over what stands, and
workers go on where it ended.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import msgspec
from rich.console import Console
from rich.progress import track

from llm4es.bundle import load_bundle
from llm4es.engine import open_embedder
from llm4es.errors import ConfigError
from llm4es.events import Record, TopicPartition
from llm4es.feast import FeastSink
from llm4es.features import FeatureRow
from llm4es.windows import Outcome
from stream_worker.assembly import assembled_around, value_format_of, worker_policy
from stream_worker.formats.decoding import ValueFormat
from stream_worker.ops.buckets import BucketReader, Filled, Opener, bucket_of, fill_here
from stream_worker.ops.ray_pool import ray_pool
from stream_worker.settings import WorkerSettings
from stream_worker.worker import Parts

__all__ = ["Backfilled", "Engine", "backfill", "run_backfill"]

Engine = Literal["process", "ray"]
_BUCKETS = 64
_POLLED = 10_000

Fill = Callable[[Sequence[Sequence[Record]]], Iterator[Filled]]


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
        with _filling(opener, engine, actors, gpus) as fill:
            done = backfill(built.parts, fill)
    if as_json:
        print(msgspec.json.encode(asdict(done)).decode())  # noqa: T201 - the result
    else:
        Console().print(
            f"{done.records:,} records, {done.entities:,} entities, {done.rows:,} rows, "
            f"{done.dead_letters:,} dead letters; {done.passed_over:,} entities stood already"
        )


def backfill(parts: Parts, fill: Fill) -> Backfilled:
    """Carry a complete log through to rows and windows.

    Raises ConfigError where the log's beginning is gone, or the window store was already read
    into by workers of this bundle.
    """
    ends = _refuse_unfit(parts)
    buckets, records = _read_all(parts, ends)
    outcomes: Counter[Outcome] = Counter()
    entities = rows = letters = passed = 0
    parts.store.remember(parts.source.describe().identity)
    for filled in track(
        fill(buckets), total=len(buckets), console=Console(stderr=True), description="buckets"
    ):
        written, stood = _write(parts, filled)
        entities += written
        passed += stood
        rows += len(filled.rows)
        letters += len(filled.parked)
        outcomes.update(filled.outcomes)
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


def _read_all(parts: Parts, ends: Mapping[TopicPartition, int]) -> tuple[list[list[Record]], int]:
    """Cut the log as it is now into buckets by entity."""
    parts.source.subscribe(_FromStart())
    found: defaultdict[int, list[Record]] = defaultdict(list)
    due = {tp: end for tp, end in ends.items() if end}
    count = 0
    while due:
        for record in parts.source.poll(_POLLED, 1.0):
            if record.offset < ends[record.topic_partition]:
                found[bucket_of(record.key, _BUCKETS)].append(record)
                count += 1
            if record.offset + 1 >= ends[record.topic_partition]:
                due.pop(record.topic_partition, None)
    return [found[bucket] for bucket in sorted(found)], count


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

"""What Ray's actors give beside one process, on the same buckets, in the same run.

    python -m benchmarks.backfill [--json] [--bundle FOLDER --events LOG]

Without a bundle one is made from the simulator. Both read whole histories with one thread to a
model. Opening a model, starting Ray and reading the log are left aside; handing buckets over and
taking results back are not.

    ray_vs_one_process    events/s of as many actors as there are cores over those of one process
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.stream_parts import make_bundle
from llm4es.bundle import load_bundle
from llm4es.engine import open_embedder
from llm4es.events import Record
from stream_worker.ops.buckets import BucketReader, Filled, bucket_of, fill_here
from stream_worker.ops.ray_pool import ray_pool
from stream_worker.sources.files import FileLog, FileRecordSource
from stream_worker.worker import WorkerPolicy

BUCKETS = 32


def main(
    *,
    bundle: Annotated[Path | None, typer.Option(help="A bundle of simulated payments")] = None,
    events: Annotated[Path | None, typer.Option(help="Its log (.jsonl)")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times that both are measured")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")] = False,
) -> None:
    """Measure both in turns, and compare their rows."""
    with tempfile.TemporaryDirectory(prefix="llm4es-backfill-") as name:
        if bundle is None or events is None:
            bundle, events = make_bundle(Path(name))
        count, alone, pooled = measure(bundle, events, repeats)
    rates = {"one process": count / alone, f"{cores()} actors": count / pooled}
    ratio = alone / pooled
    report = {
        "ratios": {"ray_vs_one_process": ratio},
        "events_per_s": rates,
        "machine": machine(),
    }
    if as_json:
        typer.echo(json.dumps(report))
        return
    table = Table(title=f"backfill of {count:,} events, the same rows")
    table.add_column("engine")
    table.add_column("events/s", justify="right")
    for engine, rate in rates.items():
        table.add_row(engine, f"{rate:,.0f}")
    Console().print(table)
    Console().print(f"ray_vs_one_process {ratio:.2f}")


def cores() -> int:
    """How many actors there are."""
    return cast("int", machine()["cores"])


def measure(bundle: Path, events: Path, repeats: int) -> tuple[int, float, float]:
    """Events, and median seconds of one process and of the pool. Exits where rows differ."""
    opened = load_bundle(bundle)
    buckets = read_buckets(events, opened.schema.entity(opened.manifest.entity).field)
    folder = bundle.resolve()

    def open_reader() -> BucketReader:
        loaded = load_bundle(folder)
        return BucketReader(
            loaded, open_embedder(loaded, device="cpu", threads=1, cache_bytes=0), WorkerPolicy()
        )

    # Ray lowers its workers' priority: beside anything else on the machine that would be compared.
    os.environ.setdefault("RAY_worker_niceness", "0")
    alone: list[float] = []
    pooled: list[float] = []
    rows: list[set[Any]] = []
    for _ in range(repeats):
        # Readers that have read nothing: what they remember of chapters and lines is no backfill's.
        one = open_reader()
        with ray_pool(open_reader, actors=cores()) as pool:
            ways: Sequence[tuple[list[float], Callable[[], Iterator[Filled]]]] = (
                (alone, lambda: fill_here(lambda: one, buckets)),  # noqa: B023 - called at once
                (pooled, lambda: pool.fill(buckets)),
            )
            for seconds, fill in ways:
                spent, found = timed(lambda: list(fill()))  # noqa: B023
                seconds.append(spent)
                rows.append({(row.entity_id, row.as_of, row.embedding.tobytes())
                             for filled in found for row in filled.rows})  # fmt: skip
    if any(each != rows[0] for each in rows):
        raise SystemExit("the two do not give the same rows")
    return sum(map(len, buckets)), median(alone), median(pooled)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that it took, and what it gave."""
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def read_buckets(events: Path, key_field: str) -> list[list[Record]]:
    """The log, cut by entity."""
    source = FileRecordSource(FileLog(path=events, key_field=key_field))
    found: dict[int, list[Record]] = {}
    for record in source._read():  # noqa: SLF001 - without a worker's assignment
        found.setdefault(bucket_of(record.key, BUCKETS), []).append(record)
    return list(found.values())


if __name__ == "__main__":
    typer.run(main)

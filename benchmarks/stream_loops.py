"""One loop of the stream benchmark in a process of its own, on a core of its own.

    python -m benchmarks.stream_loops worker|poll|poll_crc32c|feast|quix|served|timed JSON

Prints {"records", "seconds"}, timed from before the first poll to after the last record's effects;
imports and connections are not in it. Started by `benchmarks.stream_path`.
"""

import json
import os
import signal
import sys

if sys.argv[1:2] == ["poll"]:
    sys.modules["crc32c"] = None  # type: ignore[assignment]  # before kafka-python looks for it

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stream_parts import CountEmbedder, bench_bundle
from llm4es.bundle import Bundle, load_bundle
from llm4es.engine import open_embedder
from llm4es.events import Record, parse_document
from llm4es.feast import open_sink
from llm4es.features import FeatureRow, feature_row
from llm4es.windows import Window, fold
from stream_worker.assembly import assembled, assembled_around
from stream_worker.metrics import Metrics
from stream_worker.ports import Embedder
from stream_worker.running import relax_gc
from stream_worker.settings import WorkerSettings
from stream_worker.sources.kafka_client import KafkaConsumer
from stream_worker.window_store.codec import decode_window, encode_window

Order = dict[str, Any]
Result = dict[str, object]

POLLED = 4096  # records at once, of every loop that polls by itself


def worker(order: Order) -> Result:
    """Ours: windows in Redis, rows in Feast's Redis and in the offline log, offsets committed."""
    until_end = order.get("until_end", True)
    settings = WorkerSettings(**order["settings"], max_records=POLLED, until_end=until_end)
    with assembled_around(settings, bench_bundle(), CountEmbedder) as built:
        relax_gc()
        signal.signal(signal.SIGTERM, lambda *_: built.worker.stop())
        started = time.perf_counter()
        built.worker.run()
        seconds = time.perf_counter() - started
        summary = built.parts.metrics.summary()
    return {"records": summary.records, "seconds": seconds}


def poll(order: Order) -> Result:
    """A plain poll loop of kafka-python that parses JSON, and does nothing with it.

    Called `poll` it takes checksums in Python, as `pip install kafka-python` has it; called
    `poll_crc32c` it takes them in C, which comes with our distribution.
    """
    consumer = _consumer(order, "poll")
    started = time.perf_counter()
    records = 0
    while records < order["records"]:
        for batch in consumer.poll(timeout_ms=500, max_records=POLLED).values():
            for record in batch:
                json.loads(record.value)
                records += 1
    return {"records": records, "seconds": time.perf_counter() - started}


def feast(order: Order) -> Result:
    """What one writes first: windows in a dictionary, and `FeatureStore.push` per event."""
    import pandas as pd  # noqa: PLC0415 - heavy, and of this loop alone
    from feast import FeatureStore  # noqa: PLC0415

    store = FeatureStore(repo_path=order["repo"])
    bundle, windows = bench_bundle(), dict[str, Window]()
    embedder = CountEmbedder(bundle)
    consumer = _consumer(order, "feast")
    started = time.perf_counter()
    records = 0
    while records < order["few"]:
        for batch in consumer.poll(timeout_ms=500, max_records=100).values():
            for record in batch[: order["few"] - records]:
                row = _folded(bundle, embedder, windows, json.loads(record.value), record.timestamp)
                frame = pd.DataFrame([{name: getattr(row, name) for name in _COLUMNS}])
                frame["customer_id"], frame["event_timestamp"] = row.entity_id, row.as_of
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    store.push("bench_push", frame)
                consumer.commit()
                records += 1
    return {"records": records, "seconds": time.perf_counter() - started}


def quix(order: Order) -> Result:
    """The same fold as a Quix Streams application: state in RocksDB, rows through our sink."""
    from quixstreams import Application, State  # noqa: PLC0415 - of the extra `bench`
    from quixstreams.sinks.base import BatchingSink, SinkBatch  # noqa: PLC0415

    bundle = bench_bundle()
    embedder = CountEmbedder(bundle)
    feast_sink = open_sink(Path(order["repo"]), bundle, writer_id="quix")
    application = Application(
        broker_address=order["settings"]["bootstrap_servers"],
        consumer_group=order["group"],
        auto_offset_reset="earliest",
        state_dir=order["state"],
        loglevel="ERROR",
        commit_interval=1.0,
    )

    class Sink(BatchingSink):  # type: ignore[misc]  # quixstreams is not installed for mypy
        def write(self, batch: SinkBatch) -> None:
            rows = [item.value for item in batch]
            feast_sink.journal(rows)
            feast_sink.publish(list({row.entity_id: row for row in rows}.values()))

    def folded(document: dict[str, Any], _key: Any, timestamp: int, _headers: Any) -> Any:  # noqa: ANN401
        return document, timestamp

    def row(value: Any, state: State) -> FeatureRow:  # noqa: ANN401
        document, timestamp = value
        stored = state.get_bytes("window", b"")
        customer = document["customer_id"]
        window = decode_window(customer, 0, stored) if stored else Window(entity_id=customer)
        windows = {customer: window}
        made = _folded(bundle, embedder, windows, document, timestamp)
        state.set_bytes("window", encode_window(windows[customer]))
        return made

    topic = application.topic(order["settings"]["topic"], value_deserializer="json")
    frame = application.dataframe(topic).apply(folded, metadata=True).apply(row, stateful=True)
    frame.sink(Sink())
    started = time.perf_counter()
    application.run(count=order["records"], timeout=120)
    seconds = time.perf_counter() - started
    feast_sink.close()
    return {"records": order["records"], "seconds": seconds}


def served(order: Order) -> Result:
    """Ours with a bundle's own model; gives every event's freshness too."""
    settings = WorkerSettings(**order["settings"], until_end=order["until_end"])
    with assembled(settings) as built:
        relax_gc()
        started = time.perf_counter()

        def stop_at_the_end() -> None:
            if built.parts.metrics.summary().records >= order["records"]:
                built.worker.stop()

        built.worker.run(stop_at_the_end)
        seconds = time.perf_counter() - started
        metrics = built.parts.metrics
        ages_ms = (1000 * metrics.freshness()).round(1).tolist()
    return {"records": metrics.summary().records, "seconds": seconds, "ages_ms": ages_ms}


def timed(order: Order) -> Result:
    """Ours until it is told to end; gives (Unix time, age in seconds) of every event."""
    ages = _Ages()
    settings = WorkerSettings(**order["settings"])

    def open_model(bundle: Bundle) -> Embedder:
        return open_embedder(bundle, device="cpu", threads=settings.threads)

    with assembled_around(
        settings,
        load_bundle(settings.bundle),
        open_model,
        wrap=lambda parts: replace(parts, metrics=ages),
    ) as built:
        relax_gc()
        signal.signal(signal.SIGTERM, lambda *_: built.worker.stop())
        built.worker.run()
    return {"records": ages.summary().records, "ages": ages.by_moment}


class _Ages(Metrics):
    """Keeps every event's age, and when it was readable."""

    def __init__(self) -> None:
        super().__init__()
        self.by_moment: list[tuple[float, float]] = []

    def readable(self, records: Iterable[Record], now: datetime) -> None:
        records = list(records)
        super().readable(records, now)
        self.by_moment += [
            (now.timestamp(), (now - record.timestamp).total_seconds())
            for record in records
            if record.timestamp is not None
        ]


_COLUMNS = (
    "embedding", "surprise", "surprise_last", "event_count", "last_event_id", "last_event_time",
    "bundle_id",
)  # fmt: skip


def _consumer(order: Order, name: str) -> Any:  # noqa: ANN401 - kafka-python has no types
    consumer = KafkaConsumer(
        order["settings"]["topic"],
        bootstrap_servers=order["settings"]["bootstrap_servers"],
        group_id=f"{order['group']}-{name}",
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        metrics_enabled=False,
    )
    while not consumer.assignment():
        consumer.poll(timeout_ms=100, max_records=1)
    consumer.seek_to_beginning()
    return consumer


def _folded(
    bundle: Bundle,
    embedder: CountEmbedder,
    windows: dict[str, Window],
    document: dict[str, Any],
    timestamp_ms: int,
) -> FeatureRow:
    event = parse_document(document, bundle.schema, entity="customer")
    known = windows.get(event.entity_id, Window(entity_id=event.entity_id))
    window = fold(
        known,
        event,
        recorded_at=datetime.fromtimestamp(timestamp_ms / 1000, UTC),
        policy=bundle.manifest.window,
        measure=bundle.tokens.measure,
        surely_fits=bundle.tokens.surely_fits,
    ).window
    windows[event.entity_id] = window
    embedded = embedder.embed([window])
    made = feature_row(bundle, window, embedded.vectors[0], embedded.surprise[0], 0.0)
    return replace(made, embedding=np.asarray(made.embedding, np.float32))


LOOPS: dict[str, Callable[[Order], Result]] = {
    "worker": worker,
    "poll": poll,
    "poll_crc32c": poll,
    "feast": feast,
    "quix": quix,
    "served": served,
    "timed": timed,
}

if __name__ == "__main__":
    told = json.loads(sys.argv[2])
    os.sched_setaffinity(0, {told["core"]})
    result = LOOPS[sys.argv[1]](told)
    print(json.dumps(result))  # noqa: T201 - the result

"""The stream's path without the model, beside what one would write instead; and freshness with it.

    python -m benchmarks.stream_path [--json] [--records 40000] [--repeats 3] [--bundle FOLDER]

Real Kafka to real Redis, each loop in a process on one core. Ratios: `vs_feast_push` events/s over
those of kafka-python and `FeatureStore.push` per event, `vs_plain_poll` over a kafka-python loop
that only parses JSON (kafka-python as pip installs it; `vs_plain_poll_crc32c`: with checksums in C,
as ours), `vs_quix` over the same fold as a Quix Streams application with the same
sink (extra `bench`). `freshness_p99_ms` is from record timestamp to readable online, at half the
rate that the worker keeps up with a domain model in batches of 32, broker, Redis and producer on
the other cores; without --bundle one is made from the simulator. Medians of interleaved repeats.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from feast import FeatureStore, FeatureView, PushSource
from redis import Redis
from redis.exceptions import RedisError
from rich.console import Console
from rich.table import Table

from benchmarks.machine import CORES, machine
from benchmarks.stream_parts import bench_bundle, documents, make_bundle
from dev.servers import KafkaServer, RedisServer, create_topic, wait_until
from llm4es.bundle import load_bundle
from llm4es.feast import define
from llm4es.feast.definitions import view_spec
from stream_worker.sources.kafka_client import (
    KafkaProducer,
    KafkaSettings,
    admin,
    group_members,
)

CUSTOMERS = 2_000
PARTITIONS = 4
FEW = 300  # events of the loop that pushes one by one
# Of the load that is halved: in larger ones a worker that lags gains by reading a customer's events
# at once, at the price of freshness.
SMALL_BATCH = 32
LARGEST = 1 << 20
DEADLINE_S = 600
_REPO = """\
project: bench
provider: local
registry: data/registry.db
online_store: {{type: redis, connection_string: "{redis}"}}
offline_store: {{type: llm4es.feast.offline_log.LogOfflineStore}}
entity_key_serialization_version: 3
"""

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Bench:
    """Servers, and a feature repository."""

    folder: Path
    kafka: KafkaServer
    redis: RedisServer
    repo: Path

    def order(self, topic: str, records: int, group: str) -> dict[str, Any]:
        """What a loop is told."""
        return {
            "settings": {
                "bootstrap_servers": self.kafka.bootstrap_servers,
                "topic": topic,
                "group": group,
                "feature_repo": str(self.repo),
                "window_store": f"{self.redis.url}/1",
            },
            "repo": str(self.repo),
            "state": str(self.folder / f"state-{group}"),
            "group": group,
            "records": records,
            "few": FEW,
            "core": CORES[0],
        }

    def topics(self, name: str) -> None:
        """A topic, and one for dead letters."""
        for topic, largest in ((name, LARGEST), (f"{name}.dead-letters", 2 * LARGEST)):
            create_topic(
                self.kafka.bootstrap_servers,
                topic,
                partitions=PARTITIONS,
                config={"max.message.bytes": str(largest)},
            )


def main(
    *,
    records: Annotated[int, typer.Option(help="Events in the topic")] = 40_000,
    repeats: Annotated[int, typer.Option(help="Runs of each loop")] = 3,
    bundle: Annotated[Path | None, typer.Option(help="A bundle of simulated payments")] = None,
    events: Annotated[Path | None, typer.Option(help="Its log (.jsonl)")] = None,
    freshness: Annotated[bool, typer.Option(help="Measure freshness too")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Run the loops, and compare them."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llm4es-bench-")))
        kafka = stack.enter_context(KafkaServer(folder / "kafka"))
        redis = stack.enter_context(RedisServer(folder / "redis"))
        bench = Bench(folder, kafka, redis, make_repo(folder / "repo", redis))
        rates = _rates(bench, records, repeats)
        ratios = {
            "vs_feast_push": rates["worker"] / rates["feast"],
            "vs_plain_poll": rates["worker"] / rates["poll"],
            "vs_plain_poll_crc32c": rates["worker"] / rates["poll_crc32c"],
            "vs_quix": rates["worker"] / rates["quix"],
        }
        ages: Sequence[float] = ()
        if freshness:
            ages, served = _freshness(bench, bundle, events)
            ratios["freshness_p99_ms"] = float(np.quantile(ages, 0.99))
            rates["domain model"] = served
    if as_json:
        typer.echo(json.dumps({"ratios": ratios, "machine": machine()}))
        return
    _print(rates, ratios, ages)


def _rates(bench: Bench, records: int, repeats: int) -> dict[str, float]:
    """Events per second of each loop: medians."""
    bench.topics("payments")
    lines = [json.dumps(each) for each in documents(records, CUSTOMERS)]
    produce(bench, "payments", lines, "customer_id")
    found: dict[str, list[float]] = {
        name: [] for name in ("worker", "poll", "poll_crc32c", "quix", "feast")
    }
    for repeat in range(repeats):
        for name, rates in found.items():
            group = f"{name}-{repeat}"
            _forget(bench)
            done = _run(name, bench.order("payments", records, group))
            rates.append(done["records"] / done["seconds"])
            console.print(f"{name}: {rates[-1]:,.0f} events/s")
    return {name: median(rates) for name, rates in found.items()}


def _freshness(bench: Bench, bundle: Path | None, events: Path | None) -> tuple[list[float], float]:
    """Milliseconds of each event at half the rate that is kept up with, and that rate."""
    if bundle is None or events is None:
        bundle, events = make_bundle(bench.folder / "model")
    apply(bench.repo, bundle, "full")
    os.sync()  # what the loops before have written is not to be waited for here
    lines = events.read_text().splitlines()
    bench.topics("full")
    produce(bench, "full", lines, "customer_id")
    _forget(bench)
    order = bench.order("full", len(lines), "full")
    order["settings"] |= {"bundle": str(bundle), "threads": 1, "max_records": SMALL_BATCH}
    order["until_end"] = True
    done = _run("served", order)
    rate = done["records"] / done["seconds"]
    console.print(f"domain model, {SMALL_BATCH} at once: {rate:,.0f} events/s")
    bench.topics("half")
    _forget(bench)
    _leave_a_core(bench)
    os.sync()
    order = bench.order("half", len(lines), "half")
    order["settings"] |= {"bundle": str(bundle), "threads": 1, "poll_timeout_ms": 20}
    order["until_end"] = False
    with start("served", order) as process:
        await_member(bench, process, "half")
        produce(bench, "half", lines, "customer_id", per_second=rate / 2)
        out, err = process.communicate(timeout=DEADLINE_S)
    if process.returncode:
        raise RuntimeError(err)
    ages: list[float] = json.loads(out.splitlines()[-1])["ages_ms"]
    return ages[len(ages) // 10 :], rate  # the first tenth falls into the group's forming


def _leave_a_core(bench: Bench) -> None:
    """Keep broker, Redis and this producer from the core of the worker, where there are others."""
    for pid in (bench.kafka.pid, bench.redis.pid, os.getpid()):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), CORES[1:] or CORES)


def await_member(bench: Bench, process: "subprocess.Popen[str]", group: str) -> None:
    """Wait until the worker has joined its group, so that its first event waits for nothing."""
    settings = KafkaSettings(bootstrap_servers=bench.kafka.bootstrap_servers)
    with admin(settings) as client:
        if not wait_until(
            lambda: process.poll() is not None or group_members(client, group) > 0, timeout_s=120
        ):
            raise RuntimeError("the worker did not join its group")


def _run(name: str, order: Mapping[str, Any]) -> dict[str, Any]:
    with start(name, order) as process:
        out, err = process.communicate(timeout=DEADLINE_S)
    if process.returncode:
        raise RuntimeError(f"{name}: {err}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def start(name: str, order: Mapping[str, Any]) -> "subprocess.Popen[str]":
    """Start a loop in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.stream_loops", name, json.dumps(order)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def produce(
    bench: Bench, topic: str, lines: Sequence[str], key: str, per_second: float | None = None
) -> None:
    """Produce lines under the value of their field `key`, in order, at a rate if one is given."""
    producer = KafkaProducer(
        bootstrap_servers=bench.kafka.bootstrap_servers,
        enable_idempotence=True,
        linger_ms=0 if per_second else 20,
    )
    started = time.monotonic()
    try:
        for number, line in enumerate(lines):
            if per_second:
                time.sleep(max(0.0, started + number / per_second - time.monotonic()))
            producer.send(topic, key=str(json.loads(line)[key]).encode(), value=line.encode())
        producer.flush(timeout=60)
    finally:
        producer.close()


def _forget(bench: Bench) -> None:
    """Empty the stores: each loop begins with nothing."""
    bench.redis.stop()
    for file in bench.redis.folder.glob("appendonlydir/*"):
        file.unlink()
    bench.redis.start()


def make_repo(folder: Path, redis: RedisServer) -> Path:
    """A feature repository with our view, and one to push to."""
    folder.mkdir()
    (folder / "feature_store.yaml").write_text(_REPO.format(redis=redis.address))
    definitions = define(
        view_spec(bench_bundle()),
        topic="payments",
        bootstrap_servers="given",
        offline_path="data/offline",
        watermark_s=60,
    )
    push = PushSource(name="bench_push", batch_source=definitions.view.batch_source)
    pushed = FeatureView(
        name="pushed", entities=[definitions.entity], schema=definitions.view.schema, source=push
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FeatureStore(repo_path=str(folder)).apply([*definitions.objects, push, pushed])
    return folder


def apply(repo: Path, bundle: Path, topic: str) -> None:
    """Apply a bundle's view to a repository."""
    definitions = define(
        view_spec(load_bundle(bundle)),
        topic=topic,
        bootstrap_servers="given",
        offline_path="data/offline",
        watermark_s=60,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FeatureStore(repo_path=str(repo)).apply(list(definitions.objects))


def folded(redis: RedisServer, bundle_id: str, topic: str) -> int:
    """Records up to which the window store holds the log, over all partitions."""
    client = Redis(port=redis.port, db=1, socket_timeout=5)
    try:
        found: Any = client.hgetall(f"llm4es:{bundle_id}:offsets:{topic}")
    except RedisError:
        return 0
    finally:
        client.close()
    return sum(int(at) for at in found.values())


def _print(
    rates: Mapping[str, float], ratios: Mapping[str, float], ages_ms: Sequence[float]
) -> None:
    table = Table("loop", "events/s", title="stream path")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}")
    out = Console()
    out.print(table)
    table = Table("figure", "value")
    for name, value in ratios.items():
        table.add_row(name, f"{value:.2f}")
    out.print(table)
    if ages_ms:
        table = Table("record to readable, ms", "events")
        counts, edges = np.histogram(ages_ms, bins=[0, 5, 10, 20, 40, 80, 150, 300, 1e9])
        for below, count in zip(edges[1:], counts, strict=True):
            table.add_row(f"< {below:g}" if below < 1e9 else "more", str(count))  # noqa: PLR2004
        out.print(table)


if __name__ == "__main__":
    typer.run(main)

"""Redis away for half a minute under load: the worker must live, lose nothing and stay small.

    python -m benchmarks.outage [--seconds 30] [--rate 200] [--json]

A real worker process on real Kafka; windows and rows in one Redis, which is stopped while events
keep coming and started again with its data. Exits 1 where a record is lost, the worker ends, or it
grows by 100 MB or more.
"""

import json
import tempfile
import time
import warnings
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import typer

from benchmarks.machine import machine
from benchmarks.stream_parts import bench_bundle, documents
from benchmarks.stream_path import Bench, folded, make_repo, produce, start
from dev.servers import KafkaServer, RedisServer, wait_until

LIMIT_MB = 100.0


def main(
    *,
    seconds: Annotated[float, typer.Option(help="How long Redis is away")] = 30.0,
    rate: Annotated[float, typer.Option(help="Events per second")] = 200.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Stop Redis under a worker, start it again, and look at what is left."""
    warnings.simplefilter("ignore")
    count = int(rate * (seconds + 20))
    lines = [json.dumps(each) for each in documents(count, 500)]
    with (
        tempfile.TemporaryDirectory(prefix="llm4es-outage-") as name,
        KafkaServer(Path(name) / "kafka") as kafka,
        RedisServer(Path(name) / "redis") as redis,
    ):
        bench = Bench(Path(name), kafka, redis, make_repo(Path(name) / "repo", redis))
        bench.topics("payments")
        order = bench.order("payments", count, "outage")
        with start("worker", order | {"until_end": False}) as process:
            producing = Thread(
                target=produce, args=(bench, "payments", lines, "customer_id", rate), daemon=True
            )
            producing.start()
            begun = wait_until(lambda: _folded(redis) > rate, timeout_s=120)
            before_mb = _resident_mb(process.pid)
            redis.stop()
            peak_mb, away_until = before_mb, time.monotonic() + seconds
            while time.monotonic() < away_until:
                time.sleep(0.2)
                peak_mb = max(peak_mb, _resident_mb(process.pid))
            redis.start()
            back = time.monotonic()
            producing.join()
            done = wait_until(lambda: _folded(redis) >= count, timeout_s=300)
            recovered_s = time.monotonic() - back
            lived = process.poll() is None
            process.terminate()
            process.communicate(timeout=60)
    figures: dict[str, Any] = {
        "away_s": seconds,
        "events": count,
        "lost": 0 if done else count - _folded(redis),
        "worker_lived": lived and begun,
        "grew_mb": round(peak_mb - before_mb, 1),
        "caught_up_s_after_return": round(recovered_s, 1),
    }
    if as_json:
        typer.echo(json.dumps({**figures, "machine": machine()}))
    else:
        for label, value in figures.items():
            typer.echo(f"{label:26} {value}")
    if not done or not figures["worker_lived"] or figures["grew_mb"] >= LIMIT_MB:
        raise typer.Exit(1)


def _folded(redis: RedisServer) -> int:
    return folded(redis, bench_bundle().id, "payments")


def _resident_mb(pid: int) -> float:
    """Resident memory of a process."""
    fields = Path(f"/proc/{pid}/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) / 1024


if __name__ == "__main__":
    typer.run(main)

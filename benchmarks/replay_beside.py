"""Freshness of a live worker while a replay of its own topic runs beside it.

    python -m benchmarks.replay_beside [--json] [--bundle FOLDER --events LOG]

Real processes, from real Kafka to real Redis: events come at a steady rate, and `stream_worker
replay --rate` works through the same topic's past, into the same view. The replay is halted and let
go in turns (SIGSTOP, SIGCONT), so that both values come from one worker in one run. Its start
(imports, the model) falls into neither. Without --bundle one is made from the simulator.

    freshness_p99_beside_replay   p99 of record timestamp to readable online, beside the replay,
                                  over the same with the replay halted; medians over turns

Exits 1 where the replay had no older row refused or ended too soon, or where an audit of all
entities finds one whose online row, window or offline rows are not what the log gives.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.stream_parts import make_bundle
from benchmarks.stream_path import (
    Bench,
    apply,
    folded,
    make_repo,
    produce,
    start,
)
from dev.servers import KafkaServer, RedisServer, wait_until
from llm4es.bundle import load_bundle

TOPIC = "payments"
SETTLE_S = 2.0  # after each change of turns: what was under way belongs to neither
MARGIN_S = 5.0  # live events and records to replay are ready for so long beyond the turns
EVERYONE = 1_000_000

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Load:
    """How much comes live, how fast the replay may be, and how the two take turns."""

    rate: float  # events a second
    replay_rate: float
    turns: int  # of each kind
    turn_s: float

    @property
    def live(self) -> int:
        """Events that come while turns are taken."""
        return int(self.rate * (2 * self.turns * self.turn_s + MARGIN_S))

    @property
    def replayed(self) -> int:
        """Records that the replay passes meanwhile, at most."""
        return int(self.replay_rate * (self.turns * self.turn_s + MARGIN_S))


@dataclass(frozen=True, slots=True)
class Turn:
    """A stretch of time, in Unix seconds, and whether the replay ran."""

    beside: bool
    since: float
    until: float

    def of(self, ages: NDArray[np.float64]) -> NDArray[np.float64]:
        """Ages in ms of what became readable in it; `ages` (n, 2) are of Unix time and seconds."""
        found: NDArray[np.float64] = ages[(self.since <= ages[:, 0]) & (ages[:, 0] < self.until), 1]
        return 1000 * found


def main(
    *,
    bundle: Annotated[Path | None, typer.Option(help="A bundle of simulated payments")] = None,
    events: Annotated[Path | None, typer.Option(help="Its log (.jsonl)")] = None,
    rate: Annotated[float, typer.Option(help="Live events a second")] = 40.0,
    replay_rate: Annotated[float, typer.Option(help="The replay's records a second")] = 40.0,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each kind")] = 5,
    turn_s: Annotated[float, typer.Option("--seconds", min=5, help="Length of a turn")] = 15.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Measure freshness in turns, with and without the replay; then audit every row."""
    warnings.simplefilter("ignore")
    load = Load(rate, replay_rate, turns, turn_s)
    with (
        tempfile.TemporaryDirectory(prefix="llm4es-beside-") as name,
        KafkaServer(Path(name) / "kafka") as kafka,
        RedisServer(Path(name) / "redis") as redis,
    ):
        bench = Bench(Path(name), kafka, redis, make_repo(Path(name) / "repo", redis))
        if bundle is None or events is None:
            bundle, _ = make_bundle(bench.folder / "model")
            events = _long_log(bench.folder / "log", load)
        apply(bench.repo, bundle, TOPIC)
        bench.topics(TOPIC)
        lines = events.read_text().splitlines()
        if len(lines) < load.live + load.replayed:
            raise typer.BadParameter(f"{len(lines):,} events do not suffice", param_hint="events")
        taken, ages, report = _measure(bench, bundle, lines, load)
        audit = _audit(bench, bundle)
    figures = _figures(taken, ages) | {
        "live_events_per_s": rate,
        "replayed_records_per_s": replay_rate,
        "rows_offered_online": report["rows_published"],
        "of_them_older_than_what_stands": report["rows_superseded"],
        "entities": audit["sampled"],
        "as_the_log_says": audit["equal"],
        "findings": audit["findings"],
    }
    if as_json:
        typer.echo(json.dumps({**figures, "machine": machine()}))
    else:
        _print(figures)
    if not report["rows_superseded"] or not 0 < audit["sampled"] == audit["equal"]:
        raise typer.Exit(1)


def _measure(
    bench: Bench, bundle: Path, lines: Sequence[str], load: Load
) -> tuple[list[Turn], NDArray[np.float64], dict[str, Any]]:
    """Turns as they were taken, ages (n, 2) of all events, and the replay's report."""
    past = len(lines) - load.live
    produce(bench, TOPIC, lines[:past], "customer_id")
    order = bench.order(TOPIC, len(lines), "live")
    order["settings"] |= {"bundle": str(bundle), "threads": 1, "poll_timeout_ms": 20}
    bundle_id = load_bundle(bundle).id

    def await_folded(count: int) -> None:
        if not wait_until(lambda: folded(bench.redis, bundle_id, TOPIC) >= count, timeout_s=300):
            raise RuntimeError("the worker did not catch up")

    with start("timed", order) as worker:
        try:
            await_folded(past)
            console.print(f"{past:,} events of the past are folded, {load.live:,} come now")
            with _replay(bench, bundle, load) as replay:
                producing = Thread(
                    target=produce,
                    args=(bench, TOPIC, lines[past:], "customer_id", load.rate),
                    daemon=True,
                )
                producing.start()
                taken = _take_turns(replay, load)
            producing.join()
            await_folded(len(lines))
        finally:
            worker.terminate()
        out, err = worker.communicate(timeout=120)
    if worker.returncode:
        raise RuntimeError(err)
    found = next((bench.folder / "replay").glob("replays/*/report.json"))
    return taken, np.array(json.loads(out.splitlines()[-1])["ages"]), json.loads(found.read_text())


def _take_turns(replay: "subprocess.Popen[str]", load: Load) -> list[Turn]:
    """Halt the replay and let it go, in turns; it must not end meanwhile."""
    taken = []
    for number in range(2 * load.turns):
        beside = bool(number % 2)
        replay.send_signal(signal.SIGCONT if beside else signal.SIGSTOP)
        since = time.time() + SETTLE_S
        time.sleep(load.turn_s)
        taken.append(Turn(beside, since, time.time()))
        console.print(f"turn {number + 1} of {2 * load.turns}")
    if replay.poll() is not None:
        raise RuntimeError("the replay ended before it was measured")
    return taken


@contextmanager
def _replay(bench: Bench, bundle: Path, load: Load) -> "Iterator[subprocess.Popen[str]]":
    """A replay of the log into the live view, which has begun to write rows and is halted."""
    process = subprocess.Popen(
        [*_command(bench, bundle, "replay"), "--into", "view", "--every-event",
         "--rate", str(load.replay_rate), "--threads", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    begun = bench.repo / "data/offline"

    def writes() -> bool:
        return process.poll() is not None or any(begun.rglob("*-replay_*"))

    try:
        if not wait_until(writes, timeout_s=120) or process.poll() is not None:
            process.kill()
            raise RuntimeError(f"the replay did not begin: {process.communicate()[1]}")
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()  # it ends after its batch, and reports
        process.communicate(timeout=120)


def _audit(bench: Bench, bundle: Path) -> dict[str, Any]:
    """What `audit` says of every entity: by then nothing is written any more."""
    done = subprocess.run(
        [*_command(bench, bundle, "audit"), "--sample", str(EVERYONE), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if not done.stdout:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _command(bench: Bench, bundle: Path, name: str) -> list[str]:
    return [
        sys.executable, "-W", "ignore", "-m", "stream_worker", name, "--bundle", str(bundle),
        "--feature-repo", str(bench.repo), "--window-store", f"{bench.redis.url}/1",
        "--bootstrap-servers", bench.kafka.bootstrap_servers, "--topic", TOPIC,
        "--state-dir", str(bench.folder / name),
    ]  # fmt: skip


def _figures(taken: Sequence[Turn], ages: NDArray[np.float64]) -> dict[str, Any]:
    """Quantiles in ms over turns, and the ratio of their medians."""
    by_turn = {
        name: [
            [float(np.quantile(turn.of(ages), at)) for at in (0.5, 0.99)]
            for turn in taken
            if turn.beside is beside
        ]
        for name, beside in (("alone", False), ("beside", True))
    }
    p50, p99 = (
        {name: median(each[place] for each in found) for name, found in by_turn.items()}
        for place in (0, 1)
    )
    return {
        "ratios": {"freshness_p99_beside_replay": p99["beside"] / p99["alone"]},
        "p50_ms": p50,
        "p99_ms": p99,
        "p99_ms_by_turn": {name: [each[1] for each in found] for name, found in by_turn.items()},
    }


def _long_log(folder: Path, load: Load) -> Path:
    """Simulated payments enough for the live load and what is replayed."""
    customers = 20 + (load.live + load.replayed) // 50  # who have some 57 events in 60 days
    subprocess.run(
        [sys.executable, "-m", "export", "simulate", "--out", str(folder), "--seed", "8",
         "--customers", str(customers), "--days", "60"],
        check=True, stdout=sys.stderr,
    )  # fmt: skip
    return folder / "events.jsonl"


def _print(figures: dict[str, Any]) -> None:
    table = Table(show_header=False, title="a live worker beside a replay")
    for name, value in figures.items():
        told = value if isinstance(value, dict) else {"": value}
        for part, each in told.items():
            numbers = each if isinstance(each, list) else [each]
            table.add_row(
                f"{name} {part}".strip(), ", ".join(f"{number:,.4g}" for number in numbers)
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)

"""A stream of card payments through the engine, and through the whole worker."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import cast

import numpy as np
from msgspec.structs import replace
from pydantic import SecretStr

from benchmarks.stream_parts import documents
from llm4es.bundle import Bundle
from llm4es.engine import OnnxEmbedder, open_embedder
from llm4es.events import Event, FieldValue
from llm4es.features import Embedded
from llm4es.windows import Window, fold, settle

__all__ = ["Streamed", "WorkerPath", "stream", "worker_seconds"]

ROOT = Path(__file__).resolve().parents[1]
TROUBLE = 0.003  # share of events that are late, and of those that find their cache gone


@dataclass(frozen=True, slots=True)
class Streamed:
    """CPU seconds per event, folding and embedding, and how far from full recompute."""

    seconds: list[float]
    worst_difference: float  # relative to the largest value of the row


@dataclass(frozen=True, slots=True)
class WorkerPath:
    """CPU seconds of the whole worker per event, and how an event lies in its chapter."""

    seconds: float
    tokens_before: int
    tokens_per_event: int


def stream(
    bundle: Bundle,
    *,
    events: int,
    customers: int,
    batch: int = 1,
    history_tokens: int = 0,
    trouble: bool = True,
    check: bool = False,
) -> Streamed:
    """Fold events in turn, and embed the windows that changed, `batch` at a time.

    Histories of `history_tokens` are there before the clock starts. With `trouble` every n-th event
    comes late, and every n-th finds that its chapter was evicted. With `check` every vector and
    every surprise is compared with reading all anew.
    """
    policy = bundle.manifest.window
    embedder, anew = _opened(bundle, 1 << 31), _opened(bundle, 0) if check else None
    arriving = _arriving(customers)
    windows: dict[str, Window] = {}
    while _short_of_history(windows, customers, history_tokens):
        event = next(arriving)
        # Nothing is read while histories grow: that is not what is measured.
        windows[event.entity_id] = _folded(windows.get(event.entity_id), event, bundle)
    for window in windows.values():
        embedder.embed([window])
    period = round(1 / TROUBLE)
    times: list[float] = []
    worst = 0.0
    for number in range(0, events, batch):
        arrivals = []
        for event in (next(arriving) for _ in range(batch)):
            arrived = event
            if trouble and number % period == period // 2:
                arrived = replace(event, occurred_at=_before_last(windows[event.entity_id]))
            if trouble and number % period == period - 1:
                embedder.forget([event.entity_id])
            arrivals.append(arrived)
        started = time.process_time()
        changed = [_folded(windows.get(one.entity_id), one, bundle) for one in arrivals]
        found = embedder.embed(changed)
        times += [(time.process_time() - started) / batch] * batch
        for row, window in enumerate(changed):
            if anew is not None:
                bare = _without_sums(window)
                worst = max(worst, _difference(found, row, anew.embed([bare])))
            windows[window.entity_id] = (
                window
                if check
                else settle(
                    window, found.finished[row], policy=policy, half_lives=embedder.half_lives
                )
            )
    embedder.close()
    return Streamed(times, worst)


def worker_seconds(
    bundle: Bundle, folder: Path, *, events: int, customers: int, batch: int
) -> WorkerPath:
    """Run the worker over a file of events, all its parts real, and charge every CPU second.

    Customers take turns, and a batch holds no two events of one: nothing is coalesced, each event
    is embedded and written by itself.
    """
    from stream_worker.assembly import assembled  # noqa: PLC0415 - Feast takes seconds
    from stream_worker.settings import load_settings  # noqa: PLC0415

    shutil.rmtree(folder, ignore_errors=True)
    repo = _applied(bundle, folder)
    log = folder / "events.jsonl"
    turns = enumerate(documents(events, customers))
    lines = (json.dumps(one | {"customer_id": f"c{n % customers}"}) + "\n" for n, one in turns)
    log.write_text("".join(lines))
    flags = {
        "bundle": bundle.folder,
        "feature_repo": repo,
        "source": "file",
        "events": log,
        "window_store": SecretStr(f"sqlite:{folder / 'windows.db'}"),
        "state_dir": folder / "state",
        "threads": 1,
        "max_records": min(batch, customers),
        "until_end": True,
    }
    settings = load_settings(flags, None)
    with assembled(settings) as parts:
        started = time.process_time()
        parts.worker.run()
        spent = time.process_time() - started
    some = [one for one, _ in zip(_arriving(1), range(50), strict=False)]
    per_event = round(np.mean([bundle.tokens.measure(one, ()) for one in some]))
    chapter = min(events // customers, bundle.manifest.window.chapter_events)
    return WorkerPath(spent / events, chapter // 2 * per_event, per_event)


def _opened(bundle: Bundle, budget: int) -> OnnxEmbedder:
    return open_embedder(bundle, device="cpu", threads=1, cache_bytes=budget)


def _arriving(customers: int) -> Iterator[Event]:
    """Events of each customer in turn."""
    rng = random.Random(1)  # noqa: S311 - a benchmark's data
    for number, document in enumerate(documents(1_000_000, customers, seed=rng.randrange(99))):
        yield Event(
            entity_id=f"c{number % customers}",
            occurred_at=datetime.fromisoformat(str(document["at"])),
            type="payment",
            event_id=str(document["event_id"]),
            fields=MappingProxyType(
                {
                    name: cast("FieldValue", document[name])
                    for name in ("amount", "category", "terminal_id")
                }
            ),
        )


def _folded(window: Window | None, event: Event, bundle: Bundle) -> Window:
    return fold(
        window or Window(entity_id=event.entity_id),
        event,
        recorded_at=event.occurred_at + timedelta(days=1),
        policy=bundle.manifest.window,
        measure=bundle.tokens.measure,
    ).window


def _short_of_history(windows: dict[str, Window], customers: int, tokens: int) -> bool:
    if len(windows) < customers:
        return True
    return any(sum(c.tokens for c in window.chapters) < tokens for window in windows.values())


def _before_last(window: Window) -> datetime:
    """A moment just before the newest event's."""
    newest = window.newest
    if newest is None:
        msg = "a window without events has no newest"
        raise ValueError(msg)
    return newest - timedelta(microseconds=1)


def _without_sums(window: Window) -> Window:
    return replace(
        window, chapters=tuple(replace(c, sums=None, ids_hash=None) for c in window.chapters)
    )


def _difference(found: Embedded, row: int, anew: Embedded) -> float:
    pairs = [(found.vectors[row], anew.vectors[0])]
    if found.surprise.shape[1]:
        pairs.append((found.surprise[row], anew.surprise[0]))
    return max(
        float(np.abs(one - other).max() / max(float(np.abs(other).max()), 1e-9))
        for one, other in pairs
    )


def _applied(bundle: Bundle, folder: Path) -> Path:
    """Copy the feature repository, and apply it for this bundle."""
    repo = folder / "feature_repo"
    shutil.copytree(
        ROOT / "feature_repo", repo, ignore=shutil.ignore_patterns("data", "__pycache__")
    )
    env = {
        "LLM4ES_BUNDLE": str(bundle.folder.resolve()),
        "LLM4ES_TOPIC": "events",
        "LLM4ES_BOOTSTRAP_SERVERS": "127.0.0.1:1",
    }
    command: Sequence[str] = [sys.executable, "-m", "feast.cli.cli", "-c", str(repo), "apply"]
    subprocess.run(command, check=True, env=os.environ | env, stdout=subprocess.DEVNULL)
    return repo

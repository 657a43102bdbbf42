"""`run`: a worker under signals, with a live table if one is asked for."""

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table

from llm4es.errors import LLM4ESError
from stream_worker.assembly import Assembled, assembled
from stream_worker.metrics import Summary
from stream_worker.settings import WorkerSettings
from stream_worker.stopping import stopping_on_signals

__all__ = ["relax_gc", "run_worker", "summary_table"]

log = logging.getLogger(__name__)

_REFRESH_S = 0.5


def run_worker(settings: WorkerSettings, *, live: bool, as_json: bool) -> None:
    """Run until SIGTERM, SIGINT or the log's end; print what was done to stdout."""
    started = time.monotonic()
    with assembled(settings) as parts:
        relax_gc()
        log.info("ready")
        with stopping_on_signals(parts.worker.stop), _display(parts, live=live) as on_batch:
            parts.worker.run(on_batch)
        summary = parts.parts.metrics.summary()
    elapsed_s = time.monotonic() - started
    if as_json:
        print(msgspec.json.encode({**asdict(summary), "elapsed_s": elapsed_s}).decode())  # noqa: T201 - the result
    else:
        Console().print(summary_table(summary))


def summary_table(summary: Summary) -> Table:
    """What a run did, for a terminal."""
    table = Table(show_header=False, title="stream_worker")
    rate = summary.records / summary.busy_s if summary.busy_s else 0.0
    for name, value in (
        ("records", f"{summary.records:,}"),
        ("events accepted", f"{summary.accepted:,}"),
        ("duplicates", f"{summary.duplicates:,}"),
        ("late, dropped", f"{summary.late:,}"),
        ("dead letters", f"{sum(summary.dead_letters.values()):,}"),
        ("rows published", f"{summary.rows:,}"),
        ("of them unproven", f"{summary.unproven_rows:,}"),
        ("events/s while busy", f"{rate:,.0f}"),
        ("poll to readable p50", f"{summary.freshness_p50_s * 1000:,.0f} ms"),
        ("poll to readable p99", f"{summary.freshness_p99_s * 1000:,.0f} ms"),
    ):
        table.add_row(name, value)
    return table


def relax_gc() -> None:
    """Leave what was made so far alone, look at what is new a little at a time, at the rest seldom.

    Windows are many small objects without cycles: looking through them all costs a third of the
    time that events take, and through a hundred thousand new ones at once holds events up for as
    long as a hundred of them take.
    """
    gc.freeze()
    gc.set_threshold(5_000, 10, 10_000)  # some milliseconds; some tens; after 500 million objects


@contextmanager
def _display(parts: Assembled, *, live: bool) -> Iterator[Callable[[], None]]:
    if not live:
        yield lambda: None
        return
    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as screen:
        yield _LiveTable(parts, screen).show


class _LiveTable:
    """Lag, events/s over the last seconds, and freshness, redrawn now and then."""

    def __init__(self, parts: Assembled, screen: Live) -> None:
        self._parts = parts
        self._screen = screen
        self._shown_at = 0.0
        self._seen: deque[tuple[float, int]] = deque(maxlen=10)  # (time, records)

    def show(self) -> None:
        now = time.monotonic()
        if now - self._shown_at < _REFRESH_S:
            return
        self._shown_at = now
        summary = self._parts.parts.metrics.summary()
        self._seen.append((now, summary.records))
        (then, before), (_, after) = self._seen[0], self._seen[-1]
        rate = (after - before) / (now - then) if now > then else 0.0
        table = Table(title=f"bundle {self._parts.parts.bundle.id}")
        for column in ("lag", "events/s", "records", "rows", "dead", "p50", "p99"):
            table.add_column(column, justify="right")
        table.add_row(
            self._lag(),
            f"{rate:,.0f}",
            f"{summary.records:,}",
            f"{summary.rows:,}",
            f"{sum(summary.dead_letters.values()):,}",
            f"{summary.freshness_p50_s * 1000:,.0f} ms",
            f"{summary.freshness_p99_s * 1000:,.0f} ms",
        )
        self._screen.update(table, refresh=True)

    def _lag(self) -> str:
        try:
            remaining = self._parts.parts.source.remaining()
        except LLM4ESError:
            return "?"
        return "?" if remaining is None else f"{remaining:,}"

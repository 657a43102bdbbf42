"""What a replay says of itself: a bar while it works, and a report when it is done."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from stream_worker.ops.replay_plan import Plan

__all__ = ["ReplayReport", "plan_table", "progress_bar", "report_table", "write_report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """What a replay did; the figures are those of this run, after a resume too."""

    finished: bool
    resumed: bool
    view: str
    topic: str
    into: str
    every_event: bool
    spans: Mapping[int, tuple[int, int, int]]
    entities: int | None
    warm_up_records: int
    records: int
    accepted: int
    duplicates: int
    late: int
    rows: int
    rows_journalled: int
    rows_published: int  # offered online; those that were older than what stands are among them
    rows_superseded: int
    unproven_rows: int
    bad_records: Mapping[str, int] = field(default_factory=dict)  # by field; parked by nobody here
    seconds: float = 0.0


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr: what is done, records a second, what is left, and how long that takes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} records/s, lag {task.fields[lag]:,}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        tasks: dict[str, Any] = {}
        begun: dict[str, tuple[float, int]] = {}

        def show(name: str, done: int, total: int) -> None:
            now = time.monotonic()
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total, rate=0.0, lag=total)
                begun[name] = now, done
            since, before = begun[name]
            rate = (done - before) / (now - since) if now > since else 0.0
            bar.update(tasks[name], completed=done, rate=rate, lag=total - done)

        yield show


def plan_table(plan: Plan) -> Table:
    """What a replay would do, for a terminal."""
    begin = "the log's start" if plan.snapshot is None else plan.snapshot
    table = Table(
        title=f"replay of {plan.topic} into {plan.into} ({plan.view})",
        caption=f"windows begin from {begin}",
    )
    for column in ("partition", "log from", "from", "to", "to fold before", "records"):
        table.add_column(column, justify="right")
    for partition, (first, start, end) in plan.spans.items():
        figures = (partition, first, start, end, plan.before(partition), end - start)
        table.add_row(*(f"{figure:,}" for figure in figures))
    table.add_row("all", "", "", "", f"{plan.warm_up:,}", f"{plan.records:,}")
    return table


def report_table(report: ReplayReport) -> Table:
    """What a replay did, for a terminal."""
    title = f"replay of {report.topic} into {report.into} ({report.view})"
    table = Table(show_header=False, title=title)
    whom = "all" if report.entities is None else f"{report.entities:,}"
    for name, value in (
        ("finished", "yes" if report.finished else "no: go on with --resume"),
        ("entities", whom),
        ("records folded before the span", f"{report.warm_up_records:,}"),
        ("records of the span", f"{report.records:,}"),
        ("events accepted", f"{report.accepted:,}"),
        ("duplicates", f"{report.duplicates:,}"),
        ("late, dropped", f"{report.late:,}"),
        ("bad records", f"{sum(report.bad_records.values()):,}"),
        ("rows", f"{report.rows:,}"),
        ("rows into the offline log", f"{report.rows_journalled:,}"),
        ("rows offered online", f"{report.rows_published:,}"),
        ("of them older than what stands", f"{report.rows_superseded:,}"),
        ("of them unproven", f"{report.unproven_rows:,}"),
        ("seconds", f"{report.seconds:,.1f}"),
    ):
        table.add_row(name, value)
    return table


def write_report(report: ReplayReport, folder: Path) -> None:
    """Write it as report.json and report.txt."""
    (folder / "report.json").write_bytes(msgspec.json.encode(asdict(report)) + b"\n")
    with (folder / "report.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=100).print(report_table(report))

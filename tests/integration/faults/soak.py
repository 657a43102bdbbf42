"""Many schedules, one after another: `make soak`.

    python -m tests.integration.faults.soak [--schedules 200] [--seed N] [--json]

Exit 1 where any schedule left something else than one clean run leaves; each that failed is told
with the command that runs it again.
"""

import json
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.integration.faults.schedule import Report, perform
from tests.integration.faults.stage import stage

COMMAND = "python -m tests.integration.faults.soak --seed"

console = Console(stderr=True)


def main(
    *,
    schedules: Annotated[int, typer.Option(help="How many, from --first on")] = 200,
    first: Annotated[int, typer.Option(help="Seed of the first")] = 0,
    seed: Annotated[int | None, typer.Option(help="Run this one alone, and keep its files")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Run schedules, and say what they left."""
    warnings.simplefilter("ignore")
    seeds = range(first, first + schedules) if seed is None else [seed]
    folder = Path(tempfile.mkdtemp(prefix="llm4es-soak-"))
    started = time.monotonic()
    reports: list[Report] = []
    with stage(folder) as shared:
        for number in seeds:
            reports.append(perform(shared, number))
            _tell(reports[-1], folder)
    elapsed_s = time.monotonic() - started
    failed = [report for report in reports if report.problems]
    figures = {
        "schedules": len(reports),
        "failed": len(failed),
        "records": sum(report.records for report in reports),
        "workers_restarted": sum(report.restarts for report in reports),
        "minutes": round(elapsed_s / 60, 1),
        "faults": dict(sorted(Counter(k for report in reports for k in report.kinds).items())),
    }
    if as_json:
        typer.echo(json.dumps(figures))
    else:
        _print(figures)
    if failed:
        raise typer.Exit(1)


def _tell(report: Report, folder: Path) -> None:
    verdict = "FAILED" if report.problems else "ok"
    console.print(
        f"{report.seed:4d} {verdict:6s} {report.seconds:5.1f} s  {', '.join(report.kinds)}",
        highlight=False,
    )
    if report.problems:
        for problem in report.problems[:8]:
            console.print(f"       {problem}", markup=False, highlight=False)
        console.print(f"       again: {COMMAND} {report.seed}   (files: {folder})", highlight=False)


def _print(figures: dict[str, object]) -> None:
    table = Table(title="soak", show_header=False)
    for name, value in figures.items():
        counts = value.items() if isinstance(value, dict) else ()
        table.add_row(name, ", ".join(f"{kind} {n}" for kind, n in counts) or str(value))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)

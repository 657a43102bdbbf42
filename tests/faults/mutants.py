"""Six ways to break the order of DESIGN 4 on purpose: `make mutants`.

    python -m tests.faults.mutants [--only NAME]

Each is an edit of the code, made in a copy of the repository; `tests/faults` must fail there, and
pass in a copy without one. Exit 0 when it is so, 1 when a mutant lives, 2 when one no longer fits.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("llm4es", "stream_worker", "tests", "dev")
TESTS_FAILED = 1  # pytest's exit code; others mean that the tests did not run
TEST_DEADLINE_S = 20  # of one test: a worker that goes round and round is caught too
DEADLINE_S = 300


@dataclass(frozen=True, slots=True)
class Edit:
    """One place of the code, and what stands there in a mutant."""

    path: str
    found: str
    put: str


_PUBLISH = """\
            self._patience.with_(lambda: self._sink.journal(batch.rows, _spans(records)))
            self._patience.with_(  # 1. publish: offline first, then online
                lambda: self._sink.publish(
                    batch.newest, reached=reached, held=self._places.published
                )
            )
"""
_LATER = """\
        self._sink.journal(batch.rows, _spans(records))
        self._sink.publish(batch.newest, reached=reached, held=self._places.published)
        self._hot.keep(batch.windows)
"""
MUTANTS: dict[str, tuple[Edit, ...]] = {
    "publish after commit": (
        Edit("stream_worker/worker.py", _PUBLISH, ""),
        Edit("stream_worker/worker.py", "        self._hot.keep(batch.windows)\n", _LATER),
    ),
    "offsets before windows": (
        Edit(
            "stream_worker/window_store/redis.py",
            "        self._write_windows(batch)\n        self._write_offsets(batch)\n",
            "        self._write_offsets(batch)\n        self._write_windows(batch)\n",
        ),
    ),
    "no fencing": (
        Edit(
            "stream_worker/window_store/redis.py",
            "if (found or '0') ~= ARGV[1] then return found and 0 or -1 end\n",
            "",
        ),
        Edit(
            "stream_worker/window_store/sqlite.py",
            '"WHERE bundle = ? AND entity = ? AND version = ?"',
            '"WHERE bundle = ? AND entity = ? AND ? IS NOT NULL"',
        ),
        Edit(
            "stream_worker/window_store/sqlite.py",
            "        if standing != window.version:\n",
            "        if standing < 0:\n",
        ),
    ),
    "as_of from event time": (
        Edit(
            "llm4es/windows.py",
            "return max(recorded_at, after, floor)",
            "return max(after, floor)",
        ),
    ),
    "no store offsets": (
        Edit(
            "stream_worker/placing.py",
            "stored = self._store.offsets(topic)\n",
            "stored = dict(self._source.committed(partitions))\n",
        ),
        Edit(
            "stream_worker/placing.py",
            "        self.held |= {tp: stored.get(tp, 0) for tp in partitions}\n",
            "",
        ),
        Edit(
            "stream_worker/placing.py",
            "            self.held[tp] = max(offset, self.held.get(tp, 0))\n",
            "",
        ),
    ),
    "cache kept after Fenced": (
        Edit(
            "stream_worker/worker.py",
            "            self._hot.drop()  # what was written of the batch is not known\n",
            "",
        ),
    ),
}


def main(*, only: Annotated[str | None, typer.Option(help="Name of one mutant")] = None) -> None:
    """Break the code in each of the ways, and see the fault suite fail."""
    names = list(MUTANTS) if only is None else [only]
    table = Table("mutant", "suite", "seconds", "caught by")
    alive = []
    for name, edits in (("none", ()), *((name, MUTANTS[name]) for name in names)):
        started = time.monotonic()
        code, said = _try(edits)
        caught = code == TESTS_FAILED
        if caught != bool(edits):
            alive.append(name)
        if code not in {0, TESTS_FAILED}:
            print(said, file=sys.stderr)  # noqa: T201 - what the tests said
            raise typer.Exit(2)
        failed = next((line for line in said.splitlines() if line.startswith("FAILED")), "")
        seconds = time.monotonic() - started
        table.add_row(
            name, "fails" if caught else "passes", f"{seconds:.0f}",
            failed.partition("::")[2].partition(" - ")[0],
        )  # fmt: skip
    Console().print(table)
    if alive:
        print(f"not as it should be: {', '.join(alive)}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(1)


def _try(edits: Sequence[Edit]) -> tuple[int, str]:
    """Exit code and output of the fault suite on a copy of the code with these edits."""
    with tempfile.TemporaryDirectory(prefix="llm4es-mutant-") as folder:
        copy = Path(folder)
        for name in COPIED:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for edit in edits:
            path = copy / edit.path
            text = path.read_text()
            if text.count(edit.found) != 1:
                print(f"{edit.path} no longer has, once: {edit.found}", file=sys.stderr)  # noqa: T201
                raise typer.Exit(2)
            path.write_text(text.replace(edit.found, edit.put))
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "tests/faults",
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                f"--timeout={TEST_DEADLINE_S}",
            ],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            check=False,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    typer.run(main)

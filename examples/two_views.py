r"""One log of payments, seen by its customers and by its terminals: two models, two Feast views.

    events.jsonl ---------------> bundle of customers --> worker --> view of customers   \
         \--> terminals.jsonl --> bundle of terminals --> worker --> view of terminals   > Feast

Embedded: files as logs, SQLite as online store, folders of Parquet as offline logs. On Kafka
`python -m stream_worker repartition` writes the terminals' topic (docs/repartition.md); here a file
of the records that name a terminal is the same log.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

__all__ = ["CUSTOMER", "ENTITIES", "TERMINAL", "CommandFailed", "Log", "TwoViews"]

ROOT = Path(__file__).resolve().parent.parent
_MARKER = ".two-views"  # in a folder that may be emptied
CUSTOMER, TERMINAL = ENTITIES = ("customer", "terminal")


class CommandFailed(Exception):
    """A command of ours ended otherwise than it should; what it wrote is in the message."""


@dataclass(frozen=True, slots=True)
class Log:
    """A file of events and its schema; `recorded_at` names the field of the log's own time."""

    events: Path
    schema: Path
    recorded_at: str | None = None


@dataclass(frozen=True)
class TwoViews:
    """Where everything lies, and the steps that put it there."""

    home: Path

    @property
    def sample(self) -> Path:
        """The simulated log, its schema and labels."""
        return self.home / "sample"

    @property
    def repo(self) -> Path:
        """The Feast repository: a copy of ours, with its data."""
        return self.home / "feature_repo"

    def clear(self) -> None:
        """Begin anew. Raises FileExistsError for a folder that holds something else."""
        marker = self.home / _MARKER
        if self.home.exists() and any(self.home.iterdir()) and not marker.exists():
            raise FileExistsError(f"{self.home} is not of an earlier run: name another folder")
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir(parents=True)
        marker.touch()

    def bundle(self, entity: str) -> Path:
        """The bundle of an entity."""
        return self.home / "bundles" / entity

    def simulate(self, *, customers: int, days: int) -> dict[str, Log]:
        """Write payments, and of them the terminals' log; give the log of each entity."""
        run(
            ["export", "simulate", "--customers", str(customers), "--days", str(days),
             "--out", str(self.sample)],
        )  # fmt: skip
        events, terminals = self.sample / "events.jsonl", self.sample / "terminals.jsonl"
        with events.open(encoding="utf-8") as lines, terminals.open("w", encoding="utf-8") as out:
            out.writelines(line for line in lines if "terminal_id" in json.loads(line))
        schema = self.sample / "schema.yaml"
        return {
            CUSTOMER: Log(events, schema, "recorded_at"),
            TERMINAL: Log(terminals, schema, "recorded_at"),
        }

    def payments(self) -> pd.DataFrame:
        """Labelled payments, oldest first, with the payment's own fields."""
        with (self.sample / "events.jsonl").open(encoding="utf-8") as lines:
            records = pd.DataFrame([r for r in map(json.loads, lines) if r["type"] == "payment"])
        own = ["event_id", "terminal_id", "category", "channel", "country"]
        labels = pd.read_parquet(self.sample / "labels.parquet").merge(
            records.drop_duplicates("event_id")[own], on="event_id", validate="1:1"
        )
        labels = labels.rename(columns={"event_time": "event_timestamp"})
        return labels.sort_values(["event_timestamp", "event_id"], ignore_index=True)

    def train(
        self, logs: dict[str, Log], *, recipes: dict[str, str] | None = None, steps: int | None
    ) -> None:
        """Train a small language model for each entity, side by side, and export the bundles."""
        chosen = recipes or dict.fromkeys(logs, "quickstart")
        run(
            *(
                ["export", "finetune", "--recipe", chosen[entity], "--events", str(log.events),
                 "--schema", str(log.schema), "--entity", entity,
                 "--out", str(self.bundle(entity)),
                 *([] if steps is None else ["--steps", str(steps)])]
                for entity, log in logs.items()
            )
        )  # fmt: skip

    def apply(self) -> None:
        """Tell Feast of both bundles: a view and a stable service each."""
        ignored = shutil.ignore_patterns("data", "__pycache__")
        shutil.copytree(ROOT / "feature_repo", self.repo, ignore=ignored, dirs_exist_ok=True)
        bundles = ",".join(str(self.bundle(entity)) for entity in ENTITIES)
        run(["feast.cli.cli", "-c", str(self.repo), "apply"], env={"LLM4ES_BUNDLES": bundles})

    def stream(self, logs: dict[str, Log]) -> dict[str, int]:
        """Send each log through a worker of its own, side by side; give the rows that each wrote.

        A row per event: the offline log then holds what was known before and after each payment.
        """
        printed = run(
            *(
                ["stream_worker", "run", "--source", "file", "--events", str(log.events),
                 *(["--recorded-at-field", log.recorded_at] if log.recorded_at else []),
                 "--bundle", str(self.bundle(entity)), "--feature-repo", str(self.repo),
                 "--window-store", f"sqlite:{self.home / entity / 'windows.db'}",
                 "--state-dir", str(self.home / entity), "--threads", "1",
                 "--every-event", "--until-end", "--json"]
                for entity, log in logs.items()
            )
        )  # fmt: skip
        return {
            entity: int(json.loads(out)["rows"]) for entity, out in zip(logs, printed, strict=True)
        }


def run(*commands: Sequence[str], env: dict[str, str] | None = None) -> list[str]:
    """Run our commands side by side, as a person would type them; give what each printed.

    Raises CommandFailed.
    """
    settings = {
        **os.environ,
        # Two at once on two cores: threads that wait for one another by spinning would fight.
        **({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if len(commands) > 1 else {}),
        "PYTHONWARNINGS": "ignore::RuntimeWarning",  # Feast's, of its stream views
        **(env or {}),
    }
    started = []
    try:
        for command in commands:
            print(f"$ python -m {shown(' '.join(command))}", flush=True)
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command],
                    cwd=ROOT,
                    env=settings,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
        told = [process.communicate() for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
    for command, process, (_, errors) in zip(commands, started, told, strict=True):
        if process.returncode:
            raise CommandFailed(f"{' '.join(command)} ended with {process.returncode}:\n{errors}")
    return [out for out, _ in told]


def shown(command: str) -> str:
    """A command without the checkout's own path."""
    return command.replace(f"{ROOT}/", "")

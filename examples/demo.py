"""The main job end to end on embedded defaults: no server, two files of SQLite, one folder.

    simulator -> bundle -> feast apply -> stream_worker -> stock Feast, online and point in time

Every step is a command that you could type yourself; it is printed before it runs. Run it as
`make demo`. What it leaves is under build/demo, and a second run begins anew.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer
from feast import FeatureStore
from rich.console import Console
from rich.table import Table

from examples.fraud_model import compare

ROOT = Path(__file__).resolve().parent.parent
SHOWN_CUSTOMERS = 3
SHOWN_VALUES = 4

console = Console(highlight=False)


def main(
    home: Annotated[Path, typer.Option(help="Folder to leave everything in")] = Path("build/demo"),
    customers: Annotated[int, typer.Option(help="Customers to simulate")] = 240,
    days: Annotated[int, typer.Option(help="Days to simulate")] = 75,
    steps: Annotated[int | None, typer.Option(help="Training steps [default: 6 epochs]")] = None,
) -> None:
    """Run the steps, then show what stock Feast reads and what a fraud model makes of it."""
    warnings.simplefilter("ignore")  # Feast's own deprecations are not the reader's concern
    started = time.monotonic()
    demo = Demo((ROOT / home).resolve())
    shutil.rmtree(demo.home, ignore_errors=True)
    demo.run("1. Simulate card payments", demo.simulation(customers, days))
    demo.run("2. Train a small language model on them, export a bundle", demo.quickstart(steps))
    ignored = shutil.ignore_patterns("data", "__pycache__")
    shutil.copytree(ROOT / "feature_repo", demo.repo, ignore=ignored)
    demo.run("3. Tell Feast", ["feast.cli.cli", "-c", str(demo.repo), "apply"])
    report = json.loads(demo.run("4. Stream the events through it", demo.worker()))
    console.rule("[bold]5. Read it back through stock Feast", align="left")
    show_online(demo)
    show_fraud_model(demo)
    show_summary(demo, report, time.monotonic() - started)


@dataclass(frozen=True)
class Demo:
    """Where things lie, and the commands that put them there."""

    home: Path

    @property
    def sample(self) -> Path:
        """Log, schema and labels."""
        return self.home / "sample"

    @property
    def bundle(self) -> Path:
        """The bundle."""
        return self.home / "bundle"

    @property
    def repo(self) -> Path:
        """The Feast repository: a copy of ours, with its data."""
        return self.home / "feature_repo"

    @cached_property
    def customers(self) -> list[str]:
        """Customers in the order in which the log first names them."""
        with (self.sample / "events.jsonl").open(encoding="utf-8") as lines:
            return list(dict.fromkeys(json.loads(line)["customer_id"] for line in lines))

    def simulation(self, customers: int, days: int) -> list[str]:
        """The first step's command."""
        return [
            "export", "simulate", "--customers", str(customers), "--days", str(days),
            "--out", str(self.sample),
        ]  # fmt: skip

    def quickstart(self, steps: int | None) -> list[str]:
        """The second step's command."""
        return [
            "export", "quickstart", "--events", str(self.sample / "events.jsonl"),
            "--entity", "customer", "--out", str(self.bundle),
            *([] if steps is None else ["--steps", str(steps)]),
        ]  # fmt: skip

    def worker(self) -> list[str]:
        """The fourth step's command; small batches, so that rows are fresh."""
        return [
            "stream_worker", "run", "--source", "file",
            "--events", str(self.sample / "events.jsonl"), "--recorded-at-field", "recorded_at",
            *self.serving(), "--state-dir", str(self.home / "state"),
            "--max-records", "128", "--every-event", "--until-end", "--live", "--json",
        ]  # fmt: skip

    def serving(self) -> list[str]:
        """What every command of the worker needs to know."""
        return [
            "--bundle", str(self.bundle), "--feature-repo", str(self.repo),
            "--window-store", f"sqlite:{self.home / 'state' / 'windows.db'}",
        ]  # fmt: skip

    def run(self, title: str, arguments: list[str]) -> str:
        """Run a command of ours as a person would; what it printed for a program, if it did.

        Ends the demo with its exit code where it fails.
        """
        console.rule(f"[bold]{title}", align="left")
        console.print(f"$ python -m {shown(' '.join(arguments))}", style="dim", markup=False)
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                "LLM4ES_BUNDLE": str(self.bundle),
                "PYTHONWARNINGS": "ignore::RuntimeWarning",  # Feast's, of its stream views
            },
            check=False,
            text=True,
            stdout=subprocess.PIPE if "--json" in arguments else None,
        )
        if done.returncode:
            sys.exit(done.returncode)
        return done.stdout or ""


def show_online(demo: Demo) -> None:
    """Three customers, read as any Feast client reads them."""
    store = FeatureStore(repo_path=str(demo.repo))
    customers = demo.customers[:SHOWN_CUSTOMERS]
    rows = store.get_online_features(
        features=store.get_feature_service("customer_llm4es"),
        entity_rows=[{"customer_id": customer} for customer in customers],
    ).to_dict()
    console.print(
        'store.get_online_features(features=store.get_feature_service("customer_llm4es"), ...)',
        style="dim",
        markup=False,
        soft_wrap=True,
    )
    table = Table()
    for column in ("customer", "events", "last event", "surprise of it", "embedding"):
        table.add_column(column)
    for index, customer in enumerate(customers):
        vector = rows["embedding"][index]
        table.add_row(
            customer,
            str(rows["event_count"][index]),
            f"{rows['last_event_time'][index]:%Y-%m-%d %H:%M}",
            f"{rows['surprise_last'][index]:+.2f} nats",
            " ".join(f"{value:+.2f}" for value in vector[:SHOWN_VALUES]) + f" ... ({len(vector)})",
        )
    console.print(table)


def show_fraud_model(demo: Demo) -> None:
    """A training set as of each payment, and what each part of it is worth."""
    console.print("store.get_historical_features(entity_df=labels, ...)", style="dim", markup=False)
    with console.status("joining as of each payment, training"):
        comparison = compare(demo.repo, demo.sample)
    console.print(
        f"{comparison.train:,} payments to train on (labels known by {comparison.split:%Y-%m-%d}), "
        f"{comparison.test:,} later ones to test on, {comparison.test_frauds} of them fraud"
    )
    table = Table(title="a fraud model, trained on features as of each payment")
    for column in ("features", "ROC-AUC", "average precision"):
        table.add_column(column, justify="left" if column == "features" else "right")
    for score in comparison.scores:
        table.add_row(score.features, f"{score.roc_auc:.3f}", f"{score.average_precision:.3f}")
    console.print(table)


def show_summary(demo: Demo, report: dict[str, Any], elapsed_s: float) -> None:
    """What happened, and where to look next."""
    table = Table(title="What happened", show_header=False)
    dead = sum(report["dead_letters"].values())
    for name, value in (
        ("records read", f"{report['records']:,}"),
        ("events folded", f"{report['accepted']:,}"),
        ("duplicates, late, dead", f"{report['duplicates']:,}, {report['late']:,}, {dead:,}"),
        ("users", f"{len(demo.customers):,}"),
        ("embeddings published", f"{report['rows']:,}"),
        ("events/s of the worker", f"{report['records'] / report['busy_s']:,.0f}"),
        ("poll to readable, p50", f"{report['freshness_p50_s'] * 1000:,.0f} ms"),
        ("poll to readable, p99", f"{report['freshness_p99_s'] * 1000:,.0f} ms"),
        ("the demo in all", f"{elapsed_s:,.0f} s"),
    ):
        table.add_row(name, value)
    console.print(table)
    console.print("Where to look next (after: . .venv/bin/activate)", style="bold")
    for hint in (
        " ".join(["python -m stream_worker inspect", demo.customers[0], *demo.serving()]),
        f"LLM4ES_BUNDLE=$PWD/{shown(str(demo.bundle))} feast -c {demo.repo} ui",
        "make stack        # real Kafka and Redis on this machine, to run the worker on",
        "docs/architecture.md, docs/schema.md (your own topic), docs/simulator.md (this data)",
    ):
        console.print("  " + shown(hint), markup=False, soft_wrap=True)


def shown(command: str) -> str:
    """A command without the checkout's own path."""
    return command.replace(f"{ROOT}/", "")


if __name__ == "__main__":
    typer.run(main)

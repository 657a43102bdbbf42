"""What the stream benchmarks are made of: card payments, and bundles with and without a model."""

import json
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm4es.bundle import Bundle
from llm4es.events import Record
from llm4es.features import Embedded, SumsLayout
from llm4es.schema import load_schema
from llm4es.testing import modelless_bundle
from llm4es.windows import FinishedChapter, Window, WindowPolicy, visible_chapters

__all__ = ["SCHEMA", "CountEmbedder", "bench_bundle", "documents", "make_bundle", "make_records"]

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
PARTITIONS = 4
SCHEMA = """
name: payments
entities: {customer: {field: customer_id}}
event_id: event_id
event_time: {field: at, format: iso8601}
types:
  payment:
    fields:
      amount: {kind: number, unit: EUR, decimals: 2}
      category: {kind: category}
      terminal_id: {kind: category}
"""
_CATEGORIES = ("grocery", "fuel", "travel", "online", "cash", "dining")


def bench_bundle() -> Bundle:
    """Chapters of 64 card payments on average, as the domain recipes cut them."""
    policy = WindowPolicy(chapter_events=64, max_chapter_tokens=8192)
    return modelless_bundle(load_schema(SCHEMA), entity="customer", window=policy)


def documents(count: int, customers: int, seed: int = 0) -> Iterator[dict[str, object]]:
    """Card payments in the order of time."""
    rng = random.Random(seed)  # noqa: S311 - a benchmark's data
    for number in range(count):
        yield {
            "customer_id": f"c{rng.randrange(customers)}",
            "event_id": f"e{number}",
            "at": (START + timedelta(seconds=number)).isoformat(),
            "amount": round(rng.lognormvariate(3, 1), 2),
            "category": rng.choice(_CATEGORIES),
            "terminal_id": f"t{rng.randrange(500)}",
        }


def make_records(count: int, customers: int) -> list[Record]:
    """The same as records of a log."""
    offsets = dict.fromkeys(range(PARTITIONS), 0)
    records = []
    for document in documents(count, customers):
        key = str(document["customer_id"]).encode()
        partition = sum(key) % PARTITIONS
        records.append(
            Record(
                topic="shop",
                partition=partition,
                offset=offsets[partition],
                timestamp=START + timedelta(days=100),
                key=key,
                value=json.dumps(document).encode(),
            )
        )
        offsets[partition] += 1
    return records


def make_bundle(folder: Path) -> tuple[Path, Path]:
    """Simulated payments, and a small domain model trained on them for an epoch."""
    events, bundle = folder / "payments/events.jsonl", folder / "bundle"
    for arguments in (
        ["simulate", "--out", str(events.parent), "--customers", "300", "--days", "60"],
        ["quickstart", "--events", str(events), "--schema", str(events.with_name("schema.yaml")),
         "--entity", "customer", "--epochs", "1", "--out", str(bundle)],
    ):  # fmt: skip
        subprocess.run([sys.executable, "-m", "export", *arguments], check=True, stdout=sys.stderr)
    return bundle, events


class CountEmbedder:
    """Embedder without a model, as cheap as one can be: a chapter's state is its token count."""

    def __init__(self, bundle: Bundle) -> None:
        self._layout = SumsLayout(bundle)
        self._policy = bundle.manifest.window
        self._dim = bundle.manifest.dim

    @property
    def half_lives(self) -> NDArray[np.float64]:
        """Half-lives (n,) by which sums (n,) of chapters decay."""
        return self._layout.half_lives

    def embed(self, windows: Sequence[Window]) -> Embedded:
        """B windows -> vectors (B, dim) float32; no surprise."""
        vectors = np.empty((len(windows), self._dim), np.float32)
        finished: list[dict[int, FinishedChapter]] = []
        for row, window in enumerate(windows):
            done = {}
            for index in visible_chapters(window, self._policy)[:-1]:
                chapter = window.chapters[index]
                if chapter.sums is None:
                    sums = np.full(self._layout.size, float(chapter.tokens))
                    done[index] = FinishedChapter(ids_hash=b"", sums=sums)
            finished.append(done)
            vectors[row] = window.chapters[-1].tokens
        count = len(windows)
        return Embedded(
            vectors,
            np.zeros((count, 0), np.float32),
            np.zeros(count, np.float32),
            tuple(finished),
        )

    def forget(self, entity_ids: Iterable[str]) -> None:
        """Nothing is kept."""

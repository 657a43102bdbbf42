"""A worker on a scripted log, a real window store and a sink in memory."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from msgspec.structs import replace

from llm4es.bundle import Bundle
from llm4es.deletion import DeletionKey
from llm4es.events import Record
from llm4es.features import FeatureRow
from llm4es.testing import (
    Boundaries,
    Crashing,
    Interrupted,
    LengthEmbedder,
    MemorySink,
    ScriptedLog,
    modelless_bundle,
)
from llm4es.windows import Window, WindowPolicy
from stream_worker.metrics import Metrics
from stream_worker.ports import (
    DeadLetter,
    LogDescription,
    LogIdentity,
    PartitionSpan,
    WindowStore,
)
from stream_worker.window_store.codec import encode_window
from stream_worker.window_store.sqlite import SqliteWindowStore
from stream_worker.worker import Parts, Worker, WorkerPolicy
from tests.histories import payment, records, schema

PARTITIONS = 2
DELETION_KEY = DeletionKey("a key of tests alone")
POLICY = WindowPolicy(
    chapter_events=5,
    max_chapter_tokens=300,
    allowed_lateness=timedelta(seconds=50),
    max_clock_skew=timedelta(seconds=5),
)


class ParkedLetters:
    """Dead letters in memory."""

    def __init__(self) -> None:
        self.parked: list[DeadLetter] = []

    def park(self, letters: Iterable[DeadLetter]) -> None:
        self.parked += letters

    def close(self) -> None:
        """Nothing to let go."""


def shop_log(seed: int, events: int = 160, *, deletions: float = 0.06) -> list[Record]:
    """Payments of five customers: some out of order, late, twice or bad, and some tombstones."""
    rng = random.Random(seed)
    documents: list[dict[str, object]] = []
    for number in range(events):
        second = number * 7 - rng.choice([0, 0, 0, 20, 90])
        customer = f"c{rng.randrange(5)}"
        amount: object = "much" if rng.random() < 0.05 else round(rng.uniform(1, 200), 2)
        documents.append(payment(f"e{number}", second, customer=customer, amount=amount))
        if rng.random() < 0.1:
            documents.append(rng.choice(documents))
    return [
        replace(record, value=None) if rng.random() < deletions else record
        for record in records(documents, partitions=PARTITIONS)
    ]


@dataclass
class World:
    """All that outlives a worker's death.

    The window store is an SQLite file in the folder, or what `store_of` opens for a bundle's id.
    """

    folder: Path
    log: list[Record]
    store_of: Callable[[str], WindowStore] | None = None
    bundle: Bundle = field(
        default_factory=lambda: modelless_bundle(schema(), entity="customer", window=POLICY)
    )
    sink: MemorySink = field(default_factory=MemorySink)
    letters: ParkedLetters = field(default_factory=ParkedLetters)
    group: dict[Any, int] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    topic: str = "shop"
    partitions: int = PARTITIONS

    def open_store(self) -> WindowStore:
        if self.store_of is not None:
            return self.store_of(self.bundle.id)
        return SqliteWindowStore(
            self.folder / "windows.db", self.bundle.id, deletion_key=DELETION_KEY
        )

    def describe(self) -> LogDescription:
        return LogDescription(
            identity=LogIdentity(topic=self.topic, topic_id="t", partitions=self.partitions),
            spans={p: PartitionSpan(0, len(self.log)) for p in range(self.partitions)},
            compacted=False,
            timestamps="log_append",
        )

    def work(
        self,
        *,
        batches: Iterable[int] = (),
        boundaries: Boundaries | None = None,
        every_event: bool = False,
        before_polls: Iterable[Callable[[], object]] = (),
        before_journals: Iterable[Callable[[], object]] = (),
    ) -> Boundaries:
        """Run a fresh worker to the log's end, or to the crash that the boundaries hold.

        The happenings come one by one, each before the next poll or journal.
        """
        passed = boundaries or Boundaries()
        source = ScriptedLog(self.log, self.describe, batches)
        source.group = self.group
        store = self.open_store()
        self.metrics = Metrics()
        sink = Interrupted(self.sink, "journal", before_journals)
        parts = Parts(
            bundle=self.bundle,
            source=cast(
                "Any",
                Crashing(Interrupted(source, "poll", before_polls), passed, ["poll", "commit"]),
            ),
            store=cast("Any", Crashing(store, passed, ["begin"])),
            embedder=LengthEmbedder(self.bundle),
            sink=cast("Any", Crashing(sink, passed, ["delete", "journal", "publish"])),
            dead_letters=cast("Any", Crashing(self.letters, passed, ["park"])),
            metrics=self.metrics,
        )
        policy = WorkerPolicy(max_records=8, every_event=every_event, deletes=True, until_end=True)
        try:
            Worker(parts, policy).run()
        finally:
            store.close()
        return passed

    def windows(self) -> dict[str, bytes]:
        return {key: encode_window(window) for key, window in self.windows_of().items()}

    def windows_of(self) -> dict[str, Window]:
        store = self.open_store()
        partitions = {record.topic_partition for record in self.log}
        try:
            known = {
                f"c{number}": store.read(f"c{number}") for number in range(5)
            }  # deleted ones too
            found = {key: window for key, window in known.items() if window is not None}
            return found | {each.entity_id: each for each in store.scan(partitions)}
        finally:
            store.close()

    def dead(self) -> set[tuple[int, int]]:
        """Coordinates of the parked records; a letter may be there twice."""
        return {(letter.record.partition, letter.record.offset) for letter in self.letters.parked}


def assert_equal_to_clean(faulted: World, clean: World) -> None:
    """Compare with one clean, event-by-event run: windows, letters, online and offline rows."""
    rows = {told(row)[:2]: told(row) for row in clean.sink.offline}
    assert faulted.windows() == clean.windows()
    assert faulted.dead() == clean.dead()
    assert {k: told(row) for k, row in faulted.sink.online.items()} == {
        k: told(row) for k, row in clean.sink.online.items()
    }
    for row in faulted.sink.offline:
        assert told(row) == rows[told(row)[:2]]
    newest = {row.entity_id: told(row) for row in sorted(faulted.sink.offline, key=told)}
    assert newest == {k: told(row) for k, row in faulted.sink.online.items()}


def told(row: FeatureRow) -> tuple[object, ...]:
    """A row as something that can be compared; floats as the log would give them again."""
    return (
        row.entity_id,
        row.as_of,
        row.event_count,
        row.last_event_id,
        row.last_event_time,
        tuple(round(float(value), 3) for value in row.embedding),
    )

"""What the loop does with each kind of record and each kind of failure."""

import base64
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import pytest
from msgspec.structs import replace

from llm4es.bundle import Bundle
from llm4es.deletion import DeletionKey
from llm4es.errors import (
    BundleMismatch,
    Fenced,
    LLM4ESError,
    NonFiniteEmbedding,
    SinkRejected,
    SinkUnavailable,
    SourceUnavailable,
)
from llm4es.events import (
    Record,
    TopicPartition,
    coordinates_id,
    decode_object,
    origin_headers,
)
from llm4es.features import FeatureRow
from llm4es.testing import (
    Interrupted,
    LengthEmbedder,
    MemorySink,
    PoisonedEmbedder,
    ScriptedLog,
    modelless_bundle,
)
from llm4es.windows import Window, WindowPolicy
from stream_worker.dead_letters import FileDeadLetters
from stream_worker.formats.decoding import Decode
from stream_worker.metrics import Metrics, Summary
from stream_worker.ports import LogDescription, LogIdentity, PartitionSpan
from stream_worker.window_store.codec import encode_window
from stream_worker.window_store.sqlite import SqliteWindowStore
from stream_worker.worker import Parts, Worker, WorkerPolicy
from tests.histories import START, payment, records, schema

PARTITIONS = 2
KEY = DeletionKey("a key of tests alone")
POLICY = WindowPolicy(
    chapter_events=5,
    max_chapter_tokens=300,
    allowed_lateness=timedelta(seconds=50),
    max_clock_skew=timedelta(seconds=5),
)
Happenings = Sequence[Callable[[], object]]
FOREVER_S = 86_400.0


@dataclass
class Shop:
    """A worker on a log in memory: the window store and the dead letters are real files."""

    folder: Path
    log: list[Record]
    bundle: Bundle = field(
        default_factory=lambda: modelless_bundle(schema(), entity="customer", window=POLICY)
    )
    sink: MemorySink = field(default_factory=MemorySink)
    group: dict[TopicPartition, int] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    poisonous: Callable[[Window], bool] = lambda _: False
    happenings: dict[str, Happenings] = field(default_factory=dict)  # before "part.method"
    topic: str = "shop"
    deletion_key: DeletionKey | None = None
    decode: Decode = decode_object
    first: int = 0  # offset at which partition 0 begins
    wrap: Callable[[Parts], Parts] = lambda parts: parts

    def work(
        self,
        *,
        batches: Iterable[int] = (),
        on_batch: Callable[[Worker], None] = lambda _: None,
        **policy: Any,  # noqa: ANN401 - of a WorkerPolicy
    ) -> Summary:
        """Run a fresh worker to the log's end."""
        source = ScriptedLog(self.log, self.describe, batches)
        source.group = self.group
        store = self.open_store()
        letters = FileDeadLetters(self.folder / "letters.jsonl")
        parts = Parts(
            bundle=self.bundle,
            source=self.interrupted("source", source),
            store=self.interrupted("store", store),
            embedder=self.interrupted(
                "embedder", PoisonedEmbedder(LengthEmbedder(self.bundle), self.poisonous)
            ),
            sink=self.interrupted("sink", self.sink),
            dead_letters=self.interrupted("letters", letters),
            metrics=self.metrics,
            decode=self.decode,
        )
        worker = Worker(self.wrap(parts), WorkerPolicy(**{"until_end": True, **policy}))
        try:
            worker.run(lambda: on_batch(worker))
        finally:
            letters.close()
            store.close()
        return self.metrics.summary()

    def interrupted(self, name: str, part: object) -> Any:  # noqa: ANN401 - stands in for any part
        for place, happenings in self.happenings.items():
            owner, _, method = place.partition(".")
            if owner == name:
                return Interrupted(part, method, happenings)
        return part

    def open_store(self) -> SqliteWindowStore:
        return SqliteWindowStore(
            self.folder / "windows.db", self.bundle.id, deletion_key=self.deletion_key
        )

    def describe(self) -> LogDescription:
        return LogDescription(
            identity=LogIdentity(topic=self.topic, topic_id="t", partitions=PARTITIONS),
            spans={0: PartitionSpan(self.first, 99), 1: PartitionSpan(0, 99)},
            compacted=False,
            timestamps="log_append",
        )

    def dead(self) -> dict[tuple[int, int], dict[str, Any]]:
        """Dead letters by partition and offset."""
        lines = (self.folder / "letters.jsonl").read_text().splitlines()
        letters = [json.loads(line) for line in lines]
        return {(letter["partition"], letter["offset"]): letter for letter in letters}

    def window(self, entity_id: str = "c1") -> Window | None:
        store = self.open_store()
        try:
            return store.read(entity_id)
        finally:
            store.close()

    def offsets(self) -> dict[TopicPartition, int]:
        store = self.open_store()
        try:
            return store.offsets("shop")
        finally:
            store.close()

    def told(self) -> dict[str, tuple[object, ...]]:
        """All that is left behind: window and online row of each entity that has one."""
        windows = {entity: self.window(entity) for entity in ("c1", "c2")}
        return {
            entity: (encode_window(window), told(self.sink.online[entity]))
            for entity, window in windows.items()
            if window is not None
        }


def told(row: FeatureRow) -> tuple[object, ...]:
    return (
        row.entity_id, row.as_of, row.event_count, row.last_event_id, row.embedding.tolist(),
    )  # fmt: skip


def payments(count: int, *, customers: int = 1) -> list[Record]:
    return records([payment(f"e{n}", n, customer=f"c{1 + n % customers}") for n in range(count)])


def changed(record: Record, **fields: object) -> Record:
    """The record with other fields in its JSON."""
    assert record.value is not None
    return replace(record, value=json.dumps({**json.loads(record.value), **fields}).encode())


def shows(*event_ids: str) -> Callable[[Window], bool]:
    """Tell windows in which all of these events are."""

    def shown(window: Window) -> bool:
        found = {event.event_id for chapter in window.chapters for event in chapter.events}
        return found.issuperset(event_ids)

    return shown


def raising(error: LLM4ESError) -> Callable[[], NoReturn]:
    def raise_it() -> NoReturn:
        raise error

    return raise_it


BAD: dict[str, tuple[Callable[[Record], Record], str, str]] = {
    "no JSON": (lambda r: replace(r, value=b"{"), "value", "is not JSON"),
    "a tombstone, and no deletion key": (
        lambda r: replace(r, value=None), "value", "set deletion_key"
    ),
    "a large value": (lambda r: changed(r, more="x" * 1000), "value", "max_value_bytes is 1000"),
    "no entity id": (lambda r: changed(r, customer_id=None), "customer_id", "missing"),
    "an unknown type": (lambda r: changed(r, kind="refund"), "kind", "unknown event type"),
    "text for a number": (lambda r: changed(r, amount="much"), "amount", "number is due"),
    "a number for a code": (lambda r: changed(r, goods=5411), "goods", "category"),
    "year 1": (lambda r: changed(r, at="0001-01-01T00:00:00"), "at", "year 1 is not in"),
    "another's key": (lambda r: replace(r, key=b"c2"), "key", "is not the entity's id"),
    "no key": (lambda r: replace(r, key=None), "key", "is not the entity's id"),
    "another partition": (
        lambda r: replace(r, partition=1),
        "partition",
        "stand in partition 0 of shop, this one in partition 1 of shop",
    ),
    "a record before 1970": (
        lambda r: changed(
            replace(r, timestamp=START.replace(year=1969), key=b"c3"),
            customer_id="c3", at="1969-03-01T12:00:00Z",
        ),
        "timestamp", "year 1969",
    ),
    "a record near the end of all time": (
        lambda r: replace(r, timestamp=datetime.max.replace(tzinfo=UTC)), "timestamp", "year 9999",
    ),
    "next year": (
        lambda r: changed(r, at=(START + timedelta(days=365)).isoformat()),
        "event_time",
        "max_clock_skew",
    ),
    "a line longer than a chapter": (
        lambda r: changed(r, goods="g" * 256, note="n" * 256), "value", "longer than a chapter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize(("spoil", "at_fault", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_record_is_parked_with_its_field_and_bytes_and_the_rest_goes_through(
    tmp_path: Path,
    spoil: Callable[[Record], Record],
    at_fault: str,
    reason: str,
    batch: int,
) -> None:
    log = payments(6, customers=2)
    bad = spoil(log[2])
    shop = Shop(tmp_path, [*log[:2], bad, *log[3:]])
    summary = shop.work(max_value_bytes=1000, batches=iter(lambda: batch, 0))

    (letter,) = shop.dead().values()
    assert (letter["topic"], letter["partition"], letter["offset"]) == (
        "shop", bad.partition, bad.offset,
    )  # fmt: skip
    assert letter["field"] == at_fault
    assert reason in letter["reason"]
    for name, original in (("key", bad.key), ("value", bad.value)):
        kept = letter[name]
        assert (None if kept is None else base64.b64decode(kept)) == original
    assert summary.dead_letters == {at_fault: 1}
    assert summary.records == 6
    assert summary.accepted == 5

    (tmp_path / "clean").mkdir()
    clean = Shop(tmp_path / "clean", [*log[:2], *log[3:]])
    clean.work()
    assert shop.told() == clean.told()
    assert shop.offsets()[TopicPartition("shop", 0)] == 6


def test_a_batch_of_nothing_but_bad_records_moves_the_offsets(tmp_path: Path) -> None:
    shop = Shop(tmp_path, [replace(record, value=b"{") for record in payments(3)])
    assert shop.work().rows == 0
    assert len(shop.dead()) == 3
    assert shop.offsets() == shop.group == {TopicPartition("shop", 0): 3}


def test_a_value_of_just_the_allowed_size_goes_through(tmp_path: Path) -> None:
    (record,) = payments(1)
    assert record.value is not None
    assert Shop(tmp_path, [record]).work(max_value_bytes=len(record.value)).accepted == 1


def test_an_integer_of_more_than_64_bits_is_stored_as_a_double(tmp_path: Path) -> None:
    shop = Shop(tmp_path, [changed(record, amount=10**24) for record in payments(1)])
    assert shop.work().accepted == 1
    window = shop.window()
    assert window is not None
    assert window.chapters[0].events[0].fields["amount"] == 1e24


@pytest.mark.parametrize("every_event", [False, True])
def test_an_event_that_alone_makes_the_output_not_finite_is_parked_and_the_rest_goes_through(
    tmp_path: Path, *, every_event: bool
) -> None:
    log = payments(8, customers=2)
    shop = Shop(tmp_path, log, poisonous=shows("e4"))
    shop.work(every_event=every_event)
    assert {at: (letter["field"], letter["reason"]) for at, letter in shop.dead().items()} == {
        (0, 4): ("value", "the model's output for this event alone is not finite")
    }
    (tmp_path / "clean").mkdir()
    clean = Shop(tmp_path / "clean", [*log[:4], *log[5:]])
    clean.work(every_event=every_event)
    assert shop.told() == clean.told()
    assert [told(row) for row in shop.sink.offline] == [told(row) for row in clean.sink.offline]


def test_the_worker_stops_where_no_event_alone_is_at_fault(tmp_path: Path) -> None:
    shop = Shop(tmp_path, payments(4), poisonous=shows("e1", "e2"))
    with pytest.raises(NonFiniteEmbedding):
        shop.work()
    assert_nothing_left(shop)


def test_a_batch_of_nothing_but_poison_is_parked(tmp_path: Path) -> None:
    shop = Shop(tmp_path, payments(4), poisonous=lambda w: shows("e0")(w) or shows("e1")(w))
    shop.work(batches=[1, 1])
    assert shop.dead().keys() == {(0, 0), (0, 1)}
    assert shop.sink.online["c1"].event_count == 2


def assert_nothing_left(shop: Shop) -> None:
    """Neither rows, letters, windows nor offsets of the batch."""
    assert not shop.sink.offline
    assert not shop.sink.online
    assert not shop.dead()
    assert shop.window() is None
    assert not shop.offsets()
    assert not shop.group


AWAY = SinkUnavailable("away", retry_after_s=0.0)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("source.poll", SourceUnavailable("away", retry_after_s=0.0)),
        ("store.begin", AWAY),
        ("sink.journal", AWAY),
        ("sink.publish", AWAY),
        ("letters.park", AWAY),
    ],
)
def test_what_is_away_is_waited_for_and_the_same_records_are_read_again(
    tmp_path: Path, place: str, error: LLM4ESError
) -> None:
    log = payments(7, customers=2)
    log[3] = replace(log[3], value=b"{")
    shop = Shop(tmp_path, log, happenings={place: [raising(error)] * 3})
    summary = shop.work(batches=[2, 2, 5, 2, 2, 2])
    (tmp_path / "clean").mkdir()
    clean = Shop(tmp_path / "clean", log)
    clean.work()
    assert shop.told() == clean.told()
    assert shop.dead().keys() == {(0, 3)}
    assert shop.offsets() == shop.group == clean.offsets()
    assert summary.accepted == 6  # each once, however often it was read
    assert counted(shop, "llm4es_retries_total") == 3


def test_a_stop_ends_the_wait_and_leaves_the_batch_to_the_next_worker(tmp_path: Path) -> None:
    shop = Shop(tmp_path, payments(3))
    stopping: list[Worker] = []

    def stop_while_away() -> NoReturn:
        for worker in stopping:
            worker.stop()
        raise SinkUnavailable("away", retry_after_s=FOREVER_S)

    shop.happenings = {"sink.journal": [stop_while_away]}
    shop.work(batches=[0], on_batch=stopping.append)
    assert_nothing_left(shop)
    shop.happenings = {}
    shop.work()
    assert shop.sink.online["c1"].event_count == 3


def test_a_row_that_the_sink_rejects_stops_the_worker_with_nothing_stored(tmp_path: Path) -> None:
    shop = Shop(
        tmp_path, payments(3), happenings={"sink.journal": [raising(SinkRejected("a bug"))]}
    )
    with pytest.raises(SinkRejected):
        shop.work()
    assert_nothing_left(shop)


def test_a_worker_that_another_has_overtaken_drops_its_batch_and_reads_on(tmp_path: Path) -> None:
    log = payments(6, customers=2)
    other = Shop(tmp_path, log)  # of the same store and sink, and it is faster
    zombie = Shop(tmp_path, log, sink=other.sink, happenings={"sink.journal": [other.work]})
    summary = zombie.work()
    (tmp_path / "clean").mkdir()
    clean = Shop(tmp_path / "clean", log)
    clean.work()
    assert zombie.told() == clean.told()
    assert counted(zombie, "llm4es_fenced_total") == 1
    assert summary.accepted == 0
    assert counted(zombie, "llm4es_redelivered_total") == 6
    # What it had journalled is what the other had: rows of one `as_of` are one row.
    assert {told(row)[:4] for row in zombie.sink.offline} == {
        told(row)[:4] for row in clean.sink.offline
    }


def test_until_end_stops_at_the_end_and_otherwise_the_worker_polls_on(tmp_path: Path) -> None:
    shop = Shop(tmp_path, payments(5))
    polls: list[int] = []

    def stop_after_nine_polls(worker: Worker) -> None:
        polls.append(shop.metrics.summary().records)
        if len(polls) == 9:
            worker.stop()

    shop.work(until_end=False, batches=iter(lambda: 2, 0), on_batch=stop_after_nine_polls)
    assert polls == [2, 4, 5, 5, 5, 5, 5, 5, 5]
    polls.clear()
    shop.work(batches=iter(lambda: 2, 0), on_batch=lambda _: polls.append(1))
    assert not polls  # nothing is left to poll


def test_a_batch_gives_one_row_per_changed_entity_or_one_per_event(tmp_path: Path) -> None:
    log = records(
        [payment(f"e{n}", n, customer=f"c{1 + n % 2}") for n in range(8)]
        + [payment("e1", 1, customer="c2"), payment("late", -80, customer="c1")]
    )
    rows: dict[bool, list[FeatureRow]] = {}
    for every_event in (False, True):
        (tmp_path / str(every_event)).mkdir()
        shop = Shop(tmp_path / str(every_event), log)
        summary = shop.work(batches=[4, 6], every_event=every_event)
        assert (summary.accepted, summary.duplicates, summary.late) == (8, 1, 1)
        rows[every_event] = shop.sink.offline
        assert summary.rows == len(shop.sink.offline)
        newest = {row.entity_id: told(row) for row in shop.sink.offline}
        assert newest == {entity: told(row) for entity, row in shop.sink.online.items()}
    coalesced = [(row.entity_id, row.last_event_id) for row in rows[False]]
    assert coalesced == [("c1", "e2"), ("c2", "e3"), ("c1", "e6"), ("c2", "e7")]
    assert [row.last_event_id for row in rows[True]] == [f"e{n}" for n in range(8)]
    every = {(row.entity_id, row.as_of): told(row) for row in rows[True]}
    for row in rows[False]:
        assert every[row.entity_id, row.as_of] == told(row)


def test_where_the_log_keeps_no_timestamps_the_delay_says_when_an_event_was_known(
    tmp_path: Path,
) -> None:
    shop = Shop(tmp_path, [replace(record, timestamp=None) for record in payments(2)])
    shop.work(availability_delay=timedelta(hours=2))
    assert shop.sink.online["c1"].as_of == START + timedelta(hours=2, seconds=1)


def test_a_record_without_a_timestamp_is_bad_where_the_log_keeps_them(tmp_path: Path) -> None:
    log = payments(3)
    shop = Shop(tmp_path, [log[0], replace(log[1], timestamp=None), log[2]])
    summary = shop.work(availability_delay=None)
    assert summary.accepted == 2
    (letter,) = shop.dead().values()
    assert (letter["field"], letter["offset"]) == ("timestamp", 1)
    assert "no time" in letter["reason"]


@pytest.mark.parametrize("place", ["sink.publish", "letters.park", "store.offsets"])
def test_what_is_done_again_is_counted_once(tmp_path: Path, place: str) -> None:
    log = payments(7, customers=2)
    log[3] = replace(log[3], value=b"{")
    fail: Happenings = [raising(AWAY), raising(AWAY)]
    shop = Shop(tmp_path, log, happenings={place: fail})
    summary = shop.work()
    assert counted(shop, "llm4es_retries_total") == 2
    assert (summary.rows, summary.accepted, summary.dead_letters) == (2, 6, {"value": 1})
    assert counted(shop, "llm4es_poll_to_readable_seconds_count") == 2


def test_a_batch_that_another_worker_wrote_counts_no_rows(tmp_path: Path) -> None:
    log = payments(6, customers=2)
    other = Shop(tmp_path, log)
    zombie = Shop(tmp_path, log, sink=other.sink, happenings={"sink.journal": [other.work]})
    assert zombie.work().rows == 0


def test_rows_of_windows_that_lack_the_logs_beginning_are_told_at_start_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = payments(8, customers=2)  # of partition 0, of which retention has taken two records
    elsewhere = [replace(r, partition=1, key=b"c9") for r in payments(1)]
    others = [changed(record, customer_id="c9") for record in elsewhere]
    shop = Shop(tmp_path, [*log[2:6], *others], first=2)
    with pytest.raises(BundleMismatch, match="--unproven-start"):
        shop.work()
    summary = shop.work(unproven_start=True)
    assert (summary.rows, summary.unproven_rows) == (3, 2)
    assert counted(shop, "llm4es_unproven_rows_total") == 2
    (warning,) = [each.getMessage() for each in caplog.records if "unproven" in each.getMessage()]
    assert "partition 0 of shop begin at offset 2" in warning
    caplog.clear()
    # What was folded stays unproven, whatever is read behind it.
    later = Shop(tmp_path, [*log[2:], *others], first=2, sink=shop.sink)
    assert later.work().unproven_rows == 2
    assert "partition 0 of shop begin at offset 2" in caplog.text


def test_another_topic_on_the_same_windows_is_refused_and_parks_nothing(tmp_path: Path) -> None:
    log = payments(3)
    Shop(tmp_path, log).work()
    renamed = Shop(tmp_path, [replace(record, topic="mall") for record in log], topic="mall")
    with pytest.raises(BundleMismatch, match="folded from topic shop; use another --window-store"):
        renamed.work()
    assert not renamed.dead()


def counted(shop: Shop, name: str) -> float | None:
    return shop.metrics.registry.get_sample_value(name)


def tombstone(record: Record) -> Record:
    return replace(record, value=None)


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_a_tombstone_deletes_what_came_before_it_and_what_comes_after_begins_anew(
    tmp_path: Path, batch: int
) -> None:
    log = payments(6)
    log[3] = tombstone(log[3])
    told: list[str] = []
    happenings: dict[str, Happenings] = {
        "embedder.forget": [lambda: told.append("what is cached goes")]
    }
    shop = Shop(tmp_path, log, deletion_key=KEY, happenings=happenings)
    shop.work(batches=iter(lambda: batch, 0), deletes=True, every_event=True)
    window = shop.window()
    assert window is not None
    assert [event.event_id for chapter in window.chapters for event in chapter.events] == [
        "e4",
        "e5",
    ]
    assert [row.last_event_id for row in shop.sink.offline] == ["e4", "e5"]
    assert told == ["what is cached goes"]
    assert shop.sink.online["c1"].event_count == 2
    assert shop.metrics.registry.get_sample_value(
        "llm4es_events_total", {"outcome": "deleted"}
    ) == 1  # fmt: skip


def test_a_tombstone_rises_above_every_row_before_it_even_with_an_older_timestamp(
    tmp_path: Path,
) -> None:
    log = payments(3)
    log[2] = replace(log[2], value=None, timestamp=START - timedelta(days=1))
    shop = Shop(tmp_path, log, deletion_key=KEY)
    shop.work(batches=[2], deletes=True)
    window = shop.window()
    assert window is not None
    assert window.deleted
    assert window.as_of == START + timedelta(seconds=2, microseconds=1)
    assert shop.sink.deleted == {"c1": window.as_of}
    assert shop.sink.online == {}
    assert shop.sink.offline == []


def test_a_tombstone_that_comes_again_deletes_nothing_of_the_new_history(tmp_path: Path) -> None:
    log = payments(4)
    log[1] = tombstone(log[1])
    shop = Shop(tmp_path, log, deletion_key=KEY)
    shop.work(deletes=True)
    before = shop.told()
    shop.group[TopicPartition("shop", 0)] = 0  # as if nothing had been committed
    summary = shop.work(deletes=True)
    assert shop.told() == before
    assert summary.rows == 1


BAD_TOMBSTONES: dict[str, tuple[Callable[[Record], Record], str, str]] = {
    "no key": (lambda r: replace(r, key=None), "key", "missing"),
    "an empty key": (lambda r: replace(r, key=b""), "key", "1 to 512"),
    "no text": (lambda r: replace(r, key=b"\xff"), "key", "no UTF-8"),
    "another partition": (lambda r: replace(r, partition=1), "partition", "stand in partition 0"),
    "no timestamp": (lambda r: replace(r, timestamp=None), "timestamp", "has none"),
    "1969": (lambda r: replace(r, timestamp=START.replace(year=1969), key=b"c3"), "timestamp",
             "1969"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_TOMBSTONES)
def test_a_tombstone_that_cannot_be_is_a_bad_record(tmp_path: Path, bad: str) -> None:
    breaking, field, reason = BAD_TOMBSTONES[bad]
    log = payments(3)
    log[2] = breaking(tombstone(log[2]))
    shop = Shop(tmp_path, log, deletion_key=KEY)
    shop.work(deletes=True, availability_delay=None)
    (letter,) = shop.dead().values()
    assert letter["field"] == field
    assert reason in letter["reason"]
    assert letter["value"] is None
    assert shop.sink.online["c1"].event_count == 2


class Rebalancing(ScriptedLog):
    """One whose group is shared out anew while a batch is under way, once `armed`."""

    armed = False
    refused = 0
    _members: Any = None

    def subscribe(self, listener: Any) -> None:  # noqa: ANN401 - the port's type stands above us
        self._members = listener
        super().subscribe(listener)

    def keep_alive(self) -> None:
        if self.armed:
            self.refused += 1
            assert self.refused < 10, "the rebalance is never placed"
            raise Fenced("the group has given partitions of this batch to another worker")

    def poll(self, max_records: int, timeout_s: float) -> Sequence[Record]:
        if self.armed and self.refused:
            self.armed = False
            self._members.revoked(sorted({record.topic_partition for record in self._records}))
            super().subscribe(self._members)
        return super().poll(max_records, timeout_s)


def test_a_rebalance_while_lost_rows_are_published_again_is_placed_by_the_next_poll(
    tmp_path: Path,
) -> None:
    log = payments(6, customers=2)
    shop = Shop(tmp_path, log)
    source = Rebalancing(log, shop.describe)
    shop.wrap = lambda parts: dataclasses.replace(parts, source=source)

    def lose_rows_once(_worker: Worker) -> None:
        if not source.refused:
            shop.sink.lose()
            source.armed = True

    shop.work(on_batch=lose_rows_once, drain_s=0, max_batch_tokens=1)
    assert source.refused == 1
    assert {row.event_count for row in shop.sink.online.values()} == {3}
    assert len(shop.sink.online) == 2


def copied(record: Record, offset: int) -> Record:
    """The record as `repartition` writes it into another topic, an hour later."""
    return replace(
        record, topic="shop", partition=0, offset=offset,
        timestamp=START + timedelta(hours=1), headers=tuple(origin_headers(record)),
    )  # fmt: skip


def test_a_copied_record_is_the_same_event_at_the_same_time_wherever_it_stands(
    tmp_path: Path,
) -> None:
    named = schema().model_copy(update={"event_id": None})
    bundle = modelless_bundle(named, entity="customer", window=POLICY)
    origins = records([payment(f"e{n}", n) for n in range(4)], partitions=1, topic="payments")
    (tmp_path / "copies").mkdir()
    copies = [copied(record, offset) for offset, record in enumerate(origins, 7)]
    shop = Shop(tmp_path / "copies", copies, bundle=bundle)
    shop.work()
    row = shop.sink.online["c1"]
    assert row.last_event_id == coordinates_id("payments", 0, 3)
    assert row.as_of == origins[3].timestamp
    window = shop.window()
    assert window is not None
    assert (window.topic, window.next_offset) == ("shop", 11)  # what is folded is physical


def test_headers_that_no_repartition_wrote_make_a_bad_record(tmp_path: Path) -> None:
    log = payments(3)
    log[1] = replace(log[1], headers=(("llm4es.origin.topic", b"payments"),))
    log[2] = replace(
        log[2], headers=(*origin_headers(log[2])[:-1], ("llm4es.origin.timestamp_us", b"x"))
    )
    shop = Shop(tmp_path, log)
    shop.work()
    assert {letter["field"] for letter in shop.dead().values()} == {"headers"}
    assert shop.sink.online["c1"].event_count == 1


def test_a_schema_registry_that_is_away_is_waited_for_and_nothing_is_parked(
    tmp_path: Path,
) -> None:
    away = iter([SourceUnavailable("the registry is away", retry_after_s=0.0)] * 3)

    def decode(value: bytes) -> dict[str, Any]:
        for error in away:
            raise error
        return decode_object(value)

    shop = Shop(tmp_path, payments(3), decode=decode)
    summary = shop.work()
    assert shop.sink.online["c1"].event_count == 3
    assert summary.dead_letters == {}
    assert shop.metrics.registry.get_sample_value("llm4es_retries_total") == 3

"""`forget` and `expire`: tombstones into the log, and proof of what they took away.

The live worker carries a tombstone out for its windows and rows. `forget` waits for that, and does
what a worker does not: it rewrites parts, cleans dead letters, drops replays that are under way.
"""

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import typer
from rich.table import Table

from llm4es.bundle import Bundle, load_bundle
from llm4es.deletion import DeletionKey
from llm4es.events import TopicPartition
from llm4es.feast import FeastSink, open_sink
from llm4es.windows import Window
from stream_worker.assembly import deletion_key_of, open_window_store
from stream_worker.ops.backfill import BACKFILLS
from stream_worker.ops.letters import concerns, take_away
from stream_worker.ops.logs import kafka_of, refuse_file, topic_of
from stream_worker.ops.showing import show
from stream_worker.ops.writing import LogWriter, Outgoing
from stream_worker.ports import WindowStore
from stream_worker.settings import WorkerSettings

__all__ = ["Expired", "Receipt", "expire_idle", "expire_view", "forget_entity", "forget_from_view"]

_LOOK_EVERY_S = 0.2
_CHUNK = 500  # tombstones of one append


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What `forget` took away of an entity, and what stays; the id is in none of it."""

    entity: str  # keyed hash of the id
    view: str
    tombstone: str  # topic/partition/offset
    as_of: datetime | None  # no row at or before it is ever written again
    window_gone: bool
    online_gone: bool
    parts_rewritten: int
    rows_removed: int
    journals_clear: bool
    dead_letters_removed: int
    replays_removed: int
    stays: tuple[str, ...]
    done: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Expired:
    """Entities that were silent, and got tombstones."""

    looked_at: int
    idle: int
    tombstones: int
    before: datetime


def forget_entity(
    settings: WorkerSettings, bundle: Bundle, entity_id: str, *, wait_s: float
) -> Receipt:
    """Append a tombstone, wait until it is carried out, and clean up behind it.

    Where that takes longer than `wait_s`, `done` is false: run it again. Raises ConfigError,
    SourceUnavailable, SinkUnavailable.
    """
    refuse_file(settings, "a tombstone")
    key = deletion_key_of(settings)
    if key is None:
        raise DeletionKey.needed()
    with _opened(settings, bundle, key) as (sink, store):
        kafka, topic = kafka_of(settings, sink), topic_of(settings, sink)
        writer = LogWriter(kafka)
        try:
            partition = _partition(store, entity_id)
            tombstone = Outgoing(
                topic=topic, key=entity_id.encode(), value=None, partition=partition
            )
            partition, offset = writer.append([tombstone])[0]
        finally:
            writer.close()
        until = time.monotonic() + wait_s
        window = _await_window(store, entity_id, TopicPartition(topic, partition), offset, until)
        gone = window is not None and window.deleted
        rewritten = sink.rewrite_deleted()
        clear = _await(lambda: not _in_files(sink.journal_folder, entity_id), until)
        letters = take_away(
            kafka,
            settings.dead_letter_topic or f"{topic}.dead-letters",
            lambda record: concerns(record, entity_id),
        )
        replays = _drop_replays(settings.state_dir, entity_id)
        online_gone = sink.read([entity_id])[0] is None
        return Receipt(
            entity=key.hash(entity_id).hex(),
            view=sink.view,
            tombstone=f"{topic}/{partition}/{offset}",
            as_of=None if window is None else window.as_of,
            window_gone=gone,
            online_gone=online_gone,
            parts_rewritten=rewritten.parts,
            rows_removed=rewritten.rows,
            journals_clear=clear,
            dead_letters_removed=letters,
            replays_removed=replays,
            stays=(
                f"records of topic {topic}, until its retention takes them",
                f"the row's timestamp online, for {settings.deletion_guard_s:g} s",
                "a keyed hash of the id with as_of, in window store and offline log",
                "backups, models trained on it, and what readers have copied",
            ),
            done=gone and online_gone and clear,
        )


def expire_idle(
    settings: WorkerSettings,
    bundle: Bundle,
    *,
    idle: timedelta,
    now: datetime,
    dry_run: bool = False,
) -> Expired:
    """Append a tombstone for each entity that the log has not mentioned for so long.

    The live worker carries them out. An entity is looked at once more before its tombstone goes.
    """
    refuse_file(settings, "a tombstone")
    key = deletion_key_of(settings)
    if key is None:
        raise DeletionKey.needed()
    before = now - idle
    looked_at, sent, silent = 0, 0, 0
    with _opened(settings, bundle, key) as (sink, store):
        kafka, topic = kafka_of(settings, sink), topic_of(settings, sink)
        partitions = set(store.offsets(topic))
        writer = LogWriter(kafka)
        try:
            chunk: list[Outgoing] = []
            for window in store.scan(partitions):
                looked_at += 1
                if not _is_idle(window, before):
                    continue
                silent += 1
                if dry_run or not _is_idle(store.read(window.entity_id), before):
                    continue
                chunk.append(
                    Outgoing(
                        topic=topic,
                        key=window.entity_id.encode(),
                        value=None,
                        partition=window.partition,
                    )
                )
                if len(chunk) == _CHUNK:
                    sent += len(writer.append(chunk))
                    chunk = []
            sent += len(writer.append(chunk)) if chunk else 0
        finally:
            writer.close()
    return Expired(looked_at=looked_at, idle=silent, tombstones=sent, before=before)


def forget_from_view(
    settings: WorkerSettings, entity_id: str, *, wait_s: float, as_json: bool
) -> None:
    """Forget, keep the receipt in the state folder, print it; exit code 1 if it is not done."""
    receipt = forget_entity(settings, load_bundle(settings.bundle), entity_id, wait_s=wait_s)
    folder = settings.state_dir / "receipts"
    folder.mkdir(parents=True, exist_ok=True)
    name = receipt.tombstone.replace("/", "-")
    (folder / f"{name}.json").write_bytes(msgspec.json.encode(asdict(receipt)) + b"\n")
    table = Table(show_header=False, title=f"forgotten in {receipt.view}")
    for label, value in asdict(receipt).items():
        told = "; ".join(value) if isinstance(value, tuple) else str(value)
        table.add_row(label.replace("_", " "), told)
    show(asdict(receipt), table, as_json=as_json)
    if not receipt.done:
        typer.echo(
            "stream_worker: not all is gone yet; is a worker running? again: forget", err=True
        )
        raise typer.Exit(1)


def expire_view(settings: WorkerSettings, *, days: float, dry_run: bool, as_json: bool) -> None:
    """Expire, and print how many."""
    done = expire_idle(
        settings,
        load_bundle(settings.bundle),
        idle=timedelta(days=days),
        now=datetime.now(UTC),
        dry_run=dry_run,
    )
    table = Table(show_header=False, title=f"silent since {done.before.isoformat()}")
    for label, value in (
        ("entities looked at", done.looked_at),
        ("silent", done.idle),
        ("tombstones", done.tombstones),
    ):
        table.add_row(label, f"{value:,}")
    show(asdict(done), table, as_json=as_json)


@contextmanager
def _opened(
    settings: WorkerSettings, bundle: Bundle, key: DeletionKey
) -> Iterator[tuple[FeastSink, WindowStore]]:
    sink = open_sink(
        settings.feature_repo,
        bundle,
        config_file=settings.feature_store_file,
        writer_id=f"forget-{socket.gethostname()}-{os.getpid()}",
        deletion_key=key,
        deletion_guard_s=settings.deletion_guard_s,
    )
    try:
        store = open_window_store(settings, bundle)
        try:
            yield sink, store
        finally:
            store.close()
    finally:
        sink.close()


def _partition(store: WindowStore, entity_id: str) -> int | None:
    """Where the entity's records stand; its key decides where nothing is known of it."""
    window = store.read(entity_id)
    return None if window is None else window.partition


def _is_idle(window: Window | None, before: datetime) -> bool:
    return (
        window is not None
        and not window.deleted
        and window.as_of is not None
        and window.as_of < before
    )


def _await_window(
    store: WindowStore, entity_id: str, tp: TopicPartition, offset: int, until: float
) -> Window | None:
    """Wait until a worker has folded the tombstone."""
    _await(lambda: store.offsets(tp.topic).get(tp, 0) > offset, until)
    return store.read(entity_id)


def _await(done: Callable[[], bool], until: float) -> bool:
    while not done():
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True


def _in_files(folder: Path, entity_id: str) -> bool:
    """Whether an id stands in a file of a folder: journals, and what is deleted but pending."""
    needle = entity_id.encode()
    for place in ("_journal", "_deleted"):
        for path in (folder / place).glob("*"):
            try:
                if needle in path.read_bytes():
                    return True
            except FileNotFoundError:
                continue
    return False


def _drop_replays(state_dir: Path, entity_id: str) -> int:
    """Remove what replays and backfills under way hold; they can be begun anew."""
    needle, removed = entity_id.encode(), 0
    for folder, kept in (("replays", "windows.db*"), (BACKFILLS, "buckets/*")):
        for work in (state_dir / folder).glob("*"):
            if any(needle in path.read_bytes() for path in work.glob(kept)):
                shutil.rmtree(work)
                removed += 1
    return removed

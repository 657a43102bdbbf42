"""A window store as one SQLite file, and a fresh store from such a file.

A snapshot holds each partition at the offset that stood before its windows were read: every window
has folded the log up to there. One that a worker has moved on meanwhile has folded more, and skips
what a start from the snapshot reads again.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from msgspec.structs import replace

from llm4es.deletion import DeletionKey
from llm4es.errors import BundleMismatch, ConfigError
from llm4es.events import NO_OFFSETS, TopicPartition
from llm4es.windows import Window
from stream_worker.ports import LogIdentity, WindowStore
from stream_worker.window_store.sqlite import SqliteWindowStore

__all__ = ["nearest_snapshot", "restore_snapshot", "snapshot_offsets", "take_snapshot"]

log = logging.getLogger(__name__)

_CHUNK = 500  # windows of one write


def take_snapshot(
    store: WindowStore, out: Path, bundle_id: str, *, deletion_key: DeletionKey | None = None
) -> dict[TopicPartition, int]:
    """Write all that a store holds into one file, and give the offsets it stands for.

    The file appears whole. Raises ConfigError where there is one already, or nothing to take.
    """
    if out.exists():
        raise ConfigError("out", f"{out} is there already", "name a file that is not")
    if store.has_deleted():
        raise ConfigError(
            "window_store",
            "it keeps what deletion leaves of entities, which a snapshot cannot hold: a start from "
            "one could bring rows of theirs back",
            "start from the log's beginning instead",
        )
    logs = _logs(store)
    if not logs:
        raise ConfigError(
            "window_store", "it holds no windows of this bundle", "name the store a worker writes"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        path = Path(folder) / out.name
        snapshot = SqliteWindowStore(path, bundle_id, deletion_key=deletion_key)
        try:
            offsets = _copy(store, snapshot)
        finally:
            snapshot.close()  # the write-ahead log goes into the file
        path.rename(out)
    return offsets


def restore_snapshot(
    path: Path, store: WindowStore, bundle_id: str, *, deletion_key: DeletionKey | None = None
) -> dict[TopicPartition, int]:
    """Fill a fresh store, and give the offsets it stands for now; nothing where it is not fresh.

    Raises ConfigError for a file that is no snapshot, BundleMismatch for one of another bundle.
    """
    if store.topics():
        log.info("the window store holds windows: the snapshot is not needed")
        return {}
    with _opened(path, bundle_id, deletion_key) as snapshot:
        return _copy(snapshot, store)


def snapshot_offsets(
    path: Path, bundle_id: str, *, deletion_key: DeletionKey | None = None
) -> dict[TopicPartition, int]:
    """Give the offsets that a snapshot stands for. Raises as `restore_snapshot`."""
    with _opened(path, bundle_id, deletion_key) as snapshot:
        return _offsets(snapshot)


def nearest_snapshot(
    folder: Path,
    bundle_id: str,
    begins: Mapping[TopicPartition, int],
    *,
    deletion_key: DeletionKey | None = None,
) -> tuple[Path, dict[TopicPartition, int]] | None:
    """Give a folder's snapshot that leaves least of this log to fold before `begins`.

    What is no snapshot of this bundle and log, or is past `begins` in any partition, is passed
    over; None where nothing else is there.
    """
    nearest: tuple[int, Path, dict[TopicPartition, int]] | None = None
    for path in sorted(each for each in folder.iterdir() if each.is_file()):
        try:
            held = snapshot_offsets(path, bundle_id, deletion_key=deletion_key)
        except (ConfigError, BundleMismatch):
            continue
        if any(at > begins.get(tp, 0) for tp, at in held.items()):
            continue
        folded = sum(held.values())
        if nearest is None or folded > nearest[0]:
            nearest = folded, path, held
    return None if nearest is None else nearest[1:]


@contextmanager
def _opened(
    path: Path, bundle_id: str, deletion_key: DeletionKey | None
) -> Iterator[SqliteWindowStore]:
    snapshot = SqliteWindowStore(path, bundle_id, read_only=True, deletion_key=deletion_key)
    try:
        if not snapshot.topics():
            raise BundleMismatch(
                f"snapshot {path}",
                f"holds no windows of bundle {bundle_id}",
                "take one with this bundle, or start without",
            )
        yield snapshot
    finally:
        snapshot.close()


def _offsets(store: WindowStore) -> dict[TopicPartition, int]:
    return {tp: at for identity in _logs(store) for tp, at in store.offsets(identity.topic).items()}


def _copy(source: WindowStore, target: WindowStore) -> dict[TopicPartition, int]:
    """Windows, then offsets, then which log they are of: a crash before that leaves it fresh."""
    logs = _logs(source)
    offsets = _offsets(source)
    windows = source.scan(
        [
            TopicPartition(identity.topic, partition)
            for identity in logs
            for partition in range(identity.partitions)
        ]
    )
    count = 0
    for chunk in _chunks(windows):
        with target.begin() as txn:
            known = txn.load([window.entity_id for window in chunk])
            for window in chunk:
                txn.put(replace(window, version=known[window.entity_id].version))
        count += len(chunk)
    with target.begin() as txn:
        txn.advance(offsets)
    for identity in logs:
        target.remember(identity, source.unproven(identity.topic) or NO_OFFSETS)
    log.info("copied %d windows", count)
    return offsets


def _logs(store: WindowStore) -> list[LogIdentity]:
    found = (store.identity(topic) for topic in sorted(store.topics()))
    return [identity for identity in found if identity is not None]


def _chunks(windows: Iterator[Window]) -> Iterator[list[Window]]:
    while chunk := list({each.entity_id: each for each in islice(windows, _CHUNK)}.values()):
        yield chunk

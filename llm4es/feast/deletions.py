"""What the offline log knows of deleted entities: whose rows, up to when, nobody may read.

    <log>/_deleted/hashes    fingerprint of the key, then (keyed hash 16, as_of µs i64) each
    <log>/_deleted/pending   one JSON [id, as_of µs] a line, for readers: they have no key
    <log>/_deleted/lock      held by who adds to them, shared by who makes a part readable

An id stays in `pending` as long as parts may hold rows of it, which `rewrite_deleted` ends; its
hash stays for good. A part is filtered as it becomes readable, so each row that a tombstone
forbids is in a part that is older than the tombstone, or in none. A reader looks into `pending`
before it lists parts: one that is rewritten meanwhile is gone then, and the reader looks again.
"""

import fcntl
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from llm4es.deletion import HASH_BYTES, DeletionKey, Tombstone
from llm4es.events import EPOCH
from llm4es.feast.object_store import LogFolder, control_folder
from llm4es.features import FeatureRow

__all__ = [
    "Deletions",
    "Rewritten",
    "pending_deletions",
    "rewriting",
    "settle_deletions",
    "sweep_torn",
    "without_deleted",
    "writing",
]

_FOLDER = "_deleted"
_FINGERPRINT_BYTES = 8
_ENTRY = struct.Struct(f"<{HASH_BYTES}sq")
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What was taken out of a log's parts."""

    entities: int
    parts: int
    rows: int


class Deletions:
    """Deleted entities of one log, as any of its writers has noted them.

    Raises ConfigError where the log knows some, under another key than `key`; OSError.
    """

    def __init__(self, folder: LogFolder, key: DeletionKey | None) -> None:
        self._log = folder
        self._folder = control_folder(folder) / _FOLDER
        self._hashes = str(self._folder / "hashes")
        self._key = key
        self._read = 0  # bytes of `hashes` that `_known` has
        self._known: dict[bytes, datetime] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take in what other writers have noted since. One `stat` where nothing is new."""
        try:
            size = os.stat(self._hashes).st_size  # noqa: PTH116 - each batch asks: a Path is slow
        except FileNotFoundError:
            return
        whole = size - (size - _FINGERPRINT_BYTES) % _ENTRY.size  # a torn entry is not there yet
        if whole <= self._read:
            return
        content = (self._folder / "hashes").read_bytes()[:whole]
        found = content[:_FINGERPRINT_BYTES]
        DeletionKey.refuse_other(found, self._key, f"the offline log {self._log}")
        for name, microseconds in _ENTRY.iter_unpack(content[_FINGERPRINT_BYTES:]):
            moment = EPOCH + timedelta(microseconds=microseconds)
            self._known[name] = max(moment, self._known.get(name, moment))
        self._read = whole

    def add(self, tombstones: Sequence[Tombstone]) -> None:
        """Return when they are durable; from then on no reader sees the rows they forbid."""
        key = self._key
        if key is None:
            raise DeletionKey.needed()
        with _locked(self._folder, fcntl.LOCK_EX):
            self.refresh()
            new = [each for each in tombstones if self._is_new(key, each)]
            if not new:
                return
            # For readers first: after a crash between the two, these are new once more.
            _append(
                self._folder / "pending",
                b"".join(
                    msgspec.json.encode([each.entity_id, _microseconds(each.as_of)]) + b"\n"
                    for each in new
                ),
            )
            _append(
                self._folder / "hashes",
                b"".join(
                    _ENTRY.pack(key.hash(each.entity_id), _microseconds(each.as_of)) for each in new
                ),
                head=key.fingerprint,
                entry=_ENTRY.size,
            )
            self.refresh()

    def kept(self, rows: Sequence[FeatureRow]) -> list[FeatureRow]:
        """Rows that no tombstone forbids."""
        self.refresh()
        if not self._known:
            return list(rows)
        return [row for row in rows if self._allows(row.entity_id, row.as_of)]

    def without(self, table: pa.Table) -> pa.Table:
        """Rows of the log's own columns (id first, then timestamp) that no tombstone forbids."""
        if not self._known:
            return table
        ids, moments = table.column(0).to_pylist(), table.column(1).to_pylist()
        mask = [self._allows(*each) for each in zip(ids, moments, strict=True)]
        return table.filter(pa.array(mask, pa.bool_()))

    @contextmanager
    def held_still(self) -> Iterator[None]:
        """Let nobody add while a part is filtered and made readable."""
        with writing(self._log):
            self.refresh()
            yield

    def _is_new(self, key: DeletionKey, tombstone: Tombstone) -> bool:
        known = self._known.get(key.hash(tombstone.entity_id))
        return known is None or known < tombstone.as_of

    def _allows(self, entity_id: str, as_of: datetime) -> bool:
        if self._key is None or not self._known:
            return True
        deleted = self._known.get(self._key.hash(entity_id))
        return deleted is None or as_of > deleted


def pending_deletions(folder: LogFolder) -> dict[str, datetime]:
    """Ids whose rows up to a moment (UTC) may stand in parts, and must not be read."""
    try:
        lines = (control_folder(folder) / _FOLDER / "pending").read_bytes().split(b"\n")[:-1]
    except (FileNotFoundError, NotADirectoryError):  # no log, or a single file
        return {}
    found: dict[str, datetime] = {}
    for entity_id, microseconds in map(msgspec.json.decode, lines):
        moment = EPOCH + timedelta(microseconds=microseconds)
        found[entity_id] = max(moment, found.get(entity_id, moment))
    return found


def without_deleted(
    table: pa.Table, pending: Mapping[str, datetime], *, join_key: str, timestamp: str
) -> pa.Table:
    """Rows of a table that no tombstone forbids, whatever columns it has beside these two."""
    if not pending:
        return table
    ids = pa.array(list(pending), pa.string())
    until = pa.array(list(pending.values()), pa.timestamp("us", tz="UTC"))
    deleted = until.take(pc.index_in(table[join_key].combine_chunks(), value_set=ids))
    forbidden = pc.less_equal(table[timestamp].combine_chunks(), deleted)  # null of others' rows
    return table.filter(pc.invert(forbidden.fill_null(pa.scalar(value=False))))


@contextmanager
def writing(folder: LogFolder) -> Iterator[None]:
    """Let nobody add a tombstone, nor sweep, while a part is written."""
    with _locked(control_folder(folder) / _FOLDER, fcntl.LOCK_SH):
        yield


def sweep_torn(folder: LogFolder, *, but: str) -> None:
    """Remove what killed writers left half written: ids stand in it. `but` begins a name to keep.

    `rewriting` is held.
    """
    with _locked(control_folder(folder) / _FOLDER, fcntl.LOCK_EX):
        for path in folder.rglob(".*.parquet.*.tmp"):
            if not path.name.startswith(f".{but}"):
                path.unlink(missing_ok=True)


@contextmanager
def rewriting(folder: LogFolder) -> Iterator[None]:
    """Be the only one that rewrites parts of this log."""
    with _locked(control_folder(folder) / _FOLDER, fcntl.LOCK_EX, name="rewriting"):
        yield


def settle_deletions(folder: LogFolder, done: Mapping[str, datetime]) -> None:
    """Forget ids whose rows are in no part any more; those that were added since stay."""
    if not done:
        return
    place = control_folder(folder) / _FOLDER
    with _locked(place, fcntl.LOCK_EX):
        left = {
            entity_id: as_of
            for entity_id, as_of in pending_deletions(folder).items()
            if entity_id not in done or as_of > done[entity_id]
        }
        content = b"".join(
            msgspec.json.encode([entity_id, _microseconds(as_of)]) + b"\n"
            for entity_id, as_of in left.items()
        )
        temporary = place / "pending.tmp"
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place / "pending")
        _sync(place)


def _append(path: Path, content: bytes, *, head: bytes = b"", entry: int = 0) -> None:
    """Append and sync; what a killed writer left unfinished is cut off. The lock is held."""
    with path.open("ab") as file:
        size = file.tell()
        if entry:
            torn = size if size < len(head) else (size - len(head)) % entry
        else:
            torn = size - (path.read_bytes().rfind(b"\n") + 1)
        if torn:
            file.truncate(size - torn)
        file.write(content if size - torn else head + content)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


@contextmanager
def _locked(folder: Path, how: int, *, name: str = "lock") -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _microseconds(moment: datetime) -> int:
    return (moment.astimezone(UTC) - EPOCH) // _MICROSECOND

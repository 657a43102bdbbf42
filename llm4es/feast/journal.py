"""The offline log on disk: a journal that makes rows durable, rolled into Parquet parts.

    <log>/part-<stem>.parquet            what readers see; appears by rename, never changes
    <log>/.part-<stem>.parquet.*.tmp     a part being written; no reader's glob matches it
    <log>/_journal/<stem>.journal        rows that are durable and not yet in a part (.new: none)
    <log>/_deleted/                      whose rows may not be read, see `deletions`

A batch is durable once its frame is in the journal and fsynced. Readers see rolled parts only.
A part is named after its journal, so a crash between the rename and the journal's removal is
put right by looking. A journal is locked (flock) as long as its writer lives; one that is not is
rolled by whoever opens the log next, a torn last frame cut off. After a crash a row may stand in
two parts, identically; readers take one per (entity, event_timestamp).

Frames are `length u32, CRC-32 u32, payload` in little endian; the first payload is the Arrow
schema, each further one a record batch.
"""

import fcntl
import logging
import os
import re
import struct
import threading
import time
import uuid
import zlib
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from llm4es.deletion import Tombstone
from llm4es.errors import SinkUnavailable
from llm4es.feast.deletions import Deletions
from llm4es.features import FeatureRow

__all__ = [
    "OfflineJournal",
    "ensure_log",
    "list_parts",
    "log_schema",
    "recover_journals",
    "rows_to_batch",
    "write_part",
]

log = logging.getLogger(__name__)

_HEADER = struct.Struct("<II")
_JOURNALS = "_journal"
_SUFFIX = ".journal"
_UNNAMED = ".new"  # of a journal that is not locked yet
_WAITING_SEGMENTS = 4  # sealed and not yet rolled, before writers are told to wait
_RETRY_S = 1.0
_VECTORS = ("embedding", "surprise")
_LABELS = ("last_event_id", "bundle_id")


def log_schema(join_key: str) -> pa.Schema:
    """Columns of the offline log of an entity's view."""
    moment = pa.timestamp("us", tz="UTC")
    return pa.schema(
        [
            (join_key, pa.string()),
            ("event_timestamp", moment),
            ("embedding", pa.list_(pa.float32())),
            ("surprise", pa.list_(pa.float32())),
            ("surprise_last", pa.float32()),
            ("event_count", pa.int64()),
            ("last_event_id", pa.string()),
            ("last_event_time", moment),
            ("bundle_id", pa.string()),
        ]
    )


def rows_to_batch(rows: Sequence[FeatureRow], join_key: str) -> pa.RecordBatch:
    """N rows as one record batch of `log_schema`; their vectors are copied once."""
    columns = [
        pa.array([row.entity_id for row in rows], pa.string()),
        _moments([row.as_of for row in rows]),
        _vectors([row.embedding for row in rows]),
        _vectors([row.surprise for row in rows]),
        pa.array([row.surprise_last for row in rows], pa.float32()),
        pa.array([row.event_count for row in rows], pa.int64()),
        pa.array([row.last_event_id for row in rows], pa.string()),
        _moments([row.last_event_time for row in rows]),
        pa.array([row.bundle_id for row in rows], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=log_schema(join_key))


def list_parts(folder: Path) -> list[Path]:
    """Parts of a log, oldest name first; none where the folder is not there."""
    return sorted(
        path
        for path in folder.rglob("*.parquet")
        if not any(name.startswith((".", "_")) for name in path.relative_to(folder).parts)
    )


def ensure_log(folder: Path, schema: pa.Schema) -> None:
    """Make the folder, and a part without rows: Feast reads a source's columns from its files."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list_parts(folder):
        write_part(folder, "part-0-schema", schema.empty_table())


def write_part(folder: Path, stem: str, table: pa.Table) -> Path:
    """Write rows as one part: whole and durable when it appears. The same stem replaces it."""
    part = folder / f"{stem}.parquet"
    # Of this writer alone: two that start at once both write the part without rows.
    temporary = folder / f".{part.name}.{uuid.uuid4().hex[:8]}.tmp"
    names = set(table.schema.names)
    with temporary.open("wb") as file:
        parquet.write_table(
            table,
            file,
            compression="zstd",
            use_dictionary=[name for name in _LABELS if name in names],
            use_byte_stream_split=[f"{name}.list.element" for name in _VECTORS if name in names],
        )
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(part)
    _sync_folder(folder)
    return part


def recover_journals(folder: Path, deletions: Deletions | None = None) -> int:
    """Roll every journal whose writer is gone; give the number of rows that were found.

    Rows of deleted entities are left out. Raises OSError. Safe beside living writers and beside
    another recovery.
    """
    known = deletions or Deletions(folder, None)
    found = 0
    for path in sorted((folder / _JOURNALS).glob(f"*{_SUFFIX}")):
        with suppress(FileNotFoundError), path.open("rb") as file:
            if not _lock(file.fileno()) or os.fstat(file.fileno()).st_nlink == 0:
                continue
            if not _part_of(folder, path).exists():
                table = _read_frames(file.read())
                if table is not None and len(table):
                    with known.held_still():
                        rows = known.without(table)
                        write_part(folder, _part_of(folder, path).stem, rows)
                    found += len(rows)
            path.unlink()
    for path in (folder / _JOURNALS).glob(f"*{_UNNAMED}"):  # of writers killed at birth: no rows
        with suppress(FileNotFoundError), path.open("rb") as file:
            if _lock(file.fileno()):
                path.unlink()
    if found:
        log.warning("recovered %d journalled rows of the offline log in %s", found, folder)
    return found


class _Segment:
    """One journal file and its rows, which are kept until they are in a part."""

    def __init__(self, folder: Path, writer_id: str, schema: pa.Schema) -> None:
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        stem = f"{now}-{re.sub('[^A-Za-z0-9.]+', '_', writer_id)}-{uuid.uuid4().hex[:8]}"
        self.path = folder / _JOURNALS / f"{stem}{_SUFFIX}"
        self.batches: list[pa.RecordBatch] = []
        self.rows = 0
        self.born = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Locked before it bears a name that a recovery would look at.
        unnamed = self.path.with_suffix(_UNNAMED)
        self._file = os.open(unnamed, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)  # a recovery may look at it this very moment
            self._length = 0
            self._append(schema.serialize())
            unnamed.rename(self.path)
            _sync_folder(self.path.parent)
        except OSError:
            os.close(self._file)
            with suppress(OSError):
                unnamed.unlink()
            raise

    def append(self, batch: pa.RecordBatch) -> None:
        """Return when the batch is on disk. After an OSError the file holds what it held."""
        self._append(batch.serialize())
        self.batches.append(batch)
        self.rows += len(batch)

    def _append(self, payload: pa.Buffer) -> None:
        frame = memoryview(_HEADER.pack(len(payload), zlib.crc32(payload)) + payload.to_pybytes())
        written = 0
        try:
            while written < len(frame):
                written += os.write(self._file, frame[written:])
            os.fdatasync(self._file)
        except OSError:
            # A torn frame in the middle would hide every later one from a recovery.
            os.ftruncate(self._file, self._length)
            os.lseek(self._file, self._length, os.SEEK_SET)
            raise
        self._length += written

    def roll(self, folder: Path, deletions: Deletions) -> None:
        """Write the part, then remove the journal, then let go of its lock."""
        if self.batches:
            with deletions.held_still():
                rows = deletions.without(pa.Table.from_batches(self.batches))
                write_part(folder, _part_of(folder, self.path).stem, rows)
        self.path.unlink(missing_ok=True)
        os.close(self._file)


class OfflineJournal:
    """Appends rows to a log's folder. One per writer; its methods may be called by any thread.

    A journal is rolled when it holds `roll_rows` or is `roll_s` old, by a thread of its own, and
    by `roll` and `close`. What `deletions` knows of is never written, nor rolled. Every failure to
    write is SinkUnavailable.
    """

    def __init__(
        self,
        folder: Path,
        *,
        join_key: str,
        writer_id: str,
        roll_rows: int,
        roll_s: float,
        deletions: Deletions | None = None,
    ) -> None:
        self._deletions = deletions or Deletions(folder, None)
        self._folder = folder
        self._join_key = join_key
        self._schema = log_schema(join_key)
        self._writer_id = writer_id
        self._roll_rows = roll_rows
        self._roll_s = roll_s
        self._changed = threading.Condition()  # guards what follows
        self._open: _Segment | None = None
        self._sealed: list[_Segment] = []
        self._closed = False
        self._rolling = threading.Lock()  # one thread writes parts at a time
        try:
            ensure_log(folder, self._schema)
            recover_journals(folder, self._deletions)
        except OSError as error:
            raise _unavailable(folder, error) from error
        self._thread = threading.Thread(target=self._roll_in_time, name="roll", daemon=True)
        self._thread.start()

    def append(self, rows: Sequence[FeatureRow]) -> None:
        """Return when the rows are durable, all of them or (with SinkUnavailable) none."""
        if not rows:
            return
        batch = rows_to_batch(rows, self._join_key)
        with self._changed:
            if len(self._sealed) >= _WAITING_SEGMENTS:
                message = f"offline log {self._folder}: parts cannot be written"
                raise SinkUnavailable(message)
            try:
                if self._open is None:
                    self._open = _Segment(self._folder, self._writer_id, self._schema)
                    self._changed.notify()
                self._open.append(batch)
            except OSError as error:
                self._seal()  # what became of an fsync that failed is not known: begin anew
                raise _unavailable(self._folder, error) from error
            if self._open.rows >= self._roll_rows:
                self._seal()

    def delete(self, tombstones: Sequence[Tombstone]) -> None:
        """Return when no reader sees rows of these entities at or before their tombstones."""
        try:
            self._deletions.add(tombstones)
        except OSError as error:
            raise _unavailable(self._folder, error) from error

    def kept(self, rows: Sequence[FeatureRow]) -> list[FeatureRow]:
        """Rows that no tombstone forbids."""
        try:
            return self._deletions.kept(rows)
        except OSError as error:
            raise _unavailable(self._folder, error) from error

    def roll(self) -> None:
        """Return when every appended row is in a part that readers see."""
        with self._changed:
            self._seal()
        try:
            self._roll_sealed()
        except OSError as error:
            raise _unavailable(self._folder, error) from error

    def close(self) -> None:
        """Roll, and stop the thread. Rows that cannot be rolled stay in their journal."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self.roll()

    def _seal(self) -> None:
        if self._open is not None:
            self._sealed.append(self._open)
            self._open = None
            self._changed.notify()

    def _roll_sealed(self) -> None:
        with self._rolling:
            while self._sealed:
                self._sealed[0].roll(self._folder, self._deletions)
                with self._changed:
                    del self._sealed[0]

    def _roll_in_time(self) -> None:
        while self._await_work():
            try:
                self._roll_sealed()
            except OSError as error:
                log.warning(
                    "%s; the rows are safe in the journal", _unavailable(self._folder, error)
                )
                time.sleep(_RETRY_S)

    def _await_work(self) -> bool:
        with self._changed:
            while not self._closed and not self._sealed:
                due = None if self._open is None else self._open.born + self._roll_s
                left = None if due is None else due - time.monotonic()
                if left is not None and left <= 0:
                    self._seal()
                else:
                    self._changed.wait(left)
            return not self._closed


def _read_frames(content: bytes) -> pa.Table | None:
    """Rows of a journal up to its first torn frame; None where not even its schema is whole."""
    payloads = []
    at = 0
    while at + _HEADER.size <= len(content):
        length, checksum = _HEADER.unpack_from(content, at)
        payload = content[at + _HEADER.size : at + _HEADER.size + length]
        if len(payload) < length or zlib.crc32(payload) != checksum:
            break
        payloads.append(pa.py_buffer(payload))
        at += _HEADER.size + length
    if not payloads:
        return None
    schema = pa.ipc.read_schema(payloads[0])
    batches = [pa.ipc.read_record_batch(payload, schema) for payload in payloads[1:]]
    return pa.Table.from_batches(batches, schema)


def _part_of(folder: Path, journal: Path) -> Path:
    return folder / f"part-{journal.stem}.parquet"


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _vectors(vectors: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(vector) for vector in vectors)], dtype=np.int32)
    values = np.concatenate(vectors).astype(np.float32, copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _moments(moments: Sequence[datetime]) -> pa.Array:
    return pa.array(moments, pa.timestamp("us", tz="UTC"))


def _unavailable(folder: Path, error: OSError) -> SinkUnavailable:
    return SinkUnavailable(f"offline log {folder}: {error}")

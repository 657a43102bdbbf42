"""The offline log's journal: it makes rows durable, and is rolled into parts (parts.py).

    <log>/_journal/<stem>.journal        rows that are durable and not yet in a part (.new: none)
    <log>/_deleted/                      whose rows may not be read, see `deletions`

A batch is durable once its frame is in the journal and fsynced. Readers see rolled parts only.
Parts are named by what is in the journal alone, so a crash between them and the journal's removal
is put right by rolling it again. A journal is locked (flock) as long as its writer lives; one that
is not is rolled by whoever opens the log next, a torn last frame cut off. After a crash a row may
stand in two parts, identically.

Frames are `length u32, CRC-32 u32, payload` in little endian. The first payload is the Arrow
schema; then, for each batch, the offsets that it was made from (JSON, left out where none are
known) and the record batch.
"""

import fcntl
import json
import logging
import os
import re
import struct
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from llm4es.deletion import Tombstone
from llm4es.errors import SinkUnavailable
from llm4es.events import NO_SPANS, OffsetSpans, TopicPartition
from llm4es.feast.deletions import Deletions
from llm4es.feast.object_store import LogFolder, control_folder
from llm4es.feast.parts import (
    TIMESTAMP,
    ensure_log,
    log_schema,
    part_stem,
    rows_to_batch,
    sync_folder,
    write_parts,
)
from llm4es.features import FeatureRow

__all__ = ["OfflineJournal", "read_journals", "recover_journals"]

log = logging.getLogger(__name__)

_HEADER = struct.Struct("<II")
_JOURNALS = "_journal"
_SUFFIX = ".journal"
_UNNAMED = ".new"  # of a journal that is not locked yet
_WAITING_SEGMENTS = 4  # sealed and not yet rolled, before writers wait for them
_NICENESS = 10  # of the rolling thread: a tenth of a core that is wanted, all of one that is not
_RETRY_S = 1.0
_JSON = b"{"  # Arrow's messages begin with 0xFFFFFFFF


def recover_journals(folder: LogFolder, deletions: Deletions | None = None) -> int:
    """Roll every journal whose writer is gone; give the number of rows that were found.

    Rows of deleted entities are left out. Raises OSError. Safe beside living writers and beside
    another recovery.
    """
    known = deletions or Deletions(folder, None)
    journals = control_folder(folder) / _JOURNALS
    found = 0
    for path in sorted(journals.glob(f"*{_SUFFIX}")):
        with suppress(FileNotFoundError), path.open("rb") as file:
            if not _lock(file.fileno()) or os.fstat(file.fileno()).st_nlink == 0:
                continue
            table, spans = _read_frames(file.read())
            if table is not None and len(table):
                with known.held_still():
                    rows = known.without(table)
                    _write(folder, path, rows, spans)
                found += len(rows)
            path.unlink()
    for path in journals.glob(f"*{_UNNAMED}"):  # of writers killed at birth: no rows
        with suppress(FileNotFoundError), path.open("rb") as file:
            if _lock(file.fileno()):
                path.unlink()
    if found:
        log.warning("recovered %d journalled rows of the offline log in %s", found, folder)
    return found


def read_journals(folder: LogFolder) -> list[pa.Table]:
    """Rows that are durable and in no part yet, of living writers too; nothing is changed."""
    found = []
    for path in sorted((control_folder(folder) / _JOURNALS).glob(f"*{_SUFFIX}")):
        with suppress(FileNotFoundError):
            table, _ = _read_frames(path.read_bytes())
            if table is not None:
                found.append(table)
    return found


class _Segment:
    """One journal file and its rows, which are kept until they are in a part."""

    def __init__(self, folder: LogFolder, writer_id: str, schema: pa.Schema) -> None:
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        stem = f"{now}-{re.sub('[^A-Za-z0-9.]+', '_', writer_id)}-{uuid.uuid4().hex[:8]}"
        self.path = control_folder(folder) / _JOURNALS / f"{stem}{_SUFFIX}"
        self.batches: list[pa.RecordBatch] = []
        self.spans: dict[TopicPartition, tuple[int, int]] = {}
        self.rows = 0
        self.born = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Locked before it bears a name that a recovery would look at.
        unnamed = self.path.with_suffix(_UNNAMED)
        self._file = os.open(unnamed, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)  # a recovery may look at it this very moment
            self._length = 0
            self._append(_frame(schema.serialize().to_pybytes()))
            unnamed.rename(self.path)
            sync_folder(self.path.parent)
        except OSError:
            os.close(self._file)
            with suppress(OSError):
                unnamed.unlink()
            raise

    def append(self, batch: pa.RecordBatch, spans: OffsetSpans) -> None:
        """Return when the batch is on disk. After an OSError the file holds what it held."""
        told = [[*tp, *span] for tp, span in spans.items()]
        origin = _frame(json.dumps({"spans": told}).encode()) if told else b""
        self._append(origin + _frame(batch.serialize().to_pybytes()))
        self.batches.append(batch)
        self.rows += len(batch)
        _widen(self.spans, spans)

    def _append(self, frames: bytes) -> None:
        frame = memoryview(frames)
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

    def roll(self, folder: LogFolder, deletions: Deletions) -> None:
        """Write the parts, then remove the journal, then let go of its lock."""
        if self.batches:
            with deletions.held_still():
                rows = deletions.without(pa.Table.from_batches(self.batches))
                _write(folder, self.path, rows, self.spans)
        self.path.unlink(missing_ok=True)
        os.close(self._file)


class OfflineJournal:
    """Appends rows to a log's folder. One per writer; its methods may be called by any thread.

    A journal is rolled when it holds `roll_rows` or is `roll_s` old, by a thread of its own that
    takes what others leave of the core, and by `roll` and `close`; `append` waits where several
    are due. What `deletions` knows of is never written, nor rolled. Every failure to write is
    SinkUnavailable.
    """

    def __init__(
        self,
        folder: LogFolder,
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

    @property
    def folder(self) -> LogFolder:
        """Folder of the log."""
        return self._folder

    def append(self, rows: Sequence[FeatureRow], spans: OffsetSpans = NO_SPANS) -> None:
        """Return when the rows are durable, all of them or (with SinkUnavailable) none.

        `spans` are the offsets that they were made from; parts are named after them.
        """
        if not rows:
            return
        batch = rows_to_batch(rows, self._join_key)
        if len(self._sealed) >= _WAITING_SEGMENTS:
            self._roll_sealed()
        with self._changed:
            try:
                if self._open is None:
                    self._open = _Segment(self._folder, self._writer_id, self._schema)
                    self._changed.notify()
                self._open.append(batch, spans)
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
        self._roll_sealed()

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
                try:
                    self._sealed[0].roll(self._folder, self._deletions)
                except OSError as error:
                    raise _unavailable(self._folder, error) from error
                with self._changed:
                    del self._sealed[0]

    def _roll_in_time(self) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while self._await_work():
            try:
                self._roll_sealed()
            except SinkUnavailable as error:
                log.warning("%s; the rows are safe in the journal", error)
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


def _frame(payload: bytes) -> bytes:
    return _HEADER.pack(len(payload), zlib.crc32(payload)) + payload


def _read_frames(content: bytes) -> tuple[pa.Table | None, OffsetSpans]:
    """Rows of a journal up to its first torn frame; None where not even its schema is whole."""
    payloads = []
    at = 0
    while at + _HEADER.size <= len(content):
        length, checksum = _HEADER.unpack_from(content, at)
        payload = content[at + _HEADER.size : at + _HEADER.size + length]
        if len(payload) < length or zlib.crc32(payload) != checksum:
            break
        payloads.append(payload)
        at += _HEADER.size + length
    spans: dict[TopicPartition, tuple[int, int]] = {}
    if not payloads:
        return None, spans
    schema = pa.ipc.read_schema(pa.py_buffer(payloads[0]))
    batches = []
    told: OffsetSpans = {}
    for payload in payloads[1:]:
        if payload.startswith(_JSON):
            told = {
                TopicPartition(topic, partition): (first, upto)
                for topic, partition, first, upto in json.loads(payload)["spans"]
            }
        else:
            batches.append(pa.ipc.read_record_batch(pa.py_buffer(payload), schema))
            _widen(spans, told)
            told = {}
    return pa.Table.from_batches(batches, schema), spans


def _widen(spans: dict[TopicPartition, tuple[int, int]], more: OffsetSpans) -> None:
    for tp, (first, upto) in more.items():
        before = spans.get(tp, (first, upto))
        spans[tp] = min(first, before[0]), max(upto, before[1])


def _write(folder: LogFolder, journal: Path, table: pa.Table, spans: OffsetSpans) -> None:
    """Write a journal's rows; the same rows and offsets, in whatever order, give the same parts."""
    keys = [table.schema.names[0], TIMESTAMP]
    # Thousands of small batches in one piece first: sorting takes a third of the time.
    ordered = table.combine_chunks().sort_by([(name, "ascending") for name in keys])
    write_parts(folder, part_stem(ordered, keys, spans, f"part-{journal.stem}"), ordered)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unavailable(folder: LogFolder, error: OSError) -> SinkUnavailable:
    return SinkUnavailable(f"offline log {folder}: {error}")

"""JSONL and Parquet files, read as an embedded log: partitions and offsets, but no server."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import islice
from pathlib import Path

from llm4es.errors import ConfigError, InvalidEvent
from llm4es.events import Record, TopicPartition, decode_object, entity_id_of
from stream_worker.ports import (
    AssignmentListener,
    LogDescription,
    LogIdentity,
    PartitionSpan,
)
from stream_worker.sources.log_files import LogFiles

__all__ = ["FileLog", "FileRecordSource"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLog:
    """A file as a log: which field keys a record, and which one says when the log got it.

    `path` may be an address, or a folder of files, as `LogFiles` reads them, if it is text.
    """

    path: Path | str
    key_field: str
    partitions: int = 4
    recorded_at_field: str | None = None


class FileRecordSource:
    """See `ports.RecordSource`. A record's partition follows from its key.

    Its offset is its place among the file's records of that partition; a record without a key
    goes to partition 0. It keeps no group: what is committed is what the window store says.
    """

    def __init__(self, file: FileLog) -> None:
        if isinstance(file.path, Path):
            _refuse_no_file(file.path)
        self._file = file
        self._files = LogFiles(file.path)
        self._spans = self._scan()
        self._partitions = tuple(
            TopicPartition(self._files.name, index) for index in range(file.partitions)
        )
        self._listener: AssignmentListener | None = None
        self._positions: dict[TopicPartition, int] = {}
        self._records: Iterator[Record] = iter(())

    def describe(self) -> LogDescription:
        """Partitions and ends, as they were when the file was opened."""
        return LogDescription(
            identity=LogIdentity(
                topic=self._files.name,
                topic_id=self._identify(),
                partitions=self._file.partitions,
            ),
            spans=self._spans,
            compacted=False,
            timestamps="none" if self._file.recorded_at_field is None else "log_append",
        )

    def sample(self, count: int) -> Sequence[Record]:  # noqa: ARG002 - the protocol's
        """Nothing to look at: the keys are made from the records themselves."""
        return ()

    def subscribe(self, listener: AssignmentListener) -> None:
        """Assign every partition at the next poll."""
        self._listener = listener

    def poll(self, max_records: int, timeout_s: float) -> Sequence[Record]:  # noqa: ARG002
        """Next records in the order of the file."""
        if self._listener is not None:
            self.seek(self._listener.assigned(self._partitions))
            self._listener = None  # not before: where it raises it is asked again
        records = list(islice(self._records, max_records))
        for record in records:
            self._positions[record.topic_partition] = record.offset + 1
        return records

    def committed(self, partitions: Iterable[TopicPartition]) -> Mapping[TopicPartition, int]:  # noqa: ARG002
        """No group, so nothing is committed."""
        return {}

    def commit(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """No group, so nothing to advance."""

    def seek(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read the file anew, and skip what comes before the positions."""
        self._positions.update(positions)
        start = dict(self._positions)
        self._records = (
            record for record in self._read() if record.offset >= start[record.topic_partition]
        )

    def offsets_at(
        self, moment: datetime, moment_of: Callable[[Record], datetime | None]
    ) -> dict[int, int]:
        """First offset of each partition whose record is not older; its end where none is."""
        found = {partition: span.end for partition, span in self._spans.items()}
        for record in self._read():
            if record.offset < found[record.partition]:
                known = moment_of(record)
                if known is not None and known >= moment:
                    found[record.partition] = record.offset
        return found

    def positions(self) -> dict[TopicPartition, int]:
        """Offsets that are read next."""
        return dict(self._positions)

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        """Nothing is saved by it: the file is read in one."""

    def keep_alive(self) -> None:
        """No group, so nobody to show it."""

    def lag(self) -> Mapping[TopicPartition, int]:
        """Records of each partition that are still to come."""
        return {tp: self._spans[tp.partition].end - at for tp, at in self._positions.items()}

    def remaining(self) -> int | None:
        """Records that were in the file when it was opened, and are still to come."""
        if not self._positions:
            return None
        return sum(
            self._spans[tp.partition].end - position for tp, position in self._positions.items()
        )

    def close(self) -> None:
        """Let go of the file."""
        self._records = iter(())

    def _identify(self) -> str:
        """Hash what appending leaves as it is: the first line. Empty where there is none yet."""
        beginning = self._files.beginning()
        return hashlib.sha256(beginning).hexdigest()[:16] if beginning else ""

    def _scan(self) -> dict[int, PartitionSpan]:
        ends = dict.fromkeys(range(self._file.partitions), 0)
        for record in self._read():
            ends[record.partition] = record.offset + 1
        return {partition: PartitionSpan(0, end) for partition, end in ends.items()}

    def _read(self) -> Iterator[Record]:
        offsets = dict.fromkeys(range(self._file.partitions), 0)
        for value in self._files.values():
            key, timestamp = self._envelope(value)
            partition = _partition(key, self._file.partitions)
            yield Record(
                topic=self._files.name,
                partition=partition,
                offset=offsets[partition],
                timestamp=timestamp,
                key=key,
                value=value,
            )
            offsets[partition] += 1

    def _envelope(self, value: bytes) -> tuple[bytes | None, datetime | None]:
        """A record's key and timestamp; parsing proper, with its complaints, comes later."""
        try:
            document = decode_object(value)
            key = entity_id_of(document, self._file.key_field).encode()
        except InvalidEvent:
            return None, None
        recorded_at = document.get(self._file.recorded_at_field or "")
        return key, _moment(recorded_at) if isinstance(recorded_at, str) else None


def _refuse_no_file(path: Path) -> None:
    if path.suffix not in {".jsonl", ".parquet"}:
        raise ConfigError(
            "events", f"{path} is neither .jsonl nor .parquet", "name a file of these"
        )
    if not path.is_file():
        raise ConfigError("events", f"{path} is no file", "name the event log")


def _moment(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):  # overflow: in UTC it is before year 1, or after 9999
        return None


def _partition(key: bytes | None, partitions: int) -> int:
    if key is None:
        return 0
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") % partitions

"""A log cut by entity into files, so that one bucket at a time is in memory.

<folder>/<bucket>   its records in the log's order: `length u32` in little endian, then MessagePack
"""

import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from llm4es.errors import ConfigError
from llm4es.events import Record
from stream_worker.ops.buckets import bucket_of

__all__ = ["DiskBuckets"]

_LENGTH = struct.Struct("<I")
_BUFFERED_BYTES = 1 << 16  # of a bucket, before they are written
_FEWEST, _MOST = 64, 512
_BUCKET_RECORDS = 20_000  # that a bucket should hold at most, as long as there are not too many


class DiskBuckets:
    """Records of about `expected` in all, which go into a folder of their own, emptied first.

    Raises ConfigError where the folder cannot be written.
    """

    def __init__(self, folder: Path, *, expected: int) -> None:
        self._folder = folder
        self._count = min(_MOST, max(_FEWEST, expected // _BUCKET_RECORDS))
        self._waiting: list[bytearray] = [bytearray() for _ in range(self._count)]
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Record)
        self.remove()
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise self._unusable(error) from error

    def add(self, records: Iterable[Record]) -> None:
        """Take records in, each after those of its entity that came before."""
        for record in records:
            bucket = bucket_of(record.key, self._count)
            waiting = self._waiting[bucket]
            encoded = self._encoder.encode(record)
            waiting += _LENGTH.pack(len(encoded))
            waiting += encoded
            if len(waiting) > _BUFFERED_BYTES:
                self._write(bucket)

    def finish(self) -> int:
        """Write what waits; give the number of buckets that hold something."""
        for bucket in range(self._count):
            self._write(bucket)
        return sum(1 for _ in self._folder.iterdir())

    def read(self) -> Iterator[list[Record]]:
        """Each bucket's records, read when they are asked for; its file goes then.

        Raises ConfigError where they are gone: `forget` takes them away.
        """
        for path in sorted(self._folder.iterdir()):
            try:
                content = path.read_bytes()
                path.unlink()
            except OSError as error:
                raise ConfigError(
                    "state_dir",
                    f"{path} is gone ({error.strerror})",
                    "give the same command again: it passes over what stands",
                ) from error
            yield list(self._decode(content))

    def remove(self) -> None:
        """Remove the folder, and what a killed process left in it."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, bucket: int) -> None:
        waiting = self._waiting[bucket]
        if not waiting:
            return
        try:
            with (self._folder / f"{bucket:03d}").open("ab") as file:
                file.write(waiting)
        except OSError as error:
            raise self._unusable(error) from error
        waiting.clear()

    def _decode(self, content: bytes) -> Iterator[Record]:
        view, at = memoryview(content), 0
        while at < len(view):
            (length,) = _LENGTH.unpack_from(view, at)
            at += _LENGTH.size
            yield self._decoder.decode(view[at : at + length])
            at += length

    def _unusable(self, error: OSError) -> ConfigError:
        return ConfigError(
            "state_dir",
            f"{self._folder} cannot be written ({error.strerror})",
            "name a folder on a disk with room for the log",
        )

"""A log in files: one of them or a folder, on this machine or in an object store.

An address (`s3://bucket/events/`, `gs://...`, `abfs://...`) is opened by pyarrow, or by fsspec
where pyarrow does not know its scheme. The files of a folder are read in the order of their names.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from llm4es.errors import ConfigError, SourceUnavailable

__all__ = ["LogFiles"]

_PARQUET_ROWS = 4096
_IDENTITY_BYTES = 4096  # of a Parquet file's beginning
_SUFFIXES = (".jsonl", ".parquet")


class LogFiles:
    """Values of a log's records, read anew each time. Raises ConfigError for what is no log."""

    def __init__(self, place: Path | str) -> None:
        self.name = str(place).rstrip("/").rpartition("/")[2]
        self._place = place
        with self._mapped():
            self._files, self._paths = _open(place)
        if not self._paths:
            raise ConfigError("events", f"{place} holds no log", "name a .jsonl or .parquet file")

    def values(self) -> Iterator[bytes]:
        """Each record as JSON. Raises ConfigError, SourceUnavailable."""
        for path in self._paths:
            with self._mapped():
                if path.endswith(".jsonl"):
                    with self._lines(path) as lines:
                        yield from (line.rstrip(b"\r\n") for line in lines)
                else:
                    with self._files.open_input_file(path) as file:
                        for batch in pq.ParquetFile(file).iter_batches(_PARQUET_ROWS):
                            yield from map(msgspec.json.encode, batch.to_pylist())

    def beginning(self) -> bytes:
        """What appending leaves as it is: the first line. Empty where there is none yet."""
        path = self._paths[0]
        with self._mapped():
            if path.endswith(".jsonl"):
                with self._lines(path) as lines:
                    line = lines.readline()
                return line if line.endswith(b"\n") else b""
            with self._files.open_input_stream(path) as stream:
                return bytes(stream.read(_IDENTITY_BYTES))

    def _lines(self, path: str) -> IO[bytes]:
        return io.BufferedReader(self._files.open_input_stream(path))

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        """Raise what files and object stores say as ours."""
        try:
            yield
        except OSError as error:
            msg = f"{self._place} cannot be read ({error})"
            raise SourceUnavailable(msg) from error
        except pa.ArrowException as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                "events", f"{self._place} is no whole Parquet file ({reason})", "write it anew"
            ) from error


def _open(place: Path | str) -> tuple[fs.FileSystem, list[str]]:
    if isinstance(place, Path):
        files: fs.FileSystem = fs.LocalFileSystem()
        path = str(place)
    else:
        files, path = _resolve(place)
    if path.endswith(_SUFFIXES) and files.get_file_info(path).type is fs.FileType.File:
        return files, [path]
    found = files.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    return files, sorted(
        each.path
        for each in found
        if each.type is fs.FileType.File
        and each.path.endswith(_SUFFIXES)
        and not each.base_name.startswith((".", "_"))
    )


def _resolve(url: str) -> tuple[fs.FileSystem, str]:
    try:
        found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(url)
    except pa.ArrowInvalid as error:
        import fsspec  # noqa: PLC0415 - only for schemes that pyarrow does not know

        try:
            files, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as unknown:
            raise ConfigError(
                "log", f"{url} cannot be opened ({error}; {unknown})", "name a path, or s3://..."
            ) from unknown
        return fs.PyFileSystem(fs.FSSpecHandler(files)), str(path)
    return found

"""Parts of an offline log in an object store, through fsspec: as much of `pathlib` as they need.

An object of S3, GCS or Azure appears whole, or not at all, when its last byte is there: it is put
under its own name. Elsewhere it is written under a name that no reader's glob matches, and moved.
What needs a file system that keeps its word (journals, locks, who was deleted) stands in `control`,
a folder of this machine.

Every failure is an OSError, whatever a vendor's client raises.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

__all__ = ["LogFolder", "ObjectPath", "control_folder", "object_folder", "opened", "size_of"]

# Stores whose objects appear whole: nothing is ever seen half written.
_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "memory"}


@dataclass(frozen=True, eq=False)
class ObjectPath:
    """A name in an object store; ordered and compared by it."""

    filesystem: Any  # fsspec's
    path: str  # without its protocol
    control: Path  # of the log it belongs to

    def __str__(self) -> str:
        return str(self.filesystem.unstrip_protocol(self.path))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: "ObjectPath") -> bool:
        return self.path < other.path

    def __truediv__(self, name: str) -> "ObjectPath":
        return self._at(f"{self.path.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """Its last part."""
        return PurePosixPath(self.path).name

    @property
    def stem(self) -> str:
        """Its last part without the suffix."""
        return PurePosixPath(self.path).stem

    @property
    def parent(self) -> "ObjectPath":
        """What it stands in."""
        return self._at(self.path.rstrip("/").rpartition("/")[0])

    def relative_to(self, folder: "ObjectPath") -> PurePosixPath:
        """Its parts below a folder."""
        return PurePosixPath(self.path).relative_to(folder.path)

    def rglob(self, pattern: str) -> Iterator["ObjectPath"]:
        """Objects below whose names match."""
        with _os_errors():
            self.filesystem.invalidate_cache()  # others write, too
            try:
                found = self.filesystem.find(self.path)
            except FileNotFoundError:
                found = []
        for path in found:
            if fnmatchcase(path.rpartition("/")[2], pattern):
                yield self._at(path)

    def exists(self) -> bool:
        """Whether an object of this name is there."""
        with _os_errors():
            self.filesystem.invalidate_cache()
            return bool(self.filesystem.isfile(self.path))

    def is_file(self) -> bool:
        """See `exists`."""
        return self.exists()

    def open(self) -> Any:  # noqa: ANN401 - fsspec's file
        """Open it for reading."""
        with _os_errors():
            return self.filesystem.open(self.path, "rb")

    def size(self) -> int:
        """Bytes."""
        with _os_errors():
            return int(self.filesystem.size(self.path))

    def put(self, content: bytes) -> None:
        """Return when it is there, whole; nobody sees less of it."""
        protocol = self.filesystem.protocol
        names = {protocol} if isinstance(protocol, str) else set(protocol)
        with _os_errors():
            if names & _WHOLE:
                self.filesystem.pipe_file(self.path, content)
                return
            self.filesystem.makedirs(self.parent.path, exist_ok=True)
            temporary = self.parent / f".{self.name}.{uuid.uuid4().hex[:8]}.tmp"
            self.filesystem.pipe_file(temporary.path, content)
            self.filesystem.mv(temporary.path, self.path)

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Take it away."""
        with _os_errors():
            if not missing_ok:
                self.filesystem.rm_file(self.path)
                return
            with suppress(FileNotFoundError):
                self.filesystem.rm_file(self.path)

    def _at(self, path: str) -> "ObjectPath":
        return ObjectPath(self.filesystem, path, self.control)


LogFolder = Path | ObjectPath  # of a log, or of one of its parts


def object_folder(address: str, control: Path, *, endpoint: str | None = None) -> ObjectPath:
    """Folder of a log at an address such as s3://bucket/offline.

    Raises OSError where fsspec's package for it is not installed.
    """
    options: dict[str, Any] = {"client_kwargs": {"endpoint_url": endpoint}} if endpoint else {}
    with _os_errors():
        filesystem, path = fsspec.core.url_to_fs(address, **options)
    return ObjectPath(filesystem, path.rstrip("/"), control)


def control_folder(folder: LogFolder) -> Path:
    """Where a log's journals, locks and deletions stand: with it, if it is on this machine."""
    return folder if isinstance(folder, Path) else folder.control


def opened(part: LogFolder) -> Any:  # noqa: ANN401 - what pyarrow reads
    """A part as pyarrow reads it."""
    return part if isinstance(part, Path) else part.open()


def size_of(part: LogFolder) -> int:
    """Bytes of a part."""
    return part.stat().st_size if isinstance(part, Path) else part.size()


@contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        # Each vendor's client has errors of its own.
        raise OSError(f"{type(error).__name__}: {error}") from error

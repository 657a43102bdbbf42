"""One process at a time in a folder of ours; the lock goes with the process, however it ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm4es.errors import ConfigError

__all__ = ["locked"]


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes out of a folder, which is made. Raises ConfigError naming `what`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            "state_dir", f"{folder} cannot be written ({error.strerror})", "name a folder that can"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                what, f"another process carries out this very {what}", "wait for it"
            ) from None
        yield
    finally:
        os.close(descriptor)

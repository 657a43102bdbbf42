"""A server as a child process: started, probed until it answers, stopped by its pid."""

import fcntl
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "LOOPBACK",
    "PortTaken",
    "ServerFailed",
    "ServerProcess",
    "free_port",
    "is_free",
    "on_a_free_port",
    "wait_until",
]

LOOPBACK = "127.0.0.1"

_GUARD = Path(__file__).with_name("guard.py")
_TAIL_LINES = 30
_LOCK_TIMEOUT_S = 5.0  # for the server of somebody killed just now, which its guard is ending
_TAIL_BYTES = 16_384
# Below the ports that Linux (32768) and macOS (49152) give to outgoing connections: a client that
# retries a server which is down can be given the server's own port, and then holds it connected
# to itself, so that the server cannot come back.
_PORTS = range(20_000, 32_000)
_ATTEMPTS = 3
_TAKEN = "Address already in use"


class ServerFailed(Exception):
    """A server did not start or did not answer; says where its log is and how it ends."""


class PortTaken(ServerFailed):
    """The server ended because somebody else listens on its port."""


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback interface now."""
    with socket.socket() as probe:
        # As servers do, or a port is "taken" for a minute after its last connection closed.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def free_port(*, but: Sequence[int] = ()) -> int:
    """Return a port that nobody listens on now, and which is none of `but`."""
    for _ in range(1_000):
        port = secrets.choice(_PORTS)
        if port not in but and is_free(port):
            return port
    raise ServerFailed(f"no free port between {_PORTS.start} and {_PORTS.stop}")


def on_a_free_port(launch: Callable[[int], None]) -> int:
    """Launch a server on a free port and return the port.

    Between finding a port and listening on it somebody else may take it: then on another one.
    """
    for _ in range(_ATTEMPTS - 1):
        port = free_port()
        try:
            launch(port)
        except PortTaken:
            continue
        return port
    port = free_port()
    launch(port)
    return port


def wait_until(condition: Callable[[], bool], *, timeout_s: float, every_s: float = 0.05) -> bool:
    """Ask until the answer is yes, or the time is up; return the last answer."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(every_s)
    return True


class ServerProcess:
    """One server process, its output in a file, that does not outlive whoever started it.

    It runs in a session of its own: Ctrl-C at a terminal reaches us alone, and we stop it.
    """

    def __init__(self, name: str, *, log: Path, stop_timeout_s: float = 20.0) -> None:
        self.name = name
        self.log = log
        self._stop_timeout_s = stop_timeout_s
        self._log_start = 0
        self._server: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._server is not None and self._server.poll() is None

    @property
    def pid(self) -> int:
        """The server's own process id, for signals. Raises ServerFailed when it does not run."""
        if self._server is None or not self.running:
            raise ServerFailed(f"{self.name} is not running")
        return self._server.pid

    def start(self, command: Sequence[str], answers: Callable[[], bool], timeout_s: float) -> None:
        """Start it, and a guard that ends it when we are gone; return once it answers.

        Raises ServerFailed when it ends first or takes too long, and leaves nothing running then.
        """
        if self.running:
            raise ServerFailed(f"{self.name} is running already")
        self._release()
        try:
            self._spawn(command)
            self._wait_ready(answers, timeout_s)
        except BaseException:  # an interrupt too: no one else knows that it runs
            self.kill()
            raise

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after the deadline. Returns when it is gone; harmless twice."""
        if self._server is not None and self.running:
            self._server.terminate()
            try:
                self._server.wait(self._stop_timeout_s)
            except subprocess.TimeoutExpired:
                self._server.kill()
        self._release()

    def kill(self) -> None:
        """SIGKILL, as a crash would end it. Returns when it is gone; harmless twice."""
        if self._server is not None:
            self._server.kill()
        self._release()

    def tail(self) -> str:
        """Return the last lines that it logged since it was started last."""
        try:
            with self.log.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, size - _TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return "(no log)"
        return "\n".join(text.splitlines()[-_TAIL_LINES:])

    def _spawn(self, command: Sequence[str]) -> None:
        # The server inherits the lock, so its folder is free again when it ends and no sooner,
        # whatever becomes of us. (A second Kafka "recovers" the first one's live metadata log
        # before it finds its own lock taken.)
        folder = self.log.parent
        with (folder / ".lock").open("ab") as lock, self.log.open("ab") as log:
            if not wait_until(lambda: _locked(lock), timeout_s=_LOCK_TIMEOUT_S):
                raise ServerFailed(f"another {self.name} is running on {folder}")
            self._log_start = log.tell()
            self._server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD), str(self._server.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _wait_ready(self, answers: Callable[[], bool], timeout_s: float) -> None:
        if not wait_until(lambda: not self.running or answers(), timeout_s=timeout_s):
            raise self._failure(ServerFailed, f"did not answer within {timeout_s:g} s")
        if not self.running:
            kind = PortTaken if _TAKEN in self.tail() else ServerFailed
            raise self._failure(kind, "ended while it was starting")

    def _failure(self, kind: type[ServerFailed], problem: str) -> ServerFailed:
        return kind(f"{self.name} {problem}; the end of {self.log}:\n{self.tail()}")

    def _release(self) -> None:
        server, guard = self._server, self._guard
        self._server = self._guard = None
        if server is not None:
            server.wait()
        if guard is not None:
            if guard.stdin is not None:
                guard.stdin.close()
            guard.wait()


def _locked(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

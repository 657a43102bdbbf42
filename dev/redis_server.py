"""Redis, as a child process."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from dev.certificates import Certificates
from dev.processes import LOOPBACK, ServerFailed, ServerProcess, free_port, on_a_free_port

__all__ = ["RedisServer", "answering"]

_START_TIMEOUT_S = 30.0


class RedisServer:
    """One Redis; `persistence` is its append-only file's fsync policy, or "none" for no file.

    With "everysec" a killed *machine* loses up to a second, a killed process nothing it
    acknowledged; with "none" every restart loses all. Without `port` a free one is chosen at the
    first start and kept from then on. With `certificates` it listens with TLS as well, on a port of
    its own; `users` are further ACL rules by name, as `on >PASSWORD ~* +@all`, and `options` are
    further words of its command.
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int | None = None,
        persistence: Literal["always", "everysec", "none"] = "everysec",
        certificates: Certificates | None = None,
        users: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._options = list(options)
        self._certificates = certificates
        self._users = dict(users or {})
        self._tls_port = 0
        self.folder = folder.resolve()
        self._port = port
        self._persistence = persistence
        self._process = ServerProcess("Redis", log=self.folder / "redis.log")

    @property
    def port(self) -> int:
        """The port it listens on. Raises ServerFailed before one is chosen."""
        if self._port is None:
            raise ServerFailed("Redis was never started")
        return self._port

    @property
    def address(self) -> str:
        """HOST:PORT, as Feast's `connection_string` wants it."""
        return f"{LOOPBACK}:{self.port}"

    @property
    def url(self) -> str:
        """redis://HOST:PORT; put /N behind it for another database than 0."""
        return f"redis://{self.address}"

    @property
    def tls_address(self) -> str:
        """HOST:PORT where it speaks TLS."""
        return f"{LOOPBACK}:{self._tls_port}"

    @property
    def log(self) -> Path:
        """The file its output goes to."""
        return self._process.log

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process.running

    @property
    def pid(self) -> int:
        """Its process id, for signals. Raises ServerFailed when it does not run."""
        return self._process.pid

    def start(self) -> Self:
        """Start it and return when it has loaded its data and answers. Raises ServerFailed."""
        program = shutil.which("redis-server")
        if program is None:
            raise ServerFailed(
                "redis-server is not installed; `sh dev/setup.sh dev` installs it or says how"
            )
        self.folder.mkdir(parents=True, exist_ok=True)

        def launch(port: int) -> None:
            self._process.start(
                self._command(program, port), lambda: self._answers(port), _START_TIMEOUT_S
            )

        if self._port is None:
            self._port = on_a_free_port(launch)
        else:
            launch(self._port)
        return self

    def stop(self) -> None:
        """Stop it as an operator would: the append-only file is synced first."""
        self._process.stop()

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()

    def restart(self) -> None:
        """Stop it if it runs, and start it on the same port and data."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _command(self, program: str, port: int) -> list[str]:
        listening = ["--bind", LOOPBACK, "--port", str(port), "--dir", str(self.folder)]
        if self._persistence == "none":
            persistence = ["--appendonly", "no"]
        else:
            persistence = ["--appendonly", "yes", "--appendfsync", self._persistence]
        # No snapshots beside the append-only file: what a restart brings back is one thing.
        settings = [*listening, *self._encrypted(port), *persistence, "--save", "", *self._options]
        for name, rules in self._users.items():
            settings += ["--user", name, *rules.split()]
        return [program, "--daemonize", "no", *settings]

    def _encrypted(self, port: int) -> list[str]:
        if self._certificates is None:
            return []
        self._tls_port = self._tls_port or free_port(but=[port])
        return [
            "--tls-port", str(self._tls_port),
            "--tls-cert-file", str(self._certificates.certificate),
            "--tls-key-file", str(self._certificates.key),
            "--tls-ca-cert-file", str(self._certificates.ca),
            "--tls-auth-clients", "no",
        ]  # fmt: skip

    def _answers(self, port: int) -> bool:
        # Ours, and not one that had the port before it and still has.
        return answering(port) == self._process.pid


def answering(port: int) -> int | None:
    """Process id of the Redis that answers there; None where none does."""
    client = Redis(
        host=LOOPBACK,
        port=port,
        socket_timeout=2.0,
        socket_connect_timeout=2.0,
        retry=Retry(NoBackoff(), 0),  # the caller does the asking again
    )
    try:
        client.ping()  # refused while it loads its data
        server = client.info("server")
    except RedisError:
        return None
    finally:
        client.close()
    return int(server["process_id"]) if isinstance(server, dict) else None

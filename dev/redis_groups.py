"""Several Redis together: a Cluster, and a master with a replica that a Sentinel watches."""

import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from redis import Redis

from dev.processes import LOOPBACK, ServerFailed, ServerProcess, free_port, wait_until
from dev.redis_server import RedisServer, answering

__all__ = ["RedisClusterServers", "RedisSentinelServers"]

_TIMEOUT_S = 60.0
_SLOTS = 16384


class RedisClusterServers:
    """Two masters, each with half of the slots."""

    def __init__(self, folder: Path) -> None:
        # The port of the bus is by default ten thousand higher, which may be none.
        self._bus = [free_port()]
        self._bus.append(free_port(but=self._bus))
        self._nodes = [
            RedisServer(
                folder / f"node-{number}",
                persistence="none",
                options=["--cluster-enabled", "yes", "--cluster-port", str(port)],
            )
            for number, port in enumerate(self._bus)
        ]

    @property
    def url(self) -> str:
        """redis+cluster://HOST:PORT,HOST:PORT."""
        return f"redis+cluster://{self.address}"

    @property
    def address(self) -> str:
        """HOST:PORT,HOST:PORT, as Feast takes it."""
        return ",".join(node.address for node in self._nodes)

    @property
    def ports(self) -> list[int]:
        """Where the nodes listen."""
        return [node.port for node in self._nodes]

    def __enter__(self) -> Self:
        """Start the nodes, and return when each knows who has which slots."""
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _start(self) -> None:
        clients: list[Any] = []
        share = _SLOTS // len(self._nodes)
        for number, node in enumerate(self._nodes):
            client: Any = Redis(port=node.start().port)
            clients.append(client)
            first = number * share
            client.execute_command("CLUSTER ADDSLOTSRANGE", first, first + share - 1)
        other = self._nodes[1]
        clients[0].execute_command("CLUSTER MEET", LOOPBACK, other.port, self._bus[1])

        def agreed() -> bool:
            told = [client.execute_command("CLUSTER INFO") for client in clients]
            return all(each["cluster_state"] == "ok" for each in told) and all(
                each["cluster_slots_ok"] == str(_SLOTS) for each in told
            )

        if not wait_until(agreed, timeout_s=_TIMEOUT_S):
            raise ServerFailed("the nodes of the Redis Cluster did not agree")
        for client in clients:
            client.close()

    def _stop(self) -> None:
        for node in self._nodes:
            node.stop()


class RedisSentinelServers:
    """A master called `MASTER`, a replica, and a Sentinel that alone decides on a failover."""

    MASTER = "shop"

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self.master = RedisServer(self._folder / "master")
        self._replica: RedisServer | None = None
        self._sentinel = ServerProcess("Sentinel", log=self._folder / "sentinel.log")
        self._port = 0

    @property
    def url(self) -> str:
        """redis+sentinel://HOST:PORT/MASTER/0."""
        return f"redis+sentinel://{LOOPBACK}:{self._port}/{self.MASTER}/0"

    @property
    def master_port(self) -> int:
        """Port of the one that the Sentinel calls master."""
        client: Any = Redis(port=self._port)
        found = client.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", self.MASTER)
        client.close()
        return int(found[1])

    def __enter__(self) -> Self:
        """Start all, and return when the Sentinel knows a replica that has the master's data."""
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _start(self) -> None:
        port = self.master.start().port
        self._replica = RedisServer(
            self._folder / "replica", options=["--replicaof", LOOPBACK, str(port)]
        ).start()
        self._port = free_port(but=[port, self._replica.port])
        configuration = self._folder / "sentinel.conf"  # the Sentinel writes into it
        configuration.write_text(
            f"port {self._port}\n"
            f"bind {LOOPBACK}\n"
            f"dir {self._folder}\n"
            f"sentinel monitor {self.MASTER} {LOOPBACK} {port} 1\n"
            f"sentinel down-after-milliseconds {self.MASTER} 1000\n"
            f"sentinel failover-timeout {self.MASTER} 10000\n"
        )
        program = shutil.which("redis-server") or "redis-server"
        self._sentinel.start(
            [program, str(configuration), "--sentinel"],
            lambda: answering(self._port) == self._sentinel.pid,
            _TIMEOUT_S,
        )
        client: Any = Redis(port=self._port)

        def ready() -> bool:
            replicas = client.sentinel_slaves(self.MASTER)
            return any(each["master-link-status"] == "ok" for each in replicas)

        if not wait_until(ready, timeout_s=_TIMEOUT_S):
            raise ServerFailed("the Sentinel found no replica that follows the master")
        client.close()

    def _stop(self) -> None:
        self._sentinel.stop()
        for server in (self._replica, self.master):
            if server is not None:
                server.stop()

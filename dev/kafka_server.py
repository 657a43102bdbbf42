"""Apache Kafka, as a child process: one KRaft node on the jars that Maven fetched."""

import secrets
import socket
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from dev.kafka_jars import LOG4J2, java_command, kafka_jars
from dev.processes import LOOPBACK, ServerFailed, ServerProcess, free_port, on_a_free_port

with warnings.catch_warnings():
    # kafka-python 3.0 reads its schemas through an importlib.resources call that 3.11 deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from kafka.admin import KafkaAdminClient
    from kafka.errors import KafkaError, TopicAlreadyExistsError

__all__ = ["BROKER", "KafkaServer", "create_topic"]

_START_TIMEOUT_S = 60.0
_PROBE_TIMEOUT_MS = 5_000

_LARGEST_RECORD = 10 << 20  # topics may allow 8 MiB, and dead letters carry a little more than that
# What docker-compose.yml sets too: tests run on the Kafka that users start.
BROKER = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "offsets.topic.num.partitions": "4",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "auto.create.topics.enable": "false",
    "log.message.timestamp.type": "LogAppendTime",
    "message.max.bytes": str(_LARGEST_RECORD),
    "replica.fetch.max.bytes": str(_LARGEST_RECORD),
}
_PROTOCOLS = "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT"
_HERE = {
    # Tests want a group that forms at once and notices a dead member within a second or two.
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "500",
    # The controller refuses a broker's new life until the old one's session ends: after a kill -9
    # a start would take 12 s with the default of 9 s.
    "broker.session.timeout.ms": "2500",
    "broker.heartbeat.interval.ms": "400",
    "log.cleaner.dedupe.buffer.size": str(8 << 20),  # 128 MiB by default, of a small heap
}


class KafkaServer:
    """One Kafka node, broker and controller in one process.

    `properties` are added to the broker's, or replace them. Without `port` a free one is chosen at
    the first start and kept from then on. `listeners` (SSL, SASL_PLAINTEXT, SASL_SSL) are opened
    beside the plain one, on ports of their own; what they need to know is in `properties`. `scram`
    are users and their passwords, made when the folder is.
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int | None = None,
        properties: Mapping[str, str] | None = None,
        listeners: Sequence[str] = (),
        scram: Mapping[str, str] | None = None,
    ) -> None:
        self._listeners = dict.fromkeys(listeners, 0)
        self._scram = dict(scram or {})
        self.folder = folder.resolve()
        self._port = port
        self._properties = dict(properties or {})
        self._process = ServerProcess("Kafka", log=self.folder / "kafka.log")

    @property
    def port(self) -> int:
        """The port clients use. Raises ServerFailed before one is chosen."""
        if self._port is None:
            raise ServerFailed("Kafka was never started")
        return self._port

    @property
    def bootstrap_servers(self) -> str:
        """What Kafka clients call `bootstrap_servers`."""
        return f"{LOOPBACK}:{self.port}"

    def address(self, listener: str) -> str:
        """What Kafka clients call `bootstrap_servers`, of one of the further listeners."""
        return f"{LOOPBACK}:{self._listeners[listener]}"

    @property
    def log(self) -> Path:
        """The file the broker's output goes to."""
        return self._process.log

    @property
    def running(self) -> bool:
        """Whether the broker was started and has not ended."""
        return self._process.running

    @property
    def pid(self) -> int:
        """The broker's process id, for signals. Raises ServerFailed when it does not run."""
        return self._process.pid

    def start(self) -> Self:
        """Start the broker and return when it answers. Raises ServerFailed."""
        jars = kafka_jars()
        self.folder.mkdir(parents=True, exist_ok=True)

        def launch(port: int) -> None:
            self._launch(jars, port)

        if self._port is None:
            self._port = on_a_free_port(launch)
        else:
            launch(self._port)
        return self

    def stop(self) -> None:
        """Stop it as an operator would; what clients were told is written stays."""
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

    def _launch(self, jars: Path, port: int) -> None:
        configuration = self._configure(port)
        if not self._meta.exists():
            self._format(jars, configuration)
        logging = f"-Dlog4j2.configurationFile={LOG4J2}"
        java = java_command(jars, "-Xms128m", "-Xmx512m", logging)
        self._process.start(
            [*java, "kafka.Kafka", str(configuration)],
            lambda: self._answers(port),
            _START_TIMEOUT_S,
        )

    @property
    def _meta(self) -> Path:
        return self.folder / "data" / "meta.properties"

    def _configure(self, port: int) -> Path:
        controller = free_port(but=[port])
        for name, known in self._listeners.items():
            taken = [port, controller, *self._listeners.values()]
            self._listeners[name] = known or free_port(but=taken)
        more = "".join(f",{name}://{self.address(name)}" for name in self._listeners)
        protocols = "".join(f",{name}:{name}" for name in self._listeners)
        properties = {
            **BROKER,
            **_HERE,
            "listener.security.protocol.map": _PROTOCOLS + protocols,
            "listeners": f"PLAINTEXT://{LOOPBACK}:{port},CONTROLLER://{LOOPBACK}:{controller}{more}",
            "advertised.listeners": f"PLAINTEXT://{LOOPBACK}:{port}{more}",
            "controller.quorum.voters": f"1@{LOOPBACK}:{controller}",
            "log.dirs": str(self._meta.parent),
            **self._properties,
        }
        path = self.folder / "server.properties"
        path.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        return path

    def _format(self, jars: Path, configuration: Path) -> None:
        # No dash in front: the tool would take the id for an option.
        cluster_id = "K" + secrets.token_urlsafe(16)[1:]
        tool = [*java_command(jars), "kafka.tools.StorageTool", "format", "--ignore-formatted"]
        for name, password in self._scram.items():
            tool += ["--add-scram", f"SCRAM-SHA-512=[name={name},password={password}]"]
        done = subprocess.run(
            [*tool, "-t", cluster_id, "-c", str(configuration)],
            check=False,
            capture_output=True,
            text=True,
            timeout=_START_TIMEOUT_S,
        )
        if done.returncode:
            raise ServerFailed(f"Kafka's storage tool refused:\n{done.stdout}{done.stderr}")

    def _answers(self, port: int) -> bool:
        try:
            with socket.create_connection((LOOPBACK, port), timeout=1.0):
                pass  # cheap while it starts; a client's first attempt and back-off are not
            client = KafkaAdminClient(
                bootstrap_servers=f"{LOOPBACK}:{port}",
                bootstrap_timeout_ms=_PROBE_TIMEOUT_MS,
                request_timeout_ms=_PROBE_TIMEOUT_MS,
            )
        except (OSError, KafkaError):
            return False
        try:
            cluster = client.describe_cluster()
        except KafkaError:
            return False
        finally:
            client.close()
        # Ours, and not one that had the port before it and still has.
        ours = f"cluster.id={cluster['cluster_id']}" in self._meta.read_text().splitlines()
        return ours and bool(cluster["brokers"])


def create_topic(
    bootstrap_servers: str,
    name: str,
    *,
    partitions: int = 1,
    config: Mapping[str, str] | None = None,
    exist_ok: bool = False,
) -> None:
    """Create a topic and return when every partition of it has a leader.

    Raises kafka-python's TopicAlreadyExistsError, unless `exist_ok`.
    """
    spec = {"num_partitions": partitions, "replication_factor": 1, "configs": dict(config or {})}
    client = KafkaAdminClient(bootstrap_servers=bootstrap_servers)
    try:
        client.create_topics({name: spec}, wait_for_metadata=True)
    except TopicAlreadyExistsError:
        if not exist_ok:
            raise
    finally:
        client.close()

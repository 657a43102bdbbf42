"""What all schedules of a session share: Kafka, two Redis, proxies before them, a feature repo."""

import multiprocessing
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGUSR1

from feast import FeatureStore

from dev.processes import free_port
from dev.servers import KafkaServer, RedisServer
from llm4es.feast import define
from llm4es.feast.definitions import view_spec
from stream_worker.sources.kafka_client import KafkaSettings, admin
from tests.integration.faults.child import Plan, faults_bundle, work
from tests.integration.faults.proxy import Proxy

__all__ = ["RedisStage", "Stage", "WorkerProcess", "stage"]

_REPO = """\
project: llm4es
provider: local
registry: data/registry.db
online_store: {{type: redis, connection_string: "127.0.0.1:{port},socket_timeout=1"}}
offline_store: {{type: llm4es.feast.offline_log.LogOfflineStore}}
entity_key_serialization_version: 3
"""


class RedisStage:
    """One Redis behind a proxy, new and empty for each schedule, on the same ports."""

    def __init__(self, folder: Path) -> None:
        self.proxy = Proxy()
        self._folder = folder
        self._server = RedisServer(folder)
        self._written = 0

    @property
    def port(self) -> int:
        """The server's own port, past the proxy."""
        return self._server.port

    @property
    def url(self) -> str:
        """The server itself, past the proxy."""
        return self._server.url

    def begin(self) -> None:
        """Start anew without any data."""
        self._server.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._server.start()
        self.proxy.target = self._server.port
        self.proxy.set("pass")
        self._written = self._log.stat().st_size

    def restart(self) -> None:
        """Crash, and come back with all that was acknowledged."""
        self._server.kill()
        self._server.start()

    def lose_tail(self, share: float) -> None:
        """Crash, and come back without the last share of what was written since `begin`."""
        self._server.kill()
        size = self._log.stat().st_size
        os.truncate(self._log, self._written + int((size - self._written) * (1 - share)))
        self._server.start()  # which cuts a torn last command off

    def lose_all(self) -> None:
        """Crash, and come back empty."""
        self._server.kill()
        shutil.rmtree(self._folder / "appendonlydir")
        self._server.start()

    def close(self) -> None:
        """Stop both."""
        self.proxy.close()
        self._server.stop()

    @property
    def _log(self) -> Path:
        return next((self._folder / "appendonlydir").glob("*.incr.aof"))


class KafkaStage:
    """One Kafka, for tests directly and for workers through a proxy."""

    def __init__(self, folder: Path) -> None:
        self.proxy = Proxy()
        port, behind, controller = free_port(), free_port(), free_port()
        self.proxy.target = behind
        here = "127.0.0.1"
        self.server = KafkaServer(
            folder,
            port=port,
            properties={
                "listeners": f"PLAINTEXT://{here}:{port},PROXIED://{here}:{behind},"
                f"CONTROLLER://{here}:{controller}",
                "advertised.listeners": f"PLAINTEXT://{here}:{port},"
                f"PROXIED://{here}:{self.proxy.port}",
                "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,"
                "CONTROLLER:PLAINTEXT",
                "controller.quorum.voters": f"1@{here}:{controller}",
            },
        )
        self.server.start()

    def crash(self) -> None:
        """Kill the broker, and start it again on its data."""
        self.server.kill()
        self.server.start()

    def close(self) -> None:
        """Stop both."""
        self.proxy.close()
        self.server.stop()

    def delete_topics(self, *topics: str) -> None:
        """Forget topics; a broker that starts need not load them then."""
        with (
            suppress(Exception),
            admin(KafkaSettings(bootstrap_servers=self.server.bootstrap_servers)) as client,
        ):
            client.delete_topics(list(topics))


class WorkerProcess:
    """A worker that runs in a process of its own, forked from one that has imported everything."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        context = multiprocessing.get_context("forkserver")
        self._process: ForkServerProcess = context.Process(target=work, args=(plan,), daemon=True)
        self._process.start()
        self.frozen = False

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative where a signal ended it."""
        return self._process.exitcode

    def kill(self) -> None:
        """Kill -9."""
        self._signal(SIGKILL)
        self._process.join()

    def freeze(self) -> None:
        """Stop it as a paused virtual machine stops."""
        self._signal(SIGSTOP)
        self.frozen = True

    def tell_where(self) -> None:
        """Let it write its threads' stacks into its log."""
        self._signal(SIGUSR1)

    def thaw(self) -> None:
        """Let it go on, knowing nothing."""
        self._signal(SIGCONT)
        self.frozen = False

    def stop(self, timeout_s: float = 60.0) -> int | None:
        """SIGTERM; the exit code, or None where it did not end in time and was killed."""
        if self.frozen:
            self.thaw()
        self._process.terminate()
        self._process.join(timeout_s)
        code = self.exit_code
        if code is None:
            self.kill()
        return code

    def _signal(self, number: int) -> None:
        if self._process.pid is not None and self.exit_code is None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)


@dataclass
class Stage:
    """Servers and a feature repository whose view is applied; each schedule gets a copy."""

    folder: Path
    kafka: KafkaStage
    windows: RedisStage
    online: RedisStage
    redises: list[RedisStage] = field(init=False)

    def __post_init__(self) -> None:
        self.redises = [self.windows, self.online]
        for redis in self.redises:
            redis.begin()

    @cached_property
    def repo(self) -> Path:
        """The repository that is applied."""
        folder = self.folder / "repo"
        folder.mkdir()
        (folder / "feature_store.yaml").write_text(_REPO.format(port=self.online.proxy.port))
        definitions = define(
            view_spec(faults_bundle()),
            topic="given",
            bootstrap_servers="given",
            offline_path="data/offline",
            watermark_s=60,
        )
        with warnings.catch_warnings():  # Feast calls stream feature views experimental
            warnings.simplefilter("ignore", RuntimeWarning)
            FeatureStore(repo_path=str(folder)).apply(list(definitions.objects))
        return folder

    def begin(self, name: str) -> Path:
        """Empty the stores; give a folder with a repository of its own."""
        for redis in self.redises:
            redis.begin()
        self.kafka.proxy.set("pass")
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.repo, folder / "repo")
        return folder


@contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    """Start what schedules share."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.integration.faults.child"])
    with ExitStack() as stack:
        kafka = KafkaStage(folder / "kafka")
        stack.callback(kafka.close)
        windows, online = RedisStage(folder / "windows"), RedisStage(folder / "online")
        stack.callback(windows.close)
        stack.callback(online.close)
        yield Stage(folder, kafka, windows, online)

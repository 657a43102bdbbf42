"""The compose file: what Compose's own parser makes of it, and its containers' commands, run.

There is no Docker here. Each container's command, environment and health check are taken from the
project as Compose resolves it, and run as they stand, the containers' addresses and paths replaced
by this machine's. What stands in our image is what the Dockerfile copies. Kafka is configured by
the image's own entry point, which is a class in Kafka's jars.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet as pq
from redis import Redis
from redis.exceptions import AuthenticationError

from dev.compose_check import compose_model
from dev.kafka_jars import LOG4J2, java_command, kafka_jars
from dev.kafka_server import BROKER
from dev.load import load
from dev.processes import LOOPBACK, ServerProcess, free_port, is_free, wait_until
from llm4es.feast import read_view_spec
from llm4es.features import service_name
from stream_worker.settings import ENV_PREFIX, WorkerSettings
from stream_worker.sources.kafka_client import KafkaSettings, admin, topic_configs
from tests.commands import ROOT
from tests.integration.conftest import Sample

COMPOSE, GPU = ROOT / "docker-compose.yml", ROOT / "docker-compose.gpu.yml"
PASSWORD = "12e34"  # noqa: S105 - hex, which Feast would read as a number, were it bare
OURS = ("apply", "worker", "feature-server")
DONE, HEALTHY = "service_completed_successfully", "service_healthy"

Project = dict[str, Any]


def parse(*files: Path, folder: Path = ROOT, password: str = PASSWORD) -> Project:
    environment = {"REDIS_PASSWORD": password, "LLM4ES_BUNDLE": "/the/bundle"}
    done = compose_model(files, folder=folder, environment=environment)
    assert done.returncode == 0, done.stderr
    project: Project = json.loads(done.stdout)
    return project


@pytest.fixture(scope="module")
def project() -> Project:
    return parse(COMPOSE)


def copied() -> dict[str, str]:
    """Source and target of each COPY of the Dockerfile's last stage."""
    stage = (ROOT / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    lines = re.findall(r"^COPY (?!--from)(\S+) (\S+)$", stage, re.MULTILINE)
    assert lines
    return dict(lines)


# --- what the parser makes of it


@pytest.mark.parametrize(
    ("right", "wrong"), [("healthcheck:", "healthchek:"), ("condition: service_healthy", "when: 1")]
)
def test_what_compose_would_refuse_is_refused(tmp_path: Path, right: str, wrong: str) -> None:
    text = COMPOSE.read_text()
    assert right in text
    (tmp_path / "broken.yml").write_text(text.replace(right, wrong))
    done = compose_model(
        [tmp_path / "broken.yml"], folder=tmp_path, environment={"REDIS_PASSWORD": PASSWORD}
    )
    assert done.returncode != 0
    assert wrong.partition(":")[0] in done.stderr


def test_it_asks_for_a_password_and_has_none_of_its_own(project: Project) -> None:
    done = compose_model([COMPOSE], folder=ROOT, environment={"REDIS_PASSWORD": ""})
    assert done.returncode != 0
    assert "REDIS_PASSWORD" in done.stderr
    for service in project["services"].values():  # command lines are seen by `ps`
        assert PASSWORD not in json.dumps([service["command"], service.get("healthcheck")])


def test_what_is_waited_for_ends_or_has_a_health_check(project: Project) -> None:
    services = project["services"]
    waits = [
        (name, need["condition"])
        for service in services.values()
        for name, need in service.get("depends_on", {}).items()
    ]
    one_shot = {name for name, condition in waits if condition == DONE}
    assert one_shot == {"topics", "apply"}
    assert {condition for _, condition in waits} == {DONE, HEALTHY}
    for name, service in services.items():
        assert ("healthcheck" in service) == (name not in one_shot), name
        assert service.get("restart") == (None if name in one_shot else "unless-stopped"), name


def test_every_variable_is_one_that_is_read(project: Project) -> None:
    settings = {f"{ENV_PREFIX}{name.upper()}" for name in WorkerSettings.model_fields}
    repository = "".join(
        (ROOT / "feature_repo" / name).read_text()
        for name in ("definitions.py", "feature_store.prod.yaml")
    )
    read_by_feast = set(re.findall(rf"{ENV_PREFIX}[A-Z_]+", repository))
    for name in OURS:
        environment = set(project["services"][name]["environment"])
        assert environment <= (read_by_feast | (settings if name == "worker" else set())), name


def test_the_broker_is_the_one_that_tests_run_on(project: Project) -> None:
    environment = project["services"]["kafka"]["environment"]
    for key, value in BROKER.items():
        assert environment["KAFKA_" + key.upper().replace(".", "_")] == value, key


def test_only_what_is_for_this_machine_is_published_and_only_here(project: Project) -> None:
    for name, service in project["services"].items():
        for port in service.get("ports", []):
            assert port["host_ip"] == LOOPBACK, name


def test_the_image_is_built_of_files_that_are_there(project: Project) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    for source, target in copied().items():
        assert (ROOT / source).is_dir()
        assert source == target
        assert f"!{source}" in ignored
    declared = set(re.findall(r"^ARG (\w+)=", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    for service in [*project["services"].values(), *parse(COMPOSE, GPU)["services"].values()]:
        if "build" in service:
            arguments = service["build"]["args"]
            assert set(arguments) == declared
            requirements = ROOT / f"requirements/{arguments['REQUIREMENTS']}.txt"
            assert "--hash=sha256:" in requirements.read_text()
            assert not re.search(r"^(torch|nvidia\S*)==", requirements.read_text(), re.MULTILINE)


def test_the_gpu_file_changes_the_worker_alone(project: Project) -> None:
    services = parse(COMPOSE, GPU)["services"]
    worker = services["worker"]
    assert worker["build"]["args"]["REQUIREMENTS"] == "gpu"
    assert worker["image"] != project["services"]["worker"]["image"]
    assert worker["environment"]["LLM4ES_DEVICE"] == "cuda"
    assert worker["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert {n: s for n, s in services.items() if n != "worker"} == {
        n: s for n, s in project["services"].items() if n != "worker"
    }


# --- what its containers run


@dataclass(frozen=True)
class Unboxed:
    """The project's containers as processes of this machine."""

    project: Project
    folder: Path
    replaced: Mapping[str, str]

    def here(self, text: str) -> str:
        """The text with each address and path of a container replaced by this machine's."""
        keys = sorted(self.replaced, key=len, reverse=True)
        pattern = rf"(?:{'|'.join(map(re.escape, keys))})(?![\w-])"
        return re.sub(pattern, lambda found: self.replaced[found[0]], text)

    def service(self, name: str) -> Project:
        service: Project = json.loads(self.here(json.dumps(self.project["services"][name])))
        return service

    def environment(self, name: str) -> dict[str, str]:
        """What the container has, and what its image says of PATH."""
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        image = {"PYTHONPATH": f"{self.here('/app')}:{self.folder}"} if name in OURS else {}
        return {
            "PATH": programs,
            "HOME": str(self.folder),
            **image,
            **self.service(name).get("environment", {}),
        }

    def workdir(self, name: str) -> str:
        return str(self.service(name).get("working_dir") or self.here("/app"))

    def run(self, name: str) -> "subprocess.CompletedProcess[str]":
        """A one-shot container, to its end."""
        return self._run(name, self.service(name)["command"], timeout_s=120)

    def healthy(self, name: str) -> bool:
        """What its health check says now."""
        kind, *command = self.service(name)["healthcheck"]["test"]
        if kind == "CMD-SHELL":
            command = ["/bin/sh", "-c", *command]
        return self._run(name, command, timeout_s=30).returncode == 0

    @contextmanager
    def running(self, name: str) -> Iterator["subprocess.Popen[bytes]"]:
        """A container that stays, healthy by its own check; SIGTERM ends it, as Docker would."""
        log = self.folder / f"{name}.log"
        assert not self.healthy(name)  # what answers later is this process
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.service(name)["command"],
                cwd=self.workdir(name),
                env=self.environment(name),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            ready = wait_until(
                lambda: process.poll() is not None or self.healthy(name),
                timeout_s=90,
                every_s=1.0,
            )
            assert ready, log.read_text()
            assert process.poll() is None, log.read_text()
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()

    def _run(
        self, name: str, command: list[str], *, timeout_s: float
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command,
            cwd=self.workdir(name),
            env=self.environment(name),
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )


@pytest.fixture
def unboxed(project: Project, bundle_folder: Path, tmp_path: Path) -> Unboxed:
    app = tmp_path / "app"
    for source, target in copied().items():
        shutil.copytree(
            ROOT / source, app / target, ignore=shutil.ignore_patterns("data", "__pycache__")
        )
    (app / "feature_repo/data").mkdir()
    # dev/setup.sh puts this checkout on the environment's path; what the image has is not this.
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]\n"
    )
    inside, host, controller, redis, metrics, features = (str(free_port()) for _ in range(6))
    return Unboxed(
        project,
        tmp_path,
        {
            "://:19092": f"://{LOOPBACK}:{inside}",
            "://:9092": f"://{LOOPBACK}:{host}",
            "://:9093": f"://{LOOPBACK}:{controller}",
            "kafka:19092": f"{LOOPBACK}:{inside}",
            "kafka:9093": f"{LOOPBACK}:{controller}",
            "localhost:19092": f"{LOOPBACK}:{inside}",
            "localhost:9092": f"{LOOPBACK}:{host}",
            "redis:6379": f"{LOOPBACK}:{redis}",
            "-p 6379": f"-p {redis}",
            "127.0.0.1:9100": f"{LOOPBACK}:{metrics}",
            "9100": metrics,
            "127.0.0.1:6566": f"{LOOPBACK}:{features}",
            "6566": features,
            "0.0.0.0": LOOPBACK,  # noqa: S104 - taken out, not bound
            "/var/lib/kafka/data": str(tmp_path / "kafka/data"),
            "/opt/kafka/bin": str(kafka_tools(tmp_path / "bin")),
            "/etc/redis/redis.conf": str(tmp_path / "redis.conf"),
            "/app": str(app),
            "/bundle": str(bundle_folder),
        },
    )


def kafka_tools(folder: Path) -> Path:
    """The program of the image that the file uses, as Kafka's own script starts it."""
    folder.mkdir()
    java = " ".join(java_command(kafka_jars(), f"-Dlog4j2.configurationFile={LOG4J2}"))
    tool = folder / "kafka-topics.sh"
    tool.write_text(f'#!/bin/sh\nset -f\nexec {java} org.apache.kafka.tools.TopicCommand "$@"\n')
    tool.chmod(0o755)
    return folder


def configure_kafka(unboxed: Unboxed) -> Path:
    """What the image's entry point does: the environment as properties, and the storage made."""
    folders = {name: unboxed.folder / "kafka" / name for name in ("default", "mounted", "final")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    for name in ("server.properties", "log4j2.yaml", "tools-log4j2.yaml"):
        (folders["default"] / name).touch()
    done = subprocess.run(
        [*java_command(kafka_jars()), "kafka.docker.KafkaDockerWrapper", "setup",
         *(f"--{name}-configs-dir={folder}" for name, folder in folders.items())],
        env=unboxed.environment("kafka"),
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folders["final"] / "server.properties"


@contextmanager
def servers(unboxed: Unboxed) -> Iterator[None]:
    """Kafka and Redis, configured as the file says, healthy by its checks."""
    jars = kafka_jars()
    kafka = ServerProcess("Kafka", log=unboxed.folder / "kafka/kafka.log")
    redis = ServerProcess("Redis", log=unboxed.folder / "redis/redis.log")
    (unboxed.folder / "redis").mkdir()
    (unboxed.folder / "redis.conf").write_text(unboxed.project["configs"]["redis.conf"]["content"])
    port = unboxed.here("redis:6379").rpartition(":")[2]
    with ExitStack() as stack:
        configuration = configure_kafka(unboxed)
        java = java_command(jars, "-Xmx512m", f"-Dlog4j2.configurationFile={LOG4J2}")
        stack.callback(kafka.stop)
        port_of_kafka = int(unboxed.here("localhost:19092").rpartition(":")[2])
        kafka.start(
            [*java, "kafka.Kafka", str(configuration)],
            # The check is a Java of its own: none before the port is open.
            lambda: not is_free(port_of_kafka) and unboxed.healthy("kafka"),
            90,
        )
        stack.callback(redis.stop)
        redis.start(
            [*unboxed.service("redis")["command"], "--bind", LOOPBACK, "--port", port,
             "--dir", str(unboxed.folder / "redis")],
            lambda: unboxed.healthy("redis"), 30,
        )  # fmt: skip
        yield


def ask(unboxed: Unboxed, bundle: Path, customers: list[str]) -> list[dict[str, Any]]:
    """What the feature server says of each customer, by the stable service's name."""
    question = {
        "feature_service": service_name(read_view_spec(bundle).manifest.entity),
        "entities": {"customer_id": customers},
    }
    request = urllib.request.Request(
        f"http://{unboxed.here('127.0.0.1:6566')}/get-online-features",
        data=json.dumps(question).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
        answer = json.load(response)
    names = answer["metadata"]["feature_names"]
    columns = [column["values"] for column in answer["results"]]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def test_events_become_rows_that_the_feature_server_gives(
    unboxed: Unboxed, bundle_folder: Path, sample: Sample
) -> None:
    with servers(unboxed):
        stranger = Redis.from_url(f"redis://{unboxed.here('redis:6379')}")
        with stranger, pytest.raises(AuthenticationError):
            stranger.ping()

        for _ in range(2):  # `up` runs them each time
            for name in ("topics", "apply"):
                done = unboxed.run(name)
                assert done.returncode == 0, done.stdout + done.stderr
        with admin(KafkaSettings(bootstrap_servers=unboxed.here("kafka:19092"))) as client:
            events, letters = (
                topic_configs(client, topic) for topic in ("payments", "payments.dead-letters")
            )
            (described,) = client.describe_topics(["payments"])
        assert len(described["partitions"]) == 4
        assert events["max.message.bytes"] == str(8 << 20)
        assert int(letters["max.message.bytes"]) > 8 << 20
        assert events["retention.ms"] == letters["retention.ms"] == "-1"
        assert events["message.timestamp.type"] == "LogAppendTime"

        with unboxed.running("worker"), unboxed.running("feature-server"):
            # As from outside the containers: by the listener that is published.
            load(
                sample.events,
                bootstrap_servers=unboxed.here("localhost:9092"),
                topic="payments",
                key="customer_id",
            )
            newest = newest_events(sample)
            assert wait_until(
                lambda: newest == {
                    row["customer_id"]: row["last_event_id"]
                    for row in ask(unboxed, bundle_folder, sorted(newest))
                },
                timeout_s=120,
                every_s=1.0,
            ), (unboxed.folder / "worker.log").read_text()  # fmt: skip
            manifest = read_view_spec(bundle_folder).manifest
            for row in ask(unboxed, bundle_folder, sorted(newest)):
                assert row["bundle_id"] == manifest.id
                assert len(row["embedding"]) == manifest.dim

        # The worker that ended left every row where `apply` and the feature server look for it.
        (log,) = Path(unboxed.here("/app/feature_repo/data/offline")).iterdir()
        assert set(pq.read_table(log)["customer_id"].to_pylist()) == set(newest)


def newest_events(sample: Sample) -> dict[str, str]:
    """Id of each customer's newest event."""
    newest: dict[str, tuple[str, str, str]] = {}
    for document in sample.documents():
        order = document["occurred_at"], document["type"], document["event_id"]
        customer = document["customer_id"]
        newest[customer] = max(newest.get(customer, order), order)
    return {customer: order[2] for customer, order in newest.items()}

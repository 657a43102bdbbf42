"""What is wrong refuses to start: one clear line with the remedy, and the exit code of its kind."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dev.servers import KafkaServer, create_topic
from llm4es.bundle import MANIFEST, Manifest, seal_bundle
from tests.commands import run
from tests.integration.conftest import Repo, Sample, apply_repo
from tests.kafka_topics import make_topics, produce

Started = Callable[..., tuple[int, str]]


@pytest.fixture
def repo(bundle_folder: Path, tmp_path: Path) -> Repo:
    return apply_repo(tmp_path / "repo", bundle_folder)


@pytest.fixture
def start(bundle_folder: Path, repo: Repo, sample: Sample, tmp_path: Path) -> Started:
    """`run` on the embedded source; flags given last win."""

    def started(*flags: str, bundle: Path = bundle_folder, source: str = "file") -> tuple[int, str]:
        done = run(
            ["stream_worker", "run", "--bundle", str(bundle), *repo.flags, "--source", source,
             "--events", str(sample.events), "--recorded-at-field", "recorded_at",
             "--window-store", f"sqlite:{tmp_path / 'windows.db'}",
             "--state-dir", str(tmp_path / "state"), "--until-end", *flags],
        )  # fmt: skip
        return done.returncode, done.stderr

    return started


def copy_of(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder / "copy"))


def assert_refused(found: tuple[int, str], code: int, *parts: str) -> None:
    returned, stderr = found
    lines = [line for line in stderr.splitlines() if line.startswith("stream_worker: ")]
    assert returned == code, stderr
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    for part in parts:
        assert part in lines[0]


def test_a_bundle_with_one_byte_of_its_weights_changed(
    start: Started, bundle_folder: Path, tmp_path: Path
) -> None:
    bundle = copy_of(bundle_folder, tmp_path)
    weights = bundle / "graphs" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert_refused(start(bundle=bundle), 3, "graphs/weights.bin", "export the bundle again")


def test_a_bundle_that_is_not_there(start: Started, tmp_path: Path) -> None:
    assert_refused(start(bundle=tmp_path / "absent"), 3, "manifest.json", "export quickstart")


def test_a_schema_that_names_an_unknown_type(
    start: Started, bundle_folder: Path, tmp_path: Path
) -> None:
    bundle = copy_of(bundle_folder, tmp_path)
    document = yaml.safe_load((bundle / "schema.yaml").read_text())
    document["types"]["payment"]["fields"]["amount"]["kind"] = "colour"
    (bundle / "schema.yaml").write_text(yaml.safe_dump(document))
    seal_bundle(bundle, Manifest.model_validate_json((bundle / MANIFEST).read_bytes()))
    assert_refused(start(bundle=bundle), 2, "types.payment.fields.amount", "colour", "schema.md")


def test_a_bundle_that_has_no_feature_view(
    start: Started, bundle_folder: Path, tmp_path: Path
) -> None:
    bundle = copy_of(bundle_folder, tmp_path)
    manifest = Manifest.model_validate_json((bundle / MANIFEST).read_bytes())
    other = seal_bundle(bundle, manifest.model_copy(update={"licence": "another"}))
    assert_refused(start(bundle=bundle), 2, other.id, "feast", "apply")


def test_a_feature_view_of_another_dimension(
    start: Started, bundle_folder: Path, tmp_path: Path
) -> None:
    # Somebody's hand changed what Feast is told: the id is the bundle's, the dimension is not.
    bundle = copy_of(bundle_folder, tmp_path)
    document = json.loads((bundle / MANIFEST).read_text())
    dim = document["dim"]
    (bundle / MANIFEST).write_text(json.dumps(document | {"dim": dim + 1}))
    other = apply_repo(tmp_path / "other", bundle)
    assert_refused(start(*other.flags), 3, f"dim '{dim + 1}'", f"'{dim}'", "apply")


def test_a_kafka_that_is_not_there(start: Started) -> None:
    found = start("--bootstrap-servers", "127.0.0.1:1", source="kafka")
    assert_refused(found, 4, "bootstrap_servers")


def test_a_topic_that_is_not_there(start: Started, kafka_server: KafkaServer, unique: str) -> None:
    found = start(
        "--bootstrap-servers", kafka_server.bootstrap_servers, "--topic", unique, source="kafka"
    )
    assert_refused(found, 2, unique, "create")


def test_a_topic_keyed_by_another_entity(
    start: Started, kafka_server: KafkaServer, sample: Sample, unique: str
) -> None:
    make_topics(kafka_server, unique)
    payments = [d for d in sample.documents() if d["type"] == "payment"][:20]
    produce(
        kafka_server,
        unique,
        [(d["terminal_id"].encode(), json.dumps(d).encode()) for d in payments],
    )
    found = start(
        "--bootstrap-servers", kafka_server.bootstrap_servers, "--topic", unique, source="kafka"
    )
    assert_refused(found, 3, "customer_id", "key", "repartition")


def test_a_topic_that_forgets(start: Started, kafka_server: KafkaServer, unique: str) -> None:
    small = {"max.message.bytes": "1000000"}
    create_topic(
        kafka_server.bootstrap_servers, unique, config=small | {"cleanup.policy": "compact"}
    )
    create_topic(kafka_server.bootstrap_servers, f"{unique}.dead-letters",
                 config={"max.message.bytes": "9000000"})  # fmt: skip
    found = start(
        "--bootstrap-servers", kafka_server.bootstrap_servers, "--topic", unique, source="kafka"
    )
    assert_refused(found, 3, "cleanup.policy")


def test_a_log_that_is_another_than_the_windows_know(
    start: Started, sample: Sample, tmp_path: Path
) -> None:
    assert start("--max-records", "4096")[0] == 0
    other = tmp_path / sample.events.name
    other.write_bytes(b"".join(reversed(sample.events.read_bytes().splitlines(keepends=True))))
    assert_refused(start("--events", str(other)), 3, "created anew", "fresh window store")


def test_settings_that_are_wrong(start: Started, tmp_path: Path) -> None:
    assert_refused(start("--window-store", "mysql://x"), 2, "window_store", "redis://")
    assert_refused(start("--availability-delay-ms", str(10**18)), 2, "availability_delay_ms")
    assert_refused(start("--events", str(tmp_path / "absent.jsonl")), 2, "absent.jsonl")
    assert_refused(start("--max-records", "0"), 2, "max_records")
    assert_refused(start("--device", "cuda"), 2, "CUDAExecutionProvider", "device: cpu")
    config = tmp_path / "settings.yaml"
    config.write_text("max_recrods: 5\n")
    assert_refused(start("--config", str(config)), 2, "max_recrods", "take it out of the file")
    config.write_text("- a list\n")
    assert_refused(start("--config", str(config)), 2, "no mapping")


def test_places_that_cannot_be_used(start: Started, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("neither a folder nor a database " * 40)
    assert_refused(
        start("--window-store", f"sqlite:{tmp_path}/file/windows.db"),
        2,
        "window_store",
        "may write",
    )
    assert_refused(start("--window-store", f"sqlite:{tmp_path}/file"), 2, "no SQLite database")
    assert_refused(start("--state-dir", f"{tmp_path}/file"), 2, "--state-dir")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and no more")
    assert_refused(start("--events", str(broken)), 2, "broken.parquet", "write it anew")
    with socket.create_server(("0.0.0.0", 0)) as taken:  # noqa: S104 - as Prometheus' server does
        port = str(taken.getsockname()[1])
        assert_refused(start("--metrics-port", port), 2, "metrics_port", port)


def test_a_redis_that_is_not_there(start: Started) -> None:
    assert_refused(start("--window-store", "redis://127.0.0.1:1/0"), 4, "Redis")


def test_a_secret_is_never_printed(start: Started) -> None:
    code, stderr = start("--window-store", "redis://user:hunter2@127.0.0.1:1/0", "--verbose")
    assert code == 4
    assert "hunter2" not in stderr
    for malformed in ("hunter2@127.0.0.1:1", "redis://u:1/hunter2@127.0.0.1:1/0"):
        found = start("--window-store", malformed, "--verbose")
        assert_refused(found, 2, "redis://:PASSWORD@host:port/db")
        assert "hunter2" not in found[1]

"""The offline log in an object store: a real S3 endpoint over HTTP, and a store that only moves."""

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Self
from urllib.request import urlopen

import fsspec
import numpy as np
import pandas as pd
import pytest
from feast import FeatureStore

from dev.processes import LOOPBACK, ServerProcess, free_port
from llm4es.deletion import DeletionKey, Tombstone
from llm4es.errors import ConfigError, SinkUnavailable
from llm4es.events import TopicPartition
from llm4es.feast import (
    ViewSpec,
    drop_view,
    open_sink,
    read_as_of,
    switch_service,
    training_frame,
)
from llm4es.feast.compaction import compact_view
from llm4es.feast.object_store import ObjectPath
from llm4es.features import view_name
from tests.feast_parts import BUNDLE_ID, MICROSECOND, NOON, apply, frame, make_repo, make_spec, row

pytestmark = [
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # botocore's own
    # The clients of fsspec live as long as the process, on a loop of their own.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

VIEW = view_name("customer", BUNDLE_ID)
KEY = DeletionKey("a key of tests alone")
SPAN = {TopicPartition("shop", 0): (0, 9)}


class S3Server:
    """moto's server: S3 over HTTP, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._process = ServerProcess("S3", log=folder / "s3.log")

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "moto.server", "-H", LOOPBACK, "-p", str(self.port)]
        self._process.start(command, self._answers, 60.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.url}/moto-api/data.json", timeout=5) as answer:  # noqa: S310
                return bool(answer.status == HTTPStatus.OK)
        except OSError:
            return False


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    patch = pytest.MonkeyPatch()
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        for name, value in {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("shop")
        yield server
        patch.undo()
        fsspec.filesystem("s3").clear_instance_cache()


class World:
    """A repository whose offline log stands elsewhere."""

    def __init__(self, folder: Path, address: str) -> None:
        self.spec: ViewSpec = make_spec(folder / "bundle")
        self.repo = make_repo(folder / "repo")
        self.address = address
        self.store: FeatureStore = apply(self.repo, self.spec, offline_path=address)

    def objects(self) -> list[str]:
        filesystem, path = fsspec.core.url_to_fs(self.address)
        filesystem.invalidate_cache()
        return [each for each in filesystem.find(path) if each.endswith(".parquet")]


@pytest.fixture(params=["s3", "local", "memory"])
def world(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> World:
    if request.param == "s3":
        request.getfixturevalue("s3")
    address = {
        "s3": f"s3://shop/{unique}",
        "local": f"local://{tmp_path}/elsewhere",
        "memory": f"memory://{unique}",
    }[request.param]
    return World(tmp_path, address)


def test_rows_go_to_the_store_and_come_back_at_their_moment(world: World) -> None:
    rows = [
        row(world.spec, f"c{n % 3}", seed=n, as_of=NOON + n * MICROSECOND, last_event_id=f"e{n}")
        for n in range(9)
    ]
    sink = open_sink(world.repo, world.spec, writer_id="w", roll_s=600)
    sink.journal(rows, SPAN)
    assert isinstance(sink.offline_folder, ObjectPath)
    before = len(world.objects())
    journals = list((world.repo / "data/journals").rglob("*.journal"))
    assert len(journals) == 1  # durable, on this machine
    sink.roll()
    assert len(world.objects()) == before + 1
    assert not list((world.repo / "data/journals").rglob("*.journal"))
    sink.journal(rows, SPAN)
    sink.roll()
    assert len(world.objects()) == before + 1  # an exact replay replaces its part
    sink.journal([row(world.spec, "c0", seed=9, as_of=NOON + timedelta(days=1))])
    sink.close()
    asked = pd.DataFrame(
        {"customer_id": ["c0", "c1", "c1", "nobody"], "event_timestamp": NOON + 4 * MICROSECOND}
    )
    found = world.store.get_historical_features(
        entity_df=asked, features=[f"{VIEW}:embedding", f"{VIEW}:last_event_id"]
    ).to_df()
    assert list(found["last_event_id"][:3]) == ["e3", "e4", "e4"]
    assert found["last_event_id"].isna()[3]
    assert np.array(found["embedding"][0], np.float32).tolist() == rows[3].embedding.tolist()
    made = training_frame(world.store, asked, entities=["customer"])
    assert made.entities["customer"].known.tolist() == [True, True, True, False]
    assert len(read_as_of(world.store, "customer")) == 10
    done = compact_view(world.repo, world.spec)
    assert (done.parts_before, done.parts_after, done.duplicates) == (2, 2, 0)


def test_stock_writes_and_compaction_leave_every_row_once(world: World) -> None:
    sent = [row(world.spec, f"c{n}", as_of=NOON + n * MICROSECOND) for n in range(4)]
    for each in (sent[:2], sent[1:], sent):
        world.store.write_to_offline_store(VIEW, frame(each))
    done = compact_view(world.repo, world.spec)
    assert (done.parts_before, done.parts_after, done.duplicates) == (3, 1, 5)
    asked = pd.DataFrame({"customer_id": [f"c{n}" for n in range(4)], "event_timestamp": NOON})
    asked["event_timestamp"] += timedelta(seconds=1)
    found = world.store.get_historical_features(
        entity_df=asked, features=[f"{VIEW}:event_count"]
    ).to_df()
    assert list(found["event_count"]) == [1] * 4


def test_deleted_rows_leave_the_store(world: World) -> None:
    sink = open_sink(world.repo, world.spec, writer_id="w", deletion_key=KEY)
    sink.journal([row(world.spec, "gone"), row(world.spec, "stays")])
    sink.roll()
    sink.delete([Tombstone(entity_id="gone", as_of=NOON)])
    asked = pd.DataFrame({"customer_id": ["gone", "stays"], "event_timestamp": NOON})

    def known() -> list[bool]:
        features = [f"{VIEW}:event_count"]
        found = world.store.get_historical_features(entity_df=asked, features=features).to_df()
        return found["event_count"].notna().tolist()

    assert known() == [False, True]
    assert sink.rewrite_deleted().rows == 1
    filesystem = fsspec.core.url_to_fs(world.address)[0]
    assert not any(b"gone" in filesystem.cat_file(each) for each in world.objects())
    assert known() == [False, True]
    sink.close()


def test_rows_survive_a_store_that_is_away(tmp_path: Path, s3: S3Server, unique: str) -> None:
    world = World(tmp_path, f"s3://shop/{unique}")
    sink = open_sink(world.repo, world.spec, writer_id="w", roll_s=600)
    sink.journal([row(world.spec, "c0", last_event_id="kept")])
    filesystem = sink.offline_folder.filesystem  # type: ignore[union-attr]
    filesystem.call_s3("delete_bucket_lifecycle", Bucket="shop")  # it answers
    s3.__exit__()
    with pytest.raises(SinkUnavailable):
        sink.roll()
    s3.__enter__()
    fsspec.filesystem("s3").mkdir("shop")  # moto's memory is gone; an object store's is not
    sink.close()
    assert len(world.objects()) == 1
    assert b"kept" in fsspec.filesystem("s3").cat_file(world.objects()[0])


def test_a_store_that_nothing_here_can_read_is_refused(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "bundle")
    repo = make_repo(tmp_path / "repo")
    apply(repo, spec, offline_path="nosuch://shop/offline")
    with pytest.raises(ConfigError, match="offline_path"):
        open_sink(repo, spec, writer_id="w")


def test_a_process_that_has_only_feast_reads_the_log_in_s3(
    tmp_path: Path, s3: S3Server, unique: str
) -> None:
    world = World(tmp_path, f"s3://shop/{unique}")
    sink = open_sink(world.repo, world.spec, writer_id="w")
    sink.journal([row(world.spec, "c0", seed=5, last_event_id="seen")])
    sink.close()
    script = """
import pyarrow.dataset as ds, pyarrow.fs as fs, sys
s3 = fs.S3FileSystem(endpoint_override=sys.argv[1], scheme="http", access_key="tests",
                     secret_key="tests", region="us-east-1")
table = ds.dataset(sys.argv[2], filesystem=s3, format="parquet").to_table()
print(table["last_event_id"].to_pylist())
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, f"{LOOPBACK}:{s3.port}", f"shop/{unique}/{VIEW}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['seen']"


def test_the_registry_may_be_an_object_too(
    tmp_path: Path, s3: S3Server, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEAST_S3_ENDPOINT_URL", s3.url)  # Feast's own name for it
    spec = make_spec(tmp_path / "bundle")
    repo = make_repo(tmp_path / "repo", registry=f"s3://shop/{unique}/registry.db")
    apply(repo, spec, offline_path=f"s3://shop/{unique}/offline")
    assert not list(repo.rglob("registry*"))
    sink = open_sink(repo, spec, writer_id="w")
    assert sink.topic == "payments"
    sink.publish([row(spec, "c0", last_event_id="seen")])
    sink.close()
    elsewhere = FeatureStore(repo_path=str(repo))  # another process' view of it
    other = make_spec(tmp_path / "other", bundle_id="ba9876543210")
    apply(repo, other)
    assert switch_service(elsewhere, "customer", BUNDLE_ID) == "ba9876543210"
    found = FeatureStore(repo_path=str(repo))
    service = found.get_feature_service("customer_llm4es")
    online = found.get_online_features(
        features=service, entity_rows=[{"customer_id": "c0"}]
    ).to_dict()
    assert online["last_event_id"] == ["seen"]
    assert drop_view(found, "customer", "ba9876543210")

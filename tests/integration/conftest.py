"""A simulated log and a bundle trained on it, by the commands that users type."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from feast import FeatureStore

from tests.commands import ROOT, run

CUSTOMERS, DAYS = 40, 40
STORE_ENV = {"LLM4ES_REDIS", "LLM4ES_REGISTRY"}  # what feature_store.prod.yaml is written with


@dataclass(frozen=True, slots=True)
class Sample:
    """The simulator's folder: a log of about a thousand events."""

    folder: Path

    @property
    def events(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def schema(self) -> Path:
        return self.folder / "schema.yaml"

    def records(self) -> list[tuple[bytes, bytes]]:
        """Key and value of each record, in the order of the log."""
        lines = self.events.read_bytes().splitlines()
        return [(json.loads(line)["customer_id"].encode(), line) for line in lines]

    def documents(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.events.read_bytes().splitlines()]

    def customers(self) -> list[str]:
        return sorted({document["customer_id"] for document in self.documents()})


@dataclass(frozen=True, slots=True)
class Repo:
    """A Feast repository of its own, applied."""

    folder: Path
    file: str
    env: Mapping[str, str]

    @property
    def flags(self) -> list[str]:
        return ["--feature-repo", str(self.folder), "--feature-store-file", self.file]


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    folder = tmp_path_factory.mktemp("sample") / "payments"
    done = run(
        ["export", "simulate", "--out", str(folder), "--customers", str(CUSTOMERS),
         "--days", str(DAYS)]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Sample(folder)


@pytest.fixture(scope="session")
def bundle_folder(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    done = run(
        ["export", "quickstart", "--events", str(sample.events), "--schema", str(sample.schema),
         "--entity", "customer", "--epochs", "1", "--out", str(folder)],
        timeout_s=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def apply_repo(
    folder: Path,
    bundle: Path,
    *,
    topic: str = "events",
    bootstrap_servers: str = "127.0.0.1:1",
    redis: str | None = None,
) -> Repo:
    """Copy feature_repo, point it at a bundle, and `feast apply` it."""
    shutil.copytree(
        ROOT / "feature_repo", folder, ignore=shutil.ignore_patterns("data", "__pycache__")
    )
    env = {
        "LLM4ES_BUNDLE": str(bundle),
        "LLM4ES_TOPIC": topic,
        "LLM4ES_BOOTSTRAP_SERVERS": bootstrap_servers,
    }
    file = "feature_store.yaml"
    if redis is not None:
        file = "feature_store.prod.yaml"
        env |= {"LLM4ES_REDIS": redis, "LLM4ES_REGISTRY": str(folder / "registry.db")}
    done = run(["feast.cli.cli", "-c", str(folder), "-f", str(folder / file), "apply"], env=env)
    assert done.returncode == 0, done.stderr + done.stdout
    # Topic and brokers are in the registry now, where the worker finds them.
    return Repo(folder, file, {name: env[name] for name in env if name in STORE_ENV})


def open_store(repo: Repo) -> FeatureStore:
    """The repository as a stock Feast client opens it; its file is read with `repo.env`."""
    before = dict(os.environ)
    os.environ.update(repo.env)
    try:
        return FeatureStore(repo_path=str(repo.folder), fs_yaml_file=repo.folder / repo.file)
    finally:
        os.environ.clear()
        os.environ.update(before)

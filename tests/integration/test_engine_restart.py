"""A worker that is killed mid-stream serves, started again, what one that was not serves."""

import json
import signal
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.commands import Background, run
from tests.integration.conftest import Repo, Sample, apply_repo, open_store

TOLERANCE = 1e-5  # of the manifest, relative
RECORDS = 240


@dataclass(frozen=True, slots=True)
class Place:
    """A worker's repository, stores and log."""

    folder: Path
    repo: Repo
    bundle: Path
    events: Path

    @property
    def windows(self) -> Path:
        return self.folder / "windows.db"

    def arguments(self, *more: str) -> list[str]:
        return [
            "stream_worker", "run", "--bundle", str(self.bundle), *self.repo.flags,
            "--source", "file", "--events", str(self.events), "--until-end", "--json",
            "--window-store", f"sqlite:{self.windows}", "--state-dir", str(self.folder / "state"),
            "--threads", "1", "--max-records", "8", *more,
        ]  # fmt: skip

    def folded(self) -> int:
        """Records whose windows are stored."""
        if not self.windows.is_file():
            return 0
        address = f"file:{self.windows}?mode=ro"
        with closing(sqlite3.connect(address, uri=True, timeout=10)) as connection:
            try:
                (found,) = connection.execute("SELECT SUM(next_offset) FROM offsets").fetchone()
            except sqlite3.OperationalError:  # its tables are not there yet
                return 0
        return int(found or 0)

    def online(self, customers: Sequence[str]) -> Mapping[str, Any]:
        store = open_store(self.repo)
        found: Mapping[str, Any] = store.get_online_features(
            features=store.get_feature_service("customer_llm4es"),
            entity_rows=[{"customer_id": customer} for customer in customers],
        ).to_dict()
        return found


def make_place(folder: Path, bundle: Path, sample: Sample) -> Place:
    repo = apply_repo(folder / "repo", bundle)
    events = folder / "events.jsonl"
    events.write_bytes(b"".join(sample.events.read_bytes().splitlines(keepends=True)[:RECORDS]))
    return Place(folder, repo, bundle, events)


@pytest.fixture(scope="module")
def whole(bundle_folder: Path, sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """One run to the end."""
    place = make_place(tmp_path_factory.mktemp("whole"), bundle_folder, sample)
    done = run(place.arguments(), timeout_s=280)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["records"] == RECORDS
    return place


@pytest.mark.parametrize("cache_bytes", [1 << 30, 0], ids=["cache", "no cache"])
def test_a_kill_changes_no_vector(
    whole: Place, sample: Sample, tmp_path: Path, cache_bytes: int
) -> None:
    """Whatever was in memory is gone, and with a budget of 0 never was there."""
    place = make_place(tmp_path / "killed", whole.bundle, sample)
    arguments = place.arguments("--kv-cache-bytes", str(cache_bytes))
    with Background(tmp_path / "first", arguments) as first:
        deadline = time.monotonic() + 120
        while place.folded() < RECORDS // 4:
            assert first.process.poll() is None, first.err.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        first.process.send_signal(signal.SIGKILL)
        assert first.process.wait() == -signal.SIGKILL
    assert RECORDS // 4 <= place.folded() < RECORDS
    done = run(arguments, timeout_s=280)
    assert done.returncode == 0, done.stderr
    assert place.folded() == whole.folded()
    records = [json.loads(line) for line in place.events.read_bytes().splitlines()]
    customers = sorted({record["customer_id"] for record in records})
    found, expected = place.online(customers), whole.online(customers)
    for name in ("event_count", "last_event_id", "bundle_id"):
        assert found[name] == expected[name]
    for name in ("embedding", "surprise"):
        for one, due in zip(found[name], expected[name], strict=True):
            size = np.abs(np.asarray(due)).max()
            assert np.abs(np.asarray(one) - np.asarray(due)).max() <= TOLERANCE * size

"""`audit` as it is typed, over a bundle with a model: figures, drift and exit codes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm4es.bundle import load_bundle
from llm4es.feast.parts import list_parts
from llm4es.features import SNAPSHOT_EMBEDDING, SNAPSHOT_SURPRISE, SumsLayout, view_name
from tests.commands import run
from tests.integration.conftest import Sample, apply_repo


@pytest.fixture
def flags(bundle_folder: Path, sample: Sample, tmp_path: Path) -> list[str]:
    """Settings of a view that a worker has filled."""
    repo = apply_repo(tmp_path / "repo", bundle_folder)
    found = [
        "--bundle", str(bundle_folder), *repo.flags, "--source", "file",
        "--events", str(sample.events), "--recorded-at-field", "recorded_at",
        "--window-store", f"sqlite:{tmp_path / 'windows.db'}",
        "--state-dir", str(tmp_path / "state"),
    ]  # fmt: skip
    served = run(["stream_worker", "run", *found, "--until-end"])
    assert served.returncode == 0, served.stderr
    return found


def audit(flags: Sequence[str], *more: str) -> tuple[int, dict[str, Any]]:
    done = run(["stream_worker", "audit", *flags, "--sample", "30", "--json", *more])
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_clean_system_exits_with_0_a_lost_part_with_1_until_it_is_repaired(
    flags: list[str], bundle_folder: Path, tmp_path: Path
) -> None:
    code, report = audit(flags)
    assert (code, report["equal"], report["findings"]) == (0, 30, {})
    bundle = load_bundle(bundle_folder)
    drift = report["drift"]
    assert drift["rows"] == 30
    assert set(drift["surprise_shift"]) == set(SumsLayout(bundle).columns)
    # The log that it was trained on has not moved.
    assert 0 < drift["embedding_shift"] < 1
    assert abs(drift["embedding_spread"] - 1) < 0.7

    folder = tmp_path / "repo/data/offline" / view_name("customer", bundle.id)
    for part in list_parts(folder):
        part.unlink()
    code, report = audit(flags)
    assert (code, report["equal"]) == (1, 0)
    assert report["findings"] == {"offline missing": 30}
    code, report = audit(flags, "--repair", "--tolerance", "1")
    assert (code, report["repaired"]) == (0, 30)
    code, report = audit(flags)
    assert (code, report["equal_share"]) == (0, 1.0)


def test_a_bundle_keeps_what_it_gives_held_out_entities(bundle_folder: Path) -> None:
    bundle = load_bundle(bundle_folder)
    columns = len(SumsLayout(bundle).columns)
    assert bundle.arrays[SNAPSHOT_EMBEDDING].shape == (2, bundle.manifest.dim)
    assert bundle.arrays[SNAPSHOT_SURPRISE].shape == (2, columns)
    assert (bundle.arrays[SNAPSHOT_EMBEDDING][1] > 0).all()
    assert np.isfinite(bundle.arrays[SNAPSHOT_SURPRISE]).all()

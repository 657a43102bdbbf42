"""A container's quota bounds the threads, wherever its kernel writes it down."""

import os
from pathlib import Path

import pytest

from llm4es.engine.cpus import default_threads

ALLOWED = len(os.sched_getaffinity(0))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("files", "group", "threads"),
    [
        ({}, "", ALLOWED),
        ({"cpu.max": "max 100000\n"}, "0::/\n", ALLOWED),
        ({"cpu.max": "100000 100000\n"}, "0::/\n", 1),
        ({"cpu.max": "50000 100000\n"}, "0::/\n", 1),
        ({"cpu.max": "101000 100000\n"}, "0::/\n", min(2, ALLOWED)),
        ({"cpu.max": "9900000 100000\n"}, "0::/\n", ALLOWED),
        # The quota may stand on a group above the process's own.
        ({"pods/cpu.max": "100000 100000\n", "pods/a/cpu.max": "max 100000\n"}, "0::/pods/a\n", 1),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "", 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "", ALLOWED),
        (
            {"cpu/p/cpu.cfs_quota_us": "30000\n", "cpu/p/cpu.cfs_period_us": "100000\n"},
            "3:cpu:/p\n",
            1,
        ),
    ],
)
def test_threads_are_what_may_run_and_what_is_paid_for(
    tmp_path: Path, files: dict[str, str], group: str, threads: int
) -> None:
    for name, text in files.items():
        write(tmp_path / "cgroup" / name, text)
    write(tmp_path / "own", group)
    assert default_threads(cgroups=tmp_path / "cgroup", own_group=tmp_path / "own") == threads


def test_a_machine_without_cgroups_runs_on_all_it_may(tmp_path: Path) -> None:
    assert default_threads(cgroups=tmp_path / "no", own_group=tmp_path / "none") == ALLOWED

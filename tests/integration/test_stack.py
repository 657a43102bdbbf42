"""`python -m dev.stack`: what it prints is there and works as it stands, and Ctrl-C ends it."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis

from dev.processes import free_port, is_free, wait_until
from tests.commands import ROOT, run_script
from tests.integration.conftest import Sample

START_S = 120.0
STOP_S = 60.0


@contextmanager
def started(folder: Path, *flags: str) -> Iterator["subprocess.Popen[bytes]"]:
    """The command in a folder; its output goes to `out` and `err` there."""
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "dev.stack", "--folder", "servers", *flags],
            cwd=folder,
            stdout=out,
            stderr=err,
        )
    try:
        yield process
    finally:
        process.kill()  # the servers' guards end them
        process.wait()


@pytest.fixture
def checkout(tmp_path: Path, sample: Sample, bundle_folder: Path) -> Path:
    """A folder like a checkout in which `make demo` was run, with a feature repository to write."""
    for name in ("dev", "llm4es", "stream_worker"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(
        ROOT / "feature_repo", tmp_path / "feature_repo", ignore=shutil.ignore_patterns("data")
    )
    (tmp_path / "build/demo").mkdir(parents=True)
    (tmp_path / "build/demo/sample").symlink_to(sample.folder)
    (tmp_path / "build/demo/bundle").symlink_to(bundle_folder)
    return tmp_path


@pytest.mark.timeout(600)  # two servers, three commands: minutes on a machine with other work
def test_the_servers_answer_the_commands_work_and_ctrl_c_stops_both(
    checkout: Path, sample: Sample
) -> None:
    kafka_port, redis_port = free_port(), free_port()
    out, err = checkout / "out", checkout / "err"
    with started(
        checkout, "--kafka-port", str(kafka_port), "--redis-port", str(redis_port)
    ) as stack:
        ready = wait_until(
            lambda: "Ctrl-C" in out.read_text() or stack.poll() is not None, timeout_s=START_S
        )
        assert ready, err.read_text()
        assert stack.poll() is None, err.read_text()
        printed = out.read_text()
        assert f"127.0.0.1:{kafka_port}" in printed
        assert f"redis://127.0.0.1:{redis_port}" in printed

        lines = [line for line in printed.splitlines() if re.match(r"export |\S+/bin/", line)]
        # `--live` is a table for a terminal; here the worker is to end, and to say what it did.
        script = "\n".join(["set -e", *lines]) + " --until-end"
        done = run_script(script, cwd=checkout, timeout_s=400)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        assert f"{len(sample.records())} events in payments" in done.stdout
        with Redis(port=redis_port) as redis:
            assert redis.dbsize() >= len(sample.customers())  # online rows

        stack.send_signal(signal.SIGINT)
        assert stack.wait(timeout=STOP_S) == 0, err.read_text()
    assert "stopped" in err.read_text()
    assert is_free(kafka_port)
    assert is_free(redis_port)


def test_a_server_that_dies_ends_the_stack(tmp_path: Path) -> None:
    (tmp_path / "dev").symlink_to(ROOT / "dev")
    out, err = tmp_path / "out", tmp_path / "err"
    redis_port = free_port()
    flags = ["--kafka-port", str(free_port()), "--redis-port", str(redis_port)]
    with started(tmp_path, *flags) as stack:
        assert wait_until(lambda: "Ctrl-C" in out.read_text(), timeout_s=START_S), err.read_text()
        with Redis(port=redis_port) as redis:
            redis.shutdown(nosave=True)
        assert stack.wait(timeout=STOP_S) == 4
    assert shlex.quote(str(tmp_path / "servers/redis/redis.log")) in err.read_text()

"""Our commands as users start them: in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parent.parent


def run(
    arguments: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = 120.0
) -> "subprocess.CompletedProcess[str]":
    """`python -m ...` to its end."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def run_script(script: str, *, cwd: Path, timeout_s: float) -> "subprocess.CompletedProcess[str]":
    """A shell script to its end; what it started ends with it, also when it takes too long."""
    with subprocess.Popen(
        ["/bin/sh", "-c", script],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class Background:
    """`python -m ...` that goes on while the test does; its output is in files."""

    def __init__(
        self, folder: Path, arguments: Sequence[str], *, env: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.err = folder / "out", folder / "err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                stdout=out,
                stderr=err,
            )

    def wait_for(self, text: str, *, timeout_s: float = 60.0) -> None:
        """Return when its stderr says so; fail when it ends or stays silent."""
        deadline = time.monotonic() + timeout_s
        while text not in self.err.read_text():
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < deadline, f"no {text!r} in {self.err.read_text()}"
            time.sleep(0.05)

    def stop(self, *, timeout_s: float = 30.0) -> int:
        """SIGTERM, as an orchestrator does; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

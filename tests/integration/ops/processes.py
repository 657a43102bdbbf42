"""Ops in processes of their own, which can be killed -9: the real code, a light model."""

import multiprocessing
import os
import signal
from collections.abc import Mapping
from itertools import count
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from llm4es.testing import LengthEmbedder
from stream_worker.assembly import assembled_around
from stream_worker.ops.replay import opened_replay
from stream_worker.ops.replay_plan import ReplayRequest
from stream_worker.ops.rollout import Rollout
from stream_worker.settings import WorkerSettings
from tests.integration.faults.child import faults_bundle

__all__ = ["Killable", "replay", "serve", "take_step"]


class Killable:
    """A function in a process, forked from one that has imported everything."""

    def __init__(self, target: Any, *arguments: Any) -> None:  # noqa: ANN401 - any function
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.process: ForkServerProcess = context.Process(
            target=target, args=arguments, daemon=True
        )
        self.process.start()

    def kill(self) -> None:
        """Kill -9; it must not have ended before."""
        assert self.process.exitcode is None, "it ended by itself"
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL

    def freeze(self) -> None:
        """Stop it as a paused virtual machine stops."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on, knowing nothing."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def stop(self) -> None:
        """SIGTERM, as an orchestrator does; it ends well."""
        self.process.terminate()
        assert self.end() == 0

    def end(self, timeout_s: float = 120.0) -> int:
        """Wait for its end; the exit code, negative where a signal ended it."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, "it did not end"
        return self.process.exitcode


def replay(settings: WorkerSettings, request: ReplayRequest, begun: Path) -> None:
    """Carry a replay out, or on; `begun` appears once it is planned and locked."""
    bundle = faults_bundle()
    with opened_replay(settings, bundle, lambda: LengthEmbedder(bundle), request) as opened:
        begun.touch()
        opened.run()


def take_step(settings: Mapping[str, Any], verb: str, at: int) -> None:
    """Run a verb of `rollout`, and be killed at the `at`-th moment before or after a step."""
    moments = count(1)

    def on_step(_: str) -> None:
        if next(moments) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    getattr(Rollout(WorkerSettings(**settings), on_step=on_step), verb)()


def serve(settings: WorkerSettings, bundle_id: str) -> None:
    """Run a worker of a bundle until SIGTERM."""
    with assembled_around(settings, faults_bundle(bundle_id), LengthEmbedder) as built:
        signal.signal(signal.SIGTERM, lambda *_: built.worker.stop())
        built.worker.run()

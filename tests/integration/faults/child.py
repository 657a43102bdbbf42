"""A worker process of the fault suite: the real assembly, a light model, and a place to die at."""

import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

from llm4es.bundle import Bundle
from llm4es.errors import LLM4ESError
from llm4es.testing import Boundaries, Crashing, LengthEmbedder, modelless_bundle
from llm4es.windows import WindowPolicy
from stream_worker.assembly import assembled_around
from stream_worker.settings import WorkerSettings
from stream_worker.worker import Parts
from tests.histories import schema

__all__ = ["Plan", "faults_bundle", "work"]

READY = "ready"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker process is told."""

    log: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    boundary: str = ""  # of `tests.faults`, at whose k-th occurrence it kills itself
    occurrence: int = 0


def faults_bundle(bundle_id: str = "00000000test") -> Bundle:
    """Short chapters, a lateness of two minutes: every way a window can change is taken soon."""
    policy = WindowPolicy(
        chapter_events=5,
        max_chapter_tokens=300,
        allowed_lateness=timedelta(seconds=120),
        max_clock_skew=timedelta(seconds=5),
    )
    return modelless_bundle(schema(), entity="customer", window=policy, bundle_id=bundle_id)


def work(plan: Plan) -> None:
    """Run a worker until SIGTERM; exit as the command does."""
    with plan.log.open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("kafka").setLevel(logging.ERROR)
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signal's signature
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    faulthandler.register(signal.SIGUSR1)  # where does it hang?
    try:
        with assembled_around(
            WorkerSettings(**plan.settings),
            faults_bundle(),
            LengthEmbedder,
            wrap=lambda parts: _crashing(parts, _Deadly(plan.boundary, plan.occurrence)),
        ) as built:
            logging.getLogger(__name__).info(READY)

            def stop_if_told() -> None:
                if stopping:
                    built.worker.stop()

            stop_if_told()
            built.worker.run(stop_if_told)
    except LLM4ESError as error:
        logging.getLogger(__name__).exception("the worker ends")
        sys.exit(error.exit_code)


class _Deadly(Boundaries):
    """A boundary whose k-th occurrence is a kill -9."""

    def crash(self, name: str) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError(name)


def _crashing(parts: Parts, boundaries: Boundaries) -> Parts:
    def around(part: object, *methods: str) -> Any:  # noqa: ANN401 - stands in for any part
        return cast("Any", Crashing(part, boundaries, methods))

    return replace(
        parts,
        source=around(parts.source, "poll", "commit"),
        store=around(parts.store, "begin"),
        sink=around(parts.sink, "journal", "publish"),
        dead_letters=around(parts.dead_letters, "park"),
    )

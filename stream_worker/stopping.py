"""SIGTERM and SIGINT end a loop after the batch under way."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["stopping_on_signals"]


@contextmanager
def stopping_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop`, which must be safe in a signal handler, instead of ending the process."""

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signal's signature
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

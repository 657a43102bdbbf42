"""Trying again: longer and longer waits, none past a budget, no two workers in step."""

import random
import time
from collections.abc import Callable

from llm4es.errors import SinkUnavailable

__all__ = ["Patience"]

_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 1.0
_GLANCE_S = 0.05  # how soon a stop is seen


class Patience:
    """Tries calls to a sink again until `budget_s` is spent, or the worker stops.

    Waits double, each drawn between half and the whole of its length. `retried` is called
    before each further attempt.
    """

    def __init__(
        self, budget_s: float, *, stopping: Callable[[], bool], retried: Callable[[], None]
    ) -> None:
        self._budget_s = budget_s
        self._stopping = stopping
        self._retried = retried
        self._random = random.Random()  # noqa: S311 - spreads waits, keeps no secret

    def with_(self, call: Callable[[], None]) -> None:
        """Call until it succeeds. Raises SinkUnavailable once the budget would be overdrawn."""
        until = time.monotonic() + self._budget_s
        longest = _FIRST_WAIT_S
        while True:
            try:
                return call()
            except SinkUnavailable as error:
                wait = min(longest, error.retry_after_s) * self._random.uniform(0.5, 1.0)
                if self._stopping() or time.monotonic() + wait > until:
                    raise
            self._retried()
            self.wait(wait)
            longest = min(2 * longest, _LONGEST_WAIT_S)

    def wait(self, seconds: float) -> None:
        """Wait, but not past a stop."""
        until = time.monotonic() + seconds
        while not self._stopping() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _GLANCE_S))

"""CPU seconds of calls: what one core pays, whoever else wants it meanwhile."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

__all__ = ["interleaved", "seconds"]

Name = TypeVar("Name")


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds that this process spends on one call, all threads together."""
    started = time.process_time()
    call()
    return time.process_time() - started


def interleaved(calls: Mapping[Name, Callable[[], object]], rounds: int) -> dict[Name, float]:
    """Median CPU seconds by name: one warm-up each, then rounds in which every call has a turn."""
    for call in calls.values():
        call()
    found: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(seconds(call))
    return {name: median(times) for name, times in found.items()}

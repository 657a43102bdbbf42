"""Buckets read by a pool of Ray actors: the only import of Ray (extra `ray`)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from llm4es.errors import ConfigError
from llm4es.events import Record
from stream_worker.ops.buckets import Filled, Opener

__all__ = ["RayPool", "ray_pool"]

_AHEAD = 2  # buckets per actor that are handed over before results are taken


class RayPool:
    """Actors of one kind, each with a model of its own; built by `ray_pool`."""

    def __init__(self, ray: Any, actors: Sequence[Any]) -> None:  # noqa: ANN401 - no types
        self._ray = ray
        self._actors = actors

    def fill(self, buckets: Iterable[Sequence[Record]]) -> Iterator[Filled]:
        """Read buckets at once, at most two to an actor; results come as they are done."""
        waiting = iter(buckets)
        under_way: dict[Any, Any] = {}
        for actor in [*self._actors] * _AHEAD:
            for bucket in islice(waiting, 1):
                under_way[actor.read.remote(bucket)] = actor
        while under_way:
            (done,), _ = self._ray.wait(list(under_way), num_returns=1)
            actor = under_way.pop(done)
            for bucket in islice(waiting, 1):
                under_way[actor.read.remote(bucket)] = actor
            yield self._ray.get(done)


@contextmanager
def ray_pool(opener: Opener, *, actors: int | None, gpus: float = 0) -> Iterator[RayPool]:
    """Start actors, on the cluster that RAY_ADDRESS names or on a Ray of this machine's own.

    By default as many as the cluster has CPUs; `gpus` is what each takes of a device. Raises
    ConfigError without the extra, or for actors that the cluster has no room for.
    """
    try:
        import ray as module  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError("engine", "Ray is not there", "pip install 'llm4es[ray]'") from error
    ray: Any = module  # typed in part
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        cpus = int(ray.cluster_resources().get("CPU", 1))
        count = actors or cpus
        if count > cpus:
            raise ConfigError("actors", f"{count} of {cpus} CPUs", "give fewer, or more machines")

        class Actor:
            def __init__(self) -> None:
                self._reader = opener()

            def read(self, records: Sequence[Record]) -> Filled:
                return self._reader.read(records)

            def ready(self) -> bool:
                return True

        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=2, max_task_retries=2)(Actor)
        pool = [remote.remote() for _ in range(count)]
        ray.get([actor.ready.remote() for actor in pool])
        yield RayPool(ray, pool)
    finally:
        ray.shutdown()

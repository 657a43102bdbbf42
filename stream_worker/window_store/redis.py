"""Windows in Redis: shared by the workers of a group.

Each window is a hash {version, record} of its own, its key tagged by entity so that Redis
Cluster keeps a script's keys together. A worker that lost its partition finds another version
than it read, and is refused.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import redis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    RedisError,
)

from llm4es.errors import ConfigError, Fenced, SinkUnavailable
from llm4es.events import TopicPartition
from llm4es.windows import Window
from stream_worker.ports import LogIdentity, WindowTransaction
from stream_worker.window_store.batch import Batch
from stream_worker.window_store.codec import decode_window, encode_window

__all__ = ["RedisWindowStore"]

# KEYS[1] window; ARGV[1] version it was read at, ARGV[2] record. 1 where it was written.
_COMPARE_AND_SET = """
local found = redis.call('HGET', KEYS[1], 'version')
if (found or '0') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[1] + 1, 'record', ARGV[2])
return 1
"""
_TIMEOUT_S = 5.0


class RedisWindowStore:
    """See `ports.WindowStore`. Windows are written first, each atomically, then the offsets."""

    def __init__(self, url: str, bundle_id: str) -> None:
        self._prefix = f"llm4es:{bundle_id}"
        try:
            self._client = redis.Redis.from_url(
                url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S
            )
        except ValueError as error:
            raise ConfigError(
                "window_store", f"is no Redis URL ({error})", "write redis://host:port/db"
            ) from error
        self._compare_and_set = self._client.register_script(_COMPARE_AND_SET)
        with _mapped():
            self._client.ping()

    @contextmanager
    def begin(self) -> Iterator[WindowTransaction]:
        """Open a batch; the windows are written when the block ends without an exception."""
        transaction = Batch(self.load)
        yield transaction
        with _mapped():
            self._write(transaction.pending, transaction.next_offsets)

    def read(self, entity_id: str) -> Window | None:
        """Read one window outside of any batch."""
        window = self.load([entity_id])[entity_id]
        return window if window.version else None

    def load(self, entity_ids: Iterable[str]) -> dict[str, Window]:
        """Read windows; an entity that has none gets an empty one."""
        wanted = list(entity_ids)
        with _mapped():
            pipeline = self._client.pipeline(transaction=False)
            for entity_id in wanted:
                pipeline.hmget(self._key(entity_id), ["version", "record"])
            found = cast("list[tuple[bytes | None, bytes | None]]", pipeline.execute())
        return {
            entity_id: Window(entity_id=entity_id)
            if version is None or record is None
            else decode_window(entity_id, int(version), record)
            for entity_id, (version, record) in zip(wanted, found, strict=True)
        }

    def offsets(self, topic: str) -> dict[TopicPartition, int]:
        """Next offset per partition up to which this store holds the log."""
        with _mapped():
            found = cast(
                "dict[bytes, bytes]", self._client.hgetall(f"{self._prefix}:offsets:{topic}")
            )
        return {TopicPartition(topic, int(partition)): int(at) for partition, at in found.items()}

    def identity(self, topic: str) -> LogIdentity | None:
        """Which log the windows were folded from."""
        with _mapped():
            found = cast("dict[bytes, bytes]", self._client.hgetall(f"{self._prefix}:log:{topic}"))
        if not found:
            return None
        return LogIdentity(
            topic=topic,
            topic_id=found[b"topic_id"].decode(),
            partitions=int(found[b"partitions"]),
        )

    def remember(self, identity: LogIdentity) -> None:
        """Record which log the windows are folded from."""
        with _mapped():
            self._client.hset(
                f"{self._prefix}:log:{identity.topic}",
                mapping={"topic_id": identity.topic_id, "partitions": identity.partitions},
            )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _key(self, entity_id: str) -> str:
        return f"{self._prefix}:window:{{{entity_id}}}"

    def _write(
        self, pending: Mapping[str, Window], next_offsets: Mapping[TopicPartition, int]
    ) -> None:
        if pending:
            # A pipeline of scripts loads them itself where the server forgot them.
            pipeline = self._client.pipeline(transaction=False)
            for window in pending.values():
                self._compare_and_set(
                    keys=[self._key(window.entity_id)],
                    args=[window.version, encode_window(window)],
                    client=cast("Any", pipeline),
                )
            if not all(pipeline.execute()):
                msg = "another worker has written a window of this batch"
                raise Fenced(msg)
        by_topic: dict[str, dict[str | bytes, bytes | float | int | str]] = {}
        for tp, at in next_offsets.items():
            by_topic.setdefault(tp.topic, {})[str(tp.partition)] = at
        for topic, offsets in by_topic.items():
            self._client.hset(f"{self._prefix}:offsets:{topic}", mapping=offsets)


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
        raise ConfigError(
            "window_store", f"Redis refuses us ({error})", "mend user and password in its URL"
        ) from error
    except RedisError as error:
        msg = f"the Redis window store cannot be used ({error})"
        raise SinkUnavailable(msg) from error

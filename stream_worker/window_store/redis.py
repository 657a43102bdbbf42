"""Windows in Redis: shared by the workers of a group.

Each window is a hash {version, record} of its own, its key tagged by entity so that Redis
Cluster keeps a script's keys together. A worker that lost its partition finds another version
than it read, and is refused.
"""

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import sha1
from itertools import count, islice
from typing import Any, cast

from redis.cluster import RedisCluster
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    NoScriptError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

from llm4es.deletion import DeletionKey
from llm4es.errors import ConfigError, Fenced, SinkUnavailable, StoreLost
from llm4es.events import TopicPartition
from llm4es.windows import Window
from stream_worker.ports import NO_OFFSETS, LogIdentity, WindowTransaction
from stream_worker.window_store.batch import Batch
from stream_worker.window_store.codec import decode_window, encode_window
from stream_worker.window_store.redis_client import open_client

__all__ = ["RedisWindowStore"]

log = logging.getLogger(__name__)

# KEYS[1] window, KEYS[2] (with a deletion key) where it stands when it is deleted; ARGV[1] version
# it was read at, ARGV[2] record, ARGV[3] which of the keys takes it. 1 where it was written, 0
# where another version stands, -1 where none does and one was read.
_COMPARE_AND_SET = """
local found = redis.call('HGET', KEYS[1], 'version')
if not found and KEYS[2] then found = redis.call('HGET', KEYS[2], 'version') end
if (found or '0') ~= ARGV[1] then return found and 0 or -1 end
local place = tonumber(ARGV[3])
redis.call('HSET', KEYS[place], 'version', ARGV[1] + 1, 'record', ARGV[2])
if KEYS[2] then redis.call('DEL', KEYS[3 - place]) end
return 1
"""
_COMPARE_AND_SET_SHA = sha1(_COMPARE_AND_SET.encode()).hexdigest()  # noqa: S324 - Redis' name
# KEYS[1] offsets of a topic; ARGV[1] how many pairs (partition, offset known to be held) come
# first, then pairs (partition, next offset). 0, and nothing written, where less is held.
_ADVANCE = """
local held = 2 * tonumber(ARGV[1])
for i = 2, held, 2 do
  local found = redis.call('HGET', KEYS[1], ARGV[i])
  if tonumber(found or '0') < tonumber(ARGV[i + 1]) then return 0 end
end
for i = held + 2, #ARGV, 2 do
  local found = redis.call('HGET', KEYS[1], ARGV[i])
  if tonumber(found or '0') < tonumber(ARGV[i + 1]) then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
return 1
"""
_GONE = -1
_CHUNK = 500  # windows of one round trip of a scan


class RedisWindowStore:
    """See `ports.WindowStore`. Windows are written first, each atomically, then the offsets.

    `deletion_key` is needed to keep windows that are deleted. Raises ConfigError for another key
    than the store's.
    """

    def __init__(
        self, url: str, bundle_id: str, *, deletion_key: DeletionKey | None = None
    ) -> None:
        self._prefix = f"llm4es:{bundle_id}"
        self._deletion_key = deletion_key
        with _mapped():
            self._client = open_client(url)
            self._cluster = isinstance(self._client, RedisCluster)
            self._advance = self._client.register_script(_ADVANCE)
            self._client.ping()
            self._agree_on_key()
            self._warn_of_eviction()

    @contextmanager
    def begin(self, held: Mapping[TopicPartition, int] = NO_OFFSETS) -> Iterator[WindowTransaction]:
        """Open a batch; the windows are written when the block ends without an exception."""
        transaction = Batch(self.load, self.offsets, held)
        yield transaction
        with _mapped():
            self._write(transaction)

    def read(self, entity_id: str) -> Window | None:
        """Read one window outside of any batch."""
        window = self.load([entity_id])[entity_id]
        return window if window.version else None

    def load(self, entity_ids: Iterable[str]) -> dict[str, Window]:
        """Read windows; an entity that has none gets an empty one."""
        wanted = list(entity_ids)
        windows = self._load({entity_id: self._key(entity_id) for entity_id in wanted})
        key = self._deletion_key
        if key is not None and len(windows) < len(wanted):
            absent = [entity_id for entity_id in wanted if entity_id not in windows]
            windows |= self._load({each: self._deleted_key(each, key) for each in absent})
        return {
            entity_id: windows.get(entity_id) or Window(entity_id=entity_id) for entity_id in wanted
        }

    def scan(self, partitions: Collection[TopicPartition]) -> Iterator[Window]:
        """Give every window of these partitions; walks through the keys of the whole server."""
        prefix = self._key("")[:-1].encode()
        keys = self._client.scan_iter(match=f"{_literal(self._prefix)}:window:*", count=_CHUNK)
        while True:
            with _mapped():
                found = list(islice(keys, _CHUNK))
            if not found:
                return
            # SCAN may give a key twice.
            entity_ids = {key[len(prefix) : -1].decode() for key in found}
            for window in self.load(entity_ids).values():
                if (window.topic, window.partition) in partitions:
                    yield window

    def has_deleted(self) -> bool:
        """Whether it keeps what is left of deleted entities."""
        pattern = f"{_literal(self._prefix)}:deleted:*"
        with _mapped():
            return any(True for _ in self._client.scan_iter(match=pattern, count=_CHUNK))

    def offsets(self, topic: str) -> dict[TopicPartition, int]:
        """Next offset per partition up to which this store holds the log."""
        return self._by_partition("offsets", topic)

    def unproven(self, topic: str) -> dict[TopicPartition, int]:
        """Partitions whose beginning was gone when folding began, and where it began."""
        return self._by_partition("unproven", topic)

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

    def topics(self) -> set[str]:
        """Topics that windows here were folded from."""
        with _mapped():
            found = cast("set[bytes]", self._client.smembers(f"{self._prefix}:topics"))
        return {topic.decode() for topic in found}

    def remember(
        self, identity: LogIdentity, unproven: Mapping[TopicPartition, int] = NO_OFFSETS
    ) -> None:
        """Record which log the windows are folded from, and what of it lacks its beginning."""
        topic = identity.topic
        with _mapped():
            pipeline = self._client.pipeline(transaction=False)
            pipeline.sadd(f"{self._prefix}:topics", topic)
            pipeline.hset(
                f"{self._prefix}:log:{topic}",
                mapping={"topic_id": identity.topic_id, "partitions": identity.partitions},
            )
            for tp, at in unproven.items():
                pipeline.hset(f"{self._prefix}:unproven:{topic}", str(tp.partition), str(at))
            _answers(pipeline)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _warn_of_eviction(self) -> None:
        nodes = {"target_nodes": RedisCluster.PRIMARIES} if self._cluster else {}
        try:
            found = self._client.info("memory", **nodes)
        except (NoPermissionError, ResponseError):
            return  # some that are managed do not tell
        told = found.values() if self._cluster else [found]
        policies = {each.get("maxmemory_policy", "noeviction") for each in told}
        if policies != {"noeviction"}:
            log.warning(
                "Redis evicts what it has no memory for (%s): a window that is evicted would be "
                "folded anew without its past; set maxmemory-policy noeviction",
                ", ".join(sorted(policies)),
            )

    def _load(self, keys: Mapping[str, str]) -> dict[str, Window]:
        """Windows that are there, by the ids of their entities."""
        with _mapped():
            pipeline = self._client.pipeline(transaction=False)
            for key in keys.values():
                pipeline.hmget(key, ["version", "record"])
            found = cast("list[tuple[bytes | None, bytes | None]]", _answers(pipeline))
        return {
            entity_id: decode_window(entity_id, int(version), record)
            for entity_id, (version, record) in zip(keys, found, strict=True)
            if version is not None and record is not None
        }

    def _agree_on_key(self) -> None:
        name = f"{self._prefix}:deletion-key"
        if self._deletion_key is not None:
            self._client.set(name, self._deletion_key.fingerprint, nx=True)
        found = cast("bytes | None", self._client.get(name))
        DeletionKey.refuse_other(found, self._deletion_key, "the Redis window store")

    def _key(self, entity_id: str) -> str:
        return f"{self._prefix}:window:{{{entity_id}}}"

    def _deleted_key(self, entity_id: str, key: DeletionKey) -> str:
        """Name without the id, in the same slot of a Redis Cluster as the window's own."""
        tag = _tags()[key_slot(self._key(entity_id).encode())]
        return f"{self._prefix}:deleted:{{{tag}}}:{key.hash(entity_id).hex()}"

    def _places(self, entity_id: str) -> list[str]:
        key = self._deletion_key
        deleted = [] if key is None else [self._deleted_key(entity_id, key)]
        return [self._key(entity_id), *deleted]

    def _by_partition(self, what: str, topic: str) -> dict[TopicPartition, int]:
        with _mapped():
            found = cast(
                "dict[bytes, bytes]", self._client.hgetall(f"{self._prefix}:{what}:{topic}")
            )
        return {TopicPartition(topic, int(partition)): int(at) for partition, at in found.items()}

    def _write(self, batch: Batch) -> None:
        self._write_windows(batch)
        self._write_offsets(batch)

    def _write_windows(self, batch: Batch) -> None:
        if self._deletion_key is None and any(w.deleted for w in batch.pending.values()):
            raise DeletionKey.needed()
        if batch.pending:
            answers = self._compare_and_set(list(batch.pending.values()))
            if _GONE in answers:
                msg = "the window store has lost a window that was read from it"
                raise StoreLost(msg)
            if not all(answers):
                msg = "another worker has written a window of this batch"
                raise Fenced(msg)

    def _compare_and_set(self, windows: Sequence[Window]) -> list[int]:
        """Write each where its version stands; in one round trip, if the server has the script."""
        calls = []
        for window in windows:
            places = self._places(window.entity_id)
            place = len(places) if window.deleted else 1
            calls.append((len(places), *places, window.version, encode_window(window), place))
        answers = self._evaluate(calls)
        # One that the server has forgotten, or that a node of a Cluster never had.
        unknown = [at for at, each in enumerate(answers) if isinstance(each, NoScriptError)]
        if unknown:
            self._client.script_load(_COMPARE_AND_SET)
            for at, answer in zip(
                unknown, self._evaluate([calls[i] for i in unknown]), strict=True
            ):
                answers[at] = answer
        _raise_first(answers)
        return answers

    def _evaluate(self, calls: "Sequence[tuple[Any, ...]]") -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for call in calls:  # as a Cluster's pipeline takes them too: it has no `evalsha`
            pipeline.execute_command("EVALSHA", _COMPARE_AND_SET_SHA, *call)
        answers: list[Any] = pipeline.execute(raise_on_error=False)
        return answers

    def _write_offsets(self, batch: Batch) -> None:
        for topic in {tp.topic for tp in batch.next_offsets}:
            held, ahead = (
                [(tp.partition, at) for tp, at in offsets.items() if tp.topic == topic]
                for offsets in (batch.held, batch.next_offsets)
            )
            written = self._advance(
                keys=[f"{self._prefix}:offsets:{topic}"],
                args=[len(held), *(number for pair in (*held, *ahead) for number in pair)],
            )
            if not written:
                msg = f"the window store has lost offsets of {topic} while a batch was under way"
                raise StoreLost(msg)


@cache
def _tags() -> list[str]:
    """For each slot of a Redis Cluster a text that hashes into it."""
    tags: dict[int, str] = {}
    for number in count():
        tags.setdefault(key_slot(b"%d" % number), str(number))
        if len(tags) == REDIS_CLUSTER_HASH_SLOTS:
            break
    return [tags[slot] for slot in range(REDIS_CLUSTER_HASH_SLOTS)]


def _literal(text: str) -> str:
    """Text as a pattern of SCAN that matches itself."""
    return re.sub(r"([\\*?\[\]])", r"\\\1", text)


def _answers(pipeline: Any) -> Sequence[Any]:  # noqa: ANN401 - redis-py's pipelines are loosely typed
    """Execute. redis-py's own `raise_on_error` would put the key, and so an entity's id, in."""
    answers: list[Any] = pipeline.execute(raise_on_error=False)
    _raise_first(answers)
    return answers


def _raise_first(answers: Iterable[Any]) -> None:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
        raise ConfigError(
            "window_store", f"Redis refuses us ({error})", "mend user and password in its URL"
        ) from error
    except (RedisError, RedisClusterException) as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise ConfigError(
                "window_store",
                f"no authority that we know vouches for Redis' certificate ({error})",
                "name its file in the URL: rediss://...?ssl_ca_certs=PATH",
            ) from error
        msg = f"the Redis window store cannot be used ({error})"
        raise SinkUnavailable(msg) from error

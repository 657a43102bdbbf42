"""Embeddings out of Redis straight into one array, for callers that count microseconds.

What stock `get_online_features` reads, from Feast's own encoding, with what it does not say: how
old a row is, that it has outlived its TTL, that there is none, and whether it has seen the event
that has just happened.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from feast import FeatureStore, FeatureView
from feast.infra.online_stores.helpers import _mmh3, _redis_key
from feast.infra.online_stores.redis import RedisOnlineStore, RedisType, _versioned_fv_name
from feast.protos.feast.types.Value_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp
from numpy.typing import NDArray
from redis.backoff import NoBackoff
from redis.retry import Retry

from llm4es.errors import ConfigError, SinkRejected
from llm4es.events import EPOCH, entity_hash
from llm4es.feast.definitions import join_key_of
from llm4es.feast.entity_keys import entity_keys
from llm4es.feast.online import ViewTarget, encode_vector
from llm4es.feast.opening import open_store
from llm4es.feast.redis_asking import KeyedCommand
from llm4es.feast.redis_rows import REDIS_ERRORS, translate_redis_error
from llm4es.feast.services import served_view

__all__ = ["EmbeddingReader", "Embeddings", "Status", "open_embedding_reader"]

_TIMESTAMP, _EMBEDDING, _SURPRISE, _LAST, _EVENT, _BUNDLE = range(6)
_FEATURES = ("embedding", "surprise", "surprise_last", "last_event_id", "bundle_id")
_FLOAT_TAG = Value(float_val=1).SerializeToString()[:-4]
_TEXT_TAG = Value(string_val="x").SerializeToString()[:-2]
_TEXT_AT = len(_TEXT_TAG) + 1
_SHORT = _TEXT_AT + 127
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.01
_MICROSECOND = timedelta(microseconds=1)


class Status(IntEnum):
    """What can be said of an entity's row."""

    PRESENT = 0
    MISSING = 1  # there is none: never seen, deleted, or expired in Redis
    EXPIRED = 2  # older than the view's TTL; its values are given
    STALE = 3  # has not seen the event it was waited for, or is older than `max_age_s`; likewise


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Rows of B entities; row i belongs to entity i. NaN, "" and NaT where there is none."""

    vectors: NDArray[np.float32]  # (B, dim)
    surprise: NDArray[np.float32]  # (B, columns)
    surprise_last: NDArray[np.float32]  # (B,)
    status: NDArray[np.int8]  # (B,) of Status
    as_of: NDArray[np.datetime64]  # (B,) microseconds, UTC
    age_s: NDArray[np.float64]  # (B,) seconds since `as_of`
    last_event_ids: tuple[str, ...]
    bundle_ids: tuple[str, ...]
    surprise_columns: tuple[str, ...]

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Rows that are present, not expired and not stale (B,)."""
        mask: NDArray[np.bool_] = self.status == Status.PRESENT
        return mask


class EmbeddingReader:
    """Reads the rows of one feature view; built by `open_embedding_reader`.

    `read` blocks; `read_async` is the same for asyncio. Both raise SinkUnavailable where Redis is
    away, and SinkRejected where a row is not of the view's shape. An object may be shared by
    threads, and by the tasks of one event loop.
    """

    def __init__(
        self, store: FeatureStore, view: FeatureView, *, clock: Callable[[], float] = time.time
    ) -> None:
        config = store.config
        if getattr(config.online_store, "type", None) != "redis":
            raise ConfigError(
                "online_store",
                f"is {getattr(config.online_store, 'type', None)}, not redis",
                "read other stores through Feast's get_online_features",
            )
        self._config = config
        self._clock = clock
        self.view_name: str = view.name
        self.bundle_id: str = view.tags["bundle_id"]
        self.dim = int(view.tags["dim"])
        self.surprise_columns = tuple(
            filter(None, view.tags.get("surprise_columns", "").split(","))
        )
        self._ttl_s = view.ttl.total_seconds() if view.ttl else None
        self._layout = _Layout(self.dim, len(self.surprise_columns))
        target = ViewTarget(store, view, join_key_of(view.tags["entity"]))
        version = config.entity_key_serialization_version
        self._key = entity_keys(
            lambda entity_id: bytes(
                _redis_key(config.project, target.entity_key(entity_id), version)
            )
        )
        name = _versioned_fv_name(view, config)
        self._fields = [
            f"_ts:{name}".encode(),
            *(_mmh3(f"{name}:{feature}") for feature in _FEATURES),
        ]
        self._command = KeyedCommand(b"HMGET", self._fields)
        self._cluster = config.online_store.redis_type == RedisType.redis_cluster
        self._own_async: dict[asyncio.AbstractEventLoop, Any] = {}
        try:
            self._client: Any = RedisOnlineStore()._get_client(config.online_store)  # noqa: SLF001
            if not self._cluster:
                self._client.set_retry(Retry(NoBackoff(), 1))
            self._client.ping()
        except REDIS_ERRORS as error:
            raise translate_redis_error(error) from error

    def read(
        self,
        entity_ids: Sequence[str],
        *,
        max_age_s: float | None = None,
        seen: str | Sequence[str | None] | None = None,
        recorded_at: datetime | None = None,
        timeout_ms: float = 0,
    ) -> Embeddings:
        """Rows of B entities, in their order.

        `seen` names the event that each row must have seen (one for all, or one per entity): the
        read waits up to `timeout_ms` for it, and a row that has not is STALE. A row has seen an
        event if it is the row's newest one; or, where `recorded_at` says when the log got it, if
        the row is of later: a worker under load, and a late event, show no row of its own.
        `max_age_s` makes rows whose `as_of` is longer ago STALE.
        """
        due = _Due(entity_ids, seen, recorded_at, timeout_ms)
        while True:
            found = self._fetch(entity_ids)
            if (pause := due.pause(found)) is None:
                return self._answer(entity_ids, found, due, max_age_s)
            time.sleep(pause)

    async def read_async(
        self,
        entity_ids: Sequence[str],
        *,
        max_age_s: float | None = None,
        seen: str | Sequence[str | None] | None = None,
        recorded_at: datetime | None = None,
        timeout_ms: float = 0,
    ) -> Embeddings:
        """See `read`; other tasks go on meanwhile."""
        due = _Due(entity_ids, seen, recorded_at, timeout_ms)
        while True:
            found = await self._fetch_async(entity_ids)
            if (pause := due.pause(found)) is None:
                return self._answer(entity_ids, found, due, max_age_s)
            await asyncio.sleep(pause)

    def close(self) -> None:
        """Release the connections of `read`."""
        self._client.close()

    async def close_async(self) -> None:
        """Release the connections of `read_async` in this event loop."""
        client = self._own_async.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def _fetch(self, entity_ids: Sequence[str]) -> list[list[bytes | None]]:
        try:
            if not self._cluster:
                keys = [self._key(entity_id) for entity_id in entity_ids]
                return _checked(self._command.ask(self._client, keys))
            pipe = self._client.pipeline(transaction=False)
            for entity_id in entity_ids:
                pipe.execute_command("HMGET", self._key(entity_id), *self._fields)
            return _checked(pipe.execute(raise_on_error=False))
        except REDIS_ERRORS as error:
            raise translate_redis_error(error) from error

    async def _fetch_async(self, entity_ids: Sequence[str]) -> list[list[bytes | None]]:
        try:
            client = await self._async_client()
            pipe = client.pipeline(transaction=False)
            for entity_id in entity_ids:
                pipe.execute_command("HMGET", self._key(entity_id), *self._fields)
            return _checked(await pipe.execute(raise_on_error=False))
        except REDIS_ERRORS as error:
            raise translate_redis_error(error) from error

    async def _async_client(self) -> Any:  # noqa: ANN401 - redis-py's own
        """One client per event loop: its connections belong to the loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._own_async:
            config = self._config.online_store
            made = RedisOnlineStore()
            self._own_async[loop] = await made._get_client_async(config)  # noqa: SLF001
        return self._own_async[loop]

    def _answer(
        self,
        entity_ids: Sequence[str],
        found: Sequence[Sequence[bytes | None]],
        due: "_Due",
        max_age_s: float | None,
    ) -> Embeddings:
        moments = np.array([_microseconds(row[_TIMESTAMP]) for row in found], np.int64)
        # A deleted entity's timestamp stays for a while, alone.
        missing = np.array([row[_EMBEDDING] is None for row in found], np.bool_) | (moments < 0)
        age_s = np.where(missing, np.nan, self._clock() - moments / 1e6)
        status = np.zeros(len(found), np.int8)
        with np.errstate(invalid="ignore"):
            status[age_s > (np.inf if max_age_s is None else max_age_s)] = Status.STALE
            status[due.unseen(found)] = Status.STALE
            status[age_s > (np.inf if self._ttl_s is None else self._ttl_s)] = Status.EXPIRED
        status[missing] = Status.MISSING
        try:
            vectors, surprise, last = self._layout.decode(found)
        except ValueError as error:
            entity = entity_hash(entity_ids[int(error.args[1])])
            raise SinkRejected(f"online row of entity {entity}: {error.args[0]}") from error
        as_of = np.where(missing, np.datetime64("NaT", "us").view(np.int64), moments)
        return Embeddings(
            vectors=vectors,
            surprise=surprise,
            surprise_last=last,
            status=status,
            as_of=as_of.view("datetime64[us]"),
            age_s=age_s,
            last_event_ids=tuple([_text(row[_EVENT]) for row in found]),
            bundle_ids=tuple([_bundle(row[_BUNDLE]) for row in found]),
            surprise_columns=self.surprise_columns,
        )


def open_embedding_reader(
    repo_path: Path | str, entity: str, *, config_file: str = "feature_store.yaml"
) -> EmbeddingReader:
    """Open the view that an entity's stable service points to, as it does now.

    After ops moved the service, open another; `bundle_id` says which one this reads. Raises
    ConfigError (no repository, no service, not Redis), SinkUnavailable.
    """
    store = open_store(Path(repo_path), config_file)
    return EmbeddingReader(store, served_view(store, entity))


class _Layout:
    """Where a row's numbers stand in its values: behind headers of a known length."""

    def __init__(self, dim: int, columns: int) -> None:
        self._dim, self._columns = dim, columns
        self._headers = tuple(
            encode_vector(np.zeros(size, np.float32))[: -4 * size or None]
            for size in (dim, columns)
        )

    def decode(
        self, found: Sequence[Sequence[bytes | None]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Vectors (B, dim), surprise (B, columns), the last event's (B,). Raises ValueError."""
        return (
            self._stack(found, _EMBEDDING, self._dim, self._headers[0]),
            self._stack(found, _SURPRISE, self._columns, self._headers[1]),
            self._stack(found, _LAST, 1, _FLOAT_TAG).reshape(len(found)),
        )

    @staticmethod
    def _stack(
        found: Sequence[Sequence[bytes | None]], field: int, width: int, header: bytes
    ) -> NDArray[np.float32]:
        """One array from the bytes of B values: joined, viewed, headers cut off."""
        if not width:
            return np.zeros((len(found), 0), np.float32)
        size = len(header) + 4 * width
        nothing = header + np.full(width, np.nan, "<f4").tobytes()
        values = [nothing if row[_EMBEDDING] is None else row[field] for row in found]
        for index, value in enumerate(values):
            if value is None or len(value) != size or not value.startswith(header):
                raise ValueError(f"{_FEATURES[field - 1]} is not of {width} numbers", index)
        joined = np.frombuffer(b"".join(values), np.uint8)  # type: ignore[arg-type]
        numbers = np.ascontiguousarray(joined.reshape(len(found), size)[:, len(header) :])
        return numbers.view("<f4").reshape(len(found), width).astype(np.float32, copy=False)


class _Due:
    """Which events rows must have seen, and how long that is waited for."""

    def __init__(
        self,
        entity_ids: Sequence[str],
        seen: str | Sequence[str | None] | None,
        recorded_at: datetime | None,
        timeout_ms: float,
    ) -> None:
        each = [seen] * len(entity_ids) if seen is None or isinstance(seen, str) else list(seen)
        if len(each) != len(entity_ids):
            raise ConfigError(
                "seen", f"names {len(each)} events of {len(entity_ids)} entities", "name one each"
            )
        self._values = [
            None if event is None else Value(string_val=event).SerializeToString() for event in each
        ]
        self._after = None if recorded_at is None else (recorded_at - EPOCH) // _MICROSECOND
        self._until = time.monotonic() + timeout_ms / 1000
        self._pause_s = _FIRST_PAUSE_S

    def unseen(self, found: Sequence[Sequence[bytes | None]]) -> NDArray[np.bool_]:
        """Rows that have not seen their event (B,)."""
        if not any(self._values):
            return np.zeros(len(found), np.bool_)
        return np.array(
            [
                value is not None and row[_EVENT] != value and not self._is_later(row)
                for value, row in zip(self._values, found, strict=True)
            ],
            np.bool_,
        )

    def pause(self, found: Sequence[Sequence[bytes | None]]) -> float | None:
        """Seconds until another look is worth it; None where all is seen, or the time is up."""
        left = self._until - time.monotonic()
        if left <= 0 or not any(self._values) or not self.unseen(found).any():
            return None
        pause, self._pause_s = self._pause_s, min(self._pause_s * 2, _LONGEST_PAUSE_S)
        return min(pause, left)

    def _is_later(self, row: Sequence[bytes | None]) -> bool:
        return self._after is not None and _microseconds(row[_TIMESTAMP]) > self._after


def _checked(answers: list[Any]) -> list[list[bytes | None]]:
    for answer in answers:
        if isinstance(answer, Exception):
            raise translate_redis_error(answer) from answer
    return answers


def _microseconds(value: bytes | None) -> int:
    """Decode a Timestamp; -1 where there is none."""
    if value is None:
        return -1
    moment = Timestamp.FromString(value)
    microseconds: int = moment.seconds * 1_000_000 + moment.nanos // 1000
    return microseconds


def _text(value: bytes | None) -> str:
    if value is None:
        return ""
    if len(value) > _SHORT or not value.startswith(_TEXT_TAG):
        return str(Value.FromString(value).string_val)
    return value[_TEXT_AT:].decode()  # its length is one byte


_bundle = lru_cache(maxsize=64)(_text)

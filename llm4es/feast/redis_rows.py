"""Rows in Redis, as Feast's Redis store keeps them, written by compare-and-set.

    key    serialized entity key + project
    field  murmur3("view:feature") -> Value     "_ts:view" -> protobuf Timestamp

The script decodes the timestamp that stands and compares (seconds, nanos) exactly, so a row
that stock Feast wrote is respected like one of ours, and Feast's own check (read, then write)
cannot lose a race to us. Feast's readers notice no difference.
"""

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import Any, NamedTuple

from feast.infra.online_stores.helpers import _mmh3, _redis_key
from feast.infra.online_stores.redis import RedisOnlineStore, RedisType, _versioned_fv_name
from google.protobuf.timestamp_pb2 import Timestamp
from redis import exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from llm4es.deletion import Tombstone
from llm4es.errors import ConfigError, SinkRejected, SinkUnavailable, StoreLost
from llm4es.feast.entity_keys import entity_keys
from llm4es.feast.online import NO_MARKS, Marks, ViewTarget, encode_row, encode_timestamp
from llm4es.feast.redis_packing import RowPacker
from llm4es.feast.redis_scripts import DELETE, REPLACE, WRITE, script_sha
from llm4es.features import FeatureRow

__all__ = ["REDIS_ERRORS", "RedisRows", "translate_redis_error"]

_SUPERSEDED = -1
_PIPELINED = 8  # calls of one round trip
_ROWS = 64  # of one call: the server does nothing else meanwhile
_MARKS_AT = 6  # among the arguments of WRITE
# What a call of redis-py may raise; its cluster client has a root of its own.
REDIS_ERRORS = (exceptions.RedisError, exceptions.RedisClusterException, OSError)
_REFUSALS = (
    exceptions.AuthenticationError,
    exceptions.AuthenticationWrongNumberOfArgsError,
    exceptions.AuthorizationError,
    exceptions.NoPermissionError,
)
_BUGS = (
    exceptions.CrossSlotTransactionError,
    exceptions.InvalidPipelineStack,
    exceptions.LockError,
    exceptions.PubSubError,
    exceptions.DataError,
)
_AWAY = (
    exceptions.AskError,  # and MovedError: slots on their way to another node
    exceptions.ClusterError,
    exceptions.ConnectionError,
    exceptions.InvalidResponse,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.RedisClusterException,
    exceptions.TimeoutError,
    exceptions.TryAgainError,
    exceptions.WatchError,
    OSError,
)
# Answers of a server that is there and cannot write now, which redis-py has no class for. (From
# the text of those that it has a class for, it takes the code away.)
_PASSING = ("BUSY ", "MISCONF ", "NOREPLICAS ", "UNKILLABLE ")


class _Call(NamedTuple):
    """A script, its keys and its arguments."""

    script: str
    keys: Sequence[bytes | str]
    arguments: Sequence[bytes | str | int]

    def with_marks(self, marks: "_Call") -> "_Call":
        """Rows and marks, of two calls of WRITE, in one."""
        arguments = (*self.arguments[:_MARKS_AT], *marks.arguments[_MARKS_AT:])
        return _Call(self.script, [*self.keys, *marks.keys], arguments)

    def command(self) -> Iterator[bytes | str | int]:
        """What is sent."""
        head = ("EVALSHA", script_sha(self.script), len(self.keys))
        return chain(head, self.keys, self.arguments)


class RedisRows:
    """Compare-and-set into the hashes of Feast's Redis store, a batch per round trip."""

    def __init__(self, target: ViewTarget) -> None:
        config = target.store.config
        self._target = target
        self._project = config.project
        self._ttl = str(config.online_store.key_ttl_seconds or 0)
        self._cluster = config.online_store.redis_type == RedisType.redis_cluster
        name = _versioned_fv_name(target.view, config)
        self._view = name
        version = config.entity_key_serialization_version
        self._key = entity_keys(
            lambda entity_id: bytes(
                _redis_key(config.project, target.entity_key(entity_id), version)
            )
        )
        self._timestamp_field = f"_ts:{name}".encode()
        self._fields = {
            feature.name: _mmh3(f"{name}:{feature.name}") for feature in target.view.features
        }
        self._packer = RowPacker(target, self._fields, self._timestamp_field)
        try:
            # Feast's own reading of the connection string: TLS, Sentinel and Cluster included.
            self._client: Any = RedisOnlineStore()._get_client(config.online_store)  # noqa: SLF001
            if not self._cluster:
                # Once more at once, for a connection that was closed while it idled. Waiting is
                # the worker's: redis-py's own patience would be ten seconds per call.
                self._client.set_retry(Retry(NoBackoff(), 1))
            # A connection of its own spares each batch the pool, a tenth of its time.
            self._own: Any = self._client if self._cluster else self._client.client()
            self._own.ping()
        except REDIS_ERRORS as error:
            raise translate_redis_error(error) from error

    def write(
        self,
        rows: Sequence[FeatureRow],
        *,
        topic: str = "",
        held: Marks = NO_MARKS,
        ahead: Marks = NO_MARKS,
    ) -> list[str]:
        """See OnlineRows. Rows and marks are one round trip, or two to a Cluster."""
        # The keys of one call are of one node: in a Cluster that is known of one key alone.
        step = 1 if self._cluster else _ROWS
        chunks = [rows[at : at + step] for at in range(0, len(rows), step)]
        calls = [self._writing(chunk) for chunk in chunks]
        marks = self._moving(topic, held, ahead) if held or ahead else None
        if marks is not None and calls and not self._cluster:
            calls[-1] = calls[-1].with_marks(marks)
            marks = None
        answers: list[Any] = []
        pipelined = _PIPELINED * (_ROWS if self._cluster else 1)
        for start in range(0, len(calls), pipelined):
            answers += self._execute(calls[start : start + pipelined])
        superseded = [
            chunk[place - 1].entity_id
            for chunk, answer in zip(chunks, answers, strict=True)
            for place in answer[1:]
        ]
        if marks is not None:
            answers = self._execute([marks])
        if answers and not answers[-1][0]:
            msg = f"the online store has lost what it noted of {topic}, and so rows"
            raise StoreLost(msg)
        return superseded

    def marks(self, topic: str) -> Marks | None:
        """See OnlineRows."""
        try:
            found = self._client.hgetall(self._marks_key(topic))
        except REDIS_ERRORS as error:
            raise translate_redis_error(error) from error
        return {name.decode(): int(number) for name, number in found.items()}

    def delete(self, tombstones: Sequence[Tombstone], *, guard_s: float) -> None:
        """See OnlineRows."""
        calls = [
            _Call(
                DELETE,
                [self._key(each.entity_id)],
                [*self._moment_of(each.as_of, math.ceil(guard_s)), *self._fields.values()],
            )
            for each in tombstones
        ]
        self._execute(calls)

    def replace(self, rows: Sequence[FeatureRow], seen: Sequence[datetime | None]) -> list[str]:
        """See OnlineRows."""
        calls = []
        for row, moment in zip(rows, seen, strict=True):
            found: bytes | str = "" if moment is None else encode_timestamp(moment)[2]
            arguments: list[bytes | str | int] = [found, self._ttl]
            arguments += [self._timestamp_field, encode_timestamp(row.as_of)[2]]
            for name, value in encode_row(row, self._target).items():
                arguments += [self._fields[name], value]
            calls.append(_Call(REPLACE, [self._key(row.entity_id)], arguments))
        answers = self._execute(calls)
        return [
            row.entity_id
            for row, answer in zip(rows, answers, strict=True)
            if answer == _SUPERSEDED
        ]

    def as_of(self, entity_ids: Sequence[str]) -> list[datetime | None]:
        """See OnlineRows; exact to the microsecond."""
        try:
            pipe = self._client.pipeline(transaction=False)
            for entity_id in entity_ids:
                pipe.hget(self._key(entity_id), self._timestamp_field)
            found = pipe.execute(raise_on_error=False)
        except REDIS_ERRORS as error:
            raise translate_redis_error(error) from error
        _raise_first(found)
        return [None if value is None else _moment(value) for value in found]

    def sync(self) -> None:
        """Nothing: durability is the server's configuration."""

    def close(self) -> None:
        """Close the connections."""
        self._own.close()
        self._client.close()

    def _execute(self, calls: "Sequence[_Call]") -> list[Any]:
        try:
            answers = self._send(calls)
            if any(isinstance(answer, exceptions.NoScriptError) for answer in answers):
                # The server has forgotten it, or a node of a Cluster never had it.
                for script in {call.script for call in calls}:
                    self._client.script_load(script)
                answers = self._send(calls)  # rows that were written answer that they stand
        except REDIS_ERRORS as error:
            raise translate_redis_error(error) from error
        _raise_first(answers)
        return answers

    def _send(self, calls: "Sequence[_Call]") -> list[Any]:
        if len(calls) == 1:
            try:
                return [self._own.execute_command(*calls[0].command())]
            except exceptions.NoScriptError as error:
                return [error]
        pipe = self._client.pipeline(transaction=False)
        for call in calls:  # as a Cluster's pipeline takes them too: it has no `evalsha`
            pipe.execute_command(*call.command())
        answers: list[Any] = pipe.execute(raise_on_error=False)
        return answers

    def _marks_key(self, topic: str) -> str:
        return f"llm4es:{self._project}:{self._view}:marks:{topic}"

    def _writing(self, rows: Sequence[FeatureRow]) -> _Call:
        guards, packed = self._packer.pack(rows)
        keys = [self._key(row.entity_id) for row in rows]
        head = (len(rows), self._ttl, self._timestamp_field)
        return _Call(WRITE, keys, (*head, guards, packed, self._packer.width))

    def _moving(self, topic: str, held: Marks, ahead: Marks) -> _Call:
        pairs: Iterator[str | int] = chain(*held.items(), *ahead.items())
        arguments = (*self._writing(()).arguments, len(held), *pairs)
        return _Call(WRITE, [self._marks_key(topic)], arguments)

    def _moment_of(self, as_of: datetime, guard_s: int) -> list[bytes | str | int]:
        seconds, nanos, value = encode_timestamp(as_of)
        return [seconds, nanos, guard_s, self._timestamp_field, value]


def translate_redis_error(error: Exception) -> SinkUnavailable | SinkRejected | ConfigError:
    """Say what an error of Redis means for a batch: try again, stop, or mend the credentials."""
    message = f"online store redis: {type(error).__name__}: {error}"
    if isinstance(error, _REFUSALS):
        return ConfigError(
            "online_store", f"Redis refuses us ({error})", "mend its connection_string, or its ACL"
        )
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return ConfigError(
            "online_store",
            f"no authority that we know vouches for Redis' certificate ({error})",
            "name its file in connection_string: HOST:PORT,ssl=true,ssl_ca_certs=PATH",
        )
    if isinstance(error, _BUGS):
        return SinkRejected(message)
    if isinstance(error, _AWAY) or str(error).startswith(_PASSING):
        return SinkUnavailable(message)
    return SinkRejected(message)


def _raise_first(answers: Sequence[Any]) -> None:
    """Raise what a pipeline answered: its own `raise_on_error` adds the key, so an entity's id."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise translate_redis_error(answer) from answer


def _moment(value: bytes) -> datetime:
    moment: datetime = Timestamp.FromString(value).ToDatetime(UTC)
    return moment

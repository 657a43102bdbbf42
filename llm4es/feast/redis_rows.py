"""Rows in Redis, as Feast's Redis store keeps them, written by compare-and-set.

    key    serialized entity key + project
    field  murmur3("view:feature") -> Value     "_ts:view" -> protobuf Timestamp

The script decodes the timestamp that stands and compares (seconds, nanos) exactly, so a row
that stock Feast wrote is respected like one of ours, and Feast's own check (read, then write)
cannot lose a race to us. Feast's readers notice no difference.
"""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from hashlib import sha1
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
from llm4es.features import FeatureRow

__all__ = ["REDIS_ERRORS", "RedisRows", "translate_redis_error"]

_DECODE = """
local function decode(bytes)
  local seconds, nanos, at = 0, 0, 1
  while at <= #bytes do
    local tag, value, scale = string.byte(bytes, at), 0, 1
    at = at + 1
    repeat
      local byte = string.byte(bytes, at)
      at = at + 1
      value = value + (byte % 128) * scale
      scale = scale * 128
    until byte < 128
    if tag == 8 then seconds = value elseif tag == 16 then nanos = value end
  end
  return seconds, nanos
end
"""
# KEYS: entities. ARGV: ttl (0: none), how many fields, their names, the timestamp's first; then for
# each entity seconds, nanos and values. Gives, for each, 1 written, 0 the same stands, -1 a newer
# one stands.
_SCRIPT = (
    _DECODE
    + """
local ttl, count = ARGV[1], tonumber(ARGV[2])
local answers, at = {}, 3 + count
for each, key in ipairs(KEYS) do
  local seconds, nanos = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
  local standing = redis.call('HGET', key, ARGV[3])
  local answer = 1
  if standing then
    local stood_s, stood_n = decode(standing)
    if stood_s > seconds or (stood_s == seconds and stood_n > nanos) then answer = -1
    elseif stood_s == seconds and stood_n == nanos then answer = 0 end
  end
  if answer == 1 then
    local values = {}
    for i = 1, count do
      values[2 * i - 1] = ARGV[2 + i]
      values[2 * i] = ARGV[at + 1 + i]
    end
    redis.call('HSET', key, unpack(values))
    if ttl ~= '0' then redis.call('EXPIRE', key, ttl)
    else redis.call('PERSIST', key) end -- a deleted entity's key was to end
  end
  answers[each] = answer
  at = at + 2 + count
end
return answers
"""
)
# KEYS: entity. ARGV: the timestamp's value that was seen (empty: none), ttl (0: none), then the
# hash's fields and values, the timestamp's first. -1 where another timestamp stands.
_REPLACE = """
if (redis.call('HGET', KEYS[1], ARGV[3]) or '') ~= ARGV[1] then return -1 end
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
if ARGV[2] ~= '0' then redis.call('EXPIRE', KEYS[1], ARGV[2])
else redis.call('PERSIST', KEYS[1]) end
return 1
"""
# KEYS: a topic's marks. ARGV: how many pairs (name, number known to be held) come first, then
# pairs (name, number) to move up to. 0, and nothing written, where less is held.
_MARK = """
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
# KEYS: entity. ARGV: seconds, nanos, guard in seconds, the timestamp's field and value, then the
# view's fields. The key, which other views of the entity share, ends with its guard when nothing
# but timestamps is left. Gives -1 where a newer row stands, and changes nothing then.
_DELETE = (
    _DECODE
    + """
local seconds, nanos = tonumber(ARGV[1]), tonumber(ARGV[2])
local standing = redis.call('HGET', KEYS[1], ARGV[4])
if standing then
  local stood_s, stood_n = decode(standing)
  if stood_s > seconds or (stood_s == seconds and stood_n > nanos) then return -1 end
end
redis.call('HDEL', KEYS[1], unpack(ARGV, 6))
redis.call('HSET', KEYS[1], ARGV[4], ARGV[5])
for _, name in ipairs(redis.call('HKEYS', KEYS[1])) do
  if string.sub(name, 1, 4) ~= '_ts:' then return 1 end
end
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""
)
_SUPERSEDED = -1
_PIPELINED = 8  # calls of one round trip
_ROWS = 64  # of one call: the server does nothing else meanwhile
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
        try:
            # Feast's own reading of the connection string: TLS, Sentinel and Cluster included.
            self._client: Any = RedisOnlineStore()._get_client(config.online_store)  # noqa: SLF001
            if not self._cluster:
                # Once more at once, for a connection that was closed while it idled. Waiting is
                # the worker's: redis-py's own patience would be ten seconds per call.
                self._client.set_retry(Retry(NoBackoff(), 1))
            self._client.ping()
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
        """See OnlineRows. The marks go with the last rows, behind them, in one round trip."""
        # The keys of one call are of one node: in a cluster that is known of one key alone.
        step = 1 if self._cluster else _ROWS
        calls = [self._writing(rows[at : at + step]) for at in range(0, len(rows), step)]
        if held or ahead:
            pairs = [text for pair in (*held.items(), *ahead.items()) for text in pair]
            calls.append(_Call(_MARK, [self._marks_key(topic)], [len(held), *pairs]))
        answers: list[Any] = []
        pipelined = _PIPELINED * (_ROWS if self._cluster else 1)
        for start in range(0, len(calls), pipelined):
            answers += self._execute(calls[start : start + pipelined])
        if (held or ahead) and not answers.pop():
            msg = f"the online store has lost what it noted of {topic}, and so rows"
            raise StoreLost(msg)
        return [
            row.entity_id
            for row, answer in zip(rows, chain.from_iterable(answers), strict=True)
            if answer == _SUPERSEDED
        ]

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
                _DELETE,
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
            calls.append(_Call(_REPLACE, [self._key(row.entity_id)], arguments))
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
        self._client.close()

    def _execute(self, calls: "Sequence[_Call]") -> list[Any]:
        try:
            answers = self._send(calls)
            if any(isinstance(answer, exceptions.NoScriptError) for answer in answers):
                for script in {call.script for call in calls}:
                    self._client.script_load(script)
                answers = self._send(calls)  # rows that were written answer "the same stands"
        except REDIS_ERRORS as error:
            raise translate_redis_error(error) from error
        _raise_first(answers)
        return answers

    def _send(self, calls: "Sequence[_Call]") -> list[Any]:
        pipe = self._client.pipeline(transaction=False)
        for call in calls:
            if self._cluster:  # a cluster's pipeline refuses EVALSHA
                pipe.eval(call.script, len(call.keys), *call.keys, *call.arguments)
            else:
                pipe.execute_command(
                    "EVALSHA", _sha(call.script), len(call.keys), *call.keys, *call.arguments
                )
        answers: list[Any] = pipe.execute(raise_on_error=False)
        return answers

    def _marks_key(self, topic: str) -> str:
        return f"llm4es:{self._project}:{self._view}:marks:{topic}"

    def _writing(self, rows: Sequence[FeatureRow]) -> _Call:
        names = [self._timestamp_field, *self._fields.values()]
        arguments: list[bytes | str | int] = [self._ttl, len(names), *names]
        for row in rows:
            seconds, nanos, moment = encode_timestamp(row.as_of)
            values = encode_row(row, self._target)
            arguments += [seconds, nanos, moment]
            arguments += [values[name] for name in self._fields]
        return _Call(_SCRIPT, [self._key(row.entity_id) for row in rows], arguments)

    def _moment_of(self, as_of: datetime, guard_s: int) -> list[bytes | str | int]:
        seconds, nanos, value = encode_timestamp(as_of)
        return [seconds, nanos, guard_s, self._timestamp_field, value]


@cache
def _sha(script: str) -> str:
    return sha1(script.encode(), usedforsecurity=False).hexdigest()


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

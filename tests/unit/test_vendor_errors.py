"""Every error of a vendor has a counterpart in our tree, and the important ones the right one.

A vendor's new error fails here until someone has said what it means.
"""

import sqlite3
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from redis import exceptions as redis_errors

from llm4es.errors import (
    ConfigError,
    LLM4ESError,
    SinkRejected,
    SinkUnavailable,
    SourceUnavailable,
)
from llm4es.feast.redis_rows import REDIS_ERRORS, translate_redis_error
from llm4es.feast.sqlite_rows import translate_sqlite_error
from stream_worker.sources import kafka_client
from stream_worker.sources.kafka_client import KafkaError, translate

kafka_errors: Any = vars(kafka_client)["kafka_errors"]  # loaded there without its warnings

REDIS: dict[type[LLM4ESError], set[str]] = {
    SinkUnavailable: {
        "AskError", "BusyLoadingError", "ClusterDownError", "ClusterError", "ConnectionError",
        "ExternalAuthProviderError", "InvalidResponse", "MasterDownError", "MaxConnectionsError",
        "MovedError", "OutOfMemoryError", "ReadOnlyError", "RedisClusterException",
        "SlotNotCoveredError", "TimeoutError", "TryAgainError", "WatchError",
    },
    ConfigError: {
        "AuthenticationError", "AuthenticationWrongNumberOfArgsError", "AuthorizationError",
        "NoPermissionError",
    },
    SinkRejected: {
        "ClusterCrossSlotError", "CrossSlotTransactionError", "DataError", "ExecAbortError",
        "InvalidPipelineStack", "LockError", "LockNotOwnedError", "ModuleError", "NoScriptError",
        "PubSubError", "RedisError", "ResponseError",
    },
}  # fmt: skip
# Of locks within one process and of client-side caching, which we use neither of.
NOT_RAISED_TO_US = {"ChildDeadlockedError", "IncorrectPolicyType"}

PASSING_CODES = {
    "SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_IOERR", "SQLITE_FULL", "SQLITE_CANTOPEN",
    "SQLITE_READONLY", "SQLITE_NOMEM", "SQLITE_PROTOCOL",
}  # fmt: skip


def errors_of(module: ModuleType) -> Iterator[type[Exception]]:
    for name, value in vars(module).items():
        if isinstance(value, type) and issubclass(value, Exception) and value.__name__ == name:
            yield value


def test_every_error_of_redis_is_known_and_means_what_the_table_says() -> None:
    known = {name: ours for ours, names in REDIS.items() for name in names}
    found = {kind.__name__: kind for kind in errors_of(redis_errors)}
    assert set(found) == set(known) | NOT_RAISED_TO_US
    for name, ours in known.items():
        moved = issubclass(found[name], redis_errors.AskError)
        error = found[name]("1 127.0.0.1:6379" if moved else "said so")
        assert isinstance(error, REDIS_ERRORS), f"{name} passes by the adapter"
        assert type(translate_redis_error(error)) is ours, name


@pytest.mark.parametrize(
    ("answer", "ours"),
    [
        ("MISCONF Redis is configured to save RDB snapshots", SinkUnavailable),
        ("NOREPLICAS Not enough good replicas to write.", SinkUnavailable),
        ("BUSY Redis is busy running a script.", SinkUnavailable),
        ("UNKILLABLE Sorry the script already executed write commands", SinkUnavailable),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", SinkRejected),
        ("BUSYKEY Target key name already exists.", SinkRejected),
        ("unknown command", SinkRejected),
    ],
)
def test_answers_that_redis_py_has_no_class_for_are_told_by_their_code(
    answer: str, ours: type[LLM4ESError]
) -> None:
    assert type(translate_redis_error(redis_errors.ResponseError(answer))) is ours


@pytest.mark.parametrize("error", [ConnectionRefusedError("refused"), TimeoutError("slow")])
def test_a_socket_that_fails_means_that_the_store_is_away(error: OSError) -> None:
    assert isinstance(error, REDIS_ERRORS)
    assert type(translate_redis_error(error)) is SinkUnavailable
    assert type(translate_sqlite_error(error)) is SinkUnavailable


def test_every_error_of_sqlite_has_a_counterpart() -> None:
    for kind in errors_of(sqlite3):
        # One without a code is raised by Python's own module: for a misuse, which is our bug.
        assert type(translate_sqlite_error(kind("said so"))) is SinkRejected, kind
        if kind is not sqlite3.Warning:  # of which Python raises none since 3.8
            assert issubclass(kind, sqlite3.Error), f"{kind} passes by the adapter"


def test_every_code_of_sqlite_is_passing_or_our_bug_with_its_extended_codes() -> None:
    names = {
        name: code
        for name, code in vars(sqlite3).items()
        if name.startswith("SQLITE_")
        and isinstance(code, int)
        # The module's other numbers share the prefix: authorizer actions and limits.
        and name.removeprefix("SQLITE_").split("_")[0] in _RESULTS
    }
    assert set(PASSING_CODES) <= set(names)
    for name, code in names.items():
        error = sqlite3.OperationalError("said so")
        error.sqlite_errorcode = code
        primary = "_".join(name.split("_")[:2])
        ours = SinkUnavailable if primary in PASSING_CODES else SinkRejected
        assert type(translate_sqlite_error(error)) is ours, name


_RESULTS = {
    "ERROR", "INTERNAL", "PERM", "ABORT", "BUSY", "LOCKED", "NOMEM", "READONLY", "INTERRUPT",
    "IOERR", "CORRUPT", "NOTFOUND", "FULL", "CANTOPEN", "PROTOCOL", "EMPTY", "SCHEMA", "TOOBIG",
    "CONSTRAINT", "MISMATCH", "MISUSE", "NOLFS", "AUTH", "FORMAT", "RANGE", "NOTADB",
}  # fmt: skip


def kafka_error(kind: type[Exception]) -> Exception:
    try:
        return kind("said so")
    except TypeError:
        return kind("said so", {})  # LogTruncationError, with its offsets


KAFKA_KINDS = list(errors_of(kafka_errors))


@pytest.mark.parametrize("kind", KAFKA_KINDS, ids=lambda kind: kind.__name__)
def test_every_error_of_kafka_has_a_counterpart_and_one_that_passes_is_waited_for(
    kind: type[Exception],
) -> None:
    assert issubclass(kind, KafkaError), "it passes by the adapter"
    ours = translate(kafka_error(kind))
    assert isinstance(ours, SourceUnavailable | ConfigError)
    # kafka-python says itself what is worth another try; a topic that is not there is not, to us.
    if getattr(kind, "retriable", False) and kind is not kafka_errors.UnknownTopicOrPartitionError:
        assert isinstance(ours, SourceUnavailable)


@pytest.mark.parametrize(
    ("kind", "ours"),
    [
        (kafka_errors.KafkaConnectionError, SourceUnavailable),
        (kafka_errors.KafkaTimeoutError, SourceUnavailable),
        (kafka_errors.RequestTimedOutError, SourceUnavailable),
        (kafka_errors.NotLeaderForPartitionError, SourceUnavailable),
        (kafka_errors.CoordinatorNotAvailableError, SourceUnavailable),
        (kafka_errors.RebalanceInProgressError, SourceUnavailable),
        (kafka_errors.CommitFailedError, SourceUnavailable),
        (kafka_errors.NotEnoughReplicasError, SourceUnavailable),
        (kafka_errors.TopicAuthorizationFailedError, ConfigError),
        (kafka_errors.GroupAuthorizationFailedError, ConfigError),
        (kafka_errors.SaslAuthenticationFailedError, ConfigError),
        (kafka_errors.UnsupportedSaslMechanismError, ConfigError),
        (kafka_errors.UnknownTopicOrPartitionError, ConfigError),
        (kafka_errors.InvalidTopicError, ConfigError),
        (kafka_errors.InvalidSessionTimeoutError, ConfigError),
        (kafka_errors.KafkaConfigurationError, ConfigError),
        (kafka_errors.IncompatibleBrokerVersion, ConfigError),
    ],
)
def test_important_errors_of_kafka_mean_what_the_table_says(
    kind: type[Exception], ours: type[LLM4ESError]
) -> None:
    assert type(translate(kind("said so"))) is ours

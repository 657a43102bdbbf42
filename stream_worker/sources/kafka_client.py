"""What every Kafka client of ours shares: how it is configured, and what its errors mean."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llm4es.errors import ConfigError, LLM4ESError, SourceUnavailable

with warnings.catch_warnings():
    # kafka-python 3.0 reads its schemas through an importlib.resources call that 3.11 deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from kafka import ConsumerRebalanceListener, KafkaConsumer, KafkaProducer
    from kafka import errors as kafka_errors
    from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
    from kafka.errors import KafkaError
    from kafka.structs import OffsetAndMetadata
    from kafka.structs import TopicPartition as kafka_partition  # noqa: N813 - ours has the name

__all__ = [
    "TOO_LARGE",
    "ConsumerRebalanceListener",
    "KafkaConsumer",
    "KafkaError",
    "KafkaProducer",
    "KafkaSettings",
    "OffsetAndMetadata",
    "admin",
    "group_members",
    "kafka_partition",
    "mapped",
    "topic_configs",
    "translate",
]

# What a topic, or a producer, says of a single record; a batch of several is split and sent again.
TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
_REFUSALS = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
)
_MISCONFIGURED = (
    kafka_errors.KafkaConfigurationError,
    kafka_errors.InvalidTopicError,
    kafka_errors.InvalidGroupIdError,
    kafka_errors.InvalidSessionTimeoutError,
    kafka_errors.UnsupportedVersionError,
    kafka_errors.UnsupportedCodecError,
    kafka_errors.UnsupportedCompressionTypeError,
    kafka_errors.InvalidConfigurationError,
    kafka_errors.SecurityDisabledError,
    kafka_errors.IllegalSaslStateError,
    kafka_errors.InconsistentGroupProtocolError,
    kafka_errors.GroupMaxSizeReachedError,
    kafka_errors.FencedInstanceIdError,
    *TOO_LARGE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KafkaSettings:
    """Where the brokers are, and how patient we are with them."""

    bootstrap_servers: str
    bootstrap_timeout_ms: int = 10_000
    request_timeout_ms: int = 30_000

    def client_config(self) -> dict[str, Any]:
        """Keyword arguments for any kafka-python client."""
        return {
            "bootstrap_servers": self.bootstrap_servers.split(","),
            "bootstrap_timeout_ms": self.bootstrap_timeout_ms,
            "client_id": "llm4es",
        }


def translate(error: Exception) -> LLM4ESError:
    """Map an error of kafka-python to ours: refused, misconfigured, or away for now."""
    detail = str(error) or type(error).__name__
    if isinstance(error, _REFUSALS):
        return ConfigError("kafka", f"the broker refuses us ({detail})", "mend credentials or ACLs")
    if isinstance(error, kafka_errors.UnknownTopicOrPartitionError):
        return ConfigError("topic", f"Kafka does not know it ({detail})", "create the topic")
    if isinstance(error, _MISCONFIGURED):
        return ConfigError("kafka", detail, "mend the Kafka settings")
    return SourceUnavailable(
        f"Kafka cannot be reached or does not answer ({detail}); look at bootstrap_servers"
    )


@contextmanager
def mapped() -> Iterator[None]:
    """Raise kafka-python's errors as ours."""
    try:
        yield
    except KafkaError as error:
        raise translate(error) from error


@contextmanager
def admin(settings: KafkaSettings) -> Iterator[KafkaAdminClient]:
    """Open an admin client for a few questions."""
    with mapped():
        client = KafkaAdminClient(
            **settings.client_config(), request_timeout_ms=settings.request_timeout_ms
        )
    try:
        with mapped():
            yield client
    finally:
        client.close()


def topic_configs(client: KafkaAdminClient, topic: str) -> dict[str, str]:
    """Every configuration value of a topic, defaults included."""
    found = client.describe_configs(
        [ConfigResource(ConfigResourceType.TOPIC, topic)], config_filter="all"
    )
    return {name: entry["value"] for name, entry in found["topic"][topic].items()}


def group_members(client: KafkaAdminClient, group: str) -> int:
    """How many consumers a group has now; 0 where Kafka does not know it."""
    try:
        found = client.describe_groups([group])
    except kafka_errors.GroupIdNotFoundError:
        return 0
    return len(found[group]["members"])

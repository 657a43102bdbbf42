"""What every Kafka client of ours shares: how it is configured, and what its errors mean."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from llm4es.errors import ConfigError, LLM4ESError, SourceUnavailable
from llm4es.events import EPOCH, Record
from stream_worker.sources.kafka_login import why_login_fails
from stream_worker.sources.kafka_security import KafkaSecurity

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
    "FENCED",
    "TOO_LARGE",
    "ConsumerRebalanceListener",
    "KafkaConsumer",
    "KafkaError",
    "KafkaProducer",
    "KafkaSettings",
    "OffsetAndMetadata",
    "admin",
    "connecting",
    "group_members",
    "kafka_partition",
    "mapped",
    "to_record",
    "topic_configs",
    "translate",
]

# What a topic, or a producer, says of a single record; a batch of several is split and sent again.
TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
# What tells a transactional producer that another one has its `transactional_id` by now.
FENCED = (kafka_errors.ProducerFencedError, kafka_errors.InvalidProducerEpochError)
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
    security: KafkaSecurity = field(default_factory=KafkaSecurity)
    bootstrap_timeout_ms: int = 10_000
    request_timeout_ms: int = 30_000

    def client_config(self) -> dict[str, Any]:
        """Keyword arguments for any kafka-python client."""
        return {
            "bootstrap_servers": self.bootstrap_servers.split(","),
            "bootstrap_timeout_ms": self.bootstrap_timeout_ms,
            "client_id": "llm4es",
            **self.security.client_config(),
        }


def translate(error: Exception) -> LLM4ESError:
    """Map an error of kafka-python to ours: refused, misconfigured, or away for now."""
    detail = str(error) or type(error).__name__
    problem = _security_problem(error, detail)
    if problem is not None:
        return problem
    if isinstance(error, _REFUSALS):
        return ConfigError("kafka", f"the broker refuses us ({detail})", "mend credentials or ACLs")
    if isinstance(error, kafka_errors.UnknownTopicOrPartitionError):
        return ConfigError("topic", f"Kafka does not know it ({detail})", "create the topic")
    if isinstance(error, _MISCONFIGURED):
        return ConfigError("kafka", detail, "mend the Kafka settings")
    return SourceUnavailable(
        f"Kafka cannot be reached or does not answer ({detail}); look at bootstrap_servers and "
        "security_protocol"
    )


def _security_problem(error: Exception, detail: str) -> ConfigError | None:
    """Name the setting that keeps us from being let in, or from trusting who answers."""
    if isinstance(error, kafka_errors.SaslAuthenticationFailedError):
        return ConfigError(
            "sasl_password",
            f"Kafka does not accept it, or sasl_username ({detail})",
            "set LLM4ES_SASL_PASSWORD and sasl_username to what the brokers know",
        )
    if isinstance(error, kafka_errors.UnsupportedSaslMechanismError):
        return ConfigError(
            "sasl_mechanism", f"Kafka does not offer it ({detail})", "name one that it does"
        )
    if "CERTIFICATE_VERIFY_FAILED" in detail:
        return ConfigError(
            "ssl_ca_file",
            f"it does not vouch for Kafka's certificate ({detail})",
            "name the file of the authority that signed it",
        )
    return None


@contextmanager
def mapped() -> Iterator[None]:
    """Raise kafka-python's errors as ours."""
    try:
        yield
    except KafkaError as error:
        raise translate(error) from error


@contextmanager
def connecting(settings: KafkaSettings) -> Iterator[None]:
    """As `mapped`, for making a client: that raises a timeout, and tells its log alone why."""
    logger = logging.getLogger("kafka.net.manager")
    heard = _Causes(shown_from=logger.getEffectiveLevel())
    before = logger.level
    logger.setLevel(min(logging.WARNING, heard.shown_from))
    logger.addFilter(heard)
    try:
        yield
    except KafkaError as error:
        cause = heard.cause or why_login_fails(settings.client_config()) or error
        raise translate(cause) from error
    finally:
        logger.removeFilter(heard)
        logger.setLevel(before)


class _Causes(logging.Filter):
    """Keeps the error that says we are refused, and lets through what is shown anyway."""

    def __init__(self, *, shown_from: int) -> None:
        super().__init__()
        self.shown_from = shown_from
        self.cause: Exception | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        for argument in record.args if isinstance(record.args, tuple) else ():
            if isinstance(argument, KafkaError) and isinstance(translate(argument), ConfigError):
                self.cause = argument  # the attempts after it may just time out
        return record.levelno >= self.shown_from


@contextmanager
def admin(settings: KafkaSettings) -> Iterator[KafkaAdminClient]:
    """Open an admin client for a few questions."""
    with connecting(settings):
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


def to_record(raw: Any) -> Record:  # noqa: ANN401 - kafka-python's ConsumerRecord has no type
    """Read what a consumer gives."""
    return Record(
        topic=raw.topic,
        partition=raw.partition,
        offset=raw.offset,
        timestamp=_moment(raw.timestamp),
        key=raw.key,
        value=raw.value,
        headers=tuple(raw.headers),
    )


def _moment(timestamp_ms: int) -> datetime | None:
    """Read a timestamp; None where there is none (-1), or a producer sent one that is no time."""
    if timestamp_ms < 0:
        return None
    try:
        return EPOCH + timedelta(milliseconds=timestamp_ms)
    except OverflowError:
        return None


def group_members(client: KafkaAdminClient, group: str) -> int:
    """How many consumers a group has now; 0 where Kafka does not know it."""
    try:
        found = client.describe_groups([group])
    except kafka_errors.GroupIdNotFoundError:
        return 0
    return len(found[group]["members"])

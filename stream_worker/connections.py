"""From settings to how Kafka is reached, and what its values are."""

from pydantic import SecretStr

from stream_worker.formats.decoding import FormatName, ValueFormat
from stream_worker.formats.registry import SchemaRegistrySettings
from stream_worker.settings import WorkerSettings
from stream_worker.sources.kafka_client import KafkaSettings
from stream_worker.sources.kafka_security import KafkaSecurity

__all__ = ["kafka_settings", "value_format"]


def kafka_settings(settings: WorkerSettings, bootstrap_servers: str) -> KafkaSettings:
    """Reach these brokers as the settings say. Raises ConfigError for what does not fit."""
    return KafkaSettings(
        bootstrap_servers=bootstrap_servers,
        security=KafkaSecurity(
            protocol=settings.security_protocol,
            mechanism=settings.sasl_mechanism,
            username=settings.sasl_username,
            password=_revealed(settings.sasl_password),
            ca_file=settings.ssl_ca_file,
            cert_file=settings.ssl_cert_file,
            key_file=settings.ssl_key_file,
            key_password=_revealed(settings.ssl_key_password),
        ),
    )


def value_format(
    settings: WorkerSettings, name: FormatName = "json", schema: str | None = None
) -> ValueFormat:
    """Take what the settings say before what the view's source does (its format, and its schema).

    The source's schema is that of an Avro record, or the name of a Protobuf message.
    """
    chosen = settings.value_format or name
    same = chosen == name
    url = settings.schema_registry_url
    return ValueFormat(
        name=chosen,
        schema_text=schema if same and chosen == "avro" else None,
        schema_file=settings.value_schema,
        message=settings.value_message or (schema if same and chosen == "protobuf" else None),
        registry=None
        if url is None
        else SchemaRegistrySettings(
            url=url,
            username=settings.schema_registry_user,
            password=_revealed(settings.schema_registry_password),
            ca_file=settings.schema_registry_ca_file,
        ),
        max_depth=settings.max_json_depth,
    )


def _revealed(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()

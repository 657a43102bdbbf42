"""From settings to how Kafka is reached."""

from pydantic import SecretStr

from stream_worker.settings import WorkerSettings
from stream_worker.sources.kafka_client import KafkaSettings
from stream_worker.sources.kafka_security import KafkaSecurity

__all__ = ["kafka_settings"]


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


def _revealed(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()

"""How Kafka is told who we are, and how we know that it is Kafka: SASL and TLS."""

import logging
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm4es.errors import ConfigError

__all__ = ["KafkaSecurity", "Mechanism", "Protocol"]

log = logging.getLogger(__name__)

Protocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
Mechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KafkaSecurity:
    """Credentials and certificates (PEM files). Raises ConfigError for what does not fit."""

    protocol: Protocol = "PLAINTEXT"
    mechanism: Mechanism | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: Path | None = None  # the system's authorities where it is None
    cert_file: Path | None = None
    key_file: Path | None = None
    key_password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse what would be sent nowhere, or is missing."""
        sasl = {
            "sasl_mechanism": self.mechanism,
            "sasl_username": self.username,
            "sasl_password": self.password,
        }
        tls = {"ssl_ca_file": self.ca_file, "ssl_cert_file": self.cert_file}
        self._refuse_misfits(sasl, "SASL_PLAINTEXT or SASL_SSL", used=self.sasl)
        self._refuse_misfits(tls, "SSL or SASL_SSL", used=self.tls)
        for name, value in sasl.items() if self.sasl else ():
            if value is None:
                raise ConfigError(name, f"is needed by security_protocol {self.protocol}", "set it")
        if (self.key_file is None) != (self.cert_file is None):
            raise ConfigError(
                "ssl_cert_file", "goes with ssl_key_file", "set both of them, or neither"
            )
        if self.protocol == "SASL_PLAINTEXT" and self.mechanism == "PLAIN":
            log.warning("the password goes to Kafka in clear text: use SASL_SSL")

    @property
    def sasl(self) -> bool:
        """Whether we say who we are."""
        return self.protocol.startswith("SASL")

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.protocol.endswith("SSL")

    def client_config(self) -> dict[str, Any]:
        """Keyword arguments for any kafka-python client. Raises ConfigError for broken files."""
        config: dict[str, Any] = {"security_protocol": self.protocol}
        if self.sasl:
            config |= {
                "sasl_mechanism": self.mechanism,
                "sasl_plain_username": self.username,
                "sasl_plain_password": self.password,
            }
        if self.tls:
            config["ssl_context"] = self._context()
        return config

    def _context(self) -> ssl.SSLContext:
        for name, path in (
            ("ssl_ca_file", self.ca_file),
            ("ssl_cert_file", self.cert_file),
            ("ssl_key_file", self.key_file),
        ):
            if path is not None and not path.is_file():
                raise ConfigError(name, f"{path} is no file", "name a PEM file")
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                "ssl_ca_file", f"{self.ca_file} holds no certificate ({error})", "name a PEM file"
            ) from error
        if self.cert_file is not None:
            try:
                context.load_cert_chain(self.cert_file, self.key_file, self.key_password or "")
            except (ssl.SSLError, OSError, ValueError) as error:
                raise ConfigError(
                    "ssl_cert_file",
                    f"{self.cert_file} and its key cannot be used ({error})",
                    "look at ssl_key_file, and LLM4ES_SSL_KEY_PASSWORD",
                ) from error
        return context

    def _refuse_misfits(self, given: dict[str, Any], protocols: str, *, used: bool) -> None:
        for name, value in given.items():
            if value is not None and not used:
                raise ConfigError(
                    name,
                    f"is set, and security_protocol {self.protocol} does not use it",
                    f"set security_protocol to {protocols}",
                )

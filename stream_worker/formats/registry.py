"""Schemas by id, from a registry that speaks Confluent's API."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llm4es.errors import ConfigError, InvalidEvent, SourceUnavailable

__all__ = ["FoundSchema", "SchemaRegistry", "SchemaRegistrySettings", "SchemaSource"]

_TIMEOUT_S = 10.0
_UNKNOWN_FOR_S = 10.0  # before an id that was not known is asked for again
_NOT_FOUND = 404
_NO_KEY = {401, 403}


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaRegistrySettings:
    """Where the registry is, and who we are to it."""

    url: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: Path | None = None


@dataclass(frozen=True, slots=True)
class FoundSchema:
    """A schema as the registry has it, and those that it refers to, each after its own."""

    kind: str  # AVRO, PROTOBUF or JSON
    text: str
    references: tuple[str, ...] = ()


class SchemaSource(Protocol):
    """What decoders ask: schemas by id."""

    def schema(self, schema_id: int) -> FoundSchema:
        """Give it. Raises InvalidEvent where there is none, SourceUnavailable, ConfigError."""
        ...


class SchemaRegistry:
    """See SchemaSource. A schema of an id never changes: each is asked for once.

    Raises ConfigError where the client is not installed, or the URL is none.
    """

    def __init__(self, settings: SchemaRegistrySettings) -> None:
        try:
            from confluent_kafka.schema_registry import SchemaRegistryClient  # noqa: PLC0415 - extra
        except ImportError as error:
            raise ConfigError(
                "schema_registry_url",
                f"its client is not installed ({error})",
                "install the extra: pip install 'llm4es[formats]'",
            ) from error
        config: dict[str, Any] = {"url": settings.url, "timeout": _TIMEOUT_S, "max.retries": 0}
        if settings.username is not None:
            config["basic.auth.user.info"] = f"{settings.username}:{settings.password or ''}"
        if settings.ca_file is not None:
            config["ssl.ca.location"] = str(settings.ca_file)
        try:
            self._client = SchemaRegistryClient(config)
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(
                "schema_registry_url", f"cannot be used ({error})", "write http://host:port"
            ) from error
        self._found: dict[int, FoundSchema] = {}
        self._unknown: dict[int, float] = {}  # until when

    def schema(self, schema_id: int) -> FoundSchema:
        """See SchemaSource."""
        if schema_id not in self._found:
            if self._unknown.get(schema_id, 0.0) > time.monotonic():
                raise _unknown(schema_id)
            try:
                with _mapped():
                    self._found[schema_id] = self._fetch(schema_id)
            except _NotFoundError as error:
                self._unknown[schema_id] = time.monotonic() + _UNKNOWN_FOR_S
                raise _unknown(schema_id) from error
        return self._found[schema_id]

    def _fetch(self, schema_id: int) -> FoundSchema:
        schema = self._client.get_schema(schema_id)
        references: dict[str, str] = {}
        self._collect(schema.references or (), references)
        return FoundSchema(
            schema.schema_type or "AVRO", schema.schema_str or "", tuple(references.values())
        )

    def _collect(self, references: Any, found: dict[str, str]) -> None:  # noqa: ANN401 - the client's
        for reference in references:
            if reference.name in found:
                continue
            schema = self._client.get_version(reference.subject, reference.version).schema
            self._collect(schema.references or (), found)
            found[reference.name] = schema.schema_str or ""


class _NotFoundError(Exception):
    pass


@contextmanager
def _mapped() -> Iterator[None]:
    from confluent_kafka.schema_registry import SchemaRegistryError  # noqa: PLC0415 - extra

    try:
        yield
    except SchemaRegistryError as error:
        if error.http_status_code == _NOT_FOUND:
            raise _NotFoundError from error
        if error.http_status_code in _NO_KEY:
            raise ConfigError(
                "schema_registry_url",
                f"the registry refuses us ({error.error_message})",
                "mend schema_registry_user and LLM4ES_SCHEMA_REGISTRY_PASSWORD",
            ) from error
        raise _away(error) from error
    except json.JSONDecodeError as error:
        raise _away(error) from error
    except Exception as error:
        # Its HTTP client's errors, which change with its versions; a bug would be tried again.
        raise _away(error) from error


def _away(error: Exception) -> SourceUnavailable:
    detail = str(error) or type(error).__name__
    return SourceUnavailable(f"the schema registry cannot be reached or does not answer ({detail})")


def _unknown(schema_id: int) -> InvalidEvent:
    return InvalidEvent("schema_id", f"the registry knows no schema {schema_id}")

"""Everything that can be set: flag over environment (`LLM4ES_...`) over file over default."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)
from pydantic_settings.exceptions import SettingsError

from stream_worker.formats.decoding import FormatName
from stream_worker.sources.kafka_security import Mechanism, Protocol

__all__ = ["ENV_PREFIX", "SettingsProblem", "WorkerSettings", "load_settings"]

ENV_PREFIX = "LLM4ES_"
_CENTURY_MS = 100 * 365 * 86_400_000


class SettingsProblem(Exception):
    """A setting is wrong: its name, what is wrong with it, and what to do."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field = field


class WorkerSettings(BaseSettings):
    """What `run` and `inspect` need to know. Frozen; secrets are masked when printed."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, env_ignore_empty=True
    )

    bundle: Path = Field(Path("build/demo/bundle"), description="Folder of the bundle")
    feature_repo: Path = Field(Path("feature_repo"), description="Folder of the Feast repository")
    feature_store_file: str = Field(
        "feature_store.yaml", description="Feast's configuration, in that folder"
    )
    source: Literal["kafka", "file"] = Field("kafka", description="Where records come from")

    bootstrap_servers: str | None = Field(
        None, description="Kafka's brokers; the feature view's source names them by default"
    )
    security_protocol: Protocol = Field("PLAINTEXT", description="How Kafka is spoken to")
    sasl_mechanism: Mechanism | None = Field(None, description="How we say who we are to Kafka")
    sasl_username: str | None = Field(None, description="Who we are to Kafka")
    sasl_password: SecretStr | None = Field(None, description="Kafka's password of sasl_username")
    ssl_ca_file: Path | None = Field(
        None, description="PEM file that vouches for Kafka [default: the system's authorities]"
    )
    ssl_cert_file: Path | None = Field(None, description="PEM file of our certificate for Kafka")
    ssl_key_file: Path | None = Field(None, description="PEM file of its key")
    ssl_key_password: SecretStr | None = Field(None, description="What ssl_key_file is locked with")
    topic: str | None = Field(
        None, description="Topic of events; the feature view's source names it by default"
    )
    dead_letter_topic: str | None = Field(None, description="[default: TOPIC.dead-letters]")
    group: str | None = Field(None, description="Consumer group [default: llm4es-ENTITY-BUNDLE]")
    group_instance_id: str | None = Field(None, description="Static membership's id (KIP-345)")
    session_timeout_ms: int = Field(10_000, ge=1, description="Kafka's session timeout")
    max_poll_interval_ms: int = Field(300_000, ge=1, description="Longest time between two polls")

    value_format: FormatName | None = Field(
        None, description="How values are written; the feature view's source says so by default"
    )
    value_schema: Path | None = Field(
        None, description="Avro: an .avsc file; Protobuf: what --descriptor_set_out of protoc made"
    )
    value_message: str | None = Field(None, description="Protobuf: full name of the message")
    schema_registry_url: str | None = Field(
        None, description="Schema registry; with one, values are framed as Confluent's clients do"
    )
    schema_registry_user: str | None = Field(None, description="Who we are to the registry")
    schema_registry_password: SecretStr | None = Field(
        None, description="The registry's password of schema_registry_user"
    )
    schema_registry_ca_file: Path | None = Field(
        None, description="PEM file that vouches for the registry"
    )
    max_json_depth: int = Field(64, ge=1, description="JSON that is nested deeper is a bad record")
    events: Path | None = Field(None, description="Event log (.jsonl, .parquet) of --source file")
    partitions: int = Field(4, ge=1, description="Partitions the file is read as")
    recorded_at_field: str | None = Field(
        None, description="Field of a file's records that says when the log got them"
    )
    availability_delay_ms: int = Field(
        0,
        ge=0,
        le=_CENTURY_MS,
        description="How long after it occurred an event of a file is known",
    )

    window_store: SecretStr = Field(
        SecretStr("sqlite:build/state/windows.db"),
        description="sqlite:PATH for one worker; redis://..., redis+sentinel://... or "
        "redis+cluster://... for a group",
    )
    deletion_key: SecretStr | None = Field(
        None, description="Hashes ids of deleted entities; tombstones are bad records without it"
    )
    deletion_guard_s: float = Field(
        7 * 86_400.0, gt=0, description="How long a deleted entity's timestamp stays online"
    )
    from_snapshot: Path | None = Field(
        None, description="Snapshot that a fresh window store is filled from"
    )
    state_dir: Path = Field(
        Path("build/state"),
        description="Folder of what ops keep, and of dead-letters.jsonl with --source file",
    )

    max_records: int = Field(512, ge=1, description="Records of one batch at most")
    max_batch_tokens: int = Field(
        65_536, ge=1, description="Tokens given to the model at once at most"
    )
    drain_timeout_ms: int = Field(
        10_000, ge=1, description="Longest time a batch holds up a rebalance of the group"
    )
    sink_retry_ms: int = Field(
        5_000, ge=0, description="How long a sink that is away is tried before a batch is read anew"
    )
    hot_window_events: int = Field(
        100_000, ge=0, description="Events of the windows kept in memory between batches"
    )
    poll_timeout_ms: int = Field(200, ge=1, description="How long a poll waits for records")
    max_value_bytes: int = Field(1 << 20, ge=1, description="Larger records are dead letters")
    every_event: bool = Field(
        default=False, description="One row per event, not one per changed entity of a batch"
    )
    until_end: bool = Field(default=False, description="Stop at the end of the log")
    unproven_start: bool = Field(
        default=False, description="Accept a log whose beginning retention has taken"
    )

    journal_roll_rows: int = Field(20_000, ge=1, description="Rows of one offline Parquet part")
    journal_roll_s: float = Field(10.0, gt=0, description="Seconds before a part is rolled")

    device: Literal["auto", "cpu", "openvino", "cuda", "tensorrt"] = Field(
        "auto", description="Where the model runs"
    )
    threads: int | None = Field(
        None, ge=1, description="The model's threads [default: the CPUs this process is given]"
    )
    kv_cache_bytes: int = Field(
        1 << 30, ge=0, description="Memory for open chapters' keys and values; 0 keeps none"
    )
    kv_spill_folder: Path | None = Field(
        None, description="Local folder for what does not fit there"
    )
    kv_spill_bytes: int = Field(16 << 30, ge=0, description="Most that is written there")
    metrics_port: int | None = Field(
        None, ge=1, le=65_535, description="Serve Prometheus metrics here"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="How what is logged is written to stderr"
    )
    trace_endpoint: str | None = Field(
        None, description="Send traces of batches here by OTLP over HTTP (extra: otel)"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic's signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags over environment over the file that a subclass names."""
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)


def load_settings(flags: Mapping[str, Any], config: Path | None) -> WorkerSettings:
    """Build the settings from the flags given, the environment, and a YAML file.

    Raises SettingsProblem naming the setting; an unknown key of the file is one.
    """
    _refuse_unreadable(config)

    class FromFile(WorkerSettings):
        model_config = SettingsConfigDict(yaml_file=config)

    try:
        return FromFile(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        remedy = f"give --{name.replace('_', '-')}, see --help"
        if first["type"] == "extra_forbidden":
            remedy = "take it out of the file; --help names the settings"
        raise SettingsProblem(name, first["msg"], remedy) from error
    except SettingsError as error:  # of the environment: text that is no value of its kind
        raise SettingsProblem("environment", " ".join(str(error).split()), "see --help") from error


def _refuse_unreadable(config: Path | None) -> None:
    """Refuse a file that is no YAML mapping from names to values."""
    if config is None:
        return
    try:
        document = yaml.safe_load(config.read_bytes())
    except OSError as error:
        problem = f"{config} cannot be read ({error.strerror})"
        raise SettingsProblem("config", problem, "name a YAML file of settings") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = f"{config} is no YAML in UTF-8 ({' '.join(str(error).split())})"
        raise SettingsProblem("config", problem, "mend the file") from error
    if document is not None and not (
        isinstance(document, dict) and all(isinstance(name, str) for name in document)
    ):
        problem = f"{config} is no mapping from names to values"
        raise SettingsProblem("config", problem, "write lines like `max_records: 512`")

"""`repartition`, as a command."""

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from llm4es.errors import ConfigError
from llm4es.schema import load_schema
from stream_worker.connections import kafka_settings, value_format
from stream_worker.formats.decoding import open_decoder
from stream_worker.ops.repartition import Repartition, RepartitionSpec
from stream_worker.settings import WorkerSettings
from stream_worker.stopping import stopping_on_signals

__all__ = ["run_repartition"]

log = logging.getLogger(__name__)


def run_repartition(
    settings: WorkerSettings,
    entity: str,
    *,
    sources: Sequence[str],
    target: str,
    schema: Path | None,
    max_idle_ms: int,
    as_json: bool,
) -> None:
    """Run until SIGTERM, SIGINT or, with `until_end`, the sources' end; print what was done."""
    if settings.bootstrap_servers is None:
        raise ConfigError("bootstrap_servers", "is not set", "name Kafka's brokers")
    events = load_schema(schema or settings.bundle / "schema.yaml")
    job = Repartition(
        kafka_settings(settings, settings.bootstrap_servers),
        RepartitionSpec(
            sources=tuple(sources),
            target=target,
            entity_field=events.entity(entity).field,
            dead_letter_topic=settings.dead_letter_topic or f"{target}.dead-letters",
            max_idle_ms=max_idle_ms,
            max_records=settings.max_records,
            unproven_start=settings.unproven_start,
        ),
        open_decoder(value_format(settings)),
    )
    log.info("ready")
    with stopping_on_signals(job.stop):
        job.run(until_end=settings.until_end)
    if as_json:
        print(msgspec.json.encode(dict(job.counts)).decode())  # noqa: T201 - the result
        return
    table = Table(show_header=False, title=f"repartition into {target}")
    for name, count in job.counts.items():
        table.add_row(name.replace("_", " "), f"{count:,}")
    Console().print(table)

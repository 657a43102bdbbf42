"""From settings to parts: the only place that knows which adapter a setting means."""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from llm4es.bundle import Bundle, load_bundle
from llm4es.deletion import DeletionKey
from llm4es.engine import open_embedder
from llm4es.errors import ConfigError
from llm4es.feast import FeastSink, open_sink
from stream_worker.connections import kafka_settings, value_format
from stream_worker.dead_letters import FileDeadLetters, KafkaDeadLetters
from stream_worker.formats.decoding import Decode, ValueFormat, open_decoder
from stream_worker.health import serve_health
from stream_worker.log_checks import (
    refuse_changed_log,
    refuse_foreign_keys,
    refuse_other_topic,
)
from stream_worker.metrics import Metrics
from stream_worker.ops.snapshot import restore_snapshot
from stream_worker.ports import DeadLetters, Embedder, RecordSource, WindowStore
from stream_worker.settings import WorkerSettings
from stream_worker.sources.files import FileLog, FileRecordSource
from stream_worker.sources.kafka import KafkaGroup, KafkaRecordSource
from stream_worker.tracing import tracing
from stream_worker.window_store.redis import RedisWindowStore
from stream_worker.window_store.redis_client import SCHEMES
from stream_worker.window_store.sqlite import SqliteWindowStore
from stream_worker.worker import Parts, Worker, WorkerPolicy

__all__ = [
    "Assembled",
    "BundleId",
    "assembled",
    "assembled_around",
    "deletion_key_of",
    "open_window_store",
    "value_format_of",
    "worker_policy",
]

log = logging.getLogger(__name__)

_JOIN_WAIT_MS = 5_000  # a stop waits so long at most
_SAMPLE = 50  # records per partition that are looked at before the topic is trusted


@dataclass(frozen=True, slots=True)
class Assembled:
    """A worker and the parts that a display asks."""

    worker: Worker
    parts: Parts


@contextmanager
def assembled(settings: WorkerSettings) -> Iterator[Assembled]:
    """Build a worker, check all that it stands on, and take it apart again.

    What is cheap to check comes first: bundle, then view, then log. Raises ConfigError,
    BundleMismatch, SourceUnavailable or SinkUnavailable.
    """

    def open_model(bundle: Bundle) -> Embedder:
        embedder = open_embedder(
            bundle,
            device=settings.device,
            threads=settings.threads,
            cache_bytes=settings.kv_cache_bytes,
            spill_folder=settings.kv_spill_folder,
            spill_bytes=settings.kv_spill_bytes,
        )
        stack.callback(embedder.close)
        log.info(
            "bundle %s (%d dimensions) for %s on %s",
            bundle.id,
            bundle.manifest.dim,
            bundle.manifest.entity,
            embedder.providers[0],
        )
        return embedder

    with (
        ExitStack() as stack,
        tracing(settings.trace_endpoint) as traced,
        assembled_around(settings, load_bundle(settings.bundle), open_model, wrap=traced) as built,
    ):
        yield built


@contextmanager
def assembled_around(
    settings: WorkerSettings,
    bundle: Bundle,
    open_model: Callable[[Bundle], Embedder],
    *,
    wrap: Callable[[Parts], Parts] = lambda parts: parts,
) -> Iterator[Assembled]:
    """Build a worker around a bundle that is loaded and a model of one's own.

    `wrap` may put something around the parts, as fault tests do. Raises as `assembled`.
    """
    with ExitStack() as stack:
        sink = open_sink(
            settings.feature_repo,
            bundle,
            config_file=settings.feature_store_file,
            writer_id=f"{socket.gethostname()}-{os.getpid()}",
            roll_rows=settings.journal_roll_rows,
            roll_s=settings.journal_roll_s,
            deletion_key=deletion_key_of(settings),
            deletion_guard_s=settings.deletion_guard_s,
        )
        stack.callback(sink.close)
        store = open_window_store(settings, bundle)
        stack.callback(store.close)
        if settings.from_snapshot is not None:
            restore_snapshot(
                settings.from_snapshot, store, bundle.id, deletion_key=deletion_key_of(settings)
            )
        source, dead_letters = _open_log(settings, bundle, sink, stack)
        decode = open_decoder(value_format_of(settings, sink))
        _refuse_unfit_log(source, store, bundle, decode)
        parts = wrap(
            Parts(
                bundle=bundle,
                source=source,
                store=store,
                embedder=open_model(bundle),
                sink=sink,
                dead_letters=dead_letters,
                metrics=Metrics(),
                decode=decode,
            )
        )
        worker = Worker(parts, worker_policy(settings))
        if settings.metrics_port is not None:
            patience_s = settings.max_poll_interval_ms / 1000
            server = serve_health(
                settings.metrics_port,
                parts.metrics.registry,
                healthy=lambda: (parts.metrics.polled_s_ago or 0.0) < patience_s,
                ready=lambda: worker.ready,
            )
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
        yield Assembled(worker, parts)


@dataclass(frozen=True, slots=True)
class BundleId:
    """A bundle of which no more is at hand than its id."""

    id: str


def open_window_store(
    settings: WorkerSettings, bundle: Bundle | BundleId, *, read_only: bool = False
) -> WindowStore:
    """Open the store a URL names. Raises ConfigError, SinkUnavailable.

    What is wrong with a URL is not repeated: it may be a piece of the password.
    """
    url = settings.window_store.get_secret_value()
    scheme, _, rest = url.partition(":")
    if scheme == "sqlite":
        return SqliteWindowStore(
            Path(rest.removeprefix("//")),
            bundle.id,
            read_only=read_only,
            deletion_key=deletion_key_of(settings),
        )
    if scheme in SCHEMES:
        return RedisWindowStore(url, bundle.id, deletion_key=deletion_key_of(settings))
    raise ConfigError(
        "window_store",
        f"its scheme is none of sqlite, {', '.join(SCHEMES)}",
        "write sqlite:PATH or redis://:PASSWORD@host:port/db, special characters %-encoded",
    )


def _open_log(
    settings: WorkerSettings, bundle: Bundle, sink: FeastSink, stack: ExitStack
) -> tuple[RecordSource, DeadLetters]:
    key_field = bundle.schema.entity(bundle.manifest.entity).field
    if settings.source == "file":
        if settings.events is None:
            raise ConfigError("events", "--source file needs a log", "name it with --events")
        source: RecordSource = FileRecordSource(
            FileLog(
                path=settings.events,
                key_field=key_field,
                partitions=settings.partitions,
                recorded_at_field=settings.recorded_at_field,
            )
        )
        letters: DeadLetters = FileDeadLetters(settings.state_dir / "dead-letters.jsonl")
        stack.callback(source.close)
        stack.callback(letters.close)
        return source, letters
    kafka = kafka_settings(settings, settings.bootstrap_servers or sink.bootstrap_servers)
    topic = settings.topic or sink.topic
    group = KafkaGroup(
        settings.group or f"llm4es-{bundle.manifest.entity}-{bundle.id}",
        session_timeout_ms=settings.session_timeout_ms,
        max_poll_interval_ms=settings.max_poll_interval_ms,
        instance_id=settings.group_instance_id,
        join_wait_ms=_JOIN_WAIT_MS,
    )
    source = KafkaRecordSource(kafka, topic, group)
    stack.callback(source.close)
    source.describe()
    letters = KafkaDeadLetters(
        kafka, settings.dead_letter_topic or f"{topic}.dead-letters", source_topic=topic
    )
    stack.callback(letters.close)
    return source, letters


def value_format_of(settings: WorkerSettings, sink: FeastSink) -> ValueFormat:
    """How the log's values are written."""
    if settings.source == "file":  # its lines are JSON, and its columns are made so
        return ValueFormat(max_depth=settings.max_json_depth)
    return value_format(settings, *sink.value_format)


def _refuse_unfit_log(
    source: RecordSource, store: WindowStore, bundle: Bundle, decode: Decode
) -> None:
    description = source.describe()
    topic = description.identity.topic
    refuse_other_topic(topic, store.topics())
    refuse_changed_log(description, store.identity(topic))
    refuse_foreign_keys(source.sample(_SAMPLE), bundle.schema, bundle.manifest.entity, decode)


def deletion_key_of(settings: WorkerSettings) -> DeletionKey | None:
    """Key of what deletion leaves, where the settings name one."""
    secret = settings.deletion_key
    return None if secret is None else DeletionKey(secret.get_secret_value())


def worker_policy(settings: WorkerSettings) -> WorkerPolicy:
    """How a worker goes about its batches, as the settings say."""
    keeps_timestamps = settings.source == "kafka" or settings.recorded_at_field is not None
    delay = timedelta(milliseconds=settings.availability_delay_ms)
    return WorkerPolicy(
        max_records=settings.max_records,
        poll_timeout_s=settings.poll_timeout_ms / 1000,
        max_value_bytes=settings.max_value_bytes,
        max_batch_tokens=settings.max_batch_tokens,
        drain_s=min(settings.drain_timeout_ms, settings.max_poll_interval_ms / 2) / 1000,
        retry_budget_s=settings.sink_retry_ms / 1000,
        hot_events=settings.hot_window_events,
        availability_delay=None if keeps_timestamps else delay,
        every_event=settings.every_event,
        deletes=settings.deletion_key is not None,
        until_end=settings.until_end,
        unproven_start=settings.unproven_start,
    )

"""`audit`: recompute a sample of entities from the log, and compare what is served with it."""

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from threading import Event

import typer

from llm4es.bundle import Bundle, load_bundle
from llm4es.engine import open_embedder
from llm4es.errors import ConfigError, SinkUnavailable, SourceUnavailable
from llm4es.events import TopicPartition, entity_hash
from llm4es.feast import FeastSink, offline_entities, offline_rows, open_sink
from llm4es.features import FeatureRow, view_name
from llm4es.windows import Window, settle
from stream_worker.assembly import (
    deletion_key_of,
    open_window_store,
    value_format_of,
    worker_policy,
)
from stream_worker.embedding import BatchReader
from stream_worker.folding import RecordFolder
from stream_worker.formats.decoding import open_decoder
from stream_worker.ops.audit_metrics import AuditMetrics
from stream_worker.ops.audit_report import AuditReport, report_table
from stream_worker.ops.drift import measure_drift
from stream_worker.ops.logs import open_log
from stream_worker.ops.recomputing import History, Sample, read_histories
from stream_worker.ops.repairs import Repairs
from stream_worker.ops.showing import show
from stream_worker.ops.verdicts import Finding, Seen, judge, row_difference
from stream_worker.ports import Embedder, PartitionSpan, WindowStore
from stream_worker.settings import WorkerSettings
from stream_worker.stopping import stopping_on_signals

__all__ = ["AuditRequest", "Auditor", "audit_view", "opened_auditor"]

_ROUNDS = 3  # for entities that move on while they are looked at
_OFFLINE_ROWS = 3  # newest of an entity that are recomputed; of the others `as_of` is compared
_SLACK = 10.0  # times the manifest's tolerance: a row is a sum over chapters


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRequest:
    """Whom to look at, and what to do about what is found."""

    sample: int = 100
    seed: int = 0
    repair: bool = False
    tolerance: float = 0.0  # share of entities that may differ
    log: str | None = None


class Auditor:
    """Looks at one view; built by `opened_auditor`, and run as often as one likes."""

    def __init__(
        self,
        settings: WorkerSettings,
        bundle: Bundle,
        embedder: Embedder,
        store: WindowStore,
        sink: FeastSink,
    ) -> None:
        self._settings = settings
        self._bundle = bundle
        self._embedder = embedder
        self._store = store
        self._sink = sink
        policy = worker_policy(settings)
        self._folder = RecordFolder(
            bundle,
            max_value_bytes=policy.max_value_bytes,
            availability_delay=policy.availability_delay,
            every_event=True,
            deletes=policy.deletes,
            decode=open_decoder(value_format_of(settings, sink)),
        )
        self._reader = BatchReader(
            bundle, self._folder, embedder, max_tokens=settings.max_batch_tokens
        )

    def run(self, request: AuditRequest) -> AuditReport:
        """Audit once. Raises SourceUnavailable, SinkUnavailable, ConfigError."""
        started = time.monotonic()
        tolerance = self._bundle.manifest.compute.tolerance * _SLACK
        findings: dict[str, list[Finding]] = {}
        looked: dict[str, Seen] = {}
        worst = 0.0
        unverifiable: set[str] = set()
        moving: set[str] = set()
        topic = ""
        for number in range(_ROUNDS):
            topic, seen, beyond = self._look(request, only=moving if number else None)
            unverifiable |= beyond
            moving = set()
            for entity_id, each in seen.items():
                if entity_id in unverifiable:
                    continue
                found = judge(each, self._bundle.id, tolerance)
                if found is None:
                    moving.add(entity_id)
                    continue
                findings[entity_id] = found
                looked[entity_id] = each
                worst = max(worst, _worst(each))
            if not moving:
                break
        rows = [each.rows[max(each.rows)] for each in looked.values() if each.rows]
        wrong = {entity_id: found for entity_id, found in findings.items() if found}
        repaired, not_repaired = 0, 0
        if request.repair:
            deletes = self._settings.deletion_key is not None
            repairs = Repairs(self._store, self._sink, deletes=deletes)
            done = [repairs.put_right(looked[each], found) for each, found in wrong.items()]
            repaired, not_repaired = sum(done), len(done) - sum(done)
            self._sink.roll()
        verified = len(findings)
        return AuditReport(
            view=view_name(self._bundle.manifest.entity, self._bundle.id),
            topic=topic,
            sampled=verified + len(unverifiable) + len(moving),
            equal=verified - len(wrong),
            unverifiable=len(unverifiable),
            moving=len(moving),
            equal_share=(verified - len(wrong)) / verified if verified else 1.0,
            worst_difference=worst,
            findings=dict(
                Counter(
                    name
                    for found in wrong.values()
                    for name in {f"{each.place} {each.kind}" for each in found}
                )
            ),
            entities={
                entity_hash(entity_id): [
                    f"{each.place} {each.kind}" + (f" ({each.detail})" if each.detail else "")
                    for each in found
                ]
                for entity_id, found in sorted(wrong.items())
            },
            repaired=repaired,
            not_repaired=not_repaired,
            drift=measure_drift(self._bundle, rows),
            seconds=time.monotonic() - started,
        )

    def _look(
        self, request: AuditRequest, *, only: set[str] | None
    ) -> tuple[str, dict[str, Seen], set[str]]:
        """Read the log, then the stores: what these hold before it is what they must hold."""
        source = open_log(self._settings, self._bundle, self._sink, log=request.log)
        try:
            described = source.describe()
            topic = described.identity.topic
            held = self._store.offsets(topic)
            sample = Sample(len(only) if only else request.sample, request.seed)
            known = only or self._known(topic, described.spans)
            histories = read_histories(source, self._folder, sample, known)
        finally:
            source.close()
        if only is not None:
            histories = {key: each for key, each in histories.items() if key in only}
        ids = list(histories)
        online = dict(zip(ids, self._sink.read(ids), strict=True))
        offline = offline_rows(self._sink.offline_folder, self._sink.join_key, ids)
        unproven = self._store.unproven(topic)
        seen, beyond = {}, set()
        for entity_id, history in histories.items():
            window = self._store.read(entity_id)
            tp = history.partition or (
                None
                if window is None or window.partition is None
                else TopicPartition(topic, window.partition)
            )
            if tp is not None and described.spans[tp.partition].first > unproven.get(tp, 0):
                beyond.add(entity_id)
                continue
            seen[entity_id] = self._seen(
                history,
                0 if tp is None else held.get(tp, 0),
                window,
                online[entity_id],
                offline.get(entity_id, []),
            )
        return topic, seen, beyond

    def _known(self, topic: str, spans: Mapping[int, PartitionSpan]) -> Iterator[str]:
        yield from sorted(offline_entities(self._sink.offline_folder, self._sink.join_key))
        partitions = {TopicPartition(topic, partition) for partition in spans}
        for window in self._store.scan(partitions):
            yield window.entity_id

    def _seen(
        self,
        history: History,
        held: int,
        window: Window | None,
        online: FeatureRow | None,
        offline: list[FeatureRow],
    ) -> Seen:
        wanted = {row.as_of for row in offline[-_OFFLINE_ROWS:]}
        if online is not None:
            wanted.add(online.as_of)
        indices = [
            index
            for index, state in enumerate(history.states)
            if state.as_of in wanted or index == len(history.states) - 1
        ]
        rows = self._reader.rows([history.states[index] for index in indices])
        return Seen(
            history=history,
            held=held,
            window=window,
            due_window=self._settled(history.now),
            online=online,
            offline=offline,
            rows=dict(zip(indices, rows, strict=True)),
        )

    def _settled(self, window: Window | None) -> Window | None:
        if window is None or not window.chapters:
            return window
        embedded = self._embedder.embed([window])
        return settle(
            window,
            embedded.finished[0],
            policy=self._bundle.manifest.window,
            half_lives=self._embedder.half_lives,
        )


def _worst(seen: Seen) -> float:
    """Largest difference of the rows that are served and were recomputed."""
    by_as_of = {seen.history.states[index].as_of: row for index, row in seen.rows.items()}
    served = [row for row in (seen.online, *seen.offline) if row is not None]
    recomputed = [(row, by_as_of[row.as_of]) for row in served if row.as_of in by_as_of]
    return max((row_difference(row, due) for row, due in recomputed), default=0.0)


@contextmanager
def opened_auditor(
    settings: WorkerSettings, bundle: Bundle, open_model: Callable[[], Embedder]
) -> Iterator[Auditor]:
    """Open the stores of a view. Raises ConfigError, BundleMismatch, SinkUnavailable."""
    sink = open_sink(
        settings.feature_repo,
        bundle,
        config_file=settings.feature_store_file,
        writer_id=f"audit-{socket.gethostname()}-{os.getpid()}",
        deletion_key=deletion_key_of(settings),
        deletion_guard_s=settings.deletion_guard_s,
    )
    try:
        store = open_window_store(settings, bundle)
        try:
            yield Auditor(settings, bundle, open_model(), store, sink)
        finally:
            store.close()
    finally:
        sink.close()


def audit_view(
    settings: WorkerSettings, request: AuditRequest, *, every_s: float | None, as_json: bool
) -> None:
    """Audit once, or every so often with gauges; exit code 1 beyond the tolerance."""
    bundle = load_bundle(settings.bundle)
    if every_s is not None and settings.metrics_port is None:
        raise ConfigError("metrics_port", "an audit that goes on serves gauges", "name a port")
    metrics = AuditMetrics()
    if every_s is not None and settings.metrics_port is not None:
        metrics.serve(settings.metrics_port)
    stopped = Event()

    def open_model() -> Embedder:
        return open_embedder(bundle, device=settings.device, threads=settings.threads)

    with opened_auditor(settings, bundle, open_model) as auditor:
        if every_s is None:
            report = auditor.run(request)
            show(asdict(report), report_table(report), as_json=as_json)
            if report.equal_share < 1 - request.tolerance:
                raise typer.Exit(1)
            return
        with stopping_on_signals(stopped.set):
            while not stopped.is_set():
                try:
                    report = auditor.run(request)
                except (SourceUnavailable, SinkUnavailable) as error:
                    typer.echo(f"stream_worker: {error}; trying again", err=True)
                    metrics.failed()
                else:
                    metrics.audited(asdict(report))
                    show(asdict(report), report_table(report), as_json=as_json)
                stopped.wait(every_s)

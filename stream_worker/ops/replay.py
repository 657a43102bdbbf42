"""`replay`: compute the rows of a span of the log again, with the worker's own code.

A replay has windows of its own, folded from the log's start, in a folder of its own: they are its
checkpoint. First the worker folds what comes before the span, embedding as seldom as it can and
publishing nothing; then it works through the span. Killed at any moment it goes on from there.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import typer

from llm4es.bundle import Bundle, load_bundle
from llm4es.engine import open_embedder
from llm4es.errors import ConfigError
from llm4es.events import TopicPartition
from llm4es.feast import FeastSink, open_sink
from llm4es.features import view_name
from stream_worker.assembly import deletion_key_of, value_format_of, worker_policy
from stream_worker.formats.decoding import Decode, open_decoder
from stream_worker.metrics import Metrics, Summary
from stream_worker.ops.locking import locked
from stream_worker.ops.logs import ReplayableLog, open_log
from stream_worker.ops.replay_plan import (
    PLAN_FILE,
    WINDOWS_FILE,
    Plan,
    ReplayRequest,
    folder_name,
    go_on,
    make_plan,
    read_into,
    read_keys,
    read_plan,
)
from stream_worker.ops.replay_report import (
    ReplayReport,
    plan_table,
    progress_bar,
    report_table,
    write_report,
)
from stream_worker.ops.replay_sink import LetterCount, ReplaySink
from stream_worker.ops.showing import show
from stream_worker.ops.snapshot import restore_snapshot
from stream_worker.ops.spans import Span, SpanSource, TokenBucket
from stream_worker.ports import Embedder
from stream_worker.settings import WorkerSettings
from stream_worker.stopping import stopping_on_signals
from stream_worker.window_store.sqlite import SqliteWindowStore
from stream_worker.worker import Parts, Worker, WorkerPolicy

__all__ = ["Replay", "opened_replay", "replay_log"]

_LOWEST_PRIORITY = 19
_WARM_UP_RECORDS = 8192  # of one batch before the span: each entity is embedded once in it


class Replay:
    """A replay that is planned and locked; `run` carries it out, or on."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        settings: WorkerSettings,
        bundle: Bundle,
        *,
        source: Callable[[], ReplayableLog],
        sink: FeastSink | None,
        embedder: Callable[[], Embedder],
        decode: Decode,
        keys: frozenset[bytes] | None,
        rate: float | None,
        resumed: bool,
        wrap: Callable[[Parts], Parts] = lambda parts: parts,
    ) -> None:
        self.plan = plan
        self.folder = folder
        self._settings = settings
        self._bundle = bundle
        self._open_source = source
        self._sink = sink
        self._open_embedder = embedder
        self._decode = decode
        self._keys = keys
        self._bucket = None if rate is None else TokenBucket(rate)
        self._resumed = resumed
        self._wrap = wrap
        self._worker: Worker | None = None
        self._stopping = False

    def stop(self) -> None:
        """End after the batch under way; safe in a signal handler."""
        self._stopping = True
        if self._worker is not None:
            self._worker.stop()

    def run(self, progress: Callable[[str, int, int], None] = lambda *_: None) -> ReplayReport:
        """Fold what comes before the span, then work through it; the report is written too.

        `progress` is told, after each batch, which of the two it is, how many offsets are done
        and how many there are.
        """
        started = time.monotonic()
        store = SqliteWindowStore(
            self.folder / WINDOWS_FILE,
            self._bundle.id,
            deletion_key=deletion_key_of(self._settings),
        )
        try:
            if self.plan.snapshot is not None:
                restore_snapshot(
                    Path(self.plan.snapshot),
                    store,
                    self._bundle.id,
                    deletion_key=deletion_key_of(self._settings),
                )
            embedder = self._open_embedder()
            policy = replace(
                worker_policy(self._settings),
                until_end=True,
                unproven_start=self._settings.unproven_start,
            )
            spans = {
                TopicPartition(self.plan.topic, partition): Span(*span)
                for partition, span in self.plan.spans.items()
            }
            warm_up = self._work(
                "before the span",
                {tp: _before(span) for tp, span in spans.items()},
                replace(policy, every_event=False, max_records=_WARM_UP_RECORDS),
                (store, embedder, ReplaySink(None, "nowhere"), LetterCount()),
                progress,
            )
            sink, letters = ReplaySink(self._sink, self.plan.into), LetterCount()
            done = self._work(
                "span",
                spans,
                replace(policy, every_event=self.plan.every_event),
                (store, embedder, sink, letters),
                progress,
            )
        finally:
            store.close()
        if self._sink is not None:
            self._sink.roll()
            self._sink.sync()
        report = ReplayReport(
            finished=not self._stopping,
            resumed=self._resumed,
            view=self.plan.view,
            topic=self.plan.topic,
            into=self.plan.into,
            every_event=self.plan.every_event,
            spans=self.plan.spans,
            entities=self.plan.entities,
            warm_up_records=warm_up.records,
            records=done.records,
            accepted=done.accepted,
            duplicates=done.duplicates,
            late=done.late,
            rows=done.rows,
            rows_journalled=sink.journalled,
            rows_published=sink.published_rows,
            rows_superseded=0 if self._sink is None else self._sink.superseded,
            unproven_rows=done.unproven_rows,
            bad_records=letters.by_field,
            seconds=time.monotonic() - started,
        )
        write_report(report, self.folder)
        if report.finished:
            for path in self.folder.glob(f"{WINDOWS_FILE}*"):
                path.unlink()
            (self.folder / PLAN_FILE).unlink()
        return report

    def _work(
        self,
        name: str,
        spans: Mapping[TopicPartition, Span],
        policy: WorkerPolicy,
        parts: tuple[SqliteWindowStore, Embedder, ReplaySink, LetterCount],
        progress: Callable[[str, int, int], None],
    ) -> Summary:
        store, embedder, sink, letters = parts
        metrics = Metrics()
        total = sum(span.end - span.start for span in spans.values())
        if total == 0 or self._stopping:
            return metrics.summary()
        source = SpanSource(
            self._open_source(),
            starts={tp: span.start for tp, span in spans.items()},
            ends={tp: span.end for tp, span in spans.items()},
            keys=self._keys,
            bucket=self._bucket,
        )
        try:
            worker = Worker(
                self._wrap(
                    Parts(
                        bundle=self._bundle,
                        source=source,
                        store=store,
                        embedder=embedder,
                        sink=sink,
                        dead_letters=letters,
                        metrics=metrics,
                        decode=self._decode,
                    )
                ),
                policy,
            )
            self._worker = worker
            if not self._stopping:  # a signal may have come in between
                worker.run(lambda: progress(name, total - (source.remaining() or 0), total))
        finally:
            source.close()
        return metrics.summary()


def _before(span: Span) -> Span:
    """What comes before a span."""
    return Span(span.first, span.first, span.start)


def replay_log(
    settings: WorkerSettings, request: ReplayRequest, *, dry_run: bool, as_json: bool
) -> None:
    """Plan, and unless `dry_run` carry out; the report goes to stdout, progress to stderr.

    The process takes only the CPU time that others leave: a live worker may be one of them.
    """
    os.nice(_LOWEST_PRIORITY)
    bundle = load_bundle(settings.bundle)

    def open_model() -> Embedder:
        return open_embedder(bundle, device=settings.device, threads=settings.threads)

    with opened_replay(settings, bundle, open_model, request, keep=not dry_run) as replay:
        if dry_run:
            show(msgspec.to_builtins(replay.plan), plan_table(replay.plan), as_json=as_json)
            return
        with stopping_on_signals(replay.stop), progress_bar() as progress:
            report = replay.run(progress)
        show(asdict(report), report_table(report), as_json=as_json)
    if not report.finished:
        typer.echo("stream_worker: stopped; the same command with --resume goes on", err=True)
        raise typer.Exit(1)


@contextmanager
def opened_replay(
    settings: WorkerSettings,
    bundle: Bundle,
    open_model: Callable[[], Embedder],
    request: ReplayRequest,
    *,
    keep: bool = True,
    wrap: Callable[[Parts], Parts] = lambda parts: parts,
) -> Iterator[Replay]:
    """Open what a replay needs, and plan it. Without `keep` nothing is left behind.

    Raises ConfigError (also for a replay that was begun, without `resume`), BundleMismatch,
    SourceUnavailable, SinkUnavailable.
    """
    with ExitStack() as stack:
        into = read_into(request.into, view_name(bundle.manifest.entity, bundle.id))
        sink = open_sink(
            settings.feature_repo,
            bundle,
            config_file=settings.feature_store_file,
            writer_id=f"replay-{socket.gethostname()}-{os.getpid()}",
            roll_rows=settings.journal_roll_rows,
            roll_s=settings.journal_roll_s,
            deletion_key=deletion_key_of(settings),
            deletion_guard_s=settings.deletion_guard_s,
        )
        stack.callback(sink.close)

        def open_source() -> ReplayableLog:
            return open_log(settings, bundle, sink, log=request.log)

        source = open_source()
        try:
            description = source.describe()
            if into == "view" and sink.published(description.identity.topic) is None:
                raise ConfigError(
                    "into",
                    "beside a live worker this online store cannot keep older rows from newer ones",
                    "replay into offline, or use Redis or SQLite as online store",
                )
            keys, digest = read_keys(request.entities)
            plan = make_plan(settings, bundle, request, (source, description), (keys, digest))
        finally:
            source.close()
        folder = settings.state_dir / "replays" / folder_name(plan, request)
        if keep:
            stack.enter_context(locked(folder, "replay"))
            begun = read_plan(folder)
            plan = go_on(folder, plan, begun, resume=request.resume)
        yield Replay(
            plan,
            folder,
            settings,
            bundle,
            source=open_source,
            sink=None if into == "nowhere" else sink,
            embedder=open_model,
            decode=open_decoder(value_format_of(settings, sink)),
            keys=keys,
            rate=request.rate,
            resumed=keep and begun is not None,
            wrap=wrap,
        )

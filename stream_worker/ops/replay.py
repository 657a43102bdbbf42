"""`replay`: compute the rows of a span of the log again, with the worker's own code.

A replay has windows of its own, folded from the log's start, in a folder of its own: they are its
checkpoint. First the worker folds what comes before the span, embedding as seldom as it can and
publishing nothing; then it works through the span. Killed at any moment it goes on from there.
"""

import fcntl
import hashlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from llm4es.bundle import Bundle, load_bundle
from llm4es.engine import open_embedder
from llm4es.errors import BundleMismatch, ConfigError
from llm4es.events import TopicPartition
from llm4es.feast import FeastSink, open_sink
from llm4es.features import view_name
from stream_worker.assembly import deletion_key_of, value_format_of, worker_policy
from stream_worker.formats.decoding import Decode, open_decoder
from stream_worker.metrics import Metrics, Summary
from stream_worker.ops.logs import ReplayableLog, moments_of, open_log
from stream_worker.ops.replay_sink import Into, LetterCount, ReplaySink
from stream_worker.ops.showing import show
from stream_worker.ops.snapshot import restore_snapshot
from stream_worker.ops.spans import Span, SpanSource, TokenBucket, resolve_offsets
from stream_worker.ports import Embedder, LogDescription
from stream_worker.settings import WorkerSettings
from stream_worker.stopping import stopping_on_signals
from stream_worker.window_store.sqlite import SqliteWindowStore
from stream_worker.worker import Parts, Worker, WorkerPolicy

__all__ = ["Replay", "ReplayReport", "ReplayRequest", "opened_replay", "replay_log"]

log = logging.getLogger(__name__)

_WARM_UP_RECORDS = 8192  # of one batch before the span: each entity is embedded once in it
_PLAN = "plan.json"
_WINDOWS = "windows.db"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRequest:
    """Which part of which log, and where its rows go; see `spans.resolve_offsets`."""

    since: str = "start"
    upto: str = "end"
    into: str = "nowhere"
    entities: Path | None = None
    every_event: bool = False
    rate: float | None = None  # records a second
    resume: bool = False
    log: str | None = None  # files to read instead of the settings' log


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay is about to do; kept beside the windows, so that a resume does just that."""

    bundle: str
    view: str
    topic: str
    topic_id: str
    into: Into
    every_event: bool
    entities: int | None
    entities_sha256: str
    spans: dict[int, tuple[int, int, int]]  # by partition: first, start, end

    @property
    def warm_up(self) -> int:
        """Offsets before the span, which are folded and give no rows."""
        return sum(start - first for first, start, _ in self.spans.values())

    @property
    def records(self) -> int:
        """Offsets of the span."""
        return sum(end - start for _, start, end in self.spans.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """What a replay did; the figures are those of this run, after a resume too."""

    finished: bool
    resumed: bool
    view: str
    topic: str
    into: str
    every_event: bool
    spans: Mapping[int, tuple[int, int, int]]
    entities: int | None
    warm_up_records: int
    records: int
    accepted: int
    duplicates: int
    late: int
    rows: int
    rows_journalled: int
    rows_published: int  # offered online; those that were older than what stands are among them
    rows_superseded: int
    unproven_rows: int
    bad_records: Mapping[str, int] = field(default_factory=dict)  # by field; parked by nobody here
    seconds: float = 0.0


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
            self.folder / _WINDOWS, self._bundle.id, deletion_key=deletion_key_of(self._settings)
        )
        try:
            self._begin_from_snapshot(store)
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
        self._write(report)
        return report

    def _begin_from_snapshot(self, store: SqliteWindowStore) -> None:
        """Fill the windows from the snapshot that the settings name, if it is no later."""
        snapshot = self._settings.from_snapshot
        if snapshot is None:
            return
        held = restore_snapshot(
            snapshot, store, self._bundle.id, deletion_key=deletion_key_of(self._settings)
        )
        late = [
            tp.partition
            for tp, at in held.items()
            if at > self.plan.spans.get(tp.partition, (0, 0, 0))[1]
        ]
        if late:
            store.close()
            for path in self.folder.glob(f"{_WINDOWS}*"):
                path.unlink()
            raise ConfigError(
                "from_snapshot",
                f"stands for offsets within the span (partitions {', '.join(map(str, late))})",
                "name an older snapshot, or none",
            )

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

    def _write(self, report: ReplayReport) -> None:
        """Write the report; the windows of a replay that is done are taken away."""
        (self.folder / "report.json").write_bytes(msgspec.json.encode(asdict(report)) + b"\n")
        with (self.folder / "report.txt").open("w", encoding="utf-8") as file:
            Console(file=file, width=100).print(report_table(report))
        if report.finished:
            for path in self.folder.glob(f"{_WINDOWS}*"):
                path.unlink()
            (self.folder / _PLAN).unlink()


def _before(span: Span) -> Span:
    """What comes before a span."""
    return Span(span.first, span.first, span.start)


def replay_log(
    settings: WorkerSettings, request: ReplayRequest, *, dry_run: bool, as_json: bool
) -> None:
    """Plan, and unless `dry_run` carry out; the report goes to stdout, progress to stderr."""
    bundle = load_bundle(settings.bundle)

    def open_model() -> Embedder:
        return open_embedder(bundle, device=settings.device, threads=settings.threads)

    with opened_replay(settings, bundle, open_model, request, keep=not dry_run) as replay:
        if dry_run:
            show(msgspec.to_builtins(replay.plan), plan_table(replay.plan), as_json=as_json)
            return
        with stopping_on_signals(replay.stop), _bar() as progress:
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
        into = _into(request.into, view_name(bundle.manifest.entity, bundle.id))
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
            keys, digest = _keys(request.entities)
            plan = _plan(settings, bundle, request, (source, description), (keys, digest))
        finally:
            source.close()
        folder = settings.state_dir / "replays" / _name(plan, request)
        if keep:
            stack.enter_context(_locked(folder))
            begun = _begun(folder)
            plan = _go_on(folder, plan, begun, resume=request.resume)
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


def _into(text: str, view: str) -> Into:
    if text in {"view", view}:
        return "view"
    if text == "offline":
        return "offline"
    if text == "nowhere":
        return "nowhere"
    raise ConfigError(
        "into",
        f"{text!r} is not this bundle's view",
        f"write {view} (or view), offline or nowhere; another view needs its own --bundle",
    )


def _keys(path: Path | None) -> tuple[frozenset[bytes] | None, str]:
    if path is None:
        return None, ""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            "entities",
            f"{path} cannot be read ({error.strerror})",
            "name a file of ids, one a line",
        ) from error
    keys = frozenset(line for line in content.splitlines() if line)
    if not keys:
        raise ConfigError("entities", f"{path} names nobody", "write one id a line")
    return keys, hashlib.sha256(b"\n".join(sorted(keys))).hexdigest()


def _plan(
    settings: WorkerSettings,
    bundle: Bundle,
    request: ReplayRequest,
    opened: tuple[ReplayableLog, LogDescription],
    entities: tuple[frozenset[bytes] | None, str],
) -> Plan:
    source, description = opened
    keys, digest = entities
    moment_of = moments_of(settings, bundle)
    starts = resolve_offsets("from", request.since, source, description, moment_of)
    ends = resolve_offsets("to", request.upto, source, description, moment_of)
    view = view_name(bundle.manifest.entity, bundle.id)
    spans = {}
    for partition, found in sorted(description.spans.items()):
        start = min(max(starts[partition], found.first), found.end)
        spans[partition] = (found.first, start, max(start, min(ends[partition], found.end)))
    identity = description.identity
    return Plan(
        bundle=bundle.id,
        view=view,
        topic=identity.topic,
        topic_id=identity.topic_id,
        into=_into(request.into, view),
        every_event=request.every_event,
        entities=None if keys is None else len(keys),
        entities_sha256=digest,
        spans=spans,
    )


def _name(plan: Plan, request: ReplayRequest) -> str:
    """The same command finds the same folder, though the log has grown meanwhile."""
    told = (
        plan.view, plan.topic, plan.into, plan.every_event, plan.entities_sha256,
        request.since, request.upto, request.log,
    )  # fmt: skip
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


def _begun(folder: Path) -> Plan | None:
    try:
        return msgspec.json.decode((folder / _PLAN).read_bytes(), type=Plan)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ConfigError("resume", f"{folder}: {error}", "remove the folder") from error


def _go_on(folder: Path, plan: Plan, begun: Plan | None, *, resume: bool) -> Plan:
    """Give the plan that was begun, or begin this one. Raises ConfigError, BundleMismatch."""
    if begun is not None and not resume:
        raise ConfigError(
            "resume",
            f"this replay was begun, and is not done ({folder})",
            "go on with --resume, or remove the folder to begin anew",
        )
    if begun is not None:
        if begun.topic_id and begun.topic_id != plan.topic_id:
            raise BundleMismatch(
                f"topic {plan.topic}", "is not the one this replay was begun on", f"remove {folder}"
            )
        return begun
    for path in folder.glob(f"{_WINDOWS}*"):
        path.unlink()
    temporary = folder / f"{_PLAN}.tmp"
    temporary.write_bytes(msgspec.json.encode(plan))
    temporary.replace(folder / _PLAN)
    return plan


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            "state_dir", f"{folder} cannot be written ({error.strerror})", "name a folder that can"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                "replay", "another process carries out this very replay", "wait for it"
            ) from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr: what is done, records a second, what is left, and how long that takes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} records/s, lag {task.fields[lag]:,}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        tasks: dict[str, Any] = {}
        begun: dict[str, tuple[float, int]] = {}

        def show(name: str, done: int, total: int) -> None:
            now = time.monotonic()
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total, rate=0.0, lag=total)
                begun[name] = now, done
            since, before = begun[name]
            rate = (done - before) / (now - since) if now > since else 0.0
            bar.update(tasks[name], completed=done, rate=rate, lag=total - done)

        yield show


def plan_table(plan: Plan) -> Table:
    """What a replay would do, for a terminal."""
    table = Table(title=f"replay of {plan.topic} into {plan.into} ({plan.view})")
    for column in ("partition", "log from", "from", "to", "to fold before", "records"):
        table.add_column(column, justify="right")
    for partition, (first, start, end) in plan.spans.items():
        figures = (partition, first, start, end, start - first, end - start)
        table.add_row(*(f"{figure:,}" for figure in figures))
    table.add_row("all", "", "", "", f"{plan.warm_up:,}", f"{plan.records:,}")
    return table


def report_table(report: ReplayReport) -> Table:
    """What a replay did, for a terminal."""
    title = f"replay of {report.topic} into {report.into} ({report.view})"
    table = Table(show_header=False, title=title)
    whom = "all" if report.entities is None else f"{report.entities:,}"
    for name, value in (
        ("finished", "yes" if report.finished else "no: go on with --resume"),
        ("entities", whom),
        ("records folded before the span", f"{report.warm_up_records:,}"),
        ("records of the span", f"{report.records:,}"),
        ("events accepted", f"{report.accepted:,}"),
        ("duplicates", f"{report.duplicates:,}"),
        ("late, dropped", f"{report.late:,}"),
        ("bad records", f"{sum(report.bad_records.values()):,}"),
        ("rows", f"{report.rows:,}"),
        ("rows into the offline log", f"{report.rows_journalled:,}"),
        ("rows offered online", f"{report.rows_published:,}"),
        ("of them older than what stands", f"{report.rows_superseded:,}"),
        ("of them unproven", f"{report.unproven_rows:,}"),
        ("seconds", f"{report.seconds:,.1f}"),
    ):
        table.add_row(name, value)
    return table

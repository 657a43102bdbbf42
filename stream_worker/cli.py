"""The worker's commands. Heavy imports happen inside them: `--help` answers at once."""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pythonjsonlogger.json import JsonFormatter

from stream_worker.settings import ENV_PREFIX, SettingsProblem, WorkerSettings, load_settings

__all__ = ["app", "main"]

_CONFIG_EXIT = 2
_Result = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")]

app = typer.Typer(
    name="stream_worker",
    help="Keep embeddings fresh: events from a log, rows into Feast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help answers twice as fast
)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="stream_worker")


def _is_secret(field: FieldInfo) -> bool:
    """Whether a setting is nothing but a secret: no flag, for others would see it in `ps`."""
    return field.annotation == SecretStr | None


def _secrets() -> str:
    """What `--help` says of them."""
    told = [
        f"{ENV_PREFIX}{name.upper()} ({field.description})"
        for name, field in WorkerSettings.model_fields.items()
        if _is_secret(field)
    ]
    return f"Secrets are read from the environment, or the file: {'; '.join(told)}."


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    kind = str if field.annotation is SecretStr else field.annotation
    default = field.default
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    notes = [f"env: {ENV_PREFIX}{name.upper()}"]
    if default is not None:
        notes.append(f"default: {str(default).lower() if isinstance(default, bool) else default}")
    option = typer.Option(
        f"--{_dashed(name)}", help=f"{field.description} [{', '.join(notes)}]", show_default=False
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],  # type: ignore[operator]
    )


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every setting as an option, and hand it `settings` built from them."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    config = inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Path | None, typer.Option(help="YAML file of settings")],
    )

    def wrapped(**given: Any) -> None:  # noqa: ANN401 - typer has checked the types
        flags = {name: given.pop(name) for name in WorkerSettings.model_fields if name in given}
        try:
            settings = load_settings(flags, given.pop("config"))
        except SettingsProblem as problem:
            _fail(str(problem), _CONFIG_EXIT)
        with _refusing():
            command(settings, **given)

    options = [
        _option(name, field)
        for name, field in WorkerSettings.model_fields.items()
        if not _is_secret(field)
    ]
    wrapped.__signature__ = inspect.Signature([*own, config, *options])  # type: ignore[attr-defined]
    wrapped.__doc__ = f"{command.__doc__}\n\n{_secrets()}"
    wrapped.__name__ = command.__name__
    return wrapped


@app.command()
@with_settings
def run(
    settings: WorkerSettings,
    *,
    live: Annotated[bool, typer.Option("--live", help="Show a live table on stderr")] = False,
    as_json: _Result = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more")] = False,
) -> None:
    """Fold a log into windows and publish a fresh row for each entity that changed."""
    from stream_worker.running import run_worker  # noqa: PLC0415 - heavy

    _log_to_stderr(verbose=verbose, as_json=settings.log_format == "json")
    run_worker(settings, live=live, as_json=as_json)


@app.command(name="inspect")
@with_settings
def inspect_entity(
    settings: WorkerSettings,
    *,
    entity: Annotated[str, typer.Argument(help="Id of the entity")],
    as_json: _Result = False,
) -> None:
    """Show an entity's chapters, their text with each event's surprise, and its online row."""
    from stream_worker.inspecting import show_entity  # noqa: PLC0415 - heavy

    _log_to_stderr(verbose=False)
    show_entity(settings, entity, as_json=as_json)


@app.command()
@with_settings
def compact(settings: WorkerSettings, *, as_json: _Result = False) -> None:
    """Merge the small parts of the offline log; safe beside a worker, and to kill."""
    from stream_worker.ops.compaction import compact_log  # noqa: PLC0415 - heavy

    _log_to_stderr(verbose=False)
    compact_log(settings, as_json=as_json)


@app.command()
@with_settings
def backfill(
    settings: WorkerSettings,
    *,
    engine: Annotated[
        Literal["process", "ray"], typer.Option(help="This process, or Ray's actors (extra: ray)")
    ] = "process",
    actors: Annotated[
        int | None, typer.Option(min=1, help="Ray's actors [default: the cluster's CPUs]")
    ] = None,
    as_json: _Result = False,
) -> None:
    """Carry a complete log into a fresh bundle's windows and rows, whole histories at once."""
    from stream_worker.ops.backfill import run_backfill  # noqa: PLC0415 - heavy

    _log_to_stderr(verbose=False)
    run_backfill(settings, engine=engine, actors=actors, as_json=as_json)


@app.command()
@with_settings
def replay(
    settings: WorkerSettings,
    *,
    since: Annotated[
        str, typer.Option("--from", help="start, an offset, PARTITION:OFFSET,..., or a time (ISO)")
    ] = "start",
    upto: Annotated[str, typer.Option("--to", help="end, or as --from; not included")] = "end",
    into: Annotated[
        str, typer.Option(help="Where rows go: the bundle's VIEW (or view), offline, nowhere")
    ] = "nowhere",
    entities: Annotated[
        Path | None, typer.Option(help="File of entity ids, one a line: no other's rows")
    ] = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Records a second at most")] = None,
    log: Annotated[
        str | None, typer.Option(help="Read files instead: a path, folder or address (s3://...)")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after a stop or kill")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would do")] = False,
    as_json: _Result = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more")] = False,
) -> None:
    """Compute the rows of a span of the log again; live rows and offsets stay as they are."""
    from stream_worker.ops.replay import ReplayRequest, replay_log  # noqa: PLC0415 - heavy

    _log_to_stderr(verbose=verbose)
    request = ReplayRequest(
        since=since,
        upto=upto,
        into=into,
        entities=entities,
        every_event=settings.every_event,
        rate=rate,
        resume=resume,
        log=log,
    )
    replay_log(settings, request, dry_run=dry_run, as_json=as_json)


@app.command()
@with_settings
def repartition(
    settings: WorkerSettings,
    *,
    entity: Annotated[str, typer.Option(help="Entity the new log is keyed by")],
    sources: Annotated[list[str], typer.Option("--from", help="Topic to read; may be repeated")],
    target: Annotated[str, typer.Option("--to", help="Topic to write")],
    schema: Annotated[
        Path | None, typer.Option(help="Event schema [default: the bundle's]", show_default=False)
    ] = None,
    max_idle_ms: Annotated[
        int, typer.Option(min=0, help="Longest wait for an input that does not deliver")
    ] = 5_000,
    as_json: _Result = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more")] = False,
) -> None:
    """Write the log of another entity from logs of events, each record exactly once."""
    from stream_worker.ops.repartitioning import run_repartition  # noqa: PLC0415 - heavy

    _log_to_stderr(verbose=verbose)
    run_repartition(
        settings,
        entity,
        sources=sources,
        target=target,
        schema=schema,
        max_idle_ms=max_idle_ms,
        as_json=as_json,
    )


@app.command()
@with_settings
def snapshot(
    settings: WorkerSettings,
    *,
    out: Annotated[Path, typer.Option(help="File to write", dir_okay=False)],
    as_json: _Result = False,
) -> None:
    """Write the window store into one file, from which `run --from-snapshot` starts."""
    from stream_worker.ops.snapshot_command import snapshot_store  # noqa: PLC0415 - heavy

    _log_to_stderr(verbose=False)
    snapshot_store(settings, out, as_json=as_json)


@app.command()
@with_settings
def audit(
    settings: WorkerSettings,
    *,
    sample: Annotated[int, typer.Option(min=1, help="Entities to look at")] = 100,
    seed: Annotated[int, typer.Option(help="Which ones: another seed, others")] = 0,
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="Share that may differ before it exits with 1")
    ] = 0.0,
    repair: Annotated[bool, typer.Option("--repair", help="Put right what differs")] = False,
    every_s: Annotated[
        float | None, typer.Option("--every", min=1, help="Seconds; go on, and serve gauges")
    ] = None,
    log: Annotated[
        str | None, typer.Option(help="Read files instead: a path, folder or address (s3://...)")
    ] = None,
    as_json: _Result = False,
) -> None:
    """Recompute a sample of entities from the log, and compare windows and rows with it."""
    from stream_worker.ops.audit import AuditRequest, audit_view  # noqa: PLC0415 - heavy

    _log_to_stderr(verbose=False)
    request = AuditRequest(sample=sample, seed=seed, repair=repair, tolerance=tolerance, log=log)
    audit_view(settings, request, every_s=every_s, as_json=as_json)


@app.command()
@with_settings
def forget(
    settings: WorkerSettings,
    *,
    entity: Annotated[str, typer.Argument(help="Id of the entity")],
    wait_s: Annotated[
        float, typer.Option("--wait", min=0, help="Seconds to wait for the worker to carry it out")
    ] = 60.0,
    as_json: _Result = False,
) -> None:
    """Delete an entity everywhere but in the log itself, and give a receipt."""
    from stream_worker.ops.forget import forget_from_view  # noqa: PLC0415 - heavy

    _log_to_stderr(verbose=False)
    forget_from_view(settings, entity, wait_s=wait_s, as_json=as_json)


@app.command()
@with_settings
def expire(
    settings: WorkerSettings,
    *,
    idle: Annotated[float, typer.Option(min=0, help="Days without any record of the entity")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count them, write nothing")] = False,
    as_json: _Result = False,
) -> None:
    """Delete entities that have been silent, by tombstones in the log."""
    from stream_worker.ops.forget import expire_view  # noqa: PLC0415 - heavy

    _log_to_stderr(verbose=False)
    expire_view(settings, days=idle, dry_run=dry_run, as_json=as_json)


dlq = typer.Typer(help="Dead letters: list, show, export, retry.", no_args_is_help=True)
app.add_typer(dlq, name="dlq")


@dlq.command(name="list")
@with_settings
def dlq_list(settings: WorkerSettings, *, as_json: _Result = False) -> None:
    """Count dead letters by field and reason."""
    from stream_worker.ops.dlq import list_letters  # noqa: PLC0415 - heavy

    _log_to_stderr(verbose=False)
    list_letters(settings, as_json=as_json)


@dlq.command(name="show")
@with_settings
def dlq_show(
    settings: WorkerSettings,
    *,
    place: Annotated[str, typer.Argument(help="PARTITION:OFFSET of the record itself")],
    as_json: _Result = False,
) -> None:
    """Show one dead letter whole, its entity's id and its value too."""
    from stream_worker.ops.dlq import show_letter  # noqa: PLC0415 - heavy

    _log_to_stderr(verbose=False)
    show_letter(settings, place, as_json=as_json)


@dlq.command(name="export")
@with_settings
def dlq_export(
    settings: WorkerSettings,
    *,
    out: Annotated[Path, typer.Option(help="File to write", dir_okay=False)],
    as_json: _Result = False,
) -> None:
    """Write all dead letters as lines of JSON."""
    from stream_worker.ops.dlq import export_letters  # noqa: PLC0415 - heavy

    _log_to_stderr(verbose=False)
    export_letters(settings, out, as_json=as_json)


@dlq.command(name="retry")
@with_settings
def dlq_retry(
    settings: WorkerSettings,
    *,
    field: Annotated[str | None, typer.Option(help="Only letters of this field")] = None,
    repaired: Annotated[
        Path | None, typer.Option(help="Only these, mended: lines as `dlq export` writes them")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Those tried before, too")] = False,
    as_json: _Result = False,
) -> None:
    """Produce dead letters that are acceptable now to the topic they came from."""
    from stream_worker.ops.dlq import retry_view  # noqa: PLC0415 - heavy

    _log_to_stderr(verbose=False)
    retry_view(settings, field=field, repaired=repaired, again=again, as_json=as_json)


rollout = typer.Typer(
    name="rollout",
    help="Move readers from the bundle that serves to the one that --bundle names.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(rollout)
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would do, and do nothing")]


@rollout.command(name="plan")
@with_settings
def plan_rollout(settings: WorkerSettings, *, as_json: _Result = False) -> None:
    """Say which steps lead to the end; change nothing."""
    _rollout(settings, "plan", as_json=as_json, dry_run=True)


@rollout.command(name="start")
@with_settings
def start_rollout(
    settings: WorkerSettings, *, dry_run: _DryRun = False, as_json: _Result = False
) -> None:
    """Register the new view beside the old one; its workers are started by you."""
    _rollout(settings, "start", as_json=as_json, dry_run=dry_run)


@rollout.command(name="status")
@with_settings
def status_of_rollout(
    settings: WorkerSettings,
    *,
    labels: Annotated[
        Path | None, typer.Option(help="Labels by entity (.parquet, .csv): compare ROC-AUC too")
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="Entities whose vectors are compared")] = 1000,
    as_json: _Result = False,
) -> None:
    """Compare the two bundles' online rows: complete, as fresh, how alike, how good."""
    from stream_worker.ops.rollout_report import show_status  # noqa: PLC0415 - heavy

    _log_to_stderr(verbose=False)
    show_status(settings, labels=labels, sample=sample, as_json=as_json)


@rollout.command(name="switch")
@with_settings
def switch_rollout(
    settings: WorkerSettings,
    *,
    wait_s: Annotated[float, typer.Option(min=0, help="How long to wait for the windows")] = 60.0,
    force: Annotated[bool, typer.Option("--force", help="Even where rows are missing")] = False,
    dry_run: _DryRun = False,
    as_json: _Result = False,
) -> None:
    """Point the stable service at the new bundle, once no entity would lose its row."""
    _rollout(settings, "switch", as_json=as_json, dry_run=dry_run, wait_s=wait_s, force=force)


@rollout.command(name="abort")
@with_settings
def abort_rollout(
    settings: WorkerSettings, *, dry_run: _DryRun = False, as_json: _Result = False
) -> None:
    """Point the stable service back at once, then remove the new view and its rows."""
    _rollout(settings, "abort", as_json=as_json, dry_run=dry_run)


@rollout.command(name="finish")
@with_settings
def finish_rollout(
    settings: WorkerSettings, *, dry_run: _DryRun = False, as_json: _Result = False
) -> None:
    """Remove the old view and its online rows; there is no way back after that."""
    _rollout(settings, "finish", as_json=as_json, dry_run=dry_run)


def _rollout(
    settings: WorkerSettings,
    verb: str,
    *,
    as_json: bool,
    dry_run: bool,
    **options: float,
) -> None:
    from stream_worker.ops.rollout_report import take_steps  # noqa: PLC0415 - heavy

    _log_to_stderr(verbose=False)
    take_steps(settings, verb, dry_run=dry_run, as_json=as_json, **options)


@contextmanager
def _refusing() -> Iterator[None]:
    """One clear line and the exit code of the error tree."""
    from llm4es.errors import LLM4ESError  # noqa: PLC0415 - heavy

    try:
        yield
    except LLM4ESError as error:
        logging.getLogger(__name__).debug("refused", exc_info=error)
        _fail(" ".join(str(error).split()), error.exit_code)


def _fail(line: str, code: int) -> NoReturn:
    typer.echo(f"stream_worker: {line}", err=True)
    raise typer.Exit(code)


def _log_to_stderr(*, verbose: bool, as_json: bool = False) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(
            "%(levelname)s %(name)s %(message)s",
            rename_fields={"levelname": "level", "name": "logger"},
            timestamp="time",
        )
        if as_json
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    # kafka-python tells of every reconnect; what matters of them is raised or logged by us.
    logging.getLogger("kafka").setLevel(logging.ERROR)

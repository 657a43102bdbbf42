"""What the site says of commands, settings and metrics, made from the code by MkDocs' hooks."""

import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import typer
from prometheus_client.registry import Collector
from pydantic import SecretStr
from pydantic_core import PydanticUndefined

from stream_worker.metrics import Metrics
from stream_worker.ops.audit_metrics import AuditMetrics
from stream_worker.settings import ENV_PREFIX, WorkerSettings

__all__ = ["on_page_markdown"]

_MARK = re.compile(r"<!-- (commands|settings|metrics)(?:: (\S+))? -->")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put a table where a page has its mark. Called by MkDocs for each page."""
    tables: dict[str, Callable[[str], Iterator[str]]] = {
        "commands": _commands,
        "settings": lambda _: _settings(),
        "metrics": lambda _: _metrics(),
    }
    return _MARK.sub(lambda mark: "\n".join(tables[mark[1]](mark[2] or "")), markdown)


def _commands(module: str) -> Iterator[str]:
    app = typer.main.get_command(import_module(module).app)
    yield from _group(app, [module.partition(".")[0]])


def _group(group: Any, path: list[str]) -> Iterator[str]:  # noqa: ANN401 - typer's own click
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _group(command, [*path, name])
            continue
        told = " ".join((command.help or "").partition("Secrets are read")[0].split())
        yield f"### {' '.join([*path[1:], name])}\n\n{_cell(told)}\n"
        own = [
            option
            for option in command.params
            if option.name not in {*WorkerSettings.model_fields, "config", "help"}
            or path[0] != "stream_worker"
        ]
        yield from _table(("option", "is"), (_option(option) for option in own))


def _option(option: Any) -> tuple[str, str]:  # noqa: ANN401 - typer's own click
    if option.param_type_name == "argument":
        return f"`{option.name.upper()}`", option.help or ""
    default = option.default
    known = isinstance(default, bool | list | tuple) or default in {None, ...}
    told = "" if known or callable(default) else f" (default `{default}`)"
    return f"`{option.opts[0]}`", f"{option.help or ''}{told}"


def _settings() -> Iterator[str]:
    yield from _table(
        ("flag, variable", "is", "default"),
        (
            (_names(name, secret=field.annotation == SecretStr | None), field.description or "",
             _default(field.default))
            for name, field in WorkerSettings.model_fields.items()
        ),
    )  # fmt: skip


def _names(name: str, *, secret: bool) -> str:
    flag = "" if secret else f"`--{name.replace('_', '-')}`<br>"
    return f"{flag}`{ENV_PREFIX}{name.upper()}`"


def _default(default: object) -> str:
    if default is None or default is PydanticUndefined:
        return ""
    value = default.get_secret_value() if isinstance(default, SecretStr) else default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _metrics() -> Iterator[str]:
    yield from _metrics_of(Metrics())
    yield "\nBy an audit that goes on (`audit --every`):\n"
    yield from _metrics_of(AuditMetrics())


def _metrics_of(collector: Collector) -> Iterator[str]:
    # A counter's samples end in _total, a histogram's in _bucket, _sum and _count.
    yield from _table(
        ("metric", "kind", "is"),
        (
            (f"`{metric.name}{'_total' if metric.type == 'counter' else ''}`", metric.type,
             metric.documentation)
            for metric in collector.collect()
        ),
    )  # fmt: skip


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    found = list(rows)
    if not found:
        return
    yield f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}"
    for row in found:
        yield f"| {' | '.join(_cell(cell) for cell in row)} |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

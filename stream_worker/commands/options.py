"""What the commands share: every setting as an option, and how a refusal is said."""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pythonjsonlogger.json import JsonFormatter

from stream_worker.settings import ENV_PREFIX, SettingsProblem, WorkerSettings, load_settings

__all__ = ["Result", "log_to_stderr", "with_settings"]

Result = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")]
_CONFIG_EXIT = 2


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


def log_to_stderr(*, verbose: bool, as_json: bool = False) -> None:
    """Log to stderr: warnings, and with `verbose` what goes on; as text or as JSON lines."""
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

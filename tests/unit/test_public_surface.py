"""What may be imported: a closed list, and nothing heavy behind it until it is needed."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from pydantic import SecretStr

import llm4es
from stream_worker.settings import ENV_PREFIX, WorkerSettings
from tests.commands import ROOT, run

DOCUMENTED = {
    # errors
    "LLM4ESError", "ConfigError", "BundleMismatch", "SourceUnavailable", "InvalidEvent",
    "NonFiniteEmbedding", "SinkUnavailable", "SinkRejected", "Fenced", "StoreLost",
    # from a record to a row
    "EventSchema", "load_schema", "Event", "Record", "parse_event", "Window", "WindowPolicy",
    "fold", "Renderer", "RenderingSpec", "FeatureRow", "view_name", "service_name",
    # the bundle
    "Bundle", "Manifest", "load_bundle",
}  # fmt: skip
CORE = (
    "errors", "schema", "events", "windows", "rendering", "tokens", "bundle", "surprise",
    "features", "testing",
)  # fmt: skip
HEAVY = (
    "torch", "transformers", "onnxruntime", "openvino", "onnx", "optimum", "feast", "kafka",
    "redis", "pandas", "pyarrow", "duckdb",
)  # fmt: skip
PACKAGES = ("llm4es", "stream_worker", "export")


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def loaded_by(*names: str) -> set[str]:
    """Heavy packages in a fresh process that imports these modules and does nothing else."""
    script = (
        "import importlib, json, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return set(json.loads(done.stdout)) & set(HEAVY)


def test_the_package_offers_exactly_the_documented_names() -> None:
    assert set(llm4es.__all__) == DOCUMENTED
    assert len(llm4es.__all__) == len(DOCUMENTED)
    for name in llm4es.__all__:
        assert getattr(llm4es, name).__name__ == name


def top_level(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those inside its `try`, `if` and `with` included."""
    for statement in body:
        if isinstance(statement, ast.Try | ast.If | ast.With):
            yield from top_level(statement.body)
        else:
            yield statement


def names_in(path: Path) -> tuple[set[str], list[str] | None]:
    """What a module defines or imports at its top, and its `__all__`."""
    defined: set[str] = set()
    listed = None
    for statement in top_level(ast.parse(path.read_text(encoding="utf-8")).body):
        match statement:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                defined.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                defined |= {alias.asname or alias.name for alias in aliases}
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                listed = ast.literal_eval(value)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                defined.add(name)
            case _:
                pass
    return defined, listed


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_which_of_its_names_are_public_and_has_them(path: Path) -> None:
    defined, listed = names_in(path)
    if path.name == "__main__.py":
        return
    if listed is None:
        assert path.name == "__init__.py"
        assert not defined
        return
    assert len(set(listed)) == len(listed)
    assert set(listed) <= defined
    assert not [name for name in listed if name.startswith("_")]


def test_the_core_loads_no_model_store_or_broker() -> None:
    assert loaded_by("llm4es", *(f"llm4es.{name}" for name in CORE)) == set()


def test_the_engine_loads_no_runtime_before_it_is_asked_for_one() -> None:
    assert loaded_by("llm4es.engine") == set()
    assert loaded_by("llm4es.engine.session") == {"onnxruntime"}
    assert loaded_by("llm4es.engine.openvino_graph") == {"openvino"}


@pytest.mark.parametrize("module", ["stream_worker.cli", "stream_worker.settings"])
def test_the_workers_command_line_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(module) == set()


def test_help_names_each_setting_with_its_default_and_environment_variable() -> None:
    done = run(["stream_worker", "run", "--help"], env={"COLUMNS": "100"})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told = " ".join(done.stdout.split())
    for name, field in WorkerSettings.model_fields.items():
        if field.annotation == SecretStr | None:  # on a command line others would see it
            assert f"{ENV_PREFIX}{name.upper()} ({field.description})" in told
            assert f"--{name.replace('_', '-')} " not in told
            continue
        assert f"--{name.replace('_', '-')} " in told
        note = f"[env: {ENV_PREFIX}{name.upper()}"
        default = field.default
        if isinstance(default, SecretStr):
            default = default.get_secret_value()
        if isinstance(default, bool):
            default = str(default).lower()
        assert note + ("]" if default is None else f", default: {default}]") in told


@pytest.mark.parametrize("command", [["run"], ["inspect"], ["repartition"], []])
def test_every_command_answers_help(command: list[str]) -> None:
    done = run(["stream_worker", *command, "--help"])
    assert done.returncode == 0
    assert "Usage: stream_worker" in done.stdout

"""What a user installs: the wheel's content, what it brings along, and that no host is named."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.commands import ROOT

UV = Path(sys.executable).parent / "uv"
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
TRAINING = {"torch", "transformers", "optimum", "accelerate", "peft", "onnx"}
HOSTS = re.compile(
    rb"pypi\.org|pythonhosted|repo1\.maven|repo\.maven|registry\.npmjs|proxy\.golang|"
    rb"--(extra-)?index(-url)?\b|--find-links|--default-index"
)


def uv(*arguments: str) -> str:
    done = subprocess.run(
        [str(UV), *arguments], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def pins(text: str) -> dict[str, set[str]]:
    """Versions that a requirements file pins, by name: several where its markers differ."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(
        r"^([a-z0-9._-]+)(?:\[[a-z,]+\])?==([^\s;\\]+)", text, re.MULTILINE
    ):
        found.setdefault(name, set()).add(version)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    uv("build", "--wheel", "--out-dir", str(out), str(ROOT))
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert {name.split("/")[0] for name in names} == {"llm4es", "stream_worker", "export", info}
    tracked = {
        path.relative_to(ROOT).as_posix()
        for package in ("llm4es", "stream_worker", "export")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if not name.startswith(info)} == tracked
    for package in ("llm4es", "stream_worker", "export"):
        assert f"{package}/py.typed" in names
    assert "export/datasets/payments.yaml" in names
    assert f"{info}/licenses/LICENSE" in names


def test_the_wheels_commands_and_licence_are_in_its_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {n.split("/")[0] for n in archive.namelist() if ".dist-info/" in n}
        commands = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    assert "llm4es-worker = stream_worker.cli:main" in commands
    assert "llm4es-export = export.cli:main" in commands
    assert "License-Expression: Apache-2.0" in metadata
    for extra in ("cpu", "gpu", "openvino", "train", "ray"):
        assert f"Provides-Extra: {extra}\n" in metadata


def resolve(wheel: Path, folder: Path, extra: str) -> dict[str, set[str]]:
    """What an installer would bring along, at the versions that are pinned where they are."""
    wanted = folder / "wanted.in"
    wanted.write_text(f"llm4es[{extra}] @ {wheel.as_uri()}\n")
    lock = ROOT / "requirements" / f"{extra}.txt"
    return pins(uv("pip", "compile", "-q", "--no-header", "-c", str(lock), str(wanted)))


@pytest.mark.parametrize(
    ("extra", "runtime", "other"),
    [("cpu", "onnxruntime", "onnxruntime-gpu"), ("gpu", "onnxruntime-gpu", "onnxruntime")],
)
def test_what_runs_the_worker_brings_one_runtime_and_nothing_of_training(
    wheel: Path, tmp_path: Path, extra: str, runtime: str, other: str
) -> None:
    brought = resolve(wheel, tmp_path, extra)
    assert runtime in brought
    assert other not in brought
    assert not TRAINING & brought.keys()
    assert not [name for name in brought if name.startswith(("nvidia-", "triton"))]
    # What is pinned is what the wheel asks for: neither has run ahead of the other.
    locked = pins((ROOT / "requirements" / f"{extra}.txt").read_text())
    assert brought.keys() <= locked.keys()
    for package, versions in brought.items():
        assert versions <= locked[package], package


def test_training_is_an_extra_of_its_own(wheel: Path, tmp_path: Path) -> None:
    assert resolve(wheel, tmp_path, "train").keys() >= TRAINING


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_requirement_is_pinned_with_hashes(lock: Path) -> None:
    text = re.sub(r" *\\\n", " ", lock.read_text())
    lines = [line for line in text.splitlines() if line.strip() and line.lstrip()[0] != "#"]
    assert len(lines) > 50
    for line in lines:
        assert re.match(r"[a-z0-9._-]+(\[[a-z,]+\])?==\S+ ", line), line
        assert re.search(r" --hash=sha256:[0-9a-f]{64}", line), line


@pytest.mark.parametrize(("name", "runtime"), [("cpu", "onnxruntime"), ("gpu", "onnxruntime-gpu")])
def test_what_is_pinned_for_the_worker_names_no_torch(name: str, runtime: str) -> None:
    locked = pins((ROOT / "requirements" / f"{name}.txt").read_text())
    assert runtime in locked
    assert not TRAINING & locked.keys()


def test_the_pins_of_one_environment_are_those_of_the_next() -> None:
    everything = pins((ROOT / "requirements" / "dev.txt").read_text())
    for lock in LOCKS:
        if lock.name == "bench.txt":
            continue  # quixstreams, whom a benchmark compares with, holds some back
        for package, versions in pins(lock.read_text()).items():
            assert versions <= everything.get(package, versions), (lock.name, package)


def test_no_file_of_the_repository_names_an_index_or_a_registrys_host() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: nothing says which files are the repository's")
    listed = subprocess.run(
        ["git", "ls-files", "-z"],  # noqa: S607
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert len(files) > 100
    named = [
        str(path.relative_to(ROOT))
        for path in files
        if path != Path(__file__) and path.is_file() and HOSTS.search(path.read_bytes())
    ]
    assert named == []

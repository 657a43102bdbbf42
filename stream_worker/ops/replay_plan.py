"""What a replay is about to do: worked out once, and kept beside its windows for a resume."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from llm4es.bundle import Bundle
from llm4es.errors import BundleMismatch, ConfigError
from llm4es.events import TopicPartition
from llm4es.features import view_name
from stream_worker.assembly import deletion_key_of
from stream_worker.ops.logs import ReplayableLog, moments_of
from stream_worker.ops.replay_sink import Into
from stream_worker.ops.snapshot import nearest_snapshot, snapshot_offsets
from stream_worker.ops.spans import resolve_offsets
from stream_worker.ports import LogDescription
from stream_worker.settings import WorkerSettings

__all__ = [
    "PLAN_FILE",
    "WINDOWS_FILE",
    "Plan",
    "ReplayRequest",
    "folder_name",
    "go_on",
    "make_plan",
    "read_into",
    "read_keys",
    "read_plan",
]

PLAN_FILE = "plan.json"
WINDOWS_FILE = "windows.db"


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
    snapshot: str | None = None  # file that windows begin from; else from the log's start
    reached: dict[int, int] = {}  # by partition: offsets that the snapshot stands for

    def before(self, partition: int) -> int:
        """Offsets of a partition before the span, which are folded and give no rows."""
        first, start, _ = self.spans[partition]
        return start - max(first, self.reached.get(partition, 0))

    @property
    def warm_up(self) -> int:
        """The same of all partitions."""
        return sum(map(self.before, self.spans))

    @property
    def records(self) -> int:
        """Offsets of the span."""
        return sum(end - start for _, start, end in self.spans.values())


def make_plan(
    settings: WorkerSettings,
    bundle: Bundle,
    request: ReplayRequest,
    opened: tuple[ReplayableLog, LogDescription],
    entities: tuple[frozenset[bytes] | None, str],
) -> Plan:
    """Work out offsets and a snapshot to begin from. Raises ConfigError, BundleMismatch."""
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
    begins = {TopicPartition(identity.topic, each): span[1] for each, span in spans.items()}
    snapshot, reached = _begin(settings, bundle, begins)
    return Plan(
        bundle=bundle.id,
        view=view,
        topic=identity.topic,
        topic_id=identity.topic_id,
        into=read_into(request.into, view),
        every_event=request.every_event,
        entities=None if keys is None else len(keys),
        entities_sha256=digest,
        spans=spans,
        snapshot=snapshot,
        reached=reached,
    )


def _begin(
    settings: WorkerSettings, bundle: Bundle, begins: Mapping[TopicPartition, int]
) -> tuple[str | None, dict[int, int]]:
    """Give the snapshot that is nearest before the span, and what it stands for."""
    place, key = settings.from_snapshot, deletion_key_of(settings)
    if place is None:
        return None, {}
    if place.is_dir():
        near = nearest_snapshot(place, bundle.id, begins, deletion_key=key)
        return (None, {}) if near is None else (str(near[0]), _by_partition(near[1]))
    held = snapshot_offsets(place, bundle.id, deletion_key=key)
    late = sorted(tp.partition for tp, at in held.items() if at > begins.get(tp, 0))
    if late:
        raise ConfigError(
            "from_snapshot",
            f"stands for offsets within the span (partitions {', '.join(map(str, late))})",
            "name an older snapshot, a folder of them, or none",
        )
    return str(place), _by_partition(held)


def _by_partition(offsets: Mapping[TopicPartition, int]) -> dict[int, int]:
    return {tp.partition: at for tp, at in offsets.items()}


def read_into(text: str, view: str) -> Into:
    """Read where rows go. Raises ConfigError."""
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


def read_keys(path: Path | None) -> tuple[frozenset[bytes] | None, str]:
    """Read whose records are replayed, and a digest of that. Raises ConfigError."""
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


def folder_name(plan: Plan, request: ReplayRequest) -> str:
    """The same command finds the same folder, though the log has grown meanwhile."""
    told = (
        plan.view, plan.topic, plan.into, plan.every_event, plan.entities_sha256,
        request.since, request.upto, request.log,
    )  # fmt: skip
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


def read_plan(folder: Path) -> Plan | None:
    """Read what was begun in a folder; None where nothing was. Raises ConfigError."""
    try:
        return msgspec.json.decode((folder / PLAN_FILE).read_bytes(), type=Plan)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ConfigError("resume", f"{folder}: {error}", "remove the folder") from error


def go_on(folder: Path, plan: Plan, begun: Plan | None, *, resume: bool) -> Plan:
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
    for path in folder.glob(f"{WINDOWS_FILE}*"):
        path.unlink()
    temporary = folder / f"{PLAN_FILE}.tmp"
    temporary.write_bytes(msgspec.json.encode(plan))
    temporary.replace(folder / PLAN_FILE)
    return plan

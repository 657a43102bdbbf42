"""Roll out a new bundle: its view beside the old one's, then the service's move, then the end.

What is true is asked of Feast's registry and the window stores each time; the state's file says
which two bundles this is about and how far it came. Every step can be repeated: what is done is
passed over.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal
from uuid import uuid4

import msgspec

from llm4es.errors import BundleMismatch, ConfigError
from llm4es.events import TopicPartition
from llm4es.feast import Serving, ViewSpec, read_view_spec
from stream_worker.assembly import BundleId, open_window_store
from stream_worker.connections import kafka_settings
from stream_worker.ops.comparison import Comparison, compare_rows, read_labels
from stream_worker.ports import WindowStore
from stream_worker.settings import WorkerSettings
from stream_worker.sources.kafka_client import admin, group_members

__all__ = ["Done", "Rollout", "Stage", "State"]

Stage = Literal["started", "switched", "aborting", "aborted", "finishing", "finished"]
_OVER = {"aborted", "finished"}
_LOOK_S = 0.2


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept between two calls."""

    entity: str
    old: str
    new: str
    stage: Stage
    since: datetime


@dataclass(frozen=True, slots=True)
class Done:
    """What a step did, or would do."""

    says: str
    done: Literal["done", "was done", "would"]


@dataclass(frozen=True, slots=True)
class _Step:
    says: str
    needed: Callable[[], bool]
    do: Callable[[], object]


class Rollout:
    """The way from the bundle that serves to the one that `settings` name.

    Each verb gives what it did; with `dry_run` what it would do, and does nothing. `on_step` is
    told of each step before and after it is taken; what it raises ends the verb there. Raises
    ConfigError where a verb does not fit how things stand, BundleMismatch for another entity.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        dry_run: bool = False,
        on_step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._dry_run = dry_run
        self._on_step = on_step
        self.spec: ViewSpec = read_view_spec(settings.bundle)
        self.entity = self.spec.manifest.entity
        self.new = self.spec.manifest.id
        self.serving = Serving(
            settings.feature_repo, self.entity, config_file=settings.feature_store_file
        )
        self._path = settings.state_dir / f"rollout-{self.entity}.json"

    # --- verbs

    def plan(self) -> list[Done]:
        """Say which steps lead from here to the end."""
        old = self._old()
        steps = [
            f"start: register the view of {self.new} beside that of {old}; readers notice nothing",
            f"run its workers, a consumer group of its own: {self._run_command()}",
            "status: wait until its rows are complete; compare them",
            f"switch: point {self.entity}_llm4es at {self.new} in one write; abort takes it back",
            f"finish: stop the workers of {old}, remove its view and online rows",
        ]
        return [Done(step, "would") for step in steps]

    def start(self) -> list[Done]:
        """Register the new view beside the old one."""
        state = self._state()
        if state is not None and state.stage not in _OVER and state.new != self.new:
            raise ConfigError(
                "bundle",
                f"the roll-out of {state.new} is under way ({state.stage})",
                "finish or abort it first",
            )
        if state is None or state.stage in _OVER:
            old = self.serving.served
            if old == self.new:
                raise ConfigError(
                    "bundle", f"{self.new} serves already", "name another with --bundle"
                )
            state = self._made(old, "started")
        elif state.stage != "started":
            raise ConfigError("rollout", f"is {state.stage}", "see rollout status")
        return self._take(
            [
                _Step(f"note the roll-out from {state.old} to {self.new} in {self._path}",
                      lambda: self._state() != state, lambda: self._write(state)),
                _Step(f"register the view of {self.new}",
                      lambda: self.new not in self.serving.bundles,
                      lambda: self.serving.register(self.spec)),
            ]
        )  # fmt: skip

    def status(self, *, labels: Path | None = None, sample: int = 1000) -> Comparison:
        """Compare the online rows of all entities that the old bundle has a window of."""
        state = self._under_way("started", "switched")
        known = read_labels(labels, f"{self.entity}_id") if labels else None
        old, new = self.serving.reader(state.old), self.serving.reader(state.new)
        try:
            with self._windows(state.old) as store:
                return compare_rows(self._entities(store), old, new, sample=sample, labels=known)
        finally:
            old.close()
            new.close()

    def lag(self) -> int:
        """Records by which the new bundle's windows are behind the old one's."""
        state = self._under_way("started", "switched")
        with self._windows(state.old) as old, self._windows(state.new) as new:
            return _behind(self._offsets(old), self._offsets(new))

    def switch(self, *, wait_s: float = 60.0, force: bool = False) -> list[Done]:
        """Point the stable service at the new bundle, once no entity would lose its row.

        Waits until the new windows hold what the old ones held when this was asked; then every
        entity that has a row of the old bundle must have one of the new, or `force` be given.
        """
        state = self._under_way("started", "switched")
        if state.stage == "started" and self.new not in self.serving.bundles:
            raise ConfigError("rollout", "has no new view yet", "run rollout start")
        if not self._dry_run and not force and self.serving.served != state.new:
            self._refuse_incomplete(state, wait_s)
        return self._take(
            [
                _Step(f"point {self.entity}_llm4es at {state.new}, away from {state.old}",
                      lambda: self.serving.served != state.new,
                      lambda: self.serving.switch(state.new)),
                self._note("switched"),
            ]
        )  # fmt: skip

    def abort(self) -> list[Done]:
        """Point the stable service back at the old bundle at once; then remove the new view."""
        state = self._under_way("started", "switched", "aborting", "aborted")
        return self._take(
            [
                _Step(f"point {self.entity}_llm4es back at {state.old}",
                      lambda: self.serving.served != state.old,
                      lambda: self.serving.switch(state.old)),
                self._note("aborting", unless="aborted"),
                *self._removal(state.new),
                self._note("aborted"),
            ]
        )  # fmt: skip

    def finish(self) -> list[Done]:
        """Remove the old bundle's view and online rows; there is no way back after that."""
        state = self._under_way("switched", "finishing", "finished")
        if self.serving.served != state.new:
            raise ConfigError(
                "rollout",
                f"{self.entity}_llm4es points to {self.serving.served}, not to {state.new}",
                "run rollout switch",
            )
        return self._take(
            [self._note("finishing", unless="finished"), *self._removal(state.old),
             self._note("finished")]
        )  # fmt: skip

    def state(self) -> State | None:
        """How far it came; None where none was started."""
        return self._state()

    # --- steps

    def _take(self, steps: Sequence[_Step]) -> list[Done]:
        taken = []
        for step in steps:
            if not step.needed():
                taken.append(Done(step.says, "was done"))
            elif self._dry_run:
                taken.append(Done(step.says, "would"))
            else:
                self._on_step(f"before: {step.says}")
                step.do()
                self._on_step(f"after: {step.says}")
                taken.append(Done(step.says, "done"))
        return taken

    def _removal(self, bundle_id: str) -> list[_Step]:
        return [
            _Step(f"see that no worker of {bundle_id} runs",
                  lambda: bundle_id in self.serving.bundles,
                  lambda: self._refuse_live(bundle_id)),
            _Step(f"remove the view of {bundle_id} and its online rows; its offline log stays",
                  lambda: bundle_id in self.serving.bundles,
                  lambda: self.serving.drop(bundle_id)),
        ]  # fmt: skip

    def _note(self, stage: Stage, *, unless: Stage | None = None) -> _Step:
        def needed() -> bool:
            state = self._state()
            return state is not None and state.stage not in {stage, unless}

        def write() -> None:
            state = self._under_way()
            self._write(msgspec.structs.replace(state, stage=stage, since=datetime.now(UTC)))

        return _Step(f"note that it is {stage}", needed, write)

    def _refuse_incomplete(self, state: State, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        with self._windows(state.old) as old, self._windows(state.new) as new:
            due = self._offsets(old)
            while behind := _behind(due, self._offsets(new)):
                if time.monotonic() > deadline:
                    raise ConfigError(
                        "rollout",
                        f"the windows of {state.new} are {behind:,} records behind",
                        f"let its workers catch up ({self._run_command()}), or give --force",
                    )
                time.sleep(_LOOK_S)
        found = self.status(sample=0)
        if found.missing:
            raise ConfigError(
                "rollout",
                f"{found.missing:,} of {found.entities:,} entities have no row of {state.new}",
                "let its workers catch up, or give --force",
            )

    def _refuse_live(self, bundle_id: str) -> None:
        if self._settings.source == "file":
            return
        servers = self._settings.bootstrap_servers or self.serving.bootstrap_servers
        kafka = kafka_settings(self._settings, servers)
        group = f"llm4es-{self.entity}-{bundle_id}"
        with admin(kafka) as client:
            members = group_members(client, group)
        if members:
            raise ConfigError(
                "rollout",
                f"{members} workers of {bundle_id} run (consumer group {group}): their rows would "
                "stand without a view",
                "stop them, and give the same command again",
            )

    # --- what is asked

    def _old(self) -> str:
        state = self._state()
        if state is not None and state.stage not in _OVER and state.new == self.new:
            return state.old
        return self.serving.served

    def _entities(self, store: WindowStore) -> Iterator[str]:
        partitions = list(self._offsets(store))
        return (window.entity_id for window in store.scan(partitions) if not window.deleted)

    def _offsets(self, store: WindowStore) -> dict[TopicPartition, int]:
        return {
            tp: offset for topic in store.topics() for tp, offset in store.offsets(topic).items()
        }

    @contextmanager
    def _windows(self, bundle_id: str) -> Iterator[WindowStore]:
        store = open_window_store(self._settings, BundleId(bundle_id), read_only=True)
        try:
            if not store.topics():
                raise ConfigError(
                    "window_store",
                    f"holds no windows of bundle {bundle_id}",
                    f"start its workers, or name the store that they use: {self._run_command()}",
                )
            yield store
        finally:
            store.close()

    def _run_command(self) -> str:
        return f"python -m stream_worker run --bundle {self._settings.bundle}"

    def _under_way(self, *stages: Stage) -> State:
        state = self._state()
        if state is None:
            raise ConfigError("rollout", "none was started", "run rollout start")
        if state.new != self.new:
            raise BundleMismatch(
                f"bundle {self.new}",
                f"is not the one that is rolled out, {state.new}",
                "name that one with --bundle",
            )
        if stages and state.stage not in stages:
            raise ConfigError("rollout", f"is {state.stage}", "see rollout status")
        return state

    def _made(self, old: str, stage: Stage) -> State:
        return State(
            entity=self.entity, old=old, new=self.new, stage=stage, since=datetime.now(UTC)
        )

    def _state(self) -> State | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=State)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(
                "state_dir", f"{self._path} cannot be read ({error})", "mend or remove the file"
            ) from error

    def _write(self, state: State) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".{self._path.name}.{uuid4().hex[:8]}.tmp")
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(state)))
        temporary.replace(self._path)

    def document(self) -> dict[str, object]:
        """How things stand, for a program."""
        state = self._state()
        return {
            "served": self.serving.served,
            "views": sorted(self.serving.bundles),
            "rollout": None if state is None else msgspec.to_builtins(state),
        }


def _behind(due: dict[TopicPartition, int], found: dict[TopicPartition, int]) -> int:
    return sum(max(0, offset - found.get(tp, 0)) for tp, offset in due.items())

"""Readers of the stable service see one bundle, then the other, and lose nothing on the way."""

import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feast import FeatureStore
from feast.errors import FeatureViewNotFoundException

from dev.processes import wait_until
from dev.servers import KafkaServer, RedisServer
from llm4es.errors import BundleMismatch, ConfigError
from llm4es.events import TopicPartition
from llm4es.feast import FeastSink, Serving, ViewSpec, open_sink
from llm4es.windows import Window
from stream_worker.ops.comparison import compare_rows
from stream_worker.ops.rollout import Done, Rollout
from stream_worker.ports import LogIdentity
from stream_worker.settings import WorkerSettings, load_settings
from stream_worker.sources.kafka_client import (
    KafkaConsumer,
    KafkaSettings,
    admin,
    group_members,
)
from stream_worker.window_store.sqlite import SqliteWindowStore
from tests.feast_parts import NOON, apply, make_repo, make_spec, row
from tests.integration.ops.processes import Killable, take_step
from tests.kafka_topics import make_topics

pytestmark = [
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
    # A reader that holds the service's former version is told so.
    pytest.mark.filterwarnings("ignore:The FeatureService object"),
]

TP = TopicPartition("payments", 0)
OLD, NEW = "a" * 12, "b" * 12
SERVICE = "customer_llm4es"


@dataclass
class World:
    """Two bundles of one entity on one Redis, or on SQLite, and the window store of both."""

    folder: Path
    repo: Path
    old: ViewSpec
    new: ViewSpec
    ids: list[str]

    def settings(self, bundle: str = "new") -> WorkerSettings:
        flags = {
            "bundle": self.folder / bundle,
            "feature_repo": self.repo,
            "window_store": f"sqlite:{self.folder / 'windows.db'}",
            "state_dir": self.folder / "state",
            "source": "file",
        }
        return load_settings(flags, None)

    def rollout(self, **options: Any) -> Rollout:  # noqa: ANN401 - Rollout's own
        return Rollout(self.settings(), **options)

    def fold(self, bundle_id: str, ids: Sequence[str], reached: int) -> None:
        """What a worker of that bundle leaves in the window store."""
        store = SqliteWindowStore(self.folder / "windows.db", bundle_id)
        store.remember(LogIdentity(topic=TP.topic, topic_id="t", partitions=1))
        with store.begin() as txn:
            known = txn.load(ids)
            for entity_id in ids:
                if not known[entity_id].version:
                    txn.put(
                        Window(
                            entity_id=entity_id, topic=TP.topic, partition=0, next_offset=reached
                        )
                    )
            txn.advance({TP: reached})
        store.close()

    def sink(self, spec: ViewSpec) -> FeastSink:
        return open_sink(self.repo, spec, writer_id=spec.manifest.id)

    def publish(self, spec: ViewSpec, ids: Sequence[str], seed: int = 0) -> None:
        sink = self.sink(spec)
        sink.publish([row(spec, each, seed=seed + n) for n, each in enumerate(ids)])
        sink.close()

    def caught_up(self) -> None:
        """The new bundle's worker has done what the old one's has."""
        self.publish(self.new, self.ids)
        self.fold(NEW, self.ids, 10)

    @property
    def served(self) -> str:
        return Serving(self.repo, "customer", config_file="feature_store.yaml").served


def make_world(folder: Path, unique: str, redis: RedisServer | None) -> World:
    old = make_spec(folder / "old", bundle_id=OLD, dim=8)
    new = make_spec(folder / "new", bundle_id=NEW, dim=12)
    repo = make_repo(
        folder / "repo",
        redis_url=None if redis is None else redis.address,
        registry="{path: data/registry.db, cache_ttl_seconds: 1}",
    )
    apply(repo, old)
    world = World(folder, repo, old, new, [f"{unique}-{n}" for n in range(20)])
    world.publish(old, world.ids)
    world.fold(OLD, world.ids, 10)
    return world


@pytest.fixture
def world(tmp_path: Path, unique: str) -> World:
    return make_world(tmp_path, unique, None)


@dataclass
class Reader(threading.Thread):
    """A stock client that asks for all entities, over and over, by the service's name."""

    repo: Path
    ids: list[str]
    stop: threading.Event
    seen: list[tuple[str, ...]] = field(default_factory=list)  # bundles of one answer, in turn
    bad: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self.store = FeatureStore(repo_path=str(self.repo))

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                self.ask()
        except Exception as error:  # noqa: BLE001 - told by the test
            self.bad.append(repr(error))

    def ask(self) -> None:
        try:
            answer = self.store.get_online_features(
                features=self.store.get_feature_service(SERVICE),
                entity_rows=[{"customer_id": each} for each in self.ids],
            ).to_dict()
        except FeatureViewNotFoundException:
            return  # the service moved between the two calls: ask again
        bundles = tuple(sorted(set(map(str, answer["bundle_id"]))))
        if not self.seen or self.seen[-1] != bundles:
            self.seen.append(bundles)
        dims = {len(vector or ()) for vector in answer["embedding"]}
        if dims != {{OLD: 8, NEW: 12}.get(bundles[0])}:
            self.bad.append(f"{bundles}: vectors of {dims}")


def test_under_load_readers_see_the_old_bundle_until_the_switch_and_the_new_one_after_it(
    tmp_path: Path, unique: str, redis_server: RedisServer
) -> None:
    world = make_world(tmp_path, unique, redis_server)
    stop = threading.Event()
    readers = [Reader(world.repo, world.ids, stop) for _ in range(2)]
    world.rollout().start()
    world.caught_up()

    def write(spec: ViewSpec) -> None:
        sink = world.sink(spec)
        for step in count(1):
            if stop.is_set():
                break
            moment = NOON + timedelta(seconds=step)
            sink.publish([row(spec, each, as_of=moment, seed=step) for each in world.ids])
        sink.close()

    writers = [threading.Thread(target=write, args=[spec]) for spec in (world.old, world.new)]
    try:
        for thread in (*readers, *writers):
            thread.start()
        due: list[tuple[str, ...]] = []
        for verb, bundle in (("", OLD), ("switch", NEW), ("abort", OLD)):
            if verb == "switch":
                world.rollout().switch()
            elif verb:  # the way back: at once, before anything is removed
                world.rollout().serving.switch(OLD)
            due.append((bundle,))
            assert wait_until(
                lambda: all(reader.seen == due or reader.bad for reader in readers),
                timeout_s=60,
                every_s=0.05,
            ), [reader.seen for reader in readers]
    finally:
        stop.set()
        for thread in (*readers, *writers):
            if thread.ident is not None:
                thread.join(timeout=30)
    assert [reader.bad for reader in readers] == [[], []]


@pytest.mark.parametrize("ending", ["finish", "abort"])
def test_killed_before_and_after_every_step_it_completes_when_run_again(
    world: World, ending: str
) -> None:
    for verb in ("start", "switch", ending):
        for at in count(1):
            if verb == "switch":
                world.caught_up()
            code = Killable(take_step, world.settings().model_dump(), verb, at).end()
            if code == -signal.SIGKILL:
                continue
            assert code == 0
            break
        assert at > 2, verb  # it was killed at least before and after one step
    left, gone = (NEW, OLD) if ending == "finish" else (OLD, NEW)
    state = world.rollout().state()
    assert state is not None
    assert state.stage == {"finish": "finished", "abort": "aborted"}[ending]
    assert world.served == left
    serving = world.rollout().serving
    assert serving.bundles == {left}
    rows = serving.reader(left).read(world.ids)
    assert {found.bundle_id for found in rows if found} == {left}
    assert None not in rows
    with pytest.raises(ConfigError, match="has no view"):
        serving.reader(gone)
    again = getattr(world.rollout(), ending)()
    assert {step.done for step in again} == {"was done"}


def test_a_dry_run_says_every_step_and_does_none(world: World) -> None:
    def said(steps: list[Done]) -> set[str]:
        return {step.done for step in steps}

    assert said(world.rollout(dry_run=True).start()) == {"would"}
    assert world.rollout().state() is None
    assert world.rollout().serving.bundles == {OLD}
    world.rollout().start()
    world.caught_up()
    assert said(world.rollout(dry_run=True).switch()) == {"would"}
    assert world.served == OLD
    world.rollout().switch()
    assert "would" in said(world.rollout(dry_run=True).finish())
    assert "would" in said(world.rollout(dry_run=True).abort())
    assert world.served == NEW
    assert world.rollout().serving.bundles == {OLD, NEW}
    assert len(world.rollout().plan()) == 5


def test_a_switch_that_would_lose_a_row_is_refused(world: World) -> None:
    with pytest.raises(ConfigError, match="none was started"):
        world.rollout().switch()
    world.rollout().start()
    with pytest.raises(ConfigError, match=f"holds no windows of bundle {NEW}"):
        world.rollout().switch(wait_s=0)
    world.publish(world.new, world.ids[:-1])
    world.fold(NEW, world.ids, 9)
    with pytest.raises(ConfigError, match="1 records behind"):
        world.rollout().switch(wait_s=0)
    world.fold(NEW, world.ids, 10)
    with pytest.raises(ConfigError, match=f"1 of 20 entities have no row of {NEW}"):
        world.rollout().switch()
    with pytest.raises(ConfigError, match=f"points to {OLD}|is started"):
        world.rollout().finish()
    assert world.served == OLD
    world.rollout().switch(force=True)
    assert world.served == NEW


def test_one_roll_out_at_a_time_and_never_to_what_serves(world: World) -> None:
    with pytest.raises(ConfigError, match=f"{OLD} serves already"):
        Rollout(world.settings("old")).start()
    world.rollout().start()
    make_spec(world.folder / "third", bundle_id="c" * 12)
    with pytest.raises(ConfigError, match=f"roll-out of {NEW} is under way"):
        Rollout(world.settings("third")).start()
    with pytest.raises(BundleMismatch, match="is not the one that is rolled out"):
        Rollout(world.settings("third")).switch()


def test_status_tells_what_is_missing_behind_and_alike(world: World) -> None:
    world.rollout().start()
    sink = world.sink(world.new)
    early = NOON - timedelta(seconds=7)
    sink.publish(
        [row(world.new, each, as_of=early if n < 3 else NOON, seed=n)
         for n, each in enumerate(world.ids[:-2])]
    )  # fmt: skip
    sink.close()
    world.fold(NEW, world.ids, 8)
    labels = world.folder / "labels.csv"
    lines = [f"{each},{n % 2}" for n, each in enumerate(world.ids)]
    labels.write_text("\n".join(["customer_id,label", *lines]))
    found = world.rollout().status(labels=labels)
    assert (found.entities, found.missing, found.behind) == (20, 2, 3)
    assert found.coverage == 0.9
    assert found.behind_worst_s == 7
    assert found.sampled == found.labelled == 18
    assert found.neighbour_overlap is not None
    assert 0 < found.neighbour_overlap < 1
    assert found.auc_old is not None
    assert world.rollout().lag() == 2


def test_a_space_that_is_turned_has_the_same_neighbours(world: World) -> None:
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    rows = {n: row(world.old, n, seed=i) for i, n in enumerate(world.ids)}

    class Turned:
        def __init__(self, by: Any) -> None:  # noqa: ANN401 - a matrix
            self.by = by

        def read(self, ids: Sequence[str]) -> list[Any]:
            return [
                row(world.old, each, embedding=(rows[each].embedding @ self.by).astype(np.float32))
                for each in ids
            ]

    plain, mirrored = Turned(np.eye(8)), Turned(-np.eye(8))
    assert compare_rows(world.ids, plain, mirrored).neighbour_overlap == 1
    turned = compare_rows(world.ids, plain, Turned(turn)).neighbour_overlap
    assert turned is not None
    assert turned > 0.5  # centring by axis leaves it nearly so


def test_workers_that_run_are_seen_before_their_view_is_removed(
    world: World, kafka_server: KafkaServer, unique: str
) -> None:
    make_topics(kafka_server, unique)
    world.rollout().start()
    world.caught_up()
    world.rollout().switch()
    settings = world.settings().model_copy(
        update={"source": "kafka", "bootstrap_servers": kafka_server.bootstrap_servers}
    )
    worker = KafkaConsumer(
        bootstrap_servers=kafka_server.bootstrap_servers, group_id=f"llm4es-customer-{OLD}"
    )
    worker.subscribe([unique])
    deadline = time.monotonic() + 120
    while not worker.assignment():
        worker.poll(timeout_ms=100)
        assert time.monotonic() < deadline
    with pytest.raises(ConfigError, match=r"1 workers of a{12} run.*stop them"):
        Rollout(settings).finish()
    worker.close()
    with admin(KafkaSettings(bootstrap_servers=kafka_server.bootstrap_servers)) as client:
        assert group_members(client, f"{unique}, which nobody knows") == 0
    assert Rollout(settings).finish()[-1].done == "done"
    assert world.rollout().serving.bundles == {NEW}

"""A snapshot of any window store starts any other where the first one stood."""

from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import pytest
from msgspec.structs import replace

from dev.servers import RedisServer
from llm4es.errors import BundleMismatch, ConfigError
from llm4es.testing import Boundaries, Crash, modelless_bundle
from stream_worker.ops.snapshot import restore_snapshot, take_snapshot
from stream_worker.ports import WindowStore
from stream_worker.window_store.redis import RedisWindowStore
from stream_worker.window_store.sqlite import SqliteWindowStore
from tests.faults.worlds import POLICY, World, assert_equal_to_clean, shop_log
from tests.histories import schema

Opener = Callable[[str], WindowStore]
BUNDLE = modelless_bundle(schema(), entity="customer", window=POLICY).id


@pytest.fixture(params=["sqlite", "redis"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Opens stores by name."""
    if request.param == "sqlite":
        yield lambda name: SqliteWindowStore(tmp_path / f"{name}.db", BUNDLE)
        return
    with RedisServer(tmp_path / "redis", persistence="none") as server:
        yield lambda name: RedisWindowStore(f"{server.url}/{len(name) % 16}", BUNDLE)


def test_a_worker_goes_on_from_a_snapshot_as_if_it_had_folded_what_came_before(
    opener: Opener, tmp_path: Path
) -> None:
    log = shop_log(3, deletions=0)
    (tmp_path / "clean").mkdir()
    clean = World(tmp_path / "clean", log)
    clean.work(batches=iter(lambda: 1, 0), every_event=True)

    first = World(tmp_path, log, lambda _: opener("first"))
    with pytest.raises(Crash):
        first.work(boundaries=Boundaries("before journal", 9))
    store = opener("first")
    offsets = take_snapshot(store, tmp_path / "windows.snapshot", BUNDLE)
    assert sum(offsets.values()) == 64
    with pytest.raises(ConfigError, match="is there already"):
        take_snapshot(store, tmp_path / "windows.snapshot", BUNDLE)
    store.close()

    # Online and offline rows, and the group, stay behind: the second place has none of them.
    second = World(tmp_path, log, lambda _: opener("the second"))
    fresh = opener("the second")
    assert restore_snapshot(tmp_path / "windows.snapshot", fresh, BUNDLE) == offsets
    assert restore_snapshot(tmp_path / "windows.snapshot", fresh, BUNDLE) == {}
    fresh.close()
    second.letters.parked += first.letters.parked
    second.work()
    assert second.metrics.summary().records == len(log) - 64
    assert_equal_to_clean(second, clean)


def test_a_restore_that_broke_off_is_done_again(opener: Opener, tmp_path: Path) -> None:
    world = World(tmp_path, shop_log(3, deletions=0), lambda _: opener("first"))
    world.work()
    store, fresh = opener("first"), opener("the second")
    take_snapshot(store, tmp_path / "windows.snapshot", BUNDLE)
    with fresh.begin() as txn:
        for window in store.scan({record.topic_partition for record in world.log}):
            txn.put(replace(window, version=0))
    assert restore_snapshot(tmp_path / "windows.snapshot", fresh, BUNDLE)
    assert fresh.topics() == {"shop"}
    store.close()
    fresh.close()


def test_what_no_snapshot_can_be_taken_of_or_started_from_is_refused(
    opener: Opener, tmp_path: Path
) -> None:
    store = opener("first")
    with pytest.raises(ConfigError, match="holds no windows of this bundle"):
        take_snapshot(store, tmp_path / "out", BUNDLE)
    assert not (tmp_path / "out").exists()
    store.close()
    deleting = World(tmp_path, shop_log(3))
    deleting.work(before_polls=repeat(lambda: None))
    kept = deleting.open_store()
    with pytest.raises(ConfigError, match="what deletion leaves"):
        take_snapshot(kept, tmp_path / "out", BUNDLE)
    kept.close()
    other = SqliteWindowStore(tmp_path / "other.db", "another")
    other.close()
    fresh = opener("the second")
    with pytest.raises(BundleMismatch, match="holds no windows of bundle"):
        restore_snapshot(tmp_path / "other.db", fresh, BUNDLE)
    with pytest.raises(ConfigError, match="there is no file"):
        restore_snapshot(tmp_path / "nowhere", fresh, BUNDLE)
    fresh.close()

"""One suite over every window store: what the worker may rely on."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from dev.servers import RedisServer
from llm4es.errors import Fenced, LLM4ESError, SinkUnavailable
from llm4es.events import TopicPartition
from llm4es.windows import Chapter, SealedHistory, Window
from stream_worker.ports import LogIdentity, WindowStore
from stream_worker.window_store.redis import RedisWindowStore
from stream_worker.window_store.sqlite import SqliteWindowStore
from tests.histories import START, event

Opener = Callable[[str], WindowStore]
P0, P1 = TopicPartition("shop", 0), TopicPartition("shop", 1)


@pytest.fixture(params=["sqlite", "redis"])
def opener(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[Opener]:
    """Opens stores of one server: two of them are two workers."""
    opened: list[WindowStore] = []

    def keep(store: WindowStore) -> WindowStore:
        opened.append(store)
        return store

    if request.param == "sqlite":
        yield lambda bundle: keep(SqliteWindowStore(tmp_path / "windows.db", bundle))
    else:
        redis: RedisServer = request.getfixturevalue("redis_server")
        yield lambda bundle: keep(RedisWindowStore(redis.url, f"{unique}-{bundle}"))
    for store in opened:
        store.close()


@pytest.fixture
def store(opener: Opener) -> WindowStore:
    return opener("b1")


def window(entity_id: str = "c1", **more: object) -> Window:
    """A window that has everything a window can have."""
    events = (event(0), event(1, kind="login"), event(2.000001, fields={"amount": 3, "goods": "é"}))
    chapter = Chapter(events=events, first=events[0].key, last=events[-1].key, count=3, tokens=99)
    sealed = replace(chapter, events=(), ids_hash=b"hash", sums=np.array([0.1, np.inf, -3.0]))
    made = Window(
        entity_id=entity_id,
        topic="shop",
        partition=1,
        next_offset=7,
        as_of=START + timedelta(microseconds=1),
        sealed=SealedHistory(chapters=2, count=9, sums=np.array([1.5, 2.5, 0.1])),
        chapters=(sealed, chapter),
    )
    return replace(made, **more)  # type: ignore[arg-type]


def put(store: WindowStore, *windows: Window) -> None:
    with store.begin() as txn:
        for each in windows:
            txn.put(each)


def test_an_unknown_entity_gets_an_empty_window_of_version_0(store: WindowStore) -> None:
    with store.begin() as txn:
        assert txn.load(["c1"]) == {"c1": Window(entity_id="c1")}
    assert store.read("c1") is None


def test_a_window_comes_back_as_it_was_with_its_version_raised(store: WindowStore) -> None:
    put(store, window())
    found = store.read("c1")
    assert found is not None
    assert found.version == 1
    due = window()
    assert replace(found, version=0, sealed=None, chapters=()) == replace(
        due, sealed=None, chapters=()
    )
    assert found.sealed is not None
    assert due.sealed is not None
    assert (found.sealed.chapters, found.sealed.count) == (2, 9)
    np.testing.assert_array_equal(found.sealed.sums, due.sealed.sums)
    assert found.chapters[1] == due.chapters[1]
    assert found.chapters[0].sums is not None
    np.testing.assert_array_equal(found.chapters[0].sums, np.array([0.1, np.inf, -3.0]))
    assert replace(found.chapters[0], sums=None) == replace(due.chapters[0], sums=None)


def test_versions_rise_with_each_write_and_offsets_are_kept_per_partition(
    store: WindowStore,
) -> None:
    put(store, window())
    with store.begin() as txn:
        txn.put(txn.load(["c1"])["c1"])
        txn.advance({P0: 3})
    with store.begin() as txn:
        txn.advance({P1: 9})
    with store.begin() as txn:
        assert txn.load(["c1"])["c1"].version == 2
    assert store.offsets("shop") == {P0: 3, P1: 9}
    assert store.offsets("other") == {}


def test_a_batch_that_fails_writes_nothing(store: WindowStore) -> None:
    def fail() -> None:
        with store.begin() as txn:
            txn.put(window())
            txn.advance({P0: 3})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert store.read("c1") is None
    assert store.offsets("shop") == {}


@pytest.mark.parametrize("known", [False, True])
def test_a_worker_whose_window_was_written_by_another_is_fenced(
    opener: Opener, *, known: bool
) -> None:
    mine, other = opener("b1"), opener("b1")
    if known:
        put(mine, window())

    def lose() -> None:
        with mine.begin() as txn:
            read = txn.load(["c1"])["c1"]
            put(other, other.read("c1") or window(next_offset=8))
            txn.put(replace(read, next_offset=99))
            txn.advance({P0: 99})

    with pytest.raises(Fenced):
        lose()
    found = mine.read("c1")
    assert found is not None
    assert found.next_offset != 99
    assert mine.offsets("shop") == {}


def test_windows_of_two_bundles_never_meet(opener: Opener) -> None:
    one, two = opener("b1"), opener("b2")
    put(one, window())
    one.remember(LogIdentity(topic="shop", topic_id="t", partitions=2))
    assert two.read("c1") is None
    assert two.identity("shop") is None


def test_the_log_is_remembered_across_a_restart(opener: Opener) -> None:
    identity = LogIdentity(topic="shop", topic_id="t-1", partitions=4)
    first = opener("b1")
    assert first.identity("shop") is None
    first.remember(identity)
    assert opener("b1").identity("shop") == identity


def test_entity_ids_are_bytes_of_any_kind(store: WindowStore) -> None:
    ids = ["", "a b", "{c}", "é:*", "x" * 512]
    put(store, *(window(entity_id=each) for each in ids))
    with store.begin() as txn:
        assert {key: found.version for key, found in txn.load(ids).items()} == dict.fromkeys(ids, 1)


def test_a_record_of_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    store = SqliteWindowStore(tmp_path / "windows.db", "b1")
    put(store, window())
    store._connection.execute("UPDATE windows SET record = x'00'")  # noqa: SLF001 - a damaged file
    with pytest.raises(LLM4ESError, match="cannot be read"):
        store.read("c1")
    store.close()


def test_a_redis_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(SinkUnavailable):
        RedisWindowStore("redis://127.0.0.1:1/0", "b1")

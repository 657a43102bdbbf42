"""One suite over every window store: what the worker may rely on."""

import logging
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from msgspec import structs
from redis import Redis

from dev.servers import RedisClusterServers, RedisSentinelServers, RedisServer, wait_until
from llm4es.deletion import DeletionKey
from llm4es.errors import ConfigError, Fenced, LLM4ESError, SinkUnavailable, StoreLost
from llm4es.events import TopicPartition
from llm4es.windows import Chapter, SealedHistory, Window, bury
from stream_worker.ports import LogIdentity, WindowStore
from stream_worker.window_store.codec import decode_window, encode_window
from stream_worker.window_store.redis import RedisWindowStore
from stream_worker.window_store.sqlite import SqliteWindowStore
from tests.histories import START, event

Opener = Callable[[str], WindowStore]


class Keyed(NamedTuple):
    open: Callable[[DeletionKey | None], WindowStore]
    names: Callable[[], str]


KEY = DeletionKey("a key of tests alone")
P0, P1 = TopicPartition("shop", 0), TopicPartition("shop", 1)


@pytest.fixture(scope="module")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisClusterServers]:
    with RedisClusterServers(tmp_path_factory.mktemp("cluster")) as servers:
        yield servers


@pytest.fixture(params=["sqlite", "redis", "redis cluster"])
def opener(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[Opener]:
    """Opens stores of one server: two of them are two workers."""
    opened: list[WindowStore] = []

    def keep(store: WindowStore) -> WindowStore:
        opened.append(store)
        return store

    if request.param == "sqlite":
        yield lambda bundle: keep(SqliteWindowStore(tmp_path / "windows.db", bundle))
    else:
        servers: Any = request.getfixturevalue(
            "redis_server" if request.param == "redis" else "redis_cluster"
        )
        yield lambda bundle: keep(RedisWindowStore(servers.url, f"{unique}-{bundle}"))
    for store in opened:
        store.close()


@pytest.fixture
def store(opener: Opener) -> WindowStore:
    return opener("b1")


def window(entity_id: str = "c1", **more: object) -> Window:
    """A window that has everything a window can have."""
    events = (event(0), event(1, kind="login"), event(2.000001, fields={"amount": 3, "goods": "é"}))
    chapter = Chapter(events=events, first=events[0].key, last=events[-1].key, count=3, tokens=99)
    sealed = structs.replace(
        chapter, events=(), ids_hash=b"hash", sums=np.array([0.1, np.inf, -3.0])
    )
    made = Window(
        entity_id=entity_id,
        topic="shop",
        partition=1,
        next_offset=7,
        as_of=START + timedelta(microseconds=1),
        sealed=SealedHistory(chapters=2, count=9, sums=np.array([1.5, 2.5, 0.1])),
        chapters=(sealed, chapter),
    )
    return structs.replace(made, **more)


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
    assert structs.replace(found, version=0, sealed=None, chapters=()) == structs.replace(
        due, sealed=None, chapters=()
    )
    assert found.sealed is not None
    assert due.sealed is not None
    assert (found.sealed.chapters, found.sealed.count) == (2, 9)
    np.testing.assert_array_equal(found.sealed.sums, due.sealed.sums)
    assert found.chapters[1] == due.chapters[1]
    assert found.chapters[0].sums is not None
    np.testing.assert_array_equal(found.chapters[0].sums, np.array([0.1, np.inf, -3.0]))
    assert structs.replace(found.chapters[0], sums=None) == structs.replace(
        due.chapters[0], sums=None
    )


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


def test_offsets_never_move_back(store: WindowStore) -> None:
    """A worker that lost its partition may write late, with no window that would fence it."""
    for offsets in ({P0: 9, P1: 10}, {P0: 10, P1: 9}):
        with store.begin() as txn:
            txn.advance(offsets)
    assert store.offsets("shop") == {P0: 10, P1: 10}


@pytest.mark.parametrize("held", [{P0: 4}, {P1: 1}, {P0: 3, P1: 1}])
def test_a_store_that_holds_less_than_it_did_is_lost_as_windows_are_read(
    store: WindowStore, held: dict[TopicPartition, int]
) -> None:
    with store.begin({P0: 0}) as txn:
        txn.advance({P0: 3})
    with store.begin({P0: 3, P1: 0}) as txn:
        assert txn.load(["c1"])
    with pytest.raises(StoreLost, match="held it up to"), store.begin(held) as txn:
        txn.load([])


def test_a_store_that_holds_less_than_it_did_is_lost_as_offsets_are_written(
    store: WindowStore,
) -> None:
    with pytest.raises(StoreLost), store.begin({P0: 4}) as txn:
        txn.advance({P0: 5})
    assert store.offsets("shop") == {}


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
            txn.put(structs.replace(read, next_offset=99))
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
    one.remember(LogIdentity(topic="shop", topic_id="t", partitions=2), {P1: 5})
    assert two.read("c1") is None
    assert two.identity("shop") is None
    assert two.topics() == set()
    assert two.unproven("shop") == {}


def test_a_scan_gives_every_window_of_the_partitions_asked_for(
    opener: Opener,
) -> None:
    one, two = opener("b1"), opener("b*")
    put(one, *(window(f"c{n}", partition=n % 2) for n in range(1203)))
    put(two, window("other"))
    found = {each.entity_id: each for each in one.scan({P1})}
    assert found.keys() == {f"c{n}" for n in range(1, 1203, 2)}
    assert found["c1"].version == 1
    assert {each.entity_id for each in two.scan({P0, P1})} == {"other"}
    assert not list(one.scan({TopicPartition("mall", 1)}))


def test_a_window_that_was_read_and_is_gone_is_a_lost_store_not_another_workers_doing(
    opener: Opener,
) -> None:
    store = opener("b1")
    with pytest.raises(StoreLost), store.begin() as txn:
        txn.put(window(version=3))
    assert store.read("c1") is None


def test_the_log_is_remembered_across_a_restart(opener: Opener) -> None:
    identity = LogIdentity(topic="shop", topic_id="t-1", partitions=4)
    first = opener("b1")
    assert first.identity("shop") is None
    assert first.topics() == set()
    first.remember(identity)
    assert opener("b1").identity("shop") == identity
    first.remember(replace(identity, topic="mall"))
    assert opener("b1").topics() == {"shop", "mall"}


def test_where_a_beginning_was_gone_is_remembered_across_a_restart(opener: Opener) -> None:
    identity = LogIdentity(topic="shop", topic_id="t-1", partitions=4)
    first = opener("b1")
    first.remember(identity, {P1: 5})
    first.remember(identity)
    assert opener("b1").unproven("shop") == {P1: 5}
    assert first.unproven("mall") == {}


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


FIRST_REVISION = bytes.fromhex(  # of `window()`
    "9701a473686f700107cf00064bf535af1001930209c418000000000000f83f00000000000004409a9999999999b9"
    "3f92979093cf00064bf535af1000a77061796d656e74a2653093cf00064bf535cd9481a77061796d656e74a96532"
    "2e3030303030310363c40468617368c4189a9999999999b93f000000000000f07f00000000000008c097939293cf"
    "00064bf535af1000a77061796d656e74a2653083a6616d6f756e74cb4023fae147ae147ba5676f6f6473a26731a4"
    "6e6f7465c09293cf00064bf535be5240a56c6f67696ea2653182a6646576696365a570686f6e65a26f6bc39293cf"
    "00064bf535cd9481a77061796d656e74a965322e30303030303182a6616d6f756e7403a5676f6f6473a2c3a993cf"
    "00064bf535af1000a77061796d656e74a2653093cf00064bf535cd9481a77061796d656e74a965322e3030303030"
    "310363c0c0"
)


def test_a_record_of_another_revision_is_refused_with_a_remedy() -> None:
    newer = bytes([0x97, 99, *[0xC0] * 2, 0, *[0xC0] * 2, 0x90])  # msgpack: [99, nil, nil, 0, ...]
    with pytest.raises(LLM4ESError, match=r"revision 99.*; start a fresh window store"):
        decode_window("c1", 1, newer)


def test_a_record_of_the_first_revision_is_read_and_written_in_the_newest() -> None:
    found = decode_window("c1", 4, FIRST_REVISION)
    assert found.version == 4
    assert encode_window(found) == encode_window(window())
    assert len(encode_window(found)) < len(FIRST_REVISION)


def test_fields_in_another_order_or_number_come_back_as_they_were() -> None:
    events = (
        event(0, fields={"amount": 1, "goods": "g1"}),
        event(1, fields={"goods": "g1", "amount": 1}),
        event(2, fields={"goods": ("g1", "g2"), "ok": True, "note": None}),
        event(2, kind="login", fields={}),
    )
    chapter = Chapter(events=events, first=events[0].key, last=events[-1].key, count=4, tokens=9)
    found = decode_window("c1", 0, encode_window(window(chapters=(chapter,))))
    assert found.chapters == (chapter,)
    assert [list(each.fields) for each in found.chapters[0].events] == [
        list(each.fields) for each in events
    ]


def test_an_sqlite_path_that_cannot_be_used_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no database " * 100)
    for path in (
        tmp_path / "file" / "windows.db",  # a folder that is a file
        tmp_path,  # a file that is a folder
        Path("/proc/windows.db"),  # a folder that takes no files
    ):
        with pytest.raises(ConfigError, match=r"window_store: .* cannot be opened .*; name a file"):
            SqliteWindowStore(path, "b1")
    with pytest.raises(ConfigError, match="no SQLite database"):
        SqliteWindowStore(tmp_path / "file", "b1")


def test_an_sqlite_file_that_is_damaged_under_us_is_no_cause_to_wait(tmp_path: Path) -> None:
    path = tmp_path / "windows.db"
    store = SqliteWindowStore(path, "b1")
    put(store, window())
    store.close()
    pages = bytearray(path.read_bytes())
    pages[4096:] = b"\xff" * (len(pages) - 4096)
    path.write_bytes(pages)
    with pytest.raises(ConfigError, match="damaged"):
        SqliteWindowStore(path, "b1").read("c1")


def test_a_store_opened_to_read_shows_what_is_there_and_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "state" / "windows.db"
    with pytest.raises(ConfigError, match="there is no file"):
        SqliteWindowStore(path, "b1", read_only=True)
    assert not list(tmp_path.iterdir())
    worker = SqliteWindowStore(path, "b1")
    put(worker, window())
    beside = SqliteWindowStore(path, "b1", read_only=True)
    assert beside.read("c1") is not None
    beside.close()
    put(worker, window("c2"))
    worker.close()
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    reader = SqliteWindowStore(path, "b1", read_only=True)
    assert reader.read("c2") is not None
    reader.close()
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
    (tmp_path / "empty.db").touch()
    with pytest.raises(ConfigError, match="holds no windows"):
        SqliteWindowStore(tmp_path / "empty.db", "b1", read_only=True)


def test_no_entitys_id_is_in_what_a_full_redis_makes_us_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer(tmp_path / "redis", persistence="none") as server:
        store = RedisWindowStore(server.url, "b1")
        put(store, window("jane.roe@example.org"))
        store._client.config_set("maxmemory", "1")  # noqa: SLF001 - as an operator would
        with (
            caplog.at_level(logging.DEBUG),
            pytest.raises(SinkUnavailable, match=r"OOM|memory") as full,
        ):
            put(store, window("jane.roe@example.org", version=1), window("john.doe@example.org"))
        store._client.config_set("maxmemory", "0")  # noqa: SLF001
        key = store._key("jane.roe@example.org")  # noqa: SLF001
        store._client.set(key, "no hash")  # noqa: SLF001
        with pytest.raises(SinkUnavailable, match=r"WRONGTYPE|wrong kind") as wrong:
            store.read("jane.roe@example.org")
        store.close()
    for said in (str(full.value), str(wrong.value), caplog.text):
        assert "example.org" not in said


def test_a_redis_that_would_evict_windows_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer(tmp_path / "redis", persistence="none") as server:
        store = RedisWindowStore(server.url, "b1")
        assert not caplog.records
        store._client.config_set("maxmemory-policy", "allkeys-lru")  # noqa: SLF001
        store.close()
        RedisWindowStore(server.url, "b1").close()
    assert "maxmemory-policy noeviction" in caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@host:sixthreeseven9/0",
        "redis://:hunt/er2@host:6379/0",
        "redis://:hunt#er2@host:6379/0",
        "redis://:hunt?er2@host:6379/0",
        "redis://user:12/34hunter2@127.0.0.1:1/0",
        "redis://user:12?34hunter2@127.0.0.1:1/0",
        "redis://user:12#34hunter2@127.0.0.1:1/0",
        "redis://:hunt[er2@host:6379/0",
        "redis://:hunter2@host:6379/hunter2",
        "redis://:hunter2@host:6379/0?db=hunter2",
        "redis://:hunter2@host:6379/0?hunter2=1",
        "hunter2@host:6379",
        "redis+cluster://:hunter2@host",
        "redis+cluster://:hunter2@host:6379/0?sentinel_password=hunter2",
        "redis+cluster://:hunt/er2@host:6379",
        "redis+sentinel://:hunter2@host:26379",
        "redis+sentinel://:hunter2@host:26379/shop/hunter2",
        "redis+sentinel://:hunter2@host:26379,12:34er2/shop",
        "redis+sentinel://:hunter2@host:26379/shop?hunter2=1",
        "redis+hunter2://host:6379",
    ],
)
def test_no_piece_of_a_password_is_told_of_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match=r"redis://:PASSWORD@host:port/db, special") as refused:
        RedisWindowStore(url, "b1")
    for piece in ("hunt", "er2", "12", "34"):
        assert piece not in str(refused.value)
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:1/0",
        "redis+sentinel://127.0.0.1:1,localhost:1/shop",
        "redis+cluster://127.0.0.1:1",
    ],
)
def test_a_redis_that_is_not_there_is_unavailable(url: str) -> None:
    with pytest.raises(SinkUnavailable):
        RedisWindowStore(url, "b1")


def test_windows_and_offsets_outlive_a_failover_that_a_sentinel_makes(tmp_path: Path) -> None:
    with RedisSentinelServers(tmp_path) as servers:
        store = RedisWindowStore(servers.url, "b1")
        with store.begin() as txn:
            txn.put(window("c1"))
            txn.advance({P1: 7})
        before = servers.master_port
        servers.master.kill()
        assert wait_until(lambda: servers.master_port != before, timeout_s=60)

        def written() -> bool:
            try:
                put(store, window("c1", version=1, next_offset=8))
            except SinkUnavailable:  # until the replica has become one that is written to
                return False
            return True

        assert wait_until(written, timeout_s=60)
        found = store.read("c1")
        assert found is not None
        assert (found.version, found.next_offset) == (2, 8)
        assert store.offsets("shop") == {P1: 7}
        store.close()


@pytest.fixture(params=["sqlite", "redis"])
def keyed(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[Keyed]:
    """Opens stores of one server with a deletion key or none, and shows the bytes they hold."""
    opened: list[WindowStore] = []
    if request.param == "sqlite":
        path = tmp_path / "windows.db"

        def open_it(key: DeletionKey | None) -> WindowStore:
            opened.append(SqliteWindowStore(path, "b1", deletion_key=key))
            return opened[-1]

        def names() -> str:
            with sqlite3.connect(path) as connection:
                found = connection.execute("SELECT entity FROM windows").fetchall()
                found += connection.execute("SELECT entity_hash FROM deleted").fetchall()
            connection.close()
            return str(found)
    else:
        server: RedisServer = request.getfixturevalue("redis_server")
        client: Any = Redis.from_url(server.url)

        def open_it(key: DeletionKey | None) -> WindowStore:
            opened.append(RedisWindowStore(server.url, unique, deletion_key=key))
            return opened[-1]

        def names() -> str:
            return str(client.keys(f"llm4es:{unique}:*"))

        opened.append(client)
    yield Keyed(open_it, names)
    for each in opened:
        each.close()


def buried(found: Window, offset: int = 9) -> Window:
    return structs.replace(
        bury(found, recorded_at=START + timedelta(hours=1)),
        topic="shop", partition=1, next_offset=offset,
    )  # fmt: skip


def test_of_a_deleted_window_place_and_time_stay_under_a_hash_and_its_id_does_not(
    keyed: Keyed,
) -> None:
    store, other = keyed.open(KEY), keyed.open(KEY)
    put(store, window("somebody"))
    assert "somebody" in keyed.names()
    before = store.read("somebody")
    assert before is not None
    put(store, buried(before))
    assert "somebody" not in keyed.names()
    for each in (store, other):
        left = each.read("somebody")
        assert left is not None
        assert left.deleted
        assert (left.version, left.topic, left.partition, left.next_offset) == (2, "shop", 1, 9)
        assert left.as_of == START + timedelta(hours=1)
    # A zombie that read before the deletion, or before the entity's first event, is refused.
    for stale in (structs.replace(before, next_offset=8), window("somebody")):
        with pytest.raises(Fenced):
            put(other, stale)
    assert "somebody" not in keyed.names()
    again = store.read("somebody")
    assert again is not None
    put(store, window("somebody", version=again.version, next_offset=10))
    found = other.read("somebody")
    assert found is not None
    assert (found.version, found.next_offset, found.deleted) == (3, 10, False)
    with pytest.raises(Fenced):
        put(other, buried(again))
    put(store, buried(found, 11))
    put(store, buried(structs.replace(found, version=4, as_of=START + timedelta(hours=2)), 12))
    last = store.read("somebody")
    assert last is not None
    assert (last.version, last.next_offset) == (5, 12)


def test_an_entity_that_never_was_can_be_deleted(keyed: Keyed) -> None:
    store = keyed.open(KEY)
    put(store, buried(Window(entity_id="nobody")))
    found = store.read("nobody")
    assert found is not None
    assert found.deleted


def test_a_store_keeps_to_one_deletion_key_and_deletes_nothing_without_one(keyed: Keyed) -> None:
    store = keyed.open(None)
    with pytest.raises(ConfigError, match="deletion_key: is not set"):
        put(store, buried(window()))
    put(store, window())
    keyed.open(KEY)  # it may come later
    with pytest.raises(ConfigError, match="another one"):
        keyed.open(DeletionKey("another key of tests"))
    with pytest.raises(ConfigError, match="needs the one"):
        keyed.open(None)

"""One suite over the sink's three ways into an online store, read back as stock clients read."""

import asyncio
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pandas as pd
import pytest
from feast import FeatureStore
from feast.data_format import AvroFormat, ProtoFormat, StreamFormat
from redis import Redis

from dev.processes import LOOPBACK, ServerProcess, on_a_free_port
from dev.servers import RedisClusterServers, RedisServer, wait_until
from llm4es.deletion import DeletionKey, Tombstone
from llm4es.errors import ConfigError, SinkRejected, SinkUnavailable, StoreLost
from llm4es.events import TopicPartition, entity_hash
from llm4es.feast import FeastSink, ViewSpec, open_reader, open_sink
from llm4es.feast.embedding_reader import Embeddings, Status, open_embedding_reader
from llm4es.feast.online import PortableRows
from llm4es.feast.redis_rows import RedisRows
from llm4es.feast.sqlite_rows import SqliteRows
from llm4es.features import FeatureRow, view_name
from tests.feast_parts import (
    BUNDLE_ID,
    FAR_SECONDS,
    MICROSECOND,
    NOON,
    apply,
    frame,
    make_repo,
    make_spec,
    row,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ibis"),
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
]

KEY = DeletionKey("a key of tests alone")
VIEW = view_name("customer", BUNDLE_ID)
# A real store that is neither Redis nor plain SQLite: its table has a column that ours does not
# know. It keeps whole seconds and lets an older row overwrite a newer one, as most stores do.
OTHER_STORE = ", enable_openai_compatible_store: true"
WAYS = {
    "sqlite": SqliteRows,
    "redis": RedisRows,
    "redis cluster": RedisRows,
    "portable": PortableRows,
}
EXTRA = {"portable": OTHER_STORE, "redis cluster": ", redis_type: redis_cluster"}


@dataclass(frozen=True)
class World:
    """A feature repository whose view is applied, and a stock client of it."""

    way: str
    repo: Path
    spec: ViewSpec
    stock: FeatureStore

    def open(self, writer_id: str = "w") -> FeastSink:
        return open_sink(self.repo, self.spec, writer_id=writer_id, deletion_key=KEY)

    def online(self, entity_ids: Sequence[str]) -> dict[str, list[Any]]:
        """What a stock client reads online."""
        found: dict[str, list[Any]] = self.stock.get_online_features(
            features=self.stock.get_feature_service("customer_llm4es"),
            entity_rows=[{"customer_id": each} for each in entity_ids],
        ).to_dict()
        return found

    def as_of(self, entity_ids: Sequence[str], moment: datetime) -> pd.DataFrame:
        """What a stock client reads for training."""
        entities = pd.DataFrame({"customer_id": entity_ids, "event_timestamp": moment})
        found: pd.DataFrame = self.stock.get_historical_features(
            entity_df=entities, features=[f"{VIEW}:embedding", f"{VIEW}:last_event_id"]
        ).to_df()
        return found


@pytest.fixture(scope="module")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisClusterServers]:
    with RedisClusterServers(tmp_path_factory.mktemp("cluster")) as servers:
        yield servers


@pytest.fixture(scope="module", params=list(WAYS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    redis: RedisServer | RedisClusterServers | None = None
    if request.param == "redis":
        redis = request.getfixturevalue("redis_server")
    if request.param == "redis cluster":
        redis = request.getfixturevalue("redis_cluster")
    return make_world(folder, request.param, redis)


def make_world(
    folder: Path, way: str, redis: RedisServer | RedisClusterServers | None = None
) -> World:
    spec = make_spec(folder / "bundle")
    repo = make_repo(
        folder / "repo",
        redis_url=None if redis is None else redis.address,
        extra=EXTRA.get(way, ""),
    )
    return World(way, repo, spec, apply(repo, spec))


@pytest.fixture
def opener(world: World) -> Iterator[Callable[[], FeastSink]]:
    """Opens sinks of one view: two of them are two workers."""
    opened: list[FeastSink] = []

    def keep() -> FeastSink:
        opened.append(world.open(f"w{len(opened)}"))
        return opened[-1]

    yield keep
    for sink in opened:
        sink.close()


@pytest.fixture
def sink(opener: Callable[[], FeastSink]) -> FeastSink:
    return opener()


def vectors(found: dict[str, list[Any]], name: str = "embedding") -> list[list[float]]:
    return [np.array(value, np.float32).tolist() for value in found[name]]


def test_each_kind_of_store_is_written_in_the_way_made_for_it(
    world: World, sink: FeastSink
) -> None:
    assert type(sink._online) is WAYS[world.way]  # noqa: SLF001 - else the suite proves one thrice


def test_every_row_is_readable_through_stock_feast_on_return(
    world: World, sink: FeastSink, unique: str
) -> None:
    rows = [
        row(
            world.spec, f"{unique}-{n}", seed=n, last_event_id=f"é{n}", as_of=NOON + n * MICROSECOND
        )
        for n in range(1_100)  # more than one round trip to Redis, or question to SQLite
    ]
    sink.publish(rows)
    found = world.online([each.entity_id for each in rows])
    assert vectors(found) == [each.embedding.tolist() for each in rows]
    assert vectors(found, "surprise") == [each.surprise.tolist() for each in rows]
    for name in ("surprise_last", "event_count", "last_event_id", "last_event_time", "bundle_id"):
        assert found[name] == [getattr(each, name) for each in rows], name
    assert sink.superseded == 0


def test_an_entity_without_a_row_has_none(sink: FeastSink, unique: str) -> None:
    assert sink.read([unique, f"{unique}-2"]) == [None, None]
    assert sink.read([]) == []
    sink.publish([])
    sink.journal([])


def test_the_sink_reads_its_own_rows_whole(world: World, sink: FeastSink, unique: str) -> None:
    written = row(world.spec, unique, seed=3)
    sink.publish([written])
    found = sink.read([f"{unique}-unknown", unique])
    assert found[0] is None
    assert found[1] is not None
    assert found[1].embedding.tolist() == written.embedding.tolist()
    assert found[1].surprise.tolist() == written.surprise.tolist()
    nothing = np.zeros(0, np.float32)
    assert replace(found[1], embedding=nothing, surprise=nothing) == replace(
        written, embedding=nothing, surprise=nothing
    )


def test_an_older_row_never_replaces_a_newer_one_and_a_newer_one_always_an_older(
    world: World, opener: Callable[[], FeastSink], unique: str
) -> None:
    sink = opener()
    newer = row(world.spec, unique, seed=1, as_of=NOON + MICROSECOND, last_event_id="newer")
    sink.publish([newer])
    sink.publish([row(world.spec, unique, seed=2, as_of=NOON, last_event_id="older")])
    assert world.online([unique])["last_event_id"] == ["newer"]
    assert vectors(world.online([unique])) == [newer.embedding.tolist()]
    assert sink.superseded == 1
    sink.publish([replace(newer, as_of=NOON + 2 * MICROSECOND, last_event_id="newest")])
    assert world.online([unique])["last_event_id"] == ["newest"]
    # A worker that starts anew knows it from the store alone (some stores keep whole seconds).
    other = opener()
    other.publish([row(world.spec, unique, as_of=NOON - timedelta(seconds=1), last_event_id="old")])
    assert world.online([unique])["last_event_id"] == ["newest"]
    assert other.superseded == 1


def test_one_call_takes_what_is_newer_and_leaves_what_is_not(
    world: World, sink: FeastSink, unique: str
) -> None:
    first, second = f"{unique}-1", f"{unique}-2"
    sink.publish([row(world.spec, first, last_event_id="a", as_of=NOON)])
    sink.publish(
        [
            row(world.spec, first, last_event_id="b", as_of=NOON - MICROSECOND),
            row(world.spec, second, last_event_id="c", as_of=NOON - MICROSECOND),
        ]
    )
    assert world.online([first, second])["last_event_id"] == ["a", "c"]
    assert sink.superseded == 1


def test_the_same_row_again_changes_nothing(
    world: World, opener: Callable[[], FeastSink], unique: str
) -> None:
    sink, again = opener(), opener()
    written = row(world.spec, unique, seed=1, as_of=NOON)
    sink.publish([written])
    before = world.online([unique])
    for writer in (sink, again):
        writer.publish([written])
        assert world.online([unique]) == before
        assert writer.superseded == 0
    # An entity has one row per moment; which came first stands, whatever another one says.
    sink.publish([replace(written, last_event_id="another")])
    assert world.online([unique])["last_event_id"] == [written.last_event_id]


def test_two_rows_of_an_entity_in_one_call_are_rejected_and_neither_is_written(
    world: World, sink: FeastSink, unique: str
) -> None:
    with pytest.raises(SinkRejected, match="2 rows in one call") as refused:
        sink.publish([row(world.spec, unique), row(world.spec, unique, as_of=NOON + MICROSECOND)])
    assert unique not in str(refused.value)
    assert entity_hash(unique) in str(refused.value)
    assert sink.read([unique]) == [None]


BROKEN: dict[str, Callable[[FeatureRow], FeatureRow]] = {
    "embedding is not finite": lambda r: replace(r, embedding=np.full_like(r.embedding, np.nan)),
    "embedding is float32 \\(7,\\)": lambda r: replace(r, embedding=r.embedding[:-1]),
    "embedding is float64": lambda r: replace(
        r,
        embedding=r.embedding.astype(np.float64).view(),  # type: ignore[arg-type]
    ),
    "surprise is not finite": lambda r: replace(r, surprise=np.full_like(r.surprise, np.inf)),
    "surprise is float32 \\(0,\\)": lambda r: replace(r, surprise=r.surprise[:0]),
    "surprise_last is not finite": lambda r: replace(r, surprise_last=float("nan")),
    "not of the view's bundle": lambda r: replace(r, bundle_id="ba9876543210"),
    "no entity id": lambda r: replace(r, entity_id=""),
    "no zone": lambda r: replace(r, as_of=r.as_of.replace(tzinfo=None)),
    "before 1970": lambda r: replace(r, as_of=datetime(1969, 12, 31, tzinfo=UTC)),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_row_that_breaks_the_view_is_rejected_and_nothing_of_its_call_is_written(
    world: World, sink: FeastSink, unique: str, problem: str
) -> None:
    sound, broken = row(world.spec, f"{unique}-1"), BROKEN[problem](row(world.spec, unique))
    for write in (sink.publish, sink.journal):
        with pytest.raises(SinkRejected, match=problem) as refused:
            write([sound, broken])
        assert unique not in str(refused.value)
    sink.roll()
    assert sink.read([sound.entity_id, unique]) == [None, None]
    assert world.as_of([sound.entity_id], NOON)["last_event_id"].isna().all()


def test_as_of_keeps_its_microseconds_where_the_store_has_a_place_for_them(
    world: World, sink: FeastSink, unique: str
) -> None:
    moments = [NOON + 999_999 * MICROSECOND, NOON + FAR_SECONDS + MICROSECOND, NOON]
    ids = [f"{unique}-{n}" for n in range(len(moments))]
    sink.publish([row(world.spec, each, as_of=at) for each, at in zip(ids, moments, strict=True)])
    found = [None if each is None else each.as_of for each in sink.read(ids)]
    exact = world.way != "portable"
    assert found == [at if exact else at.replace(microsecond=0) for at in moments]


P0, P1 = TopicPartition("shop", 0), TopicPartition("shop", 1)


def test_offsets_that_rows_stand_for_are_noted_behind_them_and_never_move_back(
    world: World, opener: Callable[[], FeastSink], unique: str
) -> None:
    topic = f"shop-{unique}"
    here, there = TopicPartition(topic, 0), TopicPartition(topic, 1)
    sink = opener()
    if world.way == "portable":
        sink.publish([row(world.spec, unique)], reached={here: 3})
        assert sink.published(topic) is None
        return
    assert sink.published(topic) == {}
    sink.publish([row(world.spec, unique)], reached={here: 3}, held={here: 0})
    sink.publish([], reached={here: 2, there: 7}, held={here: 3})
    assert opener().published(topic) == {here: 3, there: 7}
    assert sink.published(f"{topic}-other") == {}
    with pytest.raises(StoreLost):
        sink.publish([], reached={here: 9}, held={here: 4})
    sink.republish([[row(world.spec, unique)], []], {here: 5})
    assert sink.published(topic) == {here: 5, there: 7}
    assert sink.read([unique])[0] is not None


def test_a_store_that_loses_rows_while_they_are_published_again_is_lost(
    tmp_path: Path,
) -> None:
    with RedisServer(tmp_path / "redis", persistence="none") as redis:
        world = make_world(tmp_path / "world", "redis", redis)
        sink = world.open()
        client = Redis(port=redis.port)

        def batches() -> Iterator[list[FeatureRow]]:
            yield [row(world.spec, "c1")]
            client.flushall()
            yield [row(world.spec, "c2")]

        with pytest.raises(StoreLost):
            sink.republish(batches(), {P0: 5, P1: 6})
        assert sink.published("shop") == {}
        sink.republish([[row(world.spec, "c1")], [row(world.spec, "c2")]], {P0: 5, P1: 6})
        assert sink.published("shop") == {P0: 5, P1: 6}
        client.close()
        sink.close()


def test_of_two_writers_racing_over_an_entity_the_newer_row_wins_always(
    world: World, opener: Callable[[], FeastSink], unique: str
) -> None:
    if world.way == "portable":
        pytest.skip("promised for one writer alone, and said so at start")
    rounds, each_round, each_call = 25, 400, 8  # 10,000 entities, each raced for once
    start = threading.Barrier(2, timeout=60)
    failures: list[BaseException] = []

    def write(sink: FeastSink, writer: int) -> None:
        try:
            for number in range(rounds):
                rows = [
                    row(
                        world.spec,
                        f"{unique}-{number}-{n}",
                        as_of=NOON + ((n + writer) % 2) * MICROSECOND,
                        last_event_id="newer" if (n + writer) % 2 else "older",
                    )
                    for n in range(each_round)
                ]
                start.wait()
                # In opposite order, a few at a time: they meet over each at another moment.
                ordered = rows if writer else rows[::-1]
                for first in range(0, each_round, each_call):
                    sink.publish(ordered[first : first + each_call])
        except BaseException as error:  # noqa: BLE001 - the test's thread says it
            failures.append(error)
            start.abort()

    threads = [threading.Thread(target=write, args=(opener(), n)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    ids = [f"{unique}-{number}-{n}" for number in range(rounds) for n in range(each_round)]
    assert world.online(ids)["last_event_id"] == ["newer"] * len(ids)


def test_a_newer_row_that_stock_feast_wrote_is_respected(
    world: World, opener: Callable[[], FeastSink], unique: str
) -> None:
    sink = opener()
    sink.publish([row(world.spec, unique, as_of=NOON)])
    stock = row(world.spec, unique, as_of=NOON + timedelta(seconds=9), last_event_id="stock")
    world.stock.write_to_online_store(VIEW, frame([stock]))
    if world.way == "portable":
        sink = opener()  # it looks when it first meets an entity
    sink.publish([row(world.spec, unique, as_of=NOON + timedelta(seconds=8), last_event_id="old")])
    assert world.online([unique])["last_event_id"] == ["stock"]
    assert sink.superseded == 1
    (found,) = sink.read([unique])
    assert found is not None
    assert found.as_of == stock.as_of
    sink.publish([row(world.spec, unique, as_of=NOON + timedelta(seconds=10), last_event_id="new")])
    assert world.online([unique])["last_event_id"] == ["new"]


def test_journalled_rows_come_back_from_stock_get_historical_features_each_at_its_moment(
    world: World, sink: FeastSink, unique: str
) -> None:
    rows = [
        row(world.spec, unique, seed=n, as_of=NOON + n * MICROSECOND, last_event_id=f"e{n}")
        for n in range(3)
    ]
    sink.journal(rows)  # several of an entity, as `--every-event` gives them
    sink.roll()
    for each in rows:
        found = world.as_of([unique], each.as_of)
        assert list(found["last_event_id"]) == [each.last_event_id]
        assert np.array(found["embedding"][0], np.float32).tolist() == each.embedding.tolist()
    assert world.as_of([unique], NOON - MICROSECOND)["last_event_id"].isna().all()
    assert sink.read([unique]) == [None]  # online is another call


def test_what_is_journalled_when_the_sink_is_closed_is_in_the_offline_log(
    world: World, unique: str
) -> None:
    sink = world.open()
    sink.journal([row(world.spec, unique, last_event_id="kept")])
    sink.close()
    assert list(world.as_of([unique], NOON)["last_event_id"]) == ["kept"]


def test_topic_and_brokers_are_the_views_own(sink: FeastSink) -> None:
    assert (sink.topic, sink.bootstrap_servers) == ("payments", "localhost:9092")
    sink.sync()


def test_what_is_published_to_sqlite_is_in_the_file_itself_without_its_write_ahead_log(
    tmp_path: Path,
) -> None:
    """What the log holds unsynced is what a power cut takes."""
    world = make_world(tmp_path / "world", "sqlite")
    sink = world.open()
    sink.publish([row(world.spec, last_event_id="kept")])
    after_the_cut = make_world(tmp_path / "other", "sqlite")
    shutil.copy(world.repo / "data/online.db", after_the_cut.repo / "data/online.db")
    assert after_the_cut.online(["c1"])["last_event_id"] == ["kept"]
    sink.close()


def test_a_process_that_has_feast_and_not_us_reads_rows_and_training_sets(
    tmp_path: Path, redis_server: RedisServer, unique: str
) -> None:
    world = make_world(tmp_path, "redis", redis_server)
    sink = world.open()
    written = row(world.spec, unique, seed=4, last_event_id="seen")
    sink.journal([written])
    sink.publish([written])
    sink.close()
    without_us(world.repo)
    script = Path(__file__).with_name("stock_client.py")
    done = subprocess.run(
        [sys.executable, str(script), str(world.repo), unique, NOON.isoformat()],
        cwd=world.repo,  # where stock Feast looks for a relative path
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    vector = [float(each) for each in written.embedding]
    assert found["online"] == [vector, ["seen", None]]
    assert found["training"] == [vector, ["seen", "seen"]]


def without_us(repo: Path) -> None:
    """Let a repository name nothing of ours: what a client that has Feast alone is given."""
    file = repo / "feature_store.yaml"
    ours = "llm4es.feast.offline_log.LogOfflineStore"
    assert ours in file.read_text()
    file.write_text(file.read_text().replace(ours, "duckdb"))


def test_a_feature_server_that_has_feast_and_not_us_serves_rows(
    tmp_path: Path, redis_server: RedisServer, unique: str
) -> None:
    world = make_world(tmp_path, "redis", redis_server)
    sink = world.open()
    written = row(world.spec, unique, seed=4, last_event_id="seen")
    sink.publish([written])
    sink.close()
    without_us(world.repo)
    process = ServerProcess("feast serve", log=tmp_path / "serve.log")
    script = Path(__file__).with_name("stock_server.py")

    def answers(port: int) -> bool:
        try:
            with urlopen(f"http://{LOOPBACK}:{port}/health", timeout=10) as response:
                return bool(response.status == HTTPStatus.OK)
        except OSError:
            return False

    port = on_a_free_port(
        lambda port: process.start(
            [sys.executable, str(script), "-c", str(world.repo), "serve",
             "--host", LOOPBACK, "--port", str(port)],
            lambda: answers(port),
            120,
        )
    )  # fmt: skip
    try:
        asked = {
            "feature_service": "customer_llm4es",
            "entities": {"customer_id": [unique, "nobody"]},
        }
        question = Request(
            f"http://{LOOPBACK}:{port}/get-online-features",
            data=json.dumps(asked).encode(),
            headers={"content-type": "application/json"},
        )
        with urlopen(question, timeout=60) as response:  # noqa: S310
            found = json.load(response)
    finally:
        process.stop()
    names = found["metadata"]["feature_names"]
    values = {name: told["values"] for name, told in zip(names, found["results"], strict=True)}
    assert values["last_event_id"] == ["seen", None]
    assert values["embedding"][0] == [float(each) for each in written.embedding]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def test_a_reader_gives_what_the_sink_gives_and_leaves_no_trace(world: World, unique: str) -> None:
    sink = world.open()
    sink.journal([row(world.spec, unique)])
    sink.publish([row(world.spec, unique)])
    (due,) = sink.read([unique])
    sink._journal._open.path.rename(  # type: ignore[union-attr]  # noqa: SLF001
        journal := world.repo / "data" / "left-by-a-killed-writer"
    )
    sink._journal._open = None  # noqa: SLF001 - as if the writer had been killed
    sink.close()
    folder = world.repo / "data" / "offline" / VIEW
    journal.rename(folder / "_journal" / "left.journal")
    before = tree(world.repo / "data")
    reader = open_reader(world.repo, world.spec)
    (found, nobody) = reader.read([unique, "nobody"])
    assert found is not None
    assert due is not None
    assert nobody is None
    assert (found.as_of, found.last_event_id) == (due.as_of, due.last_event_id)
    reader.close()
    assert tree(world.repo / "data") == before


def test_a_reader_makes_no_database_where_there_is_none(tmp_path: Path) -> None:
    world = make_world(tmp_path, "sqlite")
    (world.repo / "data/online.db").unlink()
    with pytest.raises(ConfigError, match="no table"):
        open_reader(world.repo, world.spec)
    assert not (world.repo / "data/online.db").exists()


def test_our_reader_reads_rows_of_a_redis_cluster_too(
    tmp_path: Path, redis_cluster: RedisClusterServers, unique: str
) -> None:
    world = make_world(tmp_path, "redis cluster", redis_cluster)
    sink = world.open()
    rows = [row(world.spec, f"{unique}-{n}", seed=n) for n in range(40)]  # of both nodes
    sink.publish(rows)
    ids = [each.entity_id for each in rows]
    reader = open_embedding_reader(world.repo, "customer")

    async def read() -> Embeddings:
        found = await reader.read_async([*ids, "nobody"])
        await reader.close_async()
        return found

    for found in (reader.read([*ids, "nobody"]), asyncio.run(read())):
        assert found.vectors[:-1].tolist() == [each.embedding.tolist() for each in rows]
        assert list(found.status) == [Status.PRESENT] * len(rows) + [Status.MISSING]
    reader.close()
    sink.close()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """One to be stopped; the session's is others', too."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


def test_a_redis_that_is_away_is_unavailable_until_it_is_back(
    tmp_path: Path, own_redis: RedisServer
) -> None:
    world = make_world(tmp_path, "redis", own_redis)
    sink = world.open()
    sink.publish([row(world.spec, last_event_id="before")])
    own_redis.stop()
    for act in (lambda: sink.publish([row(world.spec, "c2")]), lambda: sink.read(["c1"])):
        with pytest.raises(SinkUnavailable):
            act()
    own_redis.start()
    assert world.online(["c1", "c2"])["last_event_id"] == ["before", None]
    sink.publish([row(world.spec, "c2", last_event_id="after")])
    assert world.online(["c1", "c2"])["last_event_id"] == ["before", "after"]
    sink.close()


def test_any_other_store_that_fails_is_unavailable(tmp_path: Path) -> None:
    world = make_world(tmp_path, "portable")
    sink = world.open()
    sink.publish([row(world.spec, last_event_id="before")])
    world.stock.teardown()  # type: ignore[no-untyped-call] # its tables are gone
    for act in (lambda: sink.publish([row(world.spec, "c2")]), lambda: sink.read(["c2"])):
        with pytest.raises(SinkUnavailable):
            act()
    sink.close()
    mended = replace(world, stock=apply(world.repo, world.spec))
    sink = mended.open()
    sink.publish([row(world.spec, "c2", last_event_id="after")])
    assert mended.online(["c1", "c2"])["last_event_id"] == [None, "after"]
    sink.close()


def test_a_redis_that_is_there_and_cannot_write_is_unavailable_too(
    tmp_path: Path, own_redis: RedisServer
) -> None:
    world = make_world(tmp_path, "redis", own_redis)
    sink = world.open()
    admin: Any = Redis.from_url(own_redis.url)
    sink.publish([row(world.spec, last_event_id="a")])
    for deny, allow in (
        ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"),
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),
        ("CONFIG SET min-replicas-to-write 1", "CONFIG SET min-replicas-to-write 0"),
    ):
        admin.execute_command(*deny.split())
        with pytest.raises(SinkUnavailable) as refused:
            sink.publish([row(world.spec, as_of=NOON + MICROSECOND, last_event_id="b")])
        assert "c1" not in str(refused.value)
        admin.execute_command(*allow.split())
        assert world.online(["c1"])["last_event_id"] == ["a"]
    (key,) = admin.keys("*c1*")
    admin.rename(key, "aside")
    admin.set(key, "no hash")
    with pytest.raises(SinkRejected, match=r"WRONGTYPE|wrong kind") as broken:
        sink.read(["c1"])
    assert "c1" not in str(broken.value)
    admin.rename("aside", key)
    admin.execute_command("SCRIPT", "FLUSH")  # a server that was started anew knows no script
    sink.publish([row(world.spec, as_of=NOON + MICROSECOND, last_event_id="b")])
    assert world.online(["c1"])["last_event_id"] == ["b"]
    admin.close()
    sink.close()


def test_a_store_that_is_away_at_start_is_unavailable(
    tmp_path: Path, own_redis: RedisServer
) -> None:
    world = make_world(tmp_path / "redis-world", "redis", own_redis)
    own_redis.stop()
    with pytest.raises(SinkUnavailable, match="redis"):
        world.open()
    for way in ("sqlite", "portable"):
        world = make_world(tmp_path / way, way)
        database = world.repo / "data/online.db"
        database.rename(database.with_name("elsewhere.db"))
        database.mkdir()
        with pytest.raises(SinkUnavailable, match=r"sqlite|unable to open"):
            world.open()


def tombstone(entity_id: str, as_of: datetime = NOON) -> Tombstone:
    return Tombstone(entity_id=entity_id, as_of=as_of)


def test_after_a_deletion_no_row_up_to_it_is_read_or_written_and_a_newer_one_is(
    world: World, opener: Callable[[], FeastSink], unique: str
) -> None:
    sink, zombie = opener(), opener()
    old = row(world.spec, unique, last_event_id="old", as_of=NOON - MICROSECOND)
    other = row(world.spec, f"{unique}-other", last_event_id="other")
    sink.journal([old, other])
    sink.roll()
    sink.journal([old])  # and one that is not rolled yet
    sink.publish([old, other])
    for _ in range(2):  # a redelivery deletes again
        sink.delete([tombstone(unique)])
    for late in (sink, zombie):
        late.journal([replace(old, as_of=NOON)])
        late.publish([replace(old, as_of=NOON)])
        late.roll()
        assert late.superseded == 1
    later = NOON + timedelta(days=1)
    assert world.online([unique, other.entity_id])["last_event_id"] == [None, "other"]
    assert sink.read([unique, unique]) == [None, None]
    assert world.as_of([unique], later)["last_event_id"].isna().all()
    assert list(world.as_of([other.entity_id], later)["last_event_id"]) == ["other"]
    new = row(world.spec, unique, last_event_id="new", as_of=NOON + timedelta(seconds=1))
    sink.journal([new])
    sink.publish([new])
    sink.roll()
    assert world.online([unique])["last_event_id"] == ["new"]
    assert list(world.as_of([unique], later)["last_event_id"]) == ["new"]
    sink.delete([tombstone(unique)])  # of before: the new life stays
    assert world.online([unique])["last_event_id"] == ["new"]


def test_the_online_store_alone_keeps_an_older_row_out_after_a_deletion(
    world: World, opener: Callable[[], FeastSink], unique: str
) -> None:
    """What a zombie writes that looked at the deletions before there was one."""
    sink, zombie = opener(), opener()
    sink.publish([row(world.spec, unique, as_of=NOON - timedelta(seconds=2))])
    sink.delete([tombstone(unique), tombstone(f"{unique}-unknown")])
    ids = [unique, f"{unique}-unknown"]
    stale = [row(world.spec, each, as_of=NOON - timedelta(seconds=1)) for each in ids]
    assert zombie._online.write(stale) == ids  # noqa: SLF001 - past the sink's own check
    assert world.online(ids)["last_event_id"] == [None, None]


def test_what_a_deletion_leaves_online_ends_with_its_guard_time_and_a_new_row_does_not(
    world: World, unique: str
) -> None:
    if world.way == "portable":
        pytest.skip("Feast has no way to take one row out: the timestamp stays")
    sink = open_sink(world.repo, world.spec, writer_id="g", deletion_key=KEY, deletion_guard_s=0.05)
    gone, back = f"{unique}-gone", f"{unique}-back"
    sink.publish([row(world.spec, each, as_of=NOON - MICROSECOND) for each in (gone, back)])
    sink.delete([tombstone(gone), tombstone(back)])
    sink.publish([row(world.spec, back, as_of=NOON + MICROSECOND)])

    def ended() -> bool:
        sink.delete([tombstone(f"{unique}-third")])  # SQLite looks when it deletes
        return sink._online.as_of([gone]) == [None]  # noqa: SLF001 - the timestamp alone

    assert wait_until(ended, timeout_s=30)
    assert world.online([back])["last_event_id"] == ["e1"]
    sink.close()


def test_a_deletion_leaves_what_another_view_has_of_the_entity(tmp_path: Path) -> None:
    """Feast's Redis store keeps all views of an entity under one key."""
    with RedisServer(tmp_path / "redis") as server:
        world = make_world(tmp_path, "redis", server)
        other = make_spec(tmp_path / "other", bundle_id="ba9876543210")
        apply(world.repo, other)
        ours = world.open()
        theirs = open_sink(world.repo, other, writer_id="o", deletion_key=KEY)
        ours.publish([row(world.spec)])
        theirs.publish([replace(row(other), last_event_id="theirs")])
        ours.delete([tombstone("c1")])
        (found,) = theirs.read(["c1"])
        assert found is not None
        assert found.last_event_id == "theirs"
        assert ours.read(["c1"]) == [None]
        client: Any = Redis.from_url(server.url)
        (key,) = client.keys("*c1*")
        assert client.ttl(key) == -1
        theirs.delete([tombstone("c1")])
        assert client.ttl(key) > 0
        client.close()
        ours.close()
        theirs.close()


def test_a_sink_without_the_key_deletes_nothing_and_one_with_another_does_not_open(
    tmp_path: Path,
) -> None:
    world = make_world(tmp_path, "sqlite")
    keyless = open_sink(world.repo, world.spec, writer_id="k")
    with pytest.raises(ConfigError, match="deletion_key: is not set"):
        keyless.delete([tombstone("c1")])
    keyless.close()
    sink = world.open()
    sink.delete([tombstone("c1")])
    sink.close()
    for key in (None, DeletionKey("another key of tests")):
        with pytest.raises(ConfigError, match="deletion_key"):
            open_sink(world.repo, world.spec, writer_id="k", deletion_key=key)
    with pytest.raises(ConfigError, match="shorter than 16"):
        DeletionKey("short")


@pytest.mark.parametrize(
    ("form", "due"),
    [
        (None, ("json", None)),
        (AvroFormat(schema_json='{"type": "record"}'), ("avro", '{"type": "record"}')),
        (AvroFormat(schema_json=""), ("avro", None)),
        (ProtoFormat(class_path="shop.Payment"), ("protobuf", "shop.Payment")),
    ],
)
def test_the_format_of_values_is_what_feasts_registry_says(
    tmp_path: Path, form: StreamFormat | None, due: tuple[str, str | None]
) -> None:
    spec = make_spec(tmp_path / "bundle")
    repo = make_repo(tmp_path / "repo")
    apply(repo, spec, message_format=form)
    sink = open_sink(repo, spec, writer_id="w")
    assert sink.value_format == due
    sink.close()

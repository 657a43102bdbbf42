"""Serving: the same values as stock Feast's, in one array, and the truth about each row."""

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feast import FeatureStore
from redis import Redis

from dev.servers import RedisServer
from llm4es.errors import ConfigError, SinkRejected, SinkUnavailable
from llm4es.feast import (
    EmbeddingReader,
    Embeddings,
    FeastSink,
    Status,
    ViewSpec,
    open_embedding_reader,
    open_sink,
)
from llm4es.feast.entity_keys import entity_keys
from tests.feast_parts import DIM, MICROSECOND, NOON, apply, frame, make_repo, make_spec, row

pytestmark = [
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
]

TTL = timedelta(hours=1)
Read = Callable[..., Embeddings]


@dataclass(frozen=True)
class World:
    """A view on Redis with a TTL of an hour, its writer and its reader at a clock of our own."""

    repo: Path
    spec: ViewSpec
    stock: FeatureStore
    sink: FeastSink
    reader: EmbeddingReader
    now: list[datetime]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("reader")
    spec = make_spec(folder / "bundle")
    repo = make_repo(folder / "repo", redis_url=redis_server.address)
    stock = apply(repo, spec, ttl=TTL)
    sink = open_sink(repo, spec, writer_id="w")
    opened = open_embedding_reader(repo, "customer")
    now = [NOON]
    opened._clock = lambda: now[0].timestamp()  # noqa: SLF001, PLW0108 - `now` changes
    yield World(repo, spec, stock, sink, opened, now)
    opened.close()
    sink.close()


@pytest.fixture(params=["sync", "asyncio"])
def read(world: World, request: pytest.FixtureRequest) -> Read:
    """Both ways of reading."""
    world.now[0] = NOON
    if request.param == "sync":
        return world.reader.read

    def run(*arguments: Any, **named: Any) -> Embeddings:  # noqa: ANN401 - `read`'s own
        async def once() -> Embeddings:
            try:
                return await world.reader.read_async(*arguments, **named)
            finally:
                await world.reader.close_async()

        return asyncio.run(once())

    return run


def stock_vectors(world: World, ids: Sequence[str]) -> list[list[float]]:
    found = world.stock.get_online_features(
        features=world.stock.get_feature_service("customer_llm4es"),
        entity_rows=[{"customer_id": each} for each in ids],
    ).to_dict()
    return [np.array(value, np.float32).tolist() for value in found["embedding"]]


def test_it_gives_what_stock_feast_gives_in_one_array(
    world: World, read: Read, unique: str
) -> None:
    rows = [
        row(world.spec, f"{unique}-{n}é", seed=n, as_of=moment, last_event_id=f"e{n}")
        for n, moment in enumerate(NOON - n * MICROSECOND for n in range(50))
    ]
    world.sink.publish(rows)
    ids = [each.entity_id for each in rows]
    found = read(ids)
    assert found.vectors.dtype == np.float32
    assert found.vectors.shape == (50, DIM)
    assert found.vectors.tolist() == stock_vectors(world, ids)
    assert found.surprise.tolist() == [each.surprise.tolist() for each in rows]
    assert found.surprise_last.tolist() == [each.surprise_last for each in rows]
    assert found.surprise_columns == world.spec.surprise_columns
    assert found.usable.all()
    assert [at.replace(tzinfo=UTC) for at in found.as_of.tolist()] == [r.as_of for r in rows]
    assert found.age_s == pytest.approx([n / 1e6 for n in range(50)], abs=1e-6)
    assert found.last_event_ids == tuple(each.last_event_id for each in rows)
    assert set(found.bundle_ids) == {world.reader.bundle_id} == {world.spec.manifest.id}
    assert read([]).vectors.shape == (0, DIM)


def test_it_reads_what_stock_feast_wrote(world: World, read: Read, unique: str) -> None:
    written = row(world.spec, unique, seed=5)
    world.stock.write_to_online_store(world.reader.view_name, frame([written]))
    found = read([unique])
    assert found.vectors.tolist() == [written.embedding.tolist()]
    assert found.surprise.tolist() == [written.surprise.tolist()]


def test_it_says_what_is_missing_expired_and_stale(world: World, read: Read, unique: str) -> None:
    ids = [f"{unique}-{n}" for n in range(4)]
    ages = [timedelta(seconds=1), TTL, TTL + MICROSECOND * 1000]
    world.sink.publish(
        [row(world.spec, i, as_of=NOON - age) for i, age in zip(ids, ages, strict=False)]
    )
    found = read(ids, max_age_s=30)
    assert [Status(each) for each in found.status] == [
        Status.PRESENT, Status.STALE, Status.EXPIRED, Status.MISSING,
    ]  # fmt: skip
    assert [Status(each).name for each in read(ids).status] == [
        "PRESENT", "PRESENT", "EXPIRED", "MISSING",
    ]  # fmt: skip
    assert np.isnan(found.vectors[3]).all()
    assert np.isnan(found.surprise_last[3])
    assert np.isnan(found.age_s[3])
    assert np.isnat(found.as_of[3])
    assert not np.isnan(found.vectors[:3]).any()
    assert found.usable.tolist() == [True, False, False, False]


def test_it_waits_until_the_row_has_seen_the_event(world: World, read: Read, unique: str) -> None:
    world.sink.publish([row(world.spec, unique, last_event_id="before")])
    late = threading.Timer(
        0.1,
        world.sink.publish,
        [[row(world.spec, unique, as_of=NOON + MICROSECOND, seed=9, last_event_id="paid")]],
    )
    late.start()
    found = read([unique], seen="paid", timeout_ms=20_000)
    late.join()
    assert found.last_event_ids == ("paid",)
    assert found.usable.all()
    started = time.monotonic()
    never = read([unique], seen="never", timeout_ms=50)
    assert time.monotonic() - started >= 0.05
    assert [Status(each) for each in never.status] == [Status.STALE]
    assert never.vectors.tolist() == found.vectors.tolist()  # what there is, and said so


def test_a_row_of_later_has_seen_it_too(world: World, read: Read, unique: str) -> None:
    world.sink.publish([row(world.spec, unique, as_of=NOON, last_event_id="next")])
    before, after = NOON - MICROSECOND, NOON
    assert read([unique], seen="mine", recorded_at=before).usable.tolist() == [True]
    assert read([unique], seen="mine", recorded_at=after).usable.tolist() == [False]
    two = read([unique, unique], seen=["next", None])
    assert two.usable.all()
    with pytest.raises(ConfigError, match="names 1 events of 2"):
        read([unique, unique], seen=["next"])


def test_a_row_of_another_shape_is_rejected_without_the_entitys_id(
    world: World, read: Read, unique: str, redis_server: RedisServer
) -> None:
    world.sink.publish([row(world.spec, unique)])
    raw: Any = Redis.from_url(redis_server.url)
    (key,) = raw.keys(f"*{unique}*")
    raw.hset(key, world.reader._fields[1], b"\x62\x02\x0a\x00")
    with pytest.raises(SinkRejected, match=f"not of {DIM} numbers") as refused:
        read([unique])
    assert unique not in str(refused.value)
    raw.hdel(key, *world.reader._fields[1:])
    assert [Status(each) for each in read([unique]).status] == [Status.MISSING]
    raw.close()


def test_a_redis_that_is_away_is_unavailable_and_one_that_is_back_is_read(
    tmp_path: Path,
) -> None:
    spec = make_spec(tmp_path / "bundle")
    with RedisServer(tmp_path / "redis") as own:
        repo = make_repo(tmp_path / "repo", redis_url=own.address)
        apply(repo, spec)
        reader = open_embedding_reader(repo, "customer")

        async def read_in_one_loop() -> None:
            assert (await reader.read_async(["c1"])).status.tolist() == [Status.MISSING]
            own.stop()
            with pytest.raises(SinkUnavailable):
                await reader.read_async(["c1"])
            own.start()
            assert (await reader.read_async(["c1"])).status.tolist() == [Status.MISSING]
            await reader.close_async()

        asyncio.run(read_in_one_loop())
        own.stop()
        with pytest.raises(SinkUnavailable):
            reader.read(["c1"])
        with pytest.raises(SinkUnavailable):
            open_embedding_reader(repo, "customer")
        own.start()
        assert reader.read(["c1"]).status.tolist() == [Status.MISSING]
        reader.close()


def test_what_it_cannot_read_is_refused(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "repo")
    with pytest.raises(ConfigError, match="LLM4ES_BUNDLES"):
        open_embedding_reader(repo, "customer")
    apply(repo, make_spec(tmp_path / "bundle"))
    with pytest.raises(ConfigError, match="sqlite, not redis"):
        open_embedding_reader(repo, "customer")


def test_a_bundle_without_surprise_has_no_columns(
    tmp_path: Path, redis_server: RedisServer, unique: str
) -> None:
    spec = make_spec(tmp_path / "bundle", bundle_id=uuid.uuid4().hex[:12], surprise=False)
    repo = make_repo(tmp_path / "repo", redis_url=redis_server.address)
    apply(repo, spec)
    sink = open_sink(repo, spec, writer_id="w")
    sink.publish([row(spec, unique)])
    sink.close()
    reader = open_embedding_reader(repo, "customer")
    assert reader.read([unique, "nobody"]).surprise.shape == (2, 0)
    reader.close()


def test_keys_are_feasts_own_and_left_to_it_where_the_template_does_not_fit() -> None:
    def odd(entity_id: str) -> bytes:
        return b"<" + entity_id.encode()[::-1] + b">"

    def fitting(entity_id: str) -> bytes:
        encoded = entity_id.encode()
        return b"head" + len(encoded).to_bytes(4, "little") + encoded + b"tail"

    for helper in (odd, fitting):
        key = entity_keys(helper)
        assert [key(each) for each in ("", "a", "é" * 99)] == [
            helper(each) for each in ("", "a", "é" * 99)
        ]
    assert entity_keys(odd) is odd
    assert entity_keys(fitting) is not fitting

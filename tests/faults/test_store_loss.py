"""A window store that loses its tail under a running worker is noticed, and rebuilt."""

import sqlite3
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from dev.servers import RedisServer
from llm4es.errors import SinkUnavailable
from stream_worker.window_store.redis import RedisWindowStore
from tests.faults.worlds import DELETION_KEY, World, assert_equal_to_clean, shop_log

Happening = Callable[[], object]


def nothing() -> None:
    """What happens when nothing does."""


class Losses:
    """A world on one kind of store, and how that store loses what it holds."""

    def __init__(self, world: World, forget_all: Happening, save: Happening, restore: Happening):
        self.world = world
        self.forget_all = forget_all
        self.save = save
        self.restore = restore


@pytest.fixture(params=["sqlite", "redis"])
def losses(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Losses]:
    if request.param == "sqlite":
        yield sqlite_losses(tmp_path)
        return
    with RedisServer(tmp_path / "redis", persistence="none") as server:
        yield redis_losses(tmp_path, server)


def sqlite_losses(folder: Path) -> Losses:
    world = World(folder, shop_log(3))
    tables = ("windows", "offsets", "logs", "unproven", "deleted")
    saved: dict[str, list[tuple[object, ...]]] = {table: [] for table in tables}

    def write(content: dict[str, list[tuple[object, ...]]]) -> None:
        with sqlite3.connect(folder / "windows.db") as connection:
            for table, rows in content.items():
                connection.execute(f"DELETE FROM {table}")  # noqa: S608 - names above
                for row in rows:
                    marks = ",".join("?" * len(row))
                    connection.execute(f"INSERT INTO {table} VALUES ({marks})", row)  # noqa: S608
        connection.close()

    def save() -> None:
        connection = sqlite3.connect(folder / "windows.db")
        for table in tables:
            saved[table] = connection.execute(f"SELECT * FROM {table}").fetchall()  # noqa: S608
        connection.close()

    return Losses(world, lambda: write({table: [] for table in tables}), save, lambda: write(saved))


def redis_losses(folder: Path, server: RedisServer) -> Losses:
    world = World(
        folder,
        shop_log(3),
        lambda bundle: RedisWindowStore(server.url, bundle, deletion_key=DELETION_KEY),
    )
    saved: dict[bytes, bytes] = {}
    store = RedisWindowStore(server.url, "aside")
    client: Any = store._client  # noqa: SLF001 - the same Redis, from another connection

    def save() -> None:
        saved.update({key: client.dump(key) for key in client.keys()})  # noqa: SIM118 - Redis has it

    def restore() -> None:
        client.flushall()
        for key, content in saved.items():
            client.restore(key, 0, content)

    return Losses(world, client.flushall, save, restore)


def lost(world: World) -> float | None:
    return world.metrics.registry.get_sample_value("llm4es_store_lost_total")


@pytest.mark.parametrize("batches", [1, 2, 7])
def test_windows_and_offsets_that_go_between_two_batches_are_folded_again_from_the_start(
    losses: Losses, event_by_event: World, batches: int
) -> None:
    losses.world.work(before_polls=[*repeat(nothing, batches), losses.forget_all])
    assert lost(losses.world) == 1
    assert_equal_to_clean(losses.world, event_by_event)


@pytest.mark.parametrize("batches", [1, 2, 7, 23])
@pytest.mark.parametrize("windows_too", [False, True])
def test_online_rows_that_go_are_published_again_from_the_windows(
    losses: Losses, event_by_event: World, batches: int, *, windows_too: bool
) -> None:
    def lose() -> None:
        losses.world.sink.lose()
        if windows_too:
            losses.forget_all()

    losses.world.work(before_polls=[*repeat(nothing, batches), lose])
    assert lost(losses.world) == 1
    assert_equal_to_clean(losses.world, event_by_event)
    assert losses.world.sink.reached == losses.world.group


def test_online_rows_that_went_while_no_worker_ran_are_published_before_anything_is_read(
    losses: Losses, event_by_event: World
) -> None:
    losses.world.work()
    losses.world.sink.lose()
    losses.world.work()
    assert lost(losses.world) == 0
    assert losses.world.metrics.summary().records == 0
    assert_equal_to_clean(losses.world, event_by_event)


def test_a_tail_that_goes_is_folded_again_from_where_the_store_stands(
    losses: Losses, event_by_event: World
) -> None:
    happenings = [*repeat(nothing, 4), losses.save, nothing, nothing, losses.restore]
    losses.world.work(before_polls=happenings)
    assert lost(losses.world) == 1
    assert_equal_to_clean(losses.world, event_by_event)
    records = losses.world.metrics.summary().records
    assert records == len(losses.world.log) + 3 * 8  # three batches twice, the rest once


@pytest.mark.parametrize("batches", [1, 2, 7])
def test_what_goes_between_reading_windows_and_writing_them_is_noticed_too(
    losses: Losses, event_by_event: World, batches: int
) -> None:
    losses.world.work(before_journals=[*repeat(nothing, batches), losses.forget_all])
    assert_equal_to_clean(losses.world, event_by_event)


def test_a_store_that_goes_again_and_is_away_while_it_is_rebuilt_is_waited_for(
    losses: Losses, event_by_event: World
) -> None:
    away = SinkUnavailable("away", retry_after_s=0.0)
    described = losses.world.describe
    asked: list[int] = []

    def describe_or_fail() -> object:
        asked.append(1)
        if len(asked) in {2, 3}:  # the first is the assignment at start
            raise away
        return described()

    losses.world.describe = describe_or_fail  # type: ignore[assignment,method-assign]
    losses.world.work(before_polls=[*repeat(nothing, 3), losses.forget_all, losses.forget_all])
    assert lost(losses.world) == 1  # the second time it held nothing that could go
    assert len(asked) == 4
    assert_equal_to_clean(losses.world, event_by_event)

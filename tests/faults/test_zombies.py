"""A worker that was overtaken, and one that dies between its windows and their offsets."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dev.servers import RedisServer
from llm4es.errors import ConfigError
from llm4es.testing import Boundaries, Crash
from stream_worker.window_store.redis import RedisWindowStore
from tests.faults.worlds import DELETION_KEY, World, assert_equal_to_clean, shop_log

POLLS = 60  # far more than a log of 23 batches takes


def nothing() -> None:
    """What happens when nothing does."""


def give_up() -> NoReturn:
    pytest.fail(f"the worker has not come to the log's end in {POLLS} polls")


@pytest.fixture(params=["sqlite", "redis"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """A world whose windows, rows and group another worker shares."""
    if request.param == "sqlite":
        yield World(tmp_path, shop_log(3))
        return
    with RedisServer(tmp_path / "redis", persistence="none") as server:
        yield World(
            tmp_path,
            shop_log(3),
            lambda bundle: RedisWindowStore(server.url, bundle, deletion_key=DELETION_KEY),
        )


@pytest.mark.parametrize("batches", [0, 1, 6, 20])
def test_a_zombie_that_wakes_before_its_write_and_dies_after_it_changes_nothing(
    shared: World, event_by_event: World, batches: int
) -> None:
    other = replace(shared)
    zombie = replace(shared, group=dict(shared.group))
    boundaries = Boundaries("after begin's end", batches + 1)
    try:
        zombie.work(boundaries=boundaries, before_journals=[*repeat(nothing, batches), other.work])
    except Crash:
        other.work()
    assert_equal_to_clean(other, event_by_event)


@pytest.mark.parametrize("batches", [1, 6, 20])
def test_a_zombie_that_kept_its_windows_reads_them_anew_and_comes_to_the_end(
    shared: World, event_by_event: World, batches: int
) -> None:
    other = replace(shared)
    zombie = replace(shared, group=dict(shared.group))
    later = repeat(nothing, POLLS)
    zombie.work(before_polls=[*repeat(nothing, batches), other.work, *later, give_up])
    assert zombie.metrics.registry.get_sample_value("llm4es_fenced_total") == 1
    assert_equal_to_clean(zombie, event_by_event)


@pytest.mark.parametrize("batches", [0, 1, 6])
def test_windows_that_could_not_be_written_are_folded_again_though_no_group_remembers(
    tmp_path: Path, event_by_event: World, batches: int
) -> None:
    """Redis takes the offsets and not the windows; then the worker dies, and its group is gone."""
    with RedisServer(tmp_path / "redis", persistence="none") as server:
        world = World(
            tmp_path,
            shop_log(3),
            lambda bundle: RedisWindowStore(server.url, bundle, deletion_key=DELETION_KEY),
        )
        aside = RedisWindowStore(server.url, "aside")
        client: Any = aside._client  # noqa: SLF001 - as an operator would

        def forbid_windows() -> None:
            client.acl_setuser("default", enabled=True, reset_keys=True, nopass=True)
            client.execute_command(
                "ACL", "SETUSER", "default", "%R~*:window:*", "%R~*:deleted:*",
                "~*:offsets:*", "~*:log:*",
                "~*:deletion-key",
            )  # fmt: skip

        with pytest.raises(ConfigError, match="no permissions"):
            world.work(before_journals=[*repeat(nothing, batches), forbid_windows])
        client.execute_command("ACL", "SETUSER", "default", "~*")
        world.group.clear()
        world.work()
        aside.close()
        assert_equal_to_clean(world, event_by_event)

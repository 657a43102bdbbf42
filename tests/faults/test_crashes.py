"""A crash at any boundary, at any occurrence, leaves what one clean run over the log gives."""

from pathlib import Path

import pytest

from llm4es.testing import Boundaries, Crash, MemorySink
from tests.faults.worlds import World, assert_equal_to_clean, shop_log

BOUNDARIES = [
    "after poll",
    "before delete",
    "after delete",
    "before journal",
    "after journal",
    "before publish",
    "after publish",
    "before park",
    "after park",
    "before begin's end",
    "after begin's end",
    "before commit",
    "after commit",
]
LAST = 23  # of the log's batches


def world(folder: Path, seed: int = 3) -> World:
    folder.mkdir()
    return World(folder, shop_log(seed))


@pytest.mark.parametrize("every_event", [False, True])
@pytest.mark.parametrize("occurrence", [1, 2, 5])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_crash_and_a_restart_leave_no_trace(
    tmp_path: Path, event_by_event: World, boundary: str, occurrence: int, *, every_event: bool
) -> None:
    crashed = world(tmp_path / "world")
    with pytest.raises(Crash):
        crashed.work(boundaries=Boundaries(boundary, occurrence), every_event=every_event)
    crashed.work(every_event=every_event)
    assert_equal_to_clean(crashed, event_by_event)


@pytest.mark.parametrize(
    ("boundary", "occurrence"),
    [(boundary, 3) for boundary in BOUNDARIES]
    + [
        (boundary, LAST) for boundary in BOUNDARIES if boundary.split()[1] not in {"park", "delete"}
    ],
)
def test_a_crash_leaves_no_trace_in_an_online_store_that_notes_no_offsets(
    tmp_path: Path, event_by_event: World, boundary: str, occurrence: int
) -> None:
    """In the last batch no later event of an entity mends what was left out."""
    crashed = world(tmp_path / "world")
    crashed.sink = MemorySink(noting=False)
    with pytest.raises(Crash):
        crashed.work(boundaries=Boundaries(boundary, occurrence))
    crashed.work()
    assert_equal_to_clean(crashed, event_by_event)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_size_of_batches_leaves_no_trace(
    tmp_path: Path, event_by_event: World, batch: int
) -> None:
    batched = world(tmp_path / "world")
    batched.work(batches=iter(lambda: batch, 0))
    assert_equal_to_clean(batched, event_by_event)


def test_a_store_that_lost_everything_is_rebuilt_from_the_logs_start(
    tmp_path: Path, event_by_event: World
) -> None:
    lost = world(tmp_path / "world")
    lost.work()
    assert lost.group  # the group is at the end, the store will know nothing
    for file in lost.folder.glob("windows.db*"):
        file.unlink()
    lost.work()
    assert_equal_to_clean(lost, event_by_event)


def test_deleted_histories_stay_away_and_those_that_go_on_begin_anew(event_by_event: World) -> None:
    windows = event_by_event.windows_of()
    assert event_by_event.sink.deleted
    for entity_id, as_of in event_by_event.sink.deleted.items():
        window = windows[entity_id]
        assert window.as_of is not None
        assert window.as_of >= as_of
        assert window.deleted == (entity_id not in event_by_event.sink.online)
    assert {window.deleted for window in windows.values()} == {True, False}


def test_a_group_that_lost_its_offsets_folds_nothing_twice(
    tmp_path: Path, event_by_event: World
) -> None:
    behind = world(tmp_path / "world")
    behind.work()
    behind.group.clear()
    before = len(behind.sink.offline)
    behind.work()
    assert len(behind.sink.offline) == before
    assert_equal_to_clean(behind, event_by_event)


def test_every_event_gives_a_row_for_each_event_that_was_accepted(event_by_event: World) -> None:
    seen = [row.last_event_time for row in event_by_event.sink.offline]
    as_ofs = [(row.entity_id, row.as_of) for row in event_by_event.sink.offline]
    assert len(as_ofs) == len(set(as_ofs)) > len(event_by_event.sink.online)
    assert seen

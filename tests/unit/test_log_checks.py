"""A log that changed under its windows refuses to be read, and says what to do."""

import logging
from dataclasses import replace

import pytest
from msgspec import structs

from llm4es.errors import BundleMismatch
from llm4es.events import TopicPartition
from stream_worker.log_checks import (
    refuse_changed_log,
    refuse_foreign_keys,
    refuse_other_topic,
    start_positions,
)
from stream_worker.ports import LogDescription, LogIdentity, PartitionSpan
from tests.histories import payment, records, schema

IDENTITY = LogIdentity(topic="shop", topic_id="t-1", partitions=2)
LOG = LogDescription(
    identity=IDENTITY,
    spans={0: PartitionSpan(0, 10), 1: PartitionSpan(5, 10)},
    compacted=False,
    timestamps="log_append",
)
P0, P1 = TopicPartition("shop", 0), TopicPartition("shop", 1)


def test_the_log_that_the_windows_know_is_accepted() -> None:
    refuse_changed_log(LOG, IDENTITY)
    refuse_changed_log(LOG, None)


@pytest.mark.parametrize(
    ("found", "remedy"),
    [
        (replace(LOG, compacted=True), "cleanup.policy=delete"),
        (
            replace(LOG, timestamps="create"),
            r"LogAppendTime, or bound it: message\.timestamp\.after",
        ),
        (replace(LOG, identity=replace(IDENTITY, topic_id="t-2")), "fresh window store"),
        (replace(LOG, identity=replace(IDENTITY, partitions=3)), "fresh window store"),
    ],
)
def test_a_changed_log_is_refused_with_a_remedy(found: LogDescription, remedy: str) -> None:
    with pytest.raises(BundleMismatch, match=remedy):
        refuse_changed_log(found, IDENTITY)


def test_producers_timestamps_within_a_bound_are_accepted_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        refuse_changed_log(LOG, IDENTITY)
    assert not caplog.records
    refuse_changed_log(replace(LOG, timestamps="create_bounded"), IDENTITY)
    (warning,) = caplog.records
    assert "message.timestamp.type=LogAppendTime" in warning.getMessage()


def test_a_log_that_had_nothing_to_tell_it_by_is_accepted_once_it_has() -> None:
    refuse_changed_log(LOG, replace(IDENTITY, topic_id=""))


def test_windows_of_another_topic_are_refused() -> None:
    refuse_other_topic("shop", set())
    refuse_other_topic("shop", {"shop"})
    with pytest.raises(BundleMismatch, match=r"from topic old; use another --window-store, or top"):
        refuse_other_topic("shop", {"old"})


def positions(
    stored: dict[TopicPartition, int], committed: dict[TopicPartition, int], *, unproven: bool
) -> dict[TopicPartition, int]:
    partitions = sorted({*stored, *committed}) or [P0]
    return start_positions(
        LOG, partitions, stored=stored, committed=committed, unproven_start=unproven
    )


@pytest.mark.parametrize(
    ("stored", "committed", "start"),
    [(None, 7, 0), (None, None, 0), (7, None, 7), (7, 9, 7), (9, 7, 7), (10, 10, 10)],
)
def test_the_smaller_offset_is_taken_and_absent_windows_mean_the_logs_start(
    stored: int | None, committed: int | None, start: int
) -> None:
    found = positions(
        {} if stored is None else {P0: stored},
        {} if committed is None else {P0: committed},
        unproven=False,
    )
    assert found == {P0: start}


def test_a_beginning_that_is_gone_is_refused_unless_told_otherwise() -> None:
    with pytest.raises(BundleMismatch, match="--unproven-start"):
        positions({}, {P1: 7}, unproven=False)
    assert positions({}, {P1: 7}, unproven=True) == {P1: 5}


def test_offsets_that_the_log_no_longer_or_not_yet_has_are_refused() -> None:
    with pytest.raises(BundleMismatch, match="retention"):
        positions({P1: 4}, {}, unproven=True)
    with pytest.raises(BundleMismatch, match="lost its tail"):
        positions({P1: 11}, {}, unproven=True)


def test_a_topic_where_most_keys_are_anothers_is_refused_but_single_wrong_keys_are_not() -> None:
    good = records([payment(f"e{n}", n) for n in range(3)])
    foreign = [structs.replace(record, key=b"t1") for record in good]
    broken = [structs.replace(record, value=b"{") for record in good]
    with pytest.raises(BundleMismatch, match="not keyed by customer_id"):
        refuse_foreign_keys([*broken, *foreign], schema(), "customer")
    with pytest.raises(BundleMismatch, match="not keyed"):
        refuse_foreign_keys([structs.replace(good[0], key=None)], schema(), "customer")
    refuse_foreign_keys(foreign, schema(), "terminal")
    # A single coincidence of two entities' ids proves nothing.
    with pytest.raises(BundleMismatch, match="3 of 4 records"):
        refuse_foreign_keys([*foreign, good[0]], schema(), "customer")
    refuse_foreign_keys([foreign[0], *good], schema(), "customer")
    refuse_foreign_keys([foreign[0], good[0]], schema(), "customer")
    refuse_foreign_keys(broken, schema(), "customer")

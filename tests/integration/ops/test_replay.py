"""A replay gives what the live worker gave, touches nothing of it, and survives kills."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from dev.servers import KafkaServer
from llm4es.errors import ConfigError
from llm4es.testing import Boundaries, Crash, Crashing
from stream_worker.assembly import deletion_key_of, open_window_store
from stream_worker.ops.replay import opened_replay
from stream_worker.ops.replay_plan import ReplayRequest
from stream_worker.ops.snapshot import take_snapshot
from stream_worker.ops.spans import TokenBucket
from stream_worker.ports import NO_OFFSETS
from stream_worker.sources.kafka import KafkaGroup, KafkaRecordSource
from stream_worker.sources.kafka_client import KafkaSettings
from stream_worker.worker import Parts
from tests.histories import write_jsonl
from tests.integration.ops.worlds import Live, documents, told

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def live(kafka_server: KafkaServer, tmp_path_factory: pytest.TempPathFactory) -> Live:
    """A topic that a live worker has read in two runs, the second of which wrote a tombstone."""
    found = Live(tmp_path_factory.mktemp("live"), "replayed", kafka=kafka_server)
    found.produce(documents(1, 200))
    found.work()
    found.produce(documents(2, 60))
    found.work()
    return found


def committed(live: Live) -> dict[Any, int]:
    assert live.kafka is not None
    source = KafkaRecordSource(
        KafkaSettings(bootstrap_servers=live.kafka.bootstrap_servers),
        live.topic,
        KafkaGroup(live.topic),
    )
    try:
        spans = source.describe().spans
        from llm4es.events import TopicPartition  # noqa: PLC0415

        return dict(source.committed([TopicPartition(live.topic, each) for each in spans]))
    finally:
        source.close()


def test_a_whole_topic_into_a_fresh_view_gives_the_live_rows(live: Live, tmp_path: Path) -> None:
    fresh = Live(tmp_path / "fresh", live.topic + "-unused", kafka=live.kafka)
    before = committed(live)
    report = fresh.replay(ReplayRequest(into="view", every_event=True), topic=live.topic)
    assert report.finished
    assert report.bad_records
    assert {k: told(v) for k, v in fresh.online_rows().items()} == {
        k: told(v) for k, v in live.online_rows().items()
    }
    replayed, lived = fresh.offline_rows(), live.offline_rows()
    assert lived.items() <= replayed.items()  # the live worker coalesces: a row per batch
    assert len(replayed) == report.accepted
    assert committed(live) == before != NO_OFFSETS


def test_the_middle_gives_the_live_rows_of_that_span_and_no_other(
    live: Live, tmp_path: Path
) -> None:
    whole = Live(tmp_path / "whole", live.topic + "-whole", kafka=live.kafka)
    whole.replay(ReplayRequest(into="offline", every_event=True), topic=live.topic)
    middle = Live(tmp_path / "middle", live.topic + "-middle", kafka=live.kafka)
    report = middle.replay(
        ReplayRequest(since="0:20,1:30,2:10", upto="60", into="offline", every_event=True),
        topic=live.topic,
    )
    assert report.warm_up_records > 0
    rows = middle.offline_rows()
    assert 0 < len(rows) == report.accepted < len(whole.offline_rows())
    assert rows.items() <= whole.offline_rows().items()
    assert not middle.online_rows()


def test_live_rows_are_never_replaced_by_older_ones(live: Live) -> None:
    online, windows, offsets = live.online_rows(), live.window_bytes(), committed(live)
    report = live.replay(ReplayRequest(upto="40", into="view", every_event=True))
    assert report.rows_published > 0
    assert report.rows_superseded > 0
    assert {k: told(v) for k, v in live.online_rows().items()} == {
        k: told(v) for k, v in online.items()
    }
    assert {k: (w.version, w.next_offset) for k, w in live.window_bytes().items()} == {
        k: (w.version, w.next_offset) for k, w in windows.items()
    }
    assert committed(live) == offsets


def test_a_time_names_the_first_record_that_is_not_older(live: Live) -> None:
    rows = sorted(as_of for _, as_of in live.offline_rows())
    moment = rows[len(rows) // 2]
    request = ReplayRequest(since=moment.isoformat())
    with opened_replay(live.settings, live.bundle, live.embedder, request, keep=False) as replay:
        starts = {p: start for p, (_, start, _) in replay.plan.spans.items()}
        assert replay.plan.warm_up + replay.plan.records == sum(committed(live).values())
        assert any(starts.values())
    assert not (live.settings.state_dir / "replays" / replay.folder.name).exists()


def test_some_entities_alone(live: Live, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("cust-03\ncust-07\n")
    fresh = Live(tmp_path / "some", live.topic + "-some", kafka=live.kafka)
    fresh.replay(ReplayRequest(into="view", entities=tmp_path / "ids"), topic=live.topic)
    lived = live.online_rows()
    assert {k: told(v) for k, v in fresh.online_rows().items()} == {
        k: told(lived[k]) for k in ("cust-03", "cust-07")
    }


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Live]:
    """A log in files, and an uninterrupted replay of its second half."""
    folder = tmp_path_factory.mktemp("logged")
    log = write_jsonl(folder / "log.jsonl", documents(5, 200))
    clean = Live(folder / "clean", "log.jsonl", events=log)
    clean.replay(ReplayRequest(since="20", into="view", every_event=True))
    return log, clean


_BOUNDARIES = [
    f"{when} {what}"
    for what in ("poll", "journal", "publish", "begin's end")
    for when in ("before", "after")
]


def test_killed_ten_times_and_resumed_it_ends_as_one_uninterrupted(
    logged: tuple[Path, Live], tmp_path: Path
) -> None:
    log, clean = logged
    rng = random.Random(11)
    killed = Live(tmp_path / "killed", "log.jsonl", events=log)
    request = ReplayRequest(since="20", into="view", every_event=True)
    crashes = 0
    while True:
        fatal = Boundaries(rng.choice(_BOUNDARIES), rng.randint(1, 2) if crashes < 10 else 0)

        def crashing(parts: Parts, fatal: Boundaries = fatal) -> Parts:
            return replace(
                parts,
                source=cast("Any", Crashing(parts.source, fatal, ["poll"])),
                store=cast("Any", Crashing(parts.store, fatal, ["begin"])),
                sink=cast("Any", Crashing(parts.sink, fatal, ["journal", "publish"])),
            )

        try:
            report = killed.replay(replace(request, resume=crashes > 0), wrap=crashing)
        except Crash:
            crashes += 1
            continue
        break
    assert crashes == 10
    assert report.resumed
    assert killed.offline_rows() == clean.offline_rows()
    assert {k: told(v) for k, v in killed.online_rows().items()} == {
        k: told(v) for k, v in clean.online_rows().items()
    }


def test_what_was_begun_is_not_begun_again_unasked(
    logged: tuple[Path, Live], tmp_path: Path
) -> None:
    log, _ = logged
    begun = Live(tmp_path / "begun", "log.jsonl", events=log)
    with pytest.raises(Crash):
        begun.replay(
            ReplayRequest(),
            wrap=lambda parts: replace(
                parts,
                source=cast("Any", Crashing(parts.source, Boundaries("after poll", 2), ["poll"])),
            ),
        )
    with pytest.raises(ConfigError, match="--resume"):
        begun.replay(ReplayRequest())
    assert begun.replay(ReplayRequest(resume=True)).resumed


def test_windows_begin_from_the_nearest_snapshot_before_the_span(
    logged: tuple[Path, Live], tmp_path: Path
) -> None:
    log, _ = logged
    lines = log.read_bytes().splitlines(keepends=True)
    grows = tmp_path / "log.jsonl"
    taken = tmp_path / "snapshots"
    grown = Live(tmp_path / "grown", "log.jsonl", events=grows)
    for upto in (40, 100, len(lines)):
        grows.write_bytes(b"".join(lines[:upto]))
        grown.work()
        store = open_window_store(grown.settings, grown.bundle, read_only=True)
        take_snapshot(
            store,
            taken / f"{upto}.db",
            grown.bundle.id,
            deletion_key=deletion_key_of(grown.settings),
        )
        store.close()
    (taken / "notes.txt").write_text("no snapshot at all")
    request = ReplayRequest(since="60", into="offline", every_event=True)
    whole = Live(tmp_path / "whole", "log.jsonl", events=log)
    due = whole.replay(request)
    near = Live(tmp_path / "near", "log.jsonl", events=log)
    with opened_replay(
        near.settings.model_copy(update={"from_snapshot": taken}),
        near.bundle,
        near.embedder,
        request,
    ) as replay:
        assert replay.plan.snapshot == str(taken / "100.db")
        told = replay.plan.warm_up
        report = replay.run()
    assert report.warm_up_records == told == due.warm_up_records - 100
    assert near.offline_rows() == whole.offline_rows() != {}
    with pytest.raises(ConfigError, match="offsets within the span"):
        near.replay(request, from_snapshot=taken / f"{len(lines)}.db")
    early = Live(tmp_path / "early", "log.jsonl", events=log)
    request = replace(request, since="2")
    with opened_replay(
        early.settings.model_copy(update={"from_snapshot": taken}),
        early.bundle,
        early.embedder,
        request,
    ) as replay:
        assert replay.plan.snapshot is None


@pytest.mark.parametrize("scheme", ["file", "memory", "folder"])
def test_a_log_in_an_object_store(logged: tuple[Path, Live], tmp_path: Path, scheme: str) -> None:
    import fsspec  # noqa: PLC0415

    log, clean = logged
    place = {"file": log.as_uri(), "memory": "memory://bucket/log.jsonl", "folder": ""}[scheme]
    if scheme == "memory":
        with fsspec.open(place, "wb") as file:
            file.write(log.read_bytes())
    if scheme == "folder":
        lines = log.read_bytes().splitlines(keepends=True)
        parts = tmp_path / "log.jsonl"
        parts.mkdir()
        (parts / "a.jsonl").write_bytes(b"".join(lines[:50]))
        (parts / "b.jsonl").write_bytes(b"".join(lines[50:]))
        place = str(parts)
    fresh = Live(tmp_path / "fresh", "log.jsonl", events=None)
    report = fresh.replay(ReplayRequest(since="20", into="offline", every_event=True, log=place))
    assert report.accepted == len(fresh.offline_rows())
    assert fresh.offline_rows() == clean.offline_rows()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"since": "yesterday"}, "from"),
        ({"upto": "0:1"}, "to"),
        ({"into": "customer_llm4es_other"}, "into"),
        ({"entities": Path("/nowhere/ids")}, "entities"),
        ({"log": "nosuch://bucket/log.jsonl"}, "log"),
    ],
)
def test_a_wrong_flag_is_named(
    logged: tuple[Path, Live], tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    log, _ = logged
    fresh = Live(tmp_path / "fresh", "log.jsonl", events=log)
    with pytest.raises(ConfigError) as error:
        fresh.replay(ReplayRequest(**changes))
    assert error.value.field == field


def test_tokens_let_no_more_through_than_the_rate() -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    bucket = TokenBucket(50, clock=lambda: now, sleep=sleep)
    passed = 0
    while now < 20:
        count = bucket.available(0.2)
        bucket.take(count)
        passed += count
    assert 50 * 19 <= passed <= 50 * 21


def test_a_report_lies_beside(logged: tuple[Path, Live]) -> None:
    _, clean = logged
    reports = list((clean.settings.state_dir / "replays").glob("*/report.json"))
    assert json.loads(reports[0].read_text())["finished"]
    assert "records of the span" in reports[0].with_suffix(".txt").read_text()
    assert not list((clean.settings.state_dir / "replays").glob("*/windows.db"))

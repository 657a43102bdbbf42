"""After `forget` nothing that we keep holds the entity, and nothing brings it back."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from dev.processes import wait_until
from dev.servers import KafkaServer, RedisServer
from llm4es.events import Record
from llm4es.testing import LengthEmbedder
from stream_worker.assembly import assembled_around
from stream_worker.ops.backfill import BACKFILLS
from stream_worker.ops.disk_buckets import DiskBuckets
from stream_worker.ops.forget import expire_idle, forget_entity
from stream_worker.ops.replay_plan import ReplayRequest
from tests.histories import payment
from tests.integration.ops.processes import Killable, serve
from tests.integration.ops.worlds import CUSTOMERS, Live, documents
from tests.kafka_topics import produce, read_all

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
]
GONE = "cust-03"


@pytest.fixture
def live(kafka_server: KafkaServer, redis_server: RedisServer, tmp_path: Path, unique: str) -> Live:
    online = f'{{type: redis, connection_string: "{redis_server.address},db=8"}}'
    found = Live(tmp_path / "live", f"forgotten-{unique}", kafka=kafka_server, online=online)
    found.produce(documents(31, 200))
    return found


@contextmanager
def working(live: Live) -> Iterator[None]:
    """A live worker in a thread of its own."""
    settings = live.settings.model_copy(update={"until_end": False, "journal_roll_s": 0.5})
    started = threading.Event()
    with assembled_around(settings, live.bundle, LengthEmbedder) as built:
        thread = threading.Thread(target=built.worker.run, args=(started.set,))
        thread.start()
        try:
            assert started.wait(60)
            yield
        finally:
            built.worker.stop()
            thread.join(60)


def holders(folder: Path) -> list[Path]:
    return [
        path for path in folder.rglob("*") if path.is_file() and GONE.encode() in path.read_bytes()
    ]


def newest(live: Live, entity_id: str) -> str | None:
    """The newest event that its online row has seen."""
    row = live.online_rows().get(entity_id)
    return None if row is None else row.last_event_id


def test_nothing_holds_the_entity_and_nothing_brings_it_back(
    live: Live, redis_server: RedisServer
) -> None:
    assert live.kafka is not None
    bad = f'{{"customer_id": "{GONE}", "kind": "payment"}}'.encode()
    other = b'{"customer_id": "cust-033", "kind": "payment"}'
    produce(live.kafka, live.topic, [(GONE.encode(), bad), (b"cust-033", other)])
    live.work()
    live.replay(ReplayRequest(into="offline", every_event=True))
    killed = DiskBuckets(live.settings.state_dir / BACKFILLS / "killed" / "buckets", expected=1)
    killed.add(
        [
            Record(
                topic=live.topic, partition=0, offset=0, timestamp=None,
                key=GONE.encode(), value=bad,
            )
        ]
    )  # fmt: skip
    killed.finish()
    assert holders(live.folder)
    assert (GONE in live.online_rows()) is True
    with working(live):
        receipt = forget_entity(live.settings, live.bundle, GONE, wait_s=60)
    assert receipt.done, receipt
    assert receipt.rows_removed > 0 < receipt.dead_letters_removed
    assert receipt.replays_removed == 1
    assert GONE not in str(receipt)
    assert not holders(live.folder)
    client: Any = Redis.from_url(f"{redis_server.url}/8")
    named = [key for key in client.scan_iter("*") if GONE.encode() in key]
    values = [client.hgetall(key) for key in named]
    client.close()
    assert all(all(name.startswith(b"_ts:") for name in each) for each in values)  # the guard alone
    letters = read_all(live.kafka, f"{live.topic}.dead-letters", expect=1, timeout_s=10)
    assert not any(f'"{GONE}"'.encode() in (value or b"") for _, _, value in letters)
    assert any(b"cust-033" in value for _, _, value in letters)

    # A zombie's window of long ago, and every record once more: neither brings it back.
    (live.folder / "windows.db").unlink()
    for path in live.folder.glob("windows.db-*"):
        path.unlink()
    live.work()
    live.replay(ReplayRequest(upto="40", into="view", every_event=True))
    assert GONE not in live.online_rows()
    assert not any(name == GONE for name, _ in live.offline_rows())


def test_a_zombie_that_held_its_events_does_not_bring_it_back(
    kafka_server: KafkaServer, redis_server: RedisServer, tmp_path: Path, unique: str
) -> None:
    live = Live(
        tmp_path / "live",
        f"zombie-{unique}",
        kafka=kafka_server,
        online=f'{{type: redis, connection_string: "{redis_server.address},db=9"}}',
        windows=f"{redis_server.url}/15",
    )
    live.produce(documents(33, 100))
    changes = {"until_end": False, "max_records": 4, "journal_roll_s": 600.0}
    zombie = Killable(serve, live.settings.model_copy(update=changes), live.bundle.id)
    assert wait_until(lambda: GONE in live.online_rows(), timeout_s=120)
    live.produce([payment(f"z{n}", 5_000 + n, customer=GONE) for n in range(400)])
    before = live.online_rows()[GONE].as_of
    assert wait_until(lambda: live.online_rows()[GONE].as_of > before, timeout_s=60)
    zombie.freeze()  # in the midst of them: four at a time, with a fetch of them all at hand
    live.produce([payment("alive", 9_000, customer="cust-05")])
    with working(live):
        assert wait_until(lambda: newest(live, "cust-05") == "alive", timeout_s=120)
        receipt = forget_entity(live.settings, live.bundle, GONE, wait_s=15)
        assert receipt.window_gone
        assert receipt.online_gone
        assert not receipt.journals_clear  # the zombie's, which nobody else may roll
        assert not receipt.done
        zombie.thaw()
        zombie.stop()
        receipt = forget_entity(live.settings, live.bundle, GONE, wait_s=60)
        assert receipt.done, receipt
    assert GONE not in live.online_rows()
    assert not any(name == GONE for name, _ in live.offline_rows())
    assert not holders(live.folder)


def test_silent_entities_expire_and_others_stay(live: Live) -> None:
    live.work()
    rows = live.online_rows()
    newest = max(row.as_of for row in rows.values())
    first = min(
        row.as_of for row in rows.values()
    )  # Kafka's clock has milliseconds: it may be shared
    quiet = {name for name, row in rows.items() if row.as_of == first}
    idle = newest - first - timedelta(microseconds=1)
    told = expire_idle(live.settings, live.bundle, idle=idle, now=newest, dry_run=True)
    assert (told.looked_at, told.idle, told.tombstones) == (CUSTOMERS, len(quiet), 0)
    done = expire_idle(live.settings, live.bundle, idle=idle, now=newest)
    assert done.tombstones == len(quiet)
    live.work()
    assert set(rows) - set(live.online_rows()) == quiet

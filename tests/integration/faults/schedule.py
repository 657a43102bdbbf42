"""Seeded schedules of faults: which worker, store or connection fails when, and how it ended.

Everything follows from the seed but the scheduler of the machine. Run one again:
`python -m tests.integration.faults.soak --seed N`.
"""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from redis import Redis
from redis.exceptions import RedisError

from dev.servers import create_topic
from llm4es.errors import LLM4ESError
from llm4es.events import Record, TopicPartition
from llm4es.feast import open_reader
from llm4es.feast.definitions import view_spec
from llm4es.feast.journal import recover_journals
from llm4es.feast.parts import list_parts
from llm4es.features import FeatureRow
from stream_worker.sources.kafka import KafkaGroup, KafkaRecordSource
from stream_worker.sources.kafka_client import KafkaProducer, KafkaSettings
from stream_worker.window_store.codec import encode_window
from stream_worker.window_store.redis import RedisWindowStore
from tests.faults.worlds import World, told
from tests.histories import payment
from tests.integration.faults.child import Plan, faults_bundle
from tests.integration.faults.proxy import Mode, Proxy
from tests.integration.faults.stage import RedisStage, Stage, WorkerProcess

__all__ = ["KINDS", "Report", "perform"]

PARTITIONS = 4
CUSTOMERS = 16
EVENTS = 400
PRODUCED_IN_S = 1.5
DEADLINE_S = 90.0
SESSION_MS = 1_500
_BOUNDARIES = [
    f"{when} {what}"
    for what in ("poll", "journal", "publish", "park", "begin's end", "commit")
    for when in ("before", "after")
]
_UPSTREAM_DOWN = 4  # exit code of a start while a server is away: an orchestrator tries again
_SIGKILLED = -9
_HOPELESS = 5  # workers that ended as none should

Document = dict[str, object]


@dataclass
class Report:
    """How a schedule went; `problems` is empty where everything is as one clean run leaves it."""

    seed: int
    kinds: list[str]
    seconds: float = 0.0
    records: int = 0
    restarts: int = 0
    problems: list[str] = field(default_factory=list)


class Play:
    """One schedule under way: its log, its workers, and the faults that befall them."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage = stage
        self.seed = seed
        self.rng = random.Random(seed)
        self.folder = stage.begin(f"schedule-{seed}")
        self.topic = f"shop-{seed}-{time.time_ns():x}"
        self.workers: list[WorkerProcess] = []
        self.wanted = 2
        self.restarts = 0
        self.problems: list[str] = []
        self.static = self.rng.random() < 0.3
        self.boundary = ("", 0)
        self._deadly = 0

    @property
    def settings(self) -> dict[str, Any]:
        """A worker's, through the proxies."""
        return {
            "feature_repo": self.folder / "repo",
            "bootstrap_servers": f"127.0.0.1:{self.stage.kafka.proxy.port}",
            "topic": self.topic,
            "group": self.topic,
            "session_timeout_ms": SESSION_MS,
            "window_store": f"redis://127.0.0.1:{self.stage.windows.proxy.port}?socket_timeout=1",
            "max_records": self.rng.choice([4, 16, 64]),
            "poll_timeout_ms": 50,
            "max_batch_tokens": 500,
            "drain_timeout_ms": 200,
            "sink_retry_ms": 400,
            "hot_window_events": self.rng.choice([0, 30, 100_000]),
            "journal_roll_rows": 50,
            "journal_roll_s": 0.5,
        }

    def start_worker(self) -> WorkerProcess:
        """Start one more; the first two may carry the place where they die."""
        settings = self.settings
        if self.static:
            taken = {each.plan.settings.get("group_instance_id") for each in self.workers}
            settings["group_instance_id"] = next(
                name for name in (f"w{number}" for number in count()) if name not in taken
            )
        boundary, occurrence = self.boundary if self._deadly > 0 else ("", 0)
        self._deadly -= 1
        plan = Plan(self.folder / "workers.log", settings, boundary, occurrence)
        self.workers.append(WorkerProcess(plan))
        return self.workers[-1]

    def die_at(self, boundary: str, occurrence: int) -> None:
        """Let the next two workers die there."""
        self.boundary, self._deadly = (boundary, occurrence), 2

    def tend(self) -> None:
        """Start anew what has died; note what should not have."""
        for worker in [each for each in self.workers if each.exit_code is not None]:
            self.workers.remove(worker)
            if worker.exit_code not in {0, _SIGKILLED, _UPSTREAM_DOWN}:
                self.problems.append(f"a worker ended with {worker.exit_code}")
                if len(self.problems) > _HOPELESS:
                    raise RuntimeError((self.folder / "workers.log").read_text()[-3000:])
            self.restarts += 1
        while len(self.workers) < self.wanted:
            self.start_worker()

    def wait(self, seconds: float) -> None:
        """Let time pass, workers tended."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.tend()
            time.sleep(min(left, 0.05))

    def pick(self) -> WorkerProcess:
        """One of the workers."""
        self.tend()
        return self.rng.choice(self.workers)

    def stop_all(self) -> None:
        """SIGTERM to everyone; each must go in peace."""
        for worker in self.workers:
            code = worker.stop()
            if code is None or code not in {0, _SIGKILLED}:
                self.problems.append(f"a worker that was told to stop ended with {code}")
        self.workers.clear()


def kill(play: Play) -> None:
    for _ in range(play.rng.randint(1, 3)):
        play.pick().kill()
        play.wait(play.rng.uniform(0.1, 0.8))


def freeze(play: Play) -> None:
    """Past the session's end, while another takes over; then it wakes, a zombie."""
    if play.static:  # its place is given to no other before the session ends, and then for good
        play.static = False
    zombie = play.pick()
    zombie.freeze()
    play.workers.remove(zombie)
    play.wait(2 * SESSION_MS / 1000 + play.rng.uniform(0.2, 1.0))
    zombie.thaw()
    play.wait(0.5)
    play.workers.append(zombie)


def storm(play: Play) -> None:
    """Workers join and leave without end."""
    for _ in range(4):
        play.wanted = play.rng.choice([1, 2, 3])
        while len(play.workers) > play.wanted:
            worker = play.workers.pop(0)
            if worker.stop() != 0:
                play.problems.append("a worker that left in a storm did not end in order")
        play.wait(play.rng.uniform(0.3, 1.0))
    play.wanted = 2


def broker(play: Play) -> None:
    play.stage.kafka.crash()


def _on(names: str, action: Callable[[Play, RedisStage], None]) -> Callable[[Play], None]:
    def happen(play: Play) -> None:
        for name in names.split():
            action(play, getattr(play.stage, name))

    return happen


def _restart(play: Play, redis: RedisStage) -> None:
    play.wait(play.rng.uniform(0.0, 0.3))
    redis.restart()


def _lose_tail(play: Play, redis: RedisStage) -> None:
    redis.lose_tail(play.rng.uniform(0.05, 0.9))


def _lose_all(play: Play, redis: RedisStage) -> None:  # noqa: ARG001 - as the others
    redis.lose_all()


def _network(name: str, mode: Mode) -> Callable[[Play], None]:
    def happen(play: Play) -> None:
        proxy: Proxy = getattr(play.stage, name).proxy
        proxy.set(mode)
        play.wait(play.rng.uniform(0.5, 2.0))
        proxy.set("pass")

    return happen


def _die(what: str) -> Callable[[Play], None]:
    def happen(play: Play) -> None:
        play.wait(play.rng.uniform(0.2, 1.0))

    happen.__name__ = what
    return happen


KINDS: dict[str, Callable[[Play], None]] = {
    "kill": kill,
    "boundary": _die("boundary"),
    "both-lost": _on("windows online", _lose_all),
    "freeze": freeze,
    "windows-tail": _on("windows", _lose_tail),
    "online-reset": _network("online", "reset"),
    "storm": storm,
    "online-tail": _on("online", _lose_tail),
    "kafka-stall": _network("kafka", "stall"),
    "windows-restart": _on("windows", _restart),
    "online-lost": _on("online", _lose_all),
    "windows-drip": _network("windows", "drip"),
    "broker": broker,
    "windows-lost": _on("windows", _lose_all),
    "online-stall": _network("online", "stall"),
    "both-tail": _on("windows online", _lose_tail),
    "kafka-reset": _network("kafka", "reset"),
    "online-restart": _on("online", _restart),
    "windows-reset": _network("windows", "reset"),
    "kafka-drip": _network("kafka", "drip"),
    "online-drip": _network("online", "drip"),
    "windows-stall": _network("windows", "stall"),
}
_COSTLY = {"broker", "freeze", "storm"}  # not drawn as a second fault


def perform(stage: Stage, seed: int) -> Report:
    """Let a schedule happen, and compare what it leaves with one clean run over its log."""
    started = time.monotonic()
    play = Play(stage, seed)
    kinds = [list(KINDS)[seed % len(KINDS)]]
    kinds += play.rng.sample(sorted(set(KINDS) - _COSTLY), play.rng.choice([0, 1, 1, 2]))
    report = Report(seed, kinds)
    topics = (play.topic, f"{play.topic}.dead-letters")
    server = stage.kafka.server
    for topic, largest in zip(topics, (1 << 20, 2 << 20), strict=True):
        create_topic(
            server.bootstrap_servers,
            topic,
            partitions=PARTITIONS,
            config={"max.message.bytes": str(largest)},
        )
    producing = _Producing(stage, play.topic, seed)
    try:
        _act(play, kinds, producing)
        log = producing.records()
        report.records = len(log)
        _settle(play, log)
        play.stop_all()
        play.problems += _differences(play, log)
    finally:
        for worker in play.workers:
            worker.kill()
        producing.join()
        stage.kafka.delete_topics(*topics)
    report.problems = play.problems
    report.restarts = play.restarts
    report.seconds = time.monotonic() - started
    return report


def _act(play: Play, kinds: list[str], producing: "_Producing") -> None:
    if "boundary" in kinds:
        play.die_at(play.rng.choice(_BOUNDARIES), play.rng.randint(1, 5))
    play.tend()
    producing.start()
    _await_progress(play)
    for kind in kinds:
        play.wait(play.rng.uniform(0.0, 0.6))
        KINDS[kind](play)
    producing.join()


def _await_progress(play: Play) -> None:
    """Until the first windows are written: before that there is little to break."""
    deadline = time.monotonic() + DEADLINE_S
    while not _stored(play) and time.monotonic() < deadline:
        play.wait(0.05)


def _stored(play: Play) -> dict[TopicPartition, int]:
    try:
        store = RedisWindowStore(play.stage.windows.url, faults_bundle().id)
        try:
            return store.offsets(play.topic)
        finally:
            store.close()
    except LLM4ESError:
        return {}


def _published(play: Play) -> dict[TopicPartition, int]:
    client = Redis(port=play.stage.online.port)
    try:
        view = view_spec(faults_bundle())
        name = f"customer_llm4es_{view.manifest.id}"
        found: Any = client.hgetall(f"llm4es:llm4es:{name}:marks:{play.topic}")
    except RedisError:
        return {}
    finally:
        client.close()
    return {
        TopicPartition(play.topic, int(field)): int(at)
        for field, at in found.items()
        if field.isdigit()
    }


def _settle(play: Play, log: list[Record]) -> None:
    """Wait until both stores stand at the log's end."""
    ends: dict[TopicPartition, int] = {}
    for record in log:
        ends[record.topic_partition] = record.offset + 1
    deadline = time.monotonic() + DEADLINE_S
    steady = 0
    while steady < 2:
        play.wait(0.1)
        stored, published = _stored(play), _published(play)
        there = all(stored.get(tp, 0) >= at <= published.get(tp, 0) for tp, at in ends.items())
        steady = steady + 1 if there else 0
        if time.monotonic() > deadline:
            play.problems.append(
                f"not done after {DEADLINE_S:g} s: windows {sorted(stored.items())}, "
                f"online {sorted(published.items())}, log {sorted(ends.items())}"
            )
            for worker in play.workers:
                worker.tell_where()
            return


class _Producing:
    """Produces the schedule's documents, in small bursts, while the faults happen."""

    def __init__(self, stage: Stage, topic: str, seed: int) -> None:
        self._servers = stage.kafka.server.bootstrap_servers
        self._topic = topic
        self._documents = list(_documents(random.Random(f"log {seed}")))
        self._thread = threading.Thread(target=self._run, name="producing", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self) -> None:
        """Wait until all is in the log; harmless before it has begun."""
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        producer = KafkaProducer(
            bootstrap_servers=self._servers, acks="all", enable_idempotence=True, linger_ms=5
        )
        try:
            for number, (key, value) in enumerate(self._documents):
                producer.send(self._topic, key=key, value=value, partition=sum(key) % PARTITIONS)
                if number % 20 == 19:
                    time.sleep(PRODUCED_IN_S * 20 / len(self._documents))
            producer.flush(timeout=60)
        finally:
            producer.close()

    def records(self) -> list[Record]:
        """The log as it is: what one clean run reads."""
        source = KafkaRecordSource(
            KafkaSettings(bootstrap_servers=self._servers),
            self._topic,
            KafkaGroup(f"{self._topic}-reader"),
        )
        try:
            found = sorted(source.sample(1 << 20), key=lambda r: (r.partition, r.offset))
        finally:
            source.close()
        if len(found) != len(self._documents):
            msg = f"{len(found)} records in the log, {len(self._documents)} were produced"
            raise RuntimeError(msg)
        return found


def _documents(rng: random.Random) -> Iterator[tuple[bytes, bytes]]:
    """Payments: some out of order, some late, some twice, some bad."""
    sent: list[Document] = []
    for number in range(EVENTS):
        second = number * 7 - rng.choice([0, 0, 0, 20, 90, 400])
        amount: object = "much" if rng.random() < 0.03 else round(rng.uniform(1, 200), 2)
        customer = f"c{rng.randrange(CUSTOMERS)}"
        sent.append(payment(f"e{number}", second, customer=customer, amount=amount))
        again = [rng.choice(sent)] if rng.random() < 0.1 else []
        for document in (sent[-1], *again):
            key = str(document["customer_id"]).encode()
            yield key, b"{" if rng.random() < 0.01 else json.dumps(document).encode()


def _differences(play: Play, log: list[Record]) -> list[str]:
    """What is not as one clean, event-by-event run over the log leaves it."""
    folder = play.folder / "clean"
    folder.mkdir()
    clean = World(folder, log, bundle=faults_bundle(), topic=play.topic, partitions=PARTITIONS)
    clean.work(batches=iter(lambda: 1, 0), every_event=True)
    return [
        *_window_differences(play, log, clean),
        *_row_differences(play, clean),
        *_letter_differences(play, clean),
    ]


def _window_differences(play: Play, log: list[Record], clean: World) -> Iterator[str]:
    store = RedisWindowStore(play.stage.windows.url, clean.bundle.id)
    try:
        partitions = {record.topic_partition for record in log}
        found = {each.entity_id: encode_window(each) for each in store.scan(partitions)}
    finally:
        store.close()
    due = clean.windows()
    for entity in sorted(found.keys() | due.keys()):
        if found.get(entity) != due.get(entity):
            yield f"window of {entity} differs"


def _row_differences(play: Play, clean: World) -> Iterator[str]:
    due = {told(row)[:2]: told(row) for row in clean.sink.offline}
    customers = sorted(clean.sink.online)
    reader = open_reader(play.folder / "repo", view_spec(clean.bundle))
    try:
        online = dict(zip(customers, reader.read(customers), strict=True))
    finally:
        reader.close()
    newest: dict[str, tuple[object, ...]] = {}
    for row in _offline(play.folder / "repo/data/offline"):
        if told(row) != due.get(told(row)[:2]):
            yield f"offline row of {row.entity_id} at {row.as_of} differs"
        newest[row.entity_id] = max(newest.get(row.entity_id, told(row)), told(row))
    for customer in customers:
        expected, found = clean.sink.online[customer], online[customer]
        whole = expected.last_event_time.replace(microsecond=0)
        if found is None or told(found) != told(replace(expected, last_event_time=whole)):
            yield f"online row of {customer} differs"
        if newest.get(customer) != told(expected):
            yield f"newest offline row of {customer} is not the online row"


def _offline(log: Path) -> Iterator[FeatureRow]:
    """Every row ever served: parts, and what killed writers left in their journals."""
    for folder in {path.parent for path in log.rglob("_journal")}:
        recover_journals(folder)
    for part in list_parts(log):
        for row in pq.read_table(part).to_pylist():
            entity_id = row.pop("customer_id")
            as_of = row.pop("event_timestamp")
            yield FeatureRow(entity_id=entity_id, as_of=as_of, **row)


def _letter_differences(play: Play, clean: World) -> Iterator[str]:
    source = KafkaRecordSource(
        KafkaSettings(bootstrap_servers=play.stage.kafka.server.bootstrap_servers),
        f"{play.topic}.dead-letters",
        KafkaGroup(f"{play.topic}-letters"),
    )
    try:
        headers = [dict(letter.headers) for letter in source.sample(1 << 20)]
    finally:
        source.close()
    found = {
        (int(each["llm4es.partition"] or b""), int(each["llm4es.offset"] or b""))
        for each in headers
    }
    if found != clean.dead():
        yield f"dead letters differ: {sorted(found ^ clean.dead())}"

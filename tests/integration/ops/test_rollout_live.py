"""A roll-out by the commands, while workers of both bundles run, events come and readers ask."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
from feast import FeatureStore
from feast.errors import FeatureViewNotFoundException

from dev.processes import wait_until
from dev.servers import KafkaServer, RedisServer
from llm4es.bundle import Bundle
from llm4es.feast import Serving
from tests.commands import run
from tests.histories import SCHEMA_YAML, payment
from tests.integration.faults.child import faults_bundle
from tests.integration.ops.processes import Killable, serve
from tests.integration.ops.worlds import CUSTOMERS, KEY, Live

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
    # A reader that holds the service's former version is told so.
    pytest.mark.filterwarnings("ignore:The FeatureService object"),
]
OLD, NEW = "a" * 12, "b" * 12
EVERYONE = [f"cust-{number:02d}" for number in range(CUSTOMERS)]


def write_bundle(folder: Path, bundle: Bundle) -> Path:
    """As much of a bundle as a roll-out looks at."""
    folder.mkdir()
    (folder / "manifest.json").write_text(bundle.manifest.model_dump_json())
    (folder / "schema.yaml").write_text(SCHEMA_YAML)
    return folder


@dataclass
class Reader:
    """A stock client that asks for everyone by the service's name, over and over."""

    repo: Path
    seen: list[tuple[str | None, ...]] = field(default_factory=list)  # bundles of an answer
    rows: int = 0

    def ask(self, store: FeatureStore) -> None:
        try:
            answer = store.get_online_features(
                features=store.get_feature_service("customer_llm4es"),
                entity_rows=[{"customer_id": each} for each in EVERYONE],
            ).to_dict()
        except FeatureViewNotFoundException:
            return  # the service moved between the two calls: ask again
        bundles = tuple(sorted(set(answer["bundle_id"]), key=str))
        self.rows += len(answer["embedding"]) - answer["embedding"].count(None)
        if not self.seen or self.seen[-1] != bundles:
            self.seen.append(bundles)

    def run(self, stop: threading.Event) -> None:
        store = FeatureStore(repo_path=str(self.repo))
        while not stop.wait(0.02):
            self.ask(store)


def payments() -> Iterator[Mapping[str, Any]]:
    """Everyone pays in turn, for good."""
    for number in count():
        yield payment(f"r{number}", number, customer=EVERYONE[number % CUSTOMERS])


@contextmanager
def under_load(live: Live, readers: list[Reader]) -> Iterator[None]:
    """Events come, and readers ask, as long as the block lasts."""
    stop = threading.Event()
    coming = payments()

    def produce() -> None:
        while not stop.wait(0.2):
            live.produce(list(islice(coming, 24)))

    threads = [threading.Thread(target=produce)]
    threads += [threading.Thread(target=each.run, args=[stop]) for each in readers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def test_readers_see_the_old_bundle_until_the_switch_the_new_one_after_and_never_nothing(
    kafka_server: KafkaServer, redis_server: RedisServer, tmp_path: Path, unique: str
) -> None:
    online = f'{{type: redis, connection_string: "{redis_server.address},db=12"}}'
    live = Live(
        tmp_path / "live", f"rolled-{unique}", kafka=kafka_server, online=online,
        bundle=faults_bundle(OLD),
    )  # fmt: skip
    settings = live.settings.model_copy(
        update={"window_store": f"{redis_server.url}/13", "group": None, "until_end": False}
    )
    settings = type(settings)(**settings.model_dump())
    flags = [
        "--bundle", str(write_bundle(tmp_path / NEW, faults_bundle(NEW))),
        "--feature-repo", str(settings.feature_repo), "--state-dir", str(settings.state_dir),
        "--window-store", f"{redis_server.url}/13",
        "--bootstrap-servers", kafka_server.bootstrap_servers, "--json",
    ]  # fmt: skip

    def rollout(verb: str, *more: str) -> dict[str, Any]:
        done = run(
            ["stream_worker", "rollout", verb, *flags, *more], env={"LLM4ES_DELETION_KEY": KEY}
        )
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    live.produce(list(islice(payments(), 120)))
    old = Killable(serve, settings, OLD)
    assert wait_until(lambda: set(live.online_rows()) == set(EVERYONE), timeout_s=120)
    readers = [Reader(settings.feature_repo) for _ in range(2)]

    def all_see(*bundles: str) -> bool:
        return wait_until(
            lambda: all(reader.seen[-1:] == [bundles] for reader in readers), timeout_s=60
        )

    with under_load(live, readers):
        assert all_see(OLD)
        assert rollout("start")["served"] == OLD
        new = Killable(serve, settings, NEW)
        told = rollout("switch", "--wait-s", "100")
        assert told["served"] == NEW
        assert all_see(NEW)
        old.stop()
        assert rollout("finish")["views"] == [NEW]
        asked = [reader.rows for reader in readers]
        assert wait_until(
            lambda: all(r.rows > before for r, before in zip(readers, asked, strict=True)),
            timeout_s=60,
        )
    new.stop()
    assert [reader.seen for reader in readers] == [[(OLD,), (NEW,)]] * 2
    serving = Serving(settings.feature_repo, "customer", config_file="feature_store.yaml")
    assert serving.bundles == {NEW}

"""A deleted entity stays away, whatever is lost and replayed: real Kafka, Feast, stores."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from feast import FeatureStore
from pydantic import SecretStr
from redis import Redis

from dev.servers import KafkaServer, RedisServer
from llm4es.feast.definitions import TIMESTAMP_FIELD, view_spec
from llm4es.feast.offline_log import rewrite_deleted
from llm4es.features import view_name
from llm4es.testing import LengthEmbedder
from stream_worker.assembly import assembled_around
from stream_worker.settings import WorkerSettings
from tests.feast_parts import apply, make_repo
from tests.histories import payment
from tests.integration.faults.child import faults_bundle
from tests.kafka_topics import make_topics, produce

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ibis"),
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
]

GONE, OTHER = "somebody-who-left", "somebody-else"
BUNDLE = faults_bundle()
VIEW = view_name("customer", BUNDLE.id)


@dataclass(frozen=True)
class World:
    """A worker's surroundings, on SQLite or on Redis."""

    kafka: KafkaServer
    topic: str
    repo: Path
    state: Path
    redis: RedisServer | None

    @property
    def window_store(self) -> str:
        return (
            f"sqlite:{self.state / 'windows.db'}" if self.redis is None else f"{self.redis.url}/1"
        )

    def produce(self, *records: tuple[str, dict[str, object] | None]) -> None:
        produce(
            self.kafka,
            self.topic,
            [(key.encode(), None if v is None else json.dumps(v).encode()) for key, v in records],
        )

    def work(self) -> None:
        """Run a fresh worker to the log's end."""
        settings: dict[str, Any] = {
            "feature_repo": self.repo,
            "bootstrap_servers": self.kafka.bootstrap_servers,
            "topic": self.topic,
            "group": self.topic,
            "window_store": SecretStr(self.window_store),
            "deletion_key": SecretStr("a key of tests alone"),
            "until_end": True,
            "poll_timeout_ms": 50,
        }
        with assembled_around(WorkerSettings(**settings), BUNDLE, LengthEmbedder) as built:
            built.worker.run()

    def lose_windows(self) -> None:
        for file in self.state.glob("windows.db*"):
            file.unlink()
        if self.redis is not None:
            Redis.from_url(self.window_store).flushdb()

    def lose_online_rows(self) -> None:
        if self.redis is None:
            for file in (self.repo / "data").glob("online.db*"):
                file.unlink()
            apply(self.repo, view_spec(BUNDLE))
        else:
            Redis.from_url(self.redis.url).flushdb()

    def counts(self) -> tuple[list[int | None], list[int | None]]:
        """Events behind each one's row, online and as of ever after."""
        features = [f"{VIEW}:event_count"]
        rows = [{"customer_id": each} for each in (GONE, OTHER)]
        stock = FeatureStore(repo_path=str(self.repo))  # one that is open has a lost file still
        online = stock.get_online_features(features=features, entity_rows=rows).to_dict()
        labels = pd.DataFrame(rows).assign(event_timestamp=pd.Timestamp("2100-01-01", tz="UTC"))
        offline = stock.get_historical_features(entity_df=labels, features=features).to_df()
        counted = offline["event_count"].tolist()
        return online["event_count"], [None if pd.isna(each) else int(each) for each in counted]

    def everything(self) -> bytes:
        """All bytes but Kafka's, and the online store's: it keeps a timestamp under Feast's key."""
        kept = [
            file.read_bytes() + str(file).encode()
            for folder in (self.repo / "data", self.state)
            for file in folder.rglob("*")
            if file.is_file() and not file.name.startswith("online.db")
        ]
        if self.redis is not None:
            client: Any = Redis.from_url(self.window_store)
            kept += [key + (client.dump(key) or b"") for key in client.keys("*")]
            client.close()
        return b"".join(kept)


@pytest.fixture(params=["sqlite", "redis"])
def world(
    request: pytest.FixtureRequest, kafka_server: KafkaServer, unique: str, tmp_path: Path
) -> Iterator[World]:
    redis = RedisServer(tmp_path / "redis") if request.param == "redis" else None
    if redis is not None:
        redis.start()
    make_topics(kafka_server, unique, partitions=2)
    repo = make_repo(tmp_path / "repo", redis_url=None if redis is None else redis.address)
    apply(repo, view_spec(BUNDLE))
    (tmp_path / "state").mkdir()
    yield World(kafka_server, unique, repo, tmp_path / "state", redis)
    if redis is not None:
        redis.stop()


def test_nothing_brings_a_deleted_entity_back_and_nothing_of_it_is_left(world: World) -> None:
    history = [
        (customer, payment(f"{customer}-{n}", n * 60, customer=customer))
        for n in range(20)
        for customer in (GONE, OTHER)
    ]
    world.produce(*history)
    world.work()
    assert world.counts() == ([20, 20], [20, 20])
    assert GONE.encode() in world.everything()

    world.produce((GONE, None))
    world.work()
    assert world.counts() == ([None, 20], [None, 20])

    for lose in (world.lose_windows, world.lose_online_rows):  # each alone, then both
        lose()
        world.work()
        assert world.counts() == ([None, 20], [None, 20])
    world.lose_windows()
    world.lose_online_rows()
    world.work()  # from the log's start: it folds what was deleted, and meets the tombstone again
    assert world.counts() == ([None, 20], [None, 20])

    rewrite_deleted(
        world.repo / "data/offline" / VIEW,
        join_key="customer_id",
        timestamp_field=TIMESTAMP_FIELD,
    )
    left = world.everything()
    assert OTHER.encode() in left
    assert GONE.encode() not in left
    world.produce((GONE, payment("new", 4000, customer=GONE)))
    world.work()
    assert world.counts() == ([1, 20], [1, 20])

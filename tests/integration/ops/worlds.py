"""A live system of one's own for ops to look at: topic, Feast on SQLite or Redis, light model."""

import json
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from feast import FeatureStore

from dev.servers import KafkaServer
from llm4es.bundle import Bundle
from llm4es.deletion import DeletionKey
from llm4es.feast import define
from llm4es.feast.definitions import view_spec
from llm4es.feast.deletions import Deletions
from llm4es.feast.journal import recover_journals
from llm4es.feast.parts import list_parts
from llm4es.features import FeatureRow, view_name
from llm4es.testing import LengthEmbedder
from stream_worker.assembly import assembled_around, open_window_store
from stream_worker.ops.replay import opened_replay
from stream_worker.ops.replay_plan import ReplayRequest
from stream_worker.ops.replay_report import ReplayReport
from stream_worker.ports import Embedder
from stream_worker.settings import WorkerSettings
from stream_worker.worker import Parts
from tests.histories import payment
from tests.integration.faults.child import faults_bundle
from tests.kafka_topics import make_topics, produce

KEY = "a key of tests alone"
CUSTOMERS = 12
_REPO = """\
project: llm4es
provider: local
registry: {{path: data/registry.db, cache_ttl_seconds: 1}}
online_store: {online}
offline_store: {{type: llm4es.feast.offline_log.LogOfflineStore}}
entity_key_serialization_version: 3
"""


def documents(seed: int, events: int = 300, *, customers: int = CUSTOMERS) -> list[dict[str, Any]]:
    """Payments: some out of order, some late, some twice, some bad."""
    rng = random.Random(seed)
    made: list[dict[str, Any]] = []
    for number in range(events):
        second = number * 7 - rng.choice([0, 0, 0, 20, 90, 400])
        amount: object = "much" if rng.random() < 0.03 else round(rng.uniform(1, 200), 2)
        customer = f"cust-{rng.randrange(customers):02d}"
        made.append(payment(f"e{number}", second, customer=customer, amount=amount))
        if rng.random() < 0.1:
            made.append(rng.choice(made))
    return made


@dataclass
class Live:
    """What a live worker writes to; each of its runs goes to the log's present end."""

    folder: Path
    topic: str
    kafka: KafkaServer | None = None
    events: Path | None = None
    online: str = "{type: sqlite, path: data/online.db}"
    bundle: Bundle = field(default_factory=faults_bundle)
    windows: str | None = None  # URL of the window store

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        repo = self.folder / "repo"
        repo.mkdir()
        (repo / "feature_store.yaml").write_text(_REPO.format(online=self.online))
        servers = self.kafka.bootstrap_servers if self.kafka else "localhost:1"
        definitions = define(
            view_spec(self.bundle),
            topic=self.topic,
            bootstrap_servers=servers,
            offline_path="data/offline",
            watermark_s=120,
        )
        with warnings.catch_warnings():  # Feast calls stream feature views experimental
            warnings.simplefilter("ignore", RuntimeWarning)
            FeatureStore(repo_path=str(repo)).apply(list(definitions.objects))
        if self.kafka is not None:
            make_topics(self.kafka, self.topic, partitions=3)

    @cached_property
    def settings(self) -> WorkerSettings:
        named: dict[str, Any] = {
            "feature_repo": self.folder / "repo",
            "state_dir": self.folder / "state",
            "window_store": self.windows or f"sqlite:{self.folder / 'windows.db'}",
            "deletion_key": KEY,
            "max_records": 16,
            "poll_timeout_ms": 100,
            "until_end": True,
            "partitions": 3,
        }
        if self.kafka is None:
            named |= {"source": "file", "events": self.events, "recorded_at_field": "at"}
        else:
            named |= {"group": self.topic, "session_timeout_ms": 6_000}
        return WorkerSettings(**named)

    @property
    def offline(self) -> Path:
        return self.folder / "repo/data/offline" / view_name("customer", self.bundle.id)

    def produce(self, made: Sequence[Mapping[str, Any]]) -> None:
        assert self.kafka is not None
        produce(
            self.kafka,
            self.topic,
            [(str(each["customer_id"]).encode(), json.dumps(each).encode()) for each in made],
        )

    def work(self, **changes: object) -> None:
        """Run the live worker to the log's end."""
        settings = self.settings.model_copy(update=changes)
        with assembled_around(settings, self.bundle, LengthEmbedder) as built:
            built.worker.run()

    def embedder(self) -> Embedder:
        return LengthEmbedder(self.bundle)

    def replay(
        self,
        request: ReplayRequest,
        *,
        wrap: Callable[[Parts], Parts] = lambda parts: parts,
        **changes: object,
    ) -> ReplayReport:
        settings = self.settings.model_copy(update=changes)
        with opened_replay(settings, self.bundle, self.embedder, request, wrap=wrap) as replay:
            return replay.run()

    def online_rows(self) -> dict[str, FeatureRow]:
        from llm4es.feast import open_reader  # noqa: PLC0415

        reader = open_reader(self.settings.feature_repo, self.bundle)
        try:
            names = [f"cust-{number:02d}" for number in range(CUSTOMERS)]
            return {
                name: row
                for name, row in zip(names, reader.read(names), strict=True)
                if row is not None
            }
        finally:
            reader.close()

    def offline_rows(self) -> dict[tuple[str, Any], tuple[Any, ...]]:
        """By (entity, as_of); rows that stand twice must be the same."""
        recover_journals(self.offline, Deletions(self.offline, DeletionKey(KEY)))
        found: dict[tuple[str, Any], tuple[Any, ...]] = {}
        for part in list_parts(self.offline):
            for row in pa.Table.to_pylist(pq.ParquetFile(part).read()):
                told = (
                    row["event_count"],
                    row["last_event_id"],
                    tuple(round(value, 2) for value in row["embedding"]),
                )
                key = row["customer_id"], row["event_timestamp"]
                assert found.setdefault(key, told) == told
        return found

    def window_bytes(self) -> dict[str, Any]:
        store = open_window_store(self.settings, self.bundle)
        try:
            names = [f"cust-{number:02d}" for number in range(CUSTOMERS)]
            return {name: store.read(name) for name in names}
        finally:
            store.close()


def told(row: FeatureRow) -> tuple[Any, ...]:
    """A row as something that can be compared."""
    return (
        row.as_of,
        row.event_count,
        row.last_event_id,
        tuple(round(float(value), 2) for value in row.embedding),
    )

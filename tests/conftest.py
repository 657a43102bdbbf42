"""What every test shares: real servers, started once, on ports and folders of their own."""

import uuid
from collections.abc import Iterator

import pytest
from hypothesis import settings

from dev.servers import KafkaServer, RedisServer

# Without deadlines: the machines that run this are shared, and slow at times.
settings.register_profile("shared-machines", deadline=None)
settings.load_profile("shared-machines")


@pytest.fixture(scope="session")
def kafka_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    with KafkaServer(tmp_path_factory.mktemp("kafka")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def unique() -> str:
    """A name that no other test has used on the shared servers."""
    return uuid.uuid4().hex[:12]

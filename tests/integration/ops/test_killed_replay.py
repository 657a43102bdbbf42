"""A replay whose process is killed -9 ten times, and resumed, ends as one that never was."""

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dev.processes import wait_until
from dev.servers import KafkaServer, RedisServer
from stream_worker.ops.replay_plan import ReplayRequest
from tests.integration.ops.processes import Killable, replay
from tests.integration.ops.worlds import Live, documents, told

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
]
KILLS = 10
EVENTS = 1_500
RATE = 300.0  # so that it cannot be done before it was killed often enough
LONGEST_S = 0.4


def test_killed_at_ten_random_moments_and_resumed_the_rows_are_those_of_one_run(
    kafka_server: KafkaServer, redis_server: RedisServer, tmp_path: Path, unique: str
) -> None:
    def world(name: str, database: int) -> Live:
        online = f'{{type: redis, connection_string: "{redis_server.address},db={database}"}}'
        return Live(tmp_path / name, f"{name}-{unique}", kafka=kafka_server, online=online)

    clean, killed = world("clean", 10), world("killed", 11)
    clean.produce(documents(41, EVENTS))
    request = ReplayRequest(since="60", into="view", every_event=True)
    clean.replay(request)
    settings = killed.settings.model_copy(update={"topic": clean.topic})
    request = replace(request, rate=RATE)
    rng = random.Random(12)
    for number in range(KILLS):
        begun = tmp_path / f"begun-{number}"
        process = Killable(replay, settings, replace(request, resume=number > 0), begun)
        assert wait_until(
            lambda: begun.exists() or process.process.exitcode is not None,  # noqa: B023
            timeout_s=60,
            every_s=0.01,
        )
        time.sleep(rng.uniform(0, LONGEST_S))  # the moment is the machine's, too
        process.kill()
    last = Killable(replay, settings, replace(request, resume=True, rate=None), tmp_path / "last")
    assert last.end() == 0
    assert killed.offline_rows() == clean.offline_rows() != {}
    due = {name: told(row) for name, row in clean.online_rows().items()}
    assert {name: told(row) for name, row in killed.online_rows().items()} == due != {}

"""The run that every fault is compared with."""

import pytest

from tests.faults.worlds import World, shop_log


@pytest.fixture(scope="session")
def event_by_event(tmp_path_factory: pytest.TempPathFactory) -> World:
    clean = World(tmp_path_factory.mktemp("clean"), shop_log(3))
    clean.work(batches=iter(lambda: 1, 0), every_event=True)
    return clean

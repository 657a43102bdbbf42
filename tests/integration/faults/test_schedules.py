"""Twenty seeded schedules of real faults on real processes; `make soak` runs two hundred."""

from collections.abc import Iterator

import pytest

from tests.integration.faults.schedule import perform
from tests.integration.faults.soak import COMMAND
from tests.integration.faults.stage import Stage, stage

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(tmp_path_factory.mktemp("stage")) as found:
        yield found


@pytest.mark.parametrize("seed", range(20))
def test_whatever_fails_the_end_is_that_of_one_clean_run(shared: Stage, seed: int) -> None:
    report = perform(shared, seed)
    assert not report.problems, f"{', '.join(report.kinds)}; again: {COMMAND} {seed}"

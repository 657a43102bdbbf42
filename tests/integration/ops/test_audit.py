"""An audit finds what was planted, calls a clean system clean, and puts it right."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from dev.servers import RedisServer
from llm4es.feast import open_sink
from llm4es.feast.parts import list_parts
from llm4es.features import FeatureRow
from stream_worker.assembly import deletion_key_of, open_window_store
from stream_worker.ops.audit import AuditRequest, opened_auditor
from stream_worker.ops.audit_metrics import AuditMetrics
from stream_worker.ops.audit_report import AuditReport
from tests.histories import write_jsonl
from tests.integration.ops.worlds import CUSTOMERS, Live, documents

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
]
VICTIM = "cust-03"


@pytest.fixture(scope="module")
def live(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Live:
    folder = tmp_path_factory.mktemp("audited")
    log = write_jsonl(folder / "log.jsonl", documents(21, 200))
    online = f'{{type: redis, connection_string: "{redis_server.address},db=7"}}'
    found = Live(folder / "live", "log.jsonl", events=log, online=online)
    found.work()
    return found


def audit(live: Live, *, repair: bool = False, sample: int = 100) -> AuditReport:
    with opened_auditor(live.settings, live.bundle, live.embedder) as auditor:
        return auditor.run(AuditRequest(sample=sample, repair=repair))


def plant_online(live: Live, change: Callable[[FeatureRow], FeatureRow]) -> None:
    """Write past every guard, as a bug or another program might."""
    sink = open_sink(
        live.settings.feature_repo,
        live.bundle,
        writer_id="vandal",
        deletion_key=deletion_key_of(live.settings),
    )
    try:
        row = sink.read([VICTIM])[0]
        assert row is not None
        online: Any = sink._online  # noqa: SLF001
        assert not online.replace([change(row)], [row.as_of])
    finally:
        sink.close()


def value(live: Live) -> None:
    plant_online(live, lambda row: replace(row, embedding=row.embedding * np.float32(1.01)))


def stale(live: Live) -> None:
    rows = sorted(as_of for name, as_of in live.offline_rows() if name == VICTIM)
    plant_online(live, lambda row: replace(row, as_of=rows[-2]))


def unknown(live: Live) -> None:
    plant_online(live, lambda row: replace(row, as_of=row.as_of + timedelta(days=1)))


def bundle(live: Live) -> None:
    plant_online(live, lambda row: replace(row, bundle_id="another00000"))


def part(live: Live) -> None:
    for path in list_parts(live.offline):
        if path.parent != live.offline:
            path.unlink()


def window(live: Live) -> None:
    store = open_window_store(live.settings, live.bundle)
    try:
        with store.begin() as txn:
            found = txn.load([VICTIM])[VICTIM]
            last = found.chapters[-1]
            cut = (
                structs.replace(
                    last, events=last.events[1:], count=last.count - 1, first=last.events[1].key
                )
                if last.count > 1
                else None
            )
            chapters = (*found.chapters[:-1], cut) if cut else found.chapters[:-1]
            txn.put(structs.replace(found, chapters=chapters))
    finally:
        store.close()


def test_a_clean_system_is_equal_in_all(live: Live) -> None:
    report = audit(live)
    assert (report.equal, report.sampled, report.unverifiable) == (CUSTOMERS, CUSTOMERS, 0)
    assert report.equal_share == 1.0
    assert report.worst_difference < 1e-6
    assert audit(live, sample=4).sampled == 4


@pytest.mark.parametrize(
    ("plant", "finding"),
    [
        (value, "online value"),
        (stale, "online stale"),
        (unknown, "online unknown"),
        (bundle, "online bundle"),
        (part, "offline missing"),
        (window, "window value"),
    ],
)
def test_what_was_planted_is_found_and_put_right(
    live: Live, plant: Callable[[Live], None], finding: str
) -> None:
    plant(live)
    report = audit(live)
    assert finding in report.findings
    assert report.equal < report.sampled
    if plant is not part:  # which takes rows of everyone
        assert report.findings[finding] == 1
        assert report.equal == CUSTOMERS - 1
    repaired = audit(live, repair=True)
    assert repaired.not_repaired == 0 < repaired.repaired
    assert audit(live).equal_share == 1.0


def test_gauges_tell_the_newest_audit(live: Live) -> None:
    from dataclasses import asdict  # noqa: PLC0415

    metrics = AuditMetrics()
    metrics.audited(asdict(audit(live)))
    assert metrics.registry.get_sample_value("llm4es_audit_equal_share") == 1.0

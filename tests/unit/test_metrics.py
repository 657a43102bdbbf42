"""What Prometheus scrapes is what the worker counted, and no other worker's."""

import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection

import pytest
from msgspec.structs import replace
from prometheus_client import generate_latest

from llm4es.errors import ConfigError, InvalidEvent
from llm4es.events import Record, TopicPartition
from llm4es.windows import Outcome
from stream_worker.health import serve_health
from stream_worker.metrics import Metrics
from stream_worker.ports import DeadLetter
from tests.commands import ROOT

RECORD = Record(topic="shop", partition=0, offset=0, timestamp=None, key=None, value=None)


def counted() -> Metrics:
    metrics = Metrics()
    metrics.batch(9, seconds=0.5)
    metrics.published(6, seconds=0.1, unproven=4)
    metrics.published(1, seconds=90.0)
    metrics.published(0, seconds=99.0)
    metrics.folded({Outcome.ACCEPTED: 7, Outcome.LATE: 1}, redelivered=2)
    metrics.folded({Outcome.ACCEPTED: 1}, redelivered=0)
    metrics.dead([DeadLetter(RECORD, InvalidEvent("amount", "is missing"))])
    metrics.retried()
    metrics.store_lost()
    return metrics


def scraped(metrics: Metrics) -> dict[str, float]:
    lines = generate_latest(metrics.registry).decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def test_the_scraped_figures_are_those_of_the_summary() -> None:
    metrics = counted()
    found, summary = scraped(metrics), metrics.summary()
    assert found["llm4es_records_total"] == summary.records == 9
    assert found['llm4es_events_total{outcome="accepted"}'] == summary.accepted == 8
    assert found['llm4es_events_total{outcome="late"}'] == summary.late == 1
    assert found["llm4es_late_dropped_total"] == 1
    assert found['llm4es_dead_letters_total{field="amount"}'] == 1
    assert summary.dead_letters == {"amount": 1}
    assert found["llm4es_embeddings_total"] == summary.rows == 7
    assert found["llm4es_unproven_rows_total"] == summary.unproven_rows == 4
    assert found["llm4es_store_lost_total"] == 1
    assert found["llm4es_redelivered_total"] == 2
    assert found["llm4es_retries_total"] == 1
    assert found["llm4es_fenced_total"] == 0


def test_freshness_is_counted_by_row_up_to_and_with_each_bound() -> None:
    found = scraped(counted())
    name = "llm4es_poll_to_readable_seconds"
    assert [found[f'{name}_bucket{{le="{le}"}}'] for le in ("0.05", "0.1", "60.0", "+Inf")] == [
        0, 6, 6, 7,
    ]  # fmt: skip
    assert found[f"{name}_count"] == 7
    assert found[f"{name}_sum"] == 6 * 0.1 + 90
    summary = counted().summary()
    assert summary.freshness_p50_s == 0.1
    assert 0.1 < summary.freshness_p99_s <= 90
    assert Metrics().summary().freshness_p99_s == 0


def test_age_is_counted_by_event_from_the_records_timestamp() -> None:
    metrics = Metrics()
    now = datetime(2026, 3, 1, 12, tzinfo=UTC)
    ages_s = (0.004, 0.3, 0.3, 100)
    metrics.readable([replace(RECORD, timestamp=now - timedelta(seconds=s)) for s in ages_s], now)
    metrics.readable([RECORD], now)  # of a log without timestamps
    found = scraped(metrics)
    name = "llm4es_freshness_seconds"
    assert [found[f'{name}_bucket{{le="{le}"}}'] for le in ("0.005", "0.25", "0.5", "+Inf")] == [
        1, 1, 3, 4,
    ]  # fmt: skip
    assert metrics.freshness().tolist() == list(ages_s)


def test_a_loop_that_hangs_shows_and_lag_is_told_by_partition() -> None:
    metrics = Metrics()
    assert metrics.polled_s_ago is None
    assert "llm4es_polled_at_seconds" not in scraped(metrics)
    metrics.polled({TopicPartition("shop", 3): 7})
    found = scraped(metrics)
    assert found['llm4es_lag{partition="3"}'] == 7
    assert time.time() - found["llm4es_polled_at_seconds"] < 60


@pytest.mark.parametrize("good", [True, False])
def test_health_is_told_over_http(*, good: bool) -> None:
    metrics = counted()
    server = serve_health(0, metrics.registry, healthy=lambda: good, ready=lambda: not good)

    def get(path: str) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    try:
        assert b"llm4es_records_total 9.0" in get("/metrics")[1]
        assert get("/healthz")[0] == (200 if good else 503)
        assert get("/readyz")[0] == (503 if good else 200)
        assert get("/")[0] == 404
    finally:
        server.shutdown()
        server.server_close()


def test_a_port_that_is_taken_is_a_config_error() -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:  # noqa: S104 - as ours does
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"metrics_port: port {port}.*; name a free one"):
            serve_health(port, Metrics().registry, healthy=bool, ready=bool)


def test_two_workers_do_not_mix_even_where_feast_moved_prometheus_counters_into_files() -> None:
    script = (
        "import feast.metrics\n"
        "from stream_worker.metrics import Metrics\n"
        "one = Metrics()\n"
        "one.retried()\n"
        "found = [m.registry.get_sample_value('llm4es_retries_total') for m in (one, Metrics())]\n"
        "assert found == [1, 0], found\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

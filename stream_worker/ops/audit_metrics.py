"""Gauges of an audit that goes on."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llm4es.errors import ConfigError

__all__ = ["AuditMetrics"]

_GAUGES = {
    "equal_share": "Share of verified entities that are as the log says",
    "worst_difference": "Largest relative difference of a served value",
    "sampled": "Entities looked at",
    "unverifiable": "Entities whose history retention has taken",
}


class AuditMetrics(Collector):
    """The newest audit's figures, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._report: Mapping[str, Any] = {}
        self._done_at = 0.0
        self._failures = 0

    def serve(self, port: int) -> None:
        """Serve them over HTTP. Raises ConfigError where the port cannot be had."""
        try:
            start_http_server(port, registry=self.registry)
        except OSError as error:
            raise ConfigError(
                "metrics_port", f"port {port} cannot be had ({error.strerror})", "name a free one"
            ) from error

    def audited(self, report: Mapping[str, Any]) -> None:
        """Take over a report, as a mapping."""
        self._report = report
        self._done_at = time.time()

    def failed(self) -> None:
        """Count an audit that could not be done."""
        self._failures += 1

    def collect(self) -> Iterator[Metric]:
        """Give the figures as Prometheus reads them, from a thread of its own."""
        report = self._report
        yield GaugeMetricFamily(
            "llm4es_audit_failures", "Audits that could not be done", value=self._failures
        )
        yield GaugeMetricFamily(
            "llm4es_audit_done_at_seconds", "When the newest audit ended", value=self._done_at
        )
        if not report:
            return
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"llm4es_audit_{name}", text, value=report[name])
        findings = GaugeMetricFamily(
            "llm4es_audit_mismatches", "Entities that differ", labels=["kind"]
        )
        for kind, count in report["findings"].items():
            findings.add_metric([kind], count)
        yield findings
        if (drift := report["drift"]) is None:
            return
        for name in ("embedding_shift", "embedding_spread"):
            yield GaugeMetricFamily(
                f"llm4es_drift_{name}", "In standard deviations of held-out entities",
                value=drift[name],
            )  # fmt: skip
        surprise = GaugeMetricFamily(
            "llm4es_drift_surprise_shift",
            "Of mean surprise, in standard deviations of held-out entities",
            labels=["column"],
        )
        for column, moved in drift["surprise_shift"].items():
            surprise.add_metric([column], moved)
        yield surprise

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
_DRIFT = {
    "embedding_shift": "Of the mean embedding, in standard deviations of held-out entities",
    "embedding_spread": "Standard deviation of the embedding now over that of held-out entities",
}


class AuditMetrics(Collector):
    """The newest audit's figures, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._report: Mapping[str, Any] = {}
        self._done_at = time.time()  # as long as none has ended, it counts from the beginning
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
        drift: Mapping[str, Any] = report.get("drift") or {}
        yield GaugeMetricFamily(
            "llm4es_audit_failures", "Audits that could not be done", value=self._failures
        )
        yield GaugeMetricFamily(
            "llm4es_audit_done_at_seconds", "When the newest audit ended", value=self._done_at
        )
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"llm4es_audit_{name}", text, value=report.get(name))
        yield _labelled(
            "llm4es_audit_mismatches", "Entities that differ", "kind", report.get("findings")
        )
        for name, text in _DRIFT.items():
            yield GaugeMetricFamily(f"llm4es_drift_{name}", text, value=drift.get(name))
        yield _labelled(
            "llm4es_drift_surprise_shift",
            "Of mean surprise, in standard deviations of held-out entities",
            "column",
            drift.get("surprise_shift"),
        )


def _labelled(
    name: str, text: str, label: str, values: Mapping[str, float] | None
) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, text, labels=[label])
    for told, value in (values or {}).items():
        gauge.add_metric([told], value)
    return gauge

"""Dashboard and alerts ask for metrics that there are, and the runbook knows every alert."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from stream_worker.metrics import Metrics
from stream_worker.ops.audit_metrics import AuditMetrics
from tests.commands import ROOT

FOLDER = ROOT / "observability"
DASHBOARD = json.loads((FOLDER / "grafana/dashboards/llm4es.json").read_text())
GROUPS = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
}


def exposed() -> set[str]:
    """Names of the samples that a worker gives which has polled, and an audit that has found."""
    metrics, audits = Metrics(), AuditMetrics()
    metrics.polled({})
    audits.audited(
        {
            "equal_share": 0.9,
            "worst_difference": 0.1,
            "sampled": 10,
            "unverifiable": 0,
            "findings": {"online value": 1},
            "drift": {
                "embedding_shift": 0.1,
                "embedding_spread": 1.0,
                "surprise_shift": {"all_hinf": 0.1},
            },
        }
    )
    return {
        f"{metric.name}{suffix}"
        for collector in (metrics, audits)
        for metric in collector.collect()
        for suffix in SUFFIXES[metric.type]
    }


def asked(expression: str) -> set[str]:
    """Names of ours in a query, recorded ones (llm4es:...) left out."""
    return set(re.findall(r"\bllm4es_\w+", expression))


def queries(part: Any) -> Iterator[str]:  # noqa: ANN401 - of JSON
    """Everything in the dashboard that is a query."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key in {"expr", "query"} and isinstance(value, str):
                yield value
            else:
                yield from queries(value)
    elif isinstance(part, list):
        for value in part:
            yield from queries(value)


def test_a_metric_that_there_is_not_would_be_found() -> None:
    assert asked("rate(llm4es_recodrs_total[5m])") - exposed() == {"llm4es_recodrs_total"}


@pytest.mark.parametrize("query", sorted(set(queries(DASHBOARD))))
def test_the_dashboard_asks_for_what_is_exposed(query: str) -> None:
    assert asked(query) <= exposed()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert", rule.get("record")))
def test_rules_ask_for_what_is_exposed_or_recorded(rule: dict[str, Any]) -> None:
    assert asked(rule["expr"]) <= exposed()
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    assert set(re.findall(r"\bllm4es:[\w:]+", rule["expr"])) <= recorded


def test_the_objective_is_a_bound_of_the_histogram() -> None:
    metrics = Metrics()
    bounds = {
        sample.labels["le"]
        for metric in metrics.collect()
        if metric.name == "llm4es_freshness_seconds"
        for sample in metric.samples
        if "le" in sample.labels
    }
    text = (FOLDER / "alerts.yml").read_text() + json.dumps(DASHBOARD).replace('\\"', '"')
    used = set(re.findall(r'le="([^"]+)"', text))
    assert used
    assert used <= bounds


def test_every_alert_has_its_place_in_the_runbook_and_every_place_its_alert() -> None:
    runbook = (ROOT / "docs/runbook.md").read_text()
    headings = re.findall(r"^## (\w+)$", runbook, re.MULTILINE)
    assert headings == [alert["alert"] for alert in ALERTS]
    for alert in ALERTS:
        assert alert["annotations"]["runbook"] == f"docs/runbook.md#{alert['alert'].lower()}"
        assert alert["labels"]["severity"] in {"page", "ticket"}


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24

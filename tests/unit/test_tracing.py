"""Traces tell of each batch and its steps, and change nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llm4es.errors import SinkUnavailable
from stream_worker.tracing import traced_parts, tracing
from tests.histories import payment, records
from tests.unit.test_worker import Shop


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Iterator[Any]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider.get_tracer("tests")
    provider.shutdown()


def spans(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def test_each_batch_is_a_trace_of_its_steps_and_its_rows_are_the_same(
    tmp_path: Path,
    exporter: InMemorySpanExporter,
    tracer: Any,  # noqa: ANN401
) -> None:
    log = records([payment("a", 1), payment("b", 2), payment("c", 3)])
    plain, traced = Shop(tmp_path / "plain", log), Shop(tmp_path / "traced", log)
    traced.wrap = lambda parts: traced_parts(parts, tracer)
    for shop in (plain, traced):
        shop.folder.mkdir()
        shop.work(batches=[2, 1])
    assert traced.told() == plain.told()
    batches = spans(exporter, "batch")
    assert [dict(span.attributes or {}) for span in batches] == [
        {"llm4es.records": 2, "llm4es.whole": True},
        {"llm4es.records": 1, "llm4es.whole": True},
    ]
    trace_ids = [span.context.trace_id for span in batches if span.context]
    for step in ("windows", "embed", "journal", "publish", "commit"):
        assert [s.context.trace_id for s in spans(exporter, step) if s.context] == trace_ids, step


def test_a_batch_that_is_read_again_is_told_as_one_that_was_not_whole(
    tmp_path: Path,
    exporter: InMemorySpanExporter,
    tracer: Any,  # noqa: ANN401
) -> None:
    def fail() -> None:
        raise SinkUnavailable("away", retry_after_s=0.0)

    shop = Shop(tmp_path, records([payment("a", 1)]), happenings={"sink.publish": [fail]})
    shop.wrap = lambda parts: traced_parts(parts, tracer)
    shop.work(retry_budget_s=0.0)
    whole = [(span.attributes or {})["llm4es.whole"] for span in spans(exporter, "batch")]
    assert whole == [False, True]
    assert spans(exporter, "publish")[0].status.is_ok is False


def test_without_an_endpoint_the_parts_stay_as_they_are() -> None:
    parts: Any = object()
    with tracing(None) as wrap:
        assert wrap(parts) is parts

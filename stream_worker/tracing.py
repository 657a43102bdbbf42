"""Traces of batches: the worker's parts, each call of theirs a span. Needs the extra `otel`."""

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from llm4es.errors import ConfigError
from stream_worker.worker import Parts

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

__all__ = ["traced_parts", "tracing"]


@contextmanager
def tracing(endpoint: str | None) -> Iterator[Callable[[Parts], Parts]]:
    """Give what puts spans around a worker's parts, and send them until the block is left.

    Without an endpoint the parts stay as they are. Raises ConfigError without the extra.
    """
    if endpoint is None:
        yield lambda parts: parts
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            "trace_endpoint", f"needs {error.name}", "pip install 'llm4es[otel]'"
        ) from error
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "llm4es-worker"}))
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield lambda parts: traced_parts(parts, provider.get_tracer("llm4es"))
    finally:
        provider.shutdown()


def traced_parts(parts: Parts, tracer: "Tracer") -> Parts:
    """Put spans around the parts: `batch` from poll to commit, and in it one for each call."""
    batches = _Batches(tracer)
    return replace(
        parts,
        source=cast("Any", _TracedSource(parts.source, batches)),
        store=cast("Any", _TracedStore(parts.store, batches)),
        embedder=cast("Any", _Traced(parts.embedder, batches, {"embed": "windows"})),
        sink=cast(
            "Any",
            _Traced(
                parts.sink, batches, {"journal": "rows", "publish": "rows", "delete": "tombstones"}
            ),
        ),
        dead_letters=cast("Any", _Traced(parts.dead_letters, batches, {"park": "letters"})),
    )


@dataclass(slots=True)
class _Batches:
    """The batch under way: its span is the parent of what is called meanwhile."""

    tracer: "Tracer"
    current: "Span | None" = field(default=None)

    def open(self, records: Sized) -> None:
        self.current = self.tracer.start_span("batch", attributes={"llm4es.records": len(records)})

    def close(self, *, whole: bool) -> None:
        if self.current is not None:
            self.current.set_attribute("llm4es.whole", whole)
            self.current.end()
            self.current = None

    @contextmanager
    def span(self, name: str, **counts: int) -> Iterator[None]:
        from opentelemetry.trace import set_span_in_context  # noqa: PLC0415 - an extra

        context = None if self.current is None else set_span_in_context(self.current)
        attributes = {f"llm4es.{key}": count for key, count in counts.items()}
        with self.tracer.start_as_current_span(name, context=context, attributes=attributes):
            yield


class _Traced:
    """A part, with a span around some of its methods; all else is the part's own."""

    def __init__(self, part: object, batches: _Batches, counted: dict[str, str]) -> None:
        self._part = part
        self._batches = batches
        self._counted = counted  # method -> what its first argument holds

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the part has
        found = getattr(self._part, name)
        if name not in self._counted:
            return found

        def called(first: Sized, *args: object, **kwargs: object) -> object:
            with self._batches.span(name, **{self._counted[name]: len(first)}):
                return found(first, *args, **kwargs)

        return called


class _TracedSource(_Traced):
    """A batch's span begins where records are polled and ends where they are committed."""

    def __init__(self, part: object, batches: _Batches) -> None:
        super().__init__(part, batches, {})

    def poll(self, max_records: int, timeout_s: float) -> Any:  # noqa: ANN401 - the port's
        self._batches.close(whole=False)  # a batch that was dropped never came to its commit
        records = self._part.poll(max_records, timeout_s)  # type: ignore[attr-defined]
        if records:
            self._batches.open(records)
        return records

    def commit(self, next_offsets: Any) -> None:  # noqa: ANN401 - the port's
        with self._batches.span("commit"):
            self._part.commit(next_offsets)  # type: ignore[attr-defined]
        self._batches.close(whole=True)


class _TracedStore(_Traced):
    """From the first window that is read to the last that is written."""

    def __init__(self, part: object, batches: _Batches) -> None:
        super().__init__(part, batches, {})

    @contextmanager
    def begin(self, *args: object) -> Iterator[Any]:
        with self._batches.span("windows"), self._part.begin(*args) as txn:  # type: ignore[attr-defined]
            yield txn

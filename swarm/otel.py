"""Spans by OpenTelemetry, sent by OTLP over gRPC. Where to, and how many, is set by the standard OTEL_* variables.

Unless OTEL_TRACES_SAMPLER says otherwise, one in a hundred traces is recorded, and with it whatever belongs to it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import (
    OTEL_EXPORTER_OTLP_TIMEOUT,
    OTEL_EXPORTER_OTLP_TRACES_TIMEOUT,
    OTEL_SERVICE_NAME,
    OTEL_TRACES_SAMPLER,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    get_current_span,
    set_span_in_context,
    use_span,
)
from opentelemetry.trace import Span as OtelSpan

from swarm import __version__
from swarm.tracing import Attributes, under

SHARE = 0.01
TIMEOUT_S = 2.0  # a collector that is away may hold up the end of the program for so long
TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
STATUS_CODE = "rpc.grpc.status_code"


class Recording:
    """A span under way."""

    def __init__(self, span: OtelSpan) -> None:
        self._span = span

    def set(self, attributes: Attributes) -> None:
        """Say more about it."""
        self._span.set_attributes(dict(attributes))

    def fail(self) -> None:
        """It went wrong by our own fault."""
        self._span.set_status(Status(StatusCode.ERROR))


class OtelTracer:
    """Records spans with one provider, which isn't the process's global one."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    @contextmanager
    def span(self, name: str, attributes: Attributes, parent: str, started_s_ago: float) -> Iterator[Recording]:
        """A span inside the present one, or inside that which `parent` names."""
        named = parse_traceparent(parent)
        context = set_span_in_context(NonRecordingSpan(named), Context()) if named is not None else None
        began_ns = time.time_ns() - int(started_s_ago * 1e9)
        made = self._tracer.start_span(name, context, attributes=dict(attributes), start_time=began_ns)
        with use_span(made, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            yield Recording(made)

    @contextmanager
    def serve(self, method: str, parent: str, is_followed: Callable[[], bool], attach: bool) -> Iterator[Recording]:
        """The span of a call. A caller's word decides about nothing but the caller's own trace, unless it `is_followed`."""
        named = parse_traceparent(parent)
        context, links = Context(), []
        if named is not None and is_followed():
            context = set_span_in_context(NonRecordingSpan(named), context)
        elif named is not None:
            links = [Link(named)]
        service, _, name = method.strip("/").rpartition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        made = self._tracer.start_span(method.strip("/"), context, SpanKind.SERVER, attributes, links)
        try:
            if not attach:  # what may end in another task can't be anybody's present span
                yield Recording(made)
            else:
                with under(self), use_span(made, record_exception=False, set_status_on_exception=False):
                    yield Recording(made)
            made.set_attribute(STATUS_CODE, 0)
        finally:
            made.end()

    def traceparent(self) -> str:
        """The present span's name for others, which also says whether it is recorded."""
        context = get_current_span().get_span_context()
        if not context.is_valid:
            return ""
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def parse_traceparent(text: str) -> SpanContext | None:
    """A span of somebody else's, by its W3C name of exactly 55 characters; None for anything else."""
    match = TRACEPARENT.fullmatch(text) if len(text) == 55 else None
    if match is None:
        return None
    trace, span, flags = (int(part, 16) for part in match.groups())
    named = SpanContext(trace, span, is_remote=True, trace_flags=TraceFlags(flags))
    return named if named.is_valid else None


@contextmanager
def exporting(service: str) -> Iterator[OtelTracer]:
    """Send spans in the background until the context is left; what a collector doesn't take in time is lost."""
    chosen = None if os.environ.get(OTEL_TRACES_SAMPLER) else ParentBased(TraceIdRatioBased(SHARE))
    named = {} if os.environ.get(OTEL_SERVICE_NAME) else {"service.name": service}
    provider = TracerProvider(
        sampler=chosen, resource=Resource.create({**named, "service.version": __version__}), shutdown_on_exit=False
    )
    chosen_s = os.environ.get(OTEL_EXPORTER_OTLP_TIMEOUT) or os.environ.get(OTEL_EXPORTER_OTLP_TRACES_TIMEOUT)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=None if chosen_s else TIMEOUT_S)))
    try:
        yield OtelTracer(provider.get_tracer("swarm", __version__))
    finally:
        provider.shutdown()

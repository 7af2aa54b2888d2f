"""A collector of traces: a real gRPC server that takes what OTLP exporters send, and keeps it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass(frozen=True)
class Received:
    """A span, the service that sent it, and its attributes."""

    service: str
    span: Span
    attributes: dict[str, Any]

    @property
    def name(self) -> str:
        return self.span.name

    def inside(self, other: Received) -> bool:
        """Whether it is a child of the other."""
        return (self.span.trace_id, self.span.parent_span_id) == (other.span.trace_id, other.span.span_id)


@dataclass
class Collector(TraceServiceServicer):
    """Keeps what comes."""

    port: int = 0
    _received: list[Received] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:  # noqa: N802
        with self._lock:
            for batch in request.resource_spans:
                service = _values(batch.resource.attributes)["service.name"]
                spans = [span for scope in batch.scope_spans for span in scope.spans]
                self._received += [Received(service, span, _values(span.attributes)) for span in spans]
        return ExportTraceServiceResponse()

    @property
    def spans(self) -> list[Received]:
        with self._lock:
            return list(self._received)

    def named(self, name: str, service: str = "") -> list[Received]:
        """Spans by their name or its last part, of one service or of all."""
        return [each for each in self.spans if each.name.rpartition("/")[2] == name and service in ("", each.service)]

    @property
    def environment(self) -> dict[str, str]:
        """What tells an exporter where to send everything."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "OTEL_TRACES_SAMPLER": "parentbased_always_on",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }


def _values(attributes: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(collector, server)
    collector.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()

"""A receiver of OTLP over gRPC, HTTP with protobuf and HTTP with JSON, on the official stubs.

What arrives is kept as plain values, whatever way it came. It can be told to misbehave: to answer with an
error, late, or never.
"""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

REQUESTS: Mapping[str, Any] = {
    "traces": trace_service_pb2.ExportTraceServiceRequest,
    "metrics": metrics_service_pb2.ExportMetricsServiceRequest,
    "logs": logs_service_pb2.ExportLogsServiceRequest,
}


@dataclass
class Received:
    """What arrived: (signal, body as OTLP's JSON has it, headers in lower case)."""

    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    #: HTTP status to answer with
    status: int = 200
    delay_s: float = 0.0

    def bodies(self, signal: str) -> list[dict[str, Any]]:
        return [body for name, body, _ in list(self.requests) if name == signal]

    def resources(self, signal: str) -> list[dict[str, Any]]:
        """Attributes of the resources that sent ``signal``."""
        key = {"traces": "resourceSpans", "metrics": "resourceMetrics", "logs": "resourceLogs"}[signal]
        return [attributes(one["resource"]) for body in self.bodies(signal) for one in body.get(key, ())]

    def spans(self) -> list[dict[str, Any]]:
        """All spans; identifiers in hexadecimal, ``resource`` with its attributes."""
        return [
            {**span, "resource": attributes(one["resource"])}
            for body in self.bodies("traces")
            for one in body.get("resourceSpans", ())
            for scope in one.get("scopeSpans", ())
            for span in scope.get("spans", ())
        ]

    def metrics(self) -> dict[str, dict[str, Any]]:
        """The newest of each metric, by name."""
        return {
            metric["name"]: metric
            for body in self.bodies("metrics")
            for one in body.get("resourceMetrics", ())
            for scope in one.get("scopeMetrics", ())
            for metric in scope.get("metrics", ())
        }

    def logs(self) -> list[dict[str, Any]]:
        return [
            record
            for body in self.bodies("logs")
            for one in body.get("resourceLogs", ())
            for scope in one.get("scopeLogs", ())
            for record in scope.get("logRecords", ())
        ]


def attributes(holder: Mapping[str, Any]) -> dict[str, Any]:
    """OTLP's list of attributes as a table."""
    return {one["key"]: next(iter(one["value"].values())) for one in holder.get("attributes", ())}


@contextmanager
def http_receiver(port: int = 0) -> Iterator[tuple[str, Received]]:
    """Both HTTP protocols at (endpoint)."""
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            time.sleep(received.delay_s)
            if received.status == 200:
                signal = self.path.removeprefix("/v1/")
                headers = {name.lower(): value for name, value in self.headers.items()}
                received.requests.append((signal, _decoded(signal, headers["content-type"], body), headers))
            self.send_response(received.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _decoded(signal: str, content_type: str, body: bytes) -> dict[str, Any]:
    if content_type == "application/json":
        found: dict[str, Any] = json.loads(body)
        return found
    assert content_type == "application/x-protobuf", content_type
    return _plain(REQUESTS[signal].FromString(body))


def _plain(message: Any) -> dict[str, Any]:
    """As OTLP's JSON has it: identifiers are hexadecimal there, and base64 in protobuf's own."""
    found: dict[str, Any] = MessageToDict(message)
    for resource, plain in zip(
        getattr(message, "resource_spans", ()), found.get("resourceSpans", ()), strict=True
    ):
        for scope, plain_scope in zip(resource.scope_spans, plain["scopeSpans"], strict=True):
            for span, plain_span in zip(scope.spans, plain_scope["spans"], strict=True):
                plain_span["traceId"], plain_span["spanId"] = span.trace_id.hex(), span.span_id.hex()
                plain_span["parentSpanId"] = span.parent_span_id.hex()
                for link, plain_link in zip(span.links, plain_span.get("links", ()), strict=True):
                    plain_link["traceId"], plain_link["spanId"] = link.trace_id.hex(), link.span_id.hex()
    for resource, plain in zip(
        getattr(message, "resource_logs", ()), found.get("resourceLogs", ()), strict=True
    ):
        for scope, plain_scope in zip(resource.scope_logs, plain["scopeLogs"], strict=True):
            for record, plain_record in zip(scope.log_records, plain_scope["logRecords"], strict=True):
                plain_record["traceId"] = record.trace_id.hex()
                plain_record["spanId"] = record.span_id.hex()
    return found


@contextmanager
def grpc_receiver() -> Iterator[tuple[str, Received]]:
    """gRPC at (endpoint)."""
    received = Received()

    def servicer(base: type, signal: str, answer: Any) -> Any:
        class Servicer(base):  # type: ignore[misc]
            def Export(self, request: Any, context: Any) -> Any:
                time.sleep(received.delay_s)
                if received.status != 200:
                    context.abort(grpc.StatusCode.INTERNAL, "told to fail")
                headers = dict(context.invocation_metadata())
                received.requests.append((signal, _plain(request), headers))
                return answer()

        return Servicer()

    server = grpc.server(futures.ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(
        servicer(
            trace_service_pb2_grpc.TraceServiceServicer,
            "traces",
            trace_service_pb2.ExportTraceServiceResponse,
        ),
        server,
    )
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(
        servicer(
            metrics_service_pb2_grpc.MetricsServiceServicer,
            "metrics",
            metrics_service_pb2.ExportMetricsServiceResponse,
        ),
        server,
    )
    logs_service_pb2_grpc.add_LogsServiceServicer_to_server(
        servicer(
            logs_service_pb2_grpc.LogsServiceServicer, "logs", logs_service_pb2.ExportLogsServiceResponse
        ),
        server,
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", received
    finally:
        server.stop(None).wait()

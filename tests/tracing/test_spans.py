"""Trace context that passes through, identifiers that follow from what they stand for, garbage."""

from __future__ import annotations

import subprocess
import sys

import pytest
import trio

from hypha.tracing import hop_traceparent, round_traceparent, span, trace_context, traceparent, untraced
from hypha.tracing.operations import CONNECT, Operation

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_a_node_that_does_not_record_passes_the_context_on() -> None:
    assert traceparent() is None
    with trace_context(PARENT):
        assert traceparent() == PARENT
        with untraced():
            assert traceparent() is None
        await trio.lowlevel.checkpoint()
        assert traceparent() == PARENT
    assert traceparent() is None


@pytest.mark.parametrize(
    "garbage", ["", "00", "00-zz-zz-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "é" * 500]
)
def test_garbage_begins_a_new_trace(garbage: str) -> None:
    with trace_context(PARENT), trace_context(garbage):
        assert traceparent() in (None, PARENT if not garbage else None)


def test_a_rounds_trace_follows_from_the_round() -> None:
    one = round_traceparent("job", 0, 3, 1.0)
    assert one == round_traceparent("job", 0, 3, 1.0)
    others = {
        round_traceparent("job", 0, 4, 1.0),
        round_traceparent("job", 1, 3, 1.0),
        round_traceparent("j", 0, 3, 1.0),
    }
    assert len(others | {one}) == 4
    with trace_context(one):
        assert traceparent() == one


def test_a_share_of_all_rounds_is_sampled() -> None:
    sampled = sum(round_traceparent("job", 0, number, 0.25).endswith("-01") for number in range(2000))
    assert 400 < sampled < 600
    assert round_traceparent("job", 0, 1, 0.0).endswith("-00")


def test_who_passes_a_message_on_is_known_to_who_receives_it() -> None:
    hop = hop_traceparent(PARENT, "12D3KooWgateway")
    assert hop.split("-")[1] == PARENT.split("-")[1]
    assert hop.split("-")[2] not in (
        PARENT.split("-")[2],
        hop_traceparent(PARENT, "12D3KooWother").split("-")[2],
    )


RECORDED = """
import json, sys
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from hypha.telemetry.sdk import Identifiers
from hypha.tracing import round_traceparent, span, start_span, trace_context, traceparent
from hypha.tracing.operations import ROUND, PLAN, TRAIN
exporter = InMemorySpanExporter()
provider = TracerProvider(id_generator=Identifiers())
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
identity = round_traceparent("job", 0, 3, 1.0)
linked = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
root = start_span(ROUND, {"hypha.round": 3}, identity=identity, links=[linked, "garbage"])
with span(TRAIN, parent=identity):
    with span(PLAN):
        pass
try:
    with span(PLAN):
        raise ValueError("no")
except ValueError:
    pass
root.end()
print(json.dumps([
    {"name": one.name, "trace": f"{one.context.trace_id:032x}", "span": f"{one.context.span_id:016x}",
     "parent": one.parent and f"{one.parent.span_id:016x}", "links": len(one.links),
     "status": one.status.status_code.name}
    for one in exporter.get_finished_spans()]))
"""


def test_spans_are_recorded_under_the_identifiers_that_were_chosen() -> None:
    import json

    done = subprocess.run(
        [sys.executable, "-c", RECORDED], capture_output=True, text=True, timeout=60, check=True
    )
    plan, train, failed, whole = json.loads(done.stdout)
    _, trace_id, span_id, _ = round_traceparent("job", 0, 3, 1.0).split("-")
    assert (whole["trace"], whole["span"], whole["parent"], whole["links"]) == (trace_id, span_id, None, 1)
    assert (train["trace"], train["parent"]) == (trace_id, span_id)
    assert (plan["trace"], plan["parent"]) == (trace_id, train["span"])
    # what comes after has identifiers of its own again
    assert failed["trace"] != trace_id
    assert (failed["parent"], failed["status"]) == (None, "ERROR")


def test_operations_are_named_once_and_say_who_has_them() -> None:
    for name, operation in Operation.declared.items():
        assert operation.name == name
        assert operation.who in ("all", "scheduler", "worker", "gateway", "data", "executor")
        assert operation.what
    with span(CONNECT, {"hypha.peer": "12D3"}) as one:
        assert not one.is_recording()


PEERS_WORDS = """
import logging, warnings
from hypha.config.otel import Signal, TelemetrySettings
from hypha.telemetry.sdk import Telemetry
from hypha.tracing import failed, span
from hypha.tracing.operations import CONNECT
from opentelemetry import trace
signal = Signal("http://user:sesame@127.0.0.1:9/v1/traces", "http/protobuf", {})
settings = TelemetrySettings(signal, None, signal, False, "always_on", 1.0, {}, 15.0)
assert "sesame" not in repr(settings)
started = Telemetry(settings)
with span(CONNECT, {"hypha.peer": "z" * 900_000}) as one:
    failed(one, "y" * 900_000 + chr(0xDC80))
assert len(one.attributes["hypha.peer"]) <= 1024
assert len(one.status.description) <= 1024
before = list(warnings.filters)
for _ in range(5):
    with span(CONNECT):
        pass
assert warnings.filters == before, "each span changes the filters of warnings"
logging.getLogger("hypha.net").warning("%d peers", None)
print("well")
import os; os._exit(0)
"""


def test_what_peers_write_is_cut_and_what_cannot_be_logged_ends_nobody() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEERS_WORDS], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "well\n", done.stderr
    assert "sesame" not in done.stderr

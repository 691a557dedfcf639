"""Everything really sent, over each protocol; and a collector that fails, which is in nobody's way.

Each run is a process of its own: see ``tests/support/telemetry_run.py``.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support import telemetry_run
from tests.support.otlp import Received, attributes, grpc_receiver, http_receiver


def run(
    directory: Path, endpoint: str, protocol: str, runs_s: float = 0.5, sampler: str = "always_on"
) -> tuple[str, float, float]:
    """Its log; how long it took to close; how long its slowest span, log entry and records took together, as
    if it had the machine for itself.
    """
    output, log = directory / "output", directory / "log"
    process = telemetry_run.start(output, log, endpoint, protocol, runs_s, sampler)
    process.join(60)
    assert process.exitcode == 0, log.read_text()
    closed, slowest = (float(part.split("=")[1]) for part in output.read_text().split())
    return log.read_text(), closed, slowest


@contextmanager
def receiver(protocol: str) -> Iterator[tuple[str, Received]]:
    with grpc_receiver() if protocol == "grpc" else http_receiver() as found:
        yield found


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf", "http/json"])
def test_all_signals_arrive_by_each_protocol(protocol: str, tmp_path: Path) -> None:
    with receiver(protocol) as (endpoint, received):
        log, closed, _ = run(tmp_path, endpoint, protocol)
    assert closed < 3
    assert "collector" not in log
    assert {name for name, _, _ in received.requests} == {"traces", "metrics", "logs"}
    for signal, _, headers in received.requests:
        assert headers["authorization"] == "Bearer sesame", signal
        assert headers["x-scope-orgid"] == "seven", signal
        kind = {"http/protobuf": "application/x-protobuf", "http/json": "application/json"}
        assert headers.get("content-type") == kind.get(protocol), signal
    for signal in ("traces", "metrics", "logs"):
        for resource in received.resources(signal):
            assert resource["service.name"] == "hypha-gateway"
            assert resource["service.instance.id"] == "12D3KooWme"
            assert resource["deployment.environment"] == "test"
            assert resource["service.version"]
    outer = [one for one in received.spans() if one["name"] == "Connect"]
    inner = [one for one in received.spans() if one["name"] == "Open stream"]
    assert len(outer) == len(inner) > 10
    assert {one["parentSpanId"] for one in inner} == {one["spanId"] for one in outer}
    assert attributes(outer[0])["hypha.peer"] == "12D3KooWyou"
    found = received.metrics()
    assert found["hypha.lease.renewals"]["unit"] == "{renewal}"
    points = found["hypha.lease.renewals"]["sum"]["dataPoints"]
    assert int(points[0]["asInt"]) == len(outer)
    assert found["hypha.data.fetch.duration"]["histogram"]["dataPoints"][0]["explicitBounds"][:3] == [
        0.05,
        0.1,
        0.25,
    ]
    assert found["hypha.uptime"]["gauge"]["dataPoints"][0]["asDouble"] == 7.0
    lines = received.logs()
    assert lines[0]["body"]["stringValue"] == "A line."
    assert {one["spanId"] for one in lines} == {one["spanId"] for one in inner}
    assert attributes(lines[0])["peer_id"] == "12D3KooWyou"


@pytest.mark.parametrize(("sampler", "least", "most"), [("always_off", 0.0, 0.0), ("traceidratio", 0.2, 0.8)])
def test_samplers_are_those_that_were_named(sampler: str, least: float, most: float, tmp_path: Path) -> None:
    with receiver("http/protobuf") as (endpoint, received):
        run(tmp_path, endpoint, "http/protobuf", sampler=sampler)
    made = int(received.metrics()["hypha.lease.renewals"]["sum"]["dataPoints"][0]["asInt"])
    assert made > 10
    sent = sum(one["name"] == "Connect" for one in received.spans())
    assert least * made <= sent <= most * made


@pytest.mark.parametrize(
    ("protocol", "how"),
    [
        *(
            (protocol, how)
            for protocol in ("grpc", "http/protobuf", "http/json")
            for how in ("refused", "black hole")
        ),
        *(("http/protobuf", how) for how in ("slow", "400", "429", "500")),
        ("grpc", "500"),
        ("http/json", "429"),
    ],
)
def test_a_collector_that_fails_is_in_nobodys_way(protocol: str, how: str, tmp_path: Path) -> None:
    with failing(protocol, how) as endpoint:
        log, closed, slowest = run(tmp_path, endpoint, protocol)
    assert closed < 3
    # an export takes much longer
    assert slowest < 0.5
    for signal in ("traces", "metrics", "logs"):
        assert log.count(f"does not take {signal}") <= 1
    warned = [line for line in log.splitlines() if "WARN" in line or "ERROR" in line or "Traceback" in line]
    assert len(warned) <= 3, log
    if how == "400":  # what may be retried is, for ten seconds, before it counts as failed
        assert "does not take traces: " in log


@contextmanager
def failing(protocol: str, how: str) -> Iterator[str]:
    if how in ("refused", "black hole"):
        with socket.create_server(("127.0.0.1", 0)) as server:
            endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
            if how == "black hole":
                yield endpoint  # the system completes the handshake; nobody ever reads
        if how == "refused":
            yield endpoint
        return
    with receiver(protocol) as (endpoint, received):
        if how == "slow":
            received.delay_s = 4.0
        else:
            received.status = int(how)
        yield endpoint


def test_a_collector_that_comes_back_is_reported_once_more(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    log = tmp_path / "log"
    process = telemetry_run.start(
        tmp_path / "output", log, f"http://127.0.0.1:{port}", "http/protobuf", 60.0, "always_on"
    )

    def wait_for(word: str) -> None:
        until = time.monotonic() + 30
        while not (log.exists() and word in log.read_text()):
            assert time.monotonic() < until
            time.sleep(0.02)

    try:
        wait_for("does not take")
        with http_receiver(port) as (_, received):
            wait_for("again")
            assert received.requests
    finally:
        process.kill()
        process.join()


def test_nothing_of_the_sdk_is_imported_while_telemetry_is_off() -> None:
    code = (
        "import sys; from hypha.telemetry.running import telemetry; import hypha.net.node; "
        "from hypha.config.models import GatewayConfig; from hypha.config.otel import resolve_telemetry; "
        "c = GatewayConfig(cert_pem='c', key_pem='k', trust_pem='t', external_addresses=['/ip4/1.2.3.4'],"
        "telemetry_endpoint='http://h:1', http_address='127.0.0.1:0')\n"
        "with telemetry(resolve_telemetry('hypha-gateway', c, {'OTEL_SDK_DISABLED': 'true'})):\n"
        "    print([m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_prometheus_is_answered_over_local_http() -> None:
    code = """
import trio, httpx
from functools import partial
from hypha.config.models import GatewayConfig
from hypha.config.otel import resolve_telemetry
from hypha.messages import HealthReport
from hypha.telemetry import instruments, serve_http
from hypha.telemetry.running import telemetry

config = GatewayConfig(
    cert_pem="c", key_pem="k", trust_pem="t", external_addresses=["/ip4/127.0.0.1/tcp/1"],
    http_address="127.0.0.1:0", telemetry_attributes={"hypha.job": "digits"},
)

async def main():
    health = lambda: HealthReport(healthy=True, component="c", version="1", peer="12D3", uptime_s=1.0)
    async with trio.open_nursery() as nursery:
        address = await nursery.start(partial(serve_http, "127.0.0.1:0", health))
        instruments.RENEWALS.add(2, status="success")
        instruments.FETCH_DURATION.record(0.3, status="success")
        instruments.BYTES_SENT.add(5, plane="carrier pigeon")
        peers = ["a", "b"]
        with instruments.ACTIVE_WORKERS.watch(lambda: 3), instruments.ROUND_TRIP.watch(
            lambda: [({"peer": peer}, 0.5) for peer in peers]
        ):
            async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as client:
                print((await client.get("/metrics")).text)
                print("-----")
                peers.remove("a")
                answer = await client.get("/metrics", headers={"accept": "application/openmetrics-text"})
                print(answer.headers["content-type"])
                print(answer.text)
        nursery.cancel_scope.cancel()

with telemetry(resolve_telemetry("hypha-gateway", config, {})):
    trio.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    first, _, second = done.stdout.partition("-----\n")
    lines = first.splitlines()
    assert 'hypha_lease_renewals_total{status="success"} 2.0' in lines
    assert 'hypha_data_fetch_duration_bucket{le="0.5",status="success"} 1.0' in lines
    assert 'hypha_network_bytes_sent_total{plane="other"} 5.0' in lines
    assert "hypha_active_workers 3.0" in lines
    assert 'hypha_network_round_trip{peer="a"} 0.5' in lines
    assert any(line.startswith("target_info{") and 'hypha_job="digits"' in line for line in lines)
    assert second.startswith("application/openmetrics-text")
    # who has left is not shown any more
    assert 'peer="a"' not in second
    assert 'peer="b"' in second

"""A short life of a node that sends all its telemetry, in a process of its own, as a process has one tracer
provider.

It is forked from one that has imported the SDK and all exporters, which takes a second of processor time.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import opentelemetry.exporter.otlp.proto.grpc.metric_exporter
import opentelemetry.exporter.otlp.proto.http.metric_exporter  # noqa: F401
from tests.support.stopwatch import Stopwatch

from hypha.config.models import GatewayConfig
from hypha.config.otel import resolve_telemetry
from hypha.config.reading.log_filter import parse_filter
from hypha.telemetry import instruments, metrics
from hypha.telemetry.logs import configure_logging
from hypha.telemetry.running import telemetry
from hypha.tracing import operations, span


def live(endpoint: str, protocol: str, runs_s: float, sampler: str) -> None:
    """Send spans, metrics and log entries for ``runs_s``; print how long it took to close, and the longest
    time that a span, an entry and two records took together.
    """
    config = GatewayConfig(
        cert_pem="c", key_pem="k", trust_pem="t", external_addresses=["/ip4/127.0.0.1/tcp/1"],
        telemetry_endpoint=endpoint, telemetry_protocol=protocol, telemetry_interval_s=0.2,
        telemetry_sampler=sampler, telemetry_sample_ratio=0.5,
        telemetry_attributes="deployment.environment=test,service.name=hypha-{component}",
        telemetry_headers={"Authorization": "Bearer sesame", "X-Scope-OrgID": "seven"},
    )  # fmt: skip
    configure_logging("hypha-gateway", parse_filter("info"), "text")
    settings = resolve_telemetry("hypha-gateway", config, {}).of_instance("12D3KooWme")
    slowest = 0.0
    with telemetry(settings):
        with instruments.UPTIME.watch(lambda: 7.0):
            until = time.monotonic() + runs_s
            turns = 0
            while True:
                turns += 1
                metrics.sample()
                began = Stopwatch()
                with span(operations.CONNECT, {"hypha.peer": "12D3KooWyou"}):
                    with span(operations.OPEN_STREAM):
                        logging.getLogger("hypha.net").info("A line.", extra={"peer_id": "12D3KooWyou"})
                instruments.RENEWALS.add(status="success")
                instruments.FETCH_DURATION.record(0.3, status="success")
                slowest = max(slowest, began.elapsed_s())
                # a busy machine lets this have few turns, too few to tell how many are sampled
                if time.monotonic() > until and turns >= 60:
                    break
                time.sleep(0.005)
        ended = Stopwatch()
    print(f"closed={ended.elapsed_s():.2f} slowest={slowest:.3f}", flush=True)


def lives_to(output: Path, log: Path, endpoint: str, protocol: str, runs_s: float, sampler: str) -> None:
    """:func:`live`, with its standard output and standard error in those files."""
    for descriptor, path in ((1, output), (2, log)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    live(endpoint, protocol, runs_s, sampler)


def start(
    output: Path, log: Path, endpoint: str, protocol: str, runs_s: float, sampler: str
) -> ForkServerProcess:
    """A process that runs :func:`lives_to`."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__])
    process = forks.Process(target=lives_to, args=(output, log, endpoint, protocol, runs_s, sampler))
    process.start()
    return process

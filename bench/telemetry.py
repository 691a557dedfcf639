"""What telemetry costs: training with all of it on against training with none, job by job, by turns.

Three networks of real processes stand side by side, each a gateway, a data node, a parameter server and one
training worker that computes as fast as it can; only one has a job at a time. With telemetry on, every node
sends traces (all of them), metrics and logs over OTLP to a process that throws them away, and is scraped once
a second. In the third network the collector is a black hole: it accepts connections and never reads. Each
turn gives ratios of samples a second to those of the network without, first rounds apart; the rows have the
median. What a span and a counter cost while telemetry is off is measured in a loop, against one log call that
the filter leaves out.
"""

from __future__ import annotations

import logging
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import trio
from tests.support.system import System, digits_dataset, digits_job, digits_model, open_system

from bench.report import Bound, Report, Row
from hypha.scheduler import read_ledger
from hypha.telemetry.instruments import RENEWALS
from hypha.tracing import span
from hypha.tracing.operations import CONNECT

TURNS = 5
ROUNDS = 8
#: rounds that are not counted: processors, caches and the projection of the next round warm up
FIRST = 2
SAMPLES = 2500
KEPT = 0.98
#: with nobody there to take it
KEPT_ANYWAY = 0.96
_CALLS = 200_000


class _Sink(BaseHTTPRequestHandler):
    """Takes what comes, and says so."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing."""


def receive() -> None:
    """Be the collector; its port is the first line of output."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Sink)
    print(server.server_address[1], flush=True)
    server.serve_forever()


class Lab:
    """One of the two networks."""

    def __init__(self, system: System, keys: dict[str, Any]) -> None:
        self._system = system
        self._keys = keys
        self._addresses: list[str] = []

    async def start(self) -> None:
        """All its nodes."""
        system, keys = self._system, self._keys
        gateway = await system.start(
            "gateway", "gateway", system.write("gateway", "gateway", **system.plan_gateway(), **keys)
        )
        data = await system.data("data", digits_dataset(system.root), **keys)
        executors = [{"class": "train", "name": "diloco-transformer", "env": {"OMP_NUM_THREADS": "1"}}]
        worker = await system.worker("worker", executors=executors, **keys)
        server = await system.worker(
            "server", executors=[{"class": "aggregate", "name": "parameter-server"}], **keys
        )
        if keys:
            for node in (gateway, data, worker, server):
                self._addresses.append(await system.said(node, "http_address"))

    async def rate(self, name: str, model: Path) -> float:
        """Samples a second of one job."""
        job = digits_job(model, 1, ROUNDS, name=name)
        job["rounds"]["avg_samples_between_updates"] = SAMPLES
        async with trio.open_nursery() as nursery:
            if self._addresses:
                nursery.start_soon(self._scrape)
            scheduler = await self._system.job(
                job, state_dir=str(self._system.root / f"{name}-state"), **self._keys
            )
            if await self._system.ended(scheduler) != 0:
                raise RuntimeError(scheduler.tail())
            nursery.cancel_scope.cancel()
        ledger = next((self._system.root / f"{name}-state").rglob("job.db"))
        rounds = [one for one in read_ledger(ledger).rounds if not one.discarded][FIRST:]
        return sum(one.samples for one in rounds) / sum(one.duration_s for one in rounds)

    async def _scrape(self) -> None:
        while True:
            for address in self._addresses:
                await trio.to_thread.run_sync(_read, f"http://{address}/metrics")
            await trio.sleep(1)


def _read(url: str) -> bytes:
    with urlopen(url, timeout=10) as answer:
        found: bytes = answer.read()
        return found


async def measure(directory: Path, endpoint: str, hole: str) -> list[dict[str, float]]:
    """Samples a second of each network in each turn."""
    model = digits_model(directory)
    common = {"telemetry_sampler": "always_on", "telemetry_interval_s": 5.0, "http_address": "127.0.0.1:0"}
    keys: dict[str, dict[str, Any]] = {
        "off": {},
        "on": {**common, "telemetry_endpoint": endpoint},
        "black hole": {**common, "telemetry_endpoint": hole},
    }
    found = []
    async with AsyncExitStack() as stack:
        labs = {}
        for name, more in keys.items():
            root = directory / name.replace(" ", "-")
            root.mkdir()
            labs[name] = Lab(await stack.enter_async_context(open_system(root)), more)
            await labs[name].start()
        for turn in range(TURNS):
            # whoever goes first has the cooler machine
            order = list(labs)[turn % len(labs) :] + list(labs)[: turn % len(labs)]
            rates = {name: await labs[name].rate(f"job-{turn}", model) for name in order}
            found.append(rates)
            print(", ".join(f"{name} {rate:.0f}" for name, rate in sorted(rates.items())), flush=True)
    return found


def each_ns(call: Callable[[], object]) -> float:
    """Nanoseconds of one call, the best of five loops."""
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter_ns()
        for _ in range(_CALLS // 5):
            call()
        best = min(best, (time.perf_counter_ns() - began) / (_CALLS // 5))
    return best


def _nothing() -> None:
    with span(CONNECT):
        pass


def main() -> int:
    """Measure; returns the exit code."""
    report = Report("telemetry")
    logger = logging.getLogger("hypha.bench")
    logger.setLevel(logging.INFO)
    silent = each_ns(lambda: logger.debug("Nobody reads this."))
    report.add(Row("a counter, off", each_ns(lambda: RENEWALS.add(status="success")), "ns", reference=silent))
    report.add(Row("a span, off", each_ns(_nothing), "ns", bound=Bound("<", 10_000)))
    command = [sys.executable, "-m", "bench.telemetry", "--receive"]
    with tempfile.TemporaryDirectory(prefix="hypha-bench-") as name:
        sink = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            if sink.stdout is None:
                raise RuntimeError("a pipe that was asked for is not there")
            endpoint = f"http://127.0.0.1:{int(sink.stdout.readline())}"
            with socket.create_server(("127.0.0.1", 0), backlog=512) as hole:
                black_hole = f"http://127.0.0.1:{hole.getsockname()[1]}"
                turns = trio.run(measure, Path(name), endpoint, black_hole)
        finally:
            sink.kill()
            sink.wait()
    off = statistics.median(one["off"] for one in turns)
    for name, kept in (("on", KEPT), ("black hole", KEPT_ANYWAY)):
        ratios = sorted(one[name] / one["off"] for one in turns)
        middle = statistics.median(ratios)
        spread = f"of {len(ratios)} turns, {ratios[0]:.3f} to {ratios[-1]:.3f}"
        report.add(
            Row(
                f"training, {name}",
                middle * off,
                "samples/s",
                reference=off,
                bound=Bound(">=", kept),
                note=spread,
            )
        )
    return report.finish()


if __name__ == "__main__":
    if sys.argv[1:] == ["--receive"]:
        receive()
    raise SystemExit(main())

"""What telemetry costs: training with all of it on beside training with none, at the same time.

Three networks of real processes stand side by side, each a gateway, a data node, a parameter server and one
training worker that computes as fast as it can. Two of them have a job at a time, each worker on a core of
its own; in the second half of a turn they change cores. With telemetry on, every node sends traces (all of
them), metrics and logs over OTLP to a process that throws them away, and is scraped as often as it exports
metrics. In the third network the collector is a black hole: it accepts connections and never reads. The first
rounds are left out; the rows have the median over the turns. The bound is on samples by the processor time
that worker and executor take: on a machine with other work, the wall clock varies by ten times what is to be
found; it is reported beside. What a span and a counter cost while telemetry is off is measured in a loop,
against one log call that the filter leaves out.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import psutil
import trio
from sklearn.datasets import load_digits
from tests.support.system import System, digits_job, digits_model, open_system

from bench.report import Bound, Report, Row
from hypha.cli.demo.children import Child
from hypha.data import PrepareOptions, prepare
from hypha.errors import HyphaError
from hypha.scheduler import read_ledger
from hypha.telemetry.instruments import RENEWALS
from hypha.tracing import span
from hypha.tracing.operations import CONNECT

#: each has four jobs by two: either network with telemetry, on either core, beside the one without
TURNS = 3
ROUNDS = 8
#: rounds that are not counted: processors, caches and the projection of the next round warm up
FIRST = 2
SAMPLES = 4000
#: of the dataset of 1797 digits, each a slice
COPIES = 12
#: between two exports of metrics, and between two scrapes: a third of what is usual
INTERVAL_S = 5.0
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


@dataclass(frozen=True)
class Rate:
    """Samples by the wall clock, and by the processor time of the worker and its executor."""

    each_s: float
    each_computed_s: float


class Lab:
    """One of the three networks."""

    def __init__(self, system: System, keys: dict[str, Any]) -> None:
        self._system = system
        self._keys = keys
        self._addresses: list[str] = []
        self._worker: Child | None = None

    async def start(self) -> None:
        """All its nodes."""
        system, keys = self._system, self._keys
        gateway = await system.start(
            "gateway", "gateway", system.write("gateway", "gateway", **system.plan_gateway(), **keys)
        )
        data = await system.data("data", _dataset(system.root), **keys)
        executors = [{"class": "train", "name": "diloco-transformer", "env": {"OMP_NUM_THREADS": "1"}}]
        worker = await system.worker("worker", executors=executors, **keys)
        server = await system.worker(
            "server", executors=[{"class": "aggregate", "name": "parameter-server"}], **keys
        )
        self._worker = worker
        if keys:
            for node in (gateway, data, worker, server):
                self._addresses.append(await system.said(node, "http_address"))

    def move(self, core: int) -> None:
        """Let the worker, and whatever it starts, compute on that core alone."""
        if self._worker is None:
            raise RuntimeError("the network was not started")
        process = psutil.Process(self._worker.process.pid)
        for one in (process, *process.children(recursive=True)):
            for thread in one.threads():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, {core})

    async def rate(self, name: str, model: Path) -> Rate:
        """What one job did, after its first rounds."""
        job = digits_job(model, 1, ROUNDS, name=name)
        job["rounds"]["avg_samples_between_updates"] = SAMPLES
        async with trio.open_nursery() as nursery:
            if self._addresses:
                nursery.start_soon(self._scrape)
            state = self._system.root / f"{name}-state"
            # how much the worker and its executor had computed when so many rounds were closed, in s
            computed: dict[int, float] = {}
            nursery.start_soon(self._watch, state, computed)
            scheduler = await self._system.job(job, state_dir=str(state), **self._keys)
            if await self._system.ended(scheduler) != 0:
                raise RuntimeError(scheduler.tail())
            nursery.cancel_scope.cancel()
        rounds = [one for one in read_ledger(next(state.rglob("job.db"))).rounds if not one.discarded]
        # the last one may be over before it was seen
        last = max(computed)
        return Rate(
            sum(one.samples for one in rounds[FIRST:]) / sum(one.duration_s for one in rounds[FIRST:]),
            sum(one.samples for one in rounds[FIRST:last]) / (computed[last] - computed[FIRST]),
        )

    async def _watch(self, state: Path, computed: dict[int, float]) -> None:
        if self._worker is None:
            raise RuntimeError("the network was not started")
        worker = psutil.Process(self._worker.process.pid)
        # what an ended process had used stays in the sum
        used: dict[int, float] = {}
        while True:
            await trio.sleep(0.05)
            for one in (worker, *worker.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    times = one.cpu_times()
                    used[one.pid] = times.user + times.system
            computed.setdefault(_rounds(state), sum(used.values()))

    async def _scrape(self) -> None:
        while True:
            for address in self._addresses:
                await trio.to_thread.run_sync(_read, f"http://{address}/metrics")
            await trio.sleep(INTERVAL_S)


def _dataset(root: Path) -> Path:
    """The digits several times, in slices of about a second of training: far smaller than is usual."""
    digits = load_digits()
    raw = root / "raw"
    raw.mkdir()
    np.save(
        raw / "pixel_values.npy", np.tile(digits.images[:, None] / 16.0, (COPIES, 1, 1, 1)).astype(np.float32)
    )
    np.save(raw / "labels.npy", np.tile(digits.target, COPIES).astype(np.int64))
    output = root / "dataset"
    prepare(PrepareOptions((raw,), output, name="digits", slice_samples=len(digits.target), shuffle=True))
    return output


def _rounds(state: Path) -> int:
    """How many the ledger of that state directory holds: none, as long as there is no whole ledger."""
    try:
        return sum(not one.discarded for one in read_ledger(next(state.rglob("job.db"))).rounds)
    except (StopIteration, HyphaError):
        return 0


def _read(url: str) -> bytes:
    with urlopen(url, timeout=10) as answer:
        found: bytes = answer.read()
        return found


async def measure(directory: Path, endpoint: str, hole: str) -> list[dict[str, Rate]]:
    """Of each turn, by network: its rates over those of the network without telemetry."""
    model = digits_model(directory)
    common = {
        "telemetry_sampler": "always_on",
        "telemetry_interval_s": INTERVAL_S,
        "http_address": "127.0.0.1:0",
    }
    keys: dict[str, dict[str, Any]] = {
        "off": {},
        "on": {**common, "telemetry_endpoint": endpoint},
        "black hole": {**common, "telemetry_endpoint": hole},
    }
    cores = sorted(os.sched_getaffinity(0))[:2]
    found = []
    async with AsyncExitStack() as stack:
        labs = {}
        for name, more in keys.items():
            root = directory / name.replace(" ", "-")
            root.mkdir()
            labs[name] = Lab(await stack.enter_async_context(open_system(root)), more)
            await labs[name].start()
        for turn in range(TURNS):
            ratios = {}
            for name in ("on", "black hole"):
                halves = []
                for swapped, order in enumerate((cores, cores[::-1])):
                    halves.append(await beside(labs, name, order, f"{turn}-{swapped}-{name[:2]}", model))
                ratios[name] = Rate(
                    math.sqrt(math.prod(one.each_s for one in halves)),
                    math.sqrt(math.prod(one.each_computed_s for one in halves)),
                )
                print(name, *halves, flush=True)
            found.append(ratios)
    return found


async def beside(labs: dict[str, Lab], name: str, cores: list[int], job: str, model: Path) -> Rate:
    """The ratios of two jobs at the same time: of that network, to the one without telemetry."""
    rates: dict[str, Rate] = {}

    async def one(which: str) -> None:
        rates[which] = await labs[which].rate(f"job-{job}", model)

    async with trio.open_nursery() as nursery:
        for which, core in zip(("off", name), cores, strict=True):
            labs[which].move(core)
            nursery.start_soon(one, which)
    traced, plain = rates[name], rates["off"]
    return Rate(traced.each_s / plain.each_s, traced.each_computed_s / plain.each_computed_s)


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
    for name, kept in (("on", KEPT), ("black hole", KEPT_ANYWAY)):
        for what, ratios in (
            ("processor time", sorted(one[name].each_computed_s for one in turns)),
            ("wall clock", sorted(one[name].each_s for one in turns)),
        ):
            spread = f"of {len(ratios)} turns, {ratios[0]:.3f} to {ratios[-1]:.3f}"
            middle = statistics.median(ratios)
            # other work of this machine takes more from one core than from the other
            bound = Bound(">=", kept) if what == "processor time" else None
            report.add(Row(f"training by {what}, {name}, over without", middle, "", bound=bound, note=spread))
    return report.finish()


if __name__ == "__main__":
    if sys.argv[1:] == ["--receive"]:
        receive()
    raise SystemExit(main())

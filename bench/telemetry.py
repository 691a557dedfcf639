"""What telemetry costs: training with all of it on against training with none, by turns of half a second.

Three networks of real processes stand side by side, each a gateway, a data node, a parameter server and one
training worker that computes as fast as it can. One sends nothing. In another every node sends traces (all of
them), metrics and logs over OTLP to a process that throws them away, and is scraped as often as it exports
metrics. In the third the collector is a black hole: it accepts connections and never reads. The three workers
share one core and take turns on it: two are always stopped (SIGSTOP), so that whatever else the machine does
meets all three alike; the other nodes have the other core. What counts are samples by the processor time of
worker and executor, of several jobs one after the other, each with an executor of its own. The first rounds
are left out. Executors that compute the same differ by some percent for as long as they live, which hides
what telemetry costs. So what is bounded is the processor time of all threads but the one that trains (it
records some spans a round), worker and executor together: what of it is more with telemetry, over all that is
used. What a span and a counter cost while telemetry is off is measured in a loop, against one log call that
the filter leaves out.
"""

from __future__ import annotations

import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import numpy as np
import psutil
import trio
from sklearn.datasets import load_digits
from tests.support.system import System, digits_job, digits_model, open_system

from bench.report import Bound, Report, Row
from hypha.cli.local.children import Child
from hypha.data import PrepareOptions, prepare
from hypha.errors import HyphaError
from hypha.scheduler.durable.ledger import read_ledger
from hypha.telemetry.instruments import RENEWALS
from hypha.tracing import span
from hypha.tracing.operations import CONNECT

JOBS = 3
ROUNDS = 12
#: rounds that are not counted: processors, caches and the projection of the next round warm up
FIRST = 2
SAMPLES = 4000
#: how long a worker computes before it is the next one's turn
TURN_S = 0.5
#: of the dataset of 1797 digits, each a slice
COPIES = 12
#: between two exports of metrics, and between two scrapes: as is usual. A worker has every third turn: for
#: what it computes it exports, is scraped and reads its gauges three times as often as usual
INTERVAL_S = 15.0
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


class Used(NamedTuple):
    """Seconds of processor time a sample: of worker and executor, and without the thread that trains."""

    whole: float
    beside: float


class Lab:
    """One of the three networks."""

    def __init__(self, system: System, keys: dict[str, Any]) -> None:
        # the worker's own child: forked by a shared host it would neither be counted nor take turns
        system.executor_host = None
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
                self._addresses.append(await system.logged_value(node, "http_address"))

    def processes(self) -> list[psutil.Process]:
        """The worker and whatever it has started."""
        if self._worker is None:
            raise RuntimeError("the network was not started")
        worker = psutil.Process(self._worker.process.pid)
        return [worker, *worker.children(recursive=True)]

    def move(self, core: int) -> None:
        """Let the worker, and whatever it starts, compute on that core alone."""
        for one in self.processes():
            for thread in one.threads():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, {core})

    def stop(self) -> None:
        """Stop the worker and its processes, those too that are being started."""
        stopped: set[int] = set()
        while more := [one for one in self.processes() if one.pid not in stopped]:
            for one in more:
                with suppress(psutil.NoSuchProcess):
                    one.suspend()
                stopped.add(one.pid)

    def go_on(self) -> None:
        """The opposite of ``stop``."""
        for one in self.processes():
            with suppress(psutil.NoSuchProcess):
                one.resume()

    async def rate(self, name: str, model: Path) -> Used:
        """The processor time of worker and executor for each sample of one job."""
        job = digits_job(model, 1, ROUNDS, name=name)
        job["rounds"]["avg_samples_between_updates"] = SAMPLES
        async with trio.open_nursery() as nursery:
            if self._addresses:
                nursery.start_soon(self._scrape)
            state = self._system.root / f"{name}-state"
            # how much the worker and its executor had computed when so many rounds were closed, in s
            computed: dict[int, tuple[float, float]] = {}
            nursery.start_soon(self._watch, state, computed)
            scheduler = await self._system.job(job, state_dir=str(state), **self._keys)
            if await self._system.ended(scheduler, 1200) != 0:
                raise RuntimeError(scheduler.tail())
            nursery.cancel_scope.cancel()
        rounds = [one for one in read_ledger(next(state.rglob("job.db"))).rounds if not one.discarded]
        seen = sorted(one for one in computed if one >= FIRST)
        begin, end = seen[0], seen[-1]
        samples = sum(one.samples for one in rounds[begin:end])
        whole, beside = (after - before for after, before in zip(computed[end], computed[begin], strict=True))
        return Used(whole / samples, beside / samples)

    async def _watch(self, state: Path, computed: dict[int, tuple[float, float]]) -> None:
        # what an ended process had used stays in the sum
        used: dict[int, float] = {}
        training: dict[int, float] = {}
        while True:
            await trio.sleep(0.05)
            worker, *others = self.processes()
            for one in (worker, *others):
                with suppress(psutil.NoSuchProcess):
                    times = one.cpu_times()
                    used[one.pid] = times.user + times.system
            for one in others:
                with suppress(psutil.NoSuchProcess, StopIteration):
                    main = next(thread for thread in one.threads() if thread.id == one.pid)
                    training[one.pid] = main.user_time + main.system_time
            whole = sum(used.values())
            computed.setdefault(_rounds(state), (whole, whole - sum(training.values())))

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


async def measure(directory: Path, endpoint: str, hole: str) -> dict[str, list[tuple[float, float]]]:
    """Of each network with telemetry and each job: how fast it was over the one without, and what share of
    the processor time was left by what is done beside training.
    """
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
    first, *others = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, others or [first])
    found: dict[str, list[Used]] = {name: [] for name in keys}
    async with AsyncExitStack() as stack:
        labs = {}
        for name, more in keys.items():
            root = directory / name.replace(" ", "-")
            root.mkdir()
            labs[name] = Lab(await stack.enter_async_context(open_system(root)), more)
            await labs[name].start()
            labs[name].move(first)

        async def run(name: str, job: str) -> None:
            found[name].append(await labs[name].rate(job, model))

        async with trio.open_nursery() as nursery:
            turns = trio.CancelScope()
            nursery.start_soon(take_turns, list(labs.values()), turns)
            for number in range(JOBS):
                async with trio.open_nursery() as jobs:
                    for name in labs:
                        jobs.start_soon(run, name, f"job-{number}")
            turns.cancel()
    return {
        name: [
            (plain.whole / one.whole, 1.0 - (one.beside - plain.beside) / plain.whole)
            for one, plain in zip(found[name], found["off"], strict=True)
        ]
        for name in keys
        if name != "off"
    }


async def take_turns(labs: list[Lab], scope: trio.CancelScope) -> None:
    """Let one worker after the other compute, until ``scope`` is cancelled."""
    for lab in labs:
        lab.stop()
    try:
        with scope:
            for lab in cycle(labs):
                lab.go_on()
                await trio.sleep(TURN_S)
                lab.stop()
    finally:
        for lab in labs:
            lab.go_on()


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
                ratios = trio.run(measure, Path(name), endpoint, black_hole)
        finally:
            sink.kill()
            sink.wait()
    for name, kept in (("on", KEPT), ("black hole", KEPT_ANYWAY)):
        whole, left = (sorted(column) for column in zip(*ratios[name], strict=True))
        for what, jobs, bound in (
            ("training, by all processor time", whole, None),
            ("left for training by all other threads", left, Bound(">=", kept)),
        ):
            spread = f"of {JOBS} jobs, {jobs[0]:.3f} to {jobs[-1]:.3f}"
            label = f"{what}, {name}, over without"
            report.add(Row(label, statistics.median(jobs), "", bound=bound, note=spread))
    return report.finish()


if __name__ == "__main__":
    if sys.argv[1:] == ["--receive"]:
        receive()
    raise SystemExit(main())

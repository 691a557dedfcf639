"""From the start of a job to all of its leases: 20 workers and a parameter server, p95 below a second.

The workers are real nodes with real arbiters, in two processes behind one gateway in a third; the
scheduler's pool is the one that jobs use. Each repeat is a new scheduler node, connected to its gateway
but to no worker yet; in the end everything is given back.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import trio

from bench.nodes import NodeFiles, Pki, child, gateway, options
from bench.report import Bound, Report, Row
from hypha.config.job import JobResourcesConfig
from hypha.config.offers import OfferConfig
from hypha.messages import ExecutorDescriptor, Resources
from hypha.net import open_node
from hypha.rules.leases import Lease
from hypha.scheduler.descriptions import searches_for
from hypha.scheduler.leasing.events import Gained
from hypha.scheduler.leasing.pool import Pool
from hypha.worker.leasing.arbiter import Arbiter
from hypha.worker.leasing.offers import serve_offers
from hypha.worker.leasing.service import LeaseService
from hypha.worker.leasing.terms import WorkerCapacity

WORKERS = 20
PROCESSES = 2
REPEATS = 30
#: After everything was given back, workers have all free again.
PAUSE_S = 0.5
LIMIT_S = 30.0

_NEED = JobResourcesConfig(num_workers=WORKERS)
_EXECUTORS = (
    ExecutorDescriptor(kind="train", name=_NEED.worker_executor),
    ExecutorDescriptor(kind="aggregate", name=_NEED.parameter_server_executor),
)


async def workers(files: NodeFiles, ready: Callable[[Any], None]) -> None:
    """A worker for each identity; ready when all are connected."""
    async with trio.open_nursery() as nursery:
        for identity in (files.identity, *files.more):
            await nursery.start(_worker, NodeFiles(identity, files.gateways))
        ready(None)
        await trio.sleep_forever()


async def _worker(files: NodeFiles, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    async with open_node(options(files, "hypha-worker")) as node, trio.open_nursery() as nursery:
        # room for one executor of each kind, as on a machine that may host the parameter server too
        arbiter = Arbiter(
            WorkerCapacity(Resources(cpu=2, memory=2, storage=1), _EXECUTORS), OfferConfig(), node.ref
        )
        await nursery.start(serve_offers, node, LeaseService(arbiter, _ignore))
        await node.wait_connected()
        task_status.started()
        await trio.sleep_forever()


def _ignore(lease: Lease) -> None:
    """There is no executor to stop."""


async def one_job(files: NodeFiles) -> float:
    """Seconds from the start of a pool to its last lease, by a scheduler that knows its gateway only."""
    async with open_node(options(files, "hypha-scheduler")) as node:
        await node.wait_connected()
        pool = Pool(node, searches_for(_NEED))
        async with trio.open_nursery() as nursery:
            started = time.perf_counter()
            await nursery.start(pool.run)
            pool.want("train", WORKERS)
            pool.want("aggregate", 1)
            gained = 0
            with trio.fail_after(LIMIT_S):
                async for event in pool.events:
                    gained += isinstance(event.change, Gained)
                    if gained == WORKERS + 1:
                        break
            taken = time.perf_counter() - started
            await pool.close()
    return taken


async def measure(pki: Pki) -> list[float]:
    """Seconds of all repeats."""
    with child(gateway, NodeFiles(pki.files("gateway", ("gateway",)))) as address, ExitStack() as stack:
        for _ in range(PROCESSES):
            one, *more = (pki.files("worker", ("worker",)) for _ in range(WORKERS // PROCESSES))
            stack.enter_context(child(workers, NodeFiles(one, (address,), more=tuple(more))))
        taken = []
        for turn in range(REPEATS + 1):
            seconds = await one_job(NodeFiles(pki.files("scheduler", ("scheduler",)), (address,)))
            if turn:  # the first is to warm up
                taken.append(seconds)
            await trio.sleep(PAUSE_S)
        return taken


def main() -> int:
    """Measure; returns the exit code."""
    report = Report("leases")
    with tempfile.TemporaryDirectory(prefix="hypha-bench-") as name:
        taken = trio.run(measure, Pki(Path(name)))
    note = f"{REPEATS} job starts, {WORKERS} workers and a parameter server, fresh scheduler each time"
    report.add(Row("all leases, median", statistics.median(taken), "s", note=note))
    p95 = statistics.quantiles(taken, n=20)[-1]
    report.add(Row("all leases, p95", p95, "s", bound=Bound("<", 1.0), note=f"longest {max(taken):.3f} s"))
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())

"""Executors forked by a warm host against such as are started: from dispatch to ``Loaded``, memory of their
own, and from the kill of a training executor to its training again.

The first two are executors of the demo's model behind a bridge of the tests, one at a time, both ways by
turns; memory is what a process has to itself (USS: it would be free if the process ended). The last is a
whole job on real processes, struck by ``kill``; the scheduler's pause of 0.2 to 0.3 s is in it.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import trio
from tests.executor.bridge_peer import Network
from tests.support.faults import executors, fail_at
from tests.support.host import run_environment, shared_host
from tests.support.system import digits_dataset, digits_job, digits_model, open_system, paced

from bench.report import Bound, Report, Row
from hypha.cli.chaos.faults import TargetJob
from hypha.config.environment import child_environment
from hypha.messages import ExecutorDescriptor, Loaded, ModelSpec, PeerRef, Peers, TrainJob
from hypha.worker.processes.keepers import Launch
from hypha.worker.processes.process import Supervision, run_executor
from hypha.worker.processes.warm import SharedHost

REPEATS = 5
LOADED_S = 0.5
AGAIN_S = 1.0
_LOOK_S = 0.002
MODULE = "hypha.executor.training"


async def _until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - another process makes it so
        await trio.sleep(_LOOK_S)


async def loaded(network: Network, model: Path, number: int, host: SharedHost | None) -> tuple[float, float]:
    """Seconds from dispatch to ``Loaded``, and MB of the executor's own."""
    job = TrainJob(
        job_id="job",
        generation=0,
        executor=ExecutorDescriptor(kind="train", name="diloco-transformer"),
        me=f"me-{number}",
        scheduler=PeerRef(peer="scheduler"),
        parameter_server=PeerRef(peer="ps"),
        model=ModelSpec(task="image-classification", source=Peers(peers=(), resource="model")),
        dataset="digits",
        batch_size=16,
    )
    bridge = network.add(job, model=model)
    launch = Launch(
        job_id="job",
        argv=(sys.executable, "-m", MODULE, str(bridge.directory / "bridge.sock")),
        environment={**child_environment(run_environment()), "OMP_NUM_THREADS": "1"},
        work_dir=bridge.directory,
        own=MODULE,
    )
    kill = trio.Event()
    async with trio.open_nursery() as nursery:

        async def run(*, task_status: trio.TaskStatus[int]) -> None:
            begun = replace(launch, on_start=task_status.started)
            ended = await run_executor(begun, trio.Event(), 0.0, kill=kill, supervision=Supervision(host))
            if not kill.is_set():
                raise RuntimeError(f"the executor ended with exit code {ended.code}:\n{ended.tail}")

        began = time.monotonic()
        keeper = await nursery.start(run)
        await _until(lambda: any(isinstance(event, Loaded) for event in bridge.events))
        seconds = time.monotonic() - began
        [executor] = psutil.Process(keeper).children()
        own_mb = executor.memory_full_info().uss / 1e6
        kill.set()
    return seconds, own_mb


async def measure_loading(directory: Path) -> dict[str, list[tuple[float, float]]]:
    """Both ways by turns, once the host is ready."""
    network = Network(directory)
    model = digits_model(directory)
    ways: dict[str, SharedHost | None] = {"warm": SharedHost(shared_host()), "cold": None}
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with contextlib.closing(network):
        # waits for its imports
        await loaded(network, model, 0, ways["warm"])
        for _ in range(REPEATS):
            for way, host in ways.items():
                found[way].append(await loaded(network, model, len(network.bridges), host))
    return found


async def measure_again(directory: Path, warm: bool) -> float:
    """Seconds from the kill of a training executor until it has trained a batch again."""
    keys = {} if warm else {"warm": False}
    async with open_system(directory) as system:
        await system.gateway()
        await system.data("data", digits_dataset(directory))
        train = paced(0.05)
        await system.worker("worker", executors=[train], **keys)
        server = {"class": "aggregate", "name": "parameter-server"}
        await system.worker("server", executors=[server], **keys)
        job = digits_job(digits_model(directory), 1, 100)
        # a round that is not over before
        job["rounds"] |= {"avg_samples_between_updates": 10_000, "deadline_s": 300}
        scheduler = await system.scheduler(job)
        fault = await fail_at(TargetJob(system, scheduler), "training-executor", 0)
        began = time.monotonic()
        await _until(lambda: bool(set(executors(fault.node, "training")) - set(fault.pids)))
        trains = ("training", "scheduled")
        await system.reached(
            scheduler, lambda seen: any(one.state in trains and one.batches for one in seen.workers)
        )
        return time.monotonic() - began


def main() -> int:
    """Measure; returns the exit code."""
    report = Report("warm")
    with tempfile.TemporaryDirectory(prefix="hypha-bench-") as name:
        found = trio.run(measure_loading, Path(name))
        again = {}
        for way in ("warm", "cold"):
            directory = Path(name) / way
            directory.mkdir()
            again[way] = trio.run(measure_again, directory, way == "warm")
    warm, cold = ([statistics.median(column) for column in zip(*found[way], strict=True)] for way in found)
    report.add(Row("dispatch to Loaded, warm", warm[0], "s", bound=Bound("<", LOADED_S)))
    report.add(Row("the same, against a start", warm[0], "s", reference=cold[0], bound=Bound("<=", 0.25)))
    report.add(Row("memory of its own", warm[1], "MB", reference=cold[1], bound=Bound("<=", 0.75)))
    report.add(Row("kill to training again, warm", again["warm"], "s", bound=Bound("<", AGAIN_S)))
    report.add(Row("the same, against a start", again["warm"], "s", reference=again["cold"]))
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())

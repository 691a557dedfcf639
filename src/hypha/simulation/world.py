"""A world: real data nodes, workers and a scheduler on a simulated network, under a virtual clock.

Each machine has a directory (its disk), a line, a clock and, while it runs, one process. What runs there is
what the programs run: ``scheduler.run_job``, ``worker.node.serve``, ``data.serve.serve``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import trio

from hypha.data.manifest import make_manifest, write_manifest
from hypha.data.serving import serve as data_serve
from hypha.data.slices import write_slice
from hypha.errors import HyphaError
from hypha.executor.toy import COLUMN
from hypha.journal import Journal, JournalEntry
from hypha.messages import Column
from hypha.scheduler.job.ending import finished_job
from hypha.scheduler.job.run import run_job
from hypha.scheduler.job.states import JobResult, Observation
from hypha.scheduler.status.snapshot import JobSnapshot
from hypha.simulation.configurations import DATASET, NOTICE, data_config, scheduler_config, worker_config
from hypha.simulation.executors.processes import SimulatedExecutors
from hypha.simulation.net.lines import SimulatedMachine
from hypha.simulation.net.network import SimulatedNetwork
from hypha.simulation.net.node import SimulatedOptions, open_simulated_node
from hypha.simulation.process import (
    SimulatedProcess,
    SimulatedRuntime,
    this_process,
)
from hypha.simulation.scenario import Scenario
from hypha.worker.jobs.directory import remove_stale
from hypha.worker.leasing.arbiter import NAME as ARBITER
from hypha.worker.limits.limits import Means
from hypha.worker.node import serve as worker_serve

SCHEDULER = "scheduler"
#: of every machine's disk, unless it is full
FREE_BYTES = 1 << 40
#: a day at which the world begins
_BEGINS = 1_790_000_000.0
#: a node has started by then, and no job has begun
_IDLE_AFTER_S = 0.4


@dataclass(eq=False)
class Computer:
    """A machine of the world, with all that outlives its process."""

    machine: SimulatedMachine
    directory: Path
    main: Callable[[Computer], object]
    process: SimulatedProcess | None = None
    starts: int = 0
    full: bool = False
    slow_disk_s: float = 0.0
    clock_offset_s: float = 0.0
    executors: SimulatedExecutors | None = None
    #: what its executors lie about, see ``scenario.LIES``
    lies: set[str] = field(default_factory=set)
    journal: Journal = field(default_factory=Journal)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    #: tasks of its process before there was a job
    idle_tasks: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """Its PeerID."""
        return self.machine.peer

    def leases(self) -> int:
        """How many leases its worker holds, ended ones that are drained included."""
        for entry in reversed(self.journal.entries):
            if entry.machine == ARBITER and entry.state and not isinstance(entry.state, str):
                return sum(int(str(entry.state[key])) for key in ("leases", "draining"))
        return 0


class World:
    """Everything of one run. Made inside of trio; ``root`` is an empty directory."""

    def __init__(self, scenario: Scenario, root: Path, nursery: trio.Nursery) -> None:
        self.scenario = scenario
        self.root = root
        self.nursery = nursery
        self.network = SimulatedNetwork(nursery, self.random("network"))
        self.computers: dict[str, Computer] = {}
        self.problems: list[str] = []
        #: of each scheduler whose job is done
        self.results: dict[str, JobResult] = {}
        self.failure: HyphaError | None = None
        self.snapshot: JobSnapshot | None = None
        #: called with each snapshot of the job
        self.observers: list[Callable[[JobSnapshot], None]] = []
        self.over = trio.Event()
        #: entries of the scheduler's machines, of all of its processes
        self.listeners: list[Callable[[JournalEntry], None]] = []
        self.entries: list[bytes] = []
        #: make a listener of a worker's journal, each time that the worker is started
        self.worker_listeners: list[Callable[[str], Callable[[JournalEntry], None]]] = []
        #: checkpoints that were found to be right, and how their files looked
        self.verified: dict[Path, tuple[tuple[str, int, int], ...]] = {}
        #: files that a fault has damaged
        self.damaged: set[Path] = set()
        #: looked at whenever the scheduler's process has died
        self.checks: list[Callable[[World], list[str]]] = []
        self._make()

    @property
    def result(self) -> JobResult | None:
        """Of the scheduler that is not a rival of another."""
        return self.results.get(SCHEDULER)

    def random(self, what: str) -> Random:
        """Chance for one purpose, independent of all others."""
        return Random(f"{self.scenario.seed} {what}")

    # --- its machines -------------------------------------------------------------------------------

    def _make(self) -> None:
        wanted = self.scenario
        self.gateways = tuple(f"gateway-{number}" for number in range(1, wanted.gateways + 1))
        self.data = tuple(f"data-{number}" for number in range(1, wanted.data_nodes + 1))
        count = wanted.workers + wanted.spare_workers + wanted.apart
        self.workers = tuple(f"worker-{number}" for number in range(1, count + 1))
        _make_dataset(self.root / "dataset", wanted.slices, wanted.rows)
        for name in self.gateways:
            self._add(name, "gateway", self._gateway)
        for name in self.data:
            self._add(name, "data", self._data)
            shutil.copytree(self.root / "dataset", self.computers[name].directory / "dataset")
        for number, name in enumerate(self.workers):
            self._add(name, "worker", self._worker, behind_nat=number < wanted.behind_nat)
        rivals = (f"{SCHEDULER}-{number}" for number in range(2, wanted.rivals + 2))
        self.schedulers = (SCHEDULER, *rivals)
        for name in self.schedulers:
            self._add(name, "scheduler", self._scheduler)

    def _add(
        self, name: str, role: str, main: Callable[[Computer], object], behind_nat: bool = False
    ) -> None:
        wanted = self.scenario
        machine = SimulatedMachine(
            peer=name,
            roles=frozenset({role}),
            latency_s=wanted.latency_s / 2,
            up_bytes_s=wanted.line_bytes_s,
            down_bytes_s=wanted.line_bytes_s,
            behind_nat=behind_nat,
        )
        directory = self.root / name
        directory.mkdir()
        self.network.machines[name] = machine
        self.computers[name] = Computer(machine, directory, main)

    def start(self, name: str) -> None:
        computer = self.computers[name]
        if computer.process is not None and computer.process.alive:
            return
        computer.starts += 1
        runtime = self._runtime(computer, f"{name} {computer.starts}")
        process = SimulatedProcess(f"{name}+{computer.starts}", runtime, self.nursery, self._crashed)
        computer.process = process
        scope = computer.scope = trio.CancelScope()

        async def main() -> None:
            with scope:
                await computer.main(computer)  # type: ignore[misc]
            process.kill()

        process.on_end.append(lambda: _close_files(computer.directory))
        process.spawn(main)
        self.nursery.start_soon(self._count_tasks, computer, process)

    async def _count_tasks(self, computer: Computer, process: SimulatedProcess) -> None:
        """How many a node has before the job uses it."""
        while not self._is_connected(computer.name) and process.alive:  # noqa: ASYNC110
            await trio.sleep(_IDLE_AFTER_S)
        await trio.sleep(_IDLE_AFTER_S)
        if process.alive and not process.children:
            computer.idle_tasks = process.tasks

    def _is_connected(self, name: str) -> bool:
        """Its node is there, and has found a gateway: only then all its tasks are there, too."""
        node = self.network.nodes.get(name)
        return node is not None and (node.gateway is not None or not node.options.gateways)

    def _runtime(self, computer: Computer, what: str) -> SimulatedRuntime:
        seed = self.random(what).getrandbits(64)
        drift = self.scenario.clock_drift
        rate = self.random(f"clock of {computer.name}").uniform(1.0 - drift, 1.0 + drift)
        runtime = SimulatedRuntime(
            seed,
            lambda: _BEGINS + trio.current_time() * rate + computer.clock_offset_s,
            lambda _: 0 if computer.full else FREE_BYTES,
        )
        runtime.blocking_s = self.scenario.disk_s + computer.slow_disk_s
        return runtime

    def kill(self, name: str) -> None:
        """Its process ends without another instruction, and its executors with it."""
        process = self.computers[name].process
        if process is not None:
            process.kill()
        if name == SCHEDULER:
            for check in self.checks:
                self.problems += check(self)

    async def stop(self, name: str, within_s: float) -> None:
        """Its process is told to end, and is killed when it has not by then, which is a problem."""
        computer = self.computers[name]
        await self._end_within(computer, computer.scope.cancel, within_s)

    async def give_notice(self, name: str, late_s: float) -> None:
        """Its machine tells that it ends, and does so ``notice_s`` later. Its process is to have ended by
        then, or ``late_s`` later, as a disk may be slow.
        """
        computer = self.computers[name]
        notice = computer.directory / NOTICE
        await self._end_within(computer, notice.touch, self.scenario.notice_s + late_s)
        notice.unlink(missing_ok=True)

    async def _end_within(self, computer: Computer, tell: Callable[[], object], within_s: float) -> None:
        process = computer.process
        if process is None or not process.alive:
            return
        ended = trio.Event()
        process.on_end.append(ended.set)
        tell()
        with trio.move_on_after(within_s) as waiting:
            await ended.wait()
        if waiting.cancelled_caught:
            if not process.frozen:
                self.problems.append(f"{computer.name} did not end within {within_s:g} s")
            self.kill(computer.name)

    def slow_disk(self, computer: Computer, more_s: float) -> None:
        computer.slow_disk_s += more_s
        process = computer.process
        if process is not None and isinstance(process.runtime, SimulatedRuntime):
            process.runtime.blocking_s = self.scenario.disk_s + computer.slow_disk_s

    def _crashed(self, process: SimulatedProcess, exc: BaseException) -> None:
        logging.getLogger("hypha.simulation").error("%s failed", process.name, exc_info=exc)
        self.problems.append(f"{process.name} failed: {type(exc).__name__}: {exc}")

    # --- what they run ------------------------------------------------------------------------------

    async def _gateway(self, computer: Computer) -> None:
        others = tuple(name for name in self.gateways if name != computer.name)
        options = SimulatedOptions("hypha-gateway", others, hop=True)
        async with open_simulated_node(self.network, computer.machine, this_process(), options):
            await trio.sleep_forever()

    async def _data(self, computer: Computer) -> None:
        config = data_config(self.gateways, computer.directory)
        datasets = await data_serve.load_datasets(config)
        options = SimulatedOptions("hypha-data", self.gateways)
        async with open_simulated_node(self.network, computer.machine, this_process(), options) as node:
            await data_serve.serve(config, datasets, node)

    async def _worker(self, computer: Computer) -> None:
        wanted = self.scenario
        number = self.workers.index(computer.name)
        config = worker_config(
            wanted, number, self.gateways, computer.directory, boasts="boast" in computer.lies
        )
        config.work_dir.mkdir(exist_ok=True)
        remove_stale(config.work_dir)
        process = this_process()
        random = self.random(f"speed of {process.name}")
        batch_s = wanted.batch_s[number % len(wanted.batch_s)]

        def child(kind: str) -> SimulatedProcess:
            made = f"{process.name} {kind}"
            return SimulatedProcess(made, self._runtime(computer, made), self.nursery, self._crashed, process)

        computer.executors = SimulatedExecutors(
            child,
            lambda: batch_s * random.uniform(0.9, 1.2),
            lambda: wanted.load_s * random.uniform(0.8, 1.3),
            computer.lies,
        )
        options = SimulatedOptions("hypha-worker", self.gateways)
        async with open_simulated_node(self.network, computer.machine, process, options) as node:
            computer.journal = Journal(kept=50)
            computer.journal.checked = True
            for listener in self.worker_listeners:
                computer.journal.listeners.append(listener(computer.name))

            await worker_serve(config, node, Means(), computer.executors, journal=computer.journal)

    async def _scheduler(self, computer: Computer) -> None:
        wanted = self.scenario
        number = self.schedulers.index(computer.name)
        config = scheduler_config(wanted, number, self.gateways, computer.directory)
        job = config.scheduler.job
        options = SimulatedOptions("hypha-scheduler", self.gateways)
        process = this_process()
        journal = Journal()
        journal.checked = True
        main = computer.name == SCHEDULER
        journal.listeners.append(self._noted if main else self._noted_of_rival)
        try:
            # as the program does: one that is started again after its job is done says so
            self.results[computer.name] = await finished_job(config.state_dir, job) or await run_job(
                config,
                Observation(self._seen if main else None, journal),
                open_=lambda: open_simulated_node(self.network, computer.machine, process, options),
            )
        except HyphaError as exc:
            self.failure = exc
        if self.failure is not None or len(self.results) == len(self.schedulers):
            self.over.set()

    def _seen(self, snapshot: JobSnapshot) -> None:
        self.snapshot = snapshot
        for observer in self.observers:
            observer(snapshot)

    def _noted_of_rival(self, entry: JournalEntry) -> None:
        self.entries.append(entry.line())

    def _noted(self, entry: JournalEntry) -> None:
        self.entries.append(entry.line())
        for listener in list(self.listeners):
            listener(entry)


def _make_dataset(directory: Path, slices: int, rows: int) -> None:
    """``slices`` slices of ``rows`` numbered rows each."""
    directory.mkdir()
    columns = (Column(name=COLUMN, dtype="I64", shape=()),)
    for index in range(slices):
        record = np.zeros(rows, dtype=[(COLUMN, "<i8")])
        record[COLUMN] = np.arange(index * rows, (index + 1) * rows)
        write_slice(directory / f"slice-{index:04}.safetensors", columns, record)
    write_manifest(directory, make_manifest(directory, DATASET))


def _close_files(directory: Path) -> None:
    """What the kernel does for a process that has ended: locks go with their descriptors. SQLite's are left:
    a connection that is never used again locks nothing.
    """
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith(f"{directory}/") and ".db" not in target:
                os.close(int(name))

"""Whole jobs on a network of real processes: gateway, data node, workers, a parameter server of its own.

What a job's executors did is read from its ledger and from the clock of :mod:`bench.models`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tests.support.system import System, open_system

from bench.gloo_server import SERVER_THREADS
from bench.models import TIMES
from hypha.cli.local.network import JOB_S
from hypha.data import PrepareOptions, prepare
from hypha.messages import LedgerFile

#: The job's processes need to import the benchmarks' models.
ROOT = Path(__file__).parent.parent
SLICE_SAMPLES = 4096


@dataclass(frozen=True)
class Round:
    """One round of one worker: when its first forward pass began and its last step ended, and its samples;
    and when its last forward pass began.
    """

    began: float
    ended: float
    batches: int
    samples: int
    last_began: float = 0.0


@dataclass(frozen=True)
class Course:
    """What happened: by worker, its rounds; and the ledger."""

    workers: dict[str, list[Round]]
    ledger: LedgerFile


class Rig:
    """A running network. ``worker-N`` trains, ``server`` hosts parameter servers only."""

    def __init__(self, system: System) -> None:
        self.system = system
        self._jobs = 0

    async def run(
        self, model: Mapping[str, Any], rounds: Mapping[str, Any], workers: int, within_s: float = JOB_S
    ) -> Course:
        """Run one job to its end, which is to come ``within_s`` seconds."""
        self._jobs += 1
        name = f"job-{self._jobs}"
        times = self.system.root / "times"
        for old in times.iterdir():
            old.unlink()
        needs = {"cpu": 1, "memory": 2, "storage": 0, "gpu": 0}
        server_needs = {**needs, "cpu": SERVER_THREADS}
        job = {
            "name": name,
            "model": {"type": "torch", **model},
            "dataset": {"dataset": "bench"},
            "rounds": {"batch_size": 4, **rounds},
            "resources": {"num_workers": workers, "worker": needs, "parameter_server": server_needs},
            "checkpoint": {"every_rounds": 1000},
            "output": str(self.system.root / f"model-{name}"),
        }
        scheduler = await self.system.scheduler(job, name=f"scheduler-{self._jobs}")
        code = await self.system.ended(scheduler, within_s)
        if code:
            raise RuntimeError(f"the job failed with exit code {code}:\n{scheduler.tail()}")
        self.system.group.running.remove(scheduler)
        _, ledger = self.system.ledger(name)
        return Course(_rounds(ledger, times), ledger)


def _rounds(ledger: LedgerFile, times: Path) -> dict[str, list[Round]]:
    """Cuts each executor's times into rounds by the batches that the ledger says."""
    by: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for entry in ledger.rounds:
        if entry.discarded or entry.left_out:
            raise RuntimeError(f"round {entry.round} was disturbed; the measurement does not count")
        for part in entry.contributors:
            by.setdefault((part.worker, part.incarnation), []).append((part.batches, part.samples))
    found: dict[str, list[Round]] = {}
    for (worker, incarnation), sizes in by.items():
        found.setdefault(worker, []).extend(cut(read_times(times / incarnation), sizes))
    return found


def read_times(path: Path) -> list[tuple[str, float]]:
    """What :mod:`bench.models` wrote."""
    lines = (line.split() for line in path.read_text().split("\n")[:-1])
    return [(kind, float(at)) for kind, at in lines]


def cut(events: list[tuple[str, float]], sizes: list[tuple[int, int]]) -> list[Round]:
    """Rounds of (batches, samples) each, one after the other from the start."""
    found, start = [], 0
    for batches, samples in sizes:
        # a batch is a forward pass and, as nothing is accumulated, a step
        own = events[start : start + 2 * batches]
        if [kind for kind, _ in own] != ["forward", "step"] * batches:
            raise RuntimeError("the clock and the batches that were counted disagree")
        found.append(Round(own[0][1], own[-1][1], batches, samples, own[-2][1]))
        start += 2 * batches
    return found


@asynccontextmanager
async def open_rig(
    root: Path,
    workers: int,
    columns: Mapping[str, np.ndarray[Any, Any]],
    steps_s: Sequence[float] | None = None,
) -> AsyncIterator[Rig]:
    """A network in ``root`` with one dataset of ``columns``; all its processes are gone at the end.
    ``steps_s``: how long a batch of each worker takes at least.
    """
    raw = root / "raw"
    raw.mkdir(parents=True)
    (root / "times").mkdir()
    for name, values in columns.items():
        np.save(raw / f"{name}.npy", values)
    prepare(PrepareOptions((raw,), root / "dataset", name="bench", slice_samples=SLICE_SAMPLES))
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        TIMES: str(root / "times"),
    }
    aggregate = {"class": "aggregate", "name": "parameter-server", "env": environment}
    allow = {"entrypoints": ["bench.models:*"]}
    async with open_system(root) as system:
        await system.gateway()
        await system.data("data", root / "dataset")
        for number in range(workers):
            paced = {} if steps_s is None else {"HYPHA_STEP_S": str(steps_s[number])}
            train = {"class": "train", "name": "diloco-transformer", "env": environment | paced}
            await system.worker(f"worker-{number + 1}", executors=[train], allow=allow, warm=False)
        await system.worker("server", executors=[aggregate], allow=allow, warm=False)
        yield Rig(system)

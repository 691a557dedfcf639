"""Hundreds of short rounds leave memory, descriptors, threads, tasks and disks of all processes flat."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import pytest
import trio
from tests.fault.conftest import SERVER_ONLY
from tests.support.system import System, digits_dataset, digits_job

from hypha.cli.chaos.faults import processes
from hypha.cli.local.children import Child

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]

ROUNDS = 700
#: Until then caches fill: slices, connections, allocators.
WARM_UP = 70
#: Checkpoints come every ten rounds, and their files are there for a moment: samples at the same moment of
#: each would tell of how busy the machine is.
EVERY = 7
TRAINING: dict[str, Any] = {"executors": [{"class": "train", "name": "diloco-transformer"}]}
MB = 1 << 20


@dataclass(frozen=True)
class Bound:
    """The second half's median may lie above the first half's by ``share`` of it and ``more``."""

    share: float
    more: float

    def broken(self, first: list[float], second: list[float]) -> bool:
        return median(second) > median(first) * (1 + self.share) + self.more


BOUNDS = {
    # theta is 0.3 MB: one that is kept a round would be over 90 MB here
    "memory": Bound(0.02, 4 * MB),
    # one that stays every hundred rounds would be three here
    "descriptors": Bound(0, 2),
    "threads": Bound(0, 2),
    "tasks": Bound(0, 3),
    "files": Bound(0, 2),
    "disk": Bound(0, MB),
}


def named(node: Child) -> Iterator[tuple[str, psutil.Process]]:
    """A node's own process and its executors', with a name that says which."""
    for process in processes(node):
        command = process.cmdline()
        if process.pid == node.process.pid:
            yield node.name, process
        elif any(word.endswith("keeper.py") for word in command):
            yield f"{node.name}'s keeper", process
        elif module := next((word for word in command if word.startswith("hypha.executor.")), None):
            yield f"{node.name}'s {module.rpartition('.')[2]}", process


def disk_of(directory: Path) -> tuple[int, int]:
    """Files below it, and their bytes. The job's book grows by a row a round: see ``test_ledger``."""
    count = size = 0
    for where, _, names in os.walk(directory):
        for name in names:
            if name.startswith("job.db"):
                continue
            try:
                size += os.lstat(os.path.join(where, name)).st_size
            except FileNotFoundError:
                continue
            count += 1
    return count, size


Series = dict[tuple[str, str], list[float]]


class Watch:
    """Takes samples of every process of a running network and of its directories."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._client = httpx.AsyncClient(trust_env=False, timeout=10.0)

    async def sample(self, into: Series) -> None:
        for node in self._system.group.running:
            for name, process in named(node):
                with process.oneshot():
                    into[name, "memory"].append(process.memory_full_info().uss)
                    into[name, "descriptors"].append(process.num_fds())
                    into[name, "threads"].append(process.num_threads())
            health = (await self._client.get(f"http://{node.look()['http_address']}/health")).json()
            into[node.name, "tasks"].append(int(health["details"]["tasks"]))
            places = [self._system.root / f"work-{node.name}"]
            if node.name == "scheduler":
                places = [self._system.root / "state", self._system.root / "model"]
            counts, sizes = zip(*(disk_of(place) for place in places), strict=True)
            into[node.name, "files"].append(sum(counts))
            into[node.name, "disk"].append(sum(sizes))

    async def close(self) -> None:
        await self._client.aclose()


def table(first: Series, second: Series) -> str:
    lines = []
    for (name, what), early in sorted(first.items()):
        late = second[name, what]
        unit = MB if what in ("memory", "disk") else 1
        numbers = [min(early), median(early), max(early), min(late), median(late), max(late)]
        told = " ".join(f"{number / unit:9.1f}" for number in numbers)
        mark = "GROWS" if BOUNDS[what].broken(early, late) else ""
        lines.append(f"{name:28} {what:12} {told} {mark}")
    return "\n".join(lines)


async def test_hundreds_of_rounds_leave_everything_flat(system: System, tmp_path: Path) -> None:
    http = {"http_address": "127.0.0.1:0"}
    dataset = digits_dataset(tmp_path)
    await system.gateway(planned=system.plan_gateway() | http)
    await system.data("data", dataset, **http)
    await system.worker("server", **SERVER_ONLY, **http)
    for number in range(2):
        # fewer slices than there are: they come and go
        await system.worker(f"worker-{number}", **TRAINING, **http, cache={"max_slices": 5})
    job = digits_job(None, 2, ROUNDS, checkpoint={"every_rounds": 10, "keep": 2})
    job["rounds"] = {"update_rounds": ROUNDS, "inner_steps": 1, "batch_size": 8}
    scheduler = await system.scheduler(job)

    halves: tuple[Series, Series] = (defaultdict(list), defaultdict(list))
    watch = Watch(system)
    started = trio.current_time()
    for round_ in range(WARM_UP, ROUNDS - EVERY, EVERY):
        await system.reached(scheduler, lambda seen, at=round_: seen.round >= at)
        await watch.sample(halves[round_ >= (WARM_UP + ROUNDS) // 2])
    await watch.close()
    print(f"{(ROUNDS - WARM_UP) / (trio.current_time() - started):.1f} rounds/s")
    assert await system.ended(scheduler) == 0, scheduler.tail()

    told = table(*halves)
    print(told)
    _, ledger = system.ledger("job")
    assert [entry.round for entry in ledger.rounds] == list(range(ROUNDS))
    assert {len(entry.contributors) for entry in ledger.rounds} == {2}
    assert "GROWS" not in told, told

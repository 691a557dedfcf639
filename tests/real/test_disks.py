"""Disks that become full while a job trains: the owner is told, nothing half-written counts, it goes on.

One network for all. A small disk each for the one worker, the one parameter server, the ledger and the model
of those jobs that are about them.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
import trio
from tests.fault.conftest import TRAINING_ONLY, Job
from tests.support.disks import Disk, small_disks
from tests.support.faults import again, check_ledger, counted, durations, phase_reached
from tests.support.polling import until
from tests.support.system import System, keep_system

from hypha.cli.chaos.faults import TargetJob
from hypha.cli.local.children import Child

pytestmark = [pytest.mark.real, pytest.mark.fault, pytest.mark.timeout(300)]


STANDS_STILL = "The job stands still, as its ledger {} cannot be written"
GOES_ON = "can be written again"


#: more rounds than the job here lives to see: it is stopped
ENDLESS = 10_000
DISKS = ("worker-disk", "server-disk", "state-disk", "output-disk")
#: where the parameter server is for jobs that do not say
SERVER = {"class": "aggregate", "name": "parameter-server"}
ON_A_SMALL_DISK = {"class": "aggregate", "name": "on-a-small-disk"}


@dataclass(frozen=True)
class Small:
    """The network, with disks that are small."""

    system: System
    job: Job
    disks: dict[str, Disk]
    nodes: dict[str, Child]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    """A gateway, a data node, a parameter server, and one on a small disk; two workers, one of them so."""
    root = tmp_path_factory.mktemp("disks")
    with small_disks(root, *DISKS) as made, keep_system(root) as system:
        disks = dict(zip(DISKS, made, strict=True))
        job = Job(root)
        nodes: dict[str, Child] = {}

        async def start() -> None:
            await system.gateway()
            await system.data("data", job.dataset)
            await system.worker("server", executors=[SERVER])
            work = str(disks["server-disk"].path / "work")
            nodes["server"] = await system.worker("small-server", executors=[ON_A_SMALL_DISK], work_dir=work)
            await system.worker("worker-0", **TRAINING_ONLY)
            keys = {"work_dir": str(disks["worker-disk"].path / "work"), "cache": {"max_slices": 2}}
            nodes["worker"] = await system.worker("worker-1", **TRAINING_ONLY, **keys)

        trio.run(start)
        yield Small(system, job, disks, nodes)


@pytest.fixture
async def small(network: Small) -> AsyncIterator[Small]:
    """The same network, with room everywhere."""
    yield network
    for disk in network.disks.values():
        disk.make_space()
    await network.system.settle()


async def test_a_workers_disk_is_full_and_emptied_again(small: Small) -> None:
    system, disk, worker = small.system, small.disks["worker-disk"], small.nodes["worker"]
    made = small.job(2, ENDLESS, name="worker", min_workers=1)
    made["rounds"] |= {"deadline_s": 3.0, "quorum": 0.5, "grace_s": 1.0}
    scheduler = await system.job(made)
    await system.reached(
        scheduler,
        lambda seen: len(seen.workers) == 2 and all(worker.samples for worker in seen.workers),
    )
    disk.fill()
    # its name, and what to do
    line = await system.logged(worker, "is full")
    assert str(disk.path) in line
    await system.logged(worker, "Nothing is offered")
    await system.logged(scheduler, "A worker is replaced:")
    alone = await system.reached(scheduler, lambda seen: len(seen.workers) == 1)
    await system.reached(scheduler, lambda seen: seen.round >= alone.round + 2)
    assert worker.process.poll() is None
    disk.make_space()
    await system.logged(worker, "There is space again")
    back = await system.reached(
        scheduler, lambda seen: len(seen.workers) == 2 and all(worker.batches for worker in seen.workers)
    )
    await system.reached(scheduler, lambda seen: seen.round >= back.round + 2)
    await system.stop_job(scheduler)

    _, ledger = system.ledger("worker")
    print(durations(ledger))
    assert ledger == check_ledger(system, "worker", len(ledger.rounds))
    parts = [{part.worker for part in entry.contributors} for entry in ledger.rounds]
    alone_at = next(number for number, part in enumerate(parts) if len(part) == 1)
    assert any(len(part) == 2 for part in parts[alone_at:]), "it should have come back"
    assert {entry.generation for entry in ledger.rounds} == {0}
    assert await system.replay("worker", small.job.dataset, None) <= 1e-5


async def test_the_parameter_servers_disk_is_full(small: Small) -> None:
    system, disk, server = small.system, small.disks["server-disk"], small.nodes["server"]
    name = ON_A_SMALL_DISK["name"]
    scheduler = await system.job(small.job(2, 8, name="server", parameter_server_executor=name))
    await phase_reached(TargetJob(system, scheduler), "worker", 1)
    disk.fill()
    line = await system.logged(server, "is full:")
    assert str(disk.path) in line
    await system.logged(scheduler, "The parameter server was lost (the disk of")
    # there is nobody else yet: the job waits, and is not given up
    await system.reached(scheduler, lambda seen: seen.parameter_server is None)
    await system.worker("other-server", executors=[ON_A_SMALL_DISK])
    assert await system.ended(scheduler) == 0, scheduler.tail()

    ledger = check_ledger(system, "server", 8)
    print(durations(ledger))
    assert {entry.generation for entry in counted(ledger)} == {0, 1}
    assert await system.replay("server", small.job.dataset, None, "server") <= 1e-5


async def test_the_schedulers_disk_is_full_even_when_it_is_started_again(small: Small) -> None:
    system, disk = small.system, small.disks["state-disk"]
    scheduler = await system.job(small.job(2, 8, name="state"), state_dir=str(disk.path))
    for struck in (1, 4):
        await system.reached(scheduler, lambda seen, struck=struck: seen.round >= struck)
        await stands_still(scheduler, disk, "state")
        if struck == 4:
            scheduler.process.kill()
            scheduler = await again(system, scheduler, "scheduler")
            await stands_still(scheduler, disk, "state")
        before = scheduler.log.read_text().count(GOES_ON)
        disk.make_space()
        await until(
            lambda scheduler=scheduler, before=before: scheduler.log.read_text().count(GOES_ON) > before,
            30.0,
            scheduler.tail,
        )
    assert await system.ended(scheduler) == 0, scheduler.tail()
    # tests look for ledgers where all others are
    (system.root / "state").mkdir(exist_ok=True)
    shutil.copytree(disk.path / "state", system.root / "state" / "state")
    ledger = check_ledger(system, "state", 8)
    print(durations(ledger))
    assert await system.replay("state", small.job.dataset, None, "state") <= 1e-5


async def stands_still(scheduler: Child, disk: Disk, job: str) -> None:
    """Whatever is deleted there, the disk is full until the scheduler says that it cannot go on."""
    text = STANDS_STILL.format(disk.path / job / "job.db")
    before = scheduler.log.read_text().count(text)

    def so() -> bool:
        disk.fill()
        return scheduler.log.read_text().count(text) > before

    await until(so, 60.0, scheduler.tail)


async def test_there_is_no_room_for_the_model(small: Small) -> None:
    system, disk = small.system, small.disks["output-disk"]
    made = small.job(1, 2, name="output")
    made["output"] = str(disk.path / "model")
    scheduler = await system.job(made)
    await phase_reached(TargetJob(system, scheduler), "worker", 0)
    disk.fill()
    assert await system.ended(scheduler) == 6
    assert f"publishing the model to {disk.path / 'model'} failed" in scheduler.tail()
    # nothing that looks like a model, and nothing left behind
    assert [path.name for path in disk.path.iterdir()] == ["filler"]
    disk.make_space()
    scheduler = await again(system, scheduler, "scheduler")
    assert await system.ended(scheduler) == 0, scheduler.tail()
    await until(lambda: (disk.path / "model" / "model.safetensors").is_file())
    check_ledger(system, "output", 2)

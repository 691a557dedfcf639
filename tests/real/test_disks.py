"""Disks that become full while a job trains: the owner is told, nothing half-written counts, it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.fault.conftest import SERVER_ONLY, TRAINING_ONLY, Job
from tests.support.disks import Disk, small_disks
from tests.support.faults import again, check_ledger, counted, durations, fail_at
from tests.support.polling import until
from tests.support.system import System

from hypha.cli.demo.children import Child

pytestmark = [pytest.mark.real, pytest.mark.fault, pytest.mark.timeout(300)]


STANDS_STILL = "The job stands still, as its ledger {} cannot be written"
GOES_ON = "can be written again"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Makes the job; its dataset is prepared."""
    return Job(tmp_path)


async def test_a_workers_disk_is_full_and_emptied_again(system: System, job: Job, tmp_path: Path) -> None:
    with small_disks(tmp_path, "small") as (disk,):
        await system.gateway()
        await system.data("data", job.dataset)
        await system.worker("server", **SERVER_ONLY)
        await system.worker("worker-0", **TRAINING_ONLY)
        keys = {"work_dir": str(disk.path / "work"), "cache": {"max_slices": 2}}
        small = await system.worker("worker-1", **TRAINING_ONLY, **keys)
        made = job(2, 40, min_workers=1)
        made["rounds"] |= {"deadline_s": 3.0, "quorum": 0.5, "grace_s": 1.0}
        scheduler = await system.scheduler(made)
        await system.reached(
            scheduler,
            lambda seen: len(seen.workers) == 2 and all(worker.samples for worker in seen.workers),
        )
        disk.fill()
        # its name, and what to do
        line = await system.logged(small, "is full")
        assert str(disk.path) in line
        await system.logged(small, "Nothing is offered")
        await system.logged(scheduler, "A worker is replaced:")
        alone = await system.reached(scheduler, lambda seen: len(seen.workers) == 1)
        await system.reached(scheduler, lambda seen: seen.round >= alone.round + 2)
        assert small.process.poll() is None
        disk.make_room()
        await system.logged(small, "There is room again")
        await system.reached(scheduler, lambda seen: len(seen.workers) == 2)
        assert await system.ended(scheduler) == 0, scheduler.tail()

    ledger = check_ledger(system, "job", 40)
    print(durations(ledger))
    parts = [{part.worker for part in entry.contributors} for entry in counted(ledger)]
    alone_at = next(number for number, part in enumerate(parts) if len(part) == 1)
    assert any(len(part) == 2 for part in parts[alone_at:]), "it should have come back"
    assert {entry.generation for entry in ledger.rounds} == {0}
    assert await system.replay("job", job.dataset, job.model) <= 1e-5


async def test_the_parameter_servers_disk_is_full(system: System, job: Job, tmp_path: Path) -> None:
    with small_disks(tmp_path, "small") as (disk,):
        await system.gateway()
        await system.data("data", job.dataset)
        server = await system.worker("server-0", **SERVER_ONLY, work_dir=str(disk.path / "work"))
        for number in range(2):
            await system.worker(f"worker-{number}", **TRAINING_ONLY)
        scheduler = await system.scheduler(job(2, 8))
        await fail_at(system, scheduler, "worker", 1, how="none")
        disk.fill()
        line = await system.logged(server, "is full")
        assert str(disk.path) in line
        await system.logged(scheduler, "The parameter server was lost (the disk of")
        # there is nobody else yet: the job waits, and is not given up
        await system.reached(scheduler, lambda seen: seen.parameter_server is None)
        await system.worker("server-1", **SERVER_ONLY)
        assert await system.ended(scheduler) == 0, scheduler.tail()

    ledger = check_ledger(system, "job", 8)
    print(durations(ledger))
    assert {entry.generation for entry in counted(ledger)} == {0, 1}
    assert await system.replay("job", job.dataset, job.model) <= 1e-5


async def test_the_schedulers_disk_is_full_even_when_it_is_started_again(
    system: System, job: Job, tmp_path: Path
) -> None:
    with small_disks(tmp_path, "state") as (disk,):
        await system.gateway()
        await system.data("data", job.dataset)
        await system.worker("server", **SERVER_ONLY)
        for number in range(2):
            await system.worker(f"worker-{number}", **TRAINING_ONLY)
        scheduler = await system.scheduler(job(2, 8))
        for struck in (1, 4):
            await system.reached(scheduler, lambda seen, struck=struck: seen.round >= struck)
            await stands_still(scheduler, disk)
            if struck == 4:
                scheduler.process.kill()
                scheduler = await again(system, scheduler, "scheduler")
                await stands_still(scheduler, disk)
            before = scheduler.log.read_text().count(GOES_ON)
            disk.make_room()
            await until(
                lambda scheduler=scheduler, before=before: scheduler.log.read_text().count(GOES_ON) > before,
                30.0,
                scheduler.tail,
            )
        assert await system.ended(scheduler) == 0, scheduler.tail()
        ledger = check_ledger(system, "job", 8)
        print(durations(ledger))
        assert await system.replay("job", job.dataset, job.model) <= 1e-5


async def stands_still(scheduler: Child, disk: Disk) -> None:
    """Whatever is deleted there, the disk is full until the scheduler says that it cannot go on."""
    before = scheduler.log.read_text().count(STANDS_STILL.format(disk.path / "job" / "job.db"))

    def so() -> bool:
        disk.fill()
        return scheduler.log.read_text().count(STANDS_STILL.format(disk.path / "job" / "job.db")) > before

    await until(so, 60.0, scheduler.tail)


async def test_there_is_no_room_for_the_model(system: System, job: Job, tmp_path: Path) -> None:
    with small_disks(tmp_path, "output") as (disk,):
        await system.gateway()
        await system.data("data", job.dataset)
        await system.worker("server", **SERVER_ONLY)
        await system.worker("worker-0", **TRAINING_ONLY)
        made = job(1, 2)
        made["output"] = str(disk.path / "model")
        scheduler = await system.scheduler(made)
        await fail_at(system, scheduler, "worker", 0, how="none")
        disk.fill()
        assert await system.ended(scheduler) == 6
        assert f"publishing the model to {disk.path / 'model'} failed" in scheduler.tail()
        # nothing that looks like a model, and nothing left behind
        assert [path.name for path in disk.path.iterdir()] == ["filler"]
        disk.make_room()
        scheduler = await again(system, scheduler, "scheduler")
        assert await system.ended(scheduler) == 0, scheduler.tail()
        await until(lambda: (disk.path / "model" / "model.safetensors").is_file())
    check_ledger(system, "job", 2)

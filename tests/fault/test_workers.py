"""Workers and their executors die or fall silent: the survivors' round is not lost, the job finishes."""

from __future__ import annotations

import pytest
from tests.fault.conftest import SERVER_ONLY, SHORT_LEASE, TRAINING_ONLY, Job
from tests.support.faults import (
    asleep,
    check_ledger,
    counted,
    durations,
    executors,
    fail_at,
    recover,
    slowdown_s,
)
from tests.support.system import System

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]


async def test_a_killed_worker_is_not_waited_for_and_is_replaced(system: System, job: Job) -> None:
    await system.gateway()
    await system.data("data", job.dataset)
    server = await system.worker("server", **SERVER_ONLY)
    for number in range(4):
        await system.worker(f"worker-{number}", **TRAINING_ONLY)
    rounds = 8
    scheduler = await system.scheduler(job(3, rounds, min_workers=2))
    # neither the first round nor the one after it: there nobody's pace is known yet
    fault = await fail_at(system, scheduler, "worker", 2)
    struck = fault.before.round
    await system.reached(scheduler, lambda seen: seen.round >= struck + 2)
    # however fast this machine is: there is a round left for the spare worker
    known = {one.peer for one in fault.before.workers}
    with asleep(*executors(server, "parameter_server")):
        await system.reached(
            scheduler,
            lambda seen: any(one.state == "waiting" and one.peer not in known for one in seen.workers),
        )
    assert await system.ended(scheduler) == 0, scheduler.tail()

    ledger = check_ledger(system, "job", rounds)
    print(durations(ledger))
    entries = counted(ledger)
    assert all(len(entry.contributors) >= 2 for entry in entries)
    # its lease would have lived for half a minute
    print(f"The survivors stood still for {slowdown_s(ledger, struck):.2f} s.")
    assert slowdown_s(ledger, struck) <= 2.0
    workers = {part.worker for entry in entries for part in entry.contributors}
    assert len(workers) == 4, "the spare worker never joined"
    assert await system.replay("job", job.dataset, job.model) <= 1e-5


async def test_killed_executors_are_started_again_or_replaced(system: System, job: Job) -> None:
    await system.gateway()
    await system.data("data", job.dataset)
    await system.worker("server-1", **SERVER_ONLY)
    for number in range(2):
        await system.worker(f"worker-{number}", **TRAINING_ONLY)
    scheduler = await system.scheduler(job(2, 8, min_workers=1))
    await fail_at(system, scheduler, "training-executor", 1, "updating")
    await system.logged(scheduler, "exit code -9")
    await system.reached(scheduler, lambda seen: len(seen.workers) == 2)
    await fail_at(system, scheduler, "parameter-server-executor", 3, "broadcasting")
    assert await system.ended(scheduler) == 0, scheduler.tail()

    ledger = check_ledger(system, "job", 8)
    print(durations(ledger))
    assert {entry.generation for entry in counted(ledger)} == {0, 1}
    assert await system.replay("job", job.dataset, job.model) <= 1e-5


async def test_a_stopped_worker_is_left_out_and_a_zombie_afterwards(system: System, job: Job) -> None:
    await system.gateway()
    await system.data("data", job.dataset)
    await system.worker("server", **SERVER_ONLY)
    for number in range(2):
        await system.worker(f"worker-{number}", **TRAINING_ONLY, **SHORT_LEASE)
    made = job(2, 12, min_workers=1)
    made["rounds"] |= {"deadline_s": 3.0, "grace_s": 1.0}
    scheduler = await system.scheduler(made)
    fault = await fail_at(system, scheduler, "worker", 2, how="stop")
    # nothing tells of it but silence: the deadline ends the round, or the lease
    await system.reached(scheduler, lambda seen: seen.round >= fault.before.round + 2)
    await system.logged(scheduler, "A lease was lost")
    zombie = await recover(system, fault)
    await system.logged(zombie, "A lease ended")
    assert await system.ended(scheduler) == 0, scheduler.tail()

    ledger = check_ledger(system, "job", 12)
    print(durations(ledger))
    print(f"The survivor stood still for {slowdown_s(ledger, fault.before.round):.2f} s.")
    assert await system.replay("job", job.dataset, job.model) <= 1e-5

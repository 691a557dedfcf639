"""The scheduler dies: within its leases the next one goes on with all that runs, later it begins anew."""

from __future__ import annotations

import pytest
from tests.fault.conftest import SERVER_ONLY, TRAINING_ONLY, Job
from tests.support.faults import again, check_ledger, counted, durations, executors, fail_at, recover
from tests.support.system import System

from hypha.cli.chaos.faults import TargetJob

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]


async def test_a_killed_scheduler_goes_on_at_once_and_resumes_after_its_leases_ended(
    system: System, job: Job
) -> None:
    await system.gateway()
    await system.data("data", job.dataset)
    # nobody has room for a second lease beside the first. On a busy machine the two schedulers that start
    # until the leases are renewed take ten seconds each
    tight = {"resources": {"cpu": 1, "memory": 2}, "offer": {"lease_s": 40.0}}
    nodes = [await system.worker("server", **SERVER_ONLY, **tight)]
    for number in range(2):
        nodes.append(await system.worker(f"worker-{number}", **TRAINING_ONLY, **tight))
    scheduler = await system.scheduler(job(2, 7))
    first = await fail_at(TargetJob(system, scheduler), "scheduler", 1, "updating", how="stop")
    # it is only asleep: a second one would write the same books
    second = await system.start("scheduler+beside", "scheduler", system.root / "scheduler.toml")
    assert await system.ended(second) == 1
    assert "another scheduler runs job job" in second.tail()
    await recover(system, first)
    modules = ["parameter_server", "training", "training"]
    running = [executors(*pair) for pair in zip(nodes, modules, strict=True)]
    assert all(running)
    scheduler.process.kill()
    scheduler = await again(system, scheduler, "scheduler")
    await system.logged(scheduler, "The job goes on with 3 leases")

    fault = await fail_at(TargetJob(system, scheduler), "scheduler", 4)
    assert fault.before.generation == 1
    assert [executors(*pair) for pair in zip(nodes, modules, strict=True)] == running, "the same go on"
    for node in nodes:
        await system.logged(node, "it was expired")
    scheduler = await recover(system, fault)
    assert await system.ended(scheduler) == 0, scheduler.tail()

    ledger = check_ledger(system, "job", 7)
    print(durations(ledger))
    # within the leases nothing is lost; the third life began when it was seen that they are over
    assert not any(entry.discarded for entry in ledger.rounds if entry.generation == 0)
    assert {entry.generation for entry in counted(ledger)} == {0, 1, 3}
    assert await system.replay("job", job.dataset, None) <= 1e-5

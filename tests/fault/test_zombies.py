"""The dead that were only asleep: what they say in the job's next life changes nothing."""

from __future__ import annotations

import pytest
from tests.fault.conftest import SERVER_ONLY, SHORT_LEASE, TRAINING_ONLY, Job
from tests.support.faults import check_ledger, counted, durations, fail_at, recover
from tests.support.system import System

from hypha.cli.chaos.faults import TargetJob

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]

#: more rounds than the job here lives to see: it is stopped
ENDLESS = 10_000


async def test_a_parameter_server_and_a_worker_wake_in_the_jobs_next_life(system: System, job: Job) -> None:
    await system.gateway()
    await system.data("data", job.dataset)
    await system.worker("server-1", **SERVER_ONLY, **SHORT_LEASE)
    for number in range(3):
        await system.worker(f"worker-{number}", **TRAINING_ONLY, **SHORT_LEASE)
    made = job(3, ENDLESS, min_workers=1)
    made["rounds"] |= {"deadline_s": 3.0, "grace_s": 1.0, "quorum": 0.5}
    scheduler = await system.scheduler(made)
    # without a checkpoint nothing of the first life would count
    await system.reached(scheduler, lambda seen: (seen.checkpoint or 0) >= 1)
    # a worker falls asleep within a round, the parameter server after it, perhaps while it sends theta
    worker = await fail_at(TargetJob(system, scheduler), "worker", 1, how="stop")
    server = await fail_at(
        TargetJob(system, scheduler), "parameter-server", worker.before.round, "broadcasting", how="stop"
    )
    await system.worker("server-2", **SERVER_ONLY, **SHORT_LEASE)
    await system.logged(scheduler, "The parameter server was lost")
    await system.reached(scheduler, lambda seen: seen.generation == 1 and seen.phase == "training")

    await recover(system, server)
    await recover(system, worker)
    for zombie in (server.node, worker.node):
        await system.logged(zombie, "A lease ended")
        await system.logged(zombie, "The executor ended")
    # whatever either of them had left to say
    await system.reached(
        scheduler,
        lambda seen: any(seen.refused.get(why) for why in ("no lease", "stale generation", "uninvited")),
    )
    await system.logged(server.node, "The scheduler wants no")
    woken = await system.status(scheduler)
    await system.reached(scheduler, lambda seen: seen.round >= woken.round + 2)
    await system.stop_job(scheduler)

    _, ledger = system.ledger("job")
    print(durations(ledger))
    check_ledger(system, "job", len(counted(ledger)))
    first = [entry.generation for entry in counted(ledger)]
    assert set(first) == {0, 1}
    assert first == sorted(first), "a round of the earlier life was applied in the next one"
    assert await system.replay("job", job.dataset, None) <= 1e-5

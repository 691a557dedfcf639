"""Executors hang, run out of memory and diverge; and workers come late. One network for all."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.fault.conftest import SERVER_ONLY, TRAINING_ONLY, Job
from tests.support.faults import check_ledger, counted, durations, executors, fail_at
from tests.support.system import System, keep_system, paced

from hypha.cli.chaos.faults import TargetJob
from hypha.worker.limits.cgroups import usable_cgroups

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]


#: more rounds than any job here lives to see: it is stopped
ENDLESS = 10_000
#: a training executor that one worker has. It is started, not forked, for it shall pay for its imports itself
ONLY_HERE = {"class": "train", "name": "only-here", "env": {"MALLOC_ARENA_MAX": "2"}}
#: one that each worker has: on one of them it takes more than its lease before it trains
GREEDY = "greedy"


def greedy(root: Path) -> dict[str, Any]:
    """See :mod:`tests.support.greedy`."""
    args = ["-m", "tests.support.greedy", "{SOCKET_PATH}"]
    env = {"GREEDY": str(root / GREEDY), "HYPHA_STEP_S": "0.015"}
    return {"class": "train", "name": GREEDY, "cmd": sys.executable, "args": args, "env": env}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[System, Job]]:
    """A gateway, a data node, a parameter server and two workers."""
    with keep_system(tmp_path_factory.mktemp("executors")) as system:
        job = Job(system.root)

        async def start() -> None:
            await system.gateway()
            await system.data("data", job.dataset)
            await system.worker("server", **SERVER_ONLY)
            own = TRAINING_ONLY["executors"]
            await system.worker("worker-0", executors=[*own, {**paced(0.015), "name": GREEDY}])
            await system.worker("worker-1", executors=[*own, ONLY_HERE, greedy(system.root)])

        trio.run(start)
        yield system, job


@pytest.fixture
async def system(network: tuple[System, Job]) -> AsyncIterator[System]:
    """The same network, whole."""
    system, _ = network
    yield system
    await system.settle()


@pytest.fixture
def job(network: tuple[System, Job]) -> Job:
    """Makes jobs for it."""
    return network[1]


async def test_a_stopped_executor_is_found_and_started_again_on_the_same_worker(
    system: System, job: Job
) -> None:
    made = job(2, 8, name="hangs", hang_s=6.0)
    # nobody else tells of it: it has to be found long before
    made["rounds"] |= {"deadline_s": 200.0}
    scheduler = await system.job(made)
    fault = await fail_at(TargetJob(system, scheduler), "training-executor", 2, how="stop")
    struck = {one.peer for one in fault.before.workers}
    # its round is not over without it: both are needed
    await system.logged(scheduler, "An executor is started again")
    assert "it hung: no sign of life for" in await system.logged(scheduler, "no sign of life")
    assert "exit code -9" in scheduler.log.read_text()
    await system.reached(scheduler, lambda seen: seen.round > fault.before.round)
    assert not set(fault.pids) & set(executors(fault.node, "training"))
    assert await system.ended(scheduler) == 0, scheduler.tail()

    ledger = check_ledger(system, "hangs", 8)
    print(durations(ledger))
    lives = {(part.worker, part.incarnation) for entry in counted(ledger) for part in entry.contributors}
    assert {worker for worker, _ in lives} == struck
    assert len(lives) == 3
    assert "A worker is replaced" not in scheduler.log.read_text()
    assert await system.replay("hangs", job.dataset, None, "hangs") <= 1e-5


async def test_an_executor_killed_for_want_of_memory_says_so(system: System, job: Job) -> None:
    if "memory" not in usable_cgroups():
        pytest.skip("no writable cgroup with the memory controller here")
    needs = {"cpu": 1, "memory": 0.1, "storage": 0, "gpu": 0}
    made = job(1, 2, name="memory", worker=needs, executor_restarts=1, worker_executor=ONLY_HERE["name"])
    scheduler = await system.job(made)
    assert await system.ended(scheduler) == 5, scheduler.tail()

    text = scheduler.log.read_text()
    assert text.count("An executor is started again") == 1
    assert "A worker is replaced" in text
    [worker] = [one for one in system.group.running if one.name == "worker-1"]
    for log in (text, worker.log.read_text()):
        assert "killed it for want of memory" in log
        assert "resources.worker.memory" in log
    assert "exit code -9" in scheduler.tail()


async def test_an_executor_that_takes_more_than_its_lease_is_stopped_and_the_job_goes_on(
    system: System, job: Job
) -> None:
    """It allocates, fills its quota and forks a thousand children, each in a life of its own, then it trains:
    meanwhile the other worker does, and both are in the last round.
    """
    needs = {"cpu": 1, "memory": 1.2, "storage": 0.05, "gpu": 0}
    wanted = {"worker": needs, "worker_executor": GREEDY, "executor_restarts": 3}
    scheduler = await system.job(
        job(2, ENDLESS, 960, name=GREEDY, min_workers=1, start_grace_s=0.5, **wanted)
    )
    await system.reached(
        scheduler, lambda seen: len(seen.workers) == 2 and all(one.batches for one in seen.workers)
    )
    there = await system.reached(scheduler, lambda seen: seen.round >= 2)
    await system.reached(scheduler, lambda seen: seen.round >= there.round + 2)
    await system.stop_job(scheduler)

    places = usable_cgroups()
    by_cgroup, forked = "memory" in places, "pids" in places
    texts = (
        "killed it for want of memory" if by_cgroup else "MemoryError",
        "disk quota exceeded: its files in the job directory take",
        "refused another process or thread" if forked else "processes and threads, and may have 512",
    )
    [worker] = [one for one in system.group.running if one.name == "worker-1"]
    for log in (scheduler.log.read_text(), worker.log.read_text()):
        for text in texts:
            assert text in log
        assert "nobody minded" not in log
    assert "A worker is replaced" not in scheduler.log.read_text()
    _, ledger = system.ledger(GREEDY)
    print(durations(ledger))
    crews = [len(entry.contributors) for entry in counted(ledger)]
    assert crews[0] == 1, "the other worker did not wait"
    assert crews[-1] == 2


async def test_training_that_diverges_ends_the_job_after_it_was_tried_again(system: System, job: Job) -> None:
    made = job(2, 4, name="diverges")
    made["inner_optimizer"] = {"learning_rate": 1e30}
    scheduler = await system.job(made)
    assert await system.ended(scheduler) == 5, scheduler.tail()

    log = scheduler.log.read_text()
    assert log.count("An executor is started again") == 2
    end = next(line for line in log.splitlines() if line.startswith("error:"))
    for text in (
        "training diverges, 3 times on 2 worker(s)",
        "the learning rate may be too high",
        "exit code 5",
    ):
        assert text in end
    assert "hypha.errors.NotFinite" in scheduler.tail(), "its last lines"


async def test_a_job_begins_with_few_workers_and_takes_in_who_comes_late(system: System, job: Job) -> None:
    scheduler = await system.job(job(3, ENDLESS, name="late", min_workers=2, start_grace_s=0.5))
    begun = await system.reached(scheduler, lambda seen: seen.round >= 1)
    assert len(begun.workers) == 2
    assert "looking for 1 more workers" in begun.message
    await system.worker("late", **TRAINING_ONLY)
    there = await system.reached(
        scheduler, lambda seen: all(one.batches for one in seen.workers) and len(seen.workers) == 3
    )
    await system.reached(scheduler, lambda seen: seen.round >= there.round + 2)
    await system.stop_job(scheduler)

    _, ledger = system.ledger("late")
    print(durations(ledger))
    assert ledger == check_ledger(system, "late", len(ledger.rounds))
    crews = [len(entry.contributors) for entry in ledger.rounds]
    assert crews[0] == 2
    assert crews[-1] == 3
    assert await system.replay("late", job.dataset, None) <= 1e-5

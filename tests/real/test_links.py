"""A link that is slowed down by the vocabulary of faults: nodes in namespaces of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.faults import counted, durations, fail_at, recover
from tests.support.namespaces import Lab, Star
from tests.support.system import System, digits_dataset, digits_job, leftovers, open_system

from hypha.cli.chaos.faults import TargetJob

pytestmark = [pytest.mark.real, pytest.mark.fault, pytest.mark.timeout(240)]

TRAIN = {"class": "train", "name": "diloco-transformer"}
AGGREGATE = {"class": "aggregate", "name": "parameter-server"}


@pytest.fixture
async def system(tmp_path: Path, lab: Lab) -> AsyncIterator[System]:
    """An empty network whose nodes will all have a cable of their own."""
    async with open_system(tmp_path, Star(lab)) as opened:
        yield opened
    assert leftovers(tmp_path) == []


async def prepare(system: System, workers: int) -> None:
    await system.gateway()
    await system.data("data", digits_dataset(system.root))
    await system.worker("server", executors=[AGGREGATE])
    for number in range(workers):
        await system.worker(f"worker-{number}", executors=[TRAIN])


async def test_a_slow_link_stretches_rounds_until_it_is_healed(system: System) -> None:
    await prepare(system, 2)
    scheduler = await system.scheduler(digits_job(None, 2, 12))
    fault = await fail_at(TargetJob(system, scheduler), "worker", 3, how="slow")
    seen = await system.reached(scheduler, lambda seen: seen.round >= fault.before.round + 3)
    await recover(system, fault)
    assert await system.ended(scheduler) == 0, scheduler.tail()
    _, ledger = system.ledger("job")
    print(durations(ledger))
    entries = counted(ledger)
    # theta to it and its update back have 0.3 MB each, and 100 kB/s are left of its line; on a busy machine a
    # round or two may be over before that is in force
    assert max(entry.duration_s for entry in entries[fault.before.round + 1 : seen.round]) > 3.0
    assert all(entry.duration_s < 3.0 for entry in entries[seen.round + 1 :])
    assert all(len(entry.contributors) == 2 for entry in entries)

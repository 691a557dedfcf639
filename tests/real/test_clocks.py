"""Wall clocks that jump by an hour, there and back: no lease, round, record or circuit cares."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.fault.conftest import SERVER_ONLY, TRAINING_ONLY, Job
from tests.support.clocks import Clock, clock_of
from tests.support.faults import check_ledger, durations
from tests.support.polling import until
from tests.support.system import System

from hypha.cli.local.children import Child
from hypha.pki.authority import make_node

pytestmark = [pytest.mark.real, pytest.mark.fault, pytest.mark.timeout(300)]

HOUR_S = 3600
LEASE = {"offer": {"lease_s": 8.0}}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Makes the job; its dataset is prepared."""
    return Job(tmp_path)


def hours_off(child: Child) -> float:
    """By how much the time of its newest log entry is wrong."""
    entry = json.loads(child.log.read_text().splitlines()[-1])
    moment = datetime.fromisoformat(entry["timestamp"].replace("Z", "+00:00"))
    return (moment - datetime.now(UTC)).total_seconds() / HOUR_S


async def test_every_clock_jumps_and_nothing_happens(system: System, job: Job) -> None:
    names = ("gateway", "data", "server", "worker-0", "worker-1", "scheduler")
    clocks: dict[str, Clock] = {name: clock_of(system, name) for name in names}
    nodes = {"gateway": await system.gateway(), "data": await system.data("data", job.dataset)}
    nodes["server"] = await system.worker("server", **SERVER_ONLY, **LEASE)
    for number in range(2):
        name = f"worker-{number}"
        # slices are fetched, and providers looked up, all the time
        nodes[name] = await system.worker(name, **TRAINING_ONLY, **LEASE, cache={"max_slices": 2})
    nodes["scheduler"] = scheduler = await system.scheduler(job(2, 16))
    for number, name in enumerate(names):
        seen = await system.reached(scheduler, lambda now, least=number + 1: now.round >= least)
        clocks[name].set(HOUR_S if number % 2 else -HOUR_S)
        await system.reached(scheduler, lambda now, seen=seen: now.round > seen.round)
        clocks[name].set(-HOUR_S if number % 2 else HOUR_S)
    # each lease has been renewed more than once since
    assert abs(hours_off(scheduler)) > 0.9, "its clock should be wrong"
    assert await system.ended(scheduler) == 0, scheduler.tail()

    ledger = check_ledger(system, "job", 16)
    print(durations(ledger))
    assert {entry.generation for entry in ledger.rounds} == {0}
    assert {len(entry.contributors) for entry in ledger.rounds} == {2}
    for node in nodes.values():
        text = node.log.read_text()
        for trouble in ("A lease was lost", "it was expired", "Cut the connection", "Traceback"):
            assert trouble not in text, f"{node.name}: {trouble}\n{node.tail()}"
    assert await system.replay("job", job.dataset, None) <= 1e-5


async def test_a_certificate_is_accepted_by_the_clock_and_refused_when_it_has_expired(system: System) -> None:
    clock = clock_of(system, "gateway")
    gateway = await system.gateway()
    make_node("late", system.ca, system.pki, roles=["worker"], days=1)
    clock.set(26 * HOUR_S)
    late = await system.worker("late")
    line = await system.logged(gateway, "expired")
    assert "late" in line or "certificate" in line
    assert gateway.process.poll() is None
    assert "The worker is connected" not in late.log.read_text()
    clock.set(HOUR_S)
    await system.logged(late, "The worker is connected")
    clock.set(-HOUR_S)
    await until(lambda: gateway.process.poll() is None)

"""Every role is killed, stopped and cut off, at each phase of a round: the job finishes by itself.

One job takes the five phases in turn, and one network a job each of kills, stops and cuts. Between two
strikes the job recovers: rounds are applied again by the wanted number of workers. A killed node is started
again at once, as systemd would; a stopped one goes on after a while, longer than its lease or shorter.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import get_args

import msgspec
import pytest
import trio
from blake3 import blake3
from tests.fault.conftest import SERVER_ONLY, Job
from tests.support.faults import Fault, check_ledger, counted, durations, fail_at, recover
from tests.support.namespaces import Star, open_lab
from tests.support.system import SMALL, System, leftovers, open_system, paced

from hypha.cli.chaos.faults import How, Phase, Role
from hypha.cli.demo.children import Child
from hypha.messages import LedgerRound

pytestmark = [pytest.mark.real, pytest.mark.fault, pytest.mark.timeout(600)]

WORKERS = 2
LEASE_S = 4.0
#: how long silence lasts, phase by phase: beyond the lease, and within the quarter that renewals leave of it
SILENT_S = dict(zip(get_args(Phase), (7.0, 0.8, 7.0, 0.8, 7.0), strict=True))
#: from the end of a fault to a round of all workers
RECOVERY_S = 90.0
#: a round of 45 batches for each worker takes more than a second and a third, however fast the machine is
PACE_S = 0.03
#: enough for four recoveries, which a new life makes short
ROUNDS: dict[Role, int] = {
    "worker": 26,
    "parameter-server": 12,
    "scheduler": 12,
    "data": 18,
    "gateway": 20,
}
#: whose loss is none for the training: nobody begins anew
_REPLACEABLE = ("worker", "data", "gateway")

ROLES: tuple[Role, ...] = ("worker", "parameter-server", "scheduler", "data", "gateway")
HOWS: tuple[How, ...] = ("kill", "stop", "cut")


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    """An empty network; to be cut off, each node has a cable of its own."""
    with open_lab() as lab:
        async with open_system(tmp_path, Star(lab)) as opened:
            yield opened
        assert leftovers(tmp_path) == []


async def _network(system: System, job: Job) -> None:
    """One gateway, one data node, one parameter server, ``WORKERS`` workers."""
    lease = {"offer": {"lease_s": LEASE_S}, "cache": {"max_slices": 2}}
    await system.gateway()
    await system.data("data", job.dataset)
    await system.worker("server", **SERVER_ONLY, **lease)
    for number in range(WORKERS):
        await system.worker(f"worker-{number}", executors=[paced(PACE_S)], **lease)


async def _scheduler(system: System, job: Job, how: How, rounds: int) -> Child:
    """The scheduler of a job that is called ``how``, and so is the model."""
    made = job(WORKERS, rounds, samples=1440, min_workers=1)
    made |= {"name": how, "output": str(system.root / how), "model": SMALL}
    made["rounds"] |= {"deadline_s": 4.0, "grace_s": 1.0}
    return await system.scheduler(made, name=f"scheduler-{how}")


def _applied(system: System, how: How, after: int) -> list[tuple[int, LedgerRound]]:
    """The rounds that the book of the running job got after its entry number ``after``."""
    with closing(sqlite3.connect(system.root / "state" / how / "job.db")) as db:
        rows = db.execute("SELECT number, entry FROM rounds WHERE number > ?", (after,)).fetchall()
    return [(number, msgspec.json.decode(entry, type=LedgerRound)) for number, entry in rows]


async def _recovered(system: System, scheduler: Child, fault: Fault, after: int) -> None:
    """All workers contributed to a round that began after the fault."""
    before = fault.before

    def whole(entry: LedgerRound) -> bool:
        later = entry.generation > before.generation or entry.round >= before.round + 2
        return later and len({part.worker for part in entry.contributors}) == WORKERS

    with trio.move_on_after(RECOVERY_S):
        while not any(whole(entry) for _, entry in _applied(system, fault.how, after)):
            if scheduler.process.poll() is not None:
                raise AssertionError(f"the scheduler ended too early:\n{scheduler.tail()}")
            await trio.sleep(0.05)
        return
    tails = "\n".join(f"{one.name}:\n{one.tail()}" for one in system.group.running)
    raise AssertionError(f"no recovery within {RECOVERY_S:g} s of {fault}\n{tails}")


async def _restored(system: System, scheduler: Child, fault: Fault) -> None:
    """The new parameter server holds the very bytes of the checkpoint, and of the ledger's last round."""
    seen = await system.reached(
        scheduler, lambda now: now.generation > fault.before.generation and now.theta != ""
    )
    saved = system.root / "state" / fault.how / "checkpoints" / f"round-{seen.round}" / "theta.safetensors"
    assert seen.theta == blake3(saved.read_bytes()).hexdigest()
    booked = [entry for _, entry in _applied(system, fault.how, 0) if entry.round == seen.round - 1]
    assert booked[-1].theta == seen.theta


async def _undo(system: System, fault: Fault, silent_s: float) -> Child:
    """Start it again at once, or end its silence after a while."""
    if fault.how != "kill":
        await trio.sleep(silent_s)
    return await recover(system, fault)


@pytest.mark.parametrize("role", ROLES)
async def test_jobs_survive(system: System, job: Job, role: Role) -> None:
    await _network(system, job)
    for how in HOWS:
        await _survives(system, job, role, how)


async def _survives(system: System, job: Job, role: Role, how: How) -> None:
    began = trio.current_time()
    scheduler = await _scheduler(system, job, how, ROUNDS[role])
    await system.reached(scheduler, lambda seen: (seen.checkpoint or 0) >= 1)
    print(f"{how}: the first round was over after {trio.current_time() - began:.1f} s.")
    for phase in get_args(Phase):
        fault = await fail_at(system, scheduler, role, 1, phase, how)
        after = max((number for number, _ in _applied(system, how, 0)), default=0)
        struck = trio.current_time()
        node = await _undo(system, fault, SILENT_S[phase])
        scheduler = node if role == "scheduler" else scheduler
        if (role, how) == ("parameter-server", "kill"):
            await _restored(system, scheduler, fault)
        if phase != "last-round":
            await _recovered(system, scheduler, fault, after)
        before = fault.before
        print(
            f"{phase}: {how} of {fault.node.name} in round {before.round} ({before.phase}), generation "
            f"{before.generation}; {trio.current_time() - struck:.1f} s"
        )
    struck = trio.current_time()
    assert await system.ended(scheduler) == 0, scheduler.tail()
    print(f"The end came {trio.current_time() - struck:.1f} s later.")

    ledger = check_ledger(system, how, ROUNDS[role])
    print(durations(ledger))
    if role in _REPLACEABLE:
        assert {entry.generation for entry in counted(ledger)} == {0}
    assert await system.replay(how, job.dataset, job.model, how) <= 1e-5

"""Every role is killed, stopped and cut off: the job finishes by itself.

``tests/simulation`` strikes every role in every way at every phase of a round. Here real processes are
killed, frozen and cut off once for each role and way, in one network and one job a role; the phases are
spread by a Latin square, so that each way meets each phase, and each role three of them. The full cross with
real processes is ``make fault``: a job for each role and way, the phases in turn.

Between two strikes the job recovers: rounds are applied again by the wanted number of workers. A killed node
is started again at once, as systemd would; a stopped one goes on after a while, longer than its lease or
shorter.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from typing import get_args

import msgspec
import pytest
import trio
from blake3 import blake3
from tests.fault.conftest import SERVER_ONLY, Job
from tests.support.faults import Phase, StruckNode, check_ledger, counted, durations, fail_at, recover
from tests.support.namespaces import Star, open_lab
from tests.support.system import System, keep_system, paced

from hypha.cli.chaos.faults import How, Role, TargetJob
from hypha.cli.local.children import Child
from hypha.messages import LedgerRound

WORKERS = 2
LEASE_S = 4.0
PHASES: tuple[Phase, ...] = get_args(Phase)
#: how long silence lasts, phase by phase: beyond the lease, and within the quarter that renewals leave of it
SILENT_S: dict[Phase, float] = dict(zip(PHASES, (7.0, 0.8, 7.0, 0.8, 7.0), strict=True))
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
#: at which phase the first role is struck so, and each further one a phase later; chosen so that each role is
#: silent for longer than its lease once
FIRST: dict[How, int] = {"kill": 4, "stop": 2, "cut": 3}


def _latin(role: Role) -> list[tuple[How, Phase]]:
    """When this role is struck how, in the order of the job: the last round comes last."""
    row = ROLES.index(role)
    strikes = [(how, PHASES[(row + first) % len(PHASES)]) for how, first in FIRST.items()]
    return sorted(strikes, key=lambda strike: strike[1] == "last-round")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[System, Job]]:
    """One gateway, one data node, one parameter server, ``WORKERS`` workers; to be cut off, each has a cable
    of its own.
    """
    root = tmp_path_factory.mktemp("matrix")
    lease = {"offer": {"lease_s": LEASE_S}, "cache": {"max_slices": 2}}
    with open_lab() as lab, keep_system(root, Star(lab)) as system:
        job = Job(root)

        async def start() -> None:
            await system.gateway()
            await system.data("data", job.dataset)
            await system.worker("server", **SERVER_ONLY, **lease)
            for number in range(WORKERS):
                await system.worker(f"worker-{number}", executors=[paced(PACE_S)], **lease)

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


async def _scheduler(system: System, job: Job, name: str, rounds: int) -> Child:
    """The scheduler of a job of that name, and so is the model called."""
    made = job(WORKERS, rounds, samples=1440, name=name, min_workers=1)
    made["rounds"] |= {"deadline_s": 4.0, "grace_s": 1.0}
    return await system.job(made)


def _applied(system: System, name: str, after: int) -> list[tuple[int, LedgerRound]]:
    """The rounds that the book of the running job got after its entry number ``after``."""
    with closing(sqlite3.connect(system.root / "state" / name / "job.db")) as db:
        rows = db.execute("SELECT number, entry FROM rounds WHERE number > ?", (after,)).fetchall()
    return [(number, msgspec.json.decode(entry, type=LedgerRound)) for number, entry in rows]


async def _recovered(system: System, scheduler: Child, name: str, fault: StruckNode, after: int) -> None:
    """All workers contributed to a round that began after the fault."""
    before = fault.before

    def whole(entry: LedgerRound) -> bool:
        later = entry.generation > before.generation or entry.round >= before.round + 2
        return later and len({part.worker for part in entry.contributors}) == WORKERS

    with trio.move_on_after(RECOVERY_S):
        while not any(whole(entry) for _, entry in _applied(system, name, after)):
            if scheduler.process.poll() is not None:
                raise AssertionError(f"the scheduler ended too early:\n{scheduler.tail()}")
            await trio.sleep(0.05)
        return
    tails = "\n".join(f"{one.name}:\n{one.tail()}" for one in system.group.running)
    raise AssertionError(f"no recovery within {RECOVERY_S:g} s of {fault}\n{tails}")


async def _restored(system: System, scheduler: Child, name: str, fault: StruckNode) -> None:
    """The new parameter server holds the very bytes of the checkpoint, and of the ledger's last round."""
    seen = await system.reached(
        scheduler, lambda now: now.generation > fault.before.generation and now.theta != ""
    )
    saved = system.root / "state" / name / "checkpoints" / f"round-{seen.round}" / "theta.safetensors"
    assert seen.theta == blake3(saved.read_bytes()).hexdigest()
    booked = [entry for _, entry in _applied(system, name, 0) if entry.round == seen.round - 1]
    assert booked[-1].theta == seen.theta


async def _undo(system: System, fault: StruckNode, silent_s: float) -> Child:
    """Start it again at once, or end its silence after a while."""
    if fault.how != "kill":
        await trio.sleep(silent_s)
    return await recover(system, fault)


def test_a_latin_square_has_each_way_at_each_phase() -> None:
    struck = {(how, phase) for role in ROLES for how, phase in _latin(role)}
    assert struck == {(how, phase) for how in HOWS for phase in PHASES}
    for role in ROLES:
        assert len({phase for _, phase in _latin(role)}) == len(HOWS)
        assert any(how != "kill" and SILENT_S[phase] > LEASE_S for how, phase in _latin(role))


@pytest.mark.real
@pytest.mark.fault
@pytest.mark.timeout(400)
@pytest.mark.parametrize("role", ROLES)
async def test_a_job_survives_one_strike_of_each_way(system: System, job: Job, role: Role) -> None:
    await _survives(system, job, role, role, _latin(role))


@pytest.mark.cross
@pytest.mark.timeout(600)
@pytest.mark.parametrize("role", ROLES)
async def test_jobs_survive_every_strike(system: System, job: Job, role: Role) -> None:
    for how in HOWS:
        await _survives(system, job, role, f"{how}-{role}", [(how, phase) for phase in PHASES])


async def _survives(
    system: System, job: Job, role: Role, name: str, strikes: Sequence[tuple[How, Phase]]
) -> None:
    """A job of that name finishes, struck so; its model is what its ledger says."""
    began = trio.current_time()
    rounds = ROUNDS[role] if len(strikes) == len(PHASES) else ROUNDS[role] * len(strikes) // len(PHASES) + 3
    scheduler = await _scheduler(system, job, name, rounds)
    await system.reached(scheduler, lambda seen: (seen.checkpoint or 0) >= 1)
    print(f"{name}: the first round was over after {trio.current_time() - began:.1f} s.")
    for how, phase in strikes:
        fault = await fail_at(TargetJob(system, scheduler), role, 1, phase, how)
        after = max((number for number, _ in _applied(system, name, 0)), default=0)
        struck = trio.current_time()
        node = await _undo(system, fault, SILENT_S[phase])
        scheduler = node if role == "scheduler" else scheduler
        if (role, how) == ("parameter-server", "kill"):
            await _restored(system, scheduler, name, fault)
        if phase != "last-round":
            await _recovered(system, scheduler, name, fault, after)
        before = fault.before
        print(
            f"{phase}: {how} of {fault.node.name} in round {before.round} ({before.phase}), generation "
            f"{before.generation}; {trio.current_time() - struck:.1f} s"
        )
    struck = trio.current_time()
    assert await system.ended(scheduler) == 0, scheduler.tail()
    print(f"The end came {trio.current_time() - struck:.1f} s later.")

    ledger = check_ledger(system, name, rounds)
    print(durations(ledger))
    if role in _REPLACEABLE:
        assert {entry.generation for entry in counted(ledger)} == {0}
    assert await system.replay(name, job.dataset, None, name) <= 1e-5

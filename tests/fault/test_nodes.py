"""Workers, executors, parameter servers, data nodes and gateways die: the survivors' round is not lost, and
the job goes on by itself.

One network for all: two of each kind of node, four workers, and more of everybody than a job asks for. What
dies in one test is there again in the next.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from blake3 import blake3
from tests.fault.conftest import SERVER_ONLY, TRAINING_ONLY, Job
from tests.support.faults import (
    asleep,
    candidates,
    check_ledger,
    counted,
    durations,
    executors,
    fail_at,
    recover,
    slowdown_s,
)
from tests.support.polling import until
from tests.support.system import System, keep_system

from hypha.cli.chaos.faults import TargetJob
from hypha.cli.local.children import Child
from hypha.cli.local.network import base
from hypha.naming import shown

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]

#: more rounds than any job here lives to see: it is stopped
ENDLESS = 10_000


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[System, Job]]:
    """Two gateways that know each other, two data nodes, two parameter servers, four workers."""
    with keep_system(tmp_path_factory.mktemp("nodes")) as system:
        job = Job(system.root)

        async def start() -> None:
            planned = {name: system.plan_gateway(name) for name in ("gateway-1", "gateway-2")}
            for number, (name, keys) in enumerate(planned.items()):
                others = {"gateway_addresses": [system.gateways[1 - number]]}
                # everybody takes the first one that answers
                await system.logged_value(await system.gateway(name, {**keys, **others}), "addresses")
            for name in ("data-1", "data-2"):
                await system.data(name, job.dataset)
            for number in range(2):
                await system.worker(f"server-{number}", **SERVER_ONLY)
            for number in range(4):
                # few slices are kept, so that data nodes matter; a file takes the machine away
                await system.worker(
                    f"worker-{number}",
                    **TRAINING_ONLY,
                    cache={"max_slices": 2},
                    preemption={"notice_s": 10.0, "file": notice_of(system, number), "poll_s": 0.5},
                )

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


def notice_of(system: System, number: int) -> str:
    """The file by which ``worker-<number>`` learns that its machine is taken away."""
    return str(system.root / f"notice-{number}")


def alive(system: System, kind: str) -> list[Child]:
    """The running nodes whose names begin with ``kind``."""
    running = (one for one in system.group.running if one.process.poll() is None)
    return [one for one in running if base(one.name).startswith(f"{kind}-")]


async def test_a_killed_worker_is_not_waited_for_and_is_replaced(system: System, job: Job) -> None:
    rounds = 8
    scheduler = await system.job(job(3, rounds, name="worker", min_workers=2))
    # neither the first round nor the one after it: there nobody's pace is known yet
    fault = await fail_at(TargetJob(system, scheduler), "worker", 2)
    struck = fault.before.round
    await system.reached(scheduler, lambda seen: seen.round >= struck + 2)
    # however fast this machine is: there is a round left for the spare worker
    known = {one.peer for one in fault.before.workers}
    [server] = candidates(TargetJob(system, scheduler), "parameter-server", fault.before)
    with asleep(*executors(server, "parameter_server")):
        await system.reached(
            scheduler,
            # on a busy machine it has begun before the parameter server fell asleep
            lambda seen: any(one.state != "loading" and one.peer not in known for one in seen.workers),
        )
    assert await system.ended(scheduler) == 0, scheduler.tail()

    ledger = check_ledger(system, "worker", rounds)
    print(durations(ledger))
    entries = counted(ledger)
    assert all(len(entry.contributors) >= 2 for entry in entries)
    # its lease would have lived for half a minute
    print(f"The survivors stood still for {slowdown_s(ledger, struck):.2f} s.")
    assert slowdown_s(ledger, struck) <= 2.0
    workers = {part.worker for entry in entries for part in entry.contributors}
    assert len(workers) == 4, "the spare worker never joined"
    assert await system.replay("worker", job.dataset, None, "worker") <= 1e-5


async def test_a_machine_that_is_taken_away_with_notice_loses_nothing_that_it_trained(
    system: System, job: Job
) -> None:
    """Ten seconds of notice, in rounds of four: its part of the round in which it goes is in the ledger,
    another worker is there before it is gone, and nobody waits for a lease to expire.
    """
    rounds = 6
    scheduler = await system.job(job(3, rounds, samples=12_800, name="spot", min_workers=2))
    await system.reached(scheduler, lambda seen: seen.round == 1 and all(one.batches for one in seen.workers))
    seen = await system.status(scheduler)
    leased = {one.peer for one in seen.held if one.kind == "train"}
    number = next(one for one in range(4) if system.peer_id(f"worker-{one}", "worker") in leased)
    worker = next(one for one in alive(system, "worker") if base(one.name) == f"worker-{number}")
    peer = system.peer_id(f"worker-{number}", "worker")
    told = trio.current_time()
    Path(notice_of(system, number)).touch()
    await system.reached(scheduler, lambda seen: any(one.state == "leaving" for one in seen.workers))
    await system.logged(scheduler, "A lease is given back: its worker leaves")
    assert trio.current_time() - told <= 10.0
    assert await system.ended(worker, timeout_s=15.0) == 0, worker.tail()
    print(f"The worker ended {trio.current_time() - told:.1f} s after the notice.")
    Path(notice_of(system, number)).unlink()
    left_in = (await system.status(scheduler)).round
    after = await system.reached(scheduler, lambda seen: seen.round > left_in)
    assert await system.ended(scheduler) == 0, scheduler.tail()

    # of the time of three places, in the rounds from the notice on, next to nothing was for nothing
    assert seen.goodput is not None
    assert after.goodput is not None
    reasons = ("failure", "replayed", "allocating", "loading")
    lost_s = sum(after.goodput.badput_s[reason] - seen.goodput.badput_s[reason] for reason in reasons)
    share = lost_s / (after.goodput.places * (after.goodput.wall_s - seen.goodput.wall_s))
    print(f"Goodput loss: {share:.1%}.")
    assert share < 0.03
    assert not after.refused.get("lost samples")

    ledger = check_ledger(system, "spot", rounds)
    print(durations(ledger))
    entries = counted(ledger)
    parts = {entry.round: {part.worker: part for part in entry.contributors} for entry in entries}
    last = max(round_ for round_, inside in parts.items() if peer in inside)
    # a round may be over between its last update and the end of its process
    assert last in (left_in - 1, left_in)
    assert all(peer in parts[round_] for round_ in range(last))
    everybody = {one for inside in parts.values() for one in inside}
    assert len(everybody) == 4, "nobody has taken its place"
    text = scheduler.log.read_text()
    assert "expired" not in text
    assert "A lease was lost" not in text
    assert await system.replay("spot", job.dataset, None, "spot") <= 1e-5


async def test_killed_executors_are_started_again_or_replaced(system: System, job: Job) -> None:
    scheduler = await system.job(job(2, 8, name="executors", min_workers=1))
    await fail_at(TargetJob(system, scheduler), "training-executor", 1, "updating")
    await system.logged(scheduler, "exit code -9")
    await system.reached(scheduler, lambda seen: len(seen.workers) == 2)
    await fail_at(TargetJob(system, scheduler), "parameter-server-executor", 3, "broadcasting")
    assert await system.ended(scheduler) == 0, scheduler.tail()

    ledger = check_ledger(system, "executors", 8)
    print(durations(ledger))
    assert {entry.generation for entry in counted(ledger)} == {0, 1}
    assert await system.replay("executors", job.dataset, None, "executors") <= 1e-5


async def test_a_killed_parameter_server_is_restored_elsewhere(system: System, job: Job) -> None:
    made = job(2, 6, name="server")
    made["checkpoint"] = {"every_rounds": 2}
    scheduler = await system.job(made)
    fault = await fail_at(TargetJob(system, scheduler), "parameter-server", 3, "updating")
    struck = trio.current_time()
    workers = alive(system, "worker")
    trainers = [executors(worker, "training") for worker in workers]
    assert sum(map(len, trainers)) == 2
    restored = await system.reached(scheduler, lambda seen: seen.generation == 1 and seen.theta != "")
    print(f"The parameter server was back after {trio.current_time() - struck:.1f} s.")
    saved = system.root / "state" / "server" / "checkpoints" / f"round-{restored.round}" / "theta.safetensors"
    assert restored.theta == blake3(saved.read_bytes()).hexdigest()
    assert restored.parameter_server != fault.before.parameter_server
    await system.reached(scheduler, lambda seen: seen.round > restored.round)
    assert [executors(worker, "training") for worker in workers] == trainers, "nobody else starts anew"
    assert await system.ended(scheduler) == 0, scheduler.tail()

    ledger = check_ledger(system, "server", 6)
    print(durations(ledger))
    lost = [entry.round for entry in ledger.rounds if entry.discarded]
    assert lost == list(range(restored.round, fault.before.round))
    [last] = [entry for entry in ledger.rounds if entry.round == restored.round - 1 and not entry.generation]
    assert last.theta == restored.theta
    assert "another theta" not in scheduler.log.read_text()
    assert await system.replay("server", job.dataset, None, "server") <= 1e-5


async def test_deaths_while_theta_is_under_way_and_before_the_model_is_exported(
    system: System, job: Job
) -> None:
    scheduler = await system.job(job(3, 5, name="theta", min_workers=2))
    worker = await fail_at(TargetJob(system, scheduler), "worker", 1, "broadcasting")
    server = await fail_at(TargetJob(system, scheduler), "parameter-server", 4, "broadcasting")
    assert await system.ended(scheduler) == 0, scheduler.tail()
    assert server.before.round == 4

    ledger = check_ledger(system, "theta", 5)
    print(durations(ledger))
    after = next(entry for entry in counted(ledger) if entry.round == worker.before.round + 1)
    assert after.duration_s < 10.0
    assert await system.replay("theta", job.dataset, None, "theta") <= 1e-5


async def test_data_nodes_die_one_after_the_other_and_return(system: System, job: Job) -> None:
    scheduler = await system.job(job(2, 8, name="data"))
    await system.reached(scheduler, lambda seen: seen.providers == 2)
    fault = await fail_at(TargetJob(system, scheduler), "data", 1, name="data-1")
    await system.reached(scheduler, lambda seen: seen.round >= fault.before.round + 2)
    last = await fail_at(TargetJob(system, scheduler), "data", 3, name="data-2")
    await system.reached(scheduler, lambda seen: "no data node serves" in seen.message)
    paused = await system.status(scheduler)
    await system.logged(await recover(system, last), "listening on")
    back = trio.current_time()
    await system.reached(scheduler, lambda seen: seen.round > paused.round)
    print(f"Training went on {trio.current_time() - back:.1f} s after the data node was back.")
    assert await system.ended(scheduler) == 0, scheduler.tail()

    ledger = check_ledger(system, "data", 8)
    print(durations(ledger))
    assert {entry.generation for entry in ledger.rounds} == {0}
    assert await system.replay("data", job.dataset, None, "data") <= 1e-5


async def test_all_gateways_die_and_one_of_them_returns(system: System, job: Job) -> None:
    scheduler = await system.job(job(2, ENDLESS, name="gateways", min_workers=1))
    for name in ("gateway-1", "gateway-2"):
        gateway = await fail_at(TargetJob(system, scheduler), "gateway", 1, name=name)
    # a worker is missed, and nobody is there to pass the request for another one on
    worker = await fail_at(TargetJob(system, scheduler), "worker", 2)
    await system.logged(scheduler, "Looking for 1 more workers")
    # those who are connected go on by themselves
    await system.reached(scheduler, lambda seen: seen.round >= worker.before.round + 2)
    line = f"Connected to gateway {shown(system.peer_id('gateway-2', 'gateway'), 'gateway-2')}"
    nodes = [*alive(system, "server"), *alive(system, "worker"), scheduler]
    before = {node.name: node.log.read_text().count(line) for node in nodes}
    await recover(system, gateway)
    back = trio.current_time()
    known = {one.peer for one in worker.before.workers}
    await system.reached(
        scheduler, lambda seen: any(one.batches and one.peer not in known for one in seen.workers)
    )
    print(f"The spare worker trained {trio.current_time() - back:.1f} s after the gateway was back.")
    for node in nodes:
        await until(lambda node=node: node.log.read_text().count(line) > before[node.name], 60.0, node.tail)
    await system.stop_job(scheduler)

    _, ledger = system.ledger("gateways")
    print(durations(ledger))
    assert ledger == check_ledger(system, "gateways", len(ledger.rounds))
    assert {entry.generation for entry in ledger.rounds} == {0}
    assert await system.replay("gateways", job.dataset, None) <= 1e-5

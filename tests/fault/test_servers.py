"""The parameter server, the scheduler, data nodes and the gateway die: the job goes on by itself."""

from __future__ import annotations

import os

import pytest
import trio
from blake3 import blake3
from tests.fault.conftest import SERVER_ONLY, TRAINING_ONLY, Job
from tests.support.faults import again, check_ledger, counted, durations, executors, fail_at, recover
from tests.support.polling import until
from tests.support.system import System

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]


async def test_a_killed_parameter_server_is_restored_elsewhere(system: System, job: Job) -> None:
    await system.gateway()
    await system.data("data", job.dataset)
    workers = []
    for number in range(2):
        await system.worker(f"server-{number}", **SERVER_ONLY)
        workers.append(await system.worker(f"worker-{number}", **TRAINING_ONLY))
    made = job(2, 6)
    made["checkpoint"] = {"every_rounds": 2}
    scheduler = await system.scheduler(made)
    fault = await fail_at(system, scheduler, "parameter-server", 3, "updating")
    struck = trio.current_time()
    trainers = [executors(worker, "training") for worker in workers]
    restored = await system.reached(scheduler, lambda seen: seen.generation == 1 and seen.theta != "")
    print(f"The parameter server was back after {trio.current_time() - struck:.1f} s.")
    saved = system.root / "state" / "job" / "checkpoints" / f"round-{restored.round}" / "theta.safetensors"
    assert restored.theta == blake3(saved.read_bytes()).hexdigest()
    assert restored.parameter_server != fault.before.parameter_server
    await system.reached(scheduler, lambda seen: seen.round > restored.round)
    assert [executors(worker, "training") for worker in workers] == trainers, "nobody else starts anew"
    assert await system.ended(scheduler) == 0, scheduler.tail()

    ledger = check_ledger(system, "job", 6)
    print(durations(ledger))
    lost = [entry.round for entry in ledger.rounds if entry.discarded]
    assert lost == list(range(restored.round, fault.before.round))
    [base] = [entry for entry in ledger.rounds if entry.round == restored.round - 1 and not entry.generation]
    assert base.theta == restored.theta
    assert "another theta" not in scheduler.log.read_text()
    assert await system.replay("job", job.dataset, job.model) <= 1e-5


async def test_deaths_while_theta_is_under_way_and_before_the_model_is_exported(
    system: System, job: Job
) -> None:
    await system.gateway()
    await system.data("data", job.dataset)
    for number in range(2):
        await system.worker(f"server-{number}", **SERVER_ONLY)
    for number in range(3):
        await system.worker(f"worker-{number}", **TRAINING_ONLY)
    scheduler = await system.scheduler(job(3, 5, min_workers=2))
    worker = await fail_at(system, scheduler, "worker", 1, "broadcasting")
    server = await fail_at(system, scheduler, "parameter-server", 4, "broadcasting")
    assert await system.ended(scheduler) == 0, scheduler.tail()
    assert server.before.round == 4

    ledger = check_ledger(system, "job", 5)
    print(durations(ledger))
    after = next(entry for entry in counted(ledger) if entry.round == worker.before.round + 1)
    assert after.duration_s < 10.0
    assert await system.replay("job", job.dataset, job.model) <= 1e-5


async def test_a_killed_scheduler_goes_on_at_once_and_resumes_after_its_leases_ended(
    system: System, job: Job
) -> None:
    await system.gateway()
    await system.data("data", job.dataset)
    # nobody has room for a second lease beside the first
    tight = {"resources": {"cpu": 1, "memory": 2}, "offer": {"lease_s": 40.0}}
    nodes = [await system.worker("server", **SERVER_ONLY, **tight)]
    for number in range(2):
        nodes.append(await system.worker(f"worker-{number}", **TRAINING_ONLY, **tight))
    scheduler = await system.scheduler(job(2, 7))
    first = await fail_at(system, scheduler, "scheduler", 1, "updating", how="stop")
    # it is only asleep: a second one would write the same books
    second = await system.start("scheduler+beside", "scheduler", system.root / "scheduler.toml")
    assert await system.ended(second) == 1
    assert "another scheduler runs job job" in second.tail()
    modules = ["parameter_server", "training", "training"]
    running = [executors(*pair) for pair in zip(nodes, modules, strict=True)]
    assert all(running)
    os.kill(first.pids[0], 9)
    scheduler = await again(system, scheduler, "scheduler")
    await system.logged(scheduler, "Going on with 3 leases")

    fault = await fail_at(system, scheduler, "scheduler", 4)
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
    assert await system.replay("job", job.dataset, job.model) <= 1e-5


async def test_data_nodes_die_one_after_the_other_and_return(system: System, job: Job) -> None:
    await system.gateway()
    await system.data("data", job.dataset)
    await system.data("data-2", job.dataset)
    cache = {"cache": {"max_slices": 2}}
    await system.worker("server", **SERVER_ONLY)
    for number in range(2):
        await system.worker(f"worker-{number}", **TRAINING_ONLY, **cache)
    scheduler = await system.scheduler(job(2, 8))
    await system.reached(scheduler, lambda seen: seen.providers == 2)
    fault = await fail_at(system, scheduler, "data", 1)
    await system.reached(scheduler, lambda seen: seen.round >= fault.before.round + 2)
    last = await fail_at(system, scheduler, "data", 3, name="data-2")
    await system.reached(scheduler, lambda seen: "no data node serves" in seen.message)
    paused = await system.status(scheduler)
    await system.logged(await recover(system, last), "listening on")
    back = trio.current_time()
    await system.reached(scheduler, lambda seen: seen.round > paused.round)
    print(f"Training went on {trio.current_time() - back:.1f} s after the data node was back.")
    assert await system.ended(scheduler) == 0, scheduler.tail()

    ledger = check_ledger(system, "job", 8)
    print(durations(ledger))
    assert {entry.generation for entry in ledger.rounds} == {0}
    assert await system.replay("job", job.dataset, job.model) <= 1e-5


async def test_a_worker_dies_while_the_only_gateway_is_down(system: System, job: Job) -> None:
    await system.gateway()
    await system.data("data", job.dataset)
    await system.worker("server", **SERVER_ONLY)
    for number in range(3):
        await system.worker(f"worker-{number}", **TRAINING_ONLY)
    # long enough for the spare worker's pauses between its attempts to reach the gateway
    scheduler = await system.scheduler(job(2, 30, min_workers=1))
    gateway = await fail_at(system, scheduler, "gateway", 1)
    worker = await fail_at(system, scheduler, "worker", 2)
    # those who are connected go on by themselves
    await system.reached(scheduler, lambda seen: seen.round >= worker.before.round + 2)
    await recover(system, gateway)
    back = trio.current_time()
    known = {one.peer for one in worker.before.workers}
    await system.reached(scheduler, lambda seen: bool({one.peer for one in seen.workers} - known))
    print(f"The spare worker was taken {trio.current_time() - back:.1f} s after the gateway was back.")
    assert await system.ended(scheduler) == 0, scheduler.tail()

    print(durations(check_ledger(system, "job", 30)))
    assert await system.replay("job", job.dataset, job.model) <= 1e-5


async def test_all_gateways_die_and_one_of_them_returns(system: System, job: Job) -> None:
    planned = {name: system.plan_gateway(name) for name in ("gateway-1", "gateway-2")}
    for number, (name, keys) in enumerate(planned.items()):
        gateway = await system.gateway(name, {**keys, "gateway_addresses": [system.gateways[1 - number]]})
        # everybody takes the first one that answers
        await system.said(gateway, "addresses")
    await system.data("data", job.dataset)
    nodes = [await system.worker("server", **SERVER_ONLY)]
    for number in range(3):
        nodes.append(await system.worker(f"worker-{number}", **TRAINING_ONLY))
    scheduler = await system.scheduler(job(2, 24, min_workers=1))
    gateways = [
        await fail_at(system, scheduler, "gateway", 1, name=name) for name in ("gateway-1", "gateway-2")
    ]
    # a worker is missed, and nobody is there to pass the request for another one on
    worker = await fail_at(system, scheduler, "worker", 2)
    await system.logged(scheduler, "Looking for 1 more workers")
    await system.reached(scheduler, lambda seen: seen.round >= worker.before.round + 2)
    await recover(system, gateways[1])
    back = trio.current_time()
    known = {one.peer for one in worker.before.workers}
    await system.reached(scheduler, lambda seen: bool({one.peer for one in seen.workers} - known))
    print(f"The spare worker was taken {trio.current_time() - back:.1f} s after the gateway was back.")
    second = system.peer_id("gateway-2", "gateway")
    for node in (one for one in (*nodes, scheduler) if one is not worker.node):
        line = f"Connected to gateway {second}"
        await until(lambda node=node, line=line: line in node.log.read_text(), 60.0, node.tail)
    assert await system.ended(scheduler) == 0, scheduler.tail()

    ledger = check_ledger(system, "job", 24)
    print(durations(ledger))
    assert {entry.generation for entry in ledger.rounds} == {0}
    assert await system.replay("job", job.dataset, job.model) <= 1e-5

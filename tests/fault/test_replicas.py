"""The scheduler's disk is lost along with it: the job goes on from the copies that workers keep."""

from __future__ import annotations

import re
import shutil
from contextlib import closing

import pytest
from blake3 import blake3
from tests.fault.conftest import SERVER_ONLY, TRAINING_ONLY, Job
from tests.support.faults import again, check_ledger, counted, durations
from tests.support.polling import until
from tests.support.system import System

from hypha.cli.local.children import Child
from hypha.cli.local.network import JOB_S
from hypha.messages import CheckpointIndex
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.durable.replicas import GENERATIONS_SKIPPED

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]

STORAGE = {"storage": {"checkpoints_gb": 1}}


async def killed_with_a_copy(system: System, scheduler: Child, after: int) -> tuple[str, CheckpointIndex]:
    """Kill the scheduler when a checkpoint beyond round ``after`` was copied; who has what."""
    wanted = re.compile(
        rf"keeps a copy of the checkpoint for round ({'|'.join(map(str, range(after + 1, 9)))})\b"
    )
    await until(lambda: wanted.search(scheduler.log.read_text()), JOB_S, scheduler.tail)
    scheduler.process.kill()
    await scheduler.process.wait()
    with closing(Ledger(system.root / "state" / "job" / "job.db")) as ledger:
        holder, index = ledger.replicas()[0]
    assert index.round > after
    return holder.peer, index


async def test_what_the_scheduler_kept_is_damaged_and_then_gone(system: System, job: Job) -> None:
    await system.gateway()
    await system.data("data", job.dataset)
    nodes = {
        name: await system.worker(name, **STORAGE, **(SERVER_ONLY if name == "server" else TRAINING_ONLY))
        for name in ("server", "worker-0", "worker-1")
    }
    peers = {system.peer_id(name, "worker"): name for name in nodes}
    state = system.root / "state"
    made = job(2, 8)
    made["checkpoint"] = {"every_rounds": 1, "keep": 2, "replicas": 1}
    scheduler = await system.scheduler(made)

    def theta_of(holder: str, index: CheckpointIndex) -> str:
        place = system.root / f"work-{peers[holder]}" / "checkpoints" / index.job_id
        return blake3((place / f"round-{index.round}" / "theta.safetensors").read_bytes()).hexdigest()

    holder, index = await killed_with_a_copy(system, scheduler, 1)
    assert peers[holder] != "server", "it would be lost along with the parameter server"
    saved = {index.round: theta_of(holder, index)}
    # a parameter server that lives needs no checkpoint
    nodes["server"].process.kill()
    for path in (state / "job" / "checkpoints").glob("round-*/theta.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    nodes["server"] = await again(system, nodes["server"], "worker")
    scheduler = await again(system, scheduler, "scheduler")
    await system.logged(scheduler, f"The checkpoint for round {index.round} was lost here")

    holder, index = await killed_with_a_copy(system, scheduler, index.round)
    saved[index.round] = theta_of(holder, index)
    # its worker is another process, at another address, by the time that it is asked
    node = nodes[peers[holder]]
    node.process.kill()
    shutil.rmtree(state)
    await again(system, node, "worker")
    scheduler = await again(system, scheduler, "scheduler")
    await system.logged(scheduler, "There is no ledger in")
    await system.logged(scheduler, f"The job goes on from round {index.round}")
    assert await system.ended(scheduler) == 0, scheduler.tail()

    ledger = check_ledger(system, "job", 8)
    print(durations(ledger))
    thetas = {entry.round + 1: entry.theta for entry in counted(ledger)}
    assert {round_: thetas[round_] for round_ in saved} == saved, "not what was saved, bit by bit"
    assert "another theta" not in scheduler.log.read_text()
    since = [entry for entry in counted(ledger) if entry.round >= index.round]
    assert min(entry.generation for entry in since) > GENERATIONS_SKIPPED
    assert await system.replay("job", job.dataset, None) <= 1e-5
    assert list(system.root.glob("work-*/checkpoints/*")) == [], "the job is done"

"""Replicas of checkpoints on workers: made, found again, brought back, dropped; once over real nodes."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.scheduler.test_job import Stage, actor, config_for, data_node
from tests.support.network import Network, until
from tests.support.virtual_network import VirtualNetwork, virtual_time

from hypha.config.models import StorageConfig
from hypha.errors import ConfigError
from hypha.messages import (
    CheckpointFile,
    CheckpointIndex,
    CheckpointList,
    FindCheckpoints,
    PeerRef,
    Resources,
    replica_name,
)
from hypha.node import Node
from hypha.scheduler.durable.ledger import Ledger, read_ledger
from hypha.scheduler.durable.replicas import GENERATIONS_SKIPPED, LEDGER, ranked
from hypha.scheduler.job.run import run_job
from hypha.scheduler.job.states import JobResult, Observation
from hypha.scheduler.leasing.events import LeaseGained
from hypha.scheduler.status.snapshot import JobSnapshot
from hypha.worker.storage.replicas import ReplicaStore
from hypha.worker.storage.requests import StorageService

KEPT = {"every_rounds": 2, "keep": 2, "replicas": 1}
#: long enough to be stopped in
ROUNDS = {"update_rounds": 6, "avg_samples_between_updates": 960, "batch_size": 5, "deadline_s": 5}


def lease(peer: str, kind: Any = "train") -> LeaseGained:
    return LeaseGained(f"{peer}-{kind}", PeerRef(peer=peer), Resources(), 1.0, kind)


def test_who_is_asked_first() -> None:
    leases = [lease("a"), lease("a", "aggregate"), lease("b"), lease("c"), lease("d")]
    # the parameter server's worker last, those who have copies already first, each once
    assert [one.worker.peer for one in ranked(leases, {"c"})] == ["c", "b", "d", "a"]
    assert [one.worker.peer for one in ranked(leases, {"a"})] == ["b", "c", "d", "a"]
    assert ranked([], {"a"}) == []


@asynccontextmanager
async def keeper(
    network: Network | VirtualNetwork, gateway: Node, stage: Stage, place: Path, gb: float = 1.0
) -> AsyncIterator[Node]:
    """An actor whose owner offers storage."""
    async with actor(network, gateway, stage) as play, trio.open_nursery() as nursery:
        leases = play.lease_service
        assert leases is not None
        store = ReplicaStore(place, StorageConfig(checkpoints_gb=gb))
        lease_service = StorageService(play.node, store, lambda: leases.leases)
        lease_service.answer()
        nursery.start_soon(lease_service.announce)
        yield play.node
        nursery.cancel_scope.cancel()


def copied(*places: Path) -> set[int]:
    """Rounds of which there are complete copies."""
    return {int(path.name.removeprefix("round-")) for place in places for path in place.glob("*/round-*")}


Run = Callable[..., Awaitable[JobResult]]


async def stopped(run_job: Run, config: Any, *places: Path) -> None:
    """Run the job until its newest checkpoint, and no older one alone, is copied; then stop it."""
    with trio.CancelScope() as scope:

        def stop(snapshot: JobSnapshot) -> None:
            newest = snapshot.checkpoint
            if newest is not None and newest in copied(*places) and snapshot.round == newest + 1:
                scope.cancel()

        with trio.fail_after(120):
            await run_job(config, Observation(stop))
    assert scope.cancelled_caught


@virtual_time
@pytest.mark.parametrize("loss", ["damaged", "deleted", "everything"])
async def test_what_the_scheduler_lost_comes_back_from_a_worker(
    network: VirtualNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture, loss: str
) -> None:
    await restored(network, network.run_job, tmp_path, caplog, loss)


@pytest.mark.loopback
@pytest.mark.timeout(300)
async def test_everything_comes_back_over_real_nodes(
    real_network: Network, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await restored(real_network, run_job, tmp_path, caplog, "everything")


async def restored(
    network: Network | VirtualNetwork,
    run_job: Run,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    loss: str,
) -> None:
    """Run a job, lose what its scheduler has, and run it again."""
    stage, places = Stage(tmp_path, saves=False), (tmp_path / "kept-1", tmp_path / "kept-2")
    state = tmp_path / "state" / "digits"
    async with network.gateway() as gateway, data_node(network, gateway):
        async with keeper(network, gateway, stage, places[0]), keeper(network, gateway, stage, places[1]):
            config = config_for(network, gateway, tmp_path, rounds=ROUNDS, checkpoint=KEPT)
            await stopped(run_job, config, *places)
            with closing(Ledger(state / "job.db")) as opened:
                standing = opened.standing()
                newest = opened.starts()[0].round
                copies = opened.replicas(newest)
            assert standing is not None
            assert len(copies) == 1, "one copy was wanted"
            match loss:
                case "damaged":
                    for path in (state / "checkpoints").glob("round-*/state.json"):
                        path.write_bytes(path.read_bytes()[:-1] + b"!")
                case "deleted":
                    shutil.rmtree(state / "checkpoints")
                case "everything":
                    shutil.rmtree(tmp_path / "state")
            with trio.fail_after(120):
                result = await run_job(config)
            assert isinstance(result, JobResult)
            # the job is done: nobody needs them any more
            await until(lambda: copied(*places) == set())
    assert stage.restored == [newest]
    assert f"The checkpoint for round {newest} was lost here" in caplog.text
    assert ("There is no ledger in" in caplog.text) == (loss == "everything")
    assert result.job_id == standing.job_id
    ledger = read_ledger(result.ledger)
    counted = [entry for entry in ledger.rounds if not entry.discarded]
    assert [entry.round for entry in counted] == list(range(6))
    generation = 1 + (GENERATIONS_SKIPPED if loss == "everything" else 0)
    assert {entry.generation for entry in counted if entry.round >= newest} == {generation}
    used = [pair for entry in counted for part in entry.contributors for pair in part.finished]
    assert len(used) == len(set(used))


@virtual_time
async def test_a_damaged_copy_is_not_taken(
    network: VirtualNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage, place = Stage(tmp_path, saves=False), tmp_path / "kept"
    state = tmp_path / "state" / "digits"
    async with network.gateway() as gateway, data_node(network, gateway):
        async with keeper(network, gateway, stage, place), actor(network, gateway, stage):
            config = config_for(network, gateway, tmp_path, rounds=ROUNDS, checkpoint=KEPT)
            await stopped(network.run_job, config, place)
            for path in place.glob("*/round-*/state.json"):
                path.write_bytes(path.read_bytes()[:-1] + b"!")
            shutil.rmtree(state / "checkpoints")
            with trio.fail_after(60):
                result = await network.run_job(config)
    assert stage.restored == [], "from theta of round 0"
    assert "was not fetched" in caplog.text
    assert {entry.generation for entry in read_ledger(result.ledger).rounds if not entry.discarded} == {1}


@virtual_time
async def test_copies_that_a_worker_makes_up_are_not_taken(
    network: VirtualNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Any worker may announce copies of any job: none that the scheduler has not signed becomes its state."""
    stage, asked = Stage(tmp_path), list[str]()
    async with network.gateway() as gateway, data_node(network, gateway):
        async with (
            actor(network, gateway, stage),
            actor(network, gateway, stage),
            network.leaf("liar", [gateway], roles=("worker",)) as liar,
        ):
            config = config_for(network, gateway, tmp_path, checkpoint=KEPT)
            scheduler = config.cert_pem.stem
            ledger_file = CheckpointFile(name=LEDGER, size=7, blake3="0" * 64)
            made_up = [
                CheckpointIndex(job_id=job_id, round=99, files=(ledger_file,), signature=signature)
                for job_id, signature in (("digits-1", ""), ("digits-2", "00" * 64))
            ]

            async def find(caller: str, request: FindCheckpoints) -> CheckpointList:
                asked.append(caller)
                return CheckpointList(found=tuple(made_up))

            liar.answer(FindCheckpoints, find)
            await liar.provide(replica_name(scheduler, "digits"))
            with trio.fail_after(120):
                result = await network.run_job(config)
    assert asked == [scheduler]
    assert result.theta == "t4"
    assert caplog.text.count("a copy of round 99 which this scheduler has not signed") == 2


@virtual_time
async def test_a_fresh_start_drops_the_copies_and_a_changed_job_is_refused(
    network: VirtualNetwork, tmp_path: Path
) -> None:
    stage, place = Stage(tmp_path, saves=False), tmp_path / "kept"
    async with network.gateway() as gateway, data_node(network, gateway):
        async with keeper(network, gateway, stage, place), actor(network, gateway, stage):
            config = config_for(network, gateway, tmp_path, rounds=ROUNDS, checkpoint=KEPT)
            await stopped(network.run_job, config, place)
            shutil.rmtree(tmp_path / "state")
            other = config.scheduler.job.model_copy(update={"seed": 7})
            changed = config.model_copy(
                update={"scheduler": config.scheduler.model_copy(update={"job": other})}
            )
            with trio.fail_after(40), pytest.raises(ConfigError, match="seed is 7 now and was 0"):
                await network.run_job(changed)
            shutil.rmtree(tmp_path / "state")
            before = {path.name for path in place.iterdir()}
            with trio.fail_after(120):
                result = await network.run_job(config, fresh=True)
            assert before.isdisjoint({path.name for path in place.iterdir()})
    assert stage.restored == []
    assert result.job_id not in before


@virtual_time
async def test_nobody_offers_storage(
    network: VirtualNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage, place = Stage(tmp_path), tmp_path / "kept"
    async with network.gateway() as gateway, data_node(network, gateway):
        async with keeper(network, gateway, stage, place, gb=1e-8), actor(network, gateway, stage):
            config = config_for(network, gateway, tmp_path, checkpoint=KEPT)
            with trio.fail_after(120):
                result = await network.run_job(config)
    assert result.theta == "t4"
    assert copied(place) == set()
    assert "There are 0 of 1 copies of the checkpoint for round 2: " in caplog.text
    assert "storage.checkpoints_gb" in caplog.text

"""Jobs that cannot succeed end, or wait, with a sentence that says why and the right exit code.

One network for all of them, with one worker: each job has the worker to itself.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.support.faults import again
from tests.support.system import SMALL, System, digits_dataset, digits_job, digits_model, keep_system, paced

from hypha.cli.local.children import NetworkFailed
from hypha.cli.local.network import base

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

SERVER = {"class": "aggregate", "name": "parameter-server"}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A gateway, a data node and a worker."""
    with keep_system(tmp_path_factory.mktemp("endings")) as system:

        async def start() -> None:
            await system.gateway()
            await system.data("data", digits_dataset(system.root))
            # a round of 30 batches takes half a second
            await system.worker("worker", executors=[paced(0.02), SERVER], http_address="127.0.0.1:0")

        trio.run(start)
        yield system


@pytest.fixture
async def system(network: System) -> AsyncIterator[System]:
    """The same network, without what an earlier test left running."""
    yield network
    await network.settle()


def small(name: str, rounds: int, **changes: Any) -> dict[str, Any]:
    return digits_job(None, 1, rounds, name=name) | {"model": SMALL, **changes}


async def test_a_dataset_that_nobody_serves(system: System) -> None:
    scheduler = await system.job(small("no-data", 1, dataset={"dataset": "nothing", "wait_s": 2.0}))
    assert await system.ended(scheduler) == 3
    assert "nothing" in scheduler.tail()


async def test_resources_that_nobody_offers(system: System) -> None:
    job = small("no-room", 1)
    job["resources"] |= {"worker": {"gpu": 80, "cpu": 1}, "wait_s": 3.0}
    scheduler = await system.job(job)
    waiting = await system.reached(scheduler, lambda snapshot: "80" in snapshot.message)
    assert waiting.state == "allocating"
    assert await system.ended(scheduler) == 4
    assert "80" in scheduler.tail()


async def test_a_model_that_cannot_be_loaded(system: System) -> None:
    model = digits_model(system.root, model_type="no-such-architecture")
    job = digits_job(model, 1, 1, name="no-model")
    job["resources"] |= {"executor_restarts": 0}
    scheduler = await system.job(job)
    assert await system.ended(scheduler) == 5
    assert "no-such-architecture" in scheduler.tail()
    assert not (system.root / "no-model").exists()


async def test_an_output_that_cannot_be_written(system: System, tmp_path: Path) -> None:
    blocker = tmp_path / "blocker"
    blocker.write_text("a file, not a directory")
    scheduler = await system.job(small("no-output", 1, output=str(blocker / "model")))
    assert await system.ended(scheduler) == 6
    assert str(blocker) in scheduler.tail()


async def test_an_output_that_is_lost_while_training_costs_no_training(
    system: System, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    job = small("lost-output", 6, output=str(place / "model"), checkpoint={"every_rounds": 100})
    scheduler = await system.job(job)
    await system.reached(scheduler, lambda seen: seen.round >= 1)
    place.rmdir()
    place.write_text("a file, not a directory")
    assert await system.ended(scheduler) == 6
    assert str(place) in scheduler.tail()

    place.unlink()
    scheduler = await again(system, scheduler, "scheduler")
    assert await system.ended(scheduler) == 0, scheduler.tail()
    assert (place / "model" / "model.safetensors").is_file()
    _, ledger = system.ledger("lost-output")
    assert [entry.round for entry in ledger.rounds] == list(range(6))
    assert {entry.generation for entry in ledger.rounds} == {0}, "a round was trained again"


async def test_a_corrupt_slice_is_refused_and_another_replica_serves(system: System, tmp_path: Path) -> None:
    good = digits_dataset(tmp_path, "damaged")
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in good.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    damaged = bad / "slice-0000.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    os.utime(damaged)
    await system.data("data-bad", bad)
    scheduler = await system.job(small("damaged", 5, dataset={"dataset": "damaged"}))
    # with only the damaged replica the job waits for that slice: it neither fails nor trains on it
    worker = next(one for one in system.group.running if one.name == "worker")
    await system.logged(worker, "slice damaged/0 is corrupt")
    await system.data("data-good", good)
    assert await system.ended(scheduler) == 0, scheduler.tail()
    _, ledger = system.ledger("damaged")
    used = {part.slice for entry in ledger.rounds for one in entry.contributors for part in one.ranges}
    assert used == set(range(30))


async def test_an_operator_looks_around_and_drains_a_worker(system: System) -> None:
    async def hypha(*arguments: str) -> str:
        return await system.group.run("hypha", "hypha.cli.hypha", *arguments)

    async def drain(*arguments: str) -> str:
        place = ("--work-dir", str(system.root / "work-worker"))
        return await system.group.run("drain", "hypha.cli.worker", "drain", *place, *arguments)

    worker = next(one for one in system.group.running if one.name == "worker")
    peer = system.peer_id("worker", "worker")
    scheduler = await system.job(small("drained", 10_000))
    await system.reached(scheduler, lambda seen: any(one.batches for one in seen.workers))

    # who is there, as any component's certificate may ask
    data = ("-c", str(system.root / "data.toml"))
    (listed,) = json.loads(await hypha("peers", *data, "--json")).values()
    known = {one["peer"]: one for one in listed["peers"]}
    assert (known[peer]["name"], known[peer]["roles"]) == ("worker", ["worker"])
    # the network is shared: who has just ended may be listed for a moment
    assert ["scheduler"] in [one["roles"] for one in known.values()]
    assert "worker" in await hypha("peers", *data)
    (found,) = json.loads(await hypha("lookup", peer, *data, "--json"))
    assert (found["reached"], found["roles"]) == ("directly", ["worker"])
    (found,) = json.loads(await hypha("lookup", "digits", "-c", str(system.root / "worker.toml"), "--json"))
    assert (found["name"], found["reached"]) == ("data", "directly")
    given = json.loads(await hypha("leases", await system.logged_value(worker, "http_address"), "--json"))
    assert {one["state"] for one in given["leases"]} == {"bound"}
    assert given["state"] == "makes offers"
    held = json.loads(await hypha("leases", await system.logged_value(scheduler, "http_address"), "--json"))
    assert {one["lease"] for one in held} == {one["lease"] for one in given["leases"]}
    assert len(held) == 2

    # what is leased goes on, and another job waits until the worker makes offers again
    assert "is drained, and makes no new offers; it has 2 leases" in await drain()
    before = (await system.status(scheduler)).round
    await system.reached(scheduler, lambda seen: seen.round > before)
    assert "makes offers" in await drain("--undo")

    told = trio.current_time()
    assert "the worker has ended" in await drain("--now", "--within", "5")
    assert await system.ended(worker) == 0, worker.tail()
    print(f"It took {trio.current_time() - told:.1f} s.")
    text = scheduler.log.read_text()
    assert "A leased worker ends in" in text
    assert "expired" not in text
    with pytest.raises(NetworkFailed, match="no worker runs with the work directory"):
        await drain()


async def test_a_worker_that_is_stopped_ends_within_seconds_and_its_leases_with_it(system: System) -> None:
    running = [one for one in system.group.running if one.process.poll() is None]
    worker = next(one for one in running if base(one.name) == "worker")
    scheduler = await system.job(small("stopped", 10_000))
    await system.reached(scheduler, lambda seen: any(one.batches for one in seen.workers))
    stopped = trio.current_time()
    worker.process.terminate()
    assert await system.ended(worker) == 128 + signal.SIGTERM, worker.tail()
    print(f"It took {trio.current_time() - stopped:.1f} s.")
    assert trio.current_time() - stopped < 5.5
    # of a lease of half a minute nobody waits for the end
    await system.reached(scheduler, lambda seen: not seen.held, timeout_s=3.0)
    text = scheduler.log.read_text()
    assert "A leased worker ends in" in text
    assert "expired" not in text
    assert "nobody is there any more" not in text

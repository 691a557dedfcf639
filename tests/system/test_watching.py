"""A job that is told to stop, and run again: nothing applied is lost. A job that is looked at while it runs,
and done again from the book of a scheduler that was killed. Real processes, one network.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from tests.support.faults import again, counted
from tests.support.system import SMALL, System, digits_dataset, digits_job, digits_model, keep_system, paced

from hypha.scheduler.durable.ledger import read_ledger

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A gateway, a data node and two workers."""
    with keep_system(tmp_path_factory.mktemp("watching")) as system:

        async def start() -> None:
            await system.gateway()
            await system.data("data", digits_dataset(system.root))
            for name in ("worker-1", "worker-2"):
                # a round of 60 batches takes a second
                executors = [paced(0.015), {"class": "aggregate", "name": "parameter-server"}]
                await system.worker(name, executors=executors)

        trio.run(start)
        yield system


@pytest.fixture
async def system(network: System) -> AsyncIterator[System]:
    """The same network, without what an earlier test left running."""
    yield network
    await network.settle()


def dataset_of(system: System) -> Path:
    return system.root / "dataset-digits"


async def test_a_stopped_job_goes_on_from_the_round_it_was_in(system: System) -> None:
    job = digits_job(None, 2, 5, name="stopped", checkpoint={"every_rounds": 100}) | {"model": SMALL}
    job["rounds"]["avg_samples_between_updates"] = 1920
    scheduler = await system.job(job)
    await system.reached(scheduler, lambda seen: seen.round >= 2 and any(w.batches for w in seen.workers))
    began = trio.current_time()
    scheduler.process.terminate()
    assert await system.ended(scheduler) == 128 + signal.SIGTERM, scheduler.tail()
    took_s = trio.current_time() - began
    print(f"It stopped within {took_s:.2f} s.")
    assert took_s < 5.0
    before = read_ledger(system.root / "state" / "stopped" / "job.db")
    applied = len(before.rounds)
    assert f"The job will go on from round {applied}" in scheduler.log.read_text()

    scheduler = await again(system, scheduler, "scheduler")
    await system.logged(scheduler, f"The job goes on from round {applied}")
    assert await system.ended(scheduler) == 0, scheduler.tail()
    _, ledger = system.ledger("stopped")
    assert counted(ledger) == list(ledger.rounds), "what was applied was done again"
    assert [entry.round for entry in ledger.rounds] == list(range(5))
    assert ledger.rounds[applied - 1].theta == before.rounds[applied - 1].theta
    assert {entry.generation for entry in ledger.rounds[applied:]} == {1}
    assert await system.replay("stopped", dataset_of(system), None, "stopped") <= 1e-5


async def test_status_and_a_replay_of_an_unfinished_job(system: System) -> None:
    """Of a Transformers model, from its files."""
    model = digits_model(system.root)
    scheduler = await system.job(digits_job(model, 2, 1000, name="watched"))

    async def hypha(*arguments: str) -> str:
        command = [sys.executable, "-m", "hypha.cli.hypha", *arguments]
        done = await trio.run_process(command, capture_stdout=True, env=system.group.environment)
        return done.stdout.decode()

    await system.reached(scheduler, lambda seen: seen.round >= 3)
    shown = await hypha("status", str(await system.logged_value(scheduler, "http_address")))
    assert "watched training, round" in shown
    assert "2 workers" in shown
    scheduler.process.kill()
    await scheduler.process.wait()

    where = ("--data", str(dataset_of(system)), "--model", str(model))
    told = await hypha("replay", str(system.root / "state" / "watched"), *where)
    rounds, _, rest = told.partition(" rounds replayed; ")
    assert int(rounds) >= 3
    assert rest.startswith(f"{int(rounds) + 1} of {int(rounds) + 1} thetas equal")
    assert not (system.root / "state" / "watched" / "ledger.json").exists()

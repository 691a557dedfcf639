"""Jobs that cannot succeed end, or wait, with a sentence that says why and the right exit code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.support.system import System, digits_dataset, digits_job, digits_model

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]


async def test_a_dataset_that_nobody_serves(system: System, tmp_path: Path) -> None:
    await system.gateway()
    await system.worker("worker")
    job = digits_job(None, 1, 1, dataset={"dataset": "nothing", "wait_s": 5.0})
    scheduler = await system.scheduler(job)
    assert await system.ended(scheduler) == 3
    assert "nothing" in scheduler.tail()


async def test_resources_that_nobody_offers(system: System, tmp_path: Path) -> None:
    await system.gateway()
    await system.data("data", digits_dataset(tmp_path))
    await system.worker("worker")
    job = digits_job(None, 1, 1)
    job["resources"] |= {"worker": {"gpu": 80, "cpu": 1}, "wait_s": 8.0}
    scheduler = await system.scheduler(job)
    waiting = await system.reached(scheduler, lambda snapshot: "80" in snapshot.message)
    assert waiting.state == "allocating"
    assert await system.ended(scheduler) == 4
    assert "80" in scheduler.tail()


async def test_a_model_that_cannot_be_loaded(system: System, tmp_path: Path) -> None:
    await system.gateway()
    await system.data("data", digits_dataset(tmp_path))
    await system.worker("worker")
    model = digits_model(tmp_path, model_type="no-such-architecture")
    scheduler = await system.scheduler(digits_job(model, 1, 1))
    assert await system.ended(scheduler) == 5
    assert "no-such-architecture" in scheduler.tail()
    assert not (tmp_path / "model").exists()


async def test_an_output_that_cannot_be_written(system: System, tmp_path: Path) -> None:
    await system.gateway()
    blocker = tmp_path / "blocker"
    blocker.write_text("a file, not a directory")
    job = digits_job(None, 1, 1, output=str(blocker / "model"))
    scheduler = await system.scheduler(job)
    assert await system.ended(scheduler) == 6
    assert str(blocker) in scheduler.tail()


async def test_an_output_that_is_lost_while_training_costs_no_training(
    system: System, tmp_path: Path
) -> None:
    await system.gateway()
    await system.data("data", digits_dataset(tmp_path))
    await system.worker("worker")
    place = tmp_path / "place"
    job = digits_job(None, 1, 8, output=str(place / "model"))
    job["checkpoint"] = {"every_rounds": 100}
    scheduler = await system.scheduler(job)
    await system.reached(scheduler, lambda seen: seen.round >= 1)
    place.rmdir()
    place.write_text("a file, not a directory")
    assert await system.ended(scheduler) == 6
    assert str(place) in scheduler.tail()

    place.unlink()
    again = await system.start("scheduler+1", "scheduler", tmp_path / "scheduler.toml")
    assert await system.ended(again) == 0, again.tail()
    assert (place / "model" / "model.safetensors").is_file()
    _, ledger = system.ledger("job")
    assert [entry.round for entry in ledger.rounds] == list(range(8))
    assert {entry.generation for entry in ledger.rounds} == {0}, "a round was trained again"


async def test_a_corrupt_slice_is_refused_and_another_replica_serves(system: System, tmp_path: Path) -> None:
    good = digits_dataset(tmp_path)
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in good.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    damaged = bad / "slice-0000.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    os.utime(damaged)
    await system.gateway()
    await system.data("data-bad", bad)
    worker = await system.worker("worker")
    job = digits_job(None, 1, 5)
    scheduler = await system.scheduler(job)
    # with only the damaged replica the job waits for that slice: it neither fails nor trains on it
    await system.logged(worker, "slice digits/0 is corrupt")
    await system.data("data-good", good)
    assert await system.ended(scheduler) == 0, scheduler.tail()
    _, ledger = system.ledger("job")
    used = {part.slice for entry in ledger.rounds for one in entry.contributors for part in one.ranges}
    assert used == set(range(30))

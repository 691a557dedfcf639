"""A job is looked at while it runs, and done again from the book of a scheduler that was killed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import trio
from tests.support.system import System, digits_dataset, digits_job, digits_model

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]


async def test_status_and_a_replay_of_an_unfinished_job(system: System, tmp_path: Path) -> None:
    dataset, model = digits_dataset(tmp_path), digits_model(tmp_path)
    await system.gateway()
    await system.data("data", dataset)
    for number in range(2):
        await system.worker(f"worker-{number}")
    scheduler = await system.scheduler(digits_job(model, 2, 1000))

    async def hypha(*arguments: str) -> str:
        command = [sys.executable, "-m", "hypha.cli.hypha", *arguments]
        done = await trio.run_process(command, capture_stdout=True, env=system.environment)
        return done.stdout.decode()

    await system.reached(scheduler, lambda seen: seen.round >= 3)
    shown = await hypha("status", str(await system.said(scheduler, "http_address")))
    assert "job training, round" in shown
    assert "2 workers" in shown
    scheduler.process.kill()
    await scheduler.process.wait()

    where = ("--data", str(dataset), "--model", str(model))
    told = await hypha("replay", str(tmp_path / "state" / "job"), *where)
    rounds, _, rest = told.partition(" rounds replayed; ")
    assert int(rounds) >= 3
    assert rest.startswith(f"{int(rounds) + 1} of {int(rounds) + 1} thetas equal")
    assert not (tmp_path / "state" / "job" / "ledger.json").exists()

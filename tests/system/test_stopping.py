"""A job that is told to stop, and run again: real processes, nothing applied is lost."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import trio
from tests.support.faults import again, counted
from tests.support.system import System, digits_dataset, digits_job

from hypha.scheduler import read_ledger

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]


async def test_a_stopped_job_goes_on_from_the_round_it_was_in(system: System, tmp_path: Path) -> None:
    dataset = digits_dataset(tmp_path)
    await system.gateway()
    await system.data("data", dataset)
    for name in ("worker-1", "worker-2"):
        await system.worker(name)
    job = digits_job(None, 2, 5, checkpoint={"every_rounds": 100})
    job["rounds"]["avg_samples_between_updates"] = 1920
    scheduler = await system.scheduler(job)
    await system.reached(scheduler, lambda seen: seen.round >= 2 and any(w.batches for w in seen.workers))
    began = trio.current_time()
    scheduler.process.terminate()
    assert await system.ended(scheduler) == 128 + signal.SIGTERM, scheduler.tail()
    took_s = trio.current_time() - began
    print(f"It stopped within {took_s:.2f} s.")
    assert took_s < 5.0
    before = read_ledger(tmp_path / "state" / "job" / "job.db")
    applied = len(before.rounds)
    assert f"The job will go on from round {applied}" in scheduler.log.read_text()

    scheduler = await again(system, scheduler, "scheduler")
    await system.logged(scheduler, f"The job goes on from round {applied}")
    assert await system.ended(scheduler) == 0, scheduler.tail()
    _, ledger = system.ledger("job")
    assert counted(ledger) == list(ledger.rounds), "what was applied was done again"
    assert [entry.round for entry in ledger.rounds] == list(range(5))
    assert ledger.rounds[applied - 1].theta == before.rounds[applied - 1].theta
    assert {entry.generation for entry in ledger.rounds[applied:]} == {1}
    assert await system.replay("job", dataset, None) <= 1e-5

"""A job at work: what is decided is carried out in order, and said only once it is durable."""

from __future__ import annotations

from typing import Any

import trio
import trio.testing

from hypha.scheduler.data.slices import SliceTracker
from hypha.scheduler.job.working import WorkingJob
from hypha.scheduler.rounds.events import KeepSlices


class FullDisk:
    """A ledger that waits for space for ever."""

    async def run(self, *_: Any) -> None:
        await trio.sleep_forever()


class Disk:
    async def run(self, *_: Any) -> None:
        await trio.lowlevel.checkpoint()


async def test_a_slice_that_the_ledger_never_got_is_not_given_out_when_the_job_stops() -> None:
    """It was taken off the queue, and the job was stopped before it was written."""
    job: Any = WorkingJob.__new__(WorkingJob)
    job._ledger, job._slices_kept = FullDisk(), True
    job._decided, job._actions = trio.open_memory_channel(10)
    kept = KeepSlices(tracker=SliceTracker([4, 4]).to_state())
    with trio.move_on_after(0.05) as stopped:
        await job._carry_out(kept)
    assert stopped.cancelled_caught

    answered, later = trio.Event(), trio.Event()
    job._decided.send_nowait(answered)
    await job._carry_out_durable()
    assert not answered.is_set()

    # what is kept later includes it
    job._ledger = Disk()
    for action in (kept, later):
        job._decided.send_nowait(action)
        await job._carry_out_durable()
    assert later.is_set()

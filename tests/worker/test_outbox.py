"""Events arrive once and in order, whatever the scheduler does."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from hypha.errors import PeerUnreachable, Refused, RequestTimeout
from hypha.messages import Acknowledged, JobStamp, Loaded, ReportEvent, Request, Response
from hypha.worker.bridge.outbox import MAX_WAITING, Outbox

STAMP = JobStamp(job_id="job")


class Scheduler:
    def __init__(self, *troubles: Exception) -> None:
        self.troubles = list(troubles)
        self.asked: list[ReportEvent] = []

    async def ask(self, request: Request) -> Response:
        assert isinstance(request, ReportEvent)
        await trio.sleep(0.01)
        self.asked.append(request)
        if self.troubles:
            raise self.troubles.pop(0)
        return Acknowledged()


def events(*names: str) -> list[Loaded]:
    return [Loaded(incarnation=name) for name in names]


async def deliver(scheduler: Scheduler, *names: str) -> list[tuple[int, Loaded]]:
    outbox = Outbox(scheduler.ask, "train", "life")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        await outbox.wait_empty()
        for event in events(*names):
            outbox.put(STAMP, event)
        assert len(outbox._waiting) == len(names)
        await outbox.wait_empty()
        nursery.cancel_scope.cancel()
    return [(report.seq, report.event) for report in scheduler.asked if isinstance(report.event, Loaded)]


async def test_in_order_and_repeated_until_acknowledged(autojump_clock: trio.testing.MockClock) -> None:
    scheduler = Scheduler(
        PeerUnreachable("s", "down"), RequestTimeout("s", "event", 10), Refused("busy", "later")
    )
    a, b = events("a", "b")
    assert await deliver(scheduler, "a", "b") == [(1, a), (1, a), (1, a), (1, a), (2, b)]
    assert {report.incarnation for report in scheduler.asked} == {"life"}


@pytest.mark.parametrize("code", ["stale", "duplicate", "malformed", "too-large"])
async def test_what_the_scheduler_will_never_take_does_not_stop_the_rest(
    code: str, autojump_clock: trio.testing.MockClock
) -> None:
    a, b = events("a", "b")
    assert await deliver(Scheduler(Refused(code, "no")), "a", "b") == [(1, a), (2, b)]


async def test_large_events_wait_in_smaller_numbers() -> None:
    scheduler = Scheduler()
    outbox = Outbox(scheduler.ask, "train", "life")
    large = events("x" * (1 << 20))[0]
    for _ in range(16):
        outbox.check_space()
        outbox.put(STAMP, large)
    with pytest.raises(Refused, match="16 events wait"):
        outbox.check_space()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        await outbox.wait_empty()
        nursery.cancel_scope.cancel()
    outbox.check_space()


async def test_what_waits_is_bounded() -> None:
    outbox = Outbox(Scheduler().ask, "train", "life")
    for event in events(*map(str, range(MAX_WAITING))):
        outbox.check_space()
        outbox.put(STAMP, event)
    with pytest.raises(Refused, match="busy"):
        outbox.check_space()

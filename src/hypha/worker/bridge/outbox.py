"""Events of one executor on their way to its scheduler: each arrives once, in order, or the job is over.

``Progress`` does not come through here: it may be lost, and goes by the report stream.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from hypha.backoff import Backoff
from hypha.errors import NetworkError, Refused
from hypha.messages import Event, ExecutorClass, JobStamp, ReportEvent, Request, Response, encode
from hypha.node import Changes
from hypha.tracing import trace_context, traceparent
from hypha.waiting import Reminder

logger = logging.getLogger("hypha.worker.events")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0
#: Events that may wait for their scheduler. An executor has about ten a round, and no round ends without it.
MAX_WAITING = 512
#: And so many bytes of them: in memory they are several times that.
MAX_WAITING_BYTES = 16 << 20


class Outbox:
    """``ask`` puts a request to the scheduler. ``seq`` counts from 1 for each incarnation."""

    def __init__(
        self, ask: Callable[[Request], Awaitable[Response]], kind: ExecutorClass, incarnation: str
    ) -> None:
        self._ask = ask
        self._kind: ExecutorClass = kind
        self._incarnation = incarnation
        self._seq = 0
        #: with its bytes as it is sent, and the ``traceparent`` of the span in which the executor reported it
        self._waiting: deque[tuple[ReportEvent, int, str | None]] = deque()
        self._changed = Changes()

    def put(self, stamp: JobStamp, event: Event) -> None:
        """Take charge of ``event``; never blocks. For an executor :meth:`check_space` is called before."""
        self._seq += 1
        report = ReportEvent(
            stamp=stamp, kind=self._kind, incarnation=self._incarnation, seq=self._seq, event=event
        )
        self._waiting.append((report, len(encode(report)), traceparent()))
        self._changed.note()

    def check_space(self) -> None:
        """Raise Refused (``busy``) when as many events wait as may."""
        size = sum(size for _, size, _ in self._waiting)
        if len(self._waiting) >= MAX_WAITING or size > MAX_WAITING_BYTES:
            raise Refused("busy", f"{len(self._waiting)} events wait for the scheduler; try again")

    async def wait_empty(self) -> None:
        while self._waiting:
            await self._changed.wait()

    async def run(self) -> None:
        """Deliver until cancelled."""
        backoff, reminder = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S), Reminder(at_once=True)
        while True:
            while not self._waiting:
                await self._changed.wait()
            report, _, reported_in = self._waiting[0]
            fields = {"event": type(report.event).__name__}
            try:
                with trace_context(reported_in):
                    await self._ask(report)
            except NetworkError as exc:
                # a scheduler that has just been started may not know the job or its leases yet
                if not isinstance(exc, Refused) or not exc.final:
                    pause_s = backoff.next_s()
                    level = logging.WARNING if reminder.due() else logging.DEBUG
                    text = "Event %s not delivered, again in %.1f s: %s"
                    logger.log(level, text, fields["event"], pause_s, exc, extra=fields)
                    await trio.sleep(pause_s)
                    continue
                logger.warning("The scheduler wants no %s: %s", fields["event"], exc, extra=fields)
            else:
                logger.debug("An event was reported to the scheduler: %s.", fields["event"], extra=fields)
            backoff.reset()
            reminder.reset()
            self._waiting.popleft()
            self._changed.note()

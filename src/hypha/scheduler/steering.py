"""Directives on their way: the newest of each kind, repeated until the worker acknowledges it.

One task an executor sends one directive at a time, so that what arrives is in the order of ``seq``. A
newer directive of the same sort supersedes one that is still waiting. What was superseded or refused for
good is forgotten; what could not be delivered is tried again with growing pauses.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from contextlib import AbstractContextManager

import trio

from hypha.backoff import Backoff
from hypha.errors import NetworkError, Refused
from hypha.messages import (
    CloseRound,
    Directive,
    ExecutorClass,
    JobStamp,
    PeerRef,
    Plan,
    SaveCheckpoint,
    Steer,
    slot_of,
)
from hypha.node import Node
from hypha.scheduler.status.round_traces import RoundTraces
from hypha.tracing import span, trace_context
from hypha.tracing.operations import PLAN
from hypha.tracing.spans import Attribute

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_JITTER = (0.7, 1.3)
_TIMEOUT_S = 10.0


class Steering:
    """The directives for one executor, numbered after ``seq``. :meth:`run` sends them until cancelled."""

    def __init__(
        self,
        node: Node,
        to: PeerRef,
        kind: ExecutorClass,
        stamp: JobStamp,
        seq: int = 0,
        traces: RoundTraces | None = None,
    ) -> None:
        self.to = to
        self.kind: ExecutorClass = kind
        self._node = node
        self._stamp = stamp
        self._traces = traces or RoundTraces(None)
        self._waiting: OrderedDict[tuple[str, str], Directive] = OrderedDict()
        self._changed = trio.Event()
        self._seq = seq

    def put(self, directive: Directive) -> None:
        """Send it, and not what it supersedes."""
        slot = slot_of(directive)
        self._waiting.pop(slot, None)
        self._waiting[slot] = directive
        self._changed.set()

    async def send_first(self, directive: Directive) -> None:
        """Send ``directive`` once, before all others. Raises :class:`NetworkError`."""
        self._seq += 1
        await self._node.request(self.to.peer, self._steer(directive), timeout_s=_TIMEOUT_S)

    def _steer(self, directive: Directive) -> Steer:
        return Steer(stamp=self._stamp, kind=self.kind, seq=self._seq, directive=directive)

    async def run(self) -> None:
        """Send what is put, in order."""
        while True:
            while not self._waiting:
                self._changed = trio.Event()
                await self._changed.wait()
            slot, directive = next(iter(self._waiting.items()))
            self._seq += 1
            with self._traced(directive):
                await self._deliver(slot, directive)
            if self._waiting.get(slot) is directive:
                del self._waiting[slot]

    def _traced(self, directive: Directive) -> AbstractContextManager[object]:
        """In the trace of the round that ``directive`` is about, if it names one."""
        stamp, within = self._stamp, None
        if isinstance(directive, Plan | CloseRound | SaveCheckpoint):
            within = self._traces.of_round(stamp, directive.round)
        if not isinstance(directive, Plan) or within is None:
            return trace_context(within)
        attributes: dict[str, Attribute] = {
            "hypha.job": stamp.job_id,
            "hypha.job.generation": stamp.generation,
            "hypha.round": directive.round,
            "hypha.peer": self.to.peer,
            "hypha.batches": -1 if directive.batches is None else directive.batches,
        }
        return span(PLAN, attributes, parent=within)

    async def _deliver(self, slot: tuple[str, str], directive: Directive) -> None:
        """Until it is acknowledged, superseded or refused for good."""
        backoff, steer = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S, jitter=_JITTER), self._steer(directive)
        fields = {"worker_peer_id": self.to.peer, "job_id": steer.stamp.job_id}
        while self._waiting.get(slot) is directive:
            try:
                await self._node.request(self.to.peer, steer, timeout_s=_TIMEOUT_S)
                logger.debug("%s was delivered", type(directive).__name__, extra={**fields, "seq": steer.seq})
                return
            except Refused as exc:
                # an executor that is being started is not found yet
                if not exc.retryable and exc.code != "not-found":
                    logger.warning("%s was refused: %s", type(directive).__name__, exc, extra=fields)
                    return
                logger.debug("%s has to wait: %s", type(directive).__name__, exc, extra=fields)
            except NetworkError as exc:
                logger.debug("%s was not delivered: %s", type(directive).__name__, exc, extra=fields)
            await trio.sleep(backoff.next_s())

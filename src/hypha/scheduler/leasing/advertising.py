"""Requests for workers on their way to the network: published one at a time for each executor class."""

from __future__ import annotations

import logging
import math

import trio

from hypha.errors import NetworkError
from hypha.messages import ExecutorClass
from hypha.node import Node
from hypha.scheduler.leasing.events import Advertise
from hypha.scheduler.status.round_traces import RoundTraces
from hypha.telemetry.instruments import WORKER_REQUESTS
from hypha.tracing import span
from hypha.tracing.operations import ADVERTISE

logger = logging.getLogger(__name__)

#: While workers are missing, that is logged again after this long.
REMIND_S = 15.0


class Advertising:
    """Publishes what the allocator asks for through ``node``, traced as ``traces`` decide."""

    def __init__(self, node: Node, traces: RoundTraces) -> None:
        self._node = node
        self._traces = traces
        #: when it was last logged that workers are missing, and at which raised bid
        self._logged: dict[ExecutorClass, tuple[float, float | None]] = {}
        self._publishing: set[ExecutorClass] = set()

    async def publish(self, action: Advertise) -> None:
        """Publish it, unless the request before it still waits for a gateway. Never raises."""
        kind = action.ask.kind
        if kind in self._publishing:
            # the one before still waits for a gateway to pass it on, and is the same request
            return
        now = trio.current_time()
        logged_at, logged_bid = self._logged.get(kind, (-math.inf, None))
        if now >= logged_at + REMIND_S or logged_bid != action.raised_bid:
            self._logged[kind] = now, action.raised_bid
            raised = (
                "" if action.raised_bid is None else f", at a bid that was raised to {action.raised_bid:g}"
            )
            logger.info("Looking for %d more workers for %s jobs%s.", action.count, kind, raised)
        self._publishing.add(kind)
        attributes = {"hypha.executor.class": kind, "hypha.request": action.ask.request_id}
        try:
            with span(ADVERTISE, {**attributes, "hypha.workers": action.count}, parent=self._traces.of_job):
                await self._node.publish(action.request(self._node.ref()))
        except NetworkError as exc:
            logger.debug("A request for workers was not published: %s", exc)
        else:
            WORKER_REQUESTS.add(kind=kind)
            logger.debug("A request for %d more workers for %s jobs was published.", action.count, kind)
        finally:
            self._publishing.discard(kind)

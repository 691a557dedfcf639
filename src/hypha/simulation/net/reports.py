"""Reports of a simulated node: the newest one of a job's round, in batches, again where one was lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import trio

from hypha.access import STREAMS
from hypha.errors import NetworkError
from hypha.messages import Report
from hypha.node import ReportHandler

if TYPE_CHECKING:
    from hypha.simulation.net.node import SimulatedNode

_REPORTS = "/hypha/report/1"
_REPORT_FLUSH_S = 0.05
_REPORT_RETRY_S = 0.5
_REPORT_IDLE_S = 10.0

_reports = msgspec.msgpack.Decoder(list[Report])

_ReportKey = tuple[str, int, int, str]


class SimulatedReports:
    """Of one node, sent and taken."""

    def __init__(self, node: SimulatedNode) -> None:
        self._node = node
        self._waiting: dict[str, dict[_ReportKey, Report]] = {}
        self._wakers: dict[str, trio.Event] = {}
        self._handler: ReportHandler | None = None
        self._admits: Callable[[str], bool] | None = None

    def report(self, peer: str, report: Report) -> None:
        """Send ``report`` soon; a newer one of the same job and round replaces it."""
        stamp = report.stamp
        key = (stamp.job_id, stamp.generation, stamp.round, report.incarnation)
        waiting = self._waiting.setdefault(peer, {})
        waiting.pop(key, None)
        waiting[key] = report
        if peer not in self._wakers:
            self._wakers[peer] = trio.Event()
            self._node.process.spawn(self._send, peer)
        self._wakers[peer].set()

    async def _send(self, peer: str) -> None:
        reached_at = trio.current_time()
        while True:
            with trio.move_on_after(_REPORT_IDLE_S) as idle:
                await self._wakers[peer].wait()
            if idle.cancelled_caught and not self._waiting.get(peer):
                del self._wakers[peer]
                return
            self._wakers[peer] = trio.Event()
            await trio.sleep(_REPORT_FLUSH_S)
            batch = self._waiting.pop(peer, {})
            payload = msgspec.msgpack.encode(list(batch.values()))

            async def reported(node: SimulatedNode, payload: bytes = payload) -> bool:
                return await node.reports.take(self._node.peer_id, payload)

            try:
                await self._node.ask_there(peer, reported, 15.0, len(payload))
                reached_at = trio.current_time()
            except NetworkError:
                if trio.current_time() - reached_at > 2 * _REPORT_IDLE_S:
                    self._waiting.pop(peer, None)
                    del self._wakers[peer]
                    return
                self._waiting[peer] = {**batch, **self._waiting.get(peer, {})}
                self._wakers[peer].set()
                await trio.sleep(_REPORT_RETRY_S)

    def answer(self, handler: ReportHandler, admits: Callable[[str], bool] | None = None) -> None:
        """Call ``handler(caller, reports)`` for reports that arrive from whom ``admits`` admits."""
        self._handler = handler
        self._admits = admits

    async def take(self, caller: str, payload: bytes) -> bool:
        """Reports that have arrived, in the process of this node."""
        admitted = self._admits is None or self._admits(caller)
        if self._handler is not None and admitted and self._node.may(caller, STREAMS[_REPORTS].by):
            self._handler(caller, _reports.decode(payload))
        return True

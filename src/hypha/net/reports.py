"""Frequent reports: ``/hypha/report/1``, one long-lived stream a peer, flushed every 50 ms.

A report states the whole of what it is about, so only the newest per job and round is worth sending:
what the caller hands over between two flushes replaces what waited. A stream that breaks is opened
again; reports never wait for it, and never make the caller wait.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import trio
from opentelemetry.trace import SpanKind

from hypha.backoff import NO_JITTER, Backoff
from hypha.config.reading.log_filter import TRACE
from hypha.decoding import decode
from hypha.errors import PeerUnreachable, Undecodable
from hypha.messages import WIRE_VERSION, Report
from hypha.net.libp2p.streams import STREAM_ERRORS, Streams, discard
from hypha.net.peers.inbound_limits import OverLimit
from hypha.net.rpc import Oversized, frame, read_frame
from hypha.node import ReportHandler
from hypha.telemetry.instruments import REPORTS
from hypha.tracing import span, traceparent, untraced
from hypha.tracing.operations import REPORT_STREAM
from hypha.waiting import SILENT_S

logger = logging.getLogger(__name__)

PROTOCOL = "/hypha/report/1"
MAX_BATCH_BYTES = 1 << 20
FLUSH_S = 0.05
#: A peer whose reports nobody refreshed for this long costs no stream.
IDLE_S = 60.0
RETRY_MIN_S = 0.2
RETRY_MAX_S = 5.0
#: A flush that takes longer than this has a stream that is stuck.
WRITE_TIMEOUT_S = 15.0

_Key = tuple[str, int, int, str]
_decoder = msgspec.msgpack.Decoder(list[Report])


class Reports:
    """Sends reports in the background, and gives those that arrive to one handler."""

    def __init__(self, streams: Streams, nursery: trio.Nursery) -> None:
        self._streams = streams
        self._nursery = nursery
        self._waiting: dict[str, dict[_Key, Report]] = {}
        self._wakers: dict[str, trio.Event] = {}
        self._handler: ReportHandler | None = None
        self._admits: Callable[[str], bool] | None = None
        self._over_limit = OverLimit()
        streams.handle(PROTOCOL, self._serve)

    def report(self, peer: str, report: Report) -> None:
        """Hand over a report for ``peer``; the newest per job, generation, round and incarnation stays."""
        stamp = report.stamp
        key = (stamp.job_id, stamp.generation, stamp.round, report.incarnation)
        waiting = self._waiting.setdefault(peer, {})
        if waiting.pop(key, None) is not None:
            REPORTS.add(event="replaced")
        waiting[key] = report
        if len(waiting) > 256:  # rounds long over
            del waiting[next(iter(waiting))]
        if peer in self._wakers:
            self._wakers[peer].set()
        else:
            self._wakers[peer] = trio.Event()
            self._wakers[peer].set()
            with untraced():  # it goes on after whatever the report is of
                self._nursery.start_soon(self._send_all, peer)

    def answer(self, handler: ReportHandler, admits: Callable[[str], bool] | None = None) -> None:
        """Give arriving reports to ``handler(caller, reports)``, of those peers that ``admits`` admits."""
        self._handler = handler
        self._admits = admits

    async def _send_all(self, peer: str) -> None:
        stream: Any = None
        backoff = Backoff(RETRY_MIN_S, RETRY_MAX_S, jitter=NO_JITTER)
        reached_at = trio.current_time()
        try:
            while True:
                with trio.move_on_after(IDLE_S) as idle:
                    await self._wakers[peer].wait()
                if idle.cancelled_caught and not self._waiting.get(peer):
                    return
                self._wakers[peer] = trio.Event()
                await trio.sleep(FLUSH_S)
                batch = self._waiting.pop(peer, {})
                try:
                    reports = list(batch.values())
                    if stream is None:
                        with span(REPORT_STREAM, {"hypha.peer": peer}, kind=SpanKind.PRODUCER):
                            stream = await self._streams.reach(peer, PROTOCOL)
                            if reports:
                                reports[0] = msgspec.structs.replace(reports[0], traceparent=traceparent())
                            await _send(stream, reports)
                        logger.debug("Opened a stream for reports.", extra={"peer_id": peer})
                    else:
                        await _send(stream, reports)
                    REPORTS.add(len(reports), event="sent")
                    logger.log(TRACE, "Sent %d reports.", len(reports), extra={"peer_id": peer})
                    backoff.reset()
                    reached_at = trio.current_time()
                except (*STREAM_ERRORS, PeerUnreachable, trio.TooSlowError) as exc:
                    due = self._over_limit.is_first(peer, "waiting", SILENT_S)
                    level = logging.INFO if due else logging.DEBUG
                    logger.log(level, "Reports to %s wait: %s.", peer, exc, extra={"peer_id": peer})
                    if stream is not None:
                        await discard(stream)
                        stream = None
                    if trio.current_time() - reached_at > IDLE_S:
                        # it may be gone for good; the next report tries again
                        self._waiting.pop(peer, None)
                        return
                    # what was handed over meanwhile is newer
                    self._waiting[peer] = {**batch, **self._waiting.get(peer, {})}
                    self._wakers[peer].set()
                    await trio.sleep(backoff.next_s())
                except Exception:  # the edge of a task of the node: an odd report must not end it
                    logger.exception("Reports to %s are lost.", peer, extra={"peer_id": peer})
        finally:
            self._wakers.pop(peer, None)
            if stream is not None:
                await discard(stream)

    async def _serve(self, stream: Any, caller: str) -> None:
        try:
            if (reason := self._why_not(caller)) is not None:
                self._over_limit.note(caller, "reports", reason)
                return
            first = True
            while True:
                reports = decode(_decoder.decode, await read_frame(stream, MAX_BATCH_BYTES))
                if self._why_not(caller) is not None or (handler := self._handler) is None:
                    return  # its lease has ended meanwhile
                if any(one.v != WIRE_VERSION for one in reports):
                    logger.warning("Refused reports of another version.", extra={"peer_id": caller})
                    return
                REPORTS.add(len(reports), event="received")
                logger.log(TRACE, "Received %d reports.", len(reports), extra={"peer_id": caller})
                if first and reports:
                    parent = reports[0].traceparent
                    with span(REPORT_STREAM, {"hypha.peer": caller}, kind=SpanKind.CONSUMER, parent=parent):
                        handler(caller, reports)
                else:
                    handler(caller, reports)
                first = False
        except (Undecodable, Oversized) as exc:
            logger.warning("Reports do not decode: %s", exc, extra={"peer_id": caller})
        except EOFError:
            pass  # the sender has no more
        finally:
            await discard(stream)

    def _why_not(self, caller: str) -> str | None:
        """Why no report of ``caller`` is taken, of whom nothing need be read then; None when it is."""
        if self._handler is None:
            return "nobody takes reports here"
        if self._admits is not None and not self._admits(caller):
            return "it takes no part in a job here, or not any more"
        return None


async def _send(stream: Any, reports: list[Report]) -> None:
    with trio.fail_after(WRITE_TIMEOUT_S):
        await stream.write(frame(msgspec.msgpack.encode(reports)))

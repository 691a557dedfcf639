"""What a simulated node does for others besides files: it answers requests, takes reports, passes gossip on,
and, as a gateway, holds the directory of who serves which dataset.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from hypha.access import REQUESTS, STREAMS, TOPICS, announcing, named
from hypha.errors import NetworkError, Refused
from hypha.messages import (
    WORKER_TOPIC,
    GossipEnvelope,
    PeerRef,
    RefusedReply,
    Report,
    RequestEnvelope,
    Response,
    ResponseEnvelope,
    WorkerRequest,
)
from hypha.node import Listeners, PublishedRequest, ReportHandler

if TYPE_CHECKING:
    from hypha.simulation.net.node import SimulatedNode

logger = logging.getLogger("hypha.simulation")

#: as in hypha.net.rpc
_MAX_INBOUND_PER_PEER, _OWN_PER_PEER, _MAX_SHARED = 16, 2, 64
_REPORTS = "/hypha/report/1"
_REPORT_FLUSH_S, _REPORT_RETRY_S, _REPORT_IDLE_S = 0.05, 0.5, 10.0
#: as in hypha.net.discovery.gossip and hypha.net.options.Timings
_BACKLOG = 256
_MESH_WAIT_S = 3.0
_LOOKUP_S = 5.0

_requests = msgspec.msgpack.Decoder(RequestEnvelope)
_reports = msgspec.msgpack.Decoder(list[Report])
_gossip = msgspec.msgpack.Decoder(GossipEnvelope)

Handler = Callable[[str, Any], Awaitable[Response]]


def told_late() -> None:
    """Of a listener that misses something."""
    logger.warning("A slow listener misses something.")


class SimulatedAnswers:
    """The requests that a node answers: by whom, and how many at once."""

    def __init__(self, node: SimulatedNode) -> None:
        self._node = node
        self._handlers: dict[type, Handler] = {}
        self._inbound: Counter[str] = Counter()
        self._shared = 0
        self._is_partner: Callable[[str], bool] = lambda peer: False

    def answer(self, kind: type[Any], handler: Handler) -> None:
        self._handlers[kind] = handler

    def prefer(self, is_partner: Callable[[str], bool]) -> None:
        self._is_partner = is_partner

    async def serve(self, caller: str, payload: bytes) -> bytes:
        """The reply to a request that has arrived, in the process of this node."""
        return msgspec.msgpack.encode(ResponseEnvelope(body=await self._answer(caller, payload)))

    async def _answer(self, caller: str, payload: bytes) -> Response:
        shares = self._inbound[caller] >= _OWN_PER_PEER and not self._is_partner(caller)
        if self._inbound[caller] >= _MAX_INBOUND_PER_PEER or (shares and self._shared >= _MAX_SHARED):
            return RefusedReply(code="busy", reason="too many requests at once; try again later")
        request = _requests.decode(payload).body
        name = type(request).__name__
        handler = self._handlers.get(type(request))
        if handler is None:
            return RefusedReply(code="unsupported", reason=f"this component does not answer {name}")
        allowed = REQUESTS[type(request)].by
        if not self._node.may(caller, allowed):
            return RefusedReply(code="role", reason=f"{name} needs the role {named(allowed)}")
        self._inbound[caller] += 1
        self._shared += shares
        try:
            return await handler(caller, request)
        except Refused as exc:
            return RefusedReply(code=exc.code, reason=exc.reason)
        except Exception as exc:
            logger.exception("The handler of %s failed.", name)
            self._node.process.crashed(exc)
            return RefusedReply(code="internal", reason=f"{name} failed there; its log says more")
        finally:
            self._shared -= shares
            self._inbound[caller] -= 1
            if not self._inbound[caller]:
                del self._inbound[caller]


class SimulatedReports:
    """The newest one of a job's round, in batches, again where one was lost."""

    def __init__(self, node: SimulatedNode) -> None:
        self._node = node
        self._waiting: dict[str, dict[tuple[str, int, int, str], Report]] = {}
        self._wakers: dict[str, trio.Event] = {}
        self._handler: ReportHandler | None = None
        self._admits: Callable[[str], bool] | None = None

    def report(self, peer: str, report: Report) -> None:
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
        self._handler = handler
        self._admits = admits

    async def take(self, caller: str, payload: bytes) -> bool:
        """Reports that have arrived, in the process of this node."""
        admitted = self._admits is None or self._admits(caller)
        if self._handler is not None and admitted and self._node.may(caller, STREAMS[_REPORTS].by):
            self._handler(caller, _reports.decode(payload))
        return True


class SimulatedGossip:
    """Requests for workers, which gateways pass on to all of their peers."""

    def __init__(self, node: SimulatedNode) -> None:
        self._node = node
        self._listeners = Listeners[PublishedRequest](_BACKLOG, told_late)
        self.subscribe = self._listeners.listen

    async def publish(self, message: WorkerRequest) -> None:
        with trio.move_on_after(_MESH_WAIT_S):
            while self._node.gateway is None:
                await self._node.gateway_changed.wait()
        network = self._node.network
        payload = msgspec.msgpack.encode(GossipEnvelope(body=message))
        for gateway in self._node.connected_gateways():
            network.start(partial(self._pass_on, gateway, self._node.peer_id, payload, {self._node.peer_id}))

    async def _pass_on(self, to: str, publisher: str, payload: bytes, seen: set[str]) -> None:
        """To one peer, and from a gateway to all of its peers; lost where there is no connection."""
        network = self._node.network
        connection = network.connection(self._node.peer_id, to)
        if connection is None or to in seen:
            return
        seen.add(to)
        with trio.move_on_after(10.0) as scope:
            await self._node.network.carry(
                self._node.network.hops(connection, self._node.peer_id), len(payload)
            )
        target = network.nodes.get(to)
        if scope.cancelled_caught or target is None:
            return
        target.process.spawn(target.gossip.take, publisher, payload, seen)

    async def take(self, publisher: str, payload: bytes, seen: set[str]) -> None:
        """A message that has arrived, in the process of this node."""
        if not self._node.may(publisher, TOPICS[WORKER_TOPIC].by):
            return
        if self._node.options.hop:
            network = self._node.network
            for connection in network.connections_of(self._node.peer_id):
                to = connection.other(self._node.peer_id)
                network.start(partial(self._pass_on, to, publisher, payload, seen))
            return
        message = _gossip.decode(payload).body
        self._listeners.tell(PublishedRequest(publisher, message))


class SimulatedDirectory:
    """Who serves which dataset: what a node provides, and of a gateway the records of others, in memory."""

    def __init__(self, node: SimulatedNode) -> None:
        self._node = node
        self._provided: dict[str, None] = {}
        #: of a gateway: who serves what
        self._records: dict[str, dict[str, PeerRef]] = {}

    async def provide(self, dataset: str) -> int:
        self._provided[dataset] = None
        taken = 0
        for gateway in self._node.connected_gateways():
            taken += await self._announce(gateway, dataset)
        return taken

    async def _announce(self, gateway: str, dataset: str) -> bool:
        ref = self._node.ref()
        try:
            return bool(
                await self._node.ask_there(gateway, lambda node: node.directory.take(dataset, ref), _LOOKUP_S)
            )
        except NetworkError:
            return False

    async def take(self, dataset: str, ref: PeerRef) -> bool:
        """Of a gateway: note who serves ``dataset``, where it may."""
        if not self._node.may(ref.peer, announcing(dataset).by):
            return False
        self._records.setdefault(dataset, {})[ref.peer] = ref
        return True

    def withdraw(self, dataset: str) -> None:
        self._provided.pop(dataset, None)

    async def find_providers(self, dataset: str) -> list[PeerRef]:
        found: dict[str, PeerRef] = {}
        for gateway in self._node.connected_gateways():
            found |= await self._ask_records(gateway, dataset, linked=True)
        refs = [found[peer] for peer in sorted(found) if peer != self._node.peer_id]
        for ref in refs:
            self._node.learn(ref)
        return refs

    async def _ask_records(self, gateway: str, dataset: str, linked: bool) -> dict[str, PeerRef]:
        async def find(node: SimulatedNode) -> dict[str, PeerRef]:
            return await node.directory.find(dataset, linked)

        try:
            found: dict[str, PeerRef] | None = await self._node.ask_there(gateway, find, _LOOKUP_S)
        except NetworkError:
            return {}
        return found or {}

    async def find(self, dataset: str, linked: bool) -> dict[str, PeerRef]:
        """Of a gateway, and of those that it is ``linked`` with."""
        found: dict[str, PeerRef] = {}
        for gateway in self._node.connected_gateways() if linked else ():
            found |= await self._ask_records(gateway, dataset, linked=False)
        return found | self._records.get(dataset, {})

    async def announce_again(self, gateway: str) -> None:
        """Have a gateway that is new to this node know all that it serves."""
        for dataset in list(self._provided):
            await self._announce(gateway, dataset)

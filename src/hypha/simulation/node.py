"""A node of a simulated world, of the shape of :class:`hypha.node.Node`: requests, gossip, reports, a
directory of providers, gateways and relay, over a :class:`~hypha.simulation.network.SimulatedNetwork`.

What a node decides runs in its process, what is under way outside of it. Messages are encoded and decoded as
on the real wire. Gateways hold the directory in memory, pass gossip on and relay for machines behind NAT.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import msgspec
import trio

from hypha.access import REQUESTS, STREAMS, TOPICS, Allowed, announcing, may_act_as, named
from hypha.backoff import Backoff
from hypha.errors import NetworkError, PeerUnreachable, Refused, RequestTimeout
from hypha.messages import (
    WORKER_TOPIC,
    GossipEnvelope,
    Health,
    HealthReport,
    PeerRef,
    RefusedReply,
    Report,
    Request,
    RequestEnvelope,
    Response,
    ResponseEnvelope,
    WorkerRequest,
)
from hypha.node import Changes, ConnectionInfo, PeerLost, PublishedRequest, ReportHandler
from hypha.runtime import chance
from hypha.simulation.network import SimulatedMachine, SimulatedNetwork
from hypha.simulation.process import ProcessGone, SimulatedProcess
from hypha.simulation.transfers import SimulatedTransfers
from hypha.telemetry import health_of

logger = logging.getLogger("hypha.simulation")

#: as in hypha.net.rpc
_MAX_INBOUND_PER_PEER, _OWN_PER_PEER, _MAX_SHARED = 16, 2, 64
#: as in hypha.net.discovery.gossip and hypha.net.options.Timings
_BACKLOG = 256
_MESH_WAIT_S = 3.0
_REPORTS = "/hypha/report/1"
_REPORT_FLUSH_S = 0.05
_RECONNECT_MIN_S, _RECONNECT_MAX_S = 0.5, 30.0
_REPORT_RETRY_S = 0.5
_REPORT_IDLE_S = 10.0
_LOOKUP_S = 5.0

_requests = msgspec.msgpack.Decoder(RequestEnvelope)
_responses = msgspec.msgpack.Decoder(ResponseEnvelope)
_gossip = msgspec.msgpack.Decoder(GossipEnvelope)
_reports = msgspec.msgpack.Decoder(list[Report])

Handler = Callable[[str, Any], Awaitable[Response]]
_ReportKey = tuple[str, int, int, str]


@dataclass(frozen=True)
class SimulatedOptions:
    """What a node was opened with."""

    component: str
    gateways: tuple[str, ...] = ()
    hop: bool = False


class _Exchange:
    """A request on its way: carried on outside of the process that made it."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.value: Any = None
        self.error: Exception | None = None

    def fail(self, error: Exception) -> None:
        """It came to nothing."""
        if not self.done.is_set():
            self.error = error
            self.done.set()
        self.scope.cancel()


class SimulatedNode:
    """Made by :func:`open_simulated_node`, in the process that it is of."""

    def __init__(
        self,
        network: SimulatedNetwork,
        machine: SimulatedMachine,
        process: SimulatedProcess,
        options: SimulatedOptions,
    ) -> None:
        self.options = options
        self.process = process
        self.network = network
        self.machine = machine
        self.peer_id = machine.peer
        self.roles = machine.roles
        self.gateway_changed = Changes()
        self.health_details: list[Callable[[], dict[str, str]]] = []
        self.transfers = SimulatedTransfers(self)
        self._opened = trio.current_time()
        self._book: dict[str, PeerRef] = {peer: _ref(peer) for peer in options.gateways}
        self._met: dict[str, frozenset[str]] = {}
        self._gateway: str | None = None
        self._handlers: dict[type, Handler] = {}
        self._inbound: Counter[str] = Counter()
        self._shared = 0
        self._is_partner: Callable[[str], bool] = lambda peer: False
        self._watchers: dict[trio.MemorySendChannel[PeerLost], None] = {}
        self._listeners: dict[trio.MemorySendChannel[PublishedRequest], None] = {}
        self._waiting: dict[str, dict[_ReportKey, Report]] = {}
        self._wakers: dict[str, trio.Event] = {}
        self._report_handler: ReportHandler | None = None
        self._admits_reports: Callable[[str], bool] | None = None
        self._provided: dict[str, None] = {}
        #: of a gateway: who serves what
        self._records: dict[str, dict[str, PeerRef]] = {}
        self.answer(Health, self._health)

    # --- who and where ------------------------------------------------------------------------------

    def sign(self, data: bytes) -> bytes:
        """What nobody else in the world has a reason to write."""
        return blake2b(data, key=self.peer_id.encode()[:64]).digest()

    @property
    def uptime_s(self) -> float:
        """Seconds since it was opened."""
        return trio.current_time() - self._opened

    @property
    def gateway(self) -> str | None:
        """PeerID of the active gateway."""
        return self._gateway

    def ref(self) -> PeerRef:
        """This node and where it is reached."""
        direct = () if self.machine.behind_nat else (f"/sim/{self.peer_id}",)
        circuits = () if self._gateway is None else (f"/sim/{self._gateway}/p2p-circuit",)
        return PeerRef(peer=self.peer_id, addresses=(*direct, *circuits))

    def learn(self, ref: PeerRef) -> None:
        """Remember the addresses of a peer."""
        if ref.addresses and ref.peer != self.peer_id:
            self._book[ref.peer] = ref

    def roles_of(self, peer: str) -> frozenset[str]:
        """Roles of a peer that is or was connected; PeerUnreachable when it never was."""
        try:
            return self._met[peer]
        except KeyError:
            raise PeerUnreachable(peer, "it never was connected") from None

    @property
    def organization(self) -> str:
        """The organisation that vouches for this node."""
        return self.network.machines[self.peer_id].organization

    def organization_of(self, peer: str) -> str:
        """The organisation of a peer that is or was connected; PeerUnreachable when it never was."""
        self.roles_of(peer)
        return self.network.machines[peer].organization

    def connections(self) -> list[ConnectionInfo]:
        """All live connections. A round trip is that of a line that is not busy."""
        found = []
        for connection in self.network.connections_of(self.peer_id):
            peer = connection.other(self.peer_id)
            hops = self.network.hops(connection, self.peer_id)
            latency_s = sum(self.network.machines[end].latency_s for hop in hops for end in hop)
            found.append(
                ConnectionInfo(
                    peer=peer,
                    address=f"/sim/{peer if connection.relay is None else connection.relay}",
                    kind="direct" if connection.relay is None else "relayed",
                    direction="outbound" if connection.dialled_by == self.peer_id else "inbound",
                    roles=self.network.machines[peer].roles,
                    round_trip_s=2 * latency_s,
                )
            )
        return found

    def is_connected(self, peer: str) -> bool:
        """Whether a connection to ``peer`` is live."""
        return self.network.connection(self.peer_id, peer) is not None

    async def connect(self, peer: PeerRef | str) -> None:
        """Be connected; PeerUnreachable when that cannot be."""
        await self.ask_there(self._known(peer), None, None)

    def connected(self, peer: str) -> None:
        """Called by the network."""
        self._met[peer] = self.network.machines[peer].roles

    def lost(self, peer: str) -> None:
        """Called by the network: the connection to ``peer`` is over."""
        self.process.spawn(self._tell_lost, peer)

    async def _tell_lost(self, peer: str) -> None:
        if self.is_connected(peer):
            return
        if peer == self._gateway:
            self._gateway = None
            self.gateway_changed.note()
        for channel in list(self._watchers):
            _put(channel, PeerLost(peer))

    @asynccontextmanager
    async def watch_peers(self) -> AsyncIterator[trio.MemoryReceiveChannel[PeerLost]]:
        """A channel that says when the last connection to a peer ended."""
        send, receive = trio.open_memory_channel[PeerLost](4096)
        self._watchers[send] = None
        try:
            yield receive
        finally:
            self._watchers.pop(send, None)
            send.close()

    def _known(self, peer: PeerRef | str) -> str:
        if isinstance(peer, PeerRef):
            self.learn(peer)
            return peer.peer
        return peer

    # --- requests -----------------------------------------------------------------------------------

    async def request(self, peer: PeerRef | str, request: Request, timeout_s: float = 10.0) -> Response:
        """Ask ``peer``. Raises Refused, PeerUnreachable, RequestTimeout."""
        name = self._known(peer)
        payload = msgspec.msgpack.encode(RequestEnvelope(body=request))
        answer = await self.ask_there(
            name, lambda node: node._serve(self.peer_id, payload), timeout_s, len(payload)
        )
        if answer is None:
            raise RequestTimeout(name, type(request).__name__, timeout_s)
        reply = _responses.decode(answer).body
        if isinstance(reply, RefusedReply):
            raise Refused(reply.code, reply.reason, name)
        return reply

    async def ask_there(
        self,
        peer: str,
        ask: Callable[[SimulatedNode], Awaitable[Any]] | None,
        timeout_s: float | None,
        size: int = 0,
    ) -> Any:
        """Be connected to ``peer``, have its process ``ask``, and bring back what comes of it; None when that
        takes longer than ``timeout_s``. Raises PeerUnreachable, and what ``ask`` raises.
        """
        if peer == self.peer_id:
            raise PeerUnreachable(peer, "a node does not dial itself")
        if peer not in self._book and not self.is_connected(peer):
            raise PeerUnreachable(peer, "no address of it is known")
        exchange = _Exchange()
        # whatever becomes of this process, it goes its way
        self.network.start(lambda: self._exchange(exchange, peer, ask, size))
        give_up = exchange.scope.cancel
        self.process.on_end.append(give_up)
        try:
            with trio.move_on_after(float("inf") if timeout_s is None else timeout_s):
                await exchange.done.wait()
        finally:
            exchange.scope.cancel()
            if give_up in self.process.on_end:
                self.process.on_end.remove(give_up)
        if exchange.error is not None:
            raise exchange.error
        return exchange.value

    async def _exchange(
        self,
        exchange: _Exchange,
        peer: str,
        ask: Callable[[SimulatedNode], Awaitable[Any]] | None,
        size: int,
    ) -> None:
        with exchange.scope:
            try:
                relays = tuple(one for one in self.options.gateways if self.is_connected(one))
                connection = await self.network.connect(self, peer, relays)
                if ask is not None:
                    key = object()
                    connection.calls[self.peer_id][key] = exchange.fail
                    try:
                        await self.network.carry(self.network.hops(connection, self.peer_id), size)
                        target = self.network.nodes.get(peer)
                        if target is None or connection.ends[peer] is not target:
                            self.network.drop(connection, self.peer_id, "the connection was reset")
                            raise PeerUnreachable(peer, "the connection was reset", gone=target is None)
                        exchange.value = await self._asked(ask, target)
                        await self.network.carry(self.network.hops(connection, peer), 200)
                    finally:
                        connection.calls.get(self.peer_id, {}).pop(key, None)
            except Exception as exc:  # noqa: BLE001 - handed to whoever asked
                exchange.fail(exc)
        exchange.done.set()

    @staticmethod
    async def _asked(ask: Callable[[SimulatedNode], Awaitable[Any]], target: SimulatedNode) -> Any:
        try:
            return await target.process.call(ask, target)
        except ProcessGone:
            # its machine says so, if that comes through; else the connection ends by silence
            await trio.sleep_forever()

    def answer(self, kind: type[Any], handler: Handler) -> None:
        """Answer requests of ``kind``."""
        self._handlers[kind] = handler

    def prefer(self, is_partner: Callable[[str], bool]) -> None:
        """Keep places for requests of those peers of whom ``is_partner`` says so."""
        self._is_partner = is_partner

    async def _serve(self, caller: str, payload: bytes) -> bytes:
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
        if not self.may(caller, allowed):
            return RefusedReply(code="role", reason=f"{name} needs the role {named(allowed)}")
        self._inbound[caller] += 1
        self._shared += shares
        try:
            return await handler(caller, request)
        except Refused as exc:
            return RefusedReply(code=exc.code, reason=exc.reason)
        except Exception as exc:
            logger.exception("The handler of %s failed.", name)
            self.process.crashed(exc)
            return RefusedReply(code="internal", reason=f"{name} failed there; its log says more")
        finally:
            self._shared -= shares
            self._inbound[caller] -= 1
            if not self._inbound[caller]:
                del self._inbound[caller]

    def may(self, peer: str, allowed: Allowed) -> bool:
        """Whether the certificate of ``peer`` lets it do what ``allowed`` may."""
        return may_act_as(self.network.machines[peer].roles, allowed)

    async def _health(self, caller: str, request: Health) -> HealthReport:
        return health_of(self)

    # --- reports ------------------------------------------------------------------------------------

    def report(self, peer: str, report: Report) -> None:
        """Send ``report`` soon; a newer one of the same job and round replaces it."""
        stamp = report.stamp
        key = (stamp.job_id, stamp.generation, stamp.round, report.incarnation)
        waiting = self._waiting.setdefault(peer, {})
        waiting.pop(key, None)
        waiting[key] = report
        if peer not in self._wakers:
            self._wakers[peer] = trio.Event()
            self.process.spawn(self._send_reports, peer)
        self._wakers[peer].set()

    async def _send_reports(self, peer: str) -> None:
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
                return await node._reported(self.peer_id, payload)

            try:
                await self.ask_there(peer, reported, 15.0, len(payload))
                reached_at = trio.current_time()
            except NetworkError:
                if trio.current_time() - reached_at > 2 * _REPORT_IDLE_S:
                    self._waiting.pop(peer, None)
                    del self._wakers[peer]
                    return
                self._waiting[peer] = {**batch, **self._waiting.get(peer, {})}
                self._wakers[peer].set()
                await trio.sleep(_REPORT_RETRY_S)

    def answer_reports(self, handler: ReportHandler, admits: Callable[[str], bool] | None = None) -> None:
        """Call ``handler(caller, reports)`` for reports that arrive from whom ``admits`` admits."""
        self._report_handler = handler
        self._admits_reports = admits

    async def _reported(self, caller: str, payload: bytes) -> bool:
        admitted = self._admits_reports is None or self._admits_reports(caller)
        if self._report_handler is not None and admitted and self.may(caller, STREAMS[_REPORTS].by):
            self._report_handler(caller, _reports.decode(payload))
        return True

    # --- gossip and the directory -------------------------------------------------------------------

    async def publish(self, message: WorkerRequest) -> None:
        """Ask everybody for workers; waits a moment for a gateway to pass it on."""
        with trio.move_on_after(_MESH_WAIT_S):
            while self._gateway is None:
                await self.gateway_changed.wait()
        payload = msgspec.msgpack.encode(GossipEnvelope(body=message))
        for gateway in self._connected_gateways():
            self.network.start(partial(self._pass_on, gateway, self.peer_id, payload, {self.peer_id}))

    async def _pass_on(self, to: str, publisher: str, payload: bytes, seen: set[str]) -> None:
        """To one peer, and from a gateway to all of its peers; lost where there is no connection."""
        connection = self.network.connection(self.peer_id, to)
        if connection is None or to in seen:
            return
        seen.add(to)
        with trio.move_on_after(10.0) as scope:
            await self.network.carry(self.network.hops(connection, self.peer_id), len(payload))
        target = self.network.nodes.get(to)
        if scope.cancelled_caught or target is None:
            return
        target.process.spawn(target._heard, publisher, payload, seen)

    async def _heard(self, publisher: str, payload: bytes, seen: set[str]) -> None:
        if not self.may(publisher, TOPICS[WORKER_TOPIC].by):
            return
        if self.options.hop:
            for connection in self.network.connections_of(self.peer_id):
                to = connection.other(self.peer_id)
                self.network.start(partial(self._pass_on, to, publisher, payload, seen))
            return
        message = _gossip.decode(payload).body
        for channel in list(self._listeners):
            _put(channel, PublishedRequest(publisher, message))

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[trio.MemoryReceiveChannel[PublishedRequest]]:
        """A channel of :class:`hypha.node.PublishedRequest`."""
        send, receive = trio.open_memory_channel[PublishedRequest](_BACKLOG)
        self._listeners[send] = None
        try:
            yield receive
        finally:
            self._listeners.pop(send, None)
            send.close()

    async def provide(self, dataset: str) -> int:
        """Announce that this node serves ``dataset``, now and whenever its gateway changes."""
        self._provided[dataset] = None
        taken = 0
        for gateway in self._connected_gateways():
            taken += await self._announce(gateway, dataset)
        return taken

    async def _announce(self, gateway: str, dataset: str) -> int:
        ref = self.ref()
        try:
            return (
                1
                if await self.ask_there(gateway, lambda node: node._take_record(dataset, ref), _LOOKUP_S)
                else 0
            )
        except NetworkError:
            return 0

    async def _take_record(self, dataset: str, ref: PeerRef) -> bool:
        if not self.may(ref.peer, announcing(dataset).by):
            return False
        self._records.setdefault(dataset, {})[ref.peer] = ref
        return True

    def withdraw(self, dataset: str) -> None:
        """Stop announcing ``dataset``."""
        self._provided.pop(dataset, None)

    async def find_providers(self, dataset: str) -> list[PeerRef]:
        """Who says it serves ``dataset``. Hints: probe them."""
        found: dict[str, PeerRef] = {}
        for gateway in self._connected_gateways():
            found |= await self._ask_records(gateway, dataset, linked=True)
        refs = [found[peer] for peer in sorted(found) if peer != self.peer_id]
        for ref in refs:
            self.learn(ref)
        return refs

    async def _ask_records(self, gateway: str, dataset: str, linked: bool) -> dict[str, PeerRef]:
        async def find(node: SimulatedNode) -> dict[str, PeerRef]:
            return await node._find_records(dataset, linked)

        try:
            found: dict[str, PeerRef] | None = await self.ask_there(gateway, find, _LOOKUP_S)
        except NetworkError:
            return {}
        return found or {}

    async def _find_records(self, dataset: str, linked: bool) -> dict[str, PeerRef]:
        """Of a gateway, and of those that it is ``linked`` with."""
        found: dict[str, PeerRef] = {}
        for gateway in self._connected_gateways() if linked else ():
            found |= await self._ask_records(gateway, dataset, linked=False)
        return found | self._records.get(dataset, {})

    # --- gateways -----------------------------------------------------------------------------------

    def _connected_gateways(self) -> list[str]:
        return [one for one in self.options.gateways if self.is_connected(one)]

    async def wait_connected(self) -> None:
        """Return when a gateway is connected; at once when none is configured."""
        while self.options.gateways and self._gateway is None:
            await self.gateway_changed.wait()

    async def keep_gateway(self) -> None:
        """Stay with one gateway, move on to the next at once, pause when none answers; until cancelled."""
        backoff = Backoff(_RECONNECT_MIN_S, _RECONNECT_MAX_S)
        while True:
            for peer in self.options.gateways:
                try:
                    await self.ask_there(peer, None, None)
                except PeerUnreachable:
                    continue
                self._gateway = peer
                self.gateway_changed.note()
                backoff.reset()
                for dataset in list(self._provided):
                    await self._announce(peer, dataset)
                while self._gateway is not None:
                    await self.gateway_changed.wait()
                break
            else:
                await trio.sleep(backoff.next_s())

    async def link_gateways(self) -> None:
        """Of a gateway: stay linked with the others, until cancelled."""
        while True:
            for peer in self.options.gateways:
                if not self.is_connected(peer):
                    try:
                        await self.ask_there(peer, None, None)
                    except PeerUnreachable as exc:
                        logger.debug("Another gateway cannot be reached: %s", exc)
            await trio.sleep(5.0 * chance().uniform(0.8, 1.2))


@asynccontextmanager
async def open_simulated_node(
    network: SimulatedNetwork, machine: SimulatedMachine, process: SimulatedProcess, options: SimulatedOptions
) -> AsyncIterator[SimulatedNode]:
    """A running node of ``process``; its gateways are being connected in the background."""
    node = SimulatedNode(network, machine, process, options)
    network.nodes[node.peer_id] = node
    end = lambda: network.gone(node)  # noqa: E731
    process.on_end.append(end)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.link_gateways if options.hop else node.keep_gateway)
            nursery.start_soon(node.transfers.run)
            yield node
            nursery.cancel_scope.cancel()
    finally:
        if end in process.on_end:
            process.on_end.remove(end)
        network.gone(node)


def _ref(peer: str) -> PeerRef:
    return PeerRef(peer=peer, addresses=(f"/sim/{peer}",))


def _put(channel: trio.MemorySendChannel[Any], item: object) -> None:
    try:
        channel.send_nowait(item)
    except (trio.WouldBlock, trio.BrokenResourceError):
        logger.warning("A slow listener misses something.")

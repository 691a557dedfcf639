"""A node of a simulated world, of the shape of :class:`hypha.node.Node`: requests, gossip, reports, a
directory of providers, gateways and relay, over a :class:`~hypha.simulation.net.network.SimulatedNetwork`.

What a node decides runs in its process, what is under way outside of it. Messages are encoded and decoded as
on the real wire. Gateways hold the directory in memory, pass gossip on and relay for machines behind NAT.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec
import trio

from hypha.access import Allowed, may_act_as
from hypha.backoff import Backoff
from hypha.errors import PeerUnreachable, Refused, RequestTimeout
from hypha.messages import (
    Health,
    HealthReport,
    PeerRef,
    RefusedReply,
    Request,
    RequestEnvelope,
    Response,
    ResponseEnvelope,
)
from hypha.node import Changes, ConnectionInfo, Listeners, PeerLost
from hypha.runtime import chance
from hypha.simulation.net.lines import SimulatedMachine
from hypha.simulation.net.network import SimulatedNetwork
from hypha.simulation.net.services import (
    SimulatedAnswers,
    SimulatedDirectory,
    SimulatedGossip,
    SimulatedReports,
    told_late,
)
from hypha.simulation.net.transfers import SimulatedTransfers
from hypha.simulation.process import ProcessGone, SimulatedProcess
from hypha.telemetry import health_of

logger = logging.getLogger("hypha.simulation")

_RECONNECT_MIN_S, _RECONNECT_MAX_S = 0.5, 30.0

_responses = msgspec.msgpack.Decoder(ResponseEnvelope)


@dataclass(frozen=True)
class SimulatedOptions:
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
        if not self.done.is_set():
            self.error = error
            self.done.set()
        self.scope.cancel()


class SimulatedNode:
    """Made by :func:`open_simulated_node`, in the process that it is of. What has no description here is
    described in :class:`hypha.node.Node`.
    """

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
        self.answers = SimulatedAnswers(self)
        self.answer, self.prefer = self.answers.answer, self.answers.prefer
        self.reports = SimulatedReports(self)
        self.report, self.answer_reports = self.reports.report, self.reports.answer
        self.gossip = SimulatedGossip(self)
        self.publish, self.subscribe = self.gossip.publish, self.gossip.subscribe
        self.directory = SimulatedDirectory(self)
        self.provide, self.withdraw = self.directory.provide, self.directory.withdraw
        self.find_providers = self.directory.find_providers
        self._opened = trio.current_time()
        self._book: dict[str, PeerRef] = {peer: _ref(peer) for peer in options.gateways}
        self._met: dict[str, frozenset[str]] = {}
        self._gateway: str | None = None
        self._watchers = Listeners[PeerLost](4096, told_late)
        self.watch_peers = self._watchers.listen
        self.answer(Health, self._health)

    # --- who and where ------------------------------------------------------------------------------

    def sign(self, data: bytes) -> bytes:
        """What nobody else in the world has a reason to write."""
        return blake2b(data, key=self.peer_id.encode()[:64]).digest()

    @property
    def uptime_s(self) -> float:
        return trio.current_time() - self._opened

    @property
    def gateway(self) -> str | None:
        return self._gateway

    def ref(self) -> PeerRef:
        direct = () if self.machine.behind_nat else (f"/sim/{self.peer_id}",)
        circuits = () if self._gateway is None else (f"/sim/{self._gateway}/p2p-circuit",)
        return PeerRef(peer=self.peer_id, addresses=(*direct, *circuits))

    def learn(self, ref: PeerRef) -> None:
        if ref.addresses and ref.peer != self.peer_id:
            self._book[ref.peer] = ref

    def roles_of(self, peer: str) -> frozenset[str]:
        try:
            return self._met[peer]
        except KeyError:
            raise PeerUnreachable(peer, "it never was connected") from None

    @property
    def organization(self) -> str:
        return self.network.machines[self.peer_id].organization

    def organization_of(self, peer: str) -> str:
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
        return self.network.connection(self.peer_id, peer) is not None

    async def connect(self, peer: PeerRef | str) -> None:
        await self.ask_there(self.known(peer), None, None)

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
        self._watchers.tell(PeerLost(peer))

    def known(self, peer: PeerRef | str) -> str:
        """The PeerID of ``peer``, whose addresses are remembered."""
        if isinstance(peer, PeerRef):
            self.learn(peer)
            return peer.peer
        return peer

    # --- requests -----------------------------------------------------------------------------------

    async def request(self, peer: PeerRef | str, request: Request, timeout_s: float = 10.0) -> Response:
        name = self.known(peer)
        payload = msgspec.msgpack.encode(RequestEnvelope(body=request))
        answer = await self.ask_there(
            name, lambda node: node.answers.serve(self.peer_id, payload), timeout_s, len(payload)
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

    def may(self, peer: str, allowed: Allowed) -> bool:
        """Whether the certificate of ``peer`` lets it do what ``allowed`` may."""
        return may_act_as(self.network.machines[peer].roles, allowed)

    async def _health(self, caller: str, request: Health) -> HealthReport:
        return health_of(self)

    # --- gateways -----------------------------------------------------------------------------------

    def connected_gateways(self) -> list[str]:
        return [one for one in self.options.gateways if self.is_connected(one)]

    async def wait_connected(self) -> None:
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
                await self.directory.announce_again(peer)
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

"""``Node``: one libp2p host with mutual TLS, and everything Hypha's components say to each other.

Any public call may be cancelled at any time without harm to the connection it uses. How a node comes to life
and ends is in :mod:`hypha.net.opening`. It is one module as it is one object: it ties the parts of ``net``
together, and each of its methods is a few lines on one of them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import trio
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.utils.address_validation import get_available_interfaces
from msgspec import structs
from multiaddr import Multiaddr

from hypha import __version__
from hypha.errors import NetworkError, PeerUnreachable, listening_failed
from hypha.messages import (
    MAX_ADDRESSES_SENT,
    MAX_DIALLED_BACK,
    DialBack,
    FindDoubles,
    Health,
    HealthReport,
    ListPeers,
    MeasureBandwidth,
    NodeRun,
    PeerList,
    PeerRef,
    Request,
    Response,
    SameCertificate,
)
from hypha.naming import learn, shown
from hypha.net.bandwidth import Caps
from hypha.net.bulk.rendezvous import MAX_TARGETS
from hypha.net.bulk.transfers import BulkTransfers
from hypha.net.discovery.dht import DhtClient, DhtServer
from hypha.net.discovery.gossip import Gossip
from hypha.net.libp2p.host import make_host
from hypha.net.libp2p.mutual_tls import MutualTls
from hypha.net.libp2p.relay import RelayClient, RelayHop
from hypha.net.libp2p.shared_port import SharedPortTcp
from hypha.net.libp2p.streams import Streams
from hypha.net.options import NodeOptions
from hypha.net.peers.addresses import MAX_ADDRESSES, Address, AddressBook, host_and_port, ip_of, parse
from hypha.net.peers.diagnosing import Diagnosing, listed
from hypha.net.peers.dialing import Dialer
from hypha.net.peers.duplicates import Doubles
from hypha.net.peers.gateways import Gateways
from hypha.net.peers.table import PeerTable
from hypha.net.reports import Reports
from hypha.net.rpc import Rpc
from hypha.net.sockets import buffer_shortfalls
from hypha.pki.identity import Identity
from hypha.runtime import in_thread, new_id, wall_time
from hypha.telemetry import health_of
from hypha.telemetry.health import versions

logger = logging.getLogger(__name__)

#: Shutting down may take this long before what is left is cut.
CLOSE_S = 1.0


class Libp2pNode:
    """A running node. Made by :func:`open_node`; all its methods are for one trio thread. What it promises
    stands in :class:`hypha.node.Node` and :class:`hypha.net.bulk.wire.BulkConnections`; what one of its parts
    does alone is that part's method.
    """

    def __init__(self, options: NodeOptions, nursery: trio.Nursery) -> None:
        timings = options.timings
        self.options = options
        self.peer_id = options.identity.peer_id
        self._nursery = nursery
        self._started = trio.current_time()
        self._running = False
        self.ended = trio.Event()
        learn(self.peer_id, options.identity.name)
        instance = None if options.guest else new_id()
        #: tells this node from another one with the same certificate
        self.instance = instance or ""
        tuning = options.tuning
        self._security = MutualTls(
            options.identity, options.require_roles, instance, tuning.connections.streams
        )
        self._port = SharedPortTcp(options.max_connections, tuning)
        self._host = make_host(self._security, self._port, options.max_connections, identify=options.hop)
        self._swarm = self._host.get_network()
        self._book = AddressBook(self.peer_id, options.exclude_cidr)
        self.learn = self._book.learn
        self.remember = self._book.configure
        self._peers = peers = PeerTable(self._swarm, options.identity, timings, nursery)
        self.connections = peers.connections
        self.is_connected = peers.is_connected
        self.watch_peers = peers.watch
        self.roles_of = peers.roles_of
        self.organization_of = peers.organization_of
        self.disconnect = peers.close
        self._dialer = Dialer(self._swarm, self._security, self._book, self._peers, timings, nursery)
        self._streams = Streams(self._host, nursery, self._dialer.connect)
        self.set_stream_handler = self._streams.handle
        self._relay = RelayClient(self._host, self._streams)
        self._dialer.relay_client = self._relay
        self._gateways = Gateways(
            options.gateways, self._book, self._dialer, self._peers, self._relay, timings
        )
        self._dialer.own_relays = self._gateways.connected
        self.wait_connected = self._gateways.wait_connected
        self.gateway_changed = self._gateways.changed
        self._caps = caps = Caps(options.limits)
        self._rpc = Rpc(self._streams, nursery, tuning.connections)
        self.answer = self._rpc.answer
        others = self._gateways.linked if options.hop else None
        run = NodeRun(peer=self.peer_id, instance=self.instance)
        self._doubles = Doubles(run, self._peers, self._rpc.request, others, nursery)
        self._security.admit = self._doubles.admit
        self._reports = Reports(self._streams, nursery)
        self.report, self.answer_reports = self._reports.report, self._reports.answer
        self._gossip = Gossip(
            self._host,
            self._gateways.connected,
            self._gossips_with,
            options.identity,
            options.require_roles,
            tuning.gossip,
        )
        self.publish, self.subscribe = self._gossip.publish, self._gossip.subscribe
        self._gateways.joined = self._gossip.include
        self._dht = DhtClient(
            self._streams, self._dialer, self._gateways, self.ref, self.learn, timings.lookup_s
        )
        self.provide = self._dht.provide
        self.withdraw = self._dht.withdraw
        self.find_providers = self._dht.find
        self.transfers = BulkTransfers(self, caps, tuning)
        self._port.serve_bulk = self.transfers.serve_socket
        self._peers.on_doubt.append(self.transfers.cut_untrusted)
        self.health_details: list[Callable[[], dict[str, str]]] = [caps.details]
        self.answer(Health, self._health)
        self.answer(SameCertificate, self._doubles.answer)
        diagnosing = Diagnosing(self._dialer.who_is_at, self._hosts_of)
        self.answer(MeasureBandwidth, diagnosing.measure)
        self.hop: RelayHop | None = None
        self.dht_server: DhtServer | None = None
        if options.hop:
            self.hop = hop = RelayHop(self._host, self._streams, options.relay_limits, caps)
            peers.on_lost.append(hop.forget)
            self.dht_server = DhtServer(self._host, self._streams, peers, nursery)
            self.answer(FindDoubles, self._doubles.find)
            # however many nodes come to another gateway, its questions about them are answered
            self.prefer(self._is_gateway)
            self.answer(ListPeers, self._list_peers)
            self.answer(DialBack, diagnosing.dial_back)
            self.health_details.append(
                lambda: {
                    "circuits": str(hop.circuits),
                    "reservations": str(hop.reservations),
                    "max_connections": str(options.max_connections),
                    "max_circuits": str(options.relay_limits.circuits),
                    "max_reservations": str(options.relay_limits.reservations),
                }
            )

    @property
    def identity(self) -> Identity:
        return self.options.identity

    @property
    def roles(self) -> frozenset[str]:
        return self.options.identity.roles

    def sign(self, data: bytes) -> bytes:
        return self.identity.private_key.sign(b"hypha:" + data)

    @property
    def organization(self) -> str:
        return self.options.identity.organization

    @property
    def uptime_s(self) -> float:
        return trio.current_time() - self._started

    def listen_addresses(self) -> list[str]:
        """Where this node really listens (ports resolved), without ``/p2p``; both planes."""
        return [str(address) for address in self._host.get_transport_addrs()]

    def _announced(self) -> list[str]:
        """External addresses, then those it listens on, an unspecified one as each interface's."""
        found = [str(parse(text).transport) for text in self.options.external]
        for one in self._own_addresses():
            if not self._book.excluded(one) and str(one) not in found:
                found.append(str(one))
        return found

    def _own_addresses(self) -> list[Address]:
        found: list[Address] = []
        for text in self.listen_addresses():
            address = parse(text)
            ip = ip_of(address)
            places = [address]
            if ip is not None and ip.is_unspecified:
                port = int(address.transport.rpartition("/")[2])
                interfaces = [parse(str(one)) for one in get_available_interfaces(port)]
                places = [one for one in interfaces if (other := ip_of(one)) and other.version == ip.version]
            found += places
        return found

    def bulk_addresses(self) -> list[str]:
        return self._announced()[:MAX_ADDRESSES_SENT]

    async def bulk_targets(self, peer: str, offered: tuple[str, ...]) -> list[tuple[str, int]]:
        self._book.learn(PeerRef(peer=peer, addresses=offered))
        found = dict.fromkeys(self._ends_of(peer, "outbound"))
        for address in self._book.direct(peer):
            if len(found) >= MAX_TARGETS:
                break
            # a name may stand for an address that nobody dials here
            with contextlib.suppress(NetworkError):
                anywhere = self._book.may_lead_anywhere(peer, address)
                found |= dict.fromkeys(await self._dialer.places(address, anywhere))
        return list(dict.fromkeys(map(host_and_port, found)))

    def reached_by(self, peer: str) -> bool:
        direct = {one.direction for one in self.connections() if one.peer == peer and one.kind == "direct"}
        return direct == {"inbound"}

    def ref(self) -> PeerRef:
        direct = [str(Address(text, self.peer_id)) for text in self._announced()]
        circuits = self._gateways.circuit_addresses(self.peer_id)
        return PeerRef(peer=self.peer_id, addresses=(*direct, *circuits)[:MAX_ADDRESSES_SENT])

    def _said_addresses(self, peer: str) -> list[str]:
        """What ``peer`` has said by identify of where it is, as far as anybody may be told."""
        try:
            found = self._host.get_peerstore().addrs(ID.from_string(peer))
        except (PeerStoreError, ValueError):
            return []
        return [str(one) for one in found][:MAX_ADDRESSES]

    @property
    def gateway(self) -> str | None:
        return self._gateways.active

    async def connect(self, peer: PeerRef | str) -> None:
        await self._dialer.connect(self._known(peer))

    async def who_is_at(self, address: str) -> str:
        """The PeerID of the certified node at a multiaddr; NetworkError that says why there is none."""
        return await self._dialer.who_is_at(parse(address))

    async def request(self, peer: PeerRef | str, request: Request, timeout_s: float = 10.0) -> Response:
        return await self._rpc.request(self._known(peer), request, timeout_s)

    def prefer(self, is_partner: Callable[[str], bool]) -> None:
        self._rpc.is_partner = is_partner
        self._port.arrivals.is_partner = is_partner
        self._security.budget.is_partner = is_partner

    async def _health(self, caller: str, request: Health) -> HealthReport:
        came_from = tuple(self._ends_of(caller, "inbound"))[-MAX_DIALLED_BACK:]
        packages = await in_thread(versions)
        return structs.replace(health_of(self), time_s=wall_time(), seen_at=came_from, packages=packages)

    async def _list_peers(self, caller: str, request: ListPeers) -> PeerList:
        return listed(self.connections(), caller, request.peer, self._said_addresses)

    def _ends_of(self, peer: str, direction: str) -> list[str]:
        """The other ends of direct connections with ``peer``."""
        return [
            one.address
            for one in self.connections()
            if (one.peer, one.kind, one.direction) == (peer, "direct", direction) and one.address
        ]

    def _hosts_of(self, peer: str) -> list[str]:
        return [host_and_port(address)[0] for address in self._ends_of(peer, "inbound")]

    @property
    def mesh_size(self) -> int:
        return self._gossip.mesh_size

    async def open_stream(self, peer: PeerRef | str, protocol: str) -> Any:
        return await self._streams.reach(self._known(peer), protocol)

    def _is_gateway(self, peer: str) -> bool:
        """Whether the certificate of a peer that is or was connected says that it is a gateway."""
        try:
            return "gateway" in self.roles_of(peer)
        except PeerUnreachable:
            return False

    def _gossips_with(self, peer: str) -> bool:
        if self.options.hop or not self.options.gateways:
            return True
        return peer in self._gateways.known and self._gateways.is_one(peer)

    def _known(self, peer: PeerRef | str) -> str:
        if isinstance(peer, PeerRef):
            self._book.learn(peer)
            return peer.peer
        return peer

    async def listen(self, stack: AsyncExitStack) -> None:
        """Start the services, into ``stack``, and listen; ConfigError when that cannot be."""
        for text in buffer_shortfalls(self.options.tuning.sockets):
            logger.warning("%s.", text)
        for text in self._caps.details().values():
            logger.info("Transfers are capped: %s ([limits]).", text)
        await self._nursery.start(self.transfers.run)
        addresses = [Multiaddr(text) for text in self.options.listen]
        await stack.enter_async_context(self._host.run(listen_addrs=[]))
        self._running = True
        for address in addresses:
            with trio.CancelScope(shield=True):  # cancelled here, the library would leave a socket open
                listening = await self._swarm.listen(address)
            if not listening:
                raise listening_failed("listen_addresses", str(address), self._port.listening_failed)
        # circuit addresses included, which the library would cut short
        self._host.get_addrs = lambda: [Multiaddr(text) for text in self.ref().addresses]
        await self._gossip.start(stack, self._nursery)
        if self.dht_server is not None:
            await self.dht_server.start(stack)
        logger.info(
            "%s %s is %s, /p2p/%s, listening on %s.",
            self.options.component,
            __version__,
            shown(self.peer_id),
            self.peer_id,
            ", ".join(self.listen_addresses()),
            extra={"peer_id": self.peer_id},
        )
        if self.options.listen and not self._announced():
            logger.info(
                "Other nodes reach this one through a relay only: all its addresses (%s) lie in "
                "exclude_cidr. For direct transfers take their network out of it, or set external_addresses.",
                ", ".join(dict.fromkeys(map(str, self._own_addresses()))),
            )

    def start(self) -> None:
        """Start what goes on in the background."""
        self._nursery.start_soon(self._peers.keep_alive)
        self._nursery.start_soon(self._peers.watch_identity)
        self._nursery.start_soon(self._dht.renew)
        if self.options.hop:
            self._nursery.start_soon(self._gateways.link_all)
            changed, every_s = self._gateways.changed, self.options.timings.doubles_check_s
            self._nursery.start_soon(self._doubles.compare, changed, every_s)
        else:
            self._nursery.start_soon(self._gateways.use_one, self.options.reserve)

    async def note_leaving(self) -> None:
        """Until cancelled; then it is known that the node is about to end."""
        try:
            await trio.sleep_forever()
        finally:
            self._gateways.leaving = True

    async def close(self) -> None:
        """Close every connection and socket, cancelled or not; the background tasks are ending."""
        with trio.CancelScope(shield=True):
            with trio.move_on_after(CLOSE_S):
                # a nursery tells nobody when its last task has ended
                while self._nursery.child_tasks:  # noqa: ASYNC110
                    await trio.sleep(0.005)
                await self._peers.close_all()
            await self._port.sever()
            if self._running:
                await self._host.close()
            await self._port.sever()
        self._gossip.close()

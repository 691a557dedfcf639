"""Who serves a dataset: provider records in the gateways' Kademlia DHT.

Gateways run the library's DHT server. Leaves are clients with a look-up of their own, over the same
wire: the library's asks everybody it ever heard of (most of them no servers, many gone: seconds of
time-outs), returns its own stale records without asking, and counts duplicates. Here only gateways are
asked, each within a bound, and a provider comes back once, with the addresses of its newest record.
Records are renewed whenever the gateway or the own addresses change.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from typing import Any

import trio
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.tools.anyio_service import background_trio_service
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr
from opentelemetry.trace import Span, SpanKind

from hypha.access import DIRECTORY, NOBODY, may_act_as
from hypha.errors import NetworkError, PeerUnreachable, Undecodable
from hypha.messages import PeerRef, is_replica_name
from hypha.net.discovery.dht_records import MAX_QUERY_BYTES, Records, trimmed_query
from hypha.net.libp2p.protobuf_messages import (
    MAX_PEER_ID_BYTES,
    add_traceparent,
    addresses_in,
    decode_message,
    peer_id_in,
    read_message,
    traceparent_of,
)
from hypha.net.libp2p.streams import STREAM_ERRORS, Streams, discard, reset_on_error, roles_behind
from hypha.net.peers.addresses import MAX_ADDRESSES
from hypha.net.peers.dialing import Dialer
from hypha.net.peers.gateways import Gateways
from hypha.net.peers.table import PeerTable
from hypha.telemetry.instruments import DHT_QUERIES, DHT_QUERY_DURATION
from hypha.tracing import failed, span, start_span
from hypha.tracing.operations import DHT_ANSWER, DHT_LOOKUP, DHT_PROVIDE

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 1 << 20
#: At most this many servers are asked in one look-up.
MAX_SERVERS = 8
#: A data node announces all its datasets at once after a failover.
ANNOUNCEMENTS_PER_10_S = 500
IDENTIFY_WAIT_S = 10.0
#: Of a key under which providers are kept; the library takes no longer ones.
MAX_KEY_BYTES = 128
#: A client must have sent its query within this, and taken the answer within this.
READ_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 20.0
#: A data node announces all its datasets at the same time: so many are under way at once, fewer than a
#: gateway serves to one peer (``libp2p/streams.py``).
ANNOUNCED_AT_ONCE = 16


#: What the keys of datasets begin with (that of a SHA-256 multihash), and those of copies of checkpoints: a
#: server has to tell by the key who may announce it.
DATASET_KEYS = b"\x12\x20"
CHECKPOINT_KEYS = b"hypha/checkpoints/"
_DIGEST_BYTES = 32
_QUERIES = {
    Message.GET_PROVIDERS: "find",
    Message.FIND_NODE: "find node",
    Message.PING: "ping",
    Message.PUT_VALUE: "put value",
    Message.GET_VALUE: "get value",
}


def key_of(name: str) -> bytes:
    """The key under which providers of a dataset are kept, or of copies of checkpoints by their name."""
    digest = hashlib.sha256(f"hypha/dataset/{name}".encode()).digest()
    return (CHECKPOINT_KEYS if is_replica_name(name) else DATASET_KEYS) + digest


def query_of(message: Any) -> str | None:
    """What is asked, a key of :data:`hypha.access.DIRECTORY`; ``None`` where that is nothing known."""
    if message.type != Message.ADD_PROVIDER:
        return _QUERIES.get(message.type)
    for prefix, query in ((DATASET_KEYS, "provide dataset"), (CHECKPOINT_KEYS, "provide checkpoints")):
        if message.key.startswith(prefix) and len(message.key) == len(prefix) + _DIGEST_BYTES:
            return query
    return None


class DhtServer:
    """The gateway's side: the library's server, whose routing table holds servers only."""

    def __init__(self, host: Any, streams: Streams, peers: PeerTable, nursery: trio.Nursery) -> None:
        self._host = host
        self._streams = streams
        self._peers = peers
        self._nursery = nursery
        self._dht = KadDHT(host, DHTMode.SERVER)
        streams.handle(str(PROTOCOL_ID), self._serve)
        self._dht._provider_rate_max = ANNOUNCEMENTS_PER_10_S
        # twelve streams of anybody would be all that it serves; how many one peer has is bounded before
        self._dht._inbound_limiter = trio.CapacityLimiter(math.inf)
        self._dht.add_peer = self._ignore  # it would add every client that asks
        self._dht.peer_routing.find_closest_peers_network = self._closest
        self._store = self._dht.provider_store
        self._records = Records(self._store.providers)
        self._library_add_provider = self._store.add_provider
        self._store.add_provider = self._add_provider
        peers.on_connected.append(lambda peer: nursery.start_soon(self._add_if_server, peer))
        peers.on_lost.append(lambda peer: self._dht.routing_table.remove_peer(ID.from_string(peer)))

    async def start(self, stack: AsyncExitStack) -> None:
        """Run until ``stack`` is unwound."""
        await stack.enter_async_context(background_trio_service(self._dht))

    @property
    def known(self) -> int:
        """Peers in the routing table."""
        size: int = self._dht.routing_table.size()
        return size

    async def _serve(self, stream: Any, caller: str) -> None:
        """Have the library answer the first query of a stream, if the caller's role allows it. The library
        would read on until the stream ends, but ours come one a stream, and what it reads nobody has judged.
        """
        try:
            with trio.fail_after(READ_TIMEOUT_S):
                payload = await read_varint_prefixed_bytes_limited(stream, MAX_QUERY_BYTES)
            message = decode_message(Message, payload)
            _check(message)
        except (*STREAM_ERRORS, trio.TooSlowError, Undecodable) as exc:
            logger.debug("A DHT query broke off: %r", exc, extra={"peer_id": caller})
            await discard(stream)
            return
        query = query_of(message)
        allowed = NOBODY if query is None else DIRECTORY[query].by
        if not may_act_as(has := roles_behind(stream), allowed):
            self._streams.say_refused(caller, f"the query {query or 'with an unknown key'!r}", allowed, has)
            await discard(stream)
            return
        if (trimmed := trimmed_query(message)) is None:
            logger.debug("A DHT query is of a kind that is not served here.", extra={"peer_id": caller})
            await discard(stream)
            return
        operation = "provide" if message.type == Message.ADD_PROVIDER else "find"
        answering = start_span(
            DHT_ANSWER,
            {"rpc.system": "kademlia", "rpc.method": operation, "hypha.peer": caller},
            kind=SpanKind.SERVER,
            parent=traceparent_of(message),
        )
        replayed = _Replayed(stream, encode_varint_prefixed(trimmed.SerializeToString()), answering)
        try:
            with trio.move_on_after(ANSWER_TIMEOUT_S) as scope:
                await self._dht.handle_stream(replayed)
            if scope.cancelled_caught:
                await discard(stream)
        finally:
            if not replayed.answered:
                failed(answering, "it was not answered")
                answering.end()
            status = "success" if replayed.answered else "failure"
            DHT_QUERIES.add(side="server", operation=operation, status=status)
            logger.debug("DHT query %s: %s.", operation, status, extra={"peer_id": caller})

    async def _ignore(self, peer_id: ID, *, skip_server_mode_check: bool = False) -> bool:
        return False

    async def _closest(self, target_key: bytes, count: int = 20) -> list[ID]:
        closest: list[ID] = self._dht.routing_table.find_local_closest_peers(target_key, count)
        return closest

    def _add_provider(self, key: bytes, provider: PeerInfo) -> None:
        self._records.make_space(key, str(provider.peer_id))
        self._library_add_provider(key, provider)

    async def _add_if_server(self, peer: str) -> None:
        """Add a peer when identify has said that it speaks Kademlia, so is a gateway too."""
        store, peer_id = self._host.get_peerstore(), ID.from_string(peer)
        try:
            with trio.move_on_after(IDENTIFY_WAIT_S):
                # the library has no event for the end of identify
                while not (store.has_peer(peer_id) and store.get_protocols(peer_id)):  # noqa: ASYNC110
                    await trio.sleep(0.05)
                speaks = str(PROTOCOL_ID) in store.get_protocols(peer_id)
                if speaks and self._peers.may_serve_as("directory", peer):
                    await self._dht.routing_table.add_peer(PeerInfo(peer_id, store.addrs(peer_id)))
        except Exception:  # the edge of a task for a peer: what it said of itself must not end the node
            logger.exception("A DHT server could not be taken up.", extra={"peer_id": peer})


def _check(query: Any) -> None:
    """Undecodable when ``query`` has an identifier that is none: the library would write it out in full."""
    for entry in (*query.providerPeers, *query.closerPeers):
        if len(entry.id) > MAX_PEER_ID_BYTES:
            raise Undecodable(f"it names a peer with an identifier of {len(entry.id)} bytes")
    if len(query.key) > MAX_KEY_BYTES:
        raise Undecodable(f"it has a key of {len(query.key)} bytes")


class _Replayed:
    """A stream of which ``read`` was all; ``answering`` ends with the first answer."""

    def __init__(self, stream: Any, read: bytes, answering: Span) -> None:
        self._stream = stream
        self._left = read
        self._answering = answering
        self.answered = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def read(self, n: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        count = len(self._left) if n is None else n
        data, self._left = self._left[:count], self._left[count:]
        return data

    async def write(self, data: bytes) -> None:
        await self._stream.write(data)
        if not self.answered:
            self.answered = True
            self._answering.end()


class DhtClient:
    """Announces and looks up datasets at the gateways."""

    def __init__(
        self,
        streams: Streams,
        dialer: Dialer,
        gateways: Gateways,
        own_ref: Callable[[], PeerRef],
        learn: Callable[[PeerRef], None],
        timeout_s: float,
    ) -> None:
        self._streams = streams
        self._dialer = dialer
        self._gateways = gateways
        self._own_ref = own_ref
        self._learn = learn
        self._timeout_s = timeout_s
        self._provided: set[str] = set()
        self._announcing = trio.CapacityLimiter(ANNOUNCED_AT_ONCE)

    async def provide(self, dataset: str) -> int:
        """Announce this node as a provider; returns how many gateways took it. Goes on renewing."""
        self._provided.add(dataset)
        return await self._announce(dataset)

    def withdraw(self, dataset: str) -> None:
        """Stop renewing; the record fades."""
        self._provided.discard(dataset)

    async def find(self, dataset: str) -> list[PeerRef]:
        """Who says it serves ``dataset``: hints, to be probed."""
        request = Message(type=Message.GET_PROVIDERS, key=key_of(dataset))
        found: dict[str, PeerRef] = {}
        with span(DHT_LOOKUP, {"hypha.dataset": dataset}, kind=SpanKind.CLIENT) as looking:
            answers = await self._ask_all(request)
            _note(looking, answers)
        for answer in answers:
            for ref in _refs(answer.providerPeers):
                if ref.peer not in found or len(ref.addresses) > len(found[ref.peer].addresses):
                    found[ref.peer] = ref
        own = self._own_ref()
        if dataset in self._provided:
            found[own.peer] = own
        elif own.peer in found:
            del found[own.peer]  # from an earlier life of this node
        for ref in found.values():
            self._learn(ref)
        logger.debug("%d gateways name %d providers of dataset %s.", len(answers), len(found), dataset)
        return list(found.values())

    async def renew(self) -> None:
        """Announce everything again whenever the gateway or the own addresses change."""
        seen = self._gateways.changed.count
        while True:
            seen = await self._gateways.changed.wait(seen)
            if not self._gateways.connected():
                continue
            for dataset in sorted(self._provided):
                if not await self._announce(dataset):
                    logger.warning("No gateway took the announcement of dataset %s; it is repeated.", dataset)

    async def _announce(self, dataset: str) -> int:
        ref = self._own_ref()
        request = Message(type=Message.ADD_PROVIDER, key=key_of(dataset))
        own = request.providerPeers.add()
        own.id = ID.from_string(ref.peer).to_bytes()
        own.addrs.extend(Multiaddr(text).to_bytes() for text in ref.addresses)
        with span(DHT_PROVIDE, {"hypha.dataset": dataset}, kind=SpanKind.CLIENT) as announcing:
            async with self._announcing:
                answers = await self._ask_all(request)
            _note(announcing, answers)
        logger.debug("%d gateways took the announcement of dataset %s.", len(answers), dataset)
        return len(answers)

    async def _ask_all(self, request: Message) -> list[Message]:
        """Answers of all gateways, those that other gateways name included."""
        began = trio.current_time()
        add_traceparent(request)
        answers: list[Message] = []
        asked: set[str] = set()

        async def ask(peer: str, nursery: trio.Nursery) -> None:
            if peer in asked or len(asked) >= MAX_SERVERS:
                return
            asked.add(peer)
            try:
                answer = await self._ask(peer, request)
                answers.append(answer)
                if request.type == Message.ADD_PROVIDER:  # its answer does not name others
                    naming = Message(type=Message.GET_PROVIDERS, key=request.key)
                    add_traceparent(naming)
                    answer = await self._ask(peer, naming)
            except NetworkError as exc:
                logger.info("A DHT request failed: %s.", exc, extra={"peer_id": peer})
                return
            for ref in _refs(answer.closerPeers):
                self._learn(ref)
                nursery.start_soon(ask, ref.peer, nursery)

        with trio.move_on_after(self._timeout_s):
            async with trio.open_nursery() as nursery:
                for peer in self._gateways.connected():
                    nursery.start_soon(ask, peer, nursery)
        operation = "provide" if request.type == Message.ADD_PROVIDER else "find"
        status = "success" if answers else "failure"
        DHT_QUERIES.add(side="client", operation=operation, status=status)
        DHT_QUERY_DURATION.record(trio.current_time() - began, operation=operation)
        return answers

    async def _ask(self, peer: str, request: Message) -> Message:
        await self._dialer.connect(peer, relays=False)
        # another gateway has named it
        self._dialer.peers.require_service("directory", peer)
        stream = await self._streams.open(peer, str(PROTOCOL_ID))
        try:
            async with reset_on_error(stream):
                await stream.write(encode_varint_prefixed(request.SerializeToString()))
                answer: Message = await read_message(stream, Message, MAX_MESSAGE_BYTES)
                await stream.close()
        except Undecodable as exc:
            raise PeerUnreachable(peer, f"its DHT's answer does not decode: {exc}") from exc
        except (*STREAM_ERRORS, EOFError) as exc:
            raise PeerUnreachable(peer, f"its DHT broke off ({exc!r})") from exc
        return answer


def _note(asking: Span, answers: list[Message]) -> None:
    asking.set_attribute("hypha.answers", len(answers))
    if not answers:
        failed(asking, "no gateway answered")


def _refs(entries: Iterable[Any]) -> list[PeerRef]:
    """The peers that an answer names; what is none is passed over."""
    found = []
    for entry in entries:
        try:
            peer = peer_id_in(entry.id)
        except Undecodable as exc:
            logger.debug("A peer from the DHT does not decode: %s", exc)
        else:
            found.append(PeerRef(peer=peer, addresses=tuple(addresses_in(entry.addrs, MAX_ADDRESSES))))
    return found

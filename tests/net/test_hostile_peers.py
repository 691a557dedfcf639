"""What a peer with a valid certificate sends ends its own stream or connection, and never another node.

An attack is a node that sends bytes which no Hypha node would; the one it sends them to has to live on, and
answers a third node's request afterwards. What a peer answers when it is asked, and what comes before any
certificate, is here too.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from libp2p.kad_dht.common import PROTOCOL_ID as KAD
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, StopMessage
from libp2p.utils.varint import encode_uvarint, encode_varint_prefixed
from tests.support.network import Network, address_of

from hypha.errors import NetworkError, PeerUnreachable, Refused
from hypha.messages import (
    WORKER_TOPIC,
    BulkOffer,
    GossipEnvelope,
    Health,
    HealthReport,
    PeerRef,
    RenewLease,
    RequestEnvelope,
    TransferMeta,
)
from hypha.net import Libp2pNode as Node
from hypha.net import rpc
from hypha.net.bulk.sockets import SocketConnection
from hypha.net.bulk.transfers import meta_of
from hypha.net.bulk.wire import BULK_ALPN, BULK_PROTOCOL, encode_length
from hypha.net.libp2p.relay import HOP, STOP
from hypha.net.libp2p.streams import STREAM_ERRORS
from hypha.net.peers.addresses import host_and_port
from hypha.net.reports import PROTOCOL as REPORTS

pytestmark = pytest.mark.loopback

MESHSUB = "/meshsub/1.2.0"
#: four bytes that are no UTF-8, and what stands for them in a message that is encoded before
NO_TEXT = b"\xff\xfe\xfd\xfc"
PLACE = "NOTX"
#: of whom there are addresses only
NOBODY = str(ID(b"\x12\x20" + bytes(32)))
#: an array in an array, and so on: more than any stack takes
DEEP = b"\x91" * 200_000 + b"\xc0"


def ref_of(node: Node) -> PeerRef:
    return PeerRef(peer=node.peer_id, addresses=(address_of(node),))


def spoilt(message: object) -> bytes:
    """``message``, in which ``PLACE`` becomes what is no text."""
    encoded = msgspec.msgpack.encode(message)
    assert PLACE.encode() in encoded
    return encoded.replace(PLACE.encode(), NO_TEXT)


def nested(message: object) -> bytes:
    """``message`` with one field more that nobody knows, nested deep."""
    encoded = msgspec.msgpack.encode(message)
    assert 0x80 <= encoded[0] < 0x8F
    return bytes([encoded[0] + 1]) + b"\xa7unknown" + DEEP + encoded[1:]


def both(message: object) -> list[bytes]:
    return [spoilt(message), nested(message)]


@dataclass
class Case:
    """``hostile`` is a leaf that ``victim``, a gateway or a leaf, trusts; ``directory`` is for files."""

    hostile: Node
    victim: Node
    directory: Path

    async def say(self, protocol: str, *messages: bytes) -> None:
        """Each on a stream of its own, all at once."""

        async def one(data: bytes) -> None:
            # the peer may have refused the stream at once
            with contextlib.suppress(*STREAM_ERRORS, PeerUnreachable):
                stream = await self.hostile.open_stream(ref_of(self.victim), protocol)
                await stream.write(data)
                await stream.close_write()
                with trio.move_on_after(0.3):
                    while await stream.read(65536):
                        pass

        async with trio.open_nursery() as nursery:
            for data in messages:
                nursery.start_soon(one, data)

    @property
    def connection(self) -> Any:
        """The hostile node's own."""
        return self.hostile._swarm.get_connections(ID.from_string(self.victim.peer_id))[0]


Attack = Callable[[Case], Awaitable[None]]
ATTACKS: dict[str, Attack] = {}


def attack(call: Attack) -> Attack:
    ATTACKS[call.__name__] = call
    return call


# --- requests, answers and reports -----------------------------------------------------------------


@attack
async def requests(case: Case) -> None:
    messages = both(RequestEnvelope(body=RenewLease(lease_id=PLACE)))
    messages += [b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", NO_TEXT, DEEP]
    messages.append(msgspec.msgpack.encode(RequestEnvelope(body=Health(), traceparent="00-" + "9" * 5000)))
    await case.say(rpc.PROTOCOL, *map(rpc.frame, messages), NO_TEXT)


@attack
async def answers(case: Case) -> None:
    from hypha.messages import RefusedReply, ResponseEnvelope

    reply = ResponseEnvelope(body=RefusedReply(code="busy", reason=PLACE))
    left = [*both(reply), DEEP, NO_TEXT, b""]

    async def answer(stream: Any, caller: str) -> None:
        await rpc.read_frame(stream, 1 << 20)
        await stream.write(rpc.frame(left.pop(0)))
        await stream.close()

    case.hostile.set_stream_handler(rpc.PROTOCOL, answer)
    await case.hostile.connect(ref_of(case.victim))
    while left:
        with pytest.raises(Refused, match="decode"):
            await case.victim.request(ref_of(case.hostile), Health())


@attack
async def reports(case: Case) -> None:
    case.victim.answer_reports(lambda caller, reports: None)
    one = b"\x91" + nested({"v": 1})
    await case.say(REPORTS, rpc.frame(b"\x91" + NO_TEXT), rpc.frame(one), rpc.frame(DEEP))


# --- gossip ----------------------------------------------------------------------------------------


def signed(case: Case, data: bytes, number: int, topic: str = WORKER_TOPIC) -> rpc_pb2.Message:
    host = case.hostile._host
    message = rpc_pb2.Message(
        data=data, topicIDs=[topic], from_id=host.get_id().to_bytes(), seqno=number.to_bytes(8, "big")
    )
    message.signature = host.get_private_key().sign(
        PUBSUB_SIGNING_PREFIX.encode() + message.SerializeToString()
    )
    message.key = host.get_public_key().serialize()
    return message


def packed(message: Any) -> bytes:
    return encode_varint_prefixed(message.SerializeToString().replace(PLACE.encode(), NO_TEXT))


@attack
async def gossip(case: Case) -> None:
    from tests.net.test_gossip_and_dht import worker_request

    certificates = case.hostile.identity.certificates
    envelope = GossipEnvelope(body=worker_request(case.hostile, PLACE), certificates=certificates)
    case.victim._gateways.known[case.hostile.peer_id] = ()
    messages = [signed(case, data, number) for number, data in enumerate([*both(envelope), DEEP, NO_TEXT])]
    async with case.victim.subscribe():
        await case.say(MESHSUB, *(packed(rpc_pb2.RPC(publish=[one])) for one in messages))


@attack
async def pubsub(case: Case) -> None:
    stranger = signed(case, b"", 77)
    stranger.from_id, stranger.key = b"", NO_TEXT
    unsigned = signed(case, b"", 78)
    unsigned.from_id, unsigned.signature = b"\x12\x20" + bytes(32), b"s"
    unsigned.key = b"\x08\x63\x12\x01a"
    control = rpc_pb2.ControlMessage
    case.victim._gateways.known[case.hostile.peer_id] = ()
    await case.say(
        MESHSUB,
        encode_varint_prefixed(NO_TEXT),
        encode_uvarint(1 << 62),
        b"\xff" * 12,
        packed(rpc_pb2.RPC(publish=[rpc_pb2.Message(topicIDs=[PLACE], data=b"")])),
        packed(rpc_pb2.RPC(publish=[rpc_pb2.Message(topicIDs=[WORKER_TOPIC, PLACE], data=b"")])),
        packed(rpc_pb2.RPC(publish=[stranger])),
        packed(rpc_pb2.RPC(publish=[unsigned])),
        packed(rpc_pb2.RPC(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=PLACE)])),
        packed(rpc_pb2.RPC(control=control(graft=[rpc_pb2.ControlGraft(topicID=PLACE)]))),
        packed(rpc_pb2.RPC(control=control(ihave=[rpc_pb2.ControlIHave(topicID=PLACE, messageIDs=[b"x"])]))),
        packed(
            rpc_pb2.RPC(control=control(prune=[rpc_pb2.ControlPrune(topicID="t", backoff=(1 << 64) - 1)]))
        ),
        packed(rpc_pb2.RPC(control=control(iwant=[rpc_pb2.ControlIWant(messageIDs=[b"abc", NO_TEXT])]))),
    )


# --- the library's own protocols --------------------------------------------------------------------


@attack
async def identify(case: Case) -> None:
    async def answer(stream: Any, caller: str) -> None:
        await stream.write(encode_varint_prefixed(NO_TEXT))
        await stream.close()

    case.hostile.set_stream_handler("/ipfs/id/1.0.0", answer)
    await case.say("/ipfs/id/1.0.0", b"", NO_TEXT)
    await case.say("/ipfs/id/push/1.0.0", encode_varint_prefixed(NO_TEXT), NO_TEXT, b"\x0a\x03\x1a\x01\xff")
    await case.say("/ipfs/ping/1.0.0", b"x" * 31, b"x" * 33, b"")


@attack
async def negotiation(case: Case) -> None:
    await case.hostile.connect(ref_of(case.victim))
    for data in (b"\x05\xff\xfe\xfd\xfc\n", b"\x05abcd\n", b"\xff" * 12, encode_uvarint(1 << 60), b"\x01\n"):
        stream = await case.connection.new_stream()
        with contextlib.suppress(*STREAM_ERRORS):
            await stream.write(data)
            with trio.move_on_after(0.2):
                while await stream.read(65536):
                    pass
    stream = await case.connection.new_stream()
    await stream.write(b"\x13/multistream/1.0.0\n" + b"\x05\xff\xfe\xfd\xfc\n")


@attack
async def before_tls(case: Case) -> None:
    host, port = host_and_port(case.victim.listen_addresses()[0])
    for data in (b"\x05\xff\xfe\xfd\xfc\n", b"\x13/multistream/1.0.0\n\x05\xff\xfe\xfd\xfc\n", b"\x13" * 100):
        stream = await trio.open_tcp_stream(host, port)
        async with stream:
            await stream.send_all(b"\x13" + data[1:] if data[:1] != b"\x13" else data)
            with trio.move_on_after(0.2), contextlib.suppress(trio.BrokenResourceError):
                while await stream.receive_some():
                    pass


@attack
async def a_listener_that_speaks_nonsense(case: Case) -> None:
    greeting = b"\x13/multistream/1.0.0\n"
    left = [
        b"\x05\xff\xfe\xfd\xfc\n",
        greeting + b"\x05\xff\xfe\xfd\xfc\n",
        encode_uvarint(1 << 62),
        greeting * 3,
    ]

    async def serve(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(left.pop(0))
            await stream.receive_some()
            await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        address = f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}"
        while left:
            with pytest.raises(PeerUnreachable):
                await case.victim.connect(PeerRef(peer=NOBODY, addresses=(address,)))
            case.victim._book._learnt.clear()
        nursery.cancel_scope.cancel()


@attack
async def addresses(case: Case) -> None:
    for host in (
        "dns4/" + "a" * 70 + ".example",
        "dns/\x00",
        "dns4/..",
        "ip6zone/x/ip6/fe80::1",
        "dns6/é" * 1,
    ):
        with pytest.raises(PeerUnreachable):
            await case.victim.connect(PeerRef(peer=NOBODY, addresses=(f"/{host}/tcp/1",)))


@attack
async def kademlia(case: Case) -> None:
    if case.victim.dht_server is None:
        return
    provider = Message.Peer(id=b"", addrs=[NO_TEXT, b"\x36\x02\xff\xff"])
    messages = [
        Message(type=kind, key=key, providerPeers=[provider], closerPeers=[provider])
        for kind in range(6)
        for key in (b"", NO_TEXT, b"\x12\x20" + bytes(32))
    ]
    name = Message.Peer(id=b"\x01" * 60_000)
    query = Message(type=Message.ADD_PROVIDER, key=b"k", providerPeers=[name])
    endless = encode_varint_prefixed(query.SerializeToString())
    await case.say(
        str(KAD),
        encode_varint_prefixed(NO_TEXT),
        b"\xff" * 12,
        encode_varint_prefixed(b"\x08\x63"),
        # written in base 58, the name would hold up the loop for a minute
        endless,
        encode_varint_prefixed(Message(type=Message.PING).SerializeToString()) + endless,
        *(encode_varint_prefixed(one.SerializeToString()) for one in messages),
    )


@attack
async def dht_answers(case: Case) -> None:
    odd = [b"\x36\x02\xff\xff", NO_TEXT, b"\x04\x7f", b"\xa5\x03\x02ab", b"\x06"]
    peers = [Message.Peer(id=one, addrs=odd) for one in (b"", NO_TEXT, b"\x12\x20" + bytes(32))]
    good = Message(type=Message.GET_PROVIDERS, providerPeers=peers, closerPeers=peers).SerializeToString()
    left = [
        encode_varint_prefixed(good),
        encode_varint_prefixed(NO_TEXT),
        b"\xff" * 12,
        encode_uvarint(1 << 40),
    ]

    async def answer(stream: Any, caller: str) -> None:
        await stream.write(left.pop(0))
        await stream.close()

    case.hostile.set_stream_handler(str(KAD), answer)
    case.victim._gateways.known[case.hostile.peer_id] = ()
    await case.hostile.connect(ref_of(case.victim))
    while left:
        await case.victim.find_providers("digits")


@attack
async def relay(case: Case) -> None:
    for protocol, message in ((HOP, HopMessage), (STOP, StopMessage)):
        if protocol == HOP and case.victim.hop is None:
            continue
        odd = [
            message(type=1, peer={"id": peer}).SerializeToString()
            for peer in (b"", NO_TEXT, b"\x01" * 60_000)
        ]
        await case.say(
            protocol, *map(encode_varint_prefixed, odd), encode_varint_prefixed(NO_TEXT), b"\xff" * 12
        )


@attack
async def relay_answers(case: Case) -> None:
    greeting = b"\x13/multistream/1.0.0\n"
    accepted = encode_varint_prefixed(HopMessage(type=HopMessage.STATUS, status=100).SerializeToString())
    left = [encode_varint_prefixed(NO_TEXT), b"\xff" * 12, accepted + b"\x05\xff\xfe\xfd\xfc\n"]
    left += [accepted + greeting + b"\x05\xff\xfe\xfd\xfc\n", accepted + encode_uvarint(1 << 62)]

    async def answer(stream: Any, caller: str) -> None:
        await stream.write(left.pop(0))
        await stream.close()

    case.hostile.set_stream_handler(HOP, answer)
    await case.hostile.connect(ref_of(case.victim))
    circuit = f"{address_of(case.hostile)}/p2p-circuit"
    while left:
        with pytest.raises(PeerUnreachable):
            await case.victim.connect(PeerRef(peer=NOBODY, addresses=(circuit,)))


# --- bulk ------------------------------------------------------------------------------------------


FRAMES = [
    *both({"type": "hello", "token": PLACE}),
    *both({"type": "go", "offset": 0, "n": PLACE}),
    DEEP[:9000],
    NO_TEXT,
]


def frames() -> list[bytes]:
    short = [one.replace(DEEP, b"\x91" * 8000 + b"\xc0") for one in FRAMES]
    return [encode_length(len(one)) + one for one in short]


@attack
async def bulk_streams(case: Case) -> None:
    await case.say(BULK_PROTOCOL, *frames(), NO_TEXT)


@attack
async def bulk_sockets_fresh(case: Case) -> None:
    for data in frames():
        await trio.to_thread.run_sync(speak_bulk, case.hostile, case.victim, data)


def speak_bulk(hostile: Node, victim: Node, data: bytes) -> None:
    host, port = host_and_port(victim.listen_addresses()[0])
    context = hostile.identity.client_context(BULK_ALPN)
    with socket.create_connection((host, port), timeout=2) as sock, context.wrap_socket(sock) as tls:
        tls.sendall(data)
        with contextlib.suppress(OSError):
            tls.recv(1000)


async def a_kept_link(case: Case) -> SocketConnection:
    """Of the hostile node to the victim, over which it has sent a file."""

    async def gate(caller: str, meta: TransferMeta) -> Path:
        return case.directory / meta.name

    async def take(caller: str, meta: TransferMeta, path: Path) -> None: ...

    stop = case.victim.transfers.accept("update", None, gate, take)
    source = case.directory / "source"
    source.write_bytes(b"x" * 1000)
    await case.hostile.transfers.send(ref_of(case.victim), source, await meta_of(source, "update", "u"))
    stop()
    link = case.hostile.transfers._kept.take(case.victim.peer_id)
    assert link is not None
    return link


@attack
async def bulk_sockets_kept(case: Case) -> None:
    if case.victim.hop is not None:
        return  # no file goes to a gateway, so it keeps no socket for the next one
    offer = BulkOffer(
        token="t" * 20, meta=TransferMeta(kind="update", name=PLACE, size=1, blake3=""), addresses=()
    )
    odd = [one.replace(DEEP, b"\x91" * 8000 + b"\xc0") for one in both(offer)]
    for data in [encode_length(len(one)) + one for one in odd] + [NO_TEXT]:
        link = await a_kept_link(case)
        await trio.to_thread.run_sync(link._sock.sendall, data)
        with contextlib.suppress(Exception):
            await link.hear()
        link.close_now()


@attack
async def bulk_answers(case: Case) -> None:
    """The victim sends; the receiver's words on its socket are nonsense."""
    source = case.directory / "source"
    source.write_bytes(b"x" * 100_000)
    meta = await meta_of(source, "update", "u")
    for data in frames()[2:]:

        def speak(link: Any, part: Any, meta: Any, data: bytes = data) -> None:
            link._sock.sendall(data)

        async def gate(caller: str, meta: TransferMeta) -> Path:
            return case.directory / meta.name

        async def take(caller: str, meta: TransferMeta, path: Path) -> None: ...

        stop = case.hostile.transfers.accept("update", None, gate, take)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SocketConnection, "_collect", speak)
            # over a stream it may arrive all the same
            with trio.move_on_after(0.5), contextlib.suppress(NetworkError):
                await case.victim.transfers.send(ref_of(case.hostile), source, meta)
        stop()


# --- frames ----------------------------------------------------------------------------------------


@attack
async def yamux(case: Case) -> None:
    import struct

    for number in range(60):
        await case.hostile.connect(ref_of(case.victim))
        muxed = case.connection.muxed_conn
        kind, flags, stream = (
            number % 6,
            (0, 1, 2, 4, 8, 0xFFFF, 5, 9, 13)[number % 9],
            (0, 1, 2, 7, 0xFFFFFFFF)[number % 5],
        )
        length = (0, 1, 1 << 31, 0xFFFFFFFF)[number % 4]
        with contextlib.suppress(*STREAM_ERRORS, StreamError):
            await muxed._write_frame(
                struct.pack(">BBHII", number % 3, kind, flags, stream, length) + b"x" * (length % 9)
            )
        await trio.sleep(0.01)


@pytest.mark.parametrize("victim_is", ["gateway", "leaf"])
async def test_a_node_outlives_what_a_peer_sends(
    victim_is: str, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "nothing yet"
    try:
        async with (
            network.gateway() as gateway,
            network.leaf("worker", [gateway]) as leaf,
            network.leaf("friend") as friend,
            network.leaf("hostile") as hostile,
        ):
            victim = gateway if victim_is == "gateway" else leaf
            for name, attack in ATTACKS.items():  # noqa: B007 - told below
                await attack(Case(hostile, victim, tmp_path))
                with trio.fail_after(5):
                    assert isinstance(await friend.request(ref_of(victim), Health()), HealthReport)
    except BaseException as exc:
        exc.add_note(f"It was the attack by {name}.")
        raise


async def test_a_leaf_hears_no_gossip_of_strangers(network: Network) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway]) as leaf,
        network.leaf("stranger") as stranger,
    ):
        topic = rpc_pb2.RPC.SubOpts(subscribe=True, topicid="a topic of the stranger's")
        case = Case(stranger, leaf, Path())
        await case.say(MESHSUB, packed(rpc_pb2.RPC(subscriptions=[topic])))
        assert "a topic of the stranger's" not in leaf._gossip._pubsub.peer_topics
        await Case(stranger, gateway, Path()).say(MESHSUB, packed(rpc_pb2.RPC(subscriptions=[topic])))
        assert "a topic of the stranger's" in gateway._gossip._pubsub.peer_topics

"""A node with a valid certificate that sends a gateway and a leaf whatever it likes, over every protocol.

``Fuzzer.run`` draws good messages, spoils most of them and sends them; now and then a friend asks both
victims whether they are alive. What is drawn follows from the seed; when things arrive does not.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import psutil
import trio
from libp2p.kad_dht.common import PROTOCOL_ID as KAD
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX
from libp2p.utils.varint import encode_varint_prefixed
from tests.fuzz.mutation import ODD_VALUES, drawn, mutated, oddly_encoded
from tests.recorded.examples import Kind, kinds
from tests.support.network import Network, address_of

from hypha.errors import NetworkError
from hypha.messages import WORKER_TOPIC, Health, HealthReport, PeerRef, TransferMeta
from hypha.net import Libp2pNode as Node
from hypha.net import rpc
from hypha.net.bulk.wire import BULK_ALPN, BULK_PROTOCOL, encode_length
from hypha.net.libp2p.relay import HOP, STOP
from hypha.net.libp2p.streams import STREAM_ERRORS
from hypha.net.peers.addresses import host_and_port
from hypha.net.reports import PROTOCOL as REPORTS

MESHSUB = "/meshsub/1.2.0"
#: Streams that are open at once.
AT_ONCE = 8
#: The friend must be answered within this: a stalled loop answers nobody.
ANSWER_S = 10.0


class Fallen(Exception):
    """A victim answers nobody any more, or has grown."""


@dataclass
class Fuzzer:
    """``hostile`` fuzzes ``gateway`` and ``leaf``; ``friend`` asks how they are."""

    random: Random
    hostile: Node
    gateway: Node
    leaf: Node
    friend: Node
    sent: int = 0
    by_way: dict[str, int] = field(default_factory=dict)
    last: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._requests = [kind for kind in kinds() if str(kind.carrier).endswith("RequestEnvelope'>")]
        self._responses = [kind for kind in kinds() if str(kind.carrier).endswith("ResponseEnvelope'>")]
        self._frames = [kind for kind in kinds() if kind.encoding == "frame"]
        self._report = next(kind for kind in kinds() if kind.name == "report/Report")
        self._gossip = next(kind for kind in kinds() if kind.name.startswith("gossip/"))
        # what the victims ask is answered oddly, and the leaf hears its gossip
        for victim in (self.gateway, self.leaf):
            victim._gateways.known[self.hostile.peer_id] = ()
        for protocol in (rpc.PROTOCOL, str(KAD), HOP, STOP, BULK_PROTOCOL, "/ipfs/id/1.0.0"):
            self.hostile.set_stream_handler(protocol, self._answer)
        self.leaf.answer_reports(lambda caller, reports: None)

    async def run(self, seconds: float) -> None:
        """Until the time is over. Raises Fallen."""
        process = psutil.Process()
        until, check_at, grown_at = time.monotonic() + seconds, time.monotonic() + 0.5, 0
        limiter = trio.CapacityLimiter(AT_ONCE)
        ways = [
            self._streams,
            self._streams,
            self._raw_streams,
            self._yamux,
            self._sockets,
            self._asked,
            self._before,
        ]
        async with trio.open_nursery() as nursery:
            while (now := time.monotonic()) < until:
                if now >= check_at:
                    await self._check()
                    check_at = now + min(5.0, seconds / 4)
                    memory = process.memory_info().rss
                    if not grown_at and now > until - seconds / 2:
                        grown_at = memory
                    # what caches and tables take, they have taken in the first half
                    if grown_at and memory > grown_at + (256 << 20):
                        raise Fallen(
                            f"it grew from {grown_at >> 20} to {memory >> 20} MiB in half of the time"
                        )
                await limiter.acquire_on_behalf_of(token := object())
                nursery.start_soon(self._one, self.random.choice(ways), limiter, token)
            nursery.cancel_scope.deadline = trio.current_time() + 5.0
        await self._check()

    async def _one(
        self, way: Callable[[Node], Awaitable[None]], limiter: trio.CapacityLimiter, token: object
    ) -> None:
        try:
            with (
                trio.move_on_after(1.0),
                contextlib.suppress(*STREAM_ERRORS, NetworkError, EOFError, KeyError),
            ):
                self.sent += 1
                self.by_way[way.__name__] = self.by_way.get(way.__name__, 0) + 1
                await way(self.random.choice((self.gateway, self.leaf)))
        finally:
            limiter.release_on_behalf_of(token)

    async def _check(self) -> None:
        for victim in (self.gateway, self.leaf):
            try:
                with trio.fail_after(ANSWER_S):
                    answer = await self.friend.request(_ref(victim), Health())
            except (NetworkError, trio.TooSlowError) as exc:
                raise Fallen(
                    f"{victim.options.component} does not answer after {self.last[-20:]}: {exc}"
                ) from exc
            assert isinstance(answer, HealthReport)

    # --- what is sent -------------------------------------------------------------------------------

    def _note(self, protocol: str, data: bytes) -> bytes:
        self.last = [*self.last[-40:], f"{protocol} {data[:60].hex()}"]
        return data

    def _encoded(self, found: list[Kind]) -> bytes:
        kind = self.random.choice(found)
        value = kind.example(self.random.random() < 0.3)
        if self.random.random() < 0.4:
            odd = self.random.choice(ODD_VALUES)
            return oddly_encoded(value, "msgpack", self.random.random(), odd)
        return self._spoilt(msgspec.msgpack.encode(value))

    def _spoilt(self, data: bytes) -> bytes:
        return mutated(data, drawn(self.random))

    def _message(self, protocol: str) -> bytes:
        match protocol:
            case rpc.PROTOCOL:
                return rpc.frame(self._encoded(self._requests))
            case _ if protocol == REPORTS:
                return rpc.frame(b"\x91" + self._encoded([self._report]))
            case _ if protocol == MESHSUB:
                return encode_varint_prefixed(self._spoilt(self._pubsub().SerializeToString()))
            case _ if protocol == BULK_PROTOCOL:
                frame = self._encoded(self._frames)[:16000]
                return encode_length(len(frame)) + frame
            case _:
                provider = {
                    "id": self.random.choice((b"", b"\xff", bytes(34), bytes(70_000))),
                    "addrs": [b"\x04\x7f\0\0\1"],
                }
                message: Any
                if protocol == str(KAD):
                    from libp2p.kad_dht.pb.kademlia_pb2 import Message

                    peers = [Message.Peer(**provider)]
                    kind = self.random.randrange(6)
                    message = Message(
                        type=kind, key=self._spoilt(b"key"), providerPeers=peers, closerPeers=peers
                    )
                else:
                    from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, StopMessage

                    kinds_of = HopMessage if protocol == HOP else StopMessage
                    message = kinds_of(type=self.random.randrange(3), peer={"id": provider["id"]}, status=100)
                return encode_varint_prefixed(self._spoilt(message.SerializeToString()))

    def _pubsub(self) -> rpc_pb2.RPC:
        host = self.hostile._host
        message = rpc_pb2.Message(
            data=self._encoded([self._gossip]),
            topicIDs=[WORKER_TOPIC],
            from_id=host.get_id().to_bytes(),
            seqno=self.random.randbytes(8),
        )
        key = host.get_private_key()
        message.signature = key.sign(PUBSUB_SIGNING_PREFIX.encode() + message.SerializeToString())
        message.key = host.get_public_key().serialize()
        control = rpc_pb2.ControlMessage(
            graft=[rpc_pb2.ControlGraft(topicID=WORKER_TOPIC)],
            prune=[rpc_pb2.ControlPrune(topicID="t", backoff=self.random.getrandbits(64))],
            ihave=[rpc_pb2.ControlIHave(topicID=WORKER_TOPIC, messageIDs=[self.random.randbytes(9)])],
            iwant=[rpc_pb2.ControlIWant(messageIDs=[b"abc"])],
        )
        subscription = rpc_pb2.RPC.SubOpts(subscribe=self.random.random() < 0.7, topicid="topic")
        found = rpc_pb2.RPC()
        if self.random.random() < 0.7:
            found.publish.append(message)
        if self.random.random() < 0.4:
            found.control.CopyFrom(control)
        if self.random.random() < 0.4:
            found.subscriptions.append(subscription)
        return found

    # --- ways ---------------------------------------------------------------------------------------

    async def _streams(self, victim: Node) -> None:
        protocols = [rpc.PROTOCOL, REPORTS, MESHSUB, BULK_PROTOCOL, str(KAD), HOP, STOP]
        protocols += ["/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0"]
        protocol = self.random.choice(protocols)
        data = self._note(protocol, self._message(protocol))
        stream = await self.hostile.open_stream(_ref(victim), protocol)
        await self._speak(stream, data)

    async def _speak(self, stream: Any, data: bytes) -> None:
        end = self.random.choice(("close_write", "reset", "close"))
        try:
            await stream.write(data)
            if end == "close_write":
                await stream.close_write()
                with trio.move_on_after(0.05):
                    await stream.read(65536)
        finally:
            with trio.CancelScope(shield=True), contextlib.suppress(Exception):
                await (stream.close() if end == "close" else stream.reset())

    async def _raw_streams(self, victim: Node) -> None:
        """Before a protocol is agreed on."""
        await self.hostile.connect(_ref(victim))
        stream = await self._connection(victim).new_stream()
        good = b"\x13/multistream/1.0.0\n" + self.random.choice((b"\x0d/hypha/rpc/1\n", b"\x03ls\n"))
        await self._speak(stream, self._note("multistream", self._spoilt(good)))

    def _connection(self, victim: Node) -> Any:
        return self.hostile._swarm.get_connections(ID.from_string(victim.peer_id))[0]

    async def _yamux(self, victim: Node) -> None:
        await self.hostile.connect(_ref(victim))
        if self.random.random() < 0.5:  # a connection is dear, and most of these end it
            return
        draw = self.random
        stream_id = draw.choice((0, 1, 2, 3, 9, draw.getrandbits(32)))
        length = draw.choice((0, 1, 12, 1 << 31, (1 << 32) - 1))
        head = struct.pack(
            ">BBHII", draw.choice((0, 0, 1)), draw.randrange(5), draw.getrandbits(4), stream_id, length
        )
        data = self._note("yamux", head + draw.randbytes(min(length, 20)))
        await self._connection(victim).muxed_conn._write_frame(data)

    async def _sockets(self, victim: Node) -> None:
        """The bulk plane's own."""
        frame = self._encoded(self._frames)[:16000]
        data = self._note("bulk", encode_length(len(frame)) + frame)
        await trio.to_thread.run_sync(_speak_bulk, self.hostile, victim, data)

    async def _asked(self, victim: Node) -> None:
        """The victim asks, and the hostile node answers."""
        if self.random.random() < 0.5:
            await victim.request(_ref(self.hostile), Health(), timeout_s=0.5)
        elif self.random.random() < 0.5:
            await victim.find_providers("digits")
        else:
            nobody = str(ID(b"\x12\x20" + self.random.randbytes(32)))
            circuit = f"{address_of(self.hostile)}/p2p-circuit"
            await victim.connect(PeerRef(peer=nobody, addresses=(circuit, "/dns4/" + "a" * 70 + "/tcp/1")))

    async def _answer(self, stream: Any, caller: str) -> None:
        protocol = str(stream.get_protocol())
        if protocol == rpc.PROTOCOL:
            data = rpc.frame(self._encoded(self._responses))
        else:
            data = self._message(protocol)
        await self._speak(stream, self._note(f"answer {protocol}", data))

    async def _before(self, victim: Node) -> None:
        """Before TLS, without any certificate."""
        host, port = host_and_port(victim.listen_addresses()[0])
        good = b"\x13/multistream/1.0.0\n\x0b/tls/1.0.0\n" + bytes.fromhex("16030100050100000100")
        data = self._note("tcp", self._spoilt(good))
        async with await trio.open_tcp_stream(host, port) as stream:
            with contextlib.suppress(trio.BrokenResourceError), trio.move_on_after(0.05):
                await stream.send_all(data)
                await stream.receive_some()


def _ref(node: Node) -> PeerRef:
    return PeerRef(peer=node.peer_id, addresses=(address_of(node),))


def _speak_bulk(hostile: Node, victim: Node, data: bytes) -> None:
    host, port = host_and_port(victim.listen_addresses()[0])
    context = hostile.identity.client_context(BULK_ALPN)
    with contextlib.suppress(OSError):
        with socket.create_connection((host, port), timeout=1) as sock, context.wrap_socket(sock) as tls:
            tls.sendall(data)
            tls.settimeout(0.05)
            tls.recv(1000)


async def fuzz_connections(directory: Path, seed: int, seconds: float) -> Fuzzer:
    """What was sent, where both victims live. Raises Fallen, or what ended a node."""
    network = Network(directory / "network")

    async def refuse(caller: str, meta: TransferMeta) -> Path:
        return directory / "taken"

    async def take(caller: str, meta: TransferMeta, path: Path) -> None: ...

    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway]) as leaf,
        network.leaf("friend") as friend,
        network.leaf("hostile") as hostile,
        leaf.subscribe(),
    ):
        leaf.transfers.accept("update", None, refuse, take)
        fuzzer = Fuzzer(Random(seed), hostile, gateway, leaf, friend)
        try:
            await fuzzer.run(seconds)
        except BaseException as exc:
            exc.add_note(
                f"It was seed {seed}, after {fuzzer.sent} messages; the last ones: {fuzzer.last[-10:]}"
            )
            raise
    return fuzzer

"""The bulk plane between real nodes: whole files arrive by whatever way there is, and refusals are heard."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from msgspec.structs import replace
from tests.support.network import Network, Pki, until
from tests.support.stopwatch import Stopwatch

from hypha.errors import Refused, TransferCorrupt, TransferFailed
from hypha.messages import BulkDial, BulkOffer, JobStamp, PeerRef, PullFile, TransferMeta
from hypha.net import Libp2pNode as Node
from hypha.net.bulk.transfers import meta_of
from hypha.net.bulk.wire import BULK_ALPN, Go, Hello, Verdict, encode_frame
from hypha.pki.identity import load_identity

pytestmark = pytest.mark.loopback

NO_LOOPBACK = ("127.0.0.0/8",)


@dataclass
class Inbox:
    """Accepts files into a directory and remembers what came."""

    directory: Path
    arrived: list[tuple[str, TransferMeta, Path]] = field(default_factory=list)
    asked: int = 0
    refuse_gate: Refused | None = None
    refuse_arrived: Refused | None = None

    async def gate(self, caller: str, meta: TransferMeta) -> Path:
        self.asked += 1
        if self.refuse_gate is not None:
            raise self.refuse_gate
        return self.directory / meta.name

    async def take(self, caller: str, meta: TransferMeta, path: Path) -> None:
        assert await trio.Path(path).exists()
        if self.refuse_arrived is not None:
            raise self.refuse_arrived
        self.arrived.append((caller, meta, path))

    def on(self, node: Node, kind: str = "update", job_id: str | None = None) -> Callable[[], None]:
        return node.transfers.accept(kind, job_id, self.gate, self.take)

    @property
    def names(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()} if self.directory.exists() else set()


@dataclass
class Pair:
    """Two connected nodes."""

    near: Node
    far: Node


@asynccontextmanager
async def pair(network: Network) -> AsyncIterator[Pair]:
    async with network.gateway(roles=()) as far, network.leaf("worker", [far]) as near:
        yield Pair(near, far)


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    return Inbox(tmp_path / "inbox")


def write(path: Path, size: int) -> Path:
    path.write_bytes(os.urandom(size))
    return path


async def test_fifty_megabytes_go_both_ways(network: Network, tmp_path: Path, inbox: Inbox) -> None:
    source = write(tmp_path / "source", 50 << 20)
    async with pair(network) as ends:
        inbox.on(ends.far)
        meta = replace(await meta_of(source, "update", "one", JobStamp(job_id="j", round=3)), samples=7)
        await ends.near.transfers.send(ends.far.ref(), source, meta)
        assert inbox.arrived == [(ends.near.peer_id, meta, inbox.directory / "one")]
        assert (inbox.directory / "one").read_bytes() == source.read_bytes()
        assert ends.near.transfers.tally.sent == meta.size == ends.far.transfers.tally.received

        served = await meta_of(source, "slice", "set/0")

        async def provide(caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
            assert (caller, request.name) == (ends.near.peer_id, "set/0")
            return source, served

        ends.far.transfers.serve("slice", provide)
        destination = tmp_path / "deep" / "down" / "slice"
        request = PullFile(kind="slice", name="set/0")
        meta = await ends.near.transfers.pull(ends.far.peer_id, request, destination, served, 1 << 30)
        assert meta == served
        assert destination.read_bytes() == source.read_bytes()
        assert {path.name for path in destination.parent.iterdir()} == {"slice"}


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, (1 << 20) + 1])
async def test_sizes_around_the_edges(network: Network, tmp_path: Path, inbox: Inbox, size: int) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(size // 2) + os.urandom(size - size // 2))
    async with pair(network) as ends:
        inbox.on(ends.far)
        await ends.near.transfers.send(ends.far.ref(), source, await meta_of(source, "update", "file"))
    assert (inbox.directory / "file").read_bytes() == source.read_bytes()


async def test_the_gate_refuses(network: Network, tmp_path: Path, inbox: Inbox) -> None:
    source = write(tmp_path / "source", 1000)
    inbox.refuse_gate = Refused("stale", "round 2 is over")
    async with pair(network) as ends:
        inbox.on(ends.far)
        with pytest.raises(Refused, match="round 2 is over") as refused:
            await ends.near.transfers.send(ends.far.ref(), source, await meta_of(source, "update", "x"))
    assert (refused.value.code, refused.value.peer) == ("stale", ends.far.peer_id)
    assert inbox.names == set()


async def test_what_is_refused_on_arrival_is_deleted(network: Network, tmp_path: Path, inbox: Inbox) -> None:
    source = write(tmp_path / "source", 1000)
    inbox.refuse_arrived = Refused("invalid", "a value is not finite")
    async with pair(network) as ends:
        inbox.on(ends.far)
        with pytest.raises(Refused, match="not finite"):
            await ends.near.transfers.send(ends.far.ref(), source, await meta_of(source, "update", "x"))
    assert inbox.names == set()


async def test_files_go_to_who_accepts_them_for_that_job(
    network: Network, tmp_path: Path, inbox: Inbox
) -> None:
    source = write(tmp_path / "source", 1000)
    mine = await meta_of(source, "update", "x", stamp=JobStamp(job_id="mine"))
    other = await meta_of(source, "update", "y", stamp=JobStamp(job_id="other"))
    async with pair(network) as ends:
        stop = inbox.on(ends.far, job_id="mine")
        await ends.near.transfers.send(ends.far.ref(), source, mine)
        with pytest.raises(Refused) as refused:
            await ends.near.transfers.send(ends.far.ref(), source, other)
        assert refused.value.code == "not-found"
        with pytest.raises(ValueError, match="already"):
            inbox.on(ends.far, job_id="mine")
        stop()
        with pytest.raises(Refused):
            await ends.near.transfers.send(ends.far.ref(), source, mine)
    assert inbox.names == {"x"}


async def test_accepting_may_stop_from_within_the_arrival(
    network: Network, tmp_path: Path, inbox: Inbox
) -> None:
    source = write(tmp_path / "source", 1000)
    async with pair(network) as ends:

        async def take_one(caller: str, meta: TransferMeta, path: Path) -> None:
            await inbox.take(caller, meta, path)
            stop()

        stop = ends.far.transfers.accept("update", None, inbox.gate, take_one)
        await ends.near.transfers.send(ends.far.ref(), source, await meta_of(source, "update", "x"))
    assert len(inbox.arrived) == 1


async def test_a_file_that_changed_since_it_was_offered_is_not_sent_as_if_whole(
    network: Network, tmp_path: Path, inbox: Inbox
) -> None:
    source = write(tmp_path / "source", 3 << 20)
    meta = await meta_of(source, "update", "x")
    async with pair(network) as ends:
        inbox.on(ends.far)
        with source.open("r+b") as file:
            file.write(b"something else")
        with pytest.raises(TransferCorrupt, match="promised hash"):
            await ends.near.transfers.send(ends.far.ref(), source, meta)
        assert inbox.names == set()
        os.truncate(source, 100)
        with pytest.raises(TransferFailed, match="100 bytes"):
            await ends.near.transfers.send(ends.far.ref(), source, meta)
        source.unlink()
        with pytest.raises(TransferFailed, match="cannot be read"):
            await ends.near.transfers.send(ends.far.ref(), source, meta)
    assert inbox.arrived == []


async def test_a_pull_takes_only_what_it_wants(network: Network, tmp_path: Path) -> None:
    source = write(tmp_path / "source", 1 << 20)
    served = await meta_of(source, "slice", "set/0")
    destination = tmp_path / "got"
    request = PullFile(kind="slice", name="set/0")
    async with pair(network) as ends:

        async def provide(caller: str, wanted: PullFile) -> tuple[Path, TransferMeta]:
            if wanted.name != "set/0":
                raise Refused("not-found", f"there is no {wanted.name}")
            return source, served

        ends.far.transfers.serve("slice", provide)
        pull = ends.near.transfers.pull
        with pytest.raises(Refused, match="over the limit"):
            await pull(ends.far.peer_id, request, destination, None, 1000)
        other = TransferMeta(kind="slice", name="set/0", size=served.size, blake3="0" * 64)
        with pytest.raises(TransferCorrupt, match="other content"):
            await pull(ends.far.peer_id, request, destination, other, 1 << 30)
        with pytest.raises(Refused, match="there is no set/1"):
            await pull(ends.far.peer_id, PullFile(kind="slice", name="set/1"), destination, None, 1 << 30)
        with pytest.raises(Refused) as refused:
            await pull(ends.far.peer_id, PullFile(kind="model", name="m"), destination, None, 1 << 30)
        assert refused.value.code == "not-found"
        # of another kind it would be checked by a hash that is easily matched
        quick = msgspec.structs.replace(served, kind="update", xxh3="0" * 32)
        served, honest = quick, served
        with pytest.raises(TransferCorrupt, match="of the kind 'update'"):
            await pull(ends.far.peer_id, request, destination, honest, 1 << 30)
        served = honest
        # a provider whose disk lies: the hash it promises is not that of the bytes it sends
        with source.open("r+b") as file:
            file.write(b"something else")
        with pytest.raises(TransferCorrupt, match="promised hash"):
            await pull(ends.far.peer_id, request, destination, served, 1 << 30)
    assert not destination.exists()
    assert not destination.with_name("got.part").exists()


async def test_a_peer_that_is_gone_fails_the_transfer(network: Network, tmp_path: Path, inbox: Inbox) -> None:
    source = write(tmp_path / "source", 1000)
    meta = await meta_of(source, "update", "x")
    nobody = network.pki.identity("nobody").peer_id
    async with pair(network) as ends:
        with pytest.raises(TransferFailed):
            await ends.near.transfers.send(nobody, source, meta)
        with pytest.raises(TransferFailed):
            await ends.near.transfers.pull(
                nobody, PullFile(kind="slice", name="x"), tmp_path / "y", None, 1000
            )


async def test_a_stale_part_costs_a_second_round_and_nothing_else(network: Network, tmp_path: Path) -> None:
    source = write(tmp_path / "source", 3 << 20)
    served = await meta_of(source, "slice", "set/0")
    destination = tmp_path / "got"
    destination.with_name("got.part").write_bytes(os.urandom(1 << 20))
    async with pair(network) as ends:

        async def provide(caller: str, wanted: PullFile) -> tuple[Path, TransferMeta]:
            return source, served

        ends.far.transfers.serve("slice", provide)
        await ends.near.transfers.pull(
            ends.far.peer_id, PullFile(kind="slice", name="set/0"), destination, served, 1 << 30
        )
    assert destination.read_bytes() == source.read_bytes()


async def test_a_part_of_an_earlier_process_is_resumed(network: Network, tmp_path: Path) -> None:
    source = write(tmp_path / "source", 5 << 20)
    served = await meta_of(source, "slice", "set/0")
    destination = tmp_path / "got"
    destination.with_name("got.part").write_bytes(source.read_bytes()[: 4 << 20])
    async with pair(network) as ends:

        async def provide(caller: str, wanted: PullFile) -> tuple[Path, TransferMeta]:
            return source, served

        ends.far.transfers.serve("slice", provide)
        await ends.near.transfers.pull(
            ends.far.peer_id, PullFile(kind="slice", name="set/0"), destination, served, 1 << 30
        )
        assert ends.near.transfers.tally.received == 1 << 20
    assert destination.read_bytes() == source.read_bytes()


async def test_a_node_may_send_to_itself(network: Network, tmp_path: Path, inbox: Inbox) -> None:
    source = write(tmp_path / "source", 1 << 20)
    meta = await meta_of(source, "update", "x")
    async with network.gateway(roles=()) as node:
        inbox.on(node)
        await node.transfers.send(node.ref(), source, meta)
        assert inbox.arrived == [(node.peer_id, meta, inbox.directory / "x")]
        inbox.refuse_arrived = Refused("duplicate", "it is here")
        with pytest.raises(Refused, match="it is here"):
            await node.transfers.send(node.ref(), source, meta)

        async def provide(caller: str, wanted: PullFile) -> tuple[Path, TransferMeta]:
            return source, meta

        node.transfers.serve("update", provide)
        request = PullFile(kind="update", name="x")
        assert await node.transfers.pull(node.peer_id, request, tmp_path / "y", meta, 1 << 30) == meta
        assert (tmp_path / "y").read_bytes() == source.read_bytes()


async def test_a_receiver_that_cannot_be_dialled_dials_back(
    network: Network, tmp_path: Path, inbox: Inbox
) -> None:
    source = write(tmp_path / "source", 2 << 20)
    async with (
        network.gateway(roles=()) as sender,
        # announces nothing, as if behind NAT; it has dialled the sender
        network.leaf("worker", [sender], exclude_cidr=NO_LOOPBACK, reserve=False) as receiver,
    ):
        assert receiver.bulk_addresses() == []
        assert await sender.bulk_targets(receiver.peer_id, ()) == []
        inbox.on(receiver)
        for name in ("first", "again"):
            await sender.transfers.send(receiver.peer_id, source, await meta_of(source, "update", name))
    assert (inbox.directory / "again").read_bytes() == source.read_bytes()


async def test_two_nodes_that_cannot_dial_each_other_use_the_relay(
    network: Network, tmp_path: Path, inbox: Inbox
) -> None:
    source = write(tmp_path / "source", 5 << 20)
    async with (
        network.gateway() as gateway,
        network.leaf("a", [gateway], exclude_cidr=NO_LOOPBACK) as sender,
        network.leaf("b", [gateway], exclude_cidr=NO_LOOPBACK) as receiver,
    ):
        await until(lambda: any("p2p-circuit" in one for one in receiver.ref().addresses))
        inbox.on(receiver)
        for name in ("first", "again"):
            await sender.transfers.send(receiver.ref(), source, await meta_of(source, "update", name))
            assert (inbox.directory / name).read_bytes() == source.read_bytes()
        assert {one.kind for one in sender.connections() if one.peer == receiver.peer_id} == {"relayed"}
        # refusals and lies are heard through the relay as well
        inbox.refuse_arrived = Refused("invalid", "no good")
        with pytest.raises(Refused, match="no good"):
            await sender.transfers.send(receiver.ref(), source, await meta_of(source, "update", "bad"))
        meta = await meta_of(source, "update", "lie")
        with source.open("r+b") as file:
            file.write(b"something else")
        with pytest.raises(TransferCorrupt):
            await sender.transfers.send(receiver.ref(), source, meta)
    assert inbox.names == {"first", "again"}


async def test_twenty_transfers_queue_and_all_arrive(network: Network, tmp_path: Path, inbox: Inbox) -> None:
    source = write(tmp_path / "source", 1 << 20)
    most_at_once = 0
    async with (
        network.gateway(roles=()) as far,
        network.leaf("a", [far]) as one,
        network.leaf("b", [far]) as two,
    ):
        inbox.on(far)
        # the other way round at the same time: neither side may wait for the other for ever
        back = Inbox(tmp_path / "back")
        back.on(one)

        async def watch() -> None:
            nonlocal most_at_once
            while True:
                most_at_once = max(most_at_once, sum(name.endswith(".part") for name in inbox.names))
                await trio.sleep(0.002)

        async def send(node: Node, peer: PeerRef, name: str) -> None:
            await node.transfers.send(peer, source, await meta_of(source, "update", name))

        async with trio.open_nursery() as watching:
            watching.start_soon(watch)
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for number in range(10):
                        nursery.start_soon(send, one, far.ref(), f"one-{number}")
                        nursery.start_soon(send, two, far.ref(), f"two-{number}")
                    for number in range(5):
                        nursery.start_soon(send, far, one.ref(), f"back-{number}")
            watching.cancel_scope.cancel()
    assert len(inbox.arrived) == 20
    assert len(back.arrived) == 5
    assert most_at_once <= 2


def dial_as(network_identity: Pki, node: Node, token: str) -> bytes:
    """Connect to a node's bulk plane with a fresh certificate and somebody's token; what it says."""
    identity = load_identity(network_identity.files("thief"))
    port = int(node.listen_addresses()[0].rpartition("/")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        with identity.client_context(BULK_ALPN).wrap_socket(sock) as tls:
            tls.sendall(encode_frame(Hello(token)))
            data = b""
            while more := tls.recv(65536):
                data += more
    return data


async def test_a_stolen_token_is_worth_nothing(
    network: Network, tmp_path: Path, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thief says it before the receiver, which was asked to dial, does."""
    source = write(tmp_path / "source", 1000)
    stolen: list[bytes] = []
    real = Node.request

    async def overheard(self: Node, peer: Any, request: Any, timeout_s: float = 10.0) -> Any:
        if isinstance(request, BulkDial):
            stolen.append(await trio.to_thread.run_sync(dial_as, network.pki, self, request.token))
        return await real(self, peer, request, timeout_s)

    monkeypatch.setattr(Node, "request", overheard)
    async with (
        network.gateway(roles=()) as sender,
        network.leaf("worker", [sender], exclude_cidr=NO_LOOPBACK, reserve=False) as receiver,
    ):
        inbox.on(receiver)
        await sender.transfers.send(receiver.peer_id, source, await meta_of(source, "update", "x"))
    assert stolen == [b""]
    assert inbox.names == {"x"}


async def test_an_offer_under_the_token_of_another_one_is_refused(
    network: Network, tmp_path: Path, inbox: Inbox
) -> None:
    source = write(tmp_path / "source", 1000)
    async with pair(network) as ends, network.leaf("thief", [ends.far]) as thief:
        inbox.on(ends.far)
        offer = BulkOffer(
            token="a-token-that-is-long-enough", meta=await meta_of(source, "update", "x"), addresses=()
        )
        link, answer = await ends.near.transfers._rendezvous.ask(ends.far.peer_id, lambda: offer)
        assert isinstance(answer, Go)
        other, refusal = await thief.transfers._rendezvous.ask(ends.far.peer_id, lambda: offer)
        assert isinstance(refusal, Verdict)
        assert (refusal.outcome, refusal.code) == ("refused", "not-found")
        assert "another transfer" in refusal.reason
        await link.close()
        await other.close()
    assert inbox.names <= {"x.part"}


def knock(node: Node, hello: bytes) -> bytes:
    port = int(node.listen_addresses()[0].rpartition("/")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(hello)
        with suppress(ConnectionError):
            return sock.recv(65536)
    return b""


async def test_junk_and_strangers_on_the_port_do_no_harm(
    network: Network, tmp_path: Path, inbox: Inbox
) -> None:
    source = write(tmp_path / "source", 1000)
    stranger = Pki(tmp_path / "other", "Other").identity()
    async with pair(network) as ends:
        inbox.on(ends.far)
        for junk in (b"\x16", b"\x16" + os.urandom(500), b"\x16\x03\x01\x02\x00"):
            await trio.to_thread.run_sync(knock, ends.far, junk + bytes(600))
        port = int(ends.far.listen_addresses()[0].rpartition("/")[2])

        def with_another_ca() -> None:
            with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
                context = stranger.client_context()
                with context.wrap_socket(sock) as tls:
                    tls.recv(1)

        with pytest.raises(ssl.SSLCertVerificationError):
            await trio.to_thread.run_sync(with_another_ca)
        await ends.near.transfers.send(ends.far.ref(), source, await meta_of(source, "update", "x"))
    assert inbox.names == {"x"}


async def test_a_silent_bulk_connection_does_not_hold_up_the_end_of_a_node(network: Network) -> None:
    with socket.socket() as silent:
        async with network.gateway(roles=()) as node:
            address = ("127.0.0.1", int(node.listen_addresses()[0].rpartition("/")[2]))
            await trio.to_thread.run_sync(silent.connect, address)
            silent.sendall(b"\x16\x03\x01")
            await trio.sleep(0.1)  # lets the node take it over; either way it must be quick to end
            started = Stopwatch()
        assert started.elapsed_s() < 3
        silent.settimeout(3)
        with suppress(ConnectionError):
            assert silent.recv(1) == b""

"""Who may connect: each way of not being allowed to is refused."""

from __future__ import annotations

import datetime
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from multiaddr import Multiaddr
from tests.support.network import Network, Pki, address_of, until

from hypha.errors import PeerUnreachable, Refused
from hypha.messages import Acknowledged, Health, HealthReport, PeerRef, RenewLease
from hypha.net import Libp2pNode as Node
from hypha.net import open_node
from hypha.net.peers.addresses import host_and_port
from hypha.net.peers.table import PeerTable
from hypha.net.sockets import RESEND_WITHIN_MS, TCP_RTO_MAX_MS, resend_soon
from hypha.pki.authority import revoke
from hypha.pki.identity import IdentityFiles, load_identity

pytestmark = pytest.mark.loopback


def ref_of(node: Node) -> PeerRef:
    return PeerRef(peer=node.peer_id, addresses=(address_of(node),))


async def assert_strangers(one: Node, other: Node) -> None:
    """Neither can reach the other."""
    for caller, callee in ((one, other), (other, one)):
        with pytest.raises(PeerUnreachable):
            await caller.request(ref_of(callee), Health(), timeout_s=5)
    await until(lambda: not one.connections() and not other.connections())


@asynccontextmanager
async def pair(network: Network, other: Node | None = None) -> AsyncIterator[tuple[Node, Node]]:
    async with network.leaf("scheduler") as one, network.leaf("worker") as two:
        yield one, two


async def test_certified_nodes_connect(network: Network) -> None:
    async with pair(network) as (one, two):
        assert isinstance(await one.request(ref_of(two), Health()), HealthReport)
        (connection,) = one.connections()
        assert connection.peer == two.peer_id


async def test_a_line_that_was_cut_is_tried_again_once_a_second(network: Network) -> None:
    with socket.socket() as sock:
        resend_soon(sock)  # harmless where the kernel does not know it
        try:
            assert sock.getsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS) == RESEND_WITHIN_MS
        except OSError:
            pytest.skip("this kernel has no TCP_RTO_MAX_MS")
    async with pair(network) as ends:
        await ends[0].request(ref_of(ends[1]), Health())
        for node in ends:
            open_now = [stream.stream.socket for stream in node._port._streams]
            assert open_now
            for one in open_now:
                assert one.getsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS) == RESEND_WITHIN_MS


async def test_an_unknown_ca_is_refused(network: Network, tmp_path: Path) -> None:
    stranger = Pki(tmp_path / "other", "Stranger").identity("stranger")
    async with network.leaf("worker") as ours, network.leaf("worker", identity=stranger) as theirs:
        await assert_strangers(ours, theirs)


async def test_a_revoked_certificate_is_refused(network: Network, tmp_path: Path) -> None:
    revoked = network.pki.files("revoked")
    crl = tmp_path / "crls.pem"
    revoke(network.pki.org, [revoked.cert], crl)
    good = network.pki.files("good")
    aware = load_identity(IdentityFiles(good.cert, good.key, good.trust, crl))
    async with (
        network.leaf("worker", identity=aware) as ours,
        network.leaf("worker", identity=load_identity(revoked)) as theirs,
    ):
        await assert_strangers(ours, theirs)


def end_within(files: IdentityFiles, ca_key: Path, seconds: float) -> None:
    """Sign the certificate in ``files`` again, to end ``seconds`` from now."""
    old = x509.load_pem_x509_certificate(files.cert.read_bytes())
    key = load_pem_private_key(ca_key.read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey)
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(
        old.issuer,
        old.subject,
        old.public_key(),
        x509.random_serial_number(),
        now - datetime.timedelta(days=1),
        now + datetime.timedelta(seconds=seconds),
        list(old.extensions),
    )
    files.cert.write_bytes(builder.sign(key, None).public_bytes(Encoding.PEM))


async def test_an_expired_certificate_is_refused(network: Network, caplog: pytest.LogCaptureFixture) -> None:
    files = network.pki.files("brief")
    end_within(files, network.pki.org.key, 1.5)
    identity = load_identity(files)  # still good
    async with network.leaf("worker") as ours, network.leaf("worker", identity=identity) as theirs:
        await trio.sleep(2.1)
        await assert_strangers(ours, theirs)
        # whoever was dialled tells of it: the dialler's place is all that is known of it
        await until(lambda: "handshake with 127.0.0.1:" in caplog.text and "has expired" in caplog.text)


async def test_another_peer_than_expected_is_refused(network: Network) -> None:
    async with network.leaf("a") as one, network.leaf("b") as two, network.leaf("c") as third:
        lie = PeerRef(peer=third.peer_id, addresses=(two.listen_addresses()[0],))
        with pytest.raises(PeerUnreachable, match="expected peer"):
            await one.request(lie, Health())
        assert not one.is_connected(two.peer_id)
        assert not one.is_connected(third.peer_id)


async def dial_tls(node: Node, context: ssl.SSLContext) -> trio.SSLStream[trio.SocketStream]:
    """A TLS client on the libp2p plane: multistream first, then our handshake."""
    tcp = await trio.open_tcp_stream(*host_and_port(node.listen_addresses()[0]))
    await tcp.send_all(b"\x13/multistream/1.0.0\n")
    await tcp.send_all(b"\x0b/tls/1.0.0\n")
    expected = b"\x13/multistream/1.0.0\n\x0b/tls/1.0.0\n"
    received = b""
    while len(received) < len(expected):
        received += await tcp.receive_some(len(expected) - len(received))
    assert received == expected
    stream = trio.SSLStream(tcp, context, server_hostname="node", https_compatible=True)
    await stream.do_handshake()
    return stream


async def read_to_end(stream: trio.abc.ReceiveStream) -> None:
    while await stream.receive_some(1024):
        pass


async def test_a_client_without_certificate_is_refused(network: Network) -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    async with network.leaf("worker") as node:
        stream = await dial_tls(node, context)
        with trio.fail_after(20), pytest.raises(trio.BrokenResourceError):
            await read_to_end(stream)  # in TLS 1.3 the client learns of the refusal with its first read
        await trio.aclose_forcefully(stream)
        assert node.connections() == []


async def test_a_client_that_speaks_no_tls_is_cut_off(network: Network) -> None:
    async with network.leaf("worker") as node:
        place = host_and_port(node.listen_addresses()[0])
        for greeting in (b"GET / HTTP/1.0\r\n\r\n", b"\x13/multistream/1.0.0\n\x0b/tls/1.0.0\nhello" * 50):
            async with await trio.open_tcp_stream(*place) as tcp:
                await tcp.send_all(greeting)
                with trio.fail_after(20), suppress(trio.BrokenResourceError):
                    await read_to_end(tcp)
        assert node.connections() == []


async def test_a_dial_that_is_given_up_is_no_warning(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    """Of several addresses that are dialled at once all but one are, each time somebody connects."""
    caplog.set_level(logging.DEBUG)
    async with network.leaf("worker") as node:
        greeting, echoed = b"\x13/multistream/1.0.0\n\x0b/tls/1.0.0\n", b""
        async with await trio.open_tcp_stream(*host_and_port(address_of(node))) as tcp:
            await tcp.send_all(greeting)
            with trio.fail_after(5):
                while len(echoed) < len(greeting):
                    echoed += await tcp.receive_some()
        await until(lambda: "closed during the handshake" in caplog.text)
    told = [one.levelno for one in caplog.records if "closed during the handshake" in one.getMessage()]
    assert told == [logging.DEBUG]


async def test_default_libp2p_clients_are_refused(network: Network) -> None:
    # offers noise, its own TLS, secio and plaintext
    host = new_host()
    async with network.leaf("worker") as node, host.run(listen_addrs=[]):
        info = info_from_p2p_addr(Multiaddr(address_of(node)))
        with trio.fail_after(30), pytest.raises(BaseLibp2pError):
            await host.connect(info)
        assert node.connections() == []
        await host.close()


async def test_a_plaintext_libp2p_client_is_refused(network: Network) -> None:
    keys = create_new_key_pair()
    host = new_host(key_pair=keys, sec_opt={PLAINTEXT_PROTOCOL_ID: InsecureTransport(keys)})
    async with network.leaf("worker") as node, host.run(listen_addrs=[]):
        info = info_from_p2p_addr(Multiaddr(address_of(node)))
        with trio.fail_after(30), pytest.raises(BaseLibp2pError):
            await host.connect(info)
        assert node.connections() == []
        await host.close()


async def test_the_wrong_role_is_refused_and_none_is_any(network: Network) -> None:
    async def renewed(caller: str, request: RenewLease) -> Acknowledged:
        return Acknowledged()

    async with (
        network.leaf("worker", roles=("worker",)) as worker,
        network.leaf("worker", roles=("worker", "data")) as other_worker,
        network.leaf("scheduler", roles=("scheduler",)) as scheduler,
        network.leaf("anything") as anything,
    ):
        worker.answer(RenewLease, renewed)
        with pytest.raises(Refused) as refused:
            await other_worker.request(ref_of(worker), RenewLease(lease_id="1"))
        assert refused.value.code == "role"
        assert await scheduler.request(ref_of(worker), RenewLease(lease_id="1")) == Acknowledged()
        assert await anything.request(ref_of(worker), RenewLease(lease_id="1")) == Acknowledged()
        assert worker.roles_of(other_worker.peer_id) == {"worker", "data"}
        assert worker.roles_of(anything.peer_id) == frozenset()


async def test_roles_are_known_as_soon_as_somebody_counts_as_connected(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = trio.Event()
    connected = PeerTable.connected

    async def late(peers: PeerTable, swarm: object, connection: object) -> None:
        await told.wait()
        await connected(peers, swarm, connection)

    async with pair(network) as (one, two):
        monkeypatch.setattr(PeerTable, "connected", late)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.connect, ref_of(two))
            await until(lambda: one.is_connected(two.peer_id))
            # returns at once, while the swarm has still to tell of the connection
            await one.connect(ref_of(two))
            assert one.roles_of(two.peer_id) == frozenset()
            told.set()


async def test_with_require_roles_a_certificate_without_one_is_refused(network: Network) -> None:
    async with (
        network.leaf("worker", roles=("worker",), require_roles=True) as strict,
        network.leaf("anything") as anything,
        network.leaf("scheduler", roles=("scheduler",)) as scheduler,
    ):
        await assert_strangers(strict, anything)
        await scheduler.request(ref_of(strict), Health())


async def test_live_connections_of_a_peer_revoked_meanwhile_are_closed(
    network: Network, tmp_path: Path
) -> None:
    bystander, victim = network.pki.files("bystander"), network.pki.files("victim")
    crl = tmp_path / "crls.pem"
    revoke(network.pki.org, [bystander.cert], crl)
    good = network.pki.files("good")
    aware = load_identity(IdentityFiles(good.cert, good.key, good.trust, crl))
    async with (
        network.leaf("scheduler", identity=aware) as ours,
        network.leaf("worker", identity=load_identity(victim)) as theirs,
        network.leaf("worker") as innocent,
    ):
        await ours.request(ref_of(theirs), Health())
        await ours.request(ref_of(innocent), Health())
        async with ours.watch_peers() as lost:
            revoke(network.pki.org, [victim.cert], crl)
            with trio.fail_after(20):
                assert (await lost.receive()).peer == theirs.peer_id
        with pytest.raises(PeerUnreachable):
            await ours.request(ref_of(theirs), Health())
        assert ours.is_connected(innocent.peer_id)


async def test_a_broken_new_file_leaves_the_old_identity_in_force(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    files = network.pki.files("node")
    identity = load_identity(files)
    async with network.leaf("worker", identity=identity) as node, network.leaf("scheduler") as other:
        with caplog.at_level(logging.ERROR, "hypha.net"):
            files.cert.write_text("nonsense")
            await until(lambda: "stay in force" in caplog.text)
        await other.request(ref_of(node), Health())


async def test_bulk_connections_are_closed_while_there_is_no_bulk_plane(network: Network) -> None:
    async with open_node(network.options("worker")) as node:
        node._port.serve_bulk = None
        place = host_and_port(node.listen_addresses()[0])
        async with await trio.open_tcp_stream(*place) as tcp:
            await tcp.send_all(b"\x16\x03\x01")
            with trio.fail_after(20), suppress(trio.BrokenResourceError):
                await read_to_end(tcp)

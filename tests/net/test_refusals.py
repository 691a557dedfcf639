"""Why a node is not to be had at an address, in plain words, also where it is the other end that refuses."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from tests.net.test_reports import report
from tests.net.test_transport import end_within
from tests.support.network import LOOPBACK, Network, Pki, address_of

from hypha.errors import NetworkError, PeerUnreachable
from hypha.messages import PeerRef
from hypha.net.peers.addresses import host_and_port
from hypha.net.peers.reasons import CERTIFICATE, SAME_CERTIFICATE, Refusal, encoded, refusal_in
from hypha.pki.authority import revoke
from hypha.pki.identity import IdentityFiles, load_identity

pytestmark = pytest.mark.loopback


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(CERTIFICATE, "certificate CN=worker-1 was revoked by CN=Test CA"),
        Refusal(SAME_CERTIFICATE, "192.0.2.7:4001"),
        Refusal("unheard-of", ""),
    ],
)
def test_a_refusal_is_read_as_it_was_written(refusal: Refusal) -> None:
    assert refusal_in(encoded(refusal)) == refusal
    assert refusal.detail in str(refusal)


def test_a_refusal_is_one_line_that_controls_no_terminal() -> None:
    said = encoded(Refusal(CERTIFICATE, "gone\r\nhypha\x1b[2J" + "x" * 5000))
    assert said.count(b"\n") == 1
    read = refusal_in(said)
    assert read is not None
    assert read.detail.startswith("gone hypha [2Jxxx")
    assert len(read.detail) <= 300
    # the greeting of a node that says nothing of the kind
    assert refusal_in(b"\x13/multistream/1.0.0\n") is None


async def why(network: Network, address: str, **changes: object) -> str:
    """Why a node cannot connect to ``address``, as a probe says it."""
    async with network.leaf("probe", **changes) as node:
        _, _, peer = address.rpartition("/p2p/")
        try:
            if not peer.startswith("12D3"):
                peer = await node.who_is_at(address)
            node.learn(PeerRef(peer=peer, addresses=(address,)))
            await node.connect(peer)
        except NetworkError as exc:
            return str(exc)
        raise AssertionError(f"{address} can be reached")


@asynccontextmanager
async def speaking(first: bytes) -> AsyncIterator[str]:
    """The address of something that is no node: it says ``first`` to everybody."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def speak(stream: trio.SocketStream) -> None:
            async with stream:
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(first)
                    while await stream.receive_some():
                        pass

        nursery.start_soon(trio.serve_listeners, speak, [listener])
        yield f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "first",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 200, b"\x05\xff\xfe\xfd\xfc\xfb" * 40, b"\x80" * 99],
)
async def test_what_is_no_node_is_told_as_such(network: Network, first: bytes) -> None:
    async with speaking(first) as address, network.leaf("worker") as somebody:
        assert "no Hypha node" in await why(network, address)
        assert "no Hypha node" in await why(network, f"{address}/p2p/{somebody.peer_id}")


async def test_nothing_there_and_no_way_there(network: Network) -> None:
    async with network.leaf("worker") as gone:
        address = address_of(gone)
    assert "nothing listens there (Connection refused)" in await why(network, address)
    assert "nothing listens there" in await why(network, address.partition("/p2p/")[0])
    # of this kind of address there is one place for everything
    assert "there is no route to it" in await why(network, f"/ip4/255.255.255.255/tcp/1/p2p/{gone.peer_id}")


async def test_another_node_than_expected(network: Network) -> None:
    async with network.leaf("worker") as one, network.leaf("data") as other:
        mixed = f"{one.listen_addresses()[0]}/p2p/{other.peer_id}"
        said = await why(network, mixed)
        assert f"expected peer {other.peer_id}, but the certificate there is of {one.peer_id}" in said


async def test_a_stranger_is_told_that_its_authority_is_unknown(network: Network, tmp_path: Path) -> None:
    stranger = Pki(tmp_path / "other", "Stranger")
    async with network.leaf("worker") as node:
        said = await why(network, address_of(node), identity=stranger.identity("probe"))
        assert "its certificate is of a CA that is not in the trust bundle of this node" in said
    # one that trusts both is refused by a node that does not
    files = stranger.files("probe")
    both = tmp_path / "both.pem"
    assert network.pki.org.trust is not None
    both.write_bytes(files.trust.read_bytes() + network.pki.org.trust.read_bytes())
    wide = load_identity(IdentityFiles(files.cert, files.key, both))
    async with network.leaf("worker") as node:
        said = await why(network, address_of(node), identity=wide)
        assert "the CA of this node's certificate is not in its trust bundle" in said


async def test_who_is_revoked_expired_or_has_no_role_is_told_so(network: Network, tmp_path: Path) -> None:
    revoked, brief = network.pki.files("revoked"), network.pki.files("brief")
    crl = tmp_path / "crls.pem"
    revoke(network.pki.org, [revoked.cert], crl)
    good = network.pki.files("good", roles=("worker",))
    strict = load_identity(IdentityFiles(good.cert, good.key, good.trust, crl))
    end_within(brief, network.pki.org.key, 1.5)
    expiring = load_identity(brief)
    async with network.leaf("worker", identity=strict, require_roles=True) as node:
        address = address_of(node)
        said = await why(network, address, identity=load_identity(revoked))
        assert "the node there refuses this one: certificate" in said
        assert "was revoked" in said
        said = await why(network, address, identity=network.pki.identity("nobody"))
        assert "carries no role" in said
        await trio.sleep(1.6)
        said = await why(network, address, identity=expiring)
        assert "this node's certificate has expired" in said
    async with network.leaf("worker", identity=expiring) as old:
        assert "its certificate has expired" in await why(network, address_of(old))


async def test_a_node_that_is_dialled_by_itself(network: Network) -> None:
    async with network.leaf("worker", listen=LOOPBACK) as node:
        with pytest.raises(NetworkError, match="uses the same certificate"):
            await node.connect(node.peer_id)
        assert host_and_port(address_of(node))


async def test_whoever_refuses_this_nodes_certificate_is_dialled_less_and_less(
    network: Network, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Until its own files have changed: what wants something of the peer asks several times a second."""
    bystander, revoked = network.pki.files("bystander"), network.pki.files("revoked", ("worker",))
    crl = tmp_path / "crls.pem"
    revoke(network.pki.org, [bystander.cert, revoked.cert], crl)
    good = network.pki.files("good", ("scheduler",))
    strict = load_identity(IdentityFiles(good.cert, good.key, good.trust, crl))
    patient = network.timings.model_copy(update={"reconnect_max_s": 30.0, "identity_poll_s": 600.0})
    async with (
        network.leaf("scheduler", identity=strict) as scheduler,
        network.leaf("worker", identity=load_identity(revoked), timings=patient) as worker,
    ):
        worker.learn(PeerRef(peer=scheduler.peer_id, addresses=(address_of(scheduler),)))
        with caplog.at_level(logging.DEBUG, "hypha.net"):
            began = trio.current_time()
            while trio.current_time() - began < 2.5:
                with pytest.raises(PeerUnreachable, match="was revoked"):
                    await worker.connect(scheduler.peer_id)
                worker.report(scheduler.peer_id, report(1))
                await trio.sleep(0.05)
            dialled = [line for line in caplog.messages if line.startswith("No connection after")]
            assert len(dialled) == 2
            loud = [one for one in caplog.records if one.levelno > logging.DEBUG]
            assert len([one for one in loud if "Reports to" in one.getMessage()]) == 1
            assert len([one for one in loud if "handshake" in one.getMessage()]) == 1
            # it has another certificate, perhaps
            revoked.cert.write_bytes(revoked.cert.read_bytes() + b"\n")
            assert await worker._peers.reload_identity()
            with pytest.raises(PeerUnreachable, match="was revoked"):
                await worker.connect(scheduler.peer_id)
            dialled = [line for line in caplog.messages if line.startswith("No connection after")]
            assert len(dialled) == 3

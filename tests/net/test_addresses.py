"""The address book: pure."""

from __future__ import annotations

import pytest

from hypha.messages import PeerRef
from hypha.net.peers.addresses import MAX_ADDRESSES, Address, AddressBook, host_and_port, parse

ME = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
GATEWAY = "12D3KooWHdiAxVd8uMQR1hGWXccidmfCwLqcMpGwR6QcTP6QRMuD"
PEER = "12D3KooWSCufgHzV4fCwRijfH2k3abrpAJxTKxEvN1FDuRXA2U9x"


def test_parse_tells_transport_peer_and_relay() -> None:
    assert parse("/ip4/1.2.3.4/tcp/5") == Address("/ip4/1.2.3.4/tcp/5", None)
    assert parse(f"/dns4/a.example/tcp/5/p2p/{PEER}") == Address("/dns4/a.example/tcp/5", PEER)
    circuit = f"/ip4/1.2.3.4/tcp/5/p2p/{GATEWAY}/p2p-circuit/p2p/{PEER}"
    assert parse(circuit) == Address("/ip4/1.2.3.4/tcp/5", PEER, relay=GATEWAY)
    assert str(parse(circuit)) == circuit
    assert host_and_port("/ip6/::1/tcp/77/p2p/" + PEER) == ("::1", 77)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "/ip4/1.2.3.4",
        "/ip4/1.2.3.4/udp/5/quic-v1",
        "/ip4/1.2.3.4/tcp/5/p2p-circuit",
        "/ip4/300.2.3.4/tcp/5",
        f"/p2p/{GATEWAY}/p2p-circuit/p2p/{PEER}",
        "/ip4/1.2.3.4/tcp/5/p2p/xyz",
    ],
)
def test_parse_refuses_what_cannot_be_dialled(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(text)


def test_the_newest_direct_address_comes_first_circuits_are_apart() -> None:
    book = AddressBook(ME)
    circuit = f"/ip4/9.9.9.9/tcp/9/p2p/{GATEWAY}/p2p-circuit/p2p/{PEER}"
    book.learn(PeerRef(peer=PEER, addresses=("/ip4/1.1.1.1/tcp/1", circuit)))
    book.learn(PeerRef(peer=PEER, addresses=(f"/ip4/2.2.2.2/tcp/2/p2p/{PEER}",)))
    assert [one.transport for one in book.direct(PEER)] == ["/ip4/2.2.2.2/tcp/2", "/ip4/1.1.1.1/tcp/1"]
    assert [one.relay for one in book.circuits(PEER)] == [GATEWAY]
    assert [str(one) for one in book.circuits(PEER)] == [circuit]


def test_excluded_own_foreign_and_unspecified_addresses_are_not_learnt() -> None:
    book = AddressBook(ME, ["10.0.0.0/8", "::1/128"])
    book.learn(PeerRef(peer=ME, addresses=("/ip4/1.1.1.1/tcp/1",)))
    assert book.direct(ME) == []
    foreign = f"/ip4/1.1.1.1/tcp/1/p2p/{GATEWAY}"
    hidden = f"/ip4/10.0.0.2/tcp/9/p2p/{GATEWAY}/p2p-circuit/p2p/{PEER}"
    written = ("/ip6/::ffff:10.1.2.3/tcp/1", "/ip6/64:ff9b::a01:203/tcp/1")
    refs = ("/ip4/10.1.2.3/tcp/1", "/ip6/::1/tcp/1", "/ip4/0.0.0.0/tcp/1", *written, foreign, hidden, "junk")
    book.learn(PeerRef(peer=PEER, addresses=refs))
    assert book.direct(PEER) == book.circuits(PEER) == []


def test_configured_gateways_are_exempt_from_exclusion_with_the_circuits_through_them() -> None:
    book = AddressBook(ME, ["10.0.0.0/8"])
    book.configure(f"/ip4/10.0.0.1/tcp/9/p2p/{GATEWAY}")
    assert [one.transport for one in book.direct(GATEWAY)] == ["/ip4/10.0.0.1/tcp/9"]
    circuit = f"/ip4/10.0.0.1/tcp/9/p2p/{GATEWAY}/p2p-circuit/p2p/{PEER}"
    book.learn(PeerRef(peer=PEER, addresses=(circuit,)))
    assert [str(one) for one in book.circuits(PEER)] == [circuit]


def test_nobody_can_fill_the_book_for_one_peer() -> None:
    book = AddressBook(ME)
    for block in range(4):
        many = tuple(f"/ip4/1.1.{block}.{host}/tcp/1" for host in range(1, 200))
        book.learn(PeerRef(peer=PEER, addresses=many))
    assert len(book.direct(PEER)) == MAX_ADDRESSES
    assert book.direct(PEER)[0].transport == "/ip4/1.1.3.1/tcp/1"


def test_a_forgotten_address_is_gone() -> None:
    book = AddressBook(ME)
    book.learn(PeerRef(peer=PEER, addresses=("/ip4/1.1.1.1/tcp/1",)))
    book.forget(PEER, book.direct(PEER)[0])
    assert book.direct(PEER) == []


def test_what_is_not_dialled_for_its_network_is_kept_to_say_so() -> None:
    book = AddressBook("me", ["10.0.0.0/8"])
    relay = (
        "/ip4/192.0.2.1/tcp/1/p2p/12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo/p2p-circuit/p2p/"
        + PEER
    )
    book.learn(PeerRef(peer=PEER, addresses=("/ip4/10.1.2.3/tcp/8", relay)))
    assert book.left_out(PEER) == ("/ip4/10.1.2.3/tcp/8",)
    assert book.direct(PEER) == []
    assert book.left_out("another") == ()

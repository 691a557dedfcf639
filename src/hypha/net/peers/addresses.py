"""Multiaddrs as Hypha uses them, and the address book: who may be reached where.

Pure: text in, text out. Circuit addresses have the form
``/ip4/../tcp/../p2p/<relay>/p2p-circuit/p2p/<peer>``. Addresses inside ``exclude_cidr`` never enter the
book, unless they were configured (gateways).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from multiaddr import Multiaddr

from hypha.config.networks import ExcludedNetworks
from hypha.decoding import decode
from hypha.errors import Undecodable
from hypha.messages import MAX_ADDRESS_LENGTH, PeerRef

#: More than this for one peer is somebody making us dial around.
MAX_ADDRESSES = 16
MAX_PEERS = 20_000


@dataclass(frozen=True)
class Address:
    """A parsed address: ``transport`` without any ``/p2p``, the peer it ends at, the relay if any."""

    transport: str
    peer: str | None
    relay: str | None = None

    @property
    def is_circuit(self) -> bool:
        return self.relay is not None

    def __str__(self) -> str:
        relay = f"/p2p/{self.relay}/p2p-circuit" if self.relay is not None else ""
        peer = f"/p2p/{self.peer}" if self.peer is not None else ""
        return f"{self.transport}{relay}{peer}"


def parse(text: str) -> Address:
    """``text`` as an :class:`Address`; ValueError when it is none that can be dialled over TCP."""
    if len(text) > MAX_ADDRESS_LENGTH:
        raise ValueError(f"{text[:40]!r}... is longer than any address: it has {len(text)} characters")
    try:
        canonical = decode(lambda one: str(Multiaddr(one)), text)
    except Undecodable as exc:
        raise ValueError(f"{text!r} is no multiaddr: {exc}") from exc
    before, circuit, after = canonical.partition("/p2p-circuit")
    transport, _, first_peer = before.partition("/p2p/")
    if "/tcp/" not in transport or "/" in first_peer or (circuit and not first_peer):
        raise ValueError(f"{text!r} is no TCP address that a node can dial")
    if not circuit:
        return Address(transport, first_peer or None)
    target = after.removeprefix("/p2p/")
    if after and (target == after or "/" in target):
        raise ValueError(f"{text!r} does not say which peer is behind the relay")
    return Address(transport, target or None, relay=first_peer)


def ip_of(address: Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP of the first hop; None for DNS names."""
    parts = address.transport.split("/")
    return ipaddress.ip_address(parts[2]) if parts[1] in ("ip4", "ip6") else None


def host_and_port(text: str) -> tuple[str, int]:
    """Host and TCP port of the first hop; ValueError when ``text`` has none."""
    parts = parse(text).transport.split("/")
    return parts[2], int(parts[parts.index("tcp") + 1])


class AddressBook:
    """Where peers may be reached. Newest first; direct before relayed."""

    def __init__(self, own_peer: str, exclude: Iterable[str] = ()) -> None:
        self.own_peer = own_peer
        self._exclude = ExcludedNetworks(exclude)
        self._learnt: dict[str, dict[str, Address]] = {}
        self._configured: dict[str, dict[str, Address]] = {}
        #: what was learnt last and lies in ``exclude_cidr``, of peers in ``_learnt``
        self._left_out: dict[str, tuple[str, ...]] = {}

    def excluded(self, address: Address) -> bool:
        """Whether the first hop lies in ``exclude_cidr``, however it is written."""
        ip = ip_of(address)
        return ip is not None and self._exclude.holds(ip)

    def configure(self, text: str) -> Address:
        """Remember an address that the operator gave; ``exclude_cidr`` does not apply to it."""
        address = parse(text)
        if address.peer is not None:
            self._configured.setdefault(address.peer, {})[str(address)] = address
        return address

    def may_lead_anywhere(self, peer: str, address: Address) -> bool:
        """Whether the name in ``address`` may stand for one inside ``exclude_cidr``: the operator gave it."""
        return str(address) in self._configured.get(peer, {})

    def learn(self, ref: PeerRef) -> None:
        """Remember what of ``ref`` can be dialled; what cannot is passed over silently, as it is hearsay."""
        if ref.peer == self.own_peer:
            return
        left_out = []
        for text in reversed(ref.addresses[:MAX_ADDRESSES]):
            try:
                address = parse(text)
            except ValueError:
                continue
            if address.peer is None:
                address = Address(address.transport, ref.peer, address.relay)
            configured_relay = address.relay is not None and address.relay in self._configured
            unspecified = (ip := ip_of(address)) is not None and ip.is_unspecified
            if address.peer != ref.peer or unspecified:
                continue
            if self.excluded(address) and not configured_relay:
                left_out.append(address.transport)
                continue
            self._remember(ref.peer, address)
        if left_out and ref.peer in self._learnt:
            self._left_out[ref.peer] = tuple(left_out)

    def left_out(self, peer: str) -> tuple[str, ...]:
        """Direct addresses that ``peer`` was last said to have, and that ``exclude_cidr`` forbids to dial."""
        return self._left_out.get(peer, ())

    def _remember(self, peer: str, address: Address) -> None:
        known = self._learnt.pop(peer, {})  # re-inserted: the book forgets the longest unheard-of first
        known.pop(str(address), None)
        self._learnt[peer] = dict([(str(address), address), *known.items()][:MAX_ADDRESSES])
        while len(self._learnt) > MAX_PEERS:
            forgotten = next(iter(self._learnt))
            del self._learnt[forgotten]
            self._left_out.pop(forgotten, None)

    def forget(self, peer: str, address: Address) -> None:
        """Drop a learnt address, for instance after another peer answered there."""
        self._learnt.get(peer, {}).pop(str(address), None)

    def direct(self, peer: str) -> list[Address]:
        return [address for address in self._all(peer) if not address.is_circuit]

    def circuits(self, peer: str) -> list[Address]:
        return [address for address in self._all(peer) if address.is_circuit]

    def _all(self, peer: str) -> list[Address]:
        known = {**self._configured.get(peer, {}), **self._learnt.get(peer, {})}
        return list(known.values())

"""``exclude_cidr`` as it is asked about each address: networks, and every way to write an address in them.

An IPv6 address may stand for an IPv4 one (mapped, translated by NAT64, tunnelled by 6to4), and the
unspecified address leads to this very machine. Whoever excludes a network means the machines in it, however
they are written.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: The last 32 bits are the IPv4 address: NAT64 (RFC 6052, and RFC 8215's for local use), and the old
#: "IPv4-compatible" form of RFC 4291.
_EMBEDDING = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "::/96")))
_THIS_HOST = ipaddress.IPv4Network("0.0.0.0/8")
_LOOPBACK = ipaddress.IPv4Address("127.0.0.1")


def is_address(host: str) -> bool:
    """Whether ``host`` is an address, and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class ExcludedNetworks:
    """The networks of one ``exclude_cidr``. ValueError when one of them is none."""

    def __init__(self, cidrs: Iterable[str] = ()) -> None:
        self._networks: tuple[Network, ...] = tuple(ipaddress.ip_network(cidr) for cidr in cidrs)

    def holds(self, address: Ip) -> bool:
        """Whether ``address``, or what it stands for, lies in one of them."""
        return any(one in network for one in meanings(address) for network in self._networks)


def meanings(address: Ip) -> Iterator[Ip]:
    """``address`` itself, and the IPv4 addresses that packets to it reach."""
    yield address
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            yield from meanings(address.ipv4_mapped)
        if address.sixtofour is not None:
            yield from meanings(address.sixtofour)
        if any(address in network for network in _EMBEDDING) and int(address) > 1:
            yield from meanings(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.is_unspecified:
            yield _LOOPBACK
    elif address in _THIS_HOST:
        # Linux connects to 0.0.0.0 as to itself
        yield _LOOPBACK

"""What of the network is excluded or allowed: ``exclude_cidr`` with every way to write an address in it, and
the patterns of URLs in allow-lists.

An IPv6 address may stand for an IPv4 one (mapped, translated by NAT64, tunnelled by 6to4), and the
unspecified address leads to this very machine. Whoever excludes a network means the machines in it, however
they are written.

Patterns of URLs are matched part by part: scheme, host, port and path each by itself. As a shell-style
pattern of the whole text ``https://good.org*`` would match ``https://good.org.evil.com``, and a ``*`` of the
path could reach into the host. Here a ``*`` is all of a host, or its first labels (``*.good.org``); in a path
it stands for any text, slashes included. ``*`` alone matches every URL.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

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


_PORTS = {"http": "80", "https": "443"}
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_WILD = re.compile(r"[*?\[\]]")
_IPV6 = re.compile(r"\[[0-9a-fA-F:.]+\]")


@dataclass(frozen=True)
class UrlPattern:
    """``user``, ``host`` and ``port`` are those between ``//`` and the path; empty where there are none."""

    scheme: str
    user: str
    host: str
    port: str
    path: str
    #: of http(s) alone; None: any
    query: str | None = None

    @classmethod
    def parse(cls, text: str) -> UrlPattern:
        """ValueError says what is wrong with ``text``, and what to write instead."""
        if text == "*":
            return cls("*", "", "*", "*", "*")
        scheme, separator, rest = text.partition("://")
        scheme = scheme.lower()
        if not separator or not _SCHEME.fullmatch(scheme):
            raise ValueError(f"{text!r} is no pattern of a URL such as https://models.example.org/*")
        place, slash, path = rest.partition("/")
        user, host, port = split_place(place)
        query: str | None = None
        if scheme in _PORTS:
            path, mark, asked = path.partition("?")
            query = asked if mark else None
            port = port or _PORTS[scheme]
            if user:
                raise ValueError(f"{text!r} holds a user name, which no URL that is fetched may")
        bare = host.removeprefix("*.") if host != "*" else ""
        wild = _WILD.search(bare) and not _IPV6.fullmatch(bare)
        if not host or wild or (port != "*" and _WILD.search(port)):
            raise ValueError(
                f"the host of {text!r} should be a name, *.name or *, with the path after a slash, such as "
                "https://models.example.org/*"
            )
        return cls(scheme, user, host.lower(), port, slash + path, query)

    def matches(self, scheme: str, user: str, host: str, port: str, path: str, query: str = "") -> bool:
        """Whether a URL of those parts is one of this pattern; ``path`` begins with its slash."""
        if self.scheme == "*":
            return True
        return (
            self.scheme == scheme.lower()
            and self.user == user
            and self._matches_host(host.lower())
            and self.port in ("*", port or _PORTS.get(self.scheme, ""))
            and fnmatchcase(path or "/", self.path or "/")
            and (self.query is None or fnmatchcase(query, self.query))
        )

    def names_host(self, host: str) -> bool:
        """Whether it names ``host`` itself, rather than many hosts."""
        return self.host == host.lower()

    def _matches_host(self, host: str) -> bool:
        if self.host == "*":
            return True
        if self.host.startswith("*."):
            return host.endswith(self.host[1:]) and len(host) > len(self.host) - 1
        return self.host == host


def split_place(place: str) -> tuple[str, str, str]:
    """User (with a password), host and port of what stands between ``//`` and the path of a URL."""
    user, _, machine = place.rpartition("@")
    if machine.startswith("["):
        host, bracket, port = machine.partition("]")
        return user, host + bracket, port.removeprefix(":")
    host, _, port = machine.partition(":")
    return user, host, port

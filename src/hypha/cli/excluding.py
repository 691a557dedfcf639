"""Which networks ``init`` writes into ``exclude_cidr``."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable

import typer

from hypha.errors import ConfigError


def excluded_for(
    addresses: Iterable[str], given: list[str] | None, allowed: list[str] | None = None
) -> list[str] | None:
    """The default ``exclude_cidr`` without the networks that ``addresses`` lie in, and without those that are
    ``allowed``, or ``given`` without those; ``None``: as it is. Names are looked up: a gateway given by its
    name in a private network leads to direct connections as one given by its address does. A name that has no
    address here is printed. Raises
    ConfigError where one of ``allowed`` is no network.
    """
    from hypha.config.models import RESERVED_CIDR

    if allowed:
        return _without(given or excluded_for(addresses, None) or list(RESERVED_CIDR), allowed)
    if given:
        return given
    hosts = set[ipaddress.IPv4Address | ipaddress.IPv6Address]()
    for text in addresses:
        parts = text.split("/")
        if len(parts) > 2 and parts[1] in ("ip4", "ip6"):
            with contextlib.suppress(ValueError):
                hosts.add(ipaddress.ip_address(parts[2]))
        elif len(parts) > 2 and parts[1] in ("dns", "dns4", "dns6"):
            hosts |= _looked_up(parts[2])
    kept = [cidr for cidr in RESERVED_CIDR if not any(host in ipaddress.ip_network(cidr) for host in hosts)]
    return kept if len(kept) < len(RESERVED_CIDR) else None


def _without(excluded: list[str], allowed: list[str]) -> list[str]:
    kept = {cidr: ipaddress.ip_network(cidr) for cidr in excluded}
    for text in allowed:
        try:
            network = ipaddress.ip_network(text)
        except ValueError as exc:
            raise ConfigError(f"--allow-cidr {text}: it is no network such as 10.0.0.0/8: {exc}") from exc
        for cidr, other in list(kept.items()):
            if other.version != network.version or not other.overlaps(network):
                continue
            # of a network of which only a part is allowed the rest stays out
            parts = other.address_exclude(network) if network.subnet_of(other) else ()  # type: ignore[arg-type]
            del kept[cidr]
            kept |= {str(part): part for part in parts}
    return list(kept)


def _looked_up(name: str) -> set[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as exc:
        typer.echo(
            f"note: {name} has no address here now ({exc.strerror or exc}); if it is in a private network, "
            "take that out of exclude_cidr, or all traffic is relayed"
        )
        return set()
    return {ipaddress.ip_address(str(place[0]).partition("%")[0]) for *_, place in found}

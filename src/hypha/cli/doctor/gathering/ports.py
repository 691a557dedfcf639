"""The ports that a node is to listen on: free, its own already, or somebody else's."""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable

import httpx
import trio

from hypha.cli.doctor.gathered import Port
from hypha.config.models import NodeConfig
from hypha.decoding import decode_json
from hypha.errors import NetworkError, Undecodable
from hypha.messages import HealthReport
from hypha.net.peers.addresses import host_and_port

HTTP_S = 3.0
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def free_ports(config: NodeConfig) -> list[Port]:
    """Those of ``config`` that have a number: ``free``, ``other`` (in use) or ``foreign``."""
    found = []
    for address in config.listen_addresses:
        host, number = host_and_port(address)
        if number:
            found.append(_try("listen_addresses", address, host, number))
    if config.http_address is not None:
        host, _, port = config.http_address.rpartition(":")
        if int(port):
            found.append(_try("http_address", config.http_address, host.strip("[]"), int(port)))
    return found


def _try(key: str, address: str, host: str, port: int) -> Port:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
            # two may be bound to one port that reuse it, and only one may listen
            tried.listen(1)
        except socket.gaierror as exc:
            return Port(key, address, "foreign", f"{host} has no address here ({exc.strerror})")
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                return Port(key, address, "other")
            if exc.errno == errno.EADDRNOTAVAIL:
                return Port(key, address, "foreign", f"{host} is no address of this machine")
            return Port(key, address, "foreign", exc.strerror or str(exc))
    return Port(key, address, "free")


async def owned(
    ports: list[Port], own_peer: str, who_is_at: Callable[[str], Awaitable[str]]
) -> tuple[Port, ...]:
    """``ports`` with those that are ``own``: a node with the PeerID ``own_peer`` answers there."""
    found = dict(enumerate(ports))

    async def look(number: int, port: Port) -> None:
        found[number] = await _owner(port, own_peer, who_is_at)

    async with trio.open_nursery() as nursery:
        for number, port in found.items():
            if port.state == "other":
                nursery.start_soon(look, number, port)
    return tuple(found[number] for number in sorted(found))


async def _owner(port: Port, own_peer: str, who_is_at: Callable[[str], Awaitable[str]]) -> Port:
    if port.key == "http_address":
        report = await ask_health(port.address)
        peer, why = (
            (report.peer, "") if report is not None else ("", "what listens there is no node of Hypha")
        )
    else:
        host, number = host_and_port(port.address)
        here = _ANY.get(host, host)
        try:
            peer = await who_is_at(f"/{'ip6' if ':' in here else 'ip4'}/{here}/tcp/{number}")
            why = ""
        except NetworkError as exc:
            peer, why = "", str(exc).partition(": ")[2] or str(exc)
    if peer == own_peer:
        return Port(port.key, port.address, "own")
    return Port(port.key, port.address, "other", why or f"the node {peer} listens there")


async def ask_health(address: str) -> HealthReport | None:
    """What the local HTTP at ``host:port`` says of its node."""
    body = await ask_http(address, "/health")
    if body is None:
        return None
    try:
        return decode_json(body, HealthReport)
    except Undecodable:
        return None


async def ask_http(address: str, path: str) -> bytes | None:
    """The body of ``GET path``, whatever its status; None where nobody answers in time."""
    host, _, port = address.rpartition(":")
    here = _ANY.get(host.strip("[]"), host)
    try:
        async with httpx.AsyncClient(timeout=HTTP_S, trust_env=False) as client:
            answer = await client.get(f"http://{here}:{port}{path}")
    except (httpx.HTTPError, httpx.InvalidURL):
        return None
    return answer.content if answer.status_code in (200, 503) else None

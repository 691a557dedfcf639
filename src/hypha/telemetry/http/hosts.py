"""Whom a request to local HTTP was meant for.

A page of another site may make a browser ask this machine, under a name of that site whose owner lets it
point here (DNS rebinding), and read the answer as its own. Its requests name that site as their host, so what
reaches this machine over loopback must name an address or ``localhost``. What comes over another interface is
asked for by whatever name the operator has given this machine.
"""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class LocalNames:
    """``app`` for requests that name this machine as their host: an address, ``localhost``, or ``own``, the
    name that the operator gave it.
    """

    def __init__(self, app: ASGIApp, own: str = "localhost") -> None:
        self._app = app
        self._own = own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 instead where the host is another one."""
        if scope["type"] == "http" and (refused := foreign_host(scope, self._own)) is not None:
            await PlainTextResponse(refused, 403)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def foreign_host(scope: Scope, own: str = "localhost") -> str | None:
    """What is to be answered where a request over loopback names a foreign host, else None. A request
    without a host is from no browser.
    """
    server = scope.get("server")
    if server is None or not _is_loopback(str(server[0])):
        return None
    host = Headers(scope=scope).get("host")
    if host is None or _names_address(host) or _without_port(host) == own.lower():
        return None
    return f"{host!r} is no address of this machine: ask for 127.0.0.1 or localhost.\n"


def is_loopback(address: str) -> bool:
    """Whether ``host:port`` is reached from this machine alone."""
    host = address.rpartition(":")[0].strip("[]")
    return host == "localhost" or _is_loopback(host)


def _names_address(host: str) -> bool:
    """Whether a ``Host`` header is an IP address or ``localhost``, with or without a port."""
    name = _without_port(host).strip("[]")
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _without_port(host: str) -> str:
    return (host if host.endswith("]") or ":" not in host else host.rpartition(":")[0]).lower()


def _is_loopback(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback

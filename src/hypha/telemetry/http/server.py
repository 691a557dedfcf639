"""Local HTTP of a node, on the address the operator gave as ``http_address``.

``GET /health`` answers 200 or 503 with the node's health report, ``GET /metrics`` what Prometheus asks for;
on a loopback address also what operators look up (``/peers``, ``/leases``). Nothing can be changed through
it, and it answers from memory, so that a slow reader cannot hold up the node.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from hypha.errors import ConfigError, Problem, listening_failed
from hypha.messages import HealthReport
from hypha.runtime import in_thread
from hypha.telemetry.http.hosts import LocalNames, is_loopback
from hypha.telemetry.http.hypercorn import BoundedConfig, serve
from hypha.telemetry.metrics import sample
from hypha.telemetry.running import exposition

logger = logging.getLogger(__name__)

#: How long a connection may be idle. Clients keep theirs for 5 s (httpx) to 15 s (aiohttp): the client must
#: be the one that closes first, or its next request may meet the end of the connection.
KEEP_ALIVE_S = 30.0


async def serve_http(
    address: str,
    health: Callable[[], HealthReport],
    routes: Sequence[Route] = (),
    lookups: Mapping[str, Callable[[], object]] = MappingProxyType({}),
    *,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``host:port`` (port 0: any free one) until cancelled; started with the actual ``host:port``.

    ``health`` and ``lookups``, by name, are called for each request, in the trio thread; a lookup returns
    anything msgspec can write as JSON, and is only told where nobody beyond this machine can ask. ``routes``
    are served besides. Whoever does not read is disconnected, and the number of
    connections is bounded: see :class:`BoundedConfig`. Over loopback the ``Host`` header must name this
    machine: see :class:`~hypha.telemetry.http.hosts.LocalNames`. Raises ConfigError when the address cannot
    be bound.
    """

    async def get_health(_: Request) -> Response:
        report = health()
        return _json(report, 200 if report.healthy else 503)

    served = [Route("/health", get_health), *routes]
    if (write := exposition()) is not None:

        async def get_metrics(request: Request) -> Response:
            sample()
            accept = request.headers.get("accept", "")
            body, content_type = await in_thread(write, accept)
            return Response(body, 200, headers={"content-type": content_type})

        served.append(Route("/metrics", get_metrics))
    served += [_lookup(name, look, is_loopback(address)) for name, look in lookups.items()]
    config = BoundedConfig()
    # bound here: hypercorn would leave the socket open when it cannot be
    config.bind = [f"fd://{_listen(address).detach()}"]
    config.accesslog = None
    config.keep_alive_timeout = KEEP_ALIVE_S
    # its "Running on ... (CTRL + C to quit)" is below the level third parties log at
    config.errorlog = logging.getLogger("hypercorn.error")
    config.include_server_header = False
    config.graceful_timeout = 0.5
    config.shutdown_timeout = 0.5
    app: Any = LocalNames(Starlette(routes=served), address.rpartition(":")[0])
    async with trio.open_nursery() as nursery:
        binds: list[str] = await nursery.start(serve, app, config)
        actual = binds[0].split("//", 1)[-1]
        logger.info("Local HTTP listens on http://%s.", actual, extra={"http_address": actual})
        task_status.started(actual)


def _lookup(name: str, look: Callable[[], object], local: bool) -> Route:
    async def get(_: Request) -> Response:
        if not local:
            return PlainTextResponse("This is told on a loopback address only.\n", 403)
        return _json(look(), 200)

    return Route(f"/{name}", get)


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        return socket.create_server(
            (host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as exc:
        advice = "; choose another host:port, or port 0 for any"
        raise listening_failed("http_address", address, exc, advice) from exc
    except (ValueError, OverflowError) as exc:
        message = f"cannot listen on {address} ({exc}); choose another host:port, or port 0 for any"
        raise ConfigError([Problem(key="http_address", message=message)]) from exc


def _json(value: object, status_code: int) -> Response:
    return Response(msgspec.json.encode(value), status_code, media_type="application/json")

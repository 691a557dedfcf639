"""The routes of the live page: ``/`` and ``/assets/`` for what is the same for everybody, ``/events`` and
``/status`` for what is the job's.

Nothing on the page may come from elsewhere, be inline or be framed: its content security policy says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hypha.telemetry.page.access import Access
from hypha.telemetry.page.feed import PageFeed

ASSETS = Path(__file__).parent / "assets"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
SECURITY = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def page_routes(feed: PageFeed, status: Callable[[], object], access: Access) -> list[Route]:
    """For :func:`hypha.telemetry.serve_http`. ``status`` is called for each request of ``/status``, and
    returns anything that msgspec can write as JSON. Reads the page's files: call it once, at the start.
    """
    files = {path.name: path.read_bytes() for path in sorted(ASSETS.iterdir())}

    async def get_page(_: Request) -> Response:
        return _file(files, "index.html")

    async def get_asset(request: Request) -> Response:
        return _file(files, request.path_params["name"])

    async def get_status(_: Request) -> Response:
        body = msgspec.json.encode(status())
        return Response(body, headers={"cache-control": "no-store"}, media_type="application/json")

    return [
        Route("/", get_page),
        Route("/assets/{name}", get_asset),
        Route("/events", _Guarded(feed, access), methods=["GET"]),
        Route("/status", _Guarded(Route("/status", get_status).app, access), methods=["GET"]),
    ]


def worker_routes() -> list[Route]:
    """The page of a worker, for :func:`hypha.telemetry.serve_http`. Nothing of the worker is in it: what it
    shows it asks for, and gets where that is told. Reads the page's files: call it once, at the start.
    """
    wanted = ("worker.html", "worker.js", "text.js", "page.css", "icon.svg")
    files = {name: (ASSETS / name).read_bytes() for name in wanted}

    async def get_page(_: Request) -> Response:
        return _file(files, "worker.html")

    async def get_asset(request: Request) -> Response:
        return _file(files, request.path_params["name"])

    return [Route("/", get_page), Route("/assets/{name}", get_asset)]


class _Guarded:
    """``app`` for whom ``access`` lets in."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._access.refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
            return
        status, text = refusal
        headers = {"www-authenticate": "Bearer"} if status == 401 else {}
        await PlainTextResponse(text, status, headers=headers | SECURITY)(scope, receive, send)


def _file(files: dict[str, bytes], name: str) -> Response:
    if name not in files:
        return PlainTextResponse("There is no such file.\n", 404, headers=SECURITY)
    headers = SECURITY | {"cache-control": "no-cache"}
    return Response(files[name], headers=headers, media_type=_TYPES[Path(name).suffix])

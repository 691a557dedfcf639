"""The live page: static files, one stream of server-sent events, and who may read them.

It knows nothing of jobs. A worker has a page of its own, ``worker.html``, which asks for its ``/leases`` and
``/health`` now and then. Whoever serves it says what viewers receive (:class:`PageFeed`) and what ``/status``
answers; the page's script reads the shapes of :mod:`hypha.scheduler.status.snapshot` and of
:mod:`hypha.scheduler.status.round_record`. It loads nothing from anywhere else, so it works
without the internet.

``assets/uPlot.*`` is uPlot 1.6.32, unchanged, under the licence beside it.

Its routes: ``/`` and ``/assets/`` for what is the same for everybody, ``/events`` and
``/status`` for what is the job's, to those who may read it.

Nothing on the page may come from elsewhere, be inline or be framed: its content security policy says so. On
a loopback address anybody on this machine may read (see :mod:`hypha.telemetry.http.hosts`), elsewhere who
has the token.

Events are server-sent, to each viewer at its own pace. There is no queue: a viewer that can be written to is
sent what is new since the last message, so one that reads slowly receives fewer and larger messages, one that
does not read at all is dropped, and neither takes memory or holds up anybody else. The number of viewers is
bounded.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import trio
from starlette.datastructures import Headers, QueryParams
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hypha.errors import ConfigError, Problem

logger = logging.getLogger("hypha.telemetry")

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

_FILE = "page-token"
_TOKEN_BYTES = 32

#: the name of an event, and what it holds: anything that msgspec can write as JSON
Message = tuple[str, object]
#: what is new since it was called last
Next = Callable[[], Iterable[Message]]

#: until a browser asks again after it was cut off
_RETRY_MS = 1000

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
    (b"x-content-type-options", b"nosniff"),
]


def page_routes(feed: PageFeed, status: Callable[[], object], token: str | None) -> list[Route]:
    """For :func:`hypha.telemetry.serve_http`. ``status`` is called for each request of ``/status``, and
    returns anything that msgspec can write as JSON. ``token`` is None on a loopback address, where none is
    asked for. Reads the page's files: call it once, at the start.
    """

    async def get_status(_: Request) -> Response:
        body = msgspec.json.encode(status())
        return Response(body, headers={"cache-control": "no-store"}, media_type="application/json")

    return [
        *_static("index.html", [path.name for path in sorted(ASSETS.iterdir())]),
        Route("/events", _Guarded(feed, token), methods=["GET"]),
        Route("/status", _Guarded(Route("/status", get_status).app, token), methods=["GET"]),
    ]


def worker_routes() -> list[Route]:
    """The page of a worker, for :func:`hypha.telemetry.serve_http`. Nothing of the worker is in it: what it
    shows it asks for, and gets where that is told. Reads the page's files: call it once, at the start.
    """
    return _static("worker.html", ["worker.html", "worker.js", "text.js", "page.css", "icon.svg"])


def _static(page: str, names: Sequence[str]) -> list[Route]:
    """Files that are the same for everybody: ``page`` at ``/``, and all of ``names``."""
    files = {name: (ASSETS / name).read_bytes() for name in names}

    def found(name: str) -> Response:
        if name not in files:
            return PlainTextResponse("There is no such file.\n", 404, headers=SECURITY)
        headers = SECURITY | {"cache-control": "no-cache"}
        return Response(files[name], headers=headers, media_type=_TYPES[Path(name).suffix])

    async def get_page(_: Request) -> Response:
        return found(page)

    async def get_asset(request: Request) -> Response:
        return found(request.path_params["name"])

    return [Route("/", get_page), Route("/assets/{name}", get_asset)]


class _Guarded:
    """``app`` for whoever has the ``token``, or for everybody without one."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        token = self._token
        if token is None or any(hmac.compare_digest(one.encode(), token.encode()) for one in _tokens(scope)):
            await self._app(scope, receive, send)
            return
        text = f"The token is missing or wrong: it is in {_FILE} in the job's state directory.\n"
        headers = {"www-authenticate": "Bearer", **SECURITY}
        await PlainTextResponse(text, 401, headers=headers)(scope, receive, send)


def _tokens(scope: Scope) -> Iterable[str]:
    kind, _, value = Headers(scope=scope).get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        yield value.strip()
    yield from QueryParams(scope["query_string"]).getlist("token")


def token_in(directory: Path) -> tuple[str, Path]:
    """The token that is kept in ``directory``, made when there is none, and its file, which nobody else may
    read. Blocks. Raises :class:`ConfigError` when it cannot be kept.
    """
    path = directory / _FILE
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            path.chmod(0o600)
            kept = path.read_text().strip()
            if kept:
                return kept, path
            handle = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        with os.fdopen(handle, "w") as file:
            file.write(token + "\n")
    except OSError as exc:
        text = f"it is no loopback address, and the page's token cannot be kept in {path}: {exc}"
        raise ConfigError([Problem("http_address", text)]) from exc
    return token, path


# --- events ---------------------------------------------------------------------------------------------


class PageFeed:
    """An ASGI application. ``begin`` is called for each viewer, and what it returns whenever that viewer can
    be written to, at most every ``interval_s``.
    """

    max_viewers = 16
    interval_s = 0.5
    #: a viewer that took nothing for so long is dropped
    slow_s = 10.0

    def __init__(self, begin: Callable[[], Next]) -> None:
        self._begin = begin
        self._ending = trio.Event()
        self._left = trio.Event()
        self.viewers = 0

    async def finish(self, timeout_s: float) -> None:
        """Tell every viewer the last news and that it was the last, for at most ``timeout_s``."""
        self._ending.set()
        with trio.move_on_after(timeout_s):
            while self.viewers:
                await self._left.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.viewers >= self.max_viewers:
            text = f"{self.viewers} viewers look at this page already: close one.\n"
            await PlainTextResponse(text, 503, headers={"retry-after": "10"})(scope, receive, send)
            return
        self.viewers += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_until_left, receive, nursery.cancel_scope)
                await self._tell(scope, send)
                nursery.cancel_scope.cancel()
        finally:
            self.viewers -= 1
            self._left.set()
            self._left = trio.Event()

    async def _tell(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        news = self._begin()
        chunk = f"retry: {_RETRY_MS}\n\n".encode()
        while True:
            ending = self._ending.is_set()
            chunk += b"".join(_event(name, value) for name, value in news())
            if ending:
                chunk += b"event: end\ndata: {}\n\n"
            with trio.move_on_after(self.slow_s) as waiting:
                await send({"type": "http.response.body", "body": chunk, "more_body": not ending})
            if waiting.cancelled_caught:
                logger.info("A viewer of the page was dropped, as it read nothing for %g s.", self.slow_s)
                return
            if ending:
                return
            chunk = b""
            with trio.move_on_after(self.interval_s):
                await self._ending.wait()


def _event(name: str, value: object) -> bytes:
    # JSON of msgspec is one line
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"


async def _until_left(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()

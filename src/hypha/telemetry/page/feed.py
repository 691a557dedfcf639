"""Server-sent events for the page's viewers, each at its own pace.

There is no queue: a viewer that can be written to is sent what is new since the last message, so one that
reads slowly receives fewer and larger messages, one that does not read at all is dropped, and neither
takes memory or holds up anybody else. The number of viewers is bounded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import msgspec
import trio
from starlette.types import Receive, Scope, Send

logger = logging.getLogger("hypha.telemetry")

#: the name of an event, and what it holds: anything that msgspec can write as JSON
Message = tuple[str, object]
#: what is new since it was called last
Next = Callable[[], Iterable[Message]]

MAX_VIEWERS = 16
_INTERVAL_S = 0.5
#: a viewer that took nothing for so long is dropped
_SLOW_S = 10.0
#: until a browser asks again after it was cut off
_RETRY_MS = 1000

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
    (b"x-content-type-options", b"nosniff"),
]


class PageFeed:
    """An ASGI application. ``begin`` is called for each viewer, and what it returns whenever that viewer can
    be written to, at most every ``interval_s``.
    """

    def __init__(
        self,
        begin: Callable[[], Next],
        *,
        interval_s: float = _INTERVAL_S,
        slow_s: float = _SLOW_S,
        max_viewers: int = MAX_VIEWERS,
    ) -> None:
        self._begin = begin
        self._interval_s = interval_s
        self._slow_s = slow_s
        self._max_viewers = max_viewers
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
        if self.viewers >= self._max_viewers:
            await _refuse(send, f"{self.viewers} viewers look at this page already: close one.\n")
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
            with trio.move_on_after(self._slow_s) as waiting:
                await send({"type": "http.response.body", "body": chunk, "more_body": not ending})
            if waiting.cancelled_caught:
                logger.info("A viewer of the page was dropped, as it read nothing for %g s.", self._slow_s)
                return
            if ending:
                return
            chunk = b""
            with trio.move_on_after(self._interval_s):
                await self._ending.wait()


def _event(name: str, value: object) -> bytes:
    # JSON of msgspec is one line
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"


async def _until_left(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _refuse(send: Send, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"retry-after", b"10")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})

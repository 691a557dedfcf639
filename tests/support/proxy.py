"""A TCP proxy on loopback that can stop passing bytes on without closing anything: a silent partition."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class Proxy:
    """Passes connections to ``target`` on, while not :meth:`freeze`-d."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._thawed = trio.Event()
        self._thawed.set()
        self.port = 0
        self.passed_bytes = 0

    def freeze(self) -> None:
        """From now on nothing gets through, and nobody is told."""
        self._thawed = trio.Event()

    def thaw(self) -> None:
        """Go on."""
        self._thawed.set()

    async def _serve(self, near: trio.SocketStream) -> None:
        async with await trio.open_tcp_stream(*self._target) as far, trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, near, far, nursery.cancel_scope)
            nursery.start_soon(self._pump, far, near, nursery.cancel_scope)

    async def _pump(
        self, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope
    ) -> None:
        try:
            while True:
                data = await source.receive_some(65536)
                await self._thawed.wait()
                if not data:
                    break
                await sink.send_all(data)
                self.passed_bytes += len(data)
        except trio.BrokenResourceError:
            pass
        scope.cancel()


@asynccontextmanager
async def proxy_to(host: str, port: int) -> AsyncIterator[Proxy]:
    """A running proxy; ``proxy.port`` is where it listens on 127.0.0.1."""
    proxy = Proxy((host, port))
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        proxy.port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, proxy._serve, [listener])
        try:
            yield proxy
        finally:
            nursery.cancel_scope.cancel()

"""A TCP proxy on loopback that can stop passing bytes on without closing anything, which is a silent
partition, or pass them on later, as a long way does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class Proxy:
    """Passes connections to ``target`` on, while not :meth:`freeze`-d; each way takes ``delay_s``."""

    def __init__(self, target: tuple[str, int], delay_s: float = 0.0) -> None:
        self._target = target
        self._delay_s = delay_s
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
        underway, arrives = trio.open_memory_channel[tuple[float, bytes]](1000)

        async def take() -> None:
            try:
                while True:
                    data = bytes(await source.receive_some(65536))
                    await underway.send((trio.current_time() + self._delay_s, data))
                    if not data:
                        break
            except trio.BrokenResourceError:
                scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            try:
                async for due, data in arrives:
                    await trio.sleep_until(due)
                    await self._thawed.wait()
                    if not data:
                        break
                    await sink.send_all(data)
                    self.passed_bytes += len(data)
            except trio.BrokenResourceError:
                pass
            scope.cancel()


@asynccontextmanager
async def proxy_to(host: str, port: int, delay_s: float = 0.0) -> AsyncIterator[Proxy]:
    """A running proxy; ``proxy.port`` is where it listens on 127.0.0.1."""
    proxy = Proxy((host, port), delay_s)
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        proxy.port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, proxy._serve, [listener])
        try:
            yield proxy
        finally:
            nursery.cancel_scope.cancel()

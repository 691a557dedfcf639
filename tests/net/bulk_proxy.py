"""A TCP proxy in the path of bulk connections that cuts, corrupts, slows or freezes them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

#: First byte of a TLS connection: what is to be disturbed. All else is passed on as it is.
TLS_CLIENT_HELLO = 0x16


@dataclass
class Trouble:
    """What to do to bulk connections; bytes count from the dialler's side, over one connection."""

    #: cut the connection after this many bytes
    cut_after: int | None = None
    #: flip a bit in the byte at this position
    flip_at: int | None = None
    #: pass no more bytes on after this many
    freeze_after: int | None = None
    #: pass on at most this many bytes a second
    rate: int | None = None
    #: after this many bytes, cut as soon as the accepting side says something
    mute_after: int | None = None
    #: disturb only that many connections
    times: int = 1


@dataclass
class BulkProxy:
    """Listens at ``port`` and passes everything on to ``target``."""

    target: tuple[str, int]
    port: int = 0
    trouble: Trouble | None = None
    #: bytes passed on from bulk diallers, connection by connection
    passed: list[int] = field(default_factory=list)
    #: takes what bulk diallers say, as it is seen on the way
    recorded: bytearray | None = None

    @property
    def address(self) -> str:
        """Its multiaddr."""
        return f"/ip4/127.0.0.1/tcp/{self.port}"

    async def serve(self, near: trio.SocketStream) -> None:
        """One connection."""
        with contextlib.suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            far = await trio.open_tcp_stream(*self.target)
            async with near, far:
                first = await near.receive_some(65536)
                trouble = None
                index = -1
                if first[:1] == bytes([TLS_CLIENT_HELLO]):
                    index = len(self.passed)
                    self.passed.append(0)
                    if self.trouble is not None and self.trouble.times > 0:
                        trouble = self.trouble
                        trouble.times -= 1
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._forward, near, far, first, trouble, index, nursery.cancel_scope)
                    nursery.start_soon(self._back, near, far, trouble, index, nursery.cancel_scope)

    async def _forward(
        self,
        near: trio.SocketStream,
        far: trio.SocketStream,
        data: bytes | bytearray,
        trouble: Trouble | None,
        index: int,
        connection: trio.CancelScope,
    ) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data:
                count = self.passed[index] if index >= 0 else 0
                if trouble is not None:
                    if trouble.cut_after is not None and count + len(data) > trouble.cut_after:
                        break
                    if trouble.freeze_after is not None and count + len(data) > trouble.freeze_after:
                        await trio.sleep_forever()
                    if trouble.flip_at is not None and count <= trouble.flip_at < count + len(data):
                        data = bytearray(data)
                        data[trouble.flip_at - count] ^= 1
                    if trouble.rate is not None:
                        await trio.sleep(len(data) / trouble.rate)
                await far.send_all(data)
                if index >= 0:
                    self.passed[index] += len(data)
                    if self.recorded is not None:
                        self.recorded += data
                data = await near.receive_some(65536)
        connection.cancel()

    async def _back(
        self,
        near: trio.SocketStream,
        far: trio.SocketStream,
        trouble: Trouble | None,
        index: int,
        connection: trio.CancelScope,
    ) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await far.receive_some(65536):
                mute = trouble.mute_after if trouble is not None else None
                if mute is not None and self.passed[index] > mute:
                    break
                await near.send_all(data)
        connection.cancel()


@asynccontextmanager
async def bulk_proxy(target: tuple[str, int]) -> AsyncIterator[BulkProxy]:
    """A running proxy."""
    proxy = BulkProxy(target)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, proxy.serve, 0, host="127.0.0.1"))
        proxy.port = listeners[0].socket.getsockname()[1]
        yield proxy
        nursery.cancel_scope.cancel()

"""hypercorn without four defects. A connection that its client has closed stayed open here until the idle
time-out, a socket and four tasks each: whoever asks once a second for an hour must leave nothing behind. What
was being written could not be cancelled: one client that does not read would have kept the node from ending.
And nothing was bounded: with :class:`BoundedConfig` a write takes so long at most, so many connections are
open at a time, and HTTP/2 is not spoken, where a client may stop what it receives without stopping a write.
And an error in one connection, of which odd bytes make several, was the end of the node.
"""

from __future__ import annotations

import logging

import h11
import hypercorn.protocol
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio import run as _run
from hypercorn.trio import serve
from hypercorn.trio.tcp_server import TCPServer

__all__ = ["BoundedConfig", "serve"]

logger = logging.getLogger("hypha.telemetry")


class BoundedConfig(Config):
    """For one server, as ``connections`` counts what is open there; strangers may reach its address.

    Whoever takes none of what is written for ``write_timeout_s``, or connects beyond ``max_connections``, is
    disconnected at once.
    """

    write_timeout_s: float = 10.0
    max_connections: int = 256
    connections: int = 0
    refusal_logged: bool = False


class _Http1(H11Protocol):
    async def _check_protocol(self, event: h11.Request) -> None:
        """An upgrade may be ignored."""

    async def _create_stream(self, request: h11.Request) -> None:
        # there is nothing to change to: whoever asks for it is answered as if they had not
        kept = [(name, value) for name, value in request.headers.raw_items() if name.lower() != b"upgrade"]
        plain = h11.Request(
            method=request.method, target=request.target, headers=kept, http_version=request.http_version
        )
        await super()._create_stream(plain)


class _Server(TCPServer):
    config: BoundedConfig
    _client_left = False

    async def run(self) -> None:
        try:
            await self._serve()
        except Exception as exc:  # noqa: BLE001 - the edge of a connection, whatever its client did
            logger.warning("A connection of local HTTP failed: %r", exc)
            await trio.aclose_forcefully(self.stream)

    async def _serve(self) -> None:
        config = self.config
        if config.connections >= config.max_connections:
            if not config.refusal_logged:
                config.refusal_logged = True
                logger.warning("Local HTTP has %d connections, and refuses more.", config.connections)
            await trio.aclose_forcefully(self.stream)
            return
        config.connections += 1
        try:
            await super().run()
        finally:
            config.connections -= 1

    async def _read_data(self) -> None:
        await super()._read_data()
        self._client_left = True
        # it would hold the connection's nursery open
        await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        if self._client_left and isinstance(event, Updated):
            return  # a response that ended later would start the idle time anew
        if isinstance(event, RawData):
            await self._write(bytes(event.data))
            return
        await super().protocol_send(event)

    async def _write(self, data: bytes) -> None:
        async with self.send_lock:
            try:
                with trio.fail_after(self.config.write_timeout_s):
                    await self.stream.send_all(data)
            except trio.Cancelled:
                # it may be half written: nothing can follow it
                await trio.aclose_forcefully(self.stream)
                raise
            except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
                await trio.aclose_forcefully(self.stream)
                await self.protocol.handle(Closed())


_run.TCPServer = _Server  # type: ignore[attr-defined]
hypercorn.protocol.H11Protocol = _Http1  # type: ignore[attr-defined]

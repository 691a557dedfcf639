"""hypercorn without two defects. A connection that its client has closed stayed open here until the idle
time-out, a socket and four tasks each: whoever asks once a second for an hour must leave nothing behind. And
what was being written could not be cancelled: one client that does not read would have kept the node from
ending.
"""

from __future__ import annotations

import trio
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio import run as _run
from hypercorn.trio import serve
from hypercorn.trio.tcp_server import TCPServer

__all__ = ["serve"]


class _Server(TCPServer):
    _client_left = False

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
                await self.stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                await self.protocol.handle(Closed())
            except trio.Cancelled:
                # it may be half written: nothing can follow it
                await trio.aclose_forcefully(self.stream)
                raise


_run.TCPServer = _Server  # type: ignore[attr-defined]

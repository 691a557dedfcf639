"""hypercorn without one defect: a connection that its client has closed stayed open here until the idle
time-out, a socket and four tasks each. Whoever asks once a second for an hour must leave nothing behind.
"""

from __future__ import annotations

from hypercorn.events import Event, Updated
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
        await super().protocol_send(event)


_run.TCPServer = _Server  # type: ignore[attr-defined]

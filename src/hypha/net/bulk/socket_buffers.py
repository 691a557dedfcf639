"""Sizes of sockets' buffers that somebody has set, and a warning where the kernel does not give as much.

Nothing is set unless ``[tuning.sockets]`` says so: the kernel adapts buffers that nobody has set to their
connection, and does so better than a fixed number for all of them.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import trio

from hypha.config.tuning import SocketTuning

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Buffers:
    """Bytes of a connection that the kernel may hold, sent and received; ``None``: as it likes."""

    send_bytes: int | None = None
    receive_bytes: int | None = None

    @classmethod
    def of(cls, tuning: SocketTuning) -> Buffers:
        """As configured; a KB has 1024 bytes."""
        send, receive = tuning.send_buffer_kb, tuning.receive_buffer_kb
        return cls(None if send is None else send << 10, None if receive is None else receive << 10)

    def apply(self, sock: socket.socket | trio.socket.SocketType) -> None:
        """Set them; the kernel gives as much as it may. What was accepted has those of its listener."""
        for option, wanted in self._wanted():
            sock.setsockopt(socket.SOL_SOCKET, option, wanted)

    def shortfalls(self) -> Iterator[str]:
        """What the kernel does not give, and the setting of it that would, as one sentence each."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            for option, wanted in self._wanted():
                sock.setsockopt(socket.SOL_SOCKET, option, wanted)
                # Linux counts its own bookkeeping, and doubles what it was asked for
                found = sock.getsockopt(socket.SOL_SOCKET, option) // 2
                if found < wanted:
                    key, sysctl = _NAMES[option]
                    yield (
                        f"tuning.sockets.{key} asks for {wanted >> 10} KB, and the kernel gives "
                        f"{found >> 10}; raise its limit with `sysctl -w net.core.{sysctl}={wanted}`"
                    )

    def warn(self) -> None:
        """Say what falls short, in the log."""
        for text in self.shortfalls():
            logger.warning("%s.", text)

    def _wanted(self) -> Iterator[tuple[int, int]]:
        if self.send_bytes is not None:
            yield socket.SO_SNDBUF, self.send_bytes
        if self.receive_bytes is not None:
            yield socket.SO_RCVBUF, self.receive_bytes


AS_THE_KERNEL_LIKES = Buffers()
_NAMES = {
    socket.SO_SNDBUF: ("send_buffer_kb", "wmem_max"),
    socket.SO_RCVBUF: ("receive_buffer_kb", "rmem_max"),
}

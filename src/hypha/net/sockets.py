"""What the sockets of both planes have in common: buffers, sending again, counts of bytes."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import trio

from hypha.config.tuning import SocketTuning
from hypha.telemetry.instruments import BYTES_RECEIVED, BYTES_SENT

_EVERY_S = 1.0
#: Linux 6.15 and later (linux/tcp.h); Python has no name for it. In milliseconds, 1000 is the least.
TCP_RTO_MAX_MS = 44
RESEND_WITHIN_MS = 1000


def resend_soon(sock: socket.socket | trio.socket.SocketType) -> None:
    """Try a line that was cut once a second, where the kernel can: by default the pauses double, and a cable
    that is plugged in again after five seconds is found out after twelve.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, RESEND_WITHIN_MS)


class ByteCounts:
    """Bytes of one plane (``control`` or ``bulk``) of a node, from any thread. They are handed to the metrics
    about once a second: recording each of thousands of reads a second would cost more than the reads.
    """

    def __init__(self, plane: str) -> None:
        self._plane = plane
        self._lock = threading.Lock()
        self._sent = 0
        self._received = 0
        self._due = 0.0

    def add(self, sent: int = 0, received: int = 0) -> None:
        with self._lock:
            self._sent += sent
            self._received += received
        if time.monotonic() >= self._due:
            self.hand_over()

    def hand_over(self) -> None:
        """Have the metrics show all that was counted."""
        with self._lock:
            sent, self._sent = self._sent, 0
            received, self._received = self._received, 0
            self._due = time.monotonic() + _EVERY_S
        BYTES_SENT.add(sent, plane=self._plane)
        BYTES_RECEIVED.add(received, plane=self._plane)


def set_buffers(sock: socket.socket | trio.socket.SocketType, tuning: SocketTuning) -> None:
    """Set what is configured; the kernel gives as much as it may. It adapts buffers that nobody has set, and
    does so better than a fixed number for all connections. What was accepted has those of its listener.
    """
    for option, wanted, *_ in _wanted(tuning):
        sock.setsockopt(socket.SOL_SOCKET, option, wanted)


def buffer_shortfalls(tuning: SocketTuning) -> Iterator[str]:
    """What the kernel does not give, and the setting of it that would, as one sentence each."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        for option, wanted, key, sysctl in _wanted(tuning):
            sock.setsockopt(socket.SOL_SOCKET, option, wanted)
            # Linux counts its own bookkeeping, and doubles what it was asked for
            found = sock.getsockopt(socket.SOL_SOCKET, option) // 2
            if found < wanted:
                yield (
                    f"tuning.sockets.{key} asks for {wanted >> 10} KB, and the kernel gives "
                    f"{found >> 10}; raise its limit with `sysctl -w net.core.{sysctl}={wanted}`"
                )


def _wanted(tuning: SocketTuning) -> Iterator[tuple[int, int, str, str]]:
    """Option, bytes, configuration key and the kernel's limit of what is set."""
    if tuning.send_buffer_kb is not None:
        yield socket.SO_SNDBUF, tuning.send_buffer_kb << 10, "send_buffer_kb", "wmem_max"
    if tuning.receive_buffer_kb is not None:
        yield socket.SO_RCVBUF, tuning.receive_buffer_kb << 10, "receive_buffer_kb", "rmem_max"

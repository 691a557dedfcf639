"""Bytes that go and come over sockets, handed to the metrics about once a second: recording each of
thousands of reads a second would cost more than the reads.
"""

from __future__ import annotations

import threading
import time

from hypha.telemetry.instruments import BYTES_RECEIVED, BYTES_SENT

_EVERY_S = 1.0


class ByteCounts:
    """Of one plane (``control`` or ``bulk``) of a node; may be used from any thread."""

    def __init__(self, plane: str) -> None:
        self._plane = plane
        self._lock = threading.Lock()
        self._sent = 0
        self._received = 0
        self._due = 0.0

    def add(self, sent: int = 0, received: int = 0) -> None:
        """Count."""
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

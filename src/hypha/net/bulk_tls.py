"""TLS on a blocking socket, faster than the standard library's: the network is read in large pieces.

``ssl.SSLSocket`` asks the kernel twice for each record of 16 KiB, once for its header. Here what has come is
read at once and decrypted from memory, which takes a third less of the processor. The cryptography is the
same, of the same contexts.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time

#: Read from the network at a time.
_READ_BYTES = 256 << 10
#: Encrypted and written at a time.
_WRITE_BYTES = 128 << 10


class TlsSocket:
    """One connection, used from one thread at a time. Errors are ``OSError`` (``ssl.SSLError`` is one).

    ``raw`` is the connection below, which it owns.
    """

    def __init__(self, context: ssl.SSLContext, sock: socket.socket, server_side: bool) -> None:
        """Takes ``sock`` over, which is closed for everybody else."""
        self.raw = socket.socket(fileno=sock.detach())
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._encrypted = memoryview(bytearray(_READ_BYTES))

    @property
    def tls(self) -> ssl.SSLObject:
        """What knows the peer's certificates."""
        return self._tls

    def fileno(self) -> int:
        """That of ``raw``."""
        return self.raw.fileno()

    def handshake(self, timeout_s: float) -> None:
        """Greet; each read and write, and all of it, within ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.raw.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()
            except ssl.SSLError:
                # what is wrong is told in an alert
                with contextlib.suppress(OSError):
                    self._flush()
                raise
            else:
                self._flush()
                self.raw.settimeout(timeout_s)
                return

    def sendall(self, data: bytes | memoryview) -> None:
        """All of ``data``."""
        view = memoryview(data)
        for at in range(0, len(view), _WRITE_BYTES):
            piece = view[at : at + _WRITE_BYTES]
            while piece:
                piece = piece[self._tls.write(piece) :]
            self._flush()

    def recv_into(self, view: memoryview) -> int:
        """At least a byte; 0 at the end."""
        while True:
            try:
                # typeshed says bytes, but with a buffer it is their number
                return int(self._tls.read(len(view), view))
            except ssl.SSLWantReadError:
                # an answer of TLS itself, such as a new key
                self._flush()
                self._fill()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return 0

    def recv(self, count: int) -> bytes:
        """At most ``count`` bytes, at least one; none at the end."""
        buffer = bytearray(count)
        return bytes(buffer[: self.recv_into(memoryview(buffer))])

    def waiting(self) -> bool:
        """Is there something to read that ``raw`` does not know of?"""
        return self._incoming.pending > 0 or self._tls.pending() > 0

    def close(self) -> None:
        """End it without a farewell: lengths are known, and what is cut is noticed by them."""
        self.raw.close()

    def _fill(self) -> None:
        count = self.raw.recv_into(self._encrypted)
        if count:
            self._incoming.write(self._encrypted[:count])
        else:
            self._incoming.write_eof()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self.raw.sendall(self._outgoing.read())

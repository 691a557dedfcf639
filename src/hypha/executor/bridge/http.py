"""HTTP over the worker's Unix socket, by the standard library's client.

A request costs the thread that makes it a tenth of a millisecond, a fifth of what fuller clients take: it is
taken from the training, which waits for the same interpreter.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hypha.errors import HyphaError

_FAILURES = (OSError, http.client.HTTPException)
_CONNECT_TIMEOUT_S = 5.0
_HEADERS = {"content-type": "application/json"}


class BridgeUnanswered(HyphaError):
    """Nobody answers on the socket, or not to the end, or not in HTTP."""


@dataclass(frozen=True)
class BridgeReply:
    """A status code and the whole body."""

    status: int
    content: bytes


class BridgeConnection(http.client.HTTPConnection):
    """To the socket at ``path``; for one thread. Once connected it waits for answers without a limit: a fetch
    waits for data, a send for slow peers, a stream for news.
    """

    def __init__(self, path: Path) -> None:
        super().__init__("bridge")
        self._path = path

    def connect(self) -> None:
        """Called by the first request, and by the next one after ``close``."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(_CONNECT_TIMEOUT_S)
            sock.connect(str(self._path))
            sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
        self.sock = sock

    def ask(self, method: str, path: str, body: bytes | None, traceparent: str | None = None) -> BridgeReply:
        """One request, of the span that ``traceparent`` names; the connection may be used for another one.
        Raises :class:`BridgeUnanswered`.
        """
        # a server closes connections that were quiet for long: that is no failure, so once more
        attempts = 1 if self.sock is None else 2
        while True:
            attempts -= 1
            try:
                return self._ask(method, path, body, traceparent)
            except _FAILURES as exc:
                self.close()
                if not attempts:
                    raise _unanswered(exc) from exc

    def _ask(self, method: str, path: str, body: bytes | None, traceparent: str | None) -> BridgeReply:
        headers = _HEADERS if traceparent is None else {**_HEADERS, "traceparent": traceparent}
        self.request(method, path, body, headers)
        response = self.getresponse()
        return BridgeReply(response.status, response.read())


@contextlib.contextmanager
def lines(
    socket_path: Path, method: str, path: str, body: bytes | None
) -> Iterator[BridgeReply | Iterator[str]]:
    """The lines of a response that goes on for ever, without their ends, as they come; or, where the status
    is not 200, the whole answer. Raises :class:`BridgeUnanswered`; reading lines may, too, when they are cut
    off.
    """
    with contextlib.closing(BridgeConnection(socket_path)) as connection:
        try:
            connection.request(method, path, body, _HEADERS)
            response = connection.getresponse()
            failed = (
                None if response.status == http.client.OK else BridgeReply(response.status, response.read())
            )
        except _FAILURES as exc:
            raise _unanswered(exc) from exc
        yield _lines_of(response) if failed is None else failed


def _lines_of(response: http.client.HTTPResponse) -> Iterator[str]:
    # the response's own lines end without an error where it was cut between two chunks
    with io.TextIOWrapper(response, "utf-8", newline="\n") as text:
        while True:
            try:
                line = text.readline()
            except _FAILURES as exc:
                raise _unanswered(exc) from exc
            if not line:
                return
            yield line.rstrip("\r\n")


def _unanswered(exc: Exception) -> BridgeUnanswered:
    return BridgeUnanswered(f"the worker does not answer: {exc or type(exc).__name__}")

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
from pathlib import Path

from hypha.decoding import decode_json
from hypha.errors import HyphaError, PeerUnreachable, Refused, Undecodable
from hypha.messages import BridgeError

_FAILURES = (OSError, http.client.HTTPException)
_CONNECT_TIMEOUT_S = 5.0
_HEADERS = {"content-type": "application/json"}


class BridgeUnanswered(HyphaError):
    """Nobody answers on the socket, or not to the end, or not in HTTP."""


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

    def ask(self, method: str, path: str, body: bytes | None, traceparent: str | None = None) -> bytes:
        """The body of the answer to one request, of the span that ``traceparent`` names; the connection may
        be used for another one. Raises :class:`BridgeUnanswered`, and :class:`Refused` or
        :class:`PeerUnreachable` where the status is not 200.
        """
        # a server closes connections that were quiet for long: that is no failure, so once more
        attempts = 1 if self.sock is None else 2
        while True:
            attempts -= 1
            headers = _HEADERS if traceparent is None else {**_HEADERS, "traceparent": traceparent}
            try:
                self.request(method, path, body, headers)
                response = self.getresponse()
                content = response.read()
            except _FAILURES as exc:
                self.close()
                if not attempts:
                    raise _unanswered(exc) from exc
            else:
                if response.status != http.client.OK:
                    raise _error(path, response.status, content)
                return content


@contextlib.contextmanager
def lines(socket_path: Path, method: str, path: str, body: bytes | None) -> Iterator[Iterator[str]]:
    """The lines of a response that goes on for ever, without their ends, as they come. Raises as
    :meth:`BridgeConnection.ask`; reading lines may raise :class:`BridgeUnanswered`, too, when they are cut
    off.
    """
    with contextlib.closing(BridgeConnection(socket_path)) as connection:
        try:
            connection.request(method, path, body, _HEADERS)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise _error(path, response.status, response.read())
        except _FAILURES as exc:
            raise _unanswered(exc) from exc
        yield _lines_of(response)


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


def _error(path: str, status: int, content: bytes) -> HyphaError:
    try:
        body = decode_json(content, BridgeError)
    except Undecodable:
        body = BridgeError(error="internal", detail=content.decode(errors="replace")[:500])
    if status >= 500:
        return PeerUnreachable("behind the bridge", f"{path}: {body.detail} ({body.error})")
    return Refused(body.error, body.detail)


def _unanswered(exc: Exception) -> BridgeUnanswered:
    return BridgeUnanswered(f"the worker does not answer: {exc or type(exc).__name__}")

"""Requests and streams over a Unix socket, to servers that are as bad as they can be."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hypha.errors import PeerUnreachable, Refused
from hypha.executor.bridge.client import BridgeClient, BridgeConnection, BridgeUnanswered, lines
from hypha.executor.threads import finish
from hypha.messages import Uri

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


class Server:
    """Says ``replies`` to one request after the other; ``None`` hangs up."""

    def __init__(self, path: Path) -> None:
        self.replies: list[bytes | None] = []
        self.requests: list[bytes] = []
        self.connections = 0
        #: released once for each connection that was closed here
        self.hung_up = threading.Semaphore(0)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with sock:
                while self.replies and (request := _request(sock)):
                    self.requests.append(request)
                    reply = self.replies.pop(0)
                    if reply is None:
                        break
                    sock.sendall(reply)
            self.hung_up.release()

    def close(self) -> None:
        self._listener.close()


def _request(sock: socket.socket) -> bytes:
    """All of the next one, whose head and body may come one after the other; nothing at the end."""
    data = b""
    while True:
        head, blank, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if blank and len(body) >= int(length[1] if length else 0):
            return data
        more = sock.recv(65536)
        if not more:
            return data
        data += more


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bridge.sock"


@pytest.fixture
def server(path: Path) -> Iterator[Server]:
    server = Server(path)
    yield server
    server.close()


def test_one_connection_for_several_requests(server: Server, path: Path) -> None:
    server.replies = [OK, OK, b"HTTP/1.1 409 Conflict\r\ncontent-length: 4\r\n\r\noops"]
    with closing(BridgeConnection(path)) as connection:
        assert connection.ask("POST", "/one", b'{"a":1}') == b"{}"
        assert connection.ask("GET", "/two", None) == b"{}"
        with pytest.raises(Refused, match="oops"):
            connection.ask("GET", "/three", None)
    assert server.connections == 1
    assert server.requests[0].startswith(b"POST /one HTTP/1.1\r\n")
    assert server.requests[0].endswith(b'\r\n\r\n{"a":1}')


def test_a_connection_that_was_closed_meanwhile_is_made_anew(server: Server, path: Path) -> None:
    server.replies = [OK, None, OK]
    with closing(BridgeConnection(path)) as connection:
        connection.ask("GET", "/", None)
        with pytest.raises(BridgeUnanswered):
            connection.ask("GET", "/", None)
        assert connection.ask("GET", "/", None) == b"{}"
    assert server.connections == 2


@pytest.mark.parametrize(
    "reply", [b"hello\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", b"HTTP/1.1"]
)
def test_nonsense_and_half_an_answer_are_none(server: Server, path: Path, reply: bytes) -> None:
    server.replies = [reply]
    with pytest.raises(BridgeUnanswered):
        BridgeConnection(path).ask("GET", "/", None)


def test_nobody_is_there(path: Path) -> None:
    with pytest.raises(BridgeUnanswered, match="No such file"):
        BridgeConnection(path).ask("GET", "/", None)
    with pytest.raises(BridgeUnanswered, match="No such file"):
        list(lines(path, "GET", "/", None))


def chunked(*parts: bytes) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body


@pytest.mark.parametrize(("end", "cut_off"), [(b"0\r\n\r\n", False), (b"", True), (b"9\r\nhal", True)])
def test_lines_come_as_they_are_said_and_a_cut_is_no_end(path: Path, end: bytes, cut_off: bool) -> None:
    goes_on = threading.Event()

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(65536)
            # a line in two chunks, and two in one
            sock.sendall(chunked(b"data: o", b"ne\r\n\r\ndata: t"))
            goes_on.wait(10)
            sock.sendall(b"4\r\nwo\n\n\r\n" + end)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=serve, daemon=True).start()
        with closing(lines(path, "GET", "/", None)) as said:
            assert [next(said), next(said)] == ["data: one", ""]
            goes_on.set()
            assert [next(said), next(said)] == ["data: two", ""]
            if cut_off:
                with pytest.raises(BridgeUnanswered):
                    list(said)
            else:
                assert list(said) == []


@pytest.mark.parametrize(
    ("status", "error"), [(b"404 Not Found", Refused), (b"503 Unavailable", PeerUnreachable)]
)
def test_a_refused_stream_is_an_error(
    server: Server, path: Path, status: bytes, error: type[Exception]
) -> None:
    server.replies = [b"HTTP/1.1 " + status + b"\r\ncontent-length: 6\r\n\r\nnot so"]
    with pytest.raises(error, match="not so"):
        list(lines(path, "POST", "/", b"{}"))


def test_what_the_reader_raises_is_its_own(server: Server, path: Path) -> None:
    """A full disk of whoever handles a line is no broken stream."""
    server.replies = [chunked(b"data: one\n")]

    def handle(line: str) -> None:
        raise OSError(28, f"no space for {line}")

    def read(handler: Callable[[str], None]) -> None:
        with closing(lines(path, "GET", "/", None)) as said:
            for line in said:
                handler(line)

    with pytest.raises(OSError, match="no space for data: one"):
        read(handle)


def test_calls_of_an_executor_survive_a_server_that_hangs_up(
    path: Path, server: Server, tmp_path: Path
) -> None:
    lost: list[Exception] = []
    client = BridgeClient(path, tmp_path)
    client.failed = lost.append
    answer = OK.replace(b"{}", b"[]")
    for _ in range(2):
        server.replies = [answer]
        assert finish(client.fetch(Uri(value="http://somewhere/file"))) == []
        # having nothing more to say, the server has hung up
        assert server.hung_up.acquire(timeout=30)
    assert len(server.requests) == 2
    assert lost == []

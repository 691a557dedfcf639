"""An executor that sends its worker's bridge whatever it likes: HTTP that is none, and calls that are odd."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from random import Random

import msgspec
import trio
from tests.fuzz.mutation import ODD_VALUES, drawn, mutated, oddly_encoded
from tests.recorded.examples import kinds
from tests.worker.test_bridge import FileHandlers

from hypha.messages import FetchCall, ReceiveCall, SendCall, SpansCall, StatusCall
from hypha.worker.bridge.server import bind_bridge, serve_bridge
from hypha.worker.jobs.directory import JobDirectory

PATHS = {
    StatusCall: "/status/send",
    FetchCall: "/resources/fetch",
    SendCall: "/resources/send",
    ReceiveCall: "/resources/receive",
    SpansCall: "/spans",
}
#: What a server of HTTP may be talked into.
REQUESTS = (
    b"GET /job HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /job HTTP/1.1\r\nhost: x\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
    b"http2-settings: AAMAAABk\r\n\r\n",
    b"GET /job HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n\x81\x85",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    b"POST /spans HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n",
    b"POST /spans HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999\r\n\r\n{}",
    b"GET /%ff%fe?a=%ff HTTP/1.1\r\nhost: \xff\r\ntraceparent: \xff\xfe\r\n\r\n",
)


class _BridgeFuzzer:
    def __init__(self, random: Random, socket_path: Path) -> None:
        self._random = random
        self._socket = str(socket_path)
        self._calls = [kind for kind in kinds() if kind.carrier in PATHS]

    def _bytes(self) -> bytes:
        if self._random.random() < 0.4:
            return mutated(self._random.choice(REQUESTS), drawn(self._random))
        kind = self._random.choice(self._calls)
        value = kind.example(self._random.random() < 0.3)
        if self._random.random() < 0.5:
            odd = self._random.choice(ODD_VALUES)
            body = oddly_encoded(value, "json", self._random.random(), odd)
        else:
            body = mutated(msgspec.json.encode(value), drawn(self._random))
        head = f"POST {PATHS[kind.carrier]} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        return head.encode() + body

    async def speak(self) -> None:
        """One connection."""
        async with await trio.open_unix_socket(self._socket) as stream:
            with trio.move_on_after(0.1), contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(self._bytes())
                await stream.receive_some()

    async def check(self) -> None:
        """TooSlowError or AssertionError when it serves nobody any more."""
        with trio.fail_after(5):
            async with await trio.open_unix_socket(self._socket) as stream:
                await stream.send_all(b"GET /job HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                answer = await stream.receive_some()
                assert answer.startswith(b"HTTP/1.1 200"), answer


async def fuzz_bridge(directory: Path, seed: int, seconds: float) -> int:
    """How many connections the bridge has outlived."""
    job = JobDirectory.create(directory)
    fuzzer, count = _BridgeFuzzer(Random(seed), job.socket_path), 0
    until = time.monotonic() + seconds
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_bridge, FileHandlers(job), bind_bridge(job.socket_path))
        while time.monotonic() < until:
            async with trio.open_nursery() as several:
                for _ in range(8):
                    several.start_soon(fuzzer.speak)
            count += 8
            await fuzzer.check()
        nursery.cancel_scope.cancel()
    job.remove()
    return count

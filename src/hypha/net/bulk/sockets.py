"""Direct connections of the bulk plane: blocking TLS sockets, used from one thread at a time.

That is two to three times as fast as going through the event loop, which stays free to renew leases. Words go
through TLS, a file's bytes beside it, sealed (:mod:`hypha.net.bulk.blocks`). Cancelling a call shuts the
socket down, which ends the thread at once; the call returns when it ended.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import TypeVar

import outcome
import trio

from hypha.errors import IdentityError
from hypha.messages import BulkOffer, TransferMeta
from hypha.net.bulk.blocks import TAG_BYTES, BlockPacker, Opener, Sealer, decode_block_length, unpack_block
from hypha.net.bulk.connections import DRAIN_S, BulkConnection, TransferredBytes
from hypha.net.bulk.files import PartFile, SourceFile
from hypha.net.bulk.wire import (
    BLOCK_BYTES,
    LENGTH_BYTES,
    MAX_BLOCK_BYTES,
    MAX_FRAME_BYTES,
    STALL_TIMEOUT_S,
    ConnectionBroken,
    Frame,
    Go,
    Hello,
    Verdict,
    WantFile,
    Working,
    decode_frame,
    decode_length,
    encode_frame,
)
from hypha.pki.identity import Identity

logger = logging.getLogger(__name__)

T = TypeVar("T")


class SocketConnection(BulkConnection):
    def __init__(
        self, sock: ssl.SSLSocket, peer: str, tally: TransferredBytes, limiter: trio.CapacityLimiter
    ) -> None:
        super().__init__(peer, tally)
        self._sock = sock
        self._limiter = limiter
        #: that of the other end (DER)
        self.certificate = sock.getpeercert(binary_form=True) or b""
        sock.settimeout(STALL_TIMEOUT_S)

    async def say(self, frame: Frame) -> None:
        await self._in_thread(lambda: self._send_frame(frame))

    async def hear(self) -> Frame:
        return await self._in_thread(self._read_frame)

    async def ask(self, frame: Frame) -> Frame:
        # in one thread
        def ask() -> Frame:
            self._send_frame(frame)
            return self._read_frame()

        return await self._in_thread(ask)

    async def wait_word(self) -> None:
        """Return when there is something to hear, the end of the connection included; holds no thread."""
        if not self._sock.pending():
            await trio.lowlevel.wait_readable(self._sock)

    async def deliver(self, source: SourceFile, packer: BlockPacker) -> Verdict:
        return await self._in_thread(lambda: self._deliver(source, packer))

    async def collect(self, part: PartFile, meta: TransferMeta, go: Go) -> None:
        await self._in_thread(lambda: self._collect(part, meta, go))

    async def drain(self) -> None:
        # bounded as a whole by shutting the socket down, which cancelling does
        with trio.move_on_after(DRAIN_S), contextlib.suppress(ConnectionBroken):
            await self._in_thread(self._drain)

    async def close(self) -> None:
        self.close_now()

    def close_now(self) -> None:
        """End it, from whichever thread owns it."""
        with contextlib.suppress(OSError):
            self._sock.close()

    def cut(self) -> None:
        """Break it, whatever goes on over it, in whichever thread."""
        with contextlib.suppress(OSError):
            # not that of TLS, whose state is the thread's
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await in_thread(self._sock, work, self._limiter)
        finally:
            self._tally.sockets.hand_over()

    def _read_exactly(self, read: Callable[[memoryview], int], view: memoryview) -> None:
        while view:
            count = read(view)
            if not count:
                raise ConnectionBroken("the peer closed the connection")
            self.heard += count
            self._tally.sockets.add(received=count)
            view = view[count:]

    def _send_frame(self, frame: Frame) -> None:
        data = encode_frame(frame)
        self._sock.sendall(data)
        self._tally.sockets.add(sent=len(data))

    def _read_frame(self, read: Callable[[memoryview], int] | None = None) -> Frame:
        read = read or self._sock.recv_into
        head = bytearray(LENGTH_BYTES)
        self._read_exactly(read, memoryview(head))
        payload = bytearray(decode_length(bytes(head), MAX_FRAME_BYTES))
        self._read_exactly(read, memoryview(payload))
        return decode_frame(bytes(payload))

    def read_first(self, deadline: float) -> Hello | BulkOffer | WantFile:
        """What it is for, read in this thread; it is here before ``time.monotonic()`` is ``deadline``: one
        time-out a byte would let a peer keep the thread for hours.
        """

        def read(view: memoryview) -> int:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise ConnectionBroken("the peer did not say in time what it came for")
            self._sock.settimeout(left_s)
            return self._sock.recv_into(view)

        first = self._read_frame(read)
        self._sock.settimeout(STALL_TIMEOUT_S)
        if not isinstance(first, Hello | BulkOffer | WantFile):
            raise ConnectionBroken("the peer did not say what its connection is for")
        return first

    def _read_raw(self, view: memoryview) -> int:
        cap = self._tally.caps.down
        if cap is None:
            return socket.socket.recv_into(self._sock, view)
        count = socket.socket.recv_into(self._sock, view[: cap.portion])
        cap.wait(count)
        return count

    def _write_raw(self, view: memoryview) -> None:
        cap = self._tally.caps.up
        while view:
            # not sendall, for all of which the time-out would count
            count = socket.socket.send(self._sock, view if cap is None else view[: cap.portion])
            self._tally.sockets.add(sent=count)
            self.went += count
            if cap is not None:
                cap.wait(count)
            view = view[count:]

    def _deliver(self, source: SourceFile, packer: BlockPacker) -> Verdict:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        sealer = Sealer(packer.go.key)
        source.seek(packer.go.offset)
        # an early word from the receiver is a refusal: stop and listen
        while packer.left and not self._sock.pending() and not poll.poll(0):
            plain, data, packed = packer.read(source)
            began = time.perf_counter()
            self._write_raw(sealer.seal(data, packed))
            packer.sent(plain, len(data), time.perf_counter() - began)
            self._tally.add(sent=plain)
        while True:
            frame = self._read_frame()
            if isinstance(frame, Verdict):
                return frame
            if not isinstance(frame, Working):
                raise ConnectionBroken(f"the peer said {type(frame).__name__} where its verdict was due")

    def _collect(self, part: PartFile, meta: TransferMeta, go: Go) -> None:
        opener = Opener(go.key)
        head = bytearray(LENGTH_BYTES)
        buffer = memoryview(bytearray(MAX_BLOCK_BYTES + TAG_BYTES))
        while left := meta.size - part.received:
            self._read_exactly(self._read_raw, memoryview(head))
            length, packed = decode_block_length(bytes(head))
            sealed = buffer[: length + TAG_BYTES]
            self._read_exactly(self._read_raw, sealed)
            block: memoryview | bytes = opener.open(sealed, packed)
            if packed:
                block = unpack_block(block)
            if len(block) > left:
                raise ConnectionBroken("the peer sent more than it promised")
            part.write(block)
            self._tally.add(received=len(block))

    def _drain(self) -> None:
        # what is on its way is sealed blocks: to TLS they are nonsense
        buffer = memoryview(bytearray(BLOCK_BYTES))
        while self._read_raw(buffer):
            pass


def is_trusted(link: SocketConnection, identity: Identity) -> bool:
    """Whether the certificate at the other end of ``link`` is still good; it was when they shook hands."""
    try:
        identity.check(link.certificate)
    except IdentityError as exc:
        logger.info("A bulk connection is not used any more: %s", exc, extra={"peer_id": link.peer})
        return False
    return True


async def in_thread(sock: socket.socket, work: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
    """Run ``work``, which blocks on ``sock``, in a thread; when cancelled, shut ``sock`` down and wait
    for the thread to end. Socket and TLS errors come out as ConnectionBroken.
    """
    finished = False

    async def shut_down_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if not finished:
                with contextlib.suppress(OSError):
                    # not that of TLS, whose state is the thread's
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(shut_down_when_cancelled)
        result = await trio.to_thread.run_sync(outcome.capture, work, limiter=limiter)
        finished = True
        nursery.cancel_scope.cancel()
    # a thread that our own cancellation cut off has failed: it is the cancellation that counts
    await trio.lowlevel.checkpoint_if_cancelled()
    try:
        return result.unwrap()
    except TimeoutError as exc:
        raise ConnectionBroken(f"no byte moved for {sock.gettimeout():g} s") from exc
    except OSError as exc:
        raise ConnectionBroken(str(exc) or repr(exc)) from exc
    except ValueError as exc:
        # what poll and ssl make of a socket that was closed under them
        if sock.fileno() >= 0:
            raise
        raise ConnectionBroken("the connection was closed here") from exc

"""A direct connection of the bulk plane: a blocking TLS socket, used from one thread at a time.

That is two to three times as fast as going through the event loop, which stays free to renew leases.
Cancelling a call shuts the socket down, which ends the thread at once; the call returns when it ended.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable
from typing import TypeVar

import outcome
import trio

from hypha.messages import TransferMeta
from hypha.net.bulk_files import PartFile, SourceFile
from hypha.net.bulk_links import Link, Tally
from hypha.net.bulk_tls import TlsSocket
from hypha.net.bulk_wire import (
    BLOCK_BYTES,
    LENGTH_BYTES,
    MAX_BLOCK_BYTES,
    MAX_FRAME_BYTES,
    STALL_TIMEOUT_S,
    BlockPacker,
    BlockUnpacker,
    Frame,
    LinkBroken,
    Verdict,
    Working,
    decode_frame,
    decode_length,
    encode_frame,
)

T = TypeVar("T")

#: A receiver that gives up reads on for this long, so that its verdict is not lost in a reset.
_DRAIN_S = 3.0


class SocketLink(Link):
    """Over a blocking TLS socket."""

    def __init__(self, sock: TlsSocket, peer: str, tally: Tally, limiter: trio.CapacityLimiter) -> None:
        super().__init__(peer, tally)
        self._sock = sock
        self._limiter = limiter
        sock.raw.settimeout(STALL_TIMEOUT_S)

    async def say(self, frame: Frame) -> None:
        await self._in_thread(lambda: self._sock.sendall(encode_frame(frame)))

    async def hear(self) -> Frame:
        return await self._in_thread(self._read_frame)

    async def deliver(self, source: SourceFile, meta: TransferMeta, offset: int) -> Verdict:
        return await self._in_thread(lambda: self._deliver(source, meta, offset))

    async def collect(self, part: PartFile, meta: TransferMeta) -> None:
        await self._in_thread(lambda: self._collect(part, meta))

    async def drain(self) -> None:
        # bounded as a whole by shutting the socket down, which cancelling does
        with trio.move_on_after(_DRAIN_S), contextlib.suppress(LinkBroken):
            await self._in_thread(self._drain)

    async def close(self) -> None:
        self.close_now()

    def close_now(self) -> None:
        """End it, from whichever thread owns it."""
        with contextlib.suppress(OSError):
            self._sock.close()

    def refuse_now(self, verdict: Verdict) -> None:
        """Say why, if that goes at once, and end it; from the event loop."""
        with contextlib.suppress(OSError):
            # a frame fits into an empty send buffer, so this does not block
            self._sock.raw.settimeout(0.0)
            self._sock.sendall(encode_frame(verdict))
        self.close_now()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await in_thread(self._sock.raw, work, self._limiter)

    def _read_exactly(self, view: memoryview) -> None:
        while view:
            count = self._sock.recv_into(view)
            if not count:
                raise LinkBroken("the peer closed the connection")
            self.heard += count
            view = view[count:]

    def _read_block(self, limit: int) -> bytes:
        head = bytearray(LENGTH_BYTES)
        self._read_exactly(memoryview(head))
        payload = bytearray(decode_length(bytes(head), limit))
        self._read_exactly(memoryview(payload))
        return bytes(payload)

    def _read_frame(self) -> Frame:
        return decode_frame(self._read_block(MAX_FRAME_BYTES))

    def _deliver(self, source: SourceFile, meta: TransferMeta, offset: int) -> Verdict:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        packer = BlockPacker() if meta.encoding == "zstd" else None
        buffer = memoryview(bytearray(BLOCK_BYTES))
        source.seek(offset)
        left = meta.size - offset
        # an early word from the receiver is a refusal: stop and listen
        while left and not self._sock.waiting() and not poll.poll(0):
            block = buffer[: source.read_into(buffer[: min(left, BLOCK_BYTES)])]
            self._sock.sendall(packer.pack(block) if packer is not None else block)
            left -= len(block)
            self._count_sent(len(block))
        while True:
            frame = self._read_frame()
            if isinstance(frame, Verdict):
                return frame
            if not isinstance(frame, Working):
                raise LinkBroken(f"the peer said {type(frame).__name__} where its verdict was due")

    def _collect(self, part: PartFile, meta: TransferMeta) -> None:
        if meta.encoding == "zstd":
            unpacker = BlockUnpacker()
            while part.received < meta.size:
                plain = unpacker.unpack(self._read_block(MAX_BLOCK_BYTES))
                if len(plain) > meta.size - part.received:
                    raise LinkBroken("the peer sent more than it promised")
                part.write(plain)
                self._tally.add(received=len(plain))
            return
        buffer = memoryview(bytearray(BLOCK_BYTES))
        while left := meta.size - part.received:
            # one call gives one TLS record (16 KiB): gather many before touching disk and hash
            target = buffer[: min(left, BLOCK_BYTES)]
            filled = 0
            try:
                while filled < len(target):
                    count = self._sock.recv_into(target[filled:])
                    if not count:
                        raise LinkBroken("the peer closed the connection")
                    filled += count
                    self.heard += count
            finally:
                # also what came before a cut is worth keeping
                part.write(target[:filled])
                self._tally.add(received=filled)

    def _drain(self) -> None:
        buffer = bytearray(BLOCK_BYTES)
        while self._sock.recv_into(memoryview(buffer)):
            pass


async def in_thread(sock: socket.socket, work: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
    """Run ``work``, which blocks on ``sock``, in a thread; when cancelled, shut ``sock`` down and wait
    for the thread to end. Socket and TLS errors come out as LinkBroken.
    """
    finished = False

    async def shut_down_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if not finished:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

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
        raise LinkBroken(f"no byte moved for {sock.gettimeout():g} s") from exc
    except OSError as exc:
        raise LinkBroken(str(exc) or repr(exc)) from exc
    except ValueError as exc:
        # what poll and ssl make of a socket that was closed under them
        if sock.fileno() >= 0:
            raise
        raise LinkBroken("the connection was closed here") from exc

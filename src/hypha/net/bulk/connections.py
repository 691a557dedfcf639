"""A connection of the bulk plane: what its users see of it, and the two kinds that there are.

A direct one (:class:`SocketConnection`) is a blocking TLS socket, used from one thread at a time. That is two
to three times as fast as going through the event loop, which stays free to renew leases. Words go through
TLS, a file's bytes beside it, sealed (:mod:`hypha.net.bulk.blocks`). Cancelling a call shuts the socket down,
which ends the thread at once; the call returns when it ended.

A relayed one (:class:`StreamConnection`) is a libp2p stream, used from the event loop: slower, and the only
way when neither side can dial the other. It is as safe: the relay carries a connection that the two ends have
encrypted between themselves.

It is one module as both say the same words in the same order: whoever changes one has to look at the other.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import outcome
import trio
from libp2p.abc import ConnectionType

from hypha.errors import IdentityError
from hypha.messages import TransferMeta
from hypha.net.bulk.bandwidth import Caps
from hypha.net.bulk.blocks import (
    TAG_BYTES,
    BlockPacker,
    Opener,
    Sealer,
    decode_block_length,
    encode_block_length,
    new_key,
    unpack_block,
)
from hypha.net.bulk.files import PartFile, SourceFile
from hypha.net.bulk.wire import (
    BLOCK_BYTES,
    LENGTH_BYTES,
    MAX_BLOCK_BYTES,
    MAX_FRAME_BYTES,
    STALL_TIMEOUT_S,
    WANT_ALPN,
    WORKING_INTERVAL_S,
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
from hypha.net.libp2p.streams import STREAM_ERRORS, discard
from hypha.net.sockets import ByteCounts
from hypha.pki.identity import Identity

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Written at a time, at most and at least: what a slow link must take within the stall time-out. Requests to
#: the same peer wait behind it, so it is made smaller where it takes longer than that.
_WRITE_BYTES = 128 << 10
_LEAST_WRITE_BYTES = 16 << 10
_WRITE_S = 0.05
#: A receiver that gives up reads on for this long, so that its verdict is not lost in a reset.
_DRAIN_S = 3.0
#: Sealed at first; twice as much each time, up to ``BLOCK_BYTES``: a block that is cut is lost, and a
#: connection that never lasts long is to bring something each time. What is compressed goes in whole blocks.
_FIRST_SEALED_BYTES = 16 << 10


class TransferredBytes:
    """Bytes of files sent and received, counted from many threads; ``sockets`` counts those that the bulk
    plane's own connections carry. ``caps`` are those of the node.
    """

    def __init__(self, caps: Caps) -> None:
        self.caps = caps
        self._lock = threading.Lock()
        self.sockets = ByteCounts("bulk")
        self.sent = 0
        self.received = 0

    def add(self, sent: int = 0, received: int = 0) -> None:
        with self._lock:
            self.sent += sent
            self.received += received


class BulkConnection(ABC):
    """A connection whose other end is proven to be ``peer``."""

    def __init__(self, peer: str, tally: TransferredBytes) -> None:
        self.peer = peer
        #: how it was made, and whether it was kept from an earlier transfer; for the log and for traces
        self.way = ""
        self.was_kept = False
        #: whether it runs through a gateway
        self.is_relayed = False
        #: whether the other end is of a version that knows ``WantFile``
        self.knows_want = False
        #: bytes that came and went so far, whatever they were
        self.heard = 0
        self.went = 0
        self._tally = tally

    @abstractmethod
    async def say(self, frame: Frame) -> None:
        """Send a frame. ConnectionBroken."""

    @abstractmethod
    async def hear(self) -> Frame:
        """The next frame. ConnectionBroken, also when nothing comes within the stall time-out."""

    async def ask(self, frame: Frame) -> Frame:
        """``say``, then ``hear``."""
        await self.say(frame)
        return await self.hear()

    @abstractmethod
    async def deliver(self, source: SourceFile, packer: BlockPacker) -> Verdict:
        """Send the file as ``packer.go`` wants it; the receiver's verdict. ConnectionBroken, FileChanged."""

    def new_go(self, offset: int, zstd_blocks: bool) -> Go:
        """What to say as the receiver of one file, once."""
        return Go(offset, zstd_blocks=zstd_blocks)

    @abstractmethod
    async def collect(self, part: PartFile, meta: TransferMeta, go: Go) -> None:
        """Receive the file into ``part``, as ``go``, which was said, asks. ConnectionBroken, DiskFailed."""

    @abstractmethod
    async def drain(self) -> None:
        """Read and forget what comes, for a moment; never raises."""

    @abstractmethod
    async def close(self) -> None:
        """End it, also while being cancelled; never raises."""

    @abstractmethod
    def close_now(self) -> None:
        """End it, or have it ended, without waiting; a socket from whichever thread owns it."""

    async def while_working(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of ``work``; the other end hears ``Working`` now and then meanwhile."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._say_working)
            # captured, so that its error comes out as itself and not in a group
            result = await outcome.acapture(work)
            nursery.cancel_scope.cancel()
        return result.unwrap()

    async def _say_working(self) -> None:
        while True:
            await trio.sleep(WORKING_INTERVAL_S)
            # shielded: a frame sent by half would be the end of the connection
            with trio.CancelScope(shield=True), contextlib.suppress(ConnectionBroken):
                await self.say(Working())


class StreamConnection(BulkConnection):
    def __init__(
        self, stream: Any, peer: str, tally: TransferredBytes, limiter: trio.CapacityLimiter
    ) -> None:
        super().__init__(peer, tally)
        self._stream = stream
        self.is_relayed = stream.muxed_conn.secured_conn.get_connection_type() == ConnectionType.RELAYED
        self._limiter = limiter
        self._buffer = bytearray()
        self._closing = False
        #: set when whoever took it has closed it, or nobody wants it
        self.closed = trio.Event()

    async def say(self, frame: Frame) -> None:
        await self._write(encode_frame(frame))

    async def hear(self) -> Frame:
        return await self._read_frame(None)

    async def deliver(self, source: SourceFile, packer: BlockPacker) -> Verdict:
        await self._call(source.seek, packer.go.offset)
        heard: outcome.Outcome[Verdict] | None = None
        writing = trio.CancelScope()
        written = trio.Event()

        async def listen() -> None:
            # beside the writing, or an early refusal would be seen only after all bytes were sent
            nonlocal heard
            heard = await outcome.acapture(self._hear_verdict, written)
            writing.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            sent: outcome.Outcome[None] = outcome.Value(None)
            with writing:
                sent = await outcome.acapture(self._send_blocks, source, packer)
            written.set()
            if isinstance(sent, outcome.Error) and not writing.cancel_called:
                # it may have failed because the receiver gave up: what it said last may still arrive
                nursery.cancel_scope.deadline = trio.current_time() + 1.0
        await trio.lowlevel.checkpoint_if_cancelled()
        if isinstance(sent, outcome.Error) and isinstance(sent.error, trio.Cancelled):
            sent = outcome.Value(None)  # by ``writing``: there is a verdict, or there was an error
        if not isinstance(heard, outcome.Value):
            sent.unwrap()
        if heard is None:
            raise ConnectionBroken("the stream broke")
        return heard.unwrap()

    async def _hear_verdict(self, written: trio.Event) -> Verdict:
        while True:
            # while we are writing the receiver has every right to be silent
            frame = await self._read_frame(written)
            if isinstance(frame, Verdict):
                return frame
            if not isinstance(frame, Working):
                raise ConnectionBroken(f"the peer said {type(frame).__name__} where its verdict was due")

    async def _send_blocks(self, source: SourceFile, packer: BlockPacker) -> None:
        cap, left = self._tally.caps.up, packer.left
        buffer = memoryview(bytearray(BLOCK_BYTES))
        size = _WRITE_BYTES

        def next_block() -> tuple[int, memoryview]:
            block = buffer[: source.read_into(buffer[: min(left, BLOCK_BYTES)])]
            if not packer.frames:
                return len(block), block
            data, packed = packer.packed(block)
            return len(block), memoryview(encode_block_length(len(data), packed) + bytes(data))

        while left:
            count, data = await self._call(next_block)
            began, wire = time.perf_counter(), len(data)
            while data:
                piece = data[: size if cap is None else min(cap.portion, size)]
                started = trio.current_time()
                await self._write(bytes(piece))
                if trio.current_time() - started > _WRITE_S:
                    size = max(size // 2, _LEAST_WRITE_BYTES)
                elif len(piece) == size:
                    size = min(2 * size, _WRITE_BYTES)
                if cap is not None:
                    await cap.sleep(len(piece))
                data = data[len(piece) :]
            packer.sent(count, wire, time.perf_counter() - began)
            left -= count
            self._tally.add(sent=count)

    async def collect(self, part: PartFile, meta: TransferMeta, go: Go) -> None:
        whole = meta.encoding == "zstd"
        while left := meta.size - part.received:
            if whole or go.zstd_blocks:
                length, packed = decode_block_length(await self._read_exactly(LENGTH_BYTES, None))
                data = await self._read_exactly(length, None)
                if whole or packed:
                    data = unpack_block(data)
                if len(data) > left:
                    raise ConnectionBroken("the peer sent more than it promised")
            else:
                try:
                    data = await self._read_exactly(min(left, BLOCK_BYTES), None)
                except ConnectionBroken:
                    await self._call(part.write, bytes(self._buffer[:left]))
                    raise
            await self._call(part.write, data)
            self._tally.add(received=len(data))

    async def drain(self) -> None:
        with trio.move_on_after(_DRAIN_S), contextlib.suppress(*STREAM_ERRORS):
            while await self._stream.read(BLOCK_BYTES):
                pass

    async def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        # a clean close first: a reset may overtake the verdict
        with trio.move_on_after(1.0, shield=True) as scope:
            try:
                await self._stream.close()
            except STREAM_ERRORS:
                scope.cancel()
                await trio.lowlevel.checkpoint_if_cancelled()
        if scope.cancelled_caught:
            await discard(self._stream)
        self.closed.set()

    def close_now(self) -> None:
        self.closed.set()  # its handler closes the stream then

    async def _write(self, data: bytes) -> None:
        with trio.move_on_after(STALL_TIMEOUT_S) as scope:
            try:
                await self._stream.write(data)
            except STREAM_ERRORS as exc:
                raise ConnectionBroken(f"the stream broke: {exc!r}") from exc
        if scope.cancelled_caught:
            raise ConnectionBroken(f"no byte moved for {STALL_TIMEOUT_S:g} s")
        self.went += len(data)

    async def _read_frame(self, quiet_from: trio.Event | None) -> Frame:
        head = await self._read_exactly(LENGTH_BYTES, quiet_from)
        return decode_frame(await self._read_exactly(decode_length(head, MAX_FRAME_BYTES), None))

    async def _read_exactly(self, count: int, quiet_from: trio.Event | None) -> bytes:
        cap = self._tally.caps.down
        while len(self._buffer) < count:
            data = b""
            with trio.move_on_after(STALL_TIMEOUT_S) as scope:
                try:
                    wanted = count - len(self._buffer)
                    data = await self._stream.read(wanted if cap is None else min(wanted, cap.portion))
                except STREAM_ERRORS as exc:
                    raise ConnectionBroken(f"the stream broke: {exc!r}") from exc
                if not data:
                    raise ConnectionBroken("the peer closed the stream")
                self._buffer += data
                self.heard += len(data)
            if scope.cancelled_caught and (quiet_from is None or quiet_from.is_set()):
                raise ConnectionBroken(f"no byte moved for {STALL_TIMEOUT_S:g} s")
            if cap is not None:
                await cap.sleep(len(data))
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    async def _call(self, work: Callable[..., T], *arguments: Any) -> T:
        return await trio.to_thread.run_sync(work, *arguments, limiter=self._limiter)


class SocketConnection(BulkConnection):
    def __init__(
        self, sock: ssl.SSLSocket, peer: str, tally: TransferredBytes, limiter: trio.CapacityLimiter
    ) -> None:
        super().__init__(peer, tally)
        self._sock = sock
        self._limiter = limiter
        #: that of the other end (DER)
        self.certificate = sock.getpeercert(binary_form=True) or b""
        self.knows_want = sock.selected_alpn_protocol() == WANT_ALPN
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

    def new_go(self, offset: int, zstd_blocks: bool) -> Go:
        return Go(offset, new_key(), zstd_blocks)

    async def collect(self, part: PartFile, meta: TransferMeta, go: Go) -> None:
        await self._in_thread(lambda: self._collect(part, meta, go))

    async def drain(self) -> None:
        # bounded as a whole by shutting the socket down, which cancelling does
        with trio.move_on_after(_DRAIN_S), contextlib.suppress(ConnectionBroken):
            await self._in_thread(self._drain)

    async def close(self) -> None:
        self.close_now()

    def close_now(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.close()

    def cut(self) -> None:
        """Break it, whatever goes on over it, in whichever thread."""
        with contextlib.suppress(OSError):
            # not that of TLS, whose state is the thread's
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def refuse_now(self, verdict: Verdict) -> None:
        """Say why, if that goes at once, and end it; from the event loop."""
        with contextlib.suppress(OSError):
            # a frame fits into an empty send buffer, so this does not block
            self._sock.settimeout(0.0)
            self._sock.sendall(encode_frame(verdict))
        self.close_now()

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

    def read_first(self, deadline: float) -> Hello | WantFile:
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
        if not isinstance(first, Hello | WantFile):
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
        count = BLOCK_BYTES if packer.whole else _FIRST_SEALED_BYTES
        buffer = memoryview(bytearray(BLOCK_BYTES))
        source.seek(packer.go.offset)
        left = packer.left
        # an early word from the receiver is a refusal: stop and listen
        while left and not self._sock.pending() and not poll.poll(0):
            block = buffer[: source.read_into(buffer[: min(left, count)])]
            data, packed = packer.packed(block)
            began = time.perf_counter()
            self._write_raw(sealer.seal(data, packed))
            packer.sent(len(block), len(data), time.perf_counter() - began)
            left -= len(block)
            count = min(2 * count, BLOCK_BYTES)
            self._tally.add(sent=len(block))
        while True:
            frame = self._read_frame()
            if isinstance(frame, Verdict):
                return frame
            if not isinstance(frame, Working):
                raise ConnectionBroken(f"the peer said {type(frame).__name__} where its verdict was due")

    def _collect(self, part: PartFile, meta: TransferMeta, go: Go) -> None:
        whole = meta.encoding == "zstd"
        opener = Opener(go.key)
        head = bytearray(LENGTH_BYTES)
        buffer = memoryview(bytearray(MAX_BLOCK_BYTES + TAG_BYTES))
        while left := meta.size - part.received:
            self._read_exactly(self._read_raw, memoryview(head))
            packed = False
            if go.zstd_blocks:
                length, packed = decode_block_length(bytes(head))
            else:
                length = decode_length(bytes(head), MAX_BLOCK_BYTES)
            sealed = buffer[: length + TAG_BYTES]
            self._read_exactly(self._read_raw, sealed)
            block: memoryview | bytes = opener.open(sealed, packed)
            if whole or packed:
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

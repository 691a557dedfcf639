"""A connection of the bulk plane: what its users see of it, and the relayed kind.

A direct one is in :mod:`hypha.net.bulk.sockets`. A relayed one (:class:`StreamConnection`) is a libp2p
stream, used from the event loop: slower, and the only way when neither side can dial the other. It is as
safe: the relay carries a connection that the two ends have encrypted between themselves. Both kinds say the
same words in the same order: whoever changes one has to look at the other.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import outcome
import trio
from libp2p.abc import ConnectionType

from hypha.errors import NetworkError, Refused
from hypha.messages import TransferMeta
from hypha.net.bandwidth import Caps
from hypha.net.bulk.blocks import BlockPacker, decode_block_length, encode_block_length, unpack_block
from hypha.net.bulk.files import PartFile, SourceFile
from hypha.net.bulk.wire import (
    BLOCK_BYTES,
    LENGTH_BYTES,
    MAX_FRAME_BYTES,
    SOON_S,
    STALL_TIMEOUT_S,
    WORKING_INTERVAL_S,
    ConnectionBroken,
    Frame,
    Go,
    Verdict,
    Working,
    decode_frame,
    decode_length,
    encode_frame,
)
from hypha.net.libp2p.streams import STREAM_ERRORS, discard
from hypha.net.sockets import ByteCounts

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Written at a time, at most and at least: what a slow link must take within the stall time-out. Requests to
#: the same peer wait behind it, so it is made smaller where it takes longer than that.
_WRITE_BYTES = 128 << 10
_LEAST_WRITE_BYTES = 16 << 10
_WRITE_S = 0.05
#: From what this end says first to the other end's word.
FIRST_WORD_S = 10.0
#: A receiver that gives up reads on for this long, so that its verdict is not lost in a reset.
DRAIN_S = 3.0


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
        #: whether this end opened it, or had it opened, and speaks first
        self.speaks = False
        #: whether it runs through a gateway
        self.is_relayed = False
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

    @abstractmethod
    async def collect(self, part: PartFile, meta: TransferMeta, go: Go) -> None:
        """Receive the file into ``part``, as ``go``, which was said, asks. ConnectionBroken, DiskFailed."""

    @abstractmethod
    async def drain(self) -> None:
        """Read and forget what comes, for a moment; never raises."""

    @abstractmethod
    async def close(self) -> None:
        """End it, also while being cancelled; never raises."""

    async def first_word(self, first: Callable[[], Frame]) -> Frame:
        """What the other end says to ``first()``, in time. The connection is closed when that fails."""
        try:
            with trio.move_on_after(FIRST_WORD_S):
                return await self.ask(first())
            raise ConnectionBroken(f"no word within {FIRST_WORD_S:g} s")
        except BaseException:
            await self.close()
            raise

    async def past_working(self, word: Frame) -> Frame:
        """What follows the other end's ``word`` that it is working: hashing what it has may take it minutes,
        and others may be served first. The connection is closed when that fails.
        """
        try:
            while isinstance(word, Working):
                word = await self.hear()
            return word
        except BaseException:
            await self.close()
            raise

    async def decided(self, decide: Callable[[], Awaitable[T]]) -> T:
        """What this node's own code says to what the other end wants, which hears ``Working`` meanwhile.
        Refused, also where that code fails.
        """
        try:
            return await self.while_working(decide)
        except (Refused, ConnectionBroken):
            raise
        except NetworkError as exc:
            raise Refused("unreachable", str(exc)) from exc
        except Exception as exc:  # the edge of the service: one bad request must not end the node
            logger.exception("What a peer wanted of this node failed.", extra={"peer_id": self.peer})
            raise Refused("internal", "it failed there; its log says more") from exc

    async def while_working(self, work: Callable[[], Awaitable[T]], to_its_end: bool = False) -> T:
        """The result of ``work``; the other end hears ``Working`` now and then meanwhile. ConnectionBroken
        when it is gone: nobody waits for the result then, and ``work`` is cancelled unless it is to go on
        ``to_its_end``.
        """
        gone: ConnectionBroken | None = None

        async def say_working() -> None:
            nonlocal gone
            pause_s = SOON_S
            try:
                while True:
                    await trio.sleep(pause_s)
                    pause_s = WORKING_INTERVAL_S
                    # shielded: a frame sent by half would be the end of the connection
                    with trio.CancelScope(shield=True):
                        await self.say(Working())
            except ConnectionBroken as exc:
                if not to_its_end:
                    gone = exc
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(say_working)
            # captured, so that its error comes out as itself and not in a group
            result = await outcome.acapture(work)
            nursery.cancel_scope.cancel()
        if (
            gone is not None
            and isinstance(result, outcome.Error)
            and isinstance(result.error, trio.Cancelled)
        ):
            raise gone
        return result.unwrap()


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
        cap, size = self._tally.caps.up, _WRITE_BYTES

        def next_block() -> tuple[int, memoryview]:
            plain, data, packed = packer.read(source)
            return plain, memoryview(encode_block_length(len(data), packed) + bytes(data))

        while packer.left:
            plain, data = await self._call(next_block)
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
            packer.sent(plain, wire, time.perf_counter() - began)
            self._tally.add(sent=plain)

    async def collect(self, part: PartFile, meta: TransferMeta, go: Go) -> None:
        while left := meta.size - part.received:
            length, packed = decode_block_length(await self._read_exactly(LENGTH_BYTES, None))
            data = await self._read_exactly(length, None)
            if packed:
                data = unpack_block(data)
            if len(data) > left:
                raise ConnectionBroken("the peer sent more than it promised")
            await self._call(part.write, data)
            self._tally.add(received=len(data))

    async def drain(self) -> None:
        with trio.move_on_after(DRAIN_S), contextlib.suppress(*STREAM_ERRORS):
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

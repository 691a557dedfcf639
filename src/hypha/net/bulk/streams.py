"""A relayed connection of the bulk plane: a libp2p stream, used from the event loop.

Slower than a socket, and the only way when neither side can dial the other. It is as safe: the relay
carries a connection that the two ends have encrypted between themselves.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

import outcome
import trio
from libp2p.abc import ConnectionType

from hypha.messages import TransferMeta
from hypha.net.bulk.compression import Packing
from hypha.net.bulk.connection import BulkConnection, TransferredBytes
from hypha.net.bulk.files import PartFile, SourceFile
from hypha.net.bulk.wire import (
    BLOCK_BYTES,
    LENGTH_BYTES,
    MAX_FRAME_BYTES,
    STALL_TIMEOUT_S,
    BlockPacker,
    BlockUnpacker,
    ConnectionBroken,
    Frame,
    Go,
    Verdict,
    Working,
    decode_block_length,
    decode_frame,
    decode_length,
    encode_block_length,
    encode_frame,
)
from hypha.net.libp2p.streams import STREAM_ERRORS, discard

T = TypeVar("T")

#: Written at a time, at most and at least: what a slow link must take within the stall time-out. Requests to
#: the same peer wait behind it, so it is made smaller where it takes longer than that.
_WRITE_BYTES = 128 << 10
_LEAST_WRITE_BYTES = 16 << 10
_WRITE_S = 0.05
#: A receiver that gives up reads on for this long, so that its verdict is not lost in a reset.
_DRAIN_S = 3.0


class StreamConnection(BulkConnection):
    """Over a libp2p stream."""

    def __init__(
        self, stream: Any, peer: str, tally: TransferredBytes, limiter: trio.CapacityLimiter
    ) -> None:
        super().__init__(peer, tally)
        self._stream = stream
        self._limiter = limiter
        self._buffer = bytearray()
        self._closing = False
        #: set when whoever took it has closed it, or nobody wants it
        self.closed = trio.Event()

    @property
    def is_relayed(self) -> bool:
        return bool(self._stream.muxed_conn.secured_conn.get_connection_type() == ConnectionType.RELAYED)

    async def say(self, frame: Frame) -> None:
        await self._write(encode_frame(frame))

    async def hear(self) -> Frame:
        return decode_frame(await self._read_block(MAX_FRAME_BYTES))

    async def deliver(
        self, source: SourceFile, meta: TransferMeta, go: Go, packing: Packing | None = None
    ) -> Verdict:
        if not go.zstd_blocks:
            packing = None
        await self._call(source.seek, go.offset)
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
                sent = await outcome.acapture(self._send_blocks, source, meta, go.offset, packing)
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
            head = await self._read_exactly(LENGTH_BYTES, written)
            frame = decode_frame(await self._read_exactly(decode_length(head, MAX_FRAME_BYTES), None))
            if isinstance(frame, Verdict):
                return frame
            if not isinstance(frame, Working):
                raise ConnectionBroken(f"the peer said {type(frame).__name__} where its verdict was due")

    async def _send_blocks(
        self, source: SourceFile, meta: TransferMeta, offset: int, packing: Packing | None
    ) -> None:
        cap = self._tally.caps.up
        whole = meta.encoding == "zstd"
        packer = BlockPacker() if whole else BlockPacker(packing.level) if packing is not None else None
        buffer = memoryview(bytearray(BLOCK_BYTES))
        left = meta.size - offset
        size = _WRITE_BYTES

        def next_block() -> tuple[int, memoryview]:
            block = buffer[: source.read_into(buffer[: min(left, BLOCK_BYTES)])]
            data, packed = self._packed(packer, packing, block)
            if packer is None:
                return len(block), block
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
            if packing is not None:
                packing.sent(count, wire, time.perf_counter() - began)
            left -= count
            self._count_sent(count)

    async def collect(self, part: PartFile, meta: TransferMeta, go: Go) -> None:
        whole = meta.encoding == "zstd"
        unpacker = BlockUnpacker()
        while left := meta.size - part.received:
            if whole or go.zstd_blocks:
                length, packed = decode_block_length(await self._read_exactly(LENGTH_BYTES, None))
                data = await self._read_exactly(length, None)
                if whole or packed:
                    data = unpacker.unpack(data)
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

    async def _write(self, data: bytes) -> None:
        with trio.move_on_after(STALL_TIMEOUT_S) as scope:
            try:
                await self._stream.write(data)
            except STREAM_ERRORS as exc:
                raise ConnectionBroken(f"the stream broke: {exc!r}") from exc
        if scope.cancelled_caught:
            raise ConnectionBroken(f"no byte moved for {STALL_TIMEOUT_S:g} s")
        self.went += len(data)

    async def _read_block(self, limit: int) -> bytes:
        head = await self._read_exactly(LENGTH_BYTES, None)
        return await self._read_exactly(decode_length(head, limit), None)

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

"""py-libp2p 0.8.1's yamux, repaired and bounded. Each repair has a regression test; they touch private names,
which is why the library is pinned.

As shipped, a writer whose reader pauses for five seconds is killed, a waiting writer polls every 10 ms,
frames are 64 KiB, cancelling ``open_stream`` leaks one of 256 slots, closing a connection whose socket
takes no data waits behind the stuck writer, every read, of a single byte too, is answered with a
frame of window (and with more window than was read, so that the limit grows and grows), and a ping
whose reply is quick is timed from the one before.

What comes in is read within bounds. As shipped, a peer that sends past a stream's window is logged and its
bytes are kept, streams may be opened without end, each window may grow to 16 MiB, and what a stream had sent
when it was reset stays for a minute and a half. Here the bytes of a peer that wait to be read are at most
those that its streams were promised, ``MAX_INBOUND_STREAMS`` first windows and ``MAX_GROWTH_BYTES`` together;
whoever sends more, or what yamux does not know, has its connection ended. Streams over the limit are reset.

It is one module as it is one state: each half reads what the other one writes into a stream.
"""

from __future__ import annotations

import logging
import struct
from typing import Any

import trio
from libp2p.io.utils import read_exactly
from libp2p.stream_muxer import muxer_multistream
from libp2p.stream_muxer.yamux import yamux

from hypha.naming import shown
from hypha.net.peers.inbound_limits import InboundBudget
from hypha.telemetry.instruments import STREAMS_REFUSED

logger = logging.getLogger(__name__)

#: Payload of one DATA frame.
FRAME_BYTES = 256 * 1024
#: How long a reader may pause before its writer gives up; a dead *connection* is noticed much earlier.
STALL_S = 600.0
#: How long closing a connection waits to send its goodbye.
GOODBYE_S = 0.5
#: Open at once by the other end of a connection, unless its node allows it fewer. Its own end opens no more,
#: either.
MAX_INBOUND_STREAMS = 256
#: By so much all windows of a connection may grow beyond their first 256 KiB: two streams reach the most that
#: one can have (16 MiB), which is what a fast and distant transfer through a relay needs.
MAX_GROWTH_BYTES = 32 << 20
#: The body of a frame must be here within this.
BODY_TIMEOUT_S = 60.0
#: Bytes of a stream that is over are read, and dropped, in pieces of this size.
_DROP_BYTES = 64 << 10

_HEADER = struct.Struct(yamux.YAMUX_HEADER_FORMAT)
#: How the header of a ping that asks for a reply begins: version, type, flags.
_PING = struct.pack(">BBH", 0, yamux.TYPE_PING, yamux.FLAG_SYN)
#: Attributes of a stream for which a writer waits: for window, or for the end.
_WAITED_FOR = frozenset(("send_window", "closed", "send_closed"))


class MuxedStream(yamux.YamuxStream):  # type: ignore[misc]
    """A stream of a :class:`Muxer`."""

    conn: Muxer
    closed: bool
    target_recv_window: int

    def __init__(self, stream_id: int, conn: Muxer, is_initiator: bool) -> None:
        self._writable = trio.Event()
        self._is_narrow = False
        super().__init__(stream_id, conn, is_initiator)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _WAITED_FOR and value > 0:
            self._writable.set()

    async def write(self, data: bytes) -> None:
        """Send ``data`` as the peer's window allows, waiting without polling."""
        view = memoryview(data)
        sent = 0
        while sent < len(view):
            if self.reset_received:
                raise yamux.MuxedStreamReset("the stream was reset")
            if self.send_closed or self.closed:
                raise yamux.MuxedStreamError("the stream is closed for sending")
            if self.send_window <= 0:
                if self._writable.is_set():  # else somebody waits for it already
                    self._writable = trio.Event()
                with trio.move_on_after(STALL_S) as scope:
                    await self._writable.wait()
                if scope.cancelled_caught:
                    raise yamux.MuxedStreamError(f"the reader made no progress for {STALL_S:g} s")
                continue
            size = min(self.send_window, FRAME_BYTES, len(view) - sent)
            self.send_window -= size
            header = _HEADER.pack(0, yamux.TYPE_DATA, 0, self.stream_id, size)
            await self.conn._write_frame(b"".join((header, view[sent : sent + size])))
            sent += size

    async def read(self, n: int | None = -1) -> bytes:
        """What there is, at most ``n`` bytes; waits while there is nothing. Leaves no event behind, as the
        library's does for each stream that is reset while it is read.
        """
        connection, number = self.conn, self.stream_id
        if self.recv_closed and not connection.stream_buffers.get(number):
            if self.reset_received:
                raise yamux.MuxedStreamReset("the stream was reset")
            raise yamux.MuxedStreamEOF("the stream is closed for receiving")
        while True:
            buffer = connection.stream_buffers.get(number)
            if buffer is None or connection.event_shutting_down.is_set():
                raise yamux.MuxedStreamEOF("the stream is over")
            if self.reset_received and not (self.recv_closed and buffer):
                raise yamux.MuxedStreamReset("the stream was reset")
            if buffer:
                count = len(buffer) if n is None or n < 0 else n
                with memoryview(buffer) as view:
                    data = bytes(view[:count])
                del buffer[:count]
                if self.closed:
                    connection._finalize_stream_locked(self, fully_closed=True)
                await self._give_window()
                return data
            if self.recv_closed:
                raise yamux.MuxedStreamEOF("the stream is closed for receiving")
            if self.closed:
                raise yamux.MuxedStreamReset("the stream is closed")
            event = connection.stream_events[number]
            await event.wait()
            if connection.stream_events.get(number) is event:
                connection.stream_events[number] = trio.Event()

    async def _give_window(self) -> None:
        """Once half of the window has been read, tell the writer; before, it has no need to know.

        What is announced and not yet read is at most ``target_recv_window``: a writer that has used all of
        its window has left at least half of it in the reader's buffer or has been told.
        """
        buffered = len(self.conn.stream_buffers.get(self.stream_id, b""))
        read = self.target_recv_window - self.recv_window - buffered
        if read < self.target_recv_window // 2 or self.recv_closed:
            return
        more = self._grow_to_delta(buffered)
        if more and self._may_grow():
            more += self._apply_autotune_epoch(buffered)
        try:
            await self.send_window_update(more)
        except trio.Cancelled:
            # only waiting can be cancelled, so nothing was sent; the next read tells it
            self.recv_window -= more
            raise

    def _may_grow(self) -> bool:
        """Whether the window may be doubled."""
        if self._is_narrow or self.conn.budget.is_tight:
            return False
        grown = sum(one.target_recv_window - yamux.DEFAULT_WINDOW_SIZE for one in self.conn.streams.values())
        more = min(self.target_recv_window, yamux.MAX_WINDOW_SIZE - self.target_recv_window)
        return bool(grown + more <= MAX_GROWTH_BYTES)

    def narrow(self, window_bytes: int) -> None:
        """The peer may send so much before it is read, besides what it was promised already."""
        self.target_recv_window = min(self.target_recv_window, window_bytes)
        self._is_narrow = True

    async def reset(self) -> None:
        """The library's, after which nothing is read: what waits for that is dropped at once."""
        try:
            await super().reset()
        finally:
            if self.closed:
                self.conn.stream_buffers.get(self.stream_id, bytearray()).clear()
                self.conn._finalize_stream_locked(self, fully_closed=True)

    def note_end(self, flags: int) -> None:
        """What the flags of a frame say of its end."""
        connection = self.conn
        if flags & yamux.FLAG_FIN:
            self.recv_closed = True
            self.closed = self.closed or self.send_closed
        if flags & yamux.FLAG_RST:
            self.closed = True
            self.reset_received = True
            if not self.recv_closed:
                # nobody may read it any more; after an end it may be read until that
                connection.stream_buffers.get(self.stream_id, bytearray()).clear()
        if flags & (yamux.FLAG_FIN | yamux.FLAG_RST):
            if (event := connection.stream_events.get(self.stream_id)) is not None:
                event.set()
            if self.closed:
                connection._finalize_stream_locked(self, fully_closed=True)


class Breach(Exception):
    """The peer does what no peer may; the text says what."""


class _TooMuch(Breach):
    """All peers together are over a limit of this node, and most of it is this one's."""


class Muxer(yamux.Yamux):  # type: ignore[misc]
    """A connection's streams. ``secured_conn`` is a
    :class:`~hypha.net.libp2p.tls_connection.TlsConnection`.
    """

    #: why it was ended here, where its peer had broken the rules
    breach: str | None = None
    _rtt: float
    _told_full = False

    @property
    def budget(self) -> InboundBudget:
        """What all connections of this node may take together."""
        budget: InboundBudget = self.secured_conn.budget
        return budget

    async def _write_frame(self, data: bytes) -> None:
        """Send one frame, without the library's taking it apart again for its log.

        A ping is timed from just before it is sent. The library notes the time after the write, which may be
        after the reply was read: the round trip is then counted from the ping before, or, for the first one,
        from the clock's zero.
        """
        async with self._write_lock:
            if data[:4] == _PING:
                self._ping_sent_time = trio.current_time()
            await self.secured_conn.write(data)

    async def _answer(self, kind: int, flags: int, stream_id: int, value: int = 0) -> None:
        await self._write_frame(_HEADER.pack(0, kind, flags, stream_id, value))

    async def open_stream(self) -> MuxedStream:
        """Open a stream; the wait for a slot may be cancelled, what follows may not, so no slot leaks."""
        await self.stream_backlog_semaphore.acquire()
        with trio.CancelScope(shield=True):
            if self.event_shutting_down.is_set():
                self.stream_backlog_semaphore.release()
                raise yamux.MuxedStreamError("the connection is shutting down")
            stream_id = self.next_stream_id
            self.next_stream_id += 2
            stream = self._add(MuxedStream(stream_id, self, True))
            stream._owns_backlog_slot = True
            try:
                await self._answer(yamux.TYPE_WINDOW_UPDATE, yamux.FLAG_SYN, stream_id)
            except (yamux.RawConnError, yamux.ConnectionClosedError, OSError) as exc:
                stream.closed = True
                self._finalize_stream_locked(stream, fully_closed=True)
                raise yamux.MuxedStreamError(f"the stream could not be announced: {exc}") from exc
        return stream

    def _add(self, stream: MuxedStream, data: bytes = b"") -> MuxedStream:
        self.streams[stream.stream_id] = stream
        self.stream_buffers[stream.stream_id] = bytearray(data)
        self.stream_events[stream.stream_id] = trio.Event()
        return stream

    async def close(self, error_code: int = yamux.GO_AWAY_NORMAL) -> None:
        """The library's, but a connection that takes no data is cut instead of waited for."""

        async def cut() -> None:
            await trio.sleep(GOODBYE_S)
            await self.secured_conn.abort()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            await super().close(error_code)
            nursery.cancel_scope.cancel()

    async def handle_incoming(self) -> None:
        """Until the connection ends; then nothing of it is left."""
        self.budget.opened(self)
        try:
            await self._serve()
        finally:
            self.budget.closed(self)

    async def _serve(self) -> None:
        told = {"peer_id": str(self.peer_id)}
        try:
            while not self.event_shutting_down.is_set():
                header = await read_exactly(self.secured_conn, _HEADER.size)
                version, kind, flags, stream_id, length = _HEADER.unpack(header)
                if version != 0:
                    raise Breach(f"it speaks version {version} of yamux")
                if kind == yamux.TYPE_DATA:
                    await self._data(flags, stream_id, length)
                elif kind == yamux.TYPE_WINDOW_UPDATE:
                    stream = self.streams.get(stream_id)
                    if flags & yamux.FLAG_SYN:
                        stream = await self._opened(flags, stream_id, b"")
                    if stream is not None:
                        stream.send_window += length
                        stream.note_end(flags)
                elif kind == yamux.TYPE_PING:
                    await self._ping(flags, length)
                elif kind == yamux.TYPE_GO_AWAY:
                    break
                else:
                    raise Breach(f"it sent a frame of the unknown kind {kind}")
        except Breach as exc:
            self.breach = str(exc)
            if not isinstance(exc, _TooMuch):  # which was logged where all peers are looked at
                logger.warning(
                    "Ended the connection with %s, which breaks the rules of yamux: %s.",
                    shown(str(self.peer_id)),
                    exc,
                    extra=told,
                )
        except trio.TooSlowError:
            logger.warning(
                "Ended the connection with %s in the middle of a frame: its rest did not come within %g s.",
                shown(str(self.peer_id)),
                BODY_TIMEOUT_S,
                extra=told,
            )
        except (
            yamux.RawConnError,
            yamux.IOException,
            OSError,
            trio.ClosedResourceError,
            trio.BrokenResourceError,
        ) as exc:
            logger.debug("A connection has ended: %r", exc, extra=told)
        except Exception:  # the edge of a service loop: a fault here ends this connection and nothing else
            logger.exception("A connection is ended: what came could not be handled.", extra=told)
        await self._cleanup_on_error()

    async def _data(self, flags: int, stream_id: int, length: int) -> None:
        if flags & yamux.FLAG_SYN:
            if length > yamux.DEFAULT_WINDOW_SIZE:
                raise Breach(f"a new stream began with {length} bytes, past its window")
            await self._opened(flags, stream_id, await self._body(length))
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            # one that was reset here, which the peer may not know yet
            if length > yamux.MAX_WINDOW_SIZE:
                raise Breach(f"a frame has {length} bytes, past any window")
            with trio.fail_after(BODY_TIMEOUT_S):
                for start in range(0, length, _DROP_BYTES):
                    await self._body(min(_DROP_BYTES, length - start))
            return
        if length > stream.recv_window:
            raise Breach(f"a stream sent {length} bytes, past its window of {stream.recv_window}")
        data = await self._body(length)
        stream.recv_window -= length
        # it may have been reset here meanwhile
        buffer = self.stream_buffers.get(stream_id)
        if buffer is not None:
            buffer += data
            self.stream_events[stream_id].set()
            stream.note_end(flags)
        await self._account(length)

    async def _body(self, length: int) -> bytes:
        with trio.fail_after(BODY_TIMEOUT_S):
            body: bytes = await read_exactly(self.secured_conn, length) if length else b""
            return body

    async def _account(self, length: int) -> None:
        """_TooMuch where all peers together have too many bytes waiting, and this one most of them."""
        if (why := await self.budget.received(self, length)) is not None:
            raise _TooMuch(why)

    async def _opened(self, flags: int, stream_id: int, data: bytes) -> MuxedStream | None:
        """The new stream, given to who accepts it; None when it was refused."""
        # whoever dialled has the odd numbers
        if stream_id == 0 or stream_id % 2 == self.is_initiator_value:
            raise Breach(f"it opened stream {stream_id}, a number that is not its own")
        if stream_id in self.streams or self._is_full() or not self.budget.admit(self):
            await self._answer(yamux.TYPE_WINDOW_UPDATE, yamux.FLAG_RST, stream_id)
            return None
        if flags & yamux.FLAG_RST:
            return None
        stream = self._add(MuxedStream(stream_id, self, False), data)
        stream.recv_window -= len(data)
        stream.recv_closed = bool(flags & yamux.FLAG_FIN)
        await self._answer(yamux.TYPE_WINDOW_UPDATE, yamux.FLAG_ACK, stream_id)
        await self.new_stream_send_channel.send(stream)
        await self._account(len(data))
        return stream

    def _is_full(self) -> bool:
        limit: int = self.secured_conn.max_streams
        if len(self.streams) < limit or sum(not one.is_initiator for one in self.streams.values()) < limit:
            return False
        STREAMS_REFUSED.add(service="any")
        if not self._told_full:
            self._told_full = True
            logger.warning(
                "%s has %d open streams on one connection, and is refused more. This is logged once.",
                shown(str(self.peer_id)),
                limit,
                extra={"peer_id": str(self.peer_id)},
            )
        return True

    async def _ping(self, flags: int, value: int) -> None:
        if flags & yamux.FLAG_SYN:
            await self._answer(yamux.TYPE_PING, yamux.FLAG_ACK, 0, value)
        elif flags & yamux.FLAG_ACK:
            took_s = trio.current_time() - self._ping_sent_time
            self._rtt = (self._rtt + took_s) / 2 if self._rtt else took_s
            self._ping_event.set()


def install() -> None:
    """Have the library make a :class:`Muxer`: it takes its own by name. Calling it again changes nothing."""
    muxer_multistream.Yamux = Muxer

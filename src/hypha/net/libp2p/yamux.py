"""Repairs to py-libp2p 0.8.1's yamux, applied once to its classes when a host is made.

As shipped, a writer whose reader pauses for five seconds is killed, a waiting writer polls every 10 ms,
frames are 64 KiB, cancelling ``open_stream`` leaks one of 256 slots, closing a connection whose socket
takes no data waits behind the stuck writer, every read, of a single byte too, is answered with a
frame of window (and with more window than was read, so that the limit grows and grows), and a ping
whose reply is quick is timed from the one before. The muxer is chosen by name inside the library, so a
subclass cannot be passed in: its methods are replaced. Each repair has a regression test; they touch
private names, which is why the library is pinned.

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

import libp2p.stream_muxer.yamux.yamux as yamux
import trio
from libp2p.io.utils import read_exactly

from hypha.naming import shown
from hypha.net.peers.inbound_limits import budget_of
from hypha.telemetry.instruments import STREAMS_REFUSED

logger = logging.getLogger(__name__)

#: Payload of one DATA frame.
FRAME_BYTES = 256 * 1024
#: How long a reader may pause before its writer gives up; a dead *connection* is noticed much earlier.
STALL_S = 600.0
#: How the header of a ping that asks for a reply begins: version, type, flags.
_PING = struct.pack(">BBH", 0, yamux.TYPE_PING, yamux.FLAG_SYN)
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


def _waking(name: str, wakes: Any) -> property:
    """An attribute whose assignment wakes a writer that waits for window or for the end."""

    def get(stream: Any) -> Any:
        return stream.__dict__.get(name, 0)

    def put(stream: Any, value: Any) -> None:
        stream.__dict__[name] = value
        if wakes(value):
            waiting = stream.__dict__.pop("_window_opened", None)
            if waiting is not None:
                waiting.set()

    return property(get, put)


async def _write(stream: Any, data: bytes) -> None:
    """Send ``data`` as the peer's window allows, waiting without polling."""
    view = memoryview(data)
    sent = 0
    while sent < len(view):
        if stream.reset_received:
            raise yamux.MuxedStreamReset("the stream was reset")
        if stream.send_closed or stream.closed:
            raise yamux.MuxedStreamError("the stream is closed for sending")
        if stream.send_window <= 0:
            opened = stream.__dict__.setdefault("_window_opened", trio.Event())
            with trio.move_on_after(STALL_S) as scope:
                await opened.wait()
            if scope.cancelled_caught:
                raise yamux.MuxedStreamError(f"the reader made no progress for {STALL_S:g} s")
            continue
        size = min(stream.send_window, FRAME_BYTES, len(view) - sent)
        stream.send_window -= size
        header = _HEADER.pack(0, yamux.TYPE_DATA, 0, stream.stream_id, size)
        await stream.conn._write_frame(b"".join((header, view[sent : sent + size])))
        sent += size


async def _give_window(stream: Any, *, bytes_read: int = 0) -> None:
    """Once half of the window has been read, tell the writer; before, it has no need to know.

    What is announced and not yet read is at most ``target_recv_window``: a writer that has used all of
    its window has left at least half of it in the reader's buffer or has been told.
    """
    buffered = len(stream.conn.stream_buffers.get(stream.stream_id, b""))
    read = stream.target_recv_window - stream.recv_window - buffered
    if read < stream.target_recv_window // 2 or stream.recv_closed:
        return
    async with stream.window_lock:
        buffered = len(stream.conn.stream_buffers.get(stream.stream_id, b""))
        more = stream._grow_to_delta(buffered)
        if more and may_grow(stream):
            more += stream._apply_autotune_epoch(buffered)
    try:
        await stream.send_window_update(more)
    except trio.Cancelled:
        # only waiting can be cancelled, so nothing was sent; the next read tells it
        stream.recv_window -= more
        raise


async def _write_frame(connection: Any, data: bytes) -> None:
    """Send one frame, without the library's taking it apart again for its log.

    A ping is timed from just before it is sent. The library notes the time after the write, which may be
    after the reply was read: the round trip is then counted from the ping before, or, for the first one,
    from the clock's zero.
    """
    async with connection._write_lock:
        if data[:4] == _PING:
            connection._ping_sent_time = trio.current_time()
        await connection.secured_conn.write(data)


_library_close = yamux.Yamux.close


async def _open_stream(connection: Any) -> Any:
    """Open a stream; the wait for a slot may be cancelled, what follows may not, so no slot leaks."""
    await connection.stream_backlog_semaphore.acquire()
    with trio.CancelScope(shield=True):
        async with connection.streams_lock:
            if connection.event_shutting_down.is_set():
                connection.stream_backlog_semaphore.release()
                raise yamux.MuxedStreamError("the connection is shutting down")
            stream_id = connection.next_stream_id
            connection.next_stream_id += 2
            stream = yamux.YamuxStream(stream_id, connection, True)
            stream._owns_backlog_slot = True
            connection.streams[stream_id] = stream
            connection.stream_buffers[stream_id] = bytearray()
            connection.stream_events[stream_id] = trio.Event()
        header = _HEADER.pack(0, yamux.TYPE_WINDOW_UPDATE, yamux.FLAG_SYN, stream_id, 0)
        try:
            await connection._write_frame(header)
        except (yamux.RawConnError, yamux.ConnectionClosedError, OSError) as exc:
            stream.closed = True
            await connection._finalize_stream(stream, fully_closed=True)
            raise yamux.MuxedStreamError(f"the stream could not be announced: {exc}") from exc
    return stream


async def _close(connection: Any, error_code: int = yamux.GO_AWAY_NORMAL) -> None:
    """The library's ``close``, but a connection that takes no data is cut instead of waited for."""

    async def cut() -> None:
        await trio.sleep(GOODBYE_S)
        abort = getattr(connection.secured_conn, "abort", None)
        if abort is not None:
            await abort()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cut)
        await _library_close(connection, error_code)
        nursery.cancel_scope.cancel()


class Breach(Exception):
    """The peer does what no peer may; the text says what."""


class _TooMuch(Breach):
    """All peers together are over a limit of this node, and most of it is this one's."""


def breach_of(connection: Any) -> str | None:
    """Why a yamux connection was ended here, where its peer had broken the rules."""
    reason: str | None = connection.__dict__.get("_breach")
    return reason


def narrow(stream: Any, window_bytes: int) -> None:
    """The peer may send so much of ``stream`` before it is read, besides what it was promised already."""
    stream.target_recv_window = min(stream.target_recv_window, window_bytes)
    stream.__dict__["_narrow"] = True


def may_grow(stream: Any) -> bool:
    """Whether the window of ``stream`` may be doubled."""
    if stream.__dict__.get("_narrow"):
        return False
    budget = budget_of(stream.conn)
    if budget is not None and budget.is_tight:
        return False
    grown = sum(one.target_recv_window - yamux.DEFAULT_WINDOW_SIZE for one in stream.conn.streams.values())
    more = min(stream.target_recv_window, yamux.MAX_WINDOW_SIZE - stream.target_recv_window)
    return bool(grown + more <= MAX_GROWTH_BYTES)


async def _handle_incoming(connection: Any) -> None:
    """Until the connection ends; then nothing of it is left."""
    budget = budget_of(connection)
    if budget is None:
        await _serve(connection)
        return
    budget.opened(connection)
    try:
        await _serve(connection)
    finally:
        budget.closed(connection)


async def _serve(connection: Any) -> None:
    try:
        while not connection.event_shutting_down.is_set():
            header = await read_exactly(connection.secured_conn, _HEADER.size)
            version, kind, flags, stream_id, length = _HEADER.unpack(header)
            if version != 0:
                raise Breach(f"it speaks version {version} of yamux")
            if kind == yamux.TYPE_DATA:
                await _data(connection, flags, stream_id, length)
            elif kind == yamux.TYPE_WINDOW_UPDATE:
                stream = connection.streams.get(stream_id)
                if flags & yamux.FLAG_SYN:
                    stream = await _opened(connection, flags, stream_id, b"")
                if stream is not None:
                    stream.send_window += length
                    _note_end(connection, stream, flags)
            elif kind == yamux.TYPE_PING:
                await _ping(connection, flags, length)
            elif kind == yamux.TYPE_GO_AWAY:
                break
            else:
                raise Breach(f"it sent a frame of the unknown kind {kind}")
    except _TooMuch as exc:
        connection.__dict__["_breach"] = str(exc)  # it was logged where all peers are looked at
    except Breach as exc:
        connection.__dict__["_breach"] = str(exc)
        logger.warning(
            "Ended the connection with %s, which breaks the rules of yamux: %s.",
            shown(str(connection.peer_id)),
            exc,
            extra={"peer_id": str(connection.peer_id)},
        )
    except trio.TooSlowError:
        logger.warning(
            "Ended the connection with %s in the middle of a frame: its rest did not come within %g s.",
            shown(str(connection.peer_id)),
            BODY_TIMEOUT_S,
            extra={"peer_id": str(connection.peer_id)},
        )
    except (
        yamux.RawConnError,
        yamux.IOException,
        OSError,
        trio.ClosedResourceError,
        trio.BrokenResourceError,
    ) as exc:
        logger.debug("A connection has ended: %r", exc, extra={"peer_id": str(connection.peer_id)})
    except Exception:  # the edge of a service loop: a fault here ends this connection and nothing else
        logger.exception(
            "A connection is ended: what came could not be handled.",
            extra={"peer_id": str(connection.peer_id)},
        )
    await connection._cleanup_on_error()


async def _data(connection: Any, flags: int, stream_id: int, length: int) -> None:
    if flags & yamux.FLAG_SYN:
        if length > yamux.DEFAULT_WINDOW_SIZE:
            raise Breach(f"a new stream began with {length} bytes, past its window")
        await _opened(connection, flags, stream_id, await _body(connection, length))
        return
    stream = connection.streams.get(stream_id)
    if stream is None:
        # one that was reset here, which the peer may not know yet
        if length > yamux.MAX_WINDOW_SIZE:
            raise Breach(f"a frame has {length} bytes, past any window")
        await _drop(connection, length)
        return
    if length > stream.recv_window:
        raise Breach(f"a stream sent {length} bytes, past its window of {stream.recv_window}")
    data = await _body(connection, length)
    stream.recv_window -= length
    # it may have been reset here meanwhile
    buffer = connection.stream_buffers.get(stream_id)
    if buffer is not None:
        buffer += data
        connection.stream_events[stream_id].set()
        _note_end(connection, stream, flags)
    await _account(connection, length)


async def _account(connection: Any, length: int) -> None:
    """_TooMuch where all peers together have too many bytes waiting, and this one most of them."""
    budget = budget_of(connection)
    if budget is not None and (why := await budget.received(connection, length)) is not None:
        raise _TooMuch(why)


async def _body(connection: Any, length: int) -> bytes:
    if not length:
        return b""
    with trio.fail_after(BODY_TIMEOUT_S):
        body: bytes = await read_exactly(connection.secured_conn, length)
        return body


async def _drop(connection: Any, length: int) -> None:
    with trio.fail_after(BODY_TIMEOUT_S):
        while length:
            length -= len(await read_exactly(connection.secured_conn, min(length, _DROP_BYTES)))


async def _opened(connection: Any, flags: int, stream_id: int, data: bytes) -> Any | None:
    """The new stream, given to who accepts it; None when it was refused."""
    # whoever dialled has the odd numbers
    if stream_id == 0 or stream_id % 2 == connection.is_initiator_value:
        raise Breach(f"it opened stream {stream_id}, a number that is not its own")
    budget = budget_of(connection)
    refused = stream_id in connection.streams or _is_full(connection)
    if refused or (budget is not None and not budget.admit(connection)):
        await connection._write_frame(_HEADER.pack(0, yamux.TYPE_WINDOW_UPDATE, yamux.FLAG_RST, stream_id, 0))
        return None
    if flags & yamux.FLAG_RST:
        return None
    stream = yamux.YamuxStream(stream_id, connection, False)
    connection.streams[stream_id] = stream
    connection.stream_buffers[stream_id] = bytearray(data)
    connection.stream_events[stream_id] = trio.Event()
    stream.recv_window -= len(data)
    stream.recv_closed = bool(flags & yamux.FLAG_FIN)
    await connection._write_frame(_HEADER.pack(0, yamux.TYPE_WINDOW_UPDATE, yamux.FLAG_ACK, stream_id, 0))
    await connection.new_stream_send_channel.send(stream)
    await _account(connection, len(data))
    return stream


def _is_full(connection: Any) -> bool:
    limit: int = getattr(connection.secured_conn, "max_streams", MAX_INBOUND_STREAMS)
    if len(connection.streams) < limit:
        return False
    if sum(not one.is_initiator for one in connection.streams.values()) < limit:
        return False
    STREAMS_REFUSED.add(service="any")
    if not connection.__dict__.setdefault("_told_full", False):
        connection.__dict__["_told_full"] = True
        logger.warning(
            "%s has %d open streams on one connection, and is refused more. This is logged once.",
            shown(str(connection.peer_id)),
            limit,
            extra={"peer_id": str(connection.peer_id)},
        )
    return True


def _note_end(connection: Any, stream: Any, flags: int) -> None:
    """What the flags of a frame say of the end of ``stream``."""
    if flags & yamux.FLAG_FIN:
        stream.recv_closed = True
        stream.closed = stream.closed or stream.send_closed
    if flags & yamux.FLAG_RST:
        stream.closed = True
        stream.reset_received = True
        if not stream.recv_closed:
            # nobody may read it any more; after an end it may be read until that
            connection.stream_buffers.get(stream.stream_id, bytearray()).clear()
    if flags & (yamux.FLAG_FIN | yamux.FLAG_RST):
        if (event := connection.stream_events.get(stream.stream_id)) is not None:
            event.set()
        if stream.closed:
            connection._finalize_stream_locked(stream, fully_closed=True)


async def _ping(connection: Any, flags: int, value: int) -> None:
    if flags & yamux.FLAG_SYN:
        await connection._write_frame(_HEADER.pack(0, yamux.TYPE_PING, yamux.FLAG_ACK, 0, value))
    elif flags & yamux.FLAG_ACK:
        took_s = trio.current_time() - connection._ping_sent_time
        connection._rtt = (connection._rtt + took_s) / 2 if connection._rtt else took_s
        connection._ping_event.set()


async def _read(stream: Any, n: int | None = -1) -> bytes:
    """What there is, at most ``n`` bytes; waits while there is nothing. Leaves no event behind, as the
    library's does for each stream that is reset while it is read.
    """
    connection, number = stream.conn, stream.stream_id
    if stream.recv_closed and not connection.stream_buffers.get(number):
        if stream.reset_received:
            raise yamux.MuxedStreamReset("the stream was reset")
        raise yamux.MuxedStreamEOF("the stream is closed for receiving")
    while True:
        buffer = connection.stream_buffers.get(number)
        if buffer is None or connection.event_shutting_down.is_set():
            raise yamux.MuxedStreamEOF("the stream is over")
        if stream.reset_received and not (stream.recv_closed and buffer):
            raise yamux.MuxedStreamReset("the stream was reset")
        if buffer:
            count = len(buffer) if n is None or n < 0 else n
            with memoryview(buffer) as view:
                data = bytes(view[:count])
            del buffer[:count]
            if stream.closed:
                connection._finalize_stream_locked(stream, fully_closed=True)
            await stream._auto_tune_and_send_window_update(bytes_read=len(data))
            return data
        if stream.recv_closed:
            raise yamux.MuxedStreamEOF("the stream is closed for receiving")
        if stream.closed:
            raise yamux.MuxedStreamReset("the stream is closed")
        event = connection.stream_events[number]
        await event.wait()
        if connection.stream_events.get(number) is event:
            connection.stream_events[number] = trio.Event()


_library_reset = yamux.YamuxStream.reset


async def _reset(stream: Any) -> None:
    """The library's ``reset``, after which nothing is read: what waits for that is dropped at once."""
    try:
        await _library_reset(stream)
    finally:
        if stream.closed:
            stream.conn.stream_buffers.get(stream.stream_id, bytearray()).clear()
            stream.conn._finalize_stream_locked(stream, fully_closed=True)


def install() -> None:
    """Replace the methods; calling it again changes nothing."""
    yamux.YamuxStream.send_window = _waking("_send_window", lambda window: window > 0)
    yamux.YamuxStream.closed = _waking("_closed", bool)
    yamux.YamuxStream.send_closed = _waking("_send_closed", bool)
    yamux.YamuxStream.write = _write
    yamux.YamuxStream._auto_tune_and_send_window_update = _give_window
    yamux.Yamux._write_frame = _write_frame
    yamux.Yamux.open_stream = _open_stream
    yamux.Yamux.close = _close
    yamux.Yamux.handle_incoming = _handle_incoming
    yamux.YamuxStream.read = _read
    yamux.YamuxStream.reset = _reset

"""Repairs to py-libp2p 0.8.1's yamux, applied once to its classes when ``hypha.net`` is imported.

As shipped, a writer whose reader pauses for five seconds is killed, a waiting writer polls every 10 ms,
frames are 64 KiB, cancelling ``open_stream`` leaks one of 256 slots, closing a connection whose socket
takes no data waits behind the stuck writer, every read, of a single byte too, is answered with a
frame of window (and with more window than was read, so that the limit grows and grows), and a ping
whose reply is quick is timed from the one before. The muxer is chosen by name inside the library, so a
subclass cannot be passed in: its methods are replaced. Each repair has a regression test; they touch
private names, which is why the library is pinned.
"""

from __future__ import annotations

import struct
from typing import Any

import libp2p.stream_muxer.yamux.yamux as yamux
import trio

from hypha.net.libp2p import yamux_reader

#: Payload of one DATA frame.
FRAME_BYTES = 256 * 1024
#: How long a reader may pause before its writer gives up; a dead *connection* is noticed much earlier.
STALL_S = 600.0
#: How the header of a ping that asks for a reply begins: version, type, flags.
_PING = struct.pack(">BBH", 0, yamux.TYPE_PING, yamux.FLAG_SYN)
#: How long closing a connection waits to send its goodbye.
GOODBYE_S = 0.5


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
        header = struct.pack(yamux.YAMUX_HEADER_FORMAT, 0, yamux.TYPE_DATA, 0, stream.stream_id, size)
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
        if more and yamux_reader.may_grow(stream):
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
        header = struct.pack(
            yamux.YAMUX_HEADER_FORMAT, 0, yamux.TYPE_WINDOW_UPDATE, yamux.FLAG_SYN, stream_id, 0
        )
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
    yamux_reader.install()

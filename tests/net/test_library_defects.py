"""One regression test for each defect of py-libp2p 0.8.1 that is repaired in this room."""

from __future__ import annotations

import struct

import pytest
import trio
from libp2p.peer.id import ID
from libp2p.stream_muxer.yamux.yamux import FLAG_ACK, TYPE_PING
from tests.support.network import Network, address_of, until
from tests.support.proxy import proxy_to
from tests.support.stopwatch import Stopwatch

from hypha.errors import PeerUnreachable, RequestTimeout
from hypha.messages import (
    Acknowledged,
    DispatchJob,
    ExecutorDescriptor,
    Health,
    HealthReport,
    ModelSpec,
    PeerRef,
    TrainJob,
)
from hypha.net import Libp2pNode as Node
from hypha.net.libp2p.streams import STREAM_ERRORS, discard, read_exactly
from hypha.net.libp2p.yamux import Muxer
from hypha.net.peers.addresses import host_and_port
from hypha.net.peers.inbound_limits import InboundBudget

pytestmark = pytest.mark.loopback

MIB = 1 << 20


def ref_of(node: Node) -> PeerRef:
    return PeerRef(peer=node.peer_id, addresses=(address_of(node),))


def circuits_of(node: Node) -> PeerRef:
    """Only its relayed addresses, as if it were behind a NAT."""
    return PeerRef(
        peer=node.peer_id, addresses=tuple(one for one in node.ref().addresses if "p2p-circuit" in one)
    )


async def test_a_reader_that_pauses_does_not_kill_its_writer(network: Network) -> None:
    """As shipped, the writer is killed after five seconds."""
    received = 0
    done = trio.Event()

    async def slow(stream: object, caller: str) -> None:
        nonlocal received
        await trio.sleep(5.5)
        while received < 4 * MIB:
            received += len(await stream.read(MIB))  # type: ignore[attr-defined]
        done.set()
        await discard(stream)

    async with network.leaf("a") as one, network.leaf("b") as two:
        two.set_stream_handler("/test/slow", slow)
        stream = await one.open_stream(ref_of(two), "/test/slow")
        with trio.fail_after(20):
            await stream.write(bytes(4 * MIB))
            await done.wait()
        await discard(stream)


async def test_cancelled_requests_leave_the_connection_whole(network: Network) -> None:
    """As shipped, the connection dies of a half-written frame, and stream entries leak."""

    job = TrainJob(
        job_id="job",
        generation=0,
        executor=ExecutorDescriptor(kind="train", name="diloco-transformer"),
        me="a",
        scheduler=PeerRef(peer="a"),
        parameter_server=PeerRef(peer="b"),
        model=ModelSpec(task="image-classification", arguments={"large": "x" * 50_000}),
        dataset="digits",
        batch_size=4,
    )
    large = DispatchJob(lease_id="lease", job=job)

    async def never(caller: str, request: DispatchJob) -> Acknowledged:
        await trio.sleep_forever()
        raise AssertionError

    async with network.leaf("a") as one, network.leaf("b") as two:
        two.answer(DispatchJob, never)
        await one.request(ref_of(two), Health())
        (connection,) = one._swarm.get_connections(ID.from_string(two.peer_id))
        for number in range(120):
            with trio.move_on_after(0.0002 * (number % 25)):
                await one.request(two.peer_id, large)
        with pytest.raises(RequestTimeout):
            await one.request(two.peer_id, large, timeout_s=0.05)
        # the other side works no more for callers that left; before, it might rightly be busy with them
        await until(lambda: two._rpc._inbound.total() == 0)
        assert isinstance(await one.request(two.peer_id, Health(), timeout_s=5), HealthReport)
        assert one._swarm.get_connections(ID.from_string(two.peer_id)) == [connection]
        assert not connection.is_closed
        # identify and gossip keep a few; every abandoned one is gone
        await until(lambda: len(connection.muxed_conn.streams) < 10)
        await until(lambda: connection.muxed_conn.stream_backlog_semaphore.value > 250)


async def test_a_silent_partition_ends_reads_and_the_connection(network: Network) -> None:
    """As shipped, a blocked read hangs for ever."""
    network.timings = network.timings.model_copy(update={"silence_s": 1.0})

    async with (
        network.leaf("a") as one,
        network.leaf("b") as two,
        proxy_to(*host_and_port(two.listen_addresses()[0])) as proxy,
    ):
        blocked = trio.Event()

        async def silent(stream: object, caller: str) -> None:
            blocked.set()
            await trio.sleep_forever()

        two.set_stream_handler("/test/silent", silent)
        through = PeerRef(peer=two.peer_id, addresses=(f"/ip4/127.0.0.1/tcp/{proxy.port}",))
        stream = await one.open_stream(through, "/test/silent")
        await blocked.wait()
        await trio.sleep(1.5)  # a quiet connection that works is left alone
        assert one.is_connected(two.peer_id)
        async with one.watch_peers() as lost:
            proxy.freeze()
            started = Stopwatch()
            with trio.fail_after(20):
                with pytest.raises(STREAM_ERRORS):
                    await read_exactly(stream, 1)
                assert (await lost.receive()).peer == two.peer_id
            assert started.elapsed_s() < 4


async def test_a_stuck_writer_does_not_hold_up_the_end_of_its_connection(network: Network) -> None:
    """As shipped, closing waits behind the writer."""
    network.timings = network.timings.model_copy(update={"silence_s": 1.0})
    async with (
        network.leaf("a") as one,
        network.leaf("b") as two,
        proxy_to(*host_and_port(two.listen_addresses()[0])) as proxy,
    ):

        async def reader(stream: object, caller: str) -> None:
            while True:
                await stream.read(MIB)  # type: ignore[attr-defined]

        two.set_stream_handler("/test/sink", reader)
        through = PeerRef(peer=two.peer_id, addresses=(f"/ip4/127.0.0.1/tcp/{proxy.port}",))
        stream = await one.open_stream(through, "/test/sink")
        started = trio.current_time()
        while trio.current_time() - started < 0.2:
            await stream.write(bytes(MIB))
        proxy.freeze()
        with pytest.raises(STREAM_ERRORS):
            await stream.write(bytes(64 * MIB))
        started_closing = Stopwatch()
        await until(lambda: not one.is_connected(two.peer_id))
        assert started_closing.elapsed_s() < 4


async def test_two_circuits_to_one_node_do_not_cut_each_other(network: Network) -> None:
    """As shipped, closing the first resets the second."""
    received: dict[str, int] = {}

    async def sink(stream: object, caller: str) -> None:
        while True:
            data = await stream.read(MIB)  # type: ignore[attr-defined]
            received[caller] = received.get(caller, 0) + len(data)

    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway]) as behind_nat,
        network.leaf("a", [gateway]) as first,
        network.leaf("b", [gateway]) as second,
    ):
        behind_nat.set_stream_handler("/test/sink", sink)
        await until(lambda: circuits_of(behind_nat).addresses)
        streams = {}
        for node in (first, second):
            streams[node] = await node.open_stream(circuits_of(behind_nat), "/test/sink")
            await streams[node].write(bytes(MIB))
        assert gateway.hop is not None
        assert gateway.hop.circuits == 2
        await first.disconnect(behind_nat.peer_id)
        await until(lambda: gateway.hop is not None and gateway.hop.circuits == 1)
        for _ in range(8):
            await streams[second].write(bytes(MIB))
        await until(lambda: received.get(second.peer_id) == 9 * MIB)
        assert second.is_connected(behind_nat.peer_id)
        await until(lambda: not behind_nat.is_connected(first.peer_id))


async def test_inbound_slots_come_back_when_connections_end(network: Network) -> None:
    """As shipped, each connection ever accepted keeps a slot until the node ends."""
    async with network.leaf("b", max_connections=4) as two, network.leaf("a") as one:
        for _ in range(12):
            await one.request(ref_of(two), Health())
            await one.disconnect(two.peer_id)
            await until(lambda: not two.is_connected(one.peer_id))
        assert isinstance(await one.request(ref_of(two), Health()), HealthReport)


async def test_dialling_a_peer_that_was_down_is_not_blocked_for_a_minute(network: Network) -> None:
    """As shipped, a failed dial puts the peer on a list for 60 seconds."""
    identity = network.pki.identity("late")
    async with network.leaf("a") as one:
        async with network.leaf("late", identity=identity) as late:
            ref = ref_of(late)
        with pytest.raises(PeerUnreachable):
            await one.request(ref, Health())
        port = host_and_port(ref.addresses[0])[1]
        async with network.leaf("late", identity=identity, listen=(f"/ip4/127.0.0.1/tcp/{port}",)):
            assert isinstance(await one.request(ref, Health()), HealthReport)


async def test_small_reads_are_not_answered_with_a_frame_each(network: Network) -> None:
    """As shipped, each read of a byte sends a frame of window, and gives more window than was read."""
    frames: list[int] = []

    async def serve(stream: object, caller: str) -> None:
        secured = stream.muxed_conn.secured_conn  # type: ignore[attr-defined]
        write = secured.write

        async def count(data: bytes) -> None:
            # version, type 1 (window update), flags, stream
            if data[:2] == b"\x00\x01" and int.from_bytes(data[4:8], "big") == number:
                frames.append(int.from_bytes(data[8:12], "big"))
            await write(data)

        muxed = stream.muxed_stream  # type: ignore[attr-defined]
        number = muxed.stream_id
        secured.write = count
        for _ in range(1000):
            await read_exactly(stream, 1)
        assert not frames
        left = 8 * MIB - 1000
        while left:
            left -= len(await stream.read(64 << 10))  # type: ignore[attr-defined]
            buffered = len(muxed.conn.stream_buffers.get(muxed.stream_id, b""))
            assert muxed.recv_window + buffered <= muxed.target_recv_window
        await stream.write(b"!")  # type: ignore[attr-defined]

    async with network.leaf("a") as one, network.leaf("b") as two:
        two.set_stream_handler("/test/bytes", serve)
        stream = await one.open_stream(ref_of(two), "/test/bytes")
        with trio.fail_after(30):
            await stream.write(bytes(8 * MIB))
            assert await read_exactly(stream, 1) == b"!"
        await discard(stream)
    # each tells of half a window at least, and nothing is given twice: 8 MiB come in 256 KiB at first
    assert 0 < len(frames) <= 64


async def test_a_read_cancelled_while_it_gives_window_loses_none(network: Network) -> None:
    """What a cancelled read could not announce is announced by the next one, or the writer waits for ever."""
    total = 2 * MIB
    cancelled = []

    async def hold(lock: trio.Lock, task_status: trio.TaskStatus[None]) -> None:
        async with lock:
            task_status.started()
            await trio.sleep_forever()

    async def serve(stream: object, caller: str) -> None:
        muxed = stream.muxed_stream  # type: ignore[attr-defined]
        # all of the first window is here (some of it was the negotiation), so the writer waits for more
        await until(lambda: len(muxed.conn.stream_buffers[muxed.stream_id]) >= 255 << 10)
        async with trio.open_nursery() as nursery:
            await nursery.start(hold, muxed.conn._write_lock)
            with trio.move_on_after(0.05) as scope:
                await stream.read(192 << 10)  # type: ignore[attr-defined]
            nursery.cancel_scope.cancel()
        cancelled.append(scope.cancelled_caught)
        await read_exactly(stream, total - (192 << 10))
        await stream.write(b"!")  # type: ignore[attr-defined]

    async with network.leaf("a") as one, network.leaf("b") as two:
        two.set_stream_handler("/test/cancelled", serve)
        stream = await one.open_stream(ref_of(two), "/test/cancelled")
        with trio.fail_after(20):
            await stream.write(bytes(total))
            assert await read_exactly(stream, 1) == b"!"
        await discard(stream)
    assert cancelled == [True]


class Echo:
    """A connection whose far end has answered a ping before the write of it returns, as a fast one may."""

    is_initiator = True
    pending_bytes = 0

    def __init__(self) -> None:
        self._replies, self._arriving = trio.open_memory_channel[bytes](8)
        self._unread = b""
        self.budget = InboundBudget()
        self.muxed: Muxer | None = None

    async def write(self, data: bytes) -> None:
        if data[1] == TYPE_PING and self.muxed is not None:
            replied = self.muxed._ping_event
            await self._replies.send(data[:2] + struct.pack(">H", FLAG_ACK) + data[4:])
            await replied.wait()

    async def read(self, n: int | None = None) -> bytes:
        self._unread = self._unread or await self._arriving.receive()
        found, self._unread = self._unread[:n], self._unread[n:] if n else b""
        return found

    async def close(self) -> None:
        self._replies.close()

    abort = close


async def test_a_ping_whose_reply_is_quick_is_timed_from_its_own_beginning() -> None:
    """As shipped, it is counted from the zero of trio's clock: a round trip of days."""
    echo = Echo()
    echo.muxed = muxed = Muxer(echo, ID(b"peer"), is_initiator=True)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(muxed.start)
        with trio.fail_after(5):
            await until(lambda: muxed.rtt() > 0)
        assert muxed.rtt() < 5
        nursery.cancel_scope.cancel()

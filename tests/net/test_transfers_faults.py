"""The bulk plane when things break: cuts, damage, silence, full disks, and people who change their mind."""

from __future__ import annotations

import os
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import trio
from tests.net.bulk_proxy import BulkProxy, Trouble, bulk_proxy
from tests.support.network import Network, until
from tests.support.stopwatch import Stopwatch

from hypha.errors import Refused, TransferFailed
from hypha.messages import Health, PeerRef, PullFile, TransferMeta
from hypha.net import Libp2pNode as Node
from hypha.net.bulk import sockets
from hypha.net.bulk.transfers import meta_of
from hypha.net.peers.addresses import host_and_port

pytestmark = pytest.mark.loopback

MB = 1 << 20


@dataclass
class Ends:
    """Two nodes; ``near`` knows ``far`` only behind the proxy."""

    near: Node
    far: Node
    proxy: BulkProxy


@asynccontextmanager
async def through_proxy(network: Network) -> AsyncIterator[Ends]:
    async with network.gateway(roles=()) as far:
        async with bulk_proxy(host_and_port(far.listen_addresses()[0])) as proxy:
            async with network.leaf("worker", [f"{proxy.address}/p2p/{far.peer_id}"]) as near:
                assert (await near.bulk_targets(far.peer_id, ()))[0] == ("127.0.0.1", proxy.port)
                yield Ends(near, far, proxy)


class Inbox:
    """Takes everything into a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.arrived: list[str] = []

    async def gate(self, caller: str, meta: TransferMeta) -> Path:
        return self.directory / meta.name

    async def take(self, caller: str, meta: TransferMeta, path: Path) -> None:
        self.arrived.append(meta.name)

    def names(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()} if self.directory.exists() else set()


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    return Inbox(tmp_path / "inbox")


def write(path: Path, size: int) -> Path:
    path.write_bytes(os.urandom(size))
    return path


async def test_a_cut_transfer_goes_on_where_it_was_cut(
    network: Network, tmp_path: Path, inbox: Inbox
) -> None:
    source = write(tmp_path / "source", 20 * MB)
    async with through_proxy(network) as ends:
        ends.far.transfers.accept("update", None, inbox.gate, inbox.take)
        # more often than attempts are allowed without progress: each of these makes some
        ends.proxy.trouble = Trouble(cut_after=4 * MB, times=4)
        await ends.near.transfers.send(ends.far.peer_id, source, await meta_of(source, "update", "x"))
        assert (inbox.directory / "x").read_bytes() == source.read_bytes()
        assert ends.far.transfers.tally.received == 20 * MB
        assert len(ends.proxy.passed) == 5
        # TLS and frames cost little; nothing was sent twice but the block that was under way at a cut
        assert sum(ends.proxy.passed) < 20 * MB * 1.005 + 4 * sockets.BLOCK_BYTES
    assert inbox.arrived == ["x"]
    assert inbox.names() == {"x"}


async def test_a_line_that_never_holds_for_long_brings_something_each_time(
    network: Network, tmp_path: Path, inbox: Inbox
) -> None:
    source = write(tmp_path / "source", MB)
    async with through_proxy(network) as ends:
        ends.far.transfers.accept("update", None, inbox.gate, inbox.take)
        ends.proxy.trouble = Trouble(cut_after=150_000, times=100)
        await ends.near.transfers.send(ends.far.peer_id, source, await meta_of(source, "update", "x"))
    assert (inbox.directory / "x").read_bytes() == source.read_bytes()


async def test_nobody_on_the_way_sees_what_is_in_a_file(
    network: Network, tmp_path: Path, inbox: Inbox
) -> None:
    secret = b"a secret that is told over and over again. "
    source = tmp_path / "source"
    source.write_bytes(secret * 50_000)
    async with through_proxy(network) as ends:
        ends.far.transfers.accept("update", None, inbox.gate, inbox.take)
        ends.proxy.recorded = recorded = bytearray()
        await ends.near.transfers.send(ends.far.peer_id, source, await meta_of(source, "update", "x"))
    assert (inbox.directory / "x").read_bytes() == source.read_bytes()
    assert len(recorded) > len(secret) * 50_000
    assert secret not in recorded
    # sealed bytes look like noise: no byte value is much more frequent than any other
    most = max(recorded.count(value) for value in range(256))
    assert most < 1.1 * len(recorded) / 256


async def test_a_flipped_bit_never_arrives(network: Network, tmp_path: Path, inbox: Inbox) -> None:
    source = write(tmp_path / "source", 5 * MB)
    async with through_proxy(network) as ends:
        ends.far.transfers.accept("update", None, inbox.gate, inbox.take)
        ends.proxy.trouble = Trouble(flip_at=3 * MB)
        await ends.near.transfers.send(ends.far.peer_id, source, await meta_of(source, "update", "x"))
        assert len(ends.proxy.passed) == 2
    assert (inbox.directory / "x").read_bytes() == source.read_bytes()


async def test_a_lost_acknowledgement_is_asked_for_and_not_taken_twice(
    network: Network, tmp_path: Path, inbox: Inbox
) -> None:
    source = write(tmp_path / "source", 2 * MB)
    async with through_proxy(network) as ends:
        ends.far.transfers.accept("update", None, inbox.gate, inbox.take)
        ends.proxy.trouble = Trouble(mute_after=MB)
        await ends.near.transfers.send(ends.far.peer_id, source, await meta_of(source, "update", "x"))
        first, again = ends.proxy.passed
        assert again < 10_000 < first
    assert inbox.arrived == ["x"]


async def test_a_silent_cut_is_noticed(
    network: Network, tmp_path: Path, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "STALL_TIMEOUT_S", 1.0)
    source = write(tmp_path / "source", 30 * MB)
    async with through_proxy(network) as ends:
        ends.far.transfers.accept("update", None, inbox.gate, inbox.take)
        ends.proxy.trouble = Trouble(freeze_after=2 * MB)
        await ends.near.transfers.send(ends.far.peer_id, source, await meta_of(source, "update", "x"))
        assert ends.far.transfers.tally.received == 30 * MB
    assert (inbox.directory / "x").read_bytes() == source.read_bytes()


async def test_a_cut_pull_is_resumed_by_the_next_one(network: Network, tmp_path: Path) -> None:
    source = write(tmp_path / "source", 10 * MB)
    destination = tmp_path / "got"
    part = destination.with_name("got.part")
    served = await meta_of(source, "slice", "set/0")

    async def provide(caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        return source, served

    async with through_proxy(network) as ends:
        provider, worker = ends.near, ends.far
        provider.transfers.serve("slice", provide)
        request = PullFile(kind="slice", name="set/0")
        ends.proxy.trouble = Trouble(rate=8 * MB)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                pull = worker.transfers.pull
                nursery.start_soon(pull, provider.peer_id, request, destination, served, 1 << 30)
                await until(lambda: part.exists() and part.stat().st_size >= 2 * MB)
                scope.cancel()
        assert not destination.exists()
        kept = part.stat().st_size
        assert 2 * MB <= kept == worker.transfers.tally.received < 5 * MB
        await worker.transfers.pull(provider.peer_id, request, destination, served, 1 << 30)
        assert worker.transfers.tally.received == 10 * MB
        # both came through the proxy
        assert len(ends.proxy.passed) == 2
    assert destination.read_bytes() == source.read_bytes()
    assert not part.exists()


def bulk_sockets_open(proxy: BulkProxy) -> int:
    """Connections of this process, the proxy's own included, that have to do with the proxy."""
    return sum(
        proxy.port in {one.laddr.port, one.raddr.port if one.raddr else None}
        for one in psutil.Process().net_connections(kind="tcp")
        if one.status == psutil.CONN_ESTABLISHED
    )


async def test_cancelling_leaves_no_connection_and_no_thread(
    network: Network, tmp_path: Path, inbox: Inbox
) -> None:
    source = write(tmp_path / "source", 20 * MB)
    meta = await meta_of(source, "update", "x")
    async with through_proxy(network) as ends:
        ends.far.transfers.accept("update", None, inbox.gate, inbox.take)
        before = bulk_sockets_open(ends.proxy)
        ends.proxy.trouble = Trouble(rate=4 * MB)
        part = inbox.directory / "x.part"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ends.near.transfers.send, ends.far.peer_id, source, meta)
            await until(lambda: part.exists() and part.stat().st_size >= MB)
            started = Stopwatch()
            nursery.cancel_scope.cancel()
        # the thread was blocked in a send; it ended, or leaving the nursery would still wait for it
        assert started.elapsed_s() < 2
        await until(lambda: bulk_sockets_open(ends.proxy) == before)
        # the connection that requests run on is unharmed, and the next attempt goes on
        await ends.near.request(ends.far.peer_id, Health())
        await ends.near.transfers.send(ends.far.peer_id, source, meta)
        assert ends.far.transfers.tally.received < 21 * MB
    assert inbox.arrived == ["x"]


async def test_whoever_stops_accepting_cuts_what_is_on_its_way(
    network: Network, tmp_path: Path, inbox: Inbox
) -> None:
    source = write(tmp_path / "source", 20 * MB)
    async with through_proxy(network) as ends:
        stop = ends.far.transfers.accept("update", None, inbox.gate, inbox.take)
        ends.proxy.trouble = Trouble(rate=4 * MB)
        part = inbox.directory / "x.part"
        meta = await meta_of(source, "update", "x")
        errors: list[Exception] = []

        async def send() -> None:
            try:
                await ends.near.transfers.send(ends.far.peer_id, source, meta)
            except Refused as exc:
                errors.append(exc)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await until(lambda: part.exists() and part.stat().st_size >= MB)
            stop()
    assert len(errors) == 1
    assert inbox.arrived == []


async def test_a_node_that_closes_cuts_its_transfers(network: Network, tmp_path: Path, inbox: Inbox) -> None:
    source = write(tmp_path / "source", 20 * MB)
    meta = await meta_of(source, "update", "x")
    failed: list[Exception] = []
    async with trio.open_nursery() as nursery:
        async with network.gateway(roles=()) as far:
            async with bulk_proxy(host_and_port(far.listen_addresses()[0])) as proxy:
                async with network.leaf("worker", [f"{proxy.address}/p2p/{far.peer_id}"]) as near:
                    far.transfers.accept("update", None, inbox.gate, inbox.take)
                    proxy.trouble = Trouble(rate=4 * MB)

                    async def send() -> None:
                        with suppress(trio.Cancelled):
                            try:
                                await near.transfers.send(far.peer_id, source, meta)
                            except (TransferFailed, Refused) as exc:
                                failed.append(exc)

                    nursery.start_soon(send)
                    part = inbox.directory / "x.part"
                    await until(lambda: part.exists() and part.stat().st_size >= MB)
                    started = Stopwatch()
        assert started.elapsed_s() < 5
        nursery.cancel_scope.cancel()
    assert inbox.arrived == []
    assert inbox.names() == {"x.part"}


@contextmanager
def files_no_larger_than(limit: int) -> Iterator[None]:
    """Writing beyond fails in this process, as on a full disk (Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_is_told_to_both_ends_and_leaves_nothing(
    network: Network, tmp_path: Path, inbox: Inbox
) -> None:
    source = write(tmp_path / "source", 8 * MB)
    meta = await meta_of(source, "update", "x")
    async with through_proxy(network) as ends:
        ends.far.transfers.accept("update", None, inbox.gate, inbox.take)
        with files_no_larger_than(3 * MB):
            with pytest.raises(Refused, match="cannot be written") as refused:
                await ends.near.transfers.send(ends.far.peer_id, source, meta)
        assert refused.value.code == "no-space"
        assert inbox.names() == set()

        async def provide(caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
            return source, meta

        ends.far.transfers.serve("update", provide)
        destination = tmp_path / "pulled"
        request = PullFile(kind="update", name="x")
        with files_no_larger_than(3 * MB):
            with pytest.raises(TransferFailed, match="cannot be written"):
                await ends.near.transfers.pull(ends.far.peer_id, request, destination, meta, 1 << 30)
        assert not destination.exists()
        assert not destination.with_name("pulled.part").exists()
        # and there is room again
        await ends.near.transfers.send(ends.far.peer_id, source, meta)
    assert inbox.names() == {"x"}


async def test_a_pull_is_given_up_when_nothing_comes_and_not_when_it_is_slow(
    network: Network, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", 4 * MB)
    destination = tmp_path / "got"
    async with network.gateway(roles=()) as provider:
        served = await meta_of(source, "slice", "set/0")
        silent = True

        async def provide(caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
            if silent:
                await trio.sleep_forever()
            return source, served

        provider.transfers.serve("slice", provide)
        request = PullFile(kind="slice", name="set/0")
        async with network.leaf("worker", [provider]) as worker:
            async with bulk_proxy(host_and_port(worker.listen_addresses()[0])) as proxy:
                provider.learn(PeerRef(peer=worker.peer_id, addresses=(proxy.address,)))
                pull = worker.transfers.pull
                began = Stopwatch()
                with trio.fail_after(20), pytest.raises(TransferFailed, match="nothing came for"):
                    await pull(provider.peer_id, request, destination, None, 1 << 30, 0.8)
                # well before the request itself would
                assert began.elapsed_s() < 8
                silent = False
                # longer in all, but never without a byte for so long
                proxy.trouble = Trouble(rate=MB, times=9)
                await pull(provider.peer_id, request, destination, None, 1 << 30, 3.0)
    assert destination.read_bytes() == source.read_bytes()


async def test_a_provider_that_dies_fails_the_pull(network: Network, tmp_path: Path) -> None:
    source = write(tmp_path / "source", 20 * MB)
    async with network.gateway(roles=()) as worker:
        leave = trio.Event()
        ready: list[Node] = []

        async def provider() -> None:
            async with network.leaf("data", [worker]) as node:
                served = await meta_of(source, "slice", "set/0")

                async def provide(caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
                    return source, served

                node.transfers.serve("slice", provide)
                ready.append(node)
                await leave.wait()

        async with bulk_proxy(host_and_port(worker.listen_addresses()[0])) as proxy:
            proxy.trouble = Trouble(rate=4 * MB, times=9)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(provider)
                await until(lambda: bool(ready))
                ready[0].learn(PeerRef(peer=worker.peer_id, addresses=(proxy.address,)))
                destination = tmp_path / "got"
                part = destination.with_name("got.part")

                async def end_provider() -> None:
                    await until(part.exists)
                    leave.set()

                nursery.start_soon(end_provider)
                with trio.fail_after(60), pytest.raises(TransferFailed):
                    await worker.transfers.pull(
                        ready[0].ref(), PullFile(kind="slice", name="set/0"), destination, None, 1 << 30
                    )
        assert not destination.exists()

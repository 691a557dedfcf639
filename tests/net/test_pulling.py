"""Files that are asked for: over which connection, by which way, and what becomes of what cannot be had."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.net.bulk_proxy import BulkProxy, Trouble, bulk_proxy
from tests.support.network import Network, until

from hypha.errors import Refused, TransferCorrupt, TransferFailed
from hypha.messages import BulkDial, PeerRef, PullFile, TransferMeta
from hypha.net import Libp2pNode as Node
from hypha.net.bulk import connections, kept_connections, rendezvous
from hypha.net.bulk.blocks import new_key
from hypha.net.bulk.signals import note_link
from hypha.net.bulk.transfers import meta_of
from hypha.net.bulk.wire import ConnectionBroken, FileFound, Go, WantFile, Working
from hypha.net.peers.addresses import host_and_port

pytestmark = pytest.mark.loopback

HIDDEN = ("127.0.0.0/8",)
NAME = "set/0"


class Provided:
    """A slice that ``node`` serves; ``ways`` tells by which way each of its files went, and over what."""

    def __init__(self, path: Path, node: Node, meta: TransferMeta) -> None:
        self.path, self.meta, self.node = path, meta, node
        self.refusals: list[Exception] = []
        self.ended: list[Exception | None] = []
        self.asked = 0
        node.transfers.serve("slice", self.provide, self.served)

    async def provide(self, caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        self.asked += 1
        if self.refusals:
            raise self.refusals.pop(0)
        return self.path, self.meta

    def served(self, caller: str, request: PullFile, error: Exception | None) -> None:
        self.ended.append(error)

    async def pull(self, worker: Node, to: Path, still_s: float | None = None) -> None:
        """Pull it, and see that it arrives as it is."""
        request = PullFile(kind="slice", name=NAME)
        got = await worker.transfers.pull(self.node.ref(), request, to, self.meta, 1 << 30, still_s)
        assert got == self.meta
        assert to.read_bytes() == self.path.read_bytes()


async def provided(node: Node, directory: Path, size: int = 300_000) -> Provided:
    path = directory / "source"
    path.write_bytes(os.urandom(size))
    return Provided(path, node, await meta_of(path, "slice", NAME))


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Requests of the bulk plane that were answered, by their type."""
    found: Counter[str] = Counter()
    real = Node.request

    async def request(self: Node, peer: Any, request: Any, timeout_s: float = 10.0) -> Any:
        if isinstance(request, BulkDial):
            found[type(request).__name__] += 1
        return await real(self, peer, request, timeout_s)

    monkeypatch.setattr(Node, "request", request)
    return found


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Over which connections files came, and whether they were kept ones."""
    found: list[tuple[str, bool]] = []

    def note(link: Any, offset: int | None = None) -> None:
        if offset is None:
            found.append((link.way, link.was_kept))
        note_link(link, offset)

    for module in ("pulling", "receiving"):
        monkeypatch.setattr(f"hypha.net.bulk.{module}.note_link", note)
    return found


@asynccontextmanager
async def behind_proxy(network: Network, worker: dict[str, Any] | None = None) -> AsyncIterator[Any]:
    """A worker, a data node, and the proxy through which alone the worker reaches that one."""
    async with network.gateway(roles=()) as data:
        async with bulk_proxy(host_and_port(data.listen_addresses()[0])) as proxy:
            gateway = f"{proxy.address}/p2p/{data.peer_id}"
            async with network.leaf("worker", [gateway], **(worker or {})) as node:
                yield node, data, proxy


async def test_whoever_wants_a_file_dials_and_asks_over_that_connection(
    network: Network, tmp_path: Path, requests: Counter[str], ways: list[tuple[str, bool]]
) -> None:
    async with network.gateway(roles=()) as data, network.leaf("worker", [data]) as worker:
        slice_ = await provided(data, tmp_path)
        for number in range(3):
            await slice_.pull(worker, tmp_path / f"{number}")
        await until(lambda: slice_.ended == [None] * 3)
        assert (data.transfers.under_way, worker.transfers.under_way) == (
            {"inbound": 0, "outbound": 0},
            {"inbound": 0, "outbound": 0},
        )
    assert requests == {}
    assert ways == [("direct", False), ("direct", True), ("direct", True)]


async def test_a_provider_that_cannot_be_dialled_dials_and_is_asked_over_that_connection_next(
    network: Network, tmp_path: Path, requests: Counter[str], ways: list[tuple[str, bool]]
) -> None:
    async with (
        network.gateway(roles=()) as worker,
        network.leaf("data", [worker], exclude_cidr=HIDDEN, reserve=False) as data,
    ):
        slice_ = await provided(data, tmp_path)
        # it dials nobody for it, so whoever is asked to has to
        worker.learn(PeerRef(peer=data.peer_id, addresses=()))
        for number in range(3):
            await slice_.pull(worker, tmp_path / f"{number}")
        await until(lambda: slice_.ended == [None] * 3)
    assert requests == {"BulkDial": 1}
    assert ways == [("dial-back", False), ("dial-back", True), ("dial-back", True)]


async def test_where_neither_can_dial_a_stream_through_the_relay_carries_it(
    network: Network, tmp_path: Path, requests: Counter[str], ways: list[tuple[str, bool]]
) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("data", [gateway], exclude_cidr=HIDDEN) as data,
        network.leaf("worker", [gateway], exclude_cidr=HIDDEN) as worker,
    ):
        await until(lambda: any("p2p-circuit" in one for one in data.ref().addresses))
        slice_ = await provided(data, tmp_path)
        for number in range(3):
            await slice_.pull(worker, tmp_path / f"{number}")
        await until(lambda: slice_.ended == [None] * 3)
    # the way that worked is the first one from then on
    assert requests == {"BulkDial": 1}
    assert ways == [("stream", False)] * 3


async def test_a_refusal_leaves_the_connection_for_the_next_one(
    network: Network, tmp_path: Path, ways: list[tuple[str, bool]]
) -> None:
    async with behind_proxy(network) as (worker, data, proxy):
        slice_ = await provided(data, tmp_path)
        slice_.refusals = [Refused("not-allowed", "not for you"), RuntimeError("it is broken itself")]
        with pytest.raises(Refused, match="not for you") as refused:
            await slice_.pull(worker, tmp_path / "0")
        assert (refused.value.code, refused.value.peer) == ("not-allowed", data.peer_id)
        with pytest.raises(Refused, match="its log says more") as refused:
            await slice_.pull(worker, tmp_path / "1")
        assert refused.value.code == "internal"
        await slice_.pull(worker, tmp_path / "2")
        assert len(proxy.passed) == 1
        request = PullFile(kind="model", name="m")
        with pytest.raises(Refused, match="no files of kind 'model'"):
            await worker.transfers.pull(data.peer_id, request, tmp_path / "m", None, 1 << 30)
    assert ways == [("direct", True)]


async def test_who_is_busy_is_asked_again_and_costs_no_place(network: Network, tmp_path: Path) -> None:
    async with behind_proxy(network) as (worker, data, _):
        slice_ = await provided(data, tmp_path)
        slice_.refusals = [Refused("busy", "not yet")] * 3
        places = worker.transfers._receiving.places
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slice_.pull, worker, tmp_path / "0")
            await until(lambda: slice_.asked == 3)
            await until(lambda: places.held == 0)
            assert not (tmp_path / "0").exists()
        assert slice_.asked == 4


async def test_too_many_are_told_that_it_is_busy(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "MAX_ANSWERED_PER_PEER", 0)
    monkeypatch.setattr("hypha.net.bulk.turns.BUSY_FOR_S", 0.3)
    async with behind_proxy(network) as (worker, data, _):
        slice_ = await provided(data, tmp_path)
        with pytest.raises(Refused, match="too many files") as refused:
            await slice_.pull(worker, tmp_path / "0")
        assert (refused.value.code, slice_.asked) == ("busy", 0)


async def test_a_puller_hears_that_others_are_served_first(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "FIRST_WORD_S", 1.0)
    monkeypatch.setattr(connections, "WORKING_INTERVAL_S", 0.3)
    async with behind_proxy(network) as (worker, data, proxy):
        slice_ = await provided(data, tmp_path)
        places = data.transfers._sending.places
        async with trio.open_nursery() as nursery:
            # all places are taken by others, who move
            async with places.hold(trio.current_time), places.hold(trio.current_time):
                nursery.start_soon(slice_.pull, worker, tmp_path / "0")
                await until(lambda: slice_.asked == 1)
                # nothing of the file has come, whatever else was sent
                with pytest.raises(TransferFailed, match="nothing came for"):
                    await slice_.pull(worker, tmp_path / "1", still_s=2.5)
                assert not (tmp_path / "0").exists()
        assert (tmp_path / "0").exists()
        assert len(proxy.passed) == 2


async def test_a_cut_is_gone_on_with_from_where_it_was(network: Network, tmp_path: Path) -> None:
    size = 40 << 20
    async with cut_after(network, 20 << 20) as (worker, data):
        slice_ = await provided(data, tmp_path, size)
        await slice_.pull(worker, tmp_path / "0")
        assert size <= data.transfers.tally.sent < 1.5 * size
        assert worker.transfers.tally.received == size
        await until(lambda: len(slice_.ended) == 2)
        assert isinstance(slice_.ended[0], TransferFailed)
        assert slice_.ended[1] is None


@asynccontextmanager
async def cut_after(network: Network, count: int) -> AsyncIterator[Any]:
    """As :func:`behind_proxy`, with the data node dialling through it: what goes that way is cut once."""
    async with network.gateway(roles=()) as data:
        async with _backwards(host_and_port(data.listen_addresses()[0]), count) as proxy:
            async with network.leaf("worker", [f"{proxy.address}/p2p/{data.peer_id}"]) as worker:
                yield worker, data


class _BackwardsProxy(BulkProxy):
    """Cuts the first bulk connection when so many bytes have come back over it."""

    left = 0

    async def _back(self, near: Any, far: Any, trouble: Any, index: int, connection: Any) -> None:
        if index != 0:
            return await super()._back(near, far, trouble, index, connection)
        while self.left > 0 and (data := await far.receive_some(65536)):
            self.left -= len(data)
            await near.send_all(data)
        connection.cancel()


@asynccontextmanager
async def _backwards(target: tuple[str, int], count: int) -> AsyncIterator[BulkProxy]:
    proxy = _BackwardsProxy(target)
    proxy.left = count
    async with trio.open_nursery() as nursery:
        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        proxy.port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, proxy.serve, [listener])
        yield proxy
        nursery.cancel_scope.cancel()


async def test_what_lies_there_and_is_of_another_file_is_fetched_anew(
    network: Network, tmp_path: Path
) -> None:
    async with behind_proxy(network) as (worker, data, _):
        slice_ = await provided(data, tmp_path, 500_000)
        (tmp_path / "0.part").write_bytes(b"of an earlier process" * 1000)
        await slice_.pull(worker, tmp_path / "0")
        assert not (tmp_path / "0.part").exists()
        # one whose provider lies is not tried again
        slice_.path.write_bytes(os.urandom(500_000))
        with pytest.raises(TransferCorrupt):
            await slice_.pull(worker, tmp_path / "1")
        assert not (tmp_path / "1.part").exists()


async def test_a_file_that_is_not_there_any_more_fails_the_pull(network: Network, tmp_path: Path) -> None:
    async with behind_proxy(network) as (worker, data, proxy):
        slice_ = await provided(data, tmp_path)
        await slice_.pull(worker, tmp_path / "0")
        slice_.path.write_bytes(b"shorter")
        with pytest.raises(TransferFailed, match="7 bytes, 300000 were promised"):
            await slice_.pull(worker, tmp_path / "1")
        await until(lambda: len(slice_.ended) == 2)
        assert isinstance(slice_.ended[1], TransferFailed)
        assert len(proxy.passed) == 1


async def test_a_kept_connection_that_went_dead_costs_a_pause_and_no_file(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "FIRST_WORD_S", 1.0)
    async with behind_proxy(network) as (worker, data, proxy):
        slice_ = await provided(data, tmp_path)
        proxy.trouble = trouble = Trouble()
        await slice_.pull(worker, tmp_path / "0")
        trouble.freeze_after = 0
        with trio.fail_after(20):
            await slice_.pull(worker, tmp_path / "1")
        assert len(proxy.passed) == 2


async def test_a_stranger_to_the_node_is_refused_whatever_its_certificate(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Roles are learnt when nodes connect, which is where those without any are turned away."""
    async with network.gateway(roles=()) as data, network.leaf("worker", [data]) as worker:
        slice_ = await provided(data, tmp_path)
        monkeypatch.setattr(data._peers, "_vouched_of", worker._peers._vouched_of)
        with pytest.raises(Refused, match="is not known") as refused:
            await slice_.pull(worker, tmp_path / "0")
        assert (refused.value.code, slice_.asked) == ("role", 0)


async def test_a_cancelled_pull_leaves_nothing_open(network: Network, tmp_path: Path) -> None:
    async with behind_proxy(network) as (worker, data, _):
        slice_ = await provided(data, tmp_path, 20 << 20)
        part = tmp_path / "0.part"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slice_.pull, worker, tmp_path / "0")
            await until(lambda: part.exists() and part.stat().st_size > 0)
            nursery.cancel_scope.cancel()
        assert worker.transfers.under_way["inbound"] == 0
        await until(lambda: data.transfers.under_way["outbound"] == 0)
        await slice_.pull(worker, tmp_path / "0")


async def test_of_both_ends_that_keep_a_connection_one_speaks(network: Network, tmp_path: Path) -> None:
    async with network.gateway(roles=()) as data, network.leaf("worker", [data]) as worker:
        slice_ = await provided(data, tmp_path)
        await slice_.pull(worker, tmp_path / "0")
        await until(lambda: len(data.transfers._kept._kept) == len(worker.transfers._kept._kept) == 1)
        ours, theirs = worker.transfers._kept, data.transfers._kept
        assert (ours._kept[0].link.speaks, theirs._kept[0].link.speaks) == (True, False)
        assert theirs.take(worker.peer_id) is None

        # what was pulled over may carry what is pushed, and the other way round
        arrived = tmp_path / "arrived"

        async def gate(caller: str, meta: TransferMeta) -> Path:
            return arrived

        async def take(caller: str, meta: TransferMeta, path: Path) -> None: ...

        data.transfers.accept("update", None, gate, take)
        update = await meta_of(slice_.path, "update", "u")
        await worker.transfers.send(data.peer_id, slice_.path, update)
        await slice_.pull(worker, tmp_path / "1")
        assert [one.link.speaks for one in ours._kept] == [True]


@pytest.mark.parametrize("first", [Working(), FileFound(TransferMeta(kind="slice", name="x", size=1)), Go(0)])
async def test_what_was_not_asked_ends_the_connection(network: Network, tmp_path: Path, first: Any) -> None:
    async with network.gateway(roles=()) as data, network.leaf("worker", [data]) as worker:
        slice_ = await provided(data, tmp_path)
        for way in ("direct", "stream"):
            link = await worker.transfers._rendezvous._open(data.peer_id, way)
            with pytest.raises(ConnectionBroken):
                await link.ask(first)
            await link.close()
        await slice_.pull(worker, tmp_path / "0")


@pytest.mark.parametrize("offset", [-1, 300_001])
async def test_an_offset_beyond_the_file_ends_the_connection(
    network: Network, tmp_path: Path, offset: int
) -> None:
    async with network.gateway(roles=()) as data, network.leaf("worker", [data]) as worker:
        slice_ = await provided(data, tmp_path)
        link = await worker.transfers._rendezvous.dial(data.peer_id, ())
        await link.say(WantFile(PullFile(kind="slice", name=NAME), Go(offset, new_key())))
        found = await link.hear()
        assert isinstance(found, FileFound)
        with pytest.raises(ConnectionBroken):
            await link.hear()
        await link.close()
        await until(lambda: len(slice_.ended) == 1)
        assert isinstance(slice_.ended[0], TransferFailed)
        await slice_.pull(worker, tmp_path / "0")


def test_constants_of_both_ends_fit_together() -> None:
    """A provider is told in time that it has to wait, or it would be taken for dead."""
    assert connections.SOON_S < connections.WORKING_INTERVAL_S < connections.FIRST_WORD_S
    assert kept_connections.SPEAKER_KEEPS_S < kept_connections.LISTENER_KEEPS_S

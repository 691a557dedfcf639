"""The bulk plane of real nodes: on the shared port, and through a relay."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import trio
from tests.support.network import Network, until
from tests.support.stopwatch import Stopwatch

from hypha.config.tuning import TransferTuning
from hypha.errors import Refused
from hypha.messages import PeerRef, TransferMeta
from hypha.net import meta_of
from hypha.net.bulk.connections import BulkConnection
from hypha.net.bulk.rendezvous import Rendezvous
from hypha.net.bulk.turns import LONGEST_BUSY_PAUSE_S
from hypha.net.bulk.ways import SLOW_WAY_S, Way

pytestmark = pytest.mark.loopback

MAX_AT_ONCE = TransferTuning().sends


@pytest.mark.parametrize("relayed", [False, True])
async def test_a_file_arrives_whole(network: Network, tmp_path: Path, relayed: bool) -> None:
    source = tmp_path / "update.safetensors"
    source.write_bytes(os.urandom(3_000_000))
    arrived: list[TransferMeta] = []

    async def gate(caller: str, meta: TransferMeta) -> Path:
        return tmp_path / "arrived"

    async def done(caller: str, meta: TransferMeta, path: Path) -> None:
        arrived.append(meta)

    hidden = ("127.0.0.0/8",) if relayed else ()
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway], exclude_cidr=hidden) as worker,
        network.leaf("aggregator", [gateway], exclude_cidr=hidden) as aggregator,
    ):
        await until(lambda: any("p2p-circuit" in one for one in aggregator.ref().addresses))
        aggregator.transfers.accept("update", None, gate, done)
        meta = await meta_of(source, "update", source.name)
        ref: PeerRef = aggregator.ref()
        assert all("p2p-circuit" in one for one in ref.addresses) == relayed
        with trio.fail_after(20):
            await worker.transfers.send(ref, source, meta)
        assert (tmp_path / "arrived").read_bytes() == source.read_bytes()
        assert [one.blake3 for one in arrived] == [meta.blake3]
        kinds = {one.kind for one in worker.connections() if one.peer == aggregator.peer_id}
        assert kinds == ({"relayed"} if relayed else {"direct"})


async def test_a_busy_receiver_is_asked_again_soon_and_holds_up_nobody(
    network: Network, tmp_path: Path
) -> None:
    """Such as a parameter server that is being restored, and does not know yet who takes part."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1000))
    asked: Counter[str] = Counter()
    ready = False
    freed_at = 0.0
    arrived: dict[str, float] = {}

    async def gate(caller: str, meta: TransferMeta) -> Path:
        asked[meta.name] += 1
        if meta.kind == "update" and not ready:
            raise Refused("busy", "not yet")
        return tmp_path / f"arrived-{meta.name}"

    async def done(caller: str, meta: TransferMeta, path: Path) -> None:
        arrived[meta.name] = trio.current_time()

    async with (
        network.gateway() as gateway,
        network.leaf("sender", [gateway]) as sender,
        network.leaf("receiver", [gateway]) as receiver,
        trio.open_nursery() as nursery,
    ):
        for kind in ("update", "theta"):
            receiver.transfers.accept(kind, None, gate, done)
        # as many as are sent at once
        for number in range(MAX_AT_ONCE):
            meta = await meta_of(source, "update", f"update-{number}")
            nursery.start_soon(sender.transfers.send, receiver.ref(), source, meta)
        await until(lambda: len(asked) == MAX_AT_ONCE and min(asked.values()) >= 5)
        with trio.fail_after(20):
            await sender.transfers.send(receiver.ref(), source, await meta_of(source, "theta", "theta"))
        assert set(arrived) == {"theta"}
        ready, freed_at = True, trio.current_time()
        await until(lambda: len(arrived) == MAX_AT_ONCE + 1)
        assert max(arrived.values()) - freed_at <= LONGEST_BUSY_PAUSE_S + 1.0


async def test_those_who_do_not_answer_hold_up_nobody(network: Network, tmp_path: Path) -> None:
    """Such as workers that hear nothing any more, while theta goes to all."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1000))
    asked: list[str] = []
    arrived = trio.Event()

    async def silent(caller: str, meta: TransferMeta) -> Path:
        asked.append(meta.name)
        await trio.sleep_forever()
        raise AssertionError

    async def gate(caller: str, meta: TransferMeta) -> Path:
        return tmp_path / "arrived"

    async def done(caller: str, meta: TransferMeta, path: Path) -> None:
        arrived.set()

    async with (
        network.gateway() as gateway,
        network.leaf("server", [gateway]) as server,
        network.leaf("deaf", [gateway]) as deaf,
        network.leaf("worker", [gateway]) as worker,
        trio.open_nursery() as nursery,
    ):
        deaf.transfers.accept("theta", None, silent, done)
        worker.transfers.accept("theta", None, gate, done)
        for number in range(2 * MAX_AT_ONCE):
            meta = await meta_of(source, "theta", f"theta-{number}")
            nursery.start_soon(server.transfers.send, deaf.ref(), source, meta)
        await until(lambda: len(asked) >= MAX_AT_ONCE)
        started = Stopwatch()
        with trio.fail_after(20):
            await server.transfers.send(worker.ref(), source, await meta_of(source, "theta", "theta"))
        # well before the requests run out of time
        assert started.elapsed_s() < 8
        assert arrived.is_set()
        nursery.cancel_scope.cancel()


async def test_a_way_that_was_given_up_is_tried_last(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or an update that the next one overtakes every time would never find out which way works."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1000))
    tried: list[str] = []
    real = Rendezvous._open

    async def slow(self: Rendezvous, peer: str, way: Way) -> BulkConnection:
        tried.append(way)
        if way == "direct":
            await trio.sleep_forever()
        return await real(self, peer, way)

    async def gate(caller: str, meta: TransferMeta) -> Path:
        return tmp_path / "arrived"

    async def done(caller: str, meta: TransferMeta, path: Path) -> None: ...

    monkeypatch.setattr(Rendezvous, "_open", slow)
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway]) as worker,
        network.leaf("server", [gateway]) as server,
    ):
        server.transfers.accept("update", None, gate, done)
        await worker.connect(server.ref())
        meta = await meta_of(source, "update", "update-1")
        with trio.move_on_after(SLOW_WAY_S + 0.5) as overtaken:
            await worker.transfers.send(server.ref(), source, meta)
        assert overtaken.cancelled_caught
        with trio.fail_after(20):
            await worker.transfers.send(server.ref(), source, await meta_of(source, "update", "update-2"))
    assert tried == ["direct", "dial-back"]


async def test_a_peer_that_dialled_us_is_asked_to_dial_for_bulk(
    network: Network, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """So nothing waits for an address behind a NAT to answer."""
    source = tmp_path / "theta.safetensors"
    source.write_bytes(os.urandom(100_000))
    destination = tmp_path / "arrived"

    async def gate(caller: str, meta: TransferMeta) -> Path:
        return destination

    async def done(caller: str, meta: TransferMeta, path: Path) -> None: ...

    caplog.set_level("INFO", "hypha.net")
    async with network.leaf("server") as server, network.leaf("worker") as worker:
        worker.transfers.accept("theta", None, gate, done)
        await worker.connect(server.ref())
        await until(lambda: server.reached_by(worker.peer_id))
        assert not worker.reached_by(server.peer_id)
        meta = await meta_of(source, "theta", source.name)
        with trio.fail_after(20):
            await server.transfers.send(worker.ref(), source, meta)
        assert "(dial-back)" in caplog.text
        assert "reached by way of" not in caplog.text
    assert destination.read_bytes() == source.read_bytes()

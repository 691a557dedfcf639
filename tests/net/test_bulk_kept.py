"""Connections that carry one file after the other, and what becomes of those that cannot any more."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from tests.net.bulk_proxy import BulkProxy, Trouble, bulk_proxy
from tests.support.network import Network, until
from tests.support.stopwatch import Stopwatch

from hypha.config.tuning import TransferTuning, TuningConfig
from hypha.errors import IdentityError, Problem, Refused, TransferFailed
from hypha.messages import PullFile, TransferMeta
from hypha.net import Libp2pNode as Node
from hypha.net.bulk import connections
from hypha.net.bulk import kept_connections as bulk_kept
from hypha.net.bulk.kept_connections import KeptConnections
from hypha.net.bulk.rendezvous import Rendezvous
from hypha.net.bulk.sockets import SocketConnection
from hypha.net.bulk.transfers import meta_of
from hypha.net.bulk.wire import ConnectionBroken, Working
from hypha.net.peers.addresses import host_and_port
from hypha.pki.authority import revoke
from hypha.pki.identity import Identity, IdentityFiles, load_identity

pytestmark = pytest.mark.loopback


class Rig:
    """``near`` sends to ``far``, which takes everything, through a proxy."""

    def __init__(self, near: Node, far: Node, proxy: BulkProxy, directory: Path) -> None:
        self.near, self.far, self.proxy = near, far, proxy
        self.directory = directory
        self.refusal: Refused | None = None
        self.broken = False
        self.asked = 0
        self.arrived: list[str] = []
        far.transfers.accept("update", None, self._gate, self._take)

    async def _gate(self, caller: str, meta: TransferMeta) -> Path:
        self.asked += 1
        if self.broken:
            raise RuntimeError("the gate itself is broken")
        if self.refusal is not None:
            raise self.refusal
        return self.directory / meta.name

    async def _take(self, caller: str, meta: TransferMeta, path: Path) -> None:
        self.arrived.append(meta.name)

    async def send(self, name: str, size: int = 100_000) -> None:
        """Send a file of random bytes, and see that it arrives as it is."""
        source = self.directory / f"{name}.source"
        source.write_bytes(os.urandom(size))
        await self.near.transfers.send(self.far.peer_id, source, await meta_of(source, "update", name))
        assert (self.directory / name).read_bytes() == source.read_bytes()

    @property
    def kept(self) -> tuple[int, int]:
        """Connections that the sender keeps, and the receiver."""
        return len(self.near.transfers._kept._kept), len(self.far.transfers._kept._kept)


@asynccontextmanager
async def open_rig(
    network: Network,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    near_is: Identity | None = None,
    far_is: Identity | None = None,
    tuning: TuningConfig | None = None,
) -> AsyncIterator[Rig]:
    tuning = tuning or TuningConfig()
    async with network.gateway(identity=far_is, roles=(), tuning=tuning) as far:
        async with bulk_proxy(host_and_port(far.listen_addresses()[0])) as proxy:
            gateway = f"{proxy.address}/p2p/{far.peer_id}"
            async with network.leaf("worker", [gateway], identity=near_is, tuning=tuning) as near:
                yield Rig(near, far, proxy, directory)


async def test_one_connection_carries_them_all(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_rig(network, tmp_path, monkeypatch) as rig:
        for number in range(6):
            await rig.send(f"file-{number}", size=number * 700_000)
        assert rig.arrived == [f"file-{number}" for number in range(6)]
        assert len(rig.proxy.passed) == 1
        await until(lambda: rig.kept == (1, 1))
    assert rig.kept == (0, 0)


async def test_compressed_and_plain_files_may_follow_each_other(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = TuningConfig(transfers=TransferTuning(compression="always"))
    async with open_rig(network, tmp_path, monkeypatch, tuning=tuning) as rig:
        source = tmp_path / "source"
        source.write_bytes(b"again and again " * 200_000)
        rig.far.transfers.accept("slice", None, rig._gate, rig._take)
        for number in range(4):
            kind = "slice" if number % 2 else "update"
            meta = await meta_of(source, kind, f"file-{number}")
            before = sum(rig.proxy.passed)
            await rig.near.transfers.send(rig.far.peer_id, source, meta)
            assert (tmp_path / f"file-{number}").read_bytes() == source.read_bytes()
            assert (sum(rig.proxy.passed) - before < meta.size / 2) == (kind == "slice")
        assert len(rig.proxy.passed) == 1


async def test_slices_come_over_one_connection_to_a_worker_that_cannot_be_dialled(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialled: Counter[str] = Counter()
    real = Rendezvous.dial

    async def dial(self: Rendezvous, peer: str, offered: tuple[str, ...]) -> object:
        dialled[self._links.identity.peer_id] += 1
        return await real(self, peer, offered)

    monkeypatch.setattr(Rendezvous, "dial", dial)
    source = tmp_path / "source"
    source.write_bytes(os.urandom(300_000))
    served = await meta_of(source, "slice", "set/0")

    async def provide(caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        return source, served

    async with (
        network.gateway(roles=()) as data,
        network.leaf("worker", [data], exclude_cidr=("127.0.0.0/8",), reserve=False) as worker,
    ):
        data.transfers.serve("slice", provide)
        for number in range(5):
            request, got = PullFile(kind="slice", name="set/0"), tmp_path / f"got-{number}"
            await worker.transfers.pull(data.peer_id, request, got, served, 1 << 30)
            assert got.read_bytes() == source.read_bytes()
        # each after the first was asked for over the connection that carried the last one
        assert dialled == {worker.peer_id: 1}


async def test_a_connection_that_went_dead_meanwhile_costs_a_pause_and_no_file(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that a firewall has forgotten: it takes what is sent, and nothing comes back."""
    monkeypatch.setattr(connections, "FIRST_WORD_S", 1.0)
    async with open_rig(network, tmp_path, monkeypatch) as rig:
        rig.proxy.trouble = trouble = Trouble(times=2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.send, "first", 1_000_000)
            nursery.start_soon(rig.send, "beside it", 1_000_000)
        assert len(rig.proxy.passed) == 2
        trouble.freeze_after = 0
        started = Stopwatch()
        with trio.fail_after(20):
            await rig.send("second")
        assert started.elapsed_s() < 10
        # the other one was not tried after that
        assert len(rig.proxy.passed) == 3
        await until(lambda: rig.kept[0] == 1)
        await rig.send("third")
        assert len(rig.proxy.passed) == 3
    assert rig.arrived[2:] == ["second", "third"]


async def test_a_connection_that_is_cut_is_not_kept(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_rig(network, tmp_path, monkeypatch) as rig:
        await rig.send("first")
        await until(lambda: rig.kept == (1, 1))
        (kept,) = rig.far.transfers._kept._kept
        kept.scope.cancel()
        await until(lambda: rig.kept == (0, 0))
        await rig.send("second")
        assert len(rig.proxy.passed) == 2


async def test_a_refusal_is_the_same_whichever_way_the_offer_went(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_rig(network, tmp_path, monkeypatch) as rig:
        await rig.send("first")
        rig.refusal = Refused("stale", "round 2 is over")
        with pytest.raises(Refused, match="round 2 is over") as refused:
            await rig.send("second")
        assert (refused.value.code, refused.value.peer) == ("stale", rig.far.peer_id)
        rig.refusal = None
        await rig.send("third")
        rig.broken = True
        with pytest.raises(Refused, match="its log says more") as refused:
            await rig.send("fourth")
        assert refused.value.code == "internal"
        rig.broken = False
        await rig.send("fifth")
        assert len(rig.proxy.passed) == 1
    assert rig.arrived == ["first", "third", "fifth"]


async def test_who_is_busy_is_asked_again(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_rig(network, tmp_path, monkeypatch) as rig, trio.open_nursery() as nursery:
        await rig.send("first")
        rig.refusal, rig.asked = Refused("busy", "not yet"), 0
        nursery.start_soon(rig.send, "second")
        await until(lambda: rig.asked >= 3)
        rig.refusal = None
        await until(lambda: rig.arrived == ["first", "second"])


async def test_an_offer_that_has_to_wait_hears_that_it_does(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "FIRST_WORD_S", 1.0)
    monkeypatch.setattr(connections, "WORKING_INTERVAL_S", 0.3)
    async with open_rig(network, tmp_path, monkeypatch) as rig:
        await rig.send("first")
        places = rig.far.transfers._receiving.places
        async with trio.open_nursery() as nursery:
            # all places are taken by others, who move
            async with places.hold(trio.current_time), places.hold(trio.current_time):
                nursery.start_soon(rig.send, "second")
                await trio.sleep(2.5)
                assert rig.arrived == ["first"]
        assert rig.arrived == ["first", "second"]
        assert len(rig.proxy.passed) == 1


async def test_a_sender_that_was_revoked_cannot_use_what_was_kept(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bystander, victim = network.pki.files("bystander"), network.pki.files("victim")
    crl = tmp_path / "crls.pem"
    revoke(network.pki.org, [bystander.cert], crl)
    good = network.pki.files("good")
    aware = load_identity(IdentityFiles(good.cert, good.key, good.trust, crl))
    async with open_rig(network, tmp_path, monkeypatch, load_identity(victim), aware) as rig:
        await rig.send("first")
        await until(lambda: rig.kept == (1, 1))
        revoke(network.pki.org, [victim.cert], crl)
        await rig.far._peers.reload_identity()
        with pytest.raises(TransferFailed):
            await rig.send("second")
    assert rig.arrived == ["first"]


@pytest.mark.parametrize("revoked", ["sender", "receiver"])
async def test_a_file_that_goes_to_or_from_who_is_revoked_meanwhile_is_cut(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revoked: str
) -> None:
    bystander, victim, good = (network.pki.files(name) for name in ("bystander", "victim", "good"))
    crl = tmp_path / "crls.pem"
    revoke(network.pki.org, [bystander.cert], crl)
    aware = load_identity(IdentityFiles(good.cert, good.key, good.trust, crl))
    ends = (load_identity(victim), aware) if revoked == "sender" else (aware, load_identity(victim))
    async with open_rig(network, tmp_path, monkeypatch, *ends) as rig:
        rig.proxy.trouble = Trouble(rate=500_000)

        async def send() -> None:
            with pytest.raises(TransferFailed):
                await rig.send("long", 4_000_000)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await until(lambda: sum(rig.proxy.passed) > 200_000)
            revoke(network.pki.org, [victim.cert], crl)
            await (rig.far if revoked == "sender" else rig.near)._peers.reload_identity()
        assert sum(rig.proxy.passed) < 3_000_000
    assert rig.arrived == []


async def test_nothing_is_sent_to_who_is_not_trusted_any_more(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_rig(network, tmp_path, monkeypatch) as rig:
        await rig.send("first")
        identity = rig.near.identity
        kept = rig.near.transfers._kept

        def check(certificate: bytes, chain: object = ()) -> None:
            raise IdentityError([Problem(key="", source="", message="it was revoked")])

        with monkeypatch.context() as patch:
            patch.setattr(identity, "check", check)
            assert kept.take(rig.far.peer_id) is None
        # it is closed, and not there for a later one either
        await until(lambda: rig.kept == (0, 0))


async def test_nothing_is_kept_for_ever(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_kept, "SPEAKER_KEEPS_S", 0.3)
    async with open_rig(network, tmp_path, monkeypatch) as rig:
        await rig.send("first")
        await until(lambda: rig.kept == (1, 1))
        await until(lambda: rig.kept == (0, 0))
        await rig.send("second")
        assert len(rig.proxy.passed) == 2


async def test_few_of_a_peer_are_kept(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = TuningConfig(transfers=TransferTuning(sends=6, receives=6))
    async with open_rig(network, tmp_path, monkeypatch, tuning=tuning) as rig:
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(rig.send, f"file-{number}", 1_000_000)
        assert len(rig.proxy.passed) > bulk_kept.MAX_KEPT_PER_PEER
        # each end lets go of its oldest, so they may agree on fewer
        await until(lambda: max(rig.kept) <= bulk_kept.MAX_KEPT_PER_PEER)
        before = len(rig.proxy.passed)
        await rig.send("afterwards")
        assert len(rig.proxy.passed) - before <= 1


class IdleLink(SocketConnection):
    """On which nobody ever speaks."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.speaks = True
        self.closed = False

    async def wait_word(self) -> None:
        await trio.sleep_forever()

    def close_now(self) -> None:
        self.closed = True


async def test_few_are_kept_in_all_and_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_kept, "MAX_KEPT", 3)
    kept = KeptConnections(None)  # type: ignore[arg-type]
    links = [IdleLink(f"peer-{number}") for number in range(5)]
    async with trio.open_nursery() as nursery:
        kept.nursery = nursery
        for link in links:
            await kept.release(link, reusable=True)
            await trio.testing.wait_all_tasks_blocked()
        assert [link.closed for link in links] == [True, True, False, False, False]
        nursery.cancel_scope.cancel()
    assert all(link.closed for link in links)


async def test_nonsense_on_a_kept_connection_is_its_end(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_rig(network, tmp_path, monkeypatch) as rig:
        await rig.send("first")
        link = rig.near.transfers._kept.take(rig.far.peer_id)
        assert link is not None
        await link.say(Working())
        with pytest.raises(ConnectionBroken):
            await link.hear()
        await link.close()
        await rig.send("second")
    assert rig.arrived == ["first", "second"]

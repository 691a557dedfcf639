"""Staying connected: failover, starting order, links, names without PeerIDs."""

from __future__ import annotations

import contextlib
import logging

import pytest
import trio
from tests.support.network import Network, address_of, until
from tests.support.stopwatch import Stopwatch

from hypha.errors import PeerUnreachable, Refused
from hypha.messages import Health, HealthReport, ListPeers, PeerList, PeerRef
from hypha.net.peers.addresses import host_and_port


@pytest.mark.loopback
async def test_a_lost_gateway_is_replaced_at_once_and_the_reservation_with_it(network: Network) -> None:
    async with network.gateway() as second, network.leaf("scheduler", [second]) as scheduler:
        async with network.gateway([second]) as first:
            async with network.leaf("worker", [first, second]) as worker:
                await until(lambda: worker.gateway == first.peer_id)
                await until(lambda: first.peer_id in str(worker.ref()))
                assert not worker.is_connected(second.peer_id)  # one active gateway, not all
                seen = worker.gateway_changed.count
                started = Stopwatch()
                await first.disconnect(worker.peer_id)
                seen = await worker.gateway_changed.wait(seen)
                await until(lambda: worker.gateway == second.peer_id)
                assert started.elapsed_s() < 2
                await until(lambda: f"{second.peer_id}/p2p-circuit" in str(worker.ref()))
                assert f"{first.peer_id}/p2p-circuit" not in str(worker.ref())
                assert worker.gateway_changed.count > seen
                circuits = tuple(one for one in worker.ref().addresses if "p2p-circuit" in one)
                report = await scheduler.request(PeerRef(peer=worker.peer_id, addresses=circuits), Health())
                assert isinstance(report, HealthReport)
                assert report.details["gateway"] == second.peer_id


@pytest.mark.loopback
async def test_a_loss_is_noticed_though_somebody_connects_again_at_once(network: Network) -> None:
    """What the gateway kept for the old connection is gone: the mesh and the reservation."""
    async with network.gateway() as gateway, network.leaf("worker", [gateway]) as worker:

        async def insist() -> None:
            while True:
                with contextlib.suppress(PeerUnreachable):
                    await worker.connect(gateway.peer_id)
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(insist)
            for _ in range(8):
                await until(
                    lambda: (
                        worker.gateway == gateway.peer_id
                        and f"{gateway.peer_id}/p2p-circuit" in str(worker.ref())
                    )
                )
                before = worker.gateway_changed.count
                nursery.start_soon(gateway.disconnect, worker.peer_id)
                with trio.fail_after(20):
                    await worker.gateway_changed.wait(before)
            nursery.cancel_scope.cancel()


@pytest.mark.loopback
async def test_a_leaf_may_start_before_its_gateway(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    identity = network.pki.identity("gateway", ("gateway",))
    async with network.gateway(identity=identity) as gateway:
        address = address_of(gateway)
    port = host_and_port(address)[1]
    with caplog.at_level(logging.WARNING, "hypha.net"):
        async with network.leaf("worker", [address], connected=False) as worker:
            with trio.move_on_after(0.5) as waiting:
                await worker.wait_connected()
            assert waiting.cancelled_caught
            said = [one for one in caplog.messages if "No gateway can be reached" in one]
            assert len(said) == 1  # one clear line, however often it tried
            assert "refused" in said[0]
            report = await worker._health("", Health())
            assert not report.healthy
            async with network.gateway(identity=identity, listen=(f"/ip4/127.0.0.1/tcp/{port}",)):
                with trio.fail_after(20):
                    await worker.wait_connected()


@pytest.mark.loopback
async def test_a_gateway_address_may_lack_the_peer_id_and_may_be_a_name(network: Network) -> None:
    async with network.gateway() as gateway:
        port = host_and_port(address_of(gateway))[1]
        async with network.leaf("worker", [f"/dns4/localhost/tcp/{port}"]) as worker:
            assert worker.gateway == gateway.peer_id
            await until(lambda: f"{gateway.peer_id}/p2p-circuit" in str(worker.ref()))


@pytest.mark.loopback
async def test_a_node_without_gateways_needs_none(network: Network) -> None:
    async with network.leaf("worker") as worker:
        with trio.fail_after(1):
            await worker.wait_connected()
        assert worker.gateway is None


@pytest.mark.loopback
async def test_without_reserve_no_circuit_address_is_announced(network: Network) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway], reserve=False) as worker,
        network.leaf("scheduler", [gateway]) as scheduler,
    ):
        unknown = PeerRef(peer=worker.peer_id)
        with pytest.raises(PeerUnreachable, match="no reservation"):
            await scheduler.request(unknown, Health())
        assert "p2p-circuit" not in str(worker.ref())


@pytest.mark.loopback
async def test_a_peer_with_no_known_address_is_tried_through_the_own_gateway(network: Network) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway]) as worker,
        network.leaf("scheduler", [gateway]) as scheduler,
    ):
        await until(lambda: "p2p-circuit" in str(worker.ref()))
        assert isinstance(await scheduler.request(worker.peer_id, Health()), HealthReport)


@pytest.mark.loopback
async def test_a_circuit_through_a_gateway_that_only_the_other_side_uses(network: Network) -> None:
    async with (
        network.gateway() as theirs,
        network.gateway() as ours,
        network.leaf("worker", [theirs]) as worker,
        network.leaf("scheduler", [ours]) as scheduler,
    ):
        await until(lambda: "p2p-circuit" in str(worker.ref()))
        circuits = tuple(one for one in worker.ref().addresses if "p2p-circuit" in one)
        assert await scheduler.request(PeerRef(peer=worker.peer_id, addresses=circuits), Health())


@pytest.mark.loopback
async def test_a_relay_gives_no_more_than_its_limits(network: Network) -> None:
    from hypha.net import RelayLimits

    async with (
        network.gateway(relay_limits=RelayLimits(reservations=1, circuits=1)) as gateway,
        network.leaf("worker", [gateway]) as worker,
        network.leaf("a", [gateway], reserve=False) as first,
        network.leaf("b", [gateway], reserve=False) as second,
        network.leaf("c", [gateway]) as late,
    ):
        await until(lambda: "p2p-circuit" in str(worker.ref()))
        await first.request(worker.peer_id, Health())
        with pytest.raises(PeerUnreachable, match="resource limit"):
            await second.request(worker.peer_id, Health())
        await first.disconnect(worker.peer_id)
        await until(lambda: gateway.hop is not None and gateway.hop.circuits == 0)
        await second.request(worker.peer_id, Health())
        assert "p2p-circuit" not in str(late.ref())


@pytest.mark.loopback
async def test_a_gateway_says_who_is_connected_with_it_and_where_one_that_is_asked_for_may_be_dialled(
    network: Network,
) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway], roles=("worker",)) as worker,
        network.leaf("data", [gateway], roles=("data",)) as data,
    ):
        await until(lambda: len(gateway.connections()) == 2)
        listed = await data.request(gateway.peer_id, ListPeers())
        assert isinstance(listed, PeerList)
        (one,) = listed.peers
        assert (one.peer, one.roles, one.way, one.addresses) == (worker.peer_id, ("worker",), "direct", ())
        assert one.name.startswith("worker")
        # what it says of itself by identify comes a moment after the connection

        async def where() -> tuple[str, ...]:
            found = await data.request(gateway.peer_id, ListPeers(peer=worker.peer_id))
            assert isinstance(found, PeerList)
            return found.peers[0].addresses

        with trio.fail_after(10.0):
            while not (addresses := await where()):
                await trio.sleep(0.05)
        port = host_and_port(worker.listen_addresses()[0])[1]
        assert any(f"/tcp/{port}" in address for address in addresses)
        assert await data.request(gateway.peer_id, ListPeers(peer=data.peer_id)) == PeerList()
        with pytest.raises(Refused, match="does not answer"):
            await worker.request(data.ref(), ListPeers())

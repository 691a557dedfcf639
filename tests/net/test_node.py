"""Nodes, requests and answers, over real connections."""

from __future__ import annotations

import socket

import pytest
import trio
from tests.support.network import Network, until

from hypha.errors import ConfigError, PeerUnreachable
from hypha.messages import (
    Health,
    HealthReport,
    PeerRef,
)

pytestmark = pytest.mark.loopback


async def test_two_nodes_talk_through_a_gateways_relay(network: Network) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway]) as worker,
        network.leaf("scheduler", [gateway]) as scheduler,
    ):
        await until(lambda: any("p2p-circuit" in one for one in worker.ref().addresses))
        only_circuits = PeerRef(
            peer=worker.peer_id,
            addresses=tuple(one for one in worker.ref().addresses if "p2p-circuit" in one),
        )
        report = await scheduler.request(only_circuits, Health())
        assert isinstance(report, HealthReport)
        assert report.peer == worker.peer_id
        assert report.component == "hypha-worker"
        assert report.healthy
        (connection,) = [one for one in scheduler.connections() if one.peer == worker.peer_id]
        assert connection.kind == "relayed"
        assert connection.direction == "outbound"


async def test_a_direct_address_is_preferred(network: Network) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway]) as worker,
        network.leaf("scheduler", [gateway]) as scheduler,
    ):
        await scheduler.request(worker.ref(), Health())
        assert {one.kind for one in scheduler.connections() if one.peer == worker.peer_id} == {"direct"}


async def test_a_port_is_one_nodes_alone(network: Network) -> None:
    async with network.gateway() as first:
        (taken,) = first.listen_addresses()
        for listen in (taken, taken.replace("127.0.0.1", "0.0.0.0")):
            with pytest.raises(ConfigError, match=listen):
                async with network.gateway(listen=(listen,)):
                    pass
        async with network.leaf("worker", [first]) as worker:
            assert worker.gateway == first.peer_id
    # free again, at once, though connections to it may linger
    async with network.gateway(listen=(taken,)) as again, network.leaf("worker", [again]):
        pass


async def test_a_node_that_is_ending_takes_no_notice_of_its_gateway(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    async with network.gateway() as gateway:
        with trio.CancelScope() as scope:
            async with network.leaf("worker", [gateway]) as worker:
                await until(lambda: any("p2p-circuit" in one for one in worker.ref().addresses))
                scope.cancel()
                try:
                    await trio.sleep_forever()
                finally:
                    # its goodbye takes a while, and the gateway goes first
                    with trio.CancelScope(shield=True):
                        await gateway.disconnect(worker.peer_id)
                        await until(lambda: not worker.connections())
                        await trio.sleep(3 * network.timings.reconnect_max_s)
                        assert not worker.connections()
    assert "Lost gateway" not in caplog.text


async def test_a_machine_on_which_nobody_listens_any_more_is_told_from_a_silent_one(network: Network) -> None:
    async with network.leaf("scheduler", connected=False) as scheduler:
        async with network.leaf("worker", connected=False) as worker:
            ref = worker.ref()
            await scheduler.request(ref, Health())
        with pytest.raises(PeerUnreachable) as dead:
            await scheduler.request(ref, Health())
        assert dead.value.gone

        with socket.create_server(("127.0.0.1", 0)) as mute:
            place = f"/ip4/127.0.0.1/tcp/{mute.getsockname()[1]}"
            silent = PeerRef(peer=ref.peer, addresses=(place, *ref.addresses))
            with pytest.raises(PeerUnreachable) as unheard:
                await scheduler.request(silent, Health(), timeout_s=30.0)
        assert not unheard.value.gone

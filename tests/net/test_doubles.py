"""The same certificate on two machines: one goes on, the other is told why not, and nothing flaps."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from tests.support.network import Network, address_of, until
from tests.support.proxy import proxy_to

from hypha.messages import Health, HealthReport, PeerRef
from hypha.naming import shown
from hypha.net import Libp2pNode as Node
from hypha.net.peers.addresses import host_and_port
from hypha.net.peers.duplicates import ASK_S

pytestmark = pytest.mark.loopback


async def test_of_two_nodes_with_one_certificate_the_first_goes_on(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    identity = network.pki.identity("worker", ("worker",))
    losses = 0
    async with network.gateway() as gateway, network.leaf("worker", [gateway], identity=identity) as first:
        async with gateway.watch_peers() as lost:
            with caplog.at_level(logging.INFO, "hypha.net"):
                async with network.leaf("worker", [gateway], connected=False, identity=identity) as second:
                    said = "another node uses the certificate of this one, at 127.0.0.1:"
                    await until(lambda: said in caplog.text)
                    # it tries on, and is turned away each time
                    await until(lambda: "Another node uses the certificate of this one" in caplog.text)
                    await trio.sleep(1.0)
                    assert second.gateway is None
                    assert first.gateway == gateway.peer_id
                    while True:
                        try:
                            lost.receive_nowait()
                        except trio.WouldBlock:
                            break
                        losses += 1
                    assert losses == 0
                # each of the three says it once, however often the second one tries
                at_gateway = [one for one in caplog.messages if "Two nodes use the certificate of" in one]
                at_first = [one for one in caplog.messages if "Another node uses the certificate" in one]
                at_second = [one for one in caplog.messages if "No gateway can be reached" in one]
                assert [len(one) for one in (at_gateway, at_first, at_second)] == [1, 1, 1]
                assert "hypha-certutil node" in at_gateway[0]
                assert "hypha-certutil node" in at_second[0]
        assert isinstance(await gateway.request(first.peer_id, Health()), HealthReport)


async def test_the_second_goes_on_once_the_first_has_ended(network: Network) -> None:
    """Also a node that was killed and started again: its old connection is over."""
    identity = network.pki.identity("worker", ("worker",))
    async with network.gateway() as gateway:
        async with network.leaf("worker", [gateway], identity=identity) as first:
            assert first.gateway == gateway.peer_id
        began = trio.current_time()
        async with network.leaf("worker", [gateway], identity=identity) as second:
            assert second.gateway == gateway.peer_id
            assert trio.current_time() - began < 2


async def test_one_that_does_not_answer_any_more_makes_room(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    """A machine that lost its power closes no connection; when it is back it must come in within seconds."""
    identity = network.pki.identity("worker", ("worker",))
    patient = network.timings.model_copy(update={"silence_s": 600.0})
    async with (
        network.gateway(timings=patient) as gateway,
        proxy_to(*host_and_port(address_of(gateway))) as proxy,
        network.leaf("worker", [f"/ip4/127.0.0.1/tcp/{proxy.port}"], identity=identity, timings=patient),
    ):
        proxy.freeze()
        with caplog.at_level(logging.WARNING, "hypha.net"):
            async with network.leaf("worker", [gateway], connected=False, identity=identity) as second:
                await until(lambda: second.gateway == gateway.peer_id)
        assert "it does not answer, and another node with its certificate has come from" in caplog.text
        assert "Two nodes use" not in caplog.text


async def test_a_probe_beside_its_node_is_no_double(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    """It uses the certificate of the node that runs on its machine."""
    identity = network.pki.identity("worker", ("worker",))
    async with network.gateway() as gateway, network.leaf("worker", [gateway], identity=identity) as worker:
        async with network.leaf("probe", identity=identity, guest=True) as probe:
            ref = PeerRef(peer=gateway.peer_id, addresses=(address_of(gateway),))
            assert isinstance(await probe.request(ref, Health()), HealthReport)
        assert worker.gateway == gateway.peer_id
        assert "certificate" not in caplog.text


async def test_a_worker_with_its_gateways_certificate_is_told(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    identity = network.pki.identity("all")
    async with network.gateway(identity=identity) as gateway:
        plain = gateway.listen_addresses()[0]
        for address in (plain, address_of(gateway)):
            caplog.clear()
            async with network.leaf("worker", [address], connected=False, identity=identity):
                await until(lambda: "another one that uses the same certificate" in caplog.text)


# --- at different gateways --------------------------------------------------------------------------------


@asynccontextmanager
async def two_gateways(network: Network, **changes: Any) -> AsyncIterator[tuple[Node, Node]]:
    """Linked with each other."""
    async with network.gateway(**changes) as one, network.gateway([one], **changes) as other:
        await until(lambda: other.is_connected(one.peer_id))
        yield one, other


async def test_a_second_node_at_another_gateway_is_turned_away_and_all_four_are_told(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    identity = network.pki.identity("worker", ("worker",))
    async with (
        two_gateways(network) as (one, other),
        network.leaf("worker", [one], identity=identity) as first,
    ):
        with caplog.at_level(logging.INFO, "hypha.net"):
            async with network.leaf("worker", [other], connected=False, identity=identity) as second:
                await until(lambda: "Another node uses the certificate of this one" in caplog.text)
                await until(lambda: "No gateway can be reached" in caplog.text)
                await trio.sleep(1.0)  # it tries on
                assert second.gateway is None
                assert first.gateway == one.peer_id
        at_gateways = [line for line in caplog.messages if "Two nodes use the certificate of" in line]
        at_first = [line for line in caplog.messages if "Another node uses the certificate" in line]
        at_second = [line for line in caplog.messages if "No gateway can be reached" in line]
    assert [len(told) for told in (at_gateways, at_first, at_second)] == [2, 1, 1]
    assert any(f"which has come to {shown(other.peer_id)}, is turned away" in told for told in at_gateways)
    assert any(f"connected to {shown(one.peer_id)} goes on" in told for told in at_gateways)
    assert f"it has come to {shown(other.peer_id)} from 127.0.0.1:" in at_first[0]
    assert f"connected to {shown(one.peer_id)}; make a certificate for each machine" in at_second[0]


async def test_a_node_that_moves_to_another_gateway_is_no_double_of_itself(network: Network) -> None:
    """The gateway that it was lost by still has its connection, and two gateways may have it at once."""
    identity = network.pki.identity("worker", ("worker",))
    patient = network.timings.model_copy(update={"silence_s": 600.0})
    async with (
        two_gateways(network, timings=patient) as (one, other),
        proxy_to(*host_and_port(address_of(one))) as proxy,
        network.leaf("worker", [f"/ip4/127.0.0.1/tcp/{proxy.port}"], identity=identity) as worker,
    ):
        await worker.connect(PeerRef(peer=other.peer_id, addresses=(address_of(other),)))
        assert {link.peer for link in worker.connections()} == {one.peer_id, other.peer_id}
        await worker.disconnect(other.peer_id)
        proxy.freeze()
        # killed, its machine gone, and started again elsewhere: the first gateway does not know yet
        async with network.leaf("worker", [other], connected=False, identity=identity) as again:
            await until(lambda: again.gateway == other.peer_id)


async def test_of_two_nodes_that_come_at_the_same_time_one_is_let_in(network: Network) -> None:
    async with two_gateways(network) as (one, other):
        for _ in range(4):
            identity = network.pki.identity("worker", ("worker",))
            async with (
                network.leaf("worker", [one], connected=False, identity=identity) as first,
                network.leaf("worker", [other], connected=False, identity=identity) as second,
            ):
                await until(lambda: first.gateway or second.gateway)
                await trio.sleep(0.5)
                assert (first.gateway is None) != (second.gateway is None)


async def test_gateways_that_were_apart_find_the_nodes_that_both_have_let_in(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    identity = network.pki.identity("worker", ("worker",))
    often = network.timings.model_copy(update={"doubles_check_s": 0.2})
    async with (
        network.gateway(timings=often) as one,
        network.gateway(timings=often) as other,
        network.leaf("worker", [one], identity=identity) as first,
        network.leaf("worker", [other], identity=identity) as second,
    ):
        kept, turned_away = sorted((first, second), key=lambda node: node.instance)
        await other.connect(PeerRef(peer=one.peer_id, addresses=(address_of(one),)))
        await until(lambda: turned_away.gateway is None and "No gateway can be reached" in caplog.text)
        assert kept.gateway is not None
        assert "and was there before" in caplog.text


async def test_a_gateway_that_does_not_answer_is_not_waited_for_each_time(network: Network) -> None:
    patient = network.timings.model_copy(update={"silence_s": 600.0})
    async with (
        network.gateway(timings=patient) as one,
        proxy_to(*host_and_port(address_of(one))) as proxy,
        network.gateway([f"/ip4/127.0.0.1/tcp/{proxy.port}"], timings=patient) as other,
    ):
        await until(lambda: other.is_connected(one.peer_id))
        proxy.freeze()
        began = trio.current_time()
        for most_s in (ASK_S + 3.0, ASK_S / 2):
            async with network.leaf("worker", [other], roles=("worker",)) as worker:
                assert worker.gateway == other.peer_id
                assert trio.current_time() - began < most_s
            began = trio.current_time()

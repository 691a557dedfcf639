"""The same certificate on two machines: one goes on, the other is told why not, and nothing flaps."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import trio
from tests.support.network import Network, address_of, until
from tests.support.proxy import proxy_to

from hypha.messages import Health, HealthReport, PeerRef
from hypha.net.addresses import host_and_port

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
    patient = replace(network.timings, liveness_s=600.0)
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

"""Who is relayed though it could be direct is told why; names lead to direct connections as addresses do."""

from __future__ import annotations

import logging
import socket
from typing import Any

import pytest
import trio
from tests.net.test_resolving import Names
from tests.support.network import Network, address_of, until

from hypha.cli.component import excluded_for
from hypha.config.models import RESERVED_CIDR
from hypha.messages import Health, PeerRef
from hypha.net import Libp2pNode
from hypha.net.peers.addresses import host_and_port

pytestmark = pytest.mark.loopback

ALL = tuple(RESERVED_CIDR)


async def kind_of(one: Libp2pNode, other: Libp2pNode, ref: PeerRef | None = None) -> set[str]:
    """How ``one`` reaches ``other``."""
    await one.request(ref or other.ref(), Health())
    return {found.kind for found in one.connections() if found.peer == other.peer_id}


async def relayed(other: Libp2pNode) -> None:
    await until(lambda: "/p2p-circuit" in str(other.ref()))


async def test_with_what_init_writes_a_gateway_by_name_leads_to_direct_connections(
    network: Network, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one by address does: the nodes announce their addresses in the gateway's network, and dial them."""

    def lookup(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    Names(gateway=("127.0.0.1",))
    async with network.gateway() as gateway:
        port = host_and_port(address_of(gateway))[1]
        for address in (f"/dns4/gateway.test/tcp/{port}", f"/ip4/127.0.0.1/tcp/{port}"):
            with monkeypatch.context() as patched:
                patched.setattr(socket, "getaddrinfo", lookup)
                excluded = tuple(excluded_for([address], None) or ALL)
            async with (
                network.leaf("scheduler", [address], exclude_cidr=excluded) as scheduler,
                network.leaf("worker", [address], exclude_cidr=excluded) as worker,
            ):
                assert await kind_of(scheduler, worker) == {"direct"}
                assert worker.bulk_addresses()
                assert await scheduler.bulk_targets(worker.peer_id, ())
    assert "through a relay" not in caplog.text


async def test_a_node_whose_addresses_are_all_excluded_is_told_so(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "hypha.net"):
        async with network.gateway() as gateway, network.leaf("scheduler", [gateway]) as scheduler:
            async with network.leaf("worker", [gateway], exclude_cidr=ALL) as worker:
                await relayed(worker)
                assert await kind_of(scheduler, worker) == {"relayed"}
    told = [one for one in caplog.messages if "Other nodes reach this one through a relay only" in one]
    assert len(told) == 1
    assert "/ip4/127.0.0.1/tcp/" in told[0]
    assert "exclude_cidr" in told[0]
    (why,) = [one for one in caplog.messages if "is reached through a relay" in one]
    assert "it announces no address of its own" in why
    assert "external_addresses" in why


async def test_why_somebody_is_relayed_is_told_once_for_each_reason(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway]) as scheduler,
        network.leaf("wary", [gateway], exclude_cidr=ALL) as wary,
        network.leaf("worker", [gateway]) as worker,
    ):
        await relayed(worker)
        circuits = tuple(one for one in worker.ref().addresses if "/p2p-circuit" in one)
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        dead = listener.socket.getsockname()[1]
        await listener.aclose()
        ref = PeerRef(peer=worker.peer_id, addresses=(f"/ip4/127.0.0.1/tcp/{dead}", *circuits))
        with caplog.at_level(logging.INFO, "hypha.net"):
            for _ in range(2):
                assert await kind_of(scheduler, worker, ref) == {"relayed"}
                assert await kind_of(wary, worker) == {"relayed"}
                for node in (scheduler, wary):
                    await node.disconnect(worker.peer_id)
                    await until(lambda node=node: not worker.is_connected(node.peer_id))
        told = [one for one in caplog.messages if "is reached through a relay" in one]
        assert len(told) == 2
        assert all(one.startswith("worker-") for one in told)
        assert (
            f"none of its addresses could be dialled (/ip4/127.0.0.1/tcp/{dead}: nothing listens there"
            in told[0]
        )
        assert "lie in exclude_cidr" in told[1]

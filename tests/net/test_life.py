"""Opening and closing: names, ports, simultaneous dials, nothing left behind."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import psutil
import pytest
import trio
from tests.support.network import Network, address_of, until
from tests.support.proxy import proxy_to
from tests.support.stopwatch import Stopwatch

import hypha.net
from hypha.config.models import GatewayConfig, WorkerConfig
from hypha.config.tuning import TuningConfig
from hypha.errors import AddressTaken, ConfigError, DatasetNotFound, PeerUnreachable
from hypha.messages import Acknowledged, Health, HealthReport, PeerRef, ReleaseLease
from hypha.net import Libp2pNode as Node
from hypha.net import open_node, options_from
from hypha.net.libp2p.shared_port import SharedPortTcp
from hypha.net.peers.addresses import host_and_port


def ref_of(node: Node) -> PeerRef:
    return PeerRef(peer=node.peer_id, addresses=(address_of(node),))


def test_the_public_names() -> None:
    assert sorted(hypha.net.__all__) == [
        "BulkTransfers",
        "ConnectionInfo",
        "Libp2pNode",
        "NodeOptions",
        "RelayLimits",
        "Timings",
        "meta_of",
        "open_node",
        "options_from",
    ]
    for name in hypha.net.__all__:
        assert hasattr(hypha.net, name)


def test_options_come_from_the_configuration(network: Network) -> None:
    files = network.pki.files("worker", ["worker"])
    common = {"cert_pem": files.cert, "key_pem": files.key, "trust_pem": files.trust}
    worker = options_from(WorkerConfig(**common, gateway_addresses=["/ip4/1.2.3.4/tcp/1"]), "hypha-worker")
    assert worker.identity.roles == {"worker"}
    assert worker.gateways == ("/ip4/1.2.3.4/tcp/1",)
    assert (worker.hop, worker.reserve) == (False, True)
    assert "127.0.0.0/8" in worker.exclude_cidr
    gateway = options_from(
        GatewayConfig(**common, external_addresses=["/ip4/1.2.3.4/tcp/1"], max_circuits=7), "hypha-gateway"
    )
    assert (gateway.hop, gateway.reserve) == (True, False)
    assert gateway.external == ("/ip4/1.2.3.4/tcp/1",)
    assert gateway.relay_limits.circuits == 7


@pytest.mark.loopback
async def test_port_zero_announces_the_real_port_and_external_addresses_come_first(network: Network) -> None:
    external = "/dns4/node.example/tcp/4000"
    async with network.leaf("worker", external=(external,)) as node:
        (listening,) = node.listen_addresses()
        assert host_and_port(listening)[1] > 0
        assert node.ref().addresses == (f"{external}/p2p/{node.peer_id}", f"{listening}/p2p/{node.peer_id}")
        assert node.bulk_addresses() == [external, listening]


@pytest.mark.loopback
async def test_excluded_addresses_are_neither_announced_nor_dialled(network: Network) -> None:
    async with (
        network.leaf("worker", listen=("/ip4/0.0.0.0/tcp/0",), exclude_cidr=("127.0.0.0/8",)) as hidden,
        network.leaf("worker") as open_one,
    ):
        assert "/ip4/127." not in str(hidden.ref())
        assert "0.0.0.0" not in str(hidden.ref())
        with pytest.raises(PeerUnreachable, match="no address"):
            await hidden.request(ref_of(open_one), Health())


@pytest.mark.loopback
async def test_which_excluded_addresses_a_wildcard_stands_for_is_told(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    everything = ("0.0.0.0/0", "::/0")
    with caplog.at_level(logging.INFO, "hypha.net"):
        async with network.leaf("worker", listen=("/ip4/0.0.0.0/tcp/0",), exclude_cidr=everything):
            pass
    (told,) = [line for line in caplog.messages if "through a relay only" in line]
    assert "/ip4/127.0.0.1/tcp/" in told
    assert "0.0.0.0" not in told


@pytest.mark.loopback
async def test_what_cannot_be_listened_on_or_parsed_is_a_config_error(network: Network) -> None:
    async with network.leaf("worker") as node:
        # SO_REUSEPORT would share a port of our own; an address of nobody's cannot be listened on
        # which it may have later, so this one passes
        with pytest.raises(AddressTaken, match=r"listen_addresses: .*: Cannot assign requested"):
            async with open_node(network.options("worker", listen=("/ip4/203.0.113.7/tcp/0",))):
                pass
        with pytest.raises(ConfigError, match="gateway_addresses"):
            async with open_node(network.options("worker", gateways=("nonsense",))):
                pass
        assert node.listen_addresses()


@pytest.mark.loopback
async def test_what_is_raised_inside_comes_out_as_it_was(network: Network) -> None:
    with pytest.raises(DatasetNotFound, match="nobody"):
        async with network.leaf("scheduler"):
            raise DatasetNotFound("nobody serves it")


@pytest.mark.loopback
async def test_a_cancelled_caller_may_still_say_goodbye(network: Network) -> None:
    released: list[str] = []

    async def release(caller: str, request: ReleaseLease) -> Acknowledged:
        released.append(request.lease_id)
        return Acknowledged()

    async with network.leaf("worker") as worker:
        worker.answer(ReleaseLease, release)
        with trio.move_on_after(0.3):
            async with network.leaf("scheduler") as scheduler:
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.move_on_after(2, shield=True):
                        await scheduler.request(ref_of(worker), ReleaseLease(lease_id="7"))
        assert released == ["7"]


@pytest.mark.loopback
async def test_both_sides_dial_at_once(network: Network) -> None:
    for _ in range(4):
        async with network.leaf("a") as one, network.leaf("b") as two:
            reports: list[HealthReport] = []

            async def ask(caller: Node, callee: Node, reports: list[HealthReport] = reports) -> None:
                report = await caller.request(ref_of(callee), Health(), timeout_s=60)
                assert isinstance(report, HealthReport)
                reports.append(report)

            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(ask, one, two)
                    nursery.start_soon(ask, two, one)
            assert len(reports) == 20
            assert 1 <= len(one.connections()) <= 2
            await trio.sleep(0.3)  # long enough for a connection that was given up to be gone
            assert one.connections()
            assert two.connections()
            await ask(one, two)
            await ask(two, one)


@pytest.mark.loopback
async def test_concurrent_requests_share_one_dial(network: Network) -> None:
    async with (
        network.leaf("a") as one,
        network.leaf("b") as two,
        trio.open_nursery() as nursery,
    ):
        for _ in range(12):
            nursery.start_soon(one.request, ref_of(two), Health())
        await until(lambda: one.is_connected(two.peer_id))
        assert len(two.connections()) <= 1


@pytest.mark.loopback
async def test_a_dead_address_does_not_hold_up_a_good_one(network: Network) -> None:
    async with (
        network.leaf("a") as one,
        network.leaf("b") as two,
        proxy_to(*host_and_port(two.listen_addresses()[0])) as black_hole,
    ):
        black_hole.freeze()
        addresses = (f"/ip4/127.0.0.1/tcp/{black_hole.port}", "/ip4/127.0.0.1/tcp/1", address_of(two))
        started = Stopwatch()
        await one.request(PeerRef(peer=two.peer_id, addresses=addresses), Health())
        assert started.elapsed_s() < 2


@pytest.mark.loopback
async def test_peer_lost_says_only_when_the_last_connection_ended(network: Network) -> None:
    async with network.leaf("a") as one, network.leaf("b") as two, one.watch_peers() as lost:
        await one.request(ref_of(two), Health())
        await two.disconnect(one.peer_id)
        with trio.fail_after(20):
            assert (await lost.receive()).peer == two.peer_id
        assert not one.is_connected(two.peer_id)


@pytest.mark.loopback
async def test_closing_is_quick_and_leaves_nothing_behind(network: Network) -> None:
    process = psutil.Process()
    async with network.leaf("warm-up"):
        pass
    tasks = trio.lowlevel.current_statistics().tasks_living
    threads = {one for one in threading.enumerate() if "rio" not in one.name}
    sockets = len(process.net_connections())
    async with network.gateway() as gateway, trio.open_nursery() as nursery:
        node_open, may_close = trio.Event(), trio.Event()
        took: list[float] = []

        async def one_node() -> None:
            async with network.leaf("worker", [gateway]) as node:
                node_open.set()
                await may_close.wait()
                started = Stopwatch()
                assert node.is_connected(gateway.peer_id)
            took.append(started.elapsed_s())

        async def peers() -> None:
            async with network.leaf("a", [gateway]) as one, network.leaf("b", [gateway]) as two:
                await one.request(ref_of(two), Health())
                may_close.set()
                await trio.sleep(0.05)

        nursery.start_soon(one_node)
        await node_open.wait()
        nursery.start_soon(peers)
    assert took[0] < 2
    await until(lambda: len(process.net_connections()) <= sockets)
    await until(lambda: trio.lowlevel.current_statistics().tasks_living <= tasks)
    assert {one for one in threading.enumerate() if "rio" not in one.name} <= threads


@pytest.mark.loopback
async def test_a_cancelled_node_closes_too_while_it_dials(network: Network, tmp_path: Path) -> None:
    async with network.leaf("b") as two:
        for number in range(12):
            with trio.move_on_after(0.02 + 0.004 * number):
                async with network.leaf("a", connected=False) as one, trio.open_nursery() as nursery:
                    for _ in range(3):
                        nursery.start_soon(one.request, ref_of(two), Health())
                    await trio.sleep_forever()
        await until(lambda: not two.connections())


@pytest.mark.loopback
async def test_who_asks_a_closing_node_where_it_listens_hears_of_open_sockets_only() -> None:
    """A peer that identified it at that moment ended it with a bad file descriptor."""

    async def nobody(stream: object) -> None: ...

    listener = SharedPortTcp(1, TuningConfig()).create_listener(nobody)
    opened = await trio.open_tcp_listeners(0, host="127.0.0.1")
    listener.listeners.extend(opened)
    [address] = listener.get_addrs()
    assert str(address).startswith("/ip4/127.0.0.1/tcp/")
    await opened[0].aclose()
    assert listener.get_addrs() == ()


@pytest.mark.loopback
async def test_closing_with_a_partitioned_peer_is_quick(network: Network) -> None:
    async with network.leaf("b") as two, proxy_to(*host_and_port(two.listen_addresses()[0])) as proxy:
        async with network.leaf("a") as one:
            through = PeerRef(peer=two.peer_id, addresses=(f"/ip4/127.0.0.1/tcp/{proxy.port}",))
            await one.request(through, Health())
            proxy.freeze()
            started = Stopwatch()
        assert started.elapsed_s() < 2
        proxy.thaw()


@pytest.mark.loopback
async def test_the_library_is_quiet(network: Network, caplog: pytest.LogCaptureFixture) -> None:
    async with network.gateway() as gateway, network.leaf("worker", [gateway]) as worker:
        with pytest.raises(PeerUnreachable):
            await worker.request(
                PeerRef(peer=network.pki.identity("x").peer_id, addresses=("/ip4/127.0.0.1/tcp/1",)), Health()
            )
    noise = [
        one.getMessage()
        for one in caplog.records
        if one.name.startswith("libp2p") and one.levelno >= logging.WARNING
    ]
    assert noise == []

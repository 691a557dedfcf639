"""Keys of [tuning] reach what they tune."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio
from tests.support.network import Network, until

from hypha.config.models import GatewayConfig, WorkerConfig
from hypha.config.tuning import (
    ConnectionTuning,
    GossipTuning,
    LivenessTuning,
    SocketTuning,
    TransferTuning,
    TuningConfig,
)
from hypha.errors import Refused
from hypha.messages import Health, HealthReport
from hypha.net import RelayLimits, Timings, options_from
from hypha.net.sockets import buffer_shortfalls


def test_what_nobody_has_set_is_as_it_was_measured(network: Network) -> None:
    files = network.pki.files("gateway", ["gateway"])
    common = {"cert_pem": files.cert, "key_pem": files.key, "trust_pem": files.trust}
    gateway = GatewayConfig(**common, external_addresses=["/ip4/1.2.3.4/tcp/1"])
    options = options_from(gateway, "hypha-gateway")
    assert (options.timings, options.relay_limits) == (Timings(), RelayLimits())

    worker = WorkerConfig(
        **common,
        gateway_addresses=["/ip4/1.2.3.4/tcp/1"],
        tuning=TuningConfig(liveness=LivenessTuning(silence_s=60, lookup_s=9)),
    )
    timings = options_from(worker, "hypha-worker").timings
    assert (timings.silence_s, timings.lookup_s, timings.dial_s) == (60, 9, Timings().dial_s)
    more = gateway.model_validate(
        {
            **common,
            "external_addresses": ["/ip4/1.2.3.4/tcp/1"],
            "tuning": {"connections": {"circuits_per_peer": 7}},
        }
    )
    assert options_from(more, "hypha-gateway").relay_limits.per_peer == 7


@pytest.mark.loopback
async def test_a_node_is_tuned(network: Network, tmp_path: Path) -> None:
    tuning = TuningConfig(
        gossip=GossipTuning(degree=9, degree_low=2, degree_high=12, heartbeat_s=0.5),
        connections=ConnectionTuning(
            streams=33, requests=8, requests_per_peer=3, per_peer=2, unproven=9, unproven_per_address=5
        ),
        sockets=SocketTuning(send_buffer_kb=48, receive_buffer_kb=64),
        transfers=TransferTuning(sends=3, receives=5),
    )
    async with (
        network.gateway(roles=(), tuning=tuning) as far,
        network.leaf("worker", [far], tuning=tuning) as near,
    ):
        router = far._gossip._router
        assert (router.degree, router.degree_low, router.degree_high, router.heartbeat_interval) == (
            9,
            2,
            12,
            0.5,
        )
        assert far.transfers._sending.places._limiter.total_tokens == 3
        assert far.transfers._receiving.places._limiter.total_tokens == 5
        assert far._port.arrivals._limits is tuning.connections
        # of either end of the connection, the one that was accepted too; Linux doubles what it was asked for
        for node in (near, far):
            (stream,) = node._port._streams
            sock = stream.stream.socket
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 48 << 10
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * 64 << 10
        (connection,) = far._swarm.connections.values()
        assert {one.muxed_conn.secured_conn.max_streams for one in connection} == {33}

        release = trio.Event()

        async def slow(caller: str, request: Health) -> HealthReport:
            await release.wait()
            return HealthReport(healthy=True, component="x", version="0", peer=far.peer_id, uptime_s=1.0)

        far.answer(Health, slow)
        answered: list[bool] = []

        async def ask() -> None:
            answered.append(isinstance(await near.request(far.peer_id, Health()), HealthReport))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
            await until(lambda: far._rpc._inbound.total() == 3)
            with pytest.raises(Refused, match="busy"):
                await near.request(far.peer_id, Health())
            release.set()
        assert answered == [True] * 3


def test_a_kernel_that_gives_less_is_told_with_the_setting_that_mends_it() -> None:
    assert list(buffer_shortfalls(SocketTuning())) == []
    assert list(buffer_shortfalls(SocketTuning(send_buffer_kb=16))) == []
    for direction in ("wmem", "rmem"):
        most = int(Path(f"/proc/sys/net/core/{direction}_max").read_text())
        wanted = (most >> 10) + 100
        key = "send_buffer_kb" if direction == "wmem" else "receive_buffer_kb"
        (told,) = buffer_shortfalls(SocketTuning(**{key: wanted}))
        assert f"tuning.sockets.{key} asks for {wanted} KB, and the kernel gives {most >> 10}" in told
        assert f"sysctl -w net.core.{direction}_max={wanted << 10}" in told

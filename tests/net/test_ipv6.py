"""A network without IPv4: connections, requests, files both ways and through a relay."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from tests.support.network import Network

from hypha.messages import Health, HealthReport, TransferMeta
from hypha.net.bulk.transfers import meta_of

pytestmark = pytest.mark.loopback

LISTEN = ("/ip6/::1/tcp/0",)


@pytest.mark.parametrize("kind", ["slice", "update", "checkpoint", "export"])
async def test_files_cross_a_network_of_ipv6_alone(network: Network, tmp_path: Path, kind: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(range(256)) * 4000)
    arrived = trio.Event()

    async def gate(caller: str, meta: TransferMeta) -> Path:
        return target

    async def note(caller: str, meta: TransferMeta, path: Path) -> None:
        arrived.set()

    async with network.gateway(listen=LISTEN) as gateway:
        async with network.leaf("worker", [gateway], listen=LISTEN) as worker:
            async with network.leaf("scheduler", [gateway], listen=LISTEN) as scheduler:
                scheduler.transfers.accept(kind, None, gate, note)
                meta = await meta_of(source, kind, "file")
                with trio.fail_after(20):
                    assert isinstance(await worker.request(scheduler.ref(), Health()), HealthReport)
                    await worker.transfers.send(scheduler.ref(), source, meta)
                    # from whoever was dialled, too
                    worker.transfers.accept(kind, None, gate, note)
                    await scheduler.transfers.send(worker.ref(), source, meta)
                assert arrived.is_set()
                assert target.read_bytes() == source.read_bytes()
                for node in (worker, scheduler, gateway):
                    for connection in node.connections():
                        assert connection.address.startswith("/ip6/::1/tcp/")

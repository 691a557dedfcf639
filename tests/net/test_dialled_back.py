"""Nodes that are asked to dial whoever asks: as far as files need it, and nobody looks about through them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import trio
from tests.net.test_resolving import silent
from tests.net.test_traces import NO_LOOPBACK
from tests.support.network import Network

from hypha.cli.local.network import free_port
from hypha.errors import Refused
from hypha.messages import BulkDial, TransferMeta
from hypha.net.bulk import connections, rendezvous
from hypha.net.bulk.connections import BulkConnection
from hypha.net.bulk.wire import ConnectionBroken, Verdict, decode_frame

pytestmark = pytest.mark.loopback


async def _nobody(*_: Any) -> Path:
    raise Refused("stale", "not now")


async def _taken(caller: str, meta: TransferMeta, path: Path) -> None: ...


async def test_a_node_without_files_dials_nobody_back(network: Network) -> None:
    async with network.gateway(roles=()) as gateway, network.leaf("worker", [gateway]) as leaf:
        request = BulkDial(token="t" * 32, addresses=("/ip4/127.0.0.1/tcp/9",))
        with pytest.raises(Refused) as refused:
            await leaf.request(gateway.peer_id, request)
    assert refused.value.code == "not-found"


async def test_few_are_dialled_back_at_once_and_what_came_of_it_is_not_told(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "HANDSHAKE_TIMEOUT_S", 1.0)
    port, refusals = free_port(), Counter[str]()
    async with (
        silent("127.0.0.1", port),
        network.gateway(roles=()) as gateway,
        network.leaf("worker", [gateway]) as leaf,
    ):
        gateway.transfers.accept("update", None, _nobody, _taken)
        request = BulkDial(token="t" * 32, addresses=(f"/ip4/127.0.0.1/tcp/{port}",))

        async def ask() -> None:
            with pytest.raises(Refused) as refused:
                await leaf.request(gateway.peer_id, request, 20.0)
            refusals[refused.value.code] += 1
            assert str(port) not in refused.value.reason

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
    assert refusals == {"unreachable": rendezvous.MAX_DIAL_BACKS_PER_PEER, "busy": 3}


async def test_a_name_leads_to_no_address_that_is_excluded(network: Network) -> None:
    async with (
        network.gateway(roles=()) as gateway,
        network.leaf("worker", [gateway], exclude_cidr=NO_LOOPBACK, reserve=False) as leaf,
    ):
        assert await leaf.bulk_targets("somebody", ("/dns4/localhost/tcp/4001",)) == []


@pytest.mark.parametrize("to_its_end", [False, True])
async def test_whoever_waits_and_is_gone_is_noticed(
    to_its_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place, a gate or a part that nobody waits for any more; a file that is here is handed over."""
    monkeypatch.setattr(connections, "SOON_S", 0.01)

    async def say(_: object) -> None:
        raise ConnectionBroken("gone")

    async def work() -> str:
        await trio.sleep(0.2)
        return "done"

    link = cast(BulkConnection, SimpleNamespace(say=say))
    with trio.fail_after(10):
        if to_its_end:
            assert await BulkConnection.while_working(link, work, to_its_end=True) == "done"
        else:
            with pytest.raises(ConnectionBroken, match="gone"):
                await BulkConnection.while_working(link, work)


def test_a_refusal_is_as_short_as_that_of_a_request() -> None:
    said = Verdict("refused", code="stale\x1b[31m\n" * 100, reason="x" * 200_000)
    heard = decode_frame(msgspec.msgpack.encode(said))
    assert isinstance(heard, Verdict)
    assert len(heard.reason) == 4096
    assert len(heard.code) < 300
    assert "\x1b" not in heard.code

"""Slices over real connections: a data node dies in the middle, the next one does the rest."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from tests.net.bulk_proxy import BulkProxy, Trouble, bulk_proxy
from tests.net.conftest import network
from tests.support.network import Network, until

from hypha.config.models import CacheConfig
from hypha.messages import (
    JobStamp,
    NextSlice,
    PullFile,
    Request,
    Response,
    SliceAssigned,
    TransferMeta,
)
from hypha.net import Libp2pNode as Node
from hypha.net.bulk.transfers import meta_of
from hypha.net.peers.addresses import host_and_port
from hypha.worker.slices.cache import SliceCache
from hypha.worker.slices.prefetching import SliceDemand, SlicePrefetcher

__all__ = ["network"]

pytestmark = pytest.mark.loopback

MB = 1 << 20
SIZE = 16 * MB
HALF = SIZE // 2


@asynccontextmanager
async def data_node(network: Network, worker: Node, proxy: BulkProxy, slice_: Path) -> AsyncIterator[Node]:
    """Serves ``slice_``; it reaches the worker through ``proxy`` alone."""
    served = await meta_of(slice_, "slice", "set/0")

    async def provide(caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        return slice_, served

    async with network.leaf("data", [f"{proxy.address}/p2p/{worker.peer_id}"]) as node:
        node.transfers.serve("slice", provide)
        yield node


def prefetcher(worker: Node, cache: SliceCache, place: Path, assigned: SliceAssigned) -> SlicePrefetcher:
    """Of a job whose scheduler always hands out ``assigned``."""

    async def ask(request: Request) -> Response:
        assert isinstance(request, NextSlice)
        return assigned

    (place / "slices").mkdir()
    return SlicePrefetcher(
        ask,
        worker.transfers,
        cache,
        SliceDemand("set", "incarnation", place / "slices", lambda: JobStamp(job_id="job")),
    )


@pytest.mark.parametrize("spoilt", [False, True], ids=["killed", "killed-after-rubbish"])
async def test_half_of_a_slice_from_one_data_node_and_the_rest_from_another(
    network: Network, tmp_path: Path, spoilt: bool
) -> None:
    slice_ = tmp_path / "slice"
    slice_.write_bytes(os.urandom(SIZE))
    async with (
        network.gateway(roles=()) as worker,
        bulk_proxy(host_and_port(worker.listen_addresses()[0])) as proxy,
    ):
        async with data_node(network, worker, proxy, slice_) as second, trio.open_nursery() as nursery:
            served = await meta_of(slice_, "slice", "set/0")
            cache = SliceCache(tmp_path / "cache", CacheConfig(max_slices=2))
            async with data_node(network, worker, proxy, slice_) as first:
                assigned = SliceAssigned(
                    dataset="set", index=0, epoch=0, samples=1, size=SIZE, blake3=served.blake3,
                    providers=(first.ref(), second.ref()),
                )  # fmt: skip
                fetcher = prefetcher(worker, cache, tmp_path, assigned)
                proxy.trouble = Trouble(freeze_after=HALF)
                nursery.start_soon(fetcher.run)
                part = cache.incoming(assigned)
                part = part.with_name(part.name + ".part")
                await until(lambda: part.exists() and part.stat().st_size >= HALF - 2 * MB)
                assert second.transfers.tally.sent == 0
                if spoilt:
                    with part.open("r+b") as file:
                        file.write(bytes(MB))
            # the first one is gone now, and its connections with it
            with trio.fail_after(30):
                found = await fetcher.next()
            nursery.cancel_scope.cancel()
        assert (tmp_path / found.path).read_bytes() == slice_.read_bytes()
        rest, got = second.transfers.tally.sent, worker.transfers.tally.received
        assert len(proxy.passed) == (3 if spoilt else 2)
        if spoilt:
            # found out when it was whole, and fetched once more from the start
            rest, got = rest - SIZE, got - SIZE
        assert got == SIZE, "what was here already was not sent again"
        assert HALF <= rest <= HALF + 2 * MB

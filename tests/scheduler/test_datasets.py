"""Who serves the dataset, while data nodes come, die and return."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
from tests.support.network import until
from tests.support.virtual_network import VirtualNetwork, virtual_time

from hypha import __version__
from hypha.config.job import DatasetRef
from hypha.errors import DatasetMismatch, DatasetNotFound, Refused
from hypha.features import Abilities, features_of
from hypha.messages import (
    ColumnRange,
    DatasetDescription,
    DescribeDataset,
    Manifest,
    PeerRef,
    SliceInfo,
)
from hypha.node import Node
from hypha.rules.manifests import manifest_hash
from hypha.scheduler.data.datasets import REFRESH_S, find_dataset
from hypha.scheduler.status.versions import ServiceVersions

MANIFEST = Manifest(
    name="digits", columns=(), slices=(SliceInfo(file="0", samples=20, size=9, blake3="00" * 32),)
)
OTHER = Manifest(
    name="digits", columns=(), slices=(SliceInfo(file="0", samples=20, size=9, blake3="11" * 32),)
)


def digits(wait_s: float | None = 10.0, **keys: Any) -> DatasetRef:
    return DatasetRef(dataset="digits", wait_s=wait_s, **keys)


@asynccontextmanager
async def data_node(
    network: VirtualNetwork,
    gateway: Node,
    role: str = "data",
    manifest: Manifest = MANIFEST,
    stated: str = "",
    organization: str = "",
) -> AsyncIterator[Node]:
    async with network.leaf("data", [gateway], roles=(role,), organization=organization) as node:

        async def describe(caller: str, request: DescribeDataset) -> DatasetDescription:
            return DatasetDescription(manifest=manifest, manifest_hash=stated or manifest_hash(manifest))

        node.answer(DescribeDataset, describe)
        await node.provide("digits")
        yield node


@virtual_time
async def test_a_data_node_that_is_gone_is_not_named_any_more_and_one_that_comes_is(
    network: VirtualNetwork,
) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        data_node(network, gateway) as stays,
        trio.open_nursery() as nursery,
    ):
        async with AsyncExitStack() as stack:
            goes = await stack.enter_async_context(data_node(network, gateway))
            dataset = await find_dataset(scheduler, digits(10.0))
            nursery.start_soon(dataset.watch, scheduler)
            await until(lambda: set(dataset.providers) == {stays.peer_id, goes.peer_id}, 20.0)
            began = trio.current_time()
        await until(lambda: set(dataset.providers) == {stays.peer_id}, 20.0)
        # long before it would have been asked again by itself
        assert trio.current_time() - began < REFRESH_S / 2
        async with data_node(network, gateway) as comes:
            await until(lambda: comes.peer_id in dataset.providers, 2 * REFRESH_S)
            nursery.cancel_scope.cancel()


@virtual_time
async def test_a_worker_cannot_pass_for_a_data_node(
    network: VirtualNetwork, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither announce a dataset at a gateway, nor be believed where one, of an older version, named it."""
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        data_node(network, gateway, "worker", OTHER) as impostor,
    ):
        assert await impostor.provide("digits") == 0
        assert await scheduler.find_providers("digits") == []
        find, named = scheduler.find_providers, impostor.ref()

        async def named_too(name: str) -> list[PeerRef]:
            return [*await find(name), named]

        monkeypatch.setattr(scheduler, "find_providers", named_too)
        with pytest.raises(DatasetNotFound, match="announce it that this job does not use"):
            await find_dataset(scheduler, digits(2.0))
        assert caplog.text.count("its certificate has the role worker; it is not used") == 1
        async with data_node(network, gateway) as honest:
            dataset = await find_dataset(scheduler, digits(10.0))
            await dataset.refresh(scheduler)
            assert set(dataset.providers) == {honest.peer_id}
            assert impostor.peer_id != honest.peer_id


@virtual_time
async def test_a_job_may_name_its_data_nodes(
    network: VirtualNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    """By the organisation that vouches for them, or by key; others with other data stop nothing."""
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        data_node(network, gateway, organization="Lab") as ours,
        data_node(network, gateway, manifest=OTHER, organization="Other Lab") as theirs,
    ):
        for pins, wanted in (
            (digits(organizations=["Lab"]), ours),
            (digits(organizations=["Other Lab"]), theirs),
            (digits(data_nodes=[theirs.peer_id]), theirs),
            (digits(organizations=["Lab"], data_nodes=[ours.peer_id]), ours),
        ):
            dataset = await find_dataset(scheduler, pins)
            await dataset.refresh(scheduler)
            assert set(dataset.providers) == {wanted.peer_id}
        assert "is of 'Other Lab', which scheduler.job.dataset.organizations does not name" in caplog.text
        assert "is not among scheduler.job.dataset.data_nodes" in caplog.text


@virtual_time
async def test_who_is_refused_a_dataset_is_told_why(
    network: VirtualNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        data_node(network, gateway) as data,
    ):

        async def refuse(caller: str, request: DescribeDataset) -> DatasetDescription:
            raise Refused("not-allowed", "it is for other organisations")

        data.answer(DescribeDataset, refuse)
        with pytest.raises(DatasetNotFound, match="that this job does not use"):
            await find_dataset(scheduler, digits(2.0))
        assert caplog.text.count("serves digits, but not to this job: it is for other organisations") == 1


@virtual_time
async def test_of_data_that_differs_the_pinned_or_known_one_is_used_and_the_other_reported(
    network: VirtualNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    meant, other = manifest_hash(MANIFEST), manifest_hash(OTHER)
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        data_node(network, gateway) as honest,
        data_node(network, gateway, manifest=OTHER) as differs,
        data_node(network, gateway, manifest=OTHER, stated=meant) as liar,
    ):
        for pinned, known in ((meant, None), (None, meant), (meant, other)):
            dataset = await find_dataset(scheduler, digits(manifest_hash=pinned), known=known)
            assert (dataset.manifest_hash, set(dataset.providers)) == (meant, {honest.peer_id})
            await dataset.refresh(scheduler)
            assert set(dataset.providers) == {honest.peer_id}
        said = {(record.getMessage(), getattr(record, "peer_id", "")) for record in caplog.records}
        assert any("serves different data" in text and peer == differs.peer_id for text, peer in said)
        assert any(
            "does not serve digits as it states" in text and peer == liar.peer_id for text, peer in said
        )
        with pytest.raises(DatasetMismatch, match=f"{'ab' * 32} of the job"):
            await find_dataset(scheduler, digits(1.0, manifest_hash="ab" * 32))
        async with data_node(network, gateway):
            assert (await find_dataset(scheduler, digits(10.0))).manifest_hash == meant


@virtual_time
async def test_gateways_and_data_nodes_state_what_they_run(
    network: VirtualNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    services = ServiceVersions()
    caplog.set_level(logging.INFO, "hypha.scheduler")
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        data_node(network, gateway) as data,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(services.run, scheduler)
        dataset = await find_dataset(scheduler, digits(10.0))
        await until(lambda: services.gateways)
        # one of a version that says nothing of itself, and one of this
        assert dataset.stated == {data.peer_id: Abilities()}
        for _ in range(2):
            for peer, abilities in dataset.stated.items():
                services.note("data node", peer, abilities)
        found = {one.kind: one for one in services.snapshot(dataset.stated)}
        assert (found["gateway"].peer, found["gateway"].version) == (gateway.peer_id, __version__)
        assert found["gateway"].features == features_of("hypha-gateway")
        assert (found["data node"].peer, found["data node"].version) == (data.peer_id, "")
        nursery.cancel_scope.cancel()
    (said,) = [line for line in caplog.messages if "it lacks" in line]
    assert "runs a version of Hypha that states none" in said
    assert "class-names (a version with it says what the classes of a dataset are called)" in said


@virtual_time
@pytest.mark.parametrize("wait_s", [None, 4.0])
@pytest.mark.parametrize("own", ["", "Lab", "Other Lab"])
async def test_where_as_many_serve_one_as_another_none_wins_silently_and_none_stops_the_job(
    network: VirtualNetwork, caplog: pytest.LogCaptureFixture, own: str, wait_s: float | None
) -> None:
    meant, other = manifest_hash(MANIFEST), manifest_hash(OTHER)
    told: list[str] = []
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",), organization=own) as scheduler,
        data_node(network, gateway, organization="Lab") as ours,
        data_node(network, gateway, manifest=OTHER, organization="Other Lab") as theirs,
    ):
        began = trio.current_time()
        dataset = await find_dataset(scheduler, digits(wait_s), told.append)
        # another one might have come
        assert trio.current_time() - began >= (10.0 if wait_s is None else 2.0)
    used = {"Lab": meant, "Other Lab": other}.get(own, min(meant, other))
    assert dataset.manifest_hash == used
    assert set(dataset.providers) == {ours.peer_id if used == meant else theirs.peer_id}
    # that is what is said meanwhile, and then which it is
    assert meant in told[-1]
    assert other in told[-1]
    (said,) = [line for line in caplog.messages if "As many data nodes serve different data" in line]
    why = ", as it is of this scheduler's own organisation" if own else ""
    assert f"The manifest {used} is used{why}. If" in said
    assert "dataset.manifest_hash" in said
    assert "A data node serves different data under the name digits" in caplog.text


@virtual_time
async def test_what_the_hash_does_not_cover_is_believed_where_all_say_it(
    network: VirtualNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    """One data node could have a job refused by what it says of the numbers in a column."""
    true = (ColumnRange(column="labels", low=0, high=9),)
    false = (ColumnRange(column="labels", low=0, high=1e9),)
    ranges = [(), true, true, false]
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        AsyncExitStack() as stack,
    ):
        for number, stated in enumerate(ranges):
            manifest = msgspec.structs.replace(MANIFEST, ranges=stated)
            await stack.enter_async_context(data_node(network, gateway, manifest=manifest))
            if number == len(ranges) - 2:
                assert (await find_dataset(scheduler, digits(10.0))).manifest.ranges == true
        assert "are not checked" not in caplog.text
        dataset = await find_dataset(scheduler, digits(10.0))
    assert dataset.manifest.ranges == ()
    assert len(dataset.providers) == len(ranges)
    assert "state different ranges of numbers for the columns of digits" in caplog.text

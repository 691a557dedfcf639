"""Gossip and provider records through gateways."""

from __future__ import annotations

import msgspec
import pytest
import trio
from libp2p.peer.envelope import seal_record
from libp2p.peer.peer_record import PeerRecord
from tests.support.network import Network, address_of, until

from hypha.messages import (
    WORKER_TOPIC,
    ExecutorDescriptor,
    GossipEnvelope,
    PeerRef,
    Resources,
    WorkerRequest,
)
from hypha.net import Libp2pNode as Node
from hypha.net.discovery.gossip import MAX_MESSAGE_BYTES

pytestmark = pytest.mark.loopback


def worker_request(scheduler: Node, request_id: str) -> WorkerRequest:
    return WorkerRequest(
        request_id=request_id,
        scheduler=scheduler.ref(),
        resources=Resources(cpu=1),
        executor=ExecutorDescriptor(kind="train", name="diloco-transformer"),
        count=1,
        bid=1.0,
        offer_within_s=0.5,
    )


async def test_a_request_published_right_after_connecting_reaches_everybody(network: Network) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway]) as first,
        network.leaf("worker", [gateway]) as second,
        first.subscribe() as heard_first,
        second.subscribe() as heard_second,
        network.leaf("scheduler", [gateway]) as scheduler,
    ):
        await scheduler.publish(worker_request(scheduler, "r1"))
        for heard in (heard_first, heard_second):
            with trio.fail_after(20):
                item = await heard.receive()
            assert (item.publisher, item.request.request_id) == (scheduler.peer_id, "r1")


async def test_a_message_of_more_than_any_request_needs_is_not_passed_on(network: Network) -> None:
    """Fields that nobody knows are ignored, and would be kept by everybody all the same."""
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway]) as worker,
        worker.subscribe() as heard,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
    ):
        # joins the mesh
        await scheduler.publish(worker_request(scheduler, "first"))
        for name, padding in (("large", MAX_MESSAGE_BYTES), ("small", 100)):
            envelope = GossipEnvelope(
                body=worker_request(scheduler, name), certificates=scheduler.identity.certificates
            )
            padded = msgspec.to_builtins(envelope, builtin_types=(bytes,)) | {"unknown": "x" * padding}
            await scheduler._gossip._pubsub.publish(WORKER_TOPIC, msgspec.msgpack.encode(padded))
        names: set[str] = set()
        with trio.fail_after(20):
            while not names >= {"first", "small"}:
                names.add((await heard.receive()).request.request_id)
        assert "large" not in names


async def test_gossip_crosses_linked_gateways(network: Network) -> None:
    async with (
        network.gateway() as one,
        network.gateway([one]) as two,
        network.leaf("worker", [one]) as worker,
        worker.subscribe() as heard,
        network.leaf("scheduler", [two]) as scheduler,
    ):
        await until(lambda: one.is_connected(two.peer_id))
        for number in range(100):  # the mesh between gateways may still be forming
            await scheduler.publish(worker_request(scheduler, f"r{number}"))
            with trio.move_on_after(0.1):
                assert (await heard.receive()).publisher == scheduler.peer_id
                return
        pytest.fail("nothing crossed")


async def found(node: Node, dataset: str) -> list[PeerRef]:
    """Providers of ``dataset``, as soon as there are any: gateways may still be getting linked."""
    with trio.fail_after(20):
        while True:
            if refs := await node.find_providers(dataset):
                return refs
            await trio.sleep(0.1)


async def test_a_dataset_is_found_once_with_addresses(network: Network) -> None:
    async with (
        network.gateway() as one,
        network.gateway([one]) as two,
        network.leaf("data", [one]) as data,
        network.leaf("scheduler", [two]) as scheduler,
    ):
        assert await data.provide("cafe") >= 1  # a name that the library would take for hex
        assert await scheduler.find_providers("no-such") == []
        (ref,) = await found(scheduler, "cafe")
        assert ref.peer == data.peer_id
        assert address_of(data) in ref.addresses
        await scheduler.connect(ref)


async def test_records_come_back_after_the_gateway_was_replaced(network: Network) -> None:
    async with network.gateway() as second:
        async with network.gateway() as first, network.leaf("data", [first, second]) as data:
            await until(lambda: data.gateway == first.peer_id)
            assert await data.provide("digits") == 1
            await first.disconnect(data.peer_id)
            await until(lambda: data.gateway == second.peer_id)
            async with network.leaf("scheduler", [second]) as scheduler:
                (ref,) = await found(scheduler, "digits")
                assert ref.peer == data.peer_id


def transport_of(node: Node) -> str:
    """Where a test node listens, without its PeerID."""
    return node.listen_addresses()[0]


async def test_a_gateway_that_was_connected_before_it_was_known_as_one_takes_requests(
    network: Network,
) -> None:
    """A scheduler knows its second gateway by its address alone, and has dialled it as somebody's relay."""
    async with (
        network.gateway() as second,
        network.leaf("worker", [second]) as worker,
        worker.subscribe() as heard,
        network.gateway() as first,
        network.leaf("scheduler", [transport_of(first), transport_of(second)]) as scheduler,
    ):
        await until(lambda: scheduler.gateway == first.peer_id)
        await scheduler.connect(second.ref())
        await first.disconnect(scheduler.peer_id)
        await until(lambda: scheduler.gateway == second.peer_id)
        await scheduler.publish(worker_request(scheduler, "r1"))
        with trio.fail_after(10):
            item = await heard.receive()
        assert (item.publisher, item.request.request_id) == (scheduler.peer_id, "r1")


async def test_a_request_is_heard_though_a_newer_peer_record_was_seen(network: Network) -> None:
    """As shipped, whatever carries an older signed record than one seen before is dropped whole."""
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway]) as worker,
        worker.subscribe() as heard,
        network.leaf("scheduler", [gateway]) as scheduler,
    ):
        host = scheduler._host
        record = PeerRecord(host.get_id(), host.get_addrs(), seq=1 << 62)
        newer = seal_record(record, host.get_private_key())
        assert gateway._host.get_peerstore().consume_peer_record(newer, 7200)
        await scheduler.publish(worker_request(scheduler, "r1"))
        with trio.fail_after(20):
            item = await heard.receive()
        assert item.request.request_id == "r1"


async def test_leaves_gossip_with_gateways_alone(network: Network) -> None:
    """As shipped, all that connect to a scheduler are in its mesh, and each gets everything twice."""
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway]) as worker,
        worker.subscribe() as heard,
        network.leaf("scheduler", [gateway]) as scheduler,
    ):
        await worker.connect(scheduler.ref())
        await scheduler.publish(worker_request(scheduler, "r1"))
        with trio.fail_after(20):
            await heard.receive()
        for leaf in (worker, scheduler):
            assert {str(peer) for peer in leaf._gossip._pubsub.peers} == {gateway.peer_id}

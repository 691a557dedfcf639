"""What a node answers to those who look for a fault, and what it does not do for them."""

from __future__ import annotations

import time

import pytest
import trio
from tests.net.test_gossip_and_dht import worker_request
from tests.support.network import Network, until

from hypha.errors import NetworkError, Refused
from hypha.messages import (
    MAX_MEASURED_BYTES,
    BandwidthMeasured,
    DialBack,
    DialedBack,
    Health,
    HealthReport,
    MeasureBandwidth,
)
from hypha.net.peers.addresses import Address
from hypha.net.peers.diagnosing import BUDGET_BYTES, BUDGET_S, MAX_AT_ONCE, Diagnosing


def diagnosing(*hosts: str) -> Diagnosing:
    async def who_is_at(address: Address) -> str:
        if address.transport.endswith("/1"):
            raise NetworkError(f"{address.transport}: nothing listens there")
        return "them"

    return Diagnosing(who_is_at, lambda caller: hosts)


async def test_only_the_address_that_the_caller_comes_from_is_dialled() -> None:
    answer = await diagnosing("192.0.2.7").dial_back(
        "caller",
        DialBack(
            addresses=(
                "/ip4/192.0.2.7/tcp/4001",
                "/ip4/192.0.2.7/tcp/1",
                "/ip4/192.0.2.8/tcp/4001",
                "/dns4/victim.example/tcp/22",
                "/ip4/192.0.2.7/tcp/4001/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN/p2p-circuit",
                "nonsense",
            )
        ),
    )
    good, silent, *others = answer.results
    assert (good.peer, good.reason) == ("them", "")
    assert (silent.peer, silent.reason) == ("", "nothing listens there")
    assert [one.peer for one in others] == [""] * 4
    assert all("nothing else is dialled" in one.reason for one in others[:3])
    assert "no multiaddr" in others[3].reason


async def test_who_comes_through_a_relay_is_not_dialled() -> None:
    (result,) = (
        await diagnosing().dial_back("caller", DialBack(addresses=("/ip4/192.0.2.7/tcp/4001",)))
    ).results
    assert "an address behind a relay" in result.reason


async def test_a_caller_has_one_at_a_time_and_all_together_a_few(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def who_is_at(address: Address) -> str:
        await trio.sleep(1)
        return "them"

    busy = Diagnosing(who_is_at, lambda caller: ["192.0.2.7"])
    request = DialBack(addresses=("/ip4/192.0.2.7/tcp/4001",))
    refused: list[str] = []

    async def ask(caller: str) -> None:
        try:
            await busy.dial_back(caller, request)
        except Refused as exc:
            refused.append(f"{caller} {exc.code}")

    async with trio.open_nursery() as nursery:
        for number in range(MAX_AT_ONCE):
            nursery.start_soon(ask, f"caller-{number}")
        await trio.testing.wait_all_tasks_blocked()
        await ask("caller-0")
        await ask("one more")
    assert refused == ["caller-0 busy", "one more busy"]
    await ask("one more")
    assert len(refused) == 2


async def test_what_a_caller_may_have_measured_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    node = diagnosing()
    request = MeasureBandwidth(payload=bytes(MAX_MEASURED_BYTES), reply_bytes=MAX_MEASURED_BYTES)
    for _ in range(BUDGET_BYTES // (2 * MAX_MEASURED_BYTES)):
        answer = await node.measure("caller", request)
        assert len(answer.payload) == MAX_MEASURED_BYTES
    with pytest.raises(Refused, match="enough was measured"):
        await node.measure("caller", request)
    await node.measure("another", request)
    await trio.sleep(BUDGET_S)
    await node.measure("caller", request)


@pytest.mark.loopback
async def test_a_gateway_says_what_it_sees_of_who_asks(network: Network) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway], roles=("worker",)) as worker,
    ):
        before_s = time.time()
        report = await worker.request(gateway.peer_id, Health())
        assert isinstance(report, HealthReport)
        assert report.time_s is not None
        assert before_s - 1 <= report.time_s <= time.time() + 1
        (seen,) = report.seen_at
        assert seen.startswith("/ip4/127.0.0.1/tcp/")
        assert {"hypha", "python", "libp2p"} <= report.packages.keys()

        listening = worker.listen_addresses()[0]
        answer = await worker.request(
            gateway.peer_id, DialBack(addresses=(listening, "/ip4/127.0.0.1/tcp/1"))
        )
        assert isinstance(answer, DialedBack)
        assert answer.results[0].peer == worker.peer_id
        assert "nothing listens there" in answer.results[1].reason
        # only gateways dial for others
        with pytest.raises(Refused) as refused:
            await gateway.request(worker.peer_id, DialBack(addresses=()))
        assert refused.value.code == "unsupported"

        measured = await worker.request(
            gateway.peer_id, MeasureBandwidth(payload=bytes(1000), reply_bytes=2000)
        )
        assert isinstance(measured, BandwidthMeasured)
        assert len(measured.payload) == 2000


@pytest.mark.loopback
async def test_a_guest_beside_a_node_leaves_its_gossip_and_reservation_as_they_were(network: Network) -> None:
    """`hypha doctor` connects with the certificate of the node that runs on its machine."""
    identity = network.pki.identity("worker", ("worker",))
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway], identity=identity) as worker,
        worker.subscribe() as heard,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
    ):
        assert gateway.hop is not None
        await until(lambda: gateway.hop is not None and gateway.hop.reservations == 2)
        async with network.leaf(
            "doctor", identity=identity, guest=True, reserve=False, listen=(), connected=False
        ) as guest:
            guest.learn(gateway.ref())
            await guest.request(gateway.ref(), Health())
            # what is meant for the node never goes to who looks on beside it, though that came later
            for far in (gateway, scheduler):
                await worker.connect(far.ref())
                await guest.connect(far.ref())
                report = await far.request(worker.peer_id, Health())
                assert isinstance(report, HealthReport)
                assert report.component == "hypha-worker"
            await scheduler.publish(worker_request(scheduler, "meanwhile"))
            with trio.fail_after(20):
                assert (await heard.receive()).request.request_id == "meanwhile"
        await until(lambda: len([one for one in gateway.connections() if one.peer == worker.peer_id]) == 1)
        await scheduler.publish(worker_request(scheduler, "afterwards"))
        with trio.fail_after(20):
            assert (await heard.receive()).request.request_id == "afterwards"
        assert gateway.hop.reservations == 2

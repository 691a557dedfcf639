"""The desk under trio's test clock: leases end on time, whatever becomes of those told about it."""

from __future__ import annotations

import logging

import msgspec
import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from hypha.config.offers import OfferConfig, UtilizationConfig
from hypha.errors import Refused
from hypha.messages import ExecutorDescriptor, PeerRef, Resources, WorkerRequest
from hypha.rules.leases import Bind, Drained, Hold, Lease, Tick
from hypha.worker.leasing.arbiter import Arbiter
from hypha.worker.leasing.events import RenewAsked, RequestReceived, SendOffer
from hypha.worker.leasing.service import MAX_LOGGED, LeaseService
from hypha.worker.leasing.terms import WorkerCapacity
from hypha.worker.node import prices

TRAIN = ExecutorDescriptor(kind="train", name="t")


def request(number: int) -> RequestReceived:
    return RequestReceived(
        "S",
        WorkerRequest(
            request_id=f"r{number}",
            scheduler=PeerRef(peer="S"),
            resources=Resources(cpu=1),
            executor=TRAIN,
            count=1,
            bid=1.0,
            offer_within_s=0.5,
        ),
    )


def lease_service_with(ended: list[tuple[float, str]], fail: bool = False) -> LeaseService:
    def on_expired(lease: Lease) -> None:
        ended.append((trio.current_time(), lease.request_id))
        if fail:
            raise RuntimeError("this executor does not stop")

    arbiter = Arbiter(
        WorkerCapacity(Resources(cpu=3), [TRAIN]), OfferConfig(lease_s=30.0), lambda: PeerRef(peer="W")
    )
    return LeaseService(arbiter, on_expired)


@pytest.mark.parametrize("fail", [False, True])
async def test_leases_end_to_the_moment_even_when_stopping_one_fails(
    autojump_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, fail: bool
) -> None:
    ended: list[tuple[float, str]] = []
    offers: list[SendOffer] = []
    lease_service = lease_service_with(ended, fail)
    nursery.start_soon(lease_service.run, offers.append)
    start = trio.current_time()
    accepted_at: dict[str, float] = {}
    for number in range(3):
        lease_service.handle(request(number))
        await trio.sleep(1.0)
        offer = offers[-1].offer
        lease_service.granted(RenewAsked(offer.lease_id, "S"))
        accepted_at[offer.request_id] = trio.current_time()
    assert lease_service.arbiter.book.free == Resources()
    with caplog.at_level(logging.CRITICAL if not fail else logging.ERROR, logger="hypha.worker"):
        await trio.sleep(60.0)
    assert [name for _, name in ended] == ["r0", "r1", "r2"]
    for when, name in ended:
        assert when == pytest.approx(accepted_at[name] + 30.0, abs=1e-3)
    assert lease_service.arbiter.book.free == lease_service.arbiter.book.total
    assert start < ended[0][0]
    assert len([record for record in caplog.records if "could not be stopped" in record.message]) == 3 * fail


async def test_a_worker_without_leases_says_what_it_waits_for(
    autojump_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    offers: list[SendOffer] = []
    lease_service = lease_service_with([])
    nursery.start_soon(lease_service.run, offers.append)
    with caplog.at_level(logging.INFO, logger="hypha.worker"):
        await trio.sleep(61.0)
        (idle,) = caplog.messages
        assert idle.endswith("waiting for a scheduler's request that fits cpu=3; none was received.")
        caplog.clear()
        greedy = replace(request(0).request, resources=Resources(cpu=64))
        lease_service.receive("S", greedy)
        await trio.sleep(60.0)
        (idle,) = caplog.messages
        assert "; 1 requests were received, and the last got no offer: " in idle
        caplog.clear()
        lease_service.handle(request(1))
        await trio.sleep(1.0)
        lease = offers[-1].offer.lease_id
        for _ in range(30):
            lease_service.granted(RenewAsked(lease, "S"))
            await trio.sleep(10.0)
        assert caplog.messages == []


async def test_a_temporary_lease_that_nobody_took_ends_silently(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    ended: list[tuple[float, str]] = []
    offers: list[SendOffer] = []
    lease_service = lease_service_with(ended)
    nursery.start_soon(lease_service.run, offers.append)
    lease_service.handle(request(1))
    await trio.sleep(0.3)
    [lease] = lease_service.leases
    with pytest.raises(Refused, match="never accepted"):
        lease_service.granted(Bind(lease.lease_id, "S", "train", "job"))
    await trio.sleep(5.0)
    assert lease_service.leases == ()
    assert ended == []
    with pytest.raises(Refused, match="no lease"):
        lease_service.granted(Bind(lease.lease_id, "S", "train", "job"))


async def test_resources_of_an_ended_lease_stay_held_while_its_executor_stops(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    ended: list[tuple[float, str]] = []
    offers: list[SendOffer] = []
    lease_service = lease_service_with(ended)
    nursery.start_soon(lease_service.run, offers.append)
    lease_service.handle(request(1))
    await trio.sleep(0.3)
    lease_id = offers[0].offer.lease_id
    lease_service.handle(RenewAsked(lease_id, "S"))
    lease_service.granted(Bind(lease_id, "S", "train", "job"))
    lease_service.granted(Hold(lease_id, 10.0))
    await trio.sleep(31.0)
    assert len(ended) == 1
    assert lease_service.arbiter.book.free == Resources(cpu=2)
    lease_service.handle(Drained(lease_id))
    assert lease_service.arbiter.book.free == lease_service.arbiter.book.total


async def test_what_this_version_lacks_is_told_once_and_only_so_much_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, logger="hypha.worker")
    lease_service = lease_service_with([])

    def needing(name: str) -> WorkerRequest:
        return msgspec.structs.replace(request(0).request, needs=(name,))

    for _ in range(3):
        lease_service.receive("S", needing("of-a-later-version\x1b[2J"))
    [record] = caplog.records
    assert "(of-a-later-version\N{REPLACEMENT CHARACTER}[2J); upgrade this worker" in record.getMessage()
    for number in range(2 * MAX_LOGGED):
        lease_service.receive("S", needing(f"feature-{number}"))
    assert len(caplog.records) == MAX_LOGGED


async def test_less_is_asked_for_a_dataset_of_which_slices_are_in_the_cache(
    autojump_clock: MockClock,
) -> None:
    terms = OfferConfig(price=3.0, strategy="affinity")
    for cached, price in ((frozenset({"digits"}), 2.0), (frozenset({"others"}), 3.0)):
        arbiter = Arbiter(WorkerCapacity(Resources(cpu=3), [TRAIN]), terms, lambda: PeerRef(peer="W"))
        lease_service = LeaseService(arbiter, lambda _: None, lambda cached=cached: cached)  # type: ignore[misc]
        heard = request(0)
        lease_service.receive("S", replace(heard.request, dataset="digits"))
        await trio.sleep(0.3)
        [offered] = [one for one in lease_service.handle(Tick()) if isinstance(one, SendOffer)]
        assert offered.offer.price == price


async def test_a_worker_shows_its_price_its_load_and_what_its_leases_bring(
    autojump_clock: MockClock,
) -> None:
    load = UtilizationConfig(step=0.5, every_s=10.0)
    terms = OfferConfig(price=2.0, floor=0.5, strategy="utilization", utilization=load, lease_s=1000.0)
    lease_service = LeaseService(
        Arbiter(WorkerCapacity(Resources(cpu=1), [TRAIN]), terms, lambda: PeerRef(peer="W")), lambda _: None
    )
    heard = request(0)
    lease_service.handle(replace(heard, request=replace(heard.request, bid=2.5)))
    await trio.sleep(0.3)
    [sent] = [one for one in lease_service.handle(Tick()) if isinstance(one, SendOffer)]
    lease_service.handle(RenewAsked(sent.offer.lease_id, "S"))
    await trio.sleep(10.0)
    lease_service.handle(Tick())
    assert (
        lease_service.arbiter.pricing.in_words == "3 a lease (2 at rest, floor 0.5, utilization, load 100 %)"
    )
    shown = {labels["of"]: amount for labels, amount in prices(lease_service)}
    assert shown == {"floor": 0.5, "rest": 2.0, "threshold": 3.0, "leases": 2.5}


async def test_a_renewal_says_whether_others_ask_for_what_is_leased(autojump_clock: MockClock) -> None:
    lease_service = lease_service_with([])
    now = trio.current_time()
    lease_service.handle(RequestReceived("S", replace(request(0).request, resources=Resources(cpu=3))))
    await trio.sleep(0.3)
    [sent] = [one for one in lease_service.handle(Tick()) if isinstance(one, SendOffer)]
    lease = lease_service.granted(RenewAsked(sent.offer.lease_id, "S"))
    assert lease_service.arbiter.ageing.contention(lease, now) == (False, False)
    await trio.sleep(10.0)
    other = replace(request(1).request, scheduler=PeerRef(peer="T"))
    lease_service.handle(RequestReceived("T", other))
    await trio.sleep(0.3)
    lease_service.handle(Tick())
    assert lease_service.arbiter.ageing.contention(lease, trio.current_time()) == (True, False)

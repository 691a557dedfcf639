"""What a worker asks for, of whom, and who goes first: floor and price, load, affinity, age."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.worker.test_arbiter import TOTAL, TRAIN, arbiter, hear, offers, reasons, request

from hypha.config.offers import AffinityConfig, OfferConfig, UtilizationConfig
from hypha.journal import Journal
from hypha.messages import ExecutorClass, PeerRef, Resources, WorkerRequest
from hypha.rules.leases import Release, Tick
from hypha.worker.leasing.ageing import FORGOTTEN_S
from hypha.worker.leasing.arbiter import Arbiter
from hypha.worker.leasing.events import Ignored, OfferFailed, RenewAsked, RequestReceived
from hypha.worker.leasing.terms import Pricing, load_of

HALF = Resources(cpu=4, memory=16, gpu=8)


def accept(worker: Arbiter, now: float, *requests: WorkerRequest, cached: bool = False) -> list[str]:
    """Have each of them accepted; ids of the leases, which live for a long while."""
    for one in requests:
        worker.handle(RequestReceived(one.scheduler.peer, one, cached=cached), now)
    assert worker.next_wake is not None
    found = []
    for sent in offers(worker.handle(Tick(), now + 0.2)):
        worker.handle(RenewAsked(sent.offer.lease_id, sent.scheduler.peer), now + 0.2)
        found.append(sent.offer.lease_id)
    return found


def price(worker: Arbiter, now: float, asked: WorkerRequest, cached: bool = False) -> float:
    """What is asked for it now; the offer is refused at once."""
    worker.handle(RequestReceived(asked.scheduler.peer, asked, cached=cached), now)
    [sent] = offers(worker.handle(Tick(), now + 0.2))
    worker.handle(OfferFailed(sent.offer.lease_id, "too dear"), now + 0.2)
    return sent.offer.price


# --- floor, price, bid ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terms", "bid", "paid"),
    [
        ({"price": 2.0}, 1.0, 2.0),  # a counter-offer
        ({"price": 2.0}, 3.0, 3.0),  # who bids more pays more
        ({"price": 2.0, "floor": 1.0}, 1.0, 2.0),
        ({"price": 1.0, "floor": 2.0}, 2.0, 2.0),  # never below the floor
        ({"price": 2.0, "counter": False}, 2.0, 2.0),
    ],
)
def test_an_offer_is_at_the_price_or_at_the_bid_where_that_is_higher(
    terms: dict[str, object], bid: float, paid: float
) -> None:
    assert price(arbiter(**terms), 0.0, request(bid=bid)) == paid  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("terms", "why"),
    [
        ({"price": 2.0, "floor": 1.5}, "below this worker's floor of 1.5"),
        ({"price": 2.0, "counter": False}, "below this worker's price of 2"),
    ],
)
def test_a_bid_below_the_floor_or_without_counter_offers_below_the_price_gets_none(
    terms: dict[str, object], why: str
) -> None:
    worker = arbiter(**terms)  # type: ignore[arg-type]
    [reason] = reasons(hear(worker, 0.0, request(bid=1.0)))
    assert why in reason
    assert worker.book.free == TOTAL


# --- utilization ------------------------------------------------------------------------------------------

UTILIZATION = UtilizationConfig(low=0.3, high=0.8, step=0.5, every_s=10.0, least=0.5, most=3.0)


def busy_and_idle() -> Arbiter:
    return arbiter(strategy="utilization", price=2.0, utilization=UTILIZATION, lease_s=10_000.0)


def test_the_load_is_the_share_of_the_most_used_resource() -> None:
    assert load_of(Resources(), TOTAL) == 0.0
    assert load_of(Resources(cpu=2, gpu=12), TOTAL) == 0.75
    assert load_of(Resources(cpu=1), Resources()) == 0.0


def test_an_overloaded_worker_raises_its_price_step_by_step_and_an_idle_one_lowers_it() -> None:
    worker = busy_and_idle()
    leases = accept(worker, 0.0, request("A", resources=HALF), request("B", "r2", resources=HALF))
    assert worker.pricing.load == 1.0
    assert worker.pricing.asked == 2.0
    seen = {}
    while (wake := worker.next_wake) is not None and wake < 1000.0:
        worker.handle(Tick(), wake)
        seen[round(wake, 1)] = worker.pricing.asked
    assert seen == {10.2: 3.0, 20.2: 4.5, 30.2: 6.0}, "by half each time, up to three times the price"
    # with half of it leased the price stays where it is
    worker.handle(Release(leases[0], "A"), 1000.0)
    worker.handle(Tick(), 2000.0)
    assert worker.pricing.asked == 6.0
    worker.handle(Release(leases[1], "B"), 2000.0)
    worker.handle(Tick(), 2009.9)
    assert worker.pricing.asked == 6.0
    worker.handle(Tick(), 2010.0)
    assert worker.pricing.asked == 4.5
    worker.handle(Tick(), 9000.0)
    assert worker.pricing.asked == 1.0, "and never below half of the price at rest"
    assert worker.next_wake is None


def test_the_price_is_asked_when_it_is_higher_and_a_temporary_lease_is_no_load() -> None:
    worker = busy_and_idle()
    worker.handle(Tick(), 0.0)
    worker.handle(RequestReceived("S", request(resources=TOTAL)), 1.0)
    worker.handle(Tick(), 1.2)
    assert worker.pricing.load == 0.0
    worker.handle(Tick(), 500.0)
    assert price(worker, 500.0, request("S2", bid=0.1)) == 1.0
    accept(worker, 501.0, request("S3", resources=Resources(cpu=7)))
    worker.handle(Tick(), 1000.0)
    assert price(worker, 1000.0, request("S2", bid=0.1, resources=Resources(cpu=1))) == 6.0


def test_a_load_that_swings_around_one_threshold_does_not_make_the_price_swing() -> None:
    pricing = Pricing(OfferConfig(strategy="utilization", utilization=UTILIZATION))
    for second in range(200):
        pricing.follow(0.85 if second % 2 else 0.75, float(second))
    assert pricing.asked == 1.0, "no threshold was passed for ten seconds"


@given(
    floor=st.floats(0, 1e6),
    rest=st.floats(0, 1e6),
    step=st.floats(0.01, 10),
    least=st.floats(0.001, 1),
    most=st.floats(1, 1000),
    loads=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 500)), max_size=30),
)
def test_whatever_the_load_the_price_stays_within_its_bounds(
    floor: float, rest: float, step: float, least: float, most: float, loads: list[tuple[float, float]]
) -> None:
    load = UtilizationConfig(step=step, least=least, most=most, every_s=1.0)
    pricing = Pricing(OfferConfig(price=rest, floor=floor, strategy="utilization", utilization=load))
    now = 0.0
    for share, lasts_s in loads:
        pricing.follow(share, now)
        pricing.validate()
        now += lasts_s


# --- affinity ---------------------------------------------------------------------------------------------


def preferring(**affinity: object) -> Arbiter:
    made = AffinityConfig(preference=2.0, **affinity)  # type: ignore[arg-type]
    return arbiter(strategy="affinity", price=2.0, floor=0.9, affinity=made)


def test_less_is_asked_of_a_preferred_scheduler_and_for_a_cached_dataset() -> None:
    worker = preferring(schedulers=["friend"])
    assert price(worker, 0.0, request("stranger")) == 2.0
    assert price(worker, 1.0, request("friend", "r2")) == 1.0
    assert price(worker, 2.0, request("stranger"), cached=True) == 1.0
    assert price(preferring(cached=False), 0.0, request("stranger"), cached=True) == 2.0


def test_a_preferred_bid_goes_before_a_higher_one_that_is_not_twice_as_high() -> None:
    for rich, first in ((1.9, "friend"), (2.1, "stranger")):
        worker = preferring(schedulers=["friend"])
        asked = [
            request("stranger", "r1", bid=rich, resources=TOTAL),
            request("friend", "r2", resources=TOTAL),
        ]
        [sent] = offers(hear(worker, 0.0, *asked))
        assert sent.scheduler.peer == first


def test_a_preferred_bid_is_not_below_the_floor_either() -> None:
    [reason] = reasons(hear(preferring(schedulers=["friend"]), 0.0, request("friend", bid=0.8)))
    assert "floor" in reason


# --- age --------------------------------------------------------------------------------------------------


def compete(worker: Arbiter, now: float, rich: str, lease_s: float = 9.0) -> str:
    """Both ask for everything; the winner accepts, and gives it back before the next one. Who won."""
    asked = [
        request("poor", "p", bid=1.0, resources=TOTAL),
        request(rich, f"r{now}", bid=4.0, resources=TOTAL),
    ]
    [sent] = offers(hear(worker, now, *asked))
    winner = sent.scheduler.peer
    worker.handle(RenewAsked(sent.offer.lease_id, winner), now + 0.2)
    worker.handle(Release(sent.offer.lease_id, winner), now + lease_s)
    return winner


@pytest.mark.parametrize("ageing_s", [20.0, None])
def test_who_bids_a_quarter_wins_after_three_times_the_age_that_doubles_a_bid(
    ageing_s: float | None,
) -> None:
    worker = arbiter(ageing_s=ageing_s, keep_after_s=None)
    won = [compete(worker, 10.0 * number, "rich") for number in range(20)]
    if ageing_s is None:
        assert set(won) == {"rich"}
    else:
        # after 70.2 s its bid of 1 counts as 1 + 70.2 / 20, more than 4 (1 + 0.2 / 20); it begins anew then
        assert [number for number, one in enumerate(won) if one == "poor"] == [7, 15]


def test_a_bid_of_nothing_wins_in_the_end_too() -> None:
    worker = arbiter(price=0.5, ageing_s=1.0, keep_after_s=None)
    won = []
    for number in range(200):
        now = 5.0 * number
        asked = [
            request("free", "f", bid=0.0, resources=TOTAL),
            request("rich", f"r{number}", bid=4.0, resources=TOTAL),
        ]
        [sent] = offers(hear(worker, now, *asked))
        won.append(sent.scheduler.peer)
        worker.handle(RenewAsked(sent.offer.lease_id, won[-1]), now + 0.2)
        worker.handle(Release(sent.offer.lease_id, won[-1]), now + 4.0)
    # it counts as a hundredth of the price: 0.005 (1 + 960.2) is more than 4 (1 + 0.2)
    assert won.index("free") == 192


def test_who_is_not_heard_for_a_while_begins_to_wait_anew() -> None:
    worker = arbiter(ageing_s=20.0, keep_after_s=None)
    assert [compete(worker, 10.0 * number, "rich") for number in range(6)] == ["rich"] * 6
    silent_for = FORGOTTEN_S + 20.0
    assert [compete(worker, 60.0 + silent_for + 10.0 * number, "rich") for number in range(6)] == ["rich"] * 6


def test_who_refuses_an_offer_waits_anew_and_who_was_not_reached_goes_on() -> None:
    for undelivered, wins in ((False, "rich"), (True, "poor")):
        worker = arbiter(ageing_s=20.0, keep_after_s=None)
        for number in range(6):
            assert compete(worker, 10.0 * number, "rich") == "rich"
        [sent] = offers(hear(worker, 62.0, request("poor", "p", bid=1.0)))
        worker.handle(OfferFailed(sent.offer.lease_id, "", undelivered=undelivered), 62.3)
        assert compete(worker, 70.0, "rich") == wins


def test_what_becomes_free_is_kept_for_a_large_request_that_has_waited_long_enough() -> None:
    worker = arbiter(keep_after_s=60.0, ageing_s=None, lease_s=10_000.0)
    running = accept(worker, 0.0, request("small", "s0", bid=9.0, resources=HALF))
    large = request("large", "l", bid=1.0, resources=TOTAL)
    given = []
    for number in range(1, 20):
        now = 10.0 * number
        # small ones come all the time, and one of them always runs
        small = request(f"small {number}", f"s{number}", bid=9.0, resources=HALF)
        actions = hear(worker, now, large, small)
        for sent in offers(actions):
            given.append((now, sent.scheduler.peer))
            worker.handle(RenewAsked(sent.offer.lease_id, sent.scheduler.peer), now + 0.2)
            running.append(sent.offer.lease_id)
        if running:
            lease = worker.book.get(running.pop(0))
            assert lease is not None
            worker.handle(Release(lease.lease_id, lease.scheduler), now + 5.0)
    assert [peer for now, peer in given if now < 70.0] == [f"small {number}" for number in range(1, 7)]
    assert next((now, peer) for now, peer in given if now >= 70.0) == (80.0, "large")


def test_beside_what_is_kept_there_may_be_room_for_others() -> None:
    worker = arbiter(keep_after_s=60.0, lease_s=10_000.0)
    [running] = accept(worker, 0.0, request("small", "s0", resources=Resources(cpu=5)))
    large = request("large", "l", resources=Resources(cpu=4))
    for now in (1.0, 20.0, 40.0, 60.0):
        hear(worker, now, large)
    tiny = request("tiny", "t", resources=Resources(memory=1))
    assert reasons(hear(worker, 62.0, tiny)) == [
        "what is free is kept for a request that has waited for longer"
    ]
    worker.handle(Release(running, "small"), 63.0)
    assert [sent.scheduler.peer for sent in offers(hear(worker, 64.0, tiny))] == ["tiny"]
    # whoever it was kept for stopped asking
    other = request("other", "o", resources=Resources(cpu=8))
    assert offers(hear(worker, 80.0, other)) == []
    assert [sent.scheduler.peer for sent in offers(hear(worker, 62.0 + FORGOTTEN_S, other))] == ["other"]


def test_a_lease_that_runs_is_not_taken_away_for_a_higher_bid_or_an_older_request() -> None:
    worker = arbiter(ageing_s=1.0, keep_after_s=1.0, lease_s=10_000.0)
    [running] = accept(worker, 0.0, request("poor", bid=1.0, resources=TOTAL))
    for second in range(1, 300, 5):
        actions = hear(worker, float(second), request("rich", "z", bid=1e9, resources=TOTAL))
        assert [type(action) for action in actions] == [Ignored]
    assert worker.book.get(running) is not None
    lease = worker.book.get(running)
    assert lease is not None
    assert worker.ageing.contention(lease, 300.0) == (True, False), "others ask, and began later"
    assert worker.ageing.contention(lease, 300.0 + FORGOTTEN_S) == (False, False)


def test_a_lease_is_outranked_by_whoever_began_to_ask_before_its_owner_did() -> None:
    worker = arbiter(lease_s=10_000.0)
    blocking = accept(worker, 0.0, request("first", "f", bid=9.0, resources=HALF))
    large = request("old", "o", resources=TOTAL)
    hear(worker, 1.0, large)
    [young] = accept(worker, 20.0, request("young", "y", resources=HALF))
    hear(worker, 21.0, large)
    lease = worker.book.get(young)
    assert lease is not None
    assert worker.ageing.contention(lease, 22.0) == (True, True)
    # what gives way and asks again soon is as old as it was; another request of its is not
    worker.handle(Release(blocking[0], "first"), 30.0)
    hear(worker, 40.0, large)
    assert accept(worker, 50.0, request("first", "f", resources=HALF)) != []
    first = worker.book.live_for("first", "f")
    assert first is not None
    hear(worker, 51.0, large)
    assert worker.ageing.contention(first, 52.0) == (True, False)
    worker.handle(Release(first.lease_id, "first"), 53.0)
    assert accept(worker, 54.0, request("first", "another", resources=HALF)) != []
    another = worker.book.live_for("first", "another")
    assert another is not None
    hear(worker, 55.0, large)
    assert worker.ageing.contention(another, 56.0) == (True, True)


def test_of_two_that_began_to_ask_at_the_same_time_all_workers_take_the_same_one_for_the_older() -> None:
    outranked = {}
    for owner, other in (("a", "b"), ("b", "a")):
        worker = arbiter()
        # whoever was heard first was served first
        [lease_id] = accept(worker, 0.0, request(f"S{owner}", owner, resources=TOTAL))
        hear(worker, 1.0, request(f"S{other}", other, resources=TOTAL))
        lease = worker.book.get(lease_id)
        assert lease is not None
        outranked[owner] = worker.ageing.contention(lease, 2.0)
    assert outranked == {"a": (True, False), "b": (True, True)}


@pytest.mark.parametrize("bid", [1e308, 1e-308, 5e-324])
def test_absurd_bids_and_amounts_are_put_in_some_order(bid: float) -> None:
    worker = arbiter(ageing_s=0.1)
    kinds: list[ExecutorClass] = ["train", "aggregate"]
    asked = [
        WorkerRequest(
            request_id=f"{kind} {amount}",
            scheduler=PeerRef(peer=f"S {amount}"),
            resources=Resources(cpu=amount),
            executor=TRAIN,
            count=1,
            bid=bid,
            offer_within_s=1.0,
        )
        for kind in kinds
        for amount in (0.0, 5e-324, 1e-300, 8.0)
    ]
    for now in (0.0, 1e6):
        assert all(math.isfinite(sent.before) for sent in offers(hear(worker, now, *asked)))
        worker.handle(Tick(), now + 100.0)


def test_the_terms_are_in_the_journal() -> None:
    journal = Journal(checked=True)
    arbiter(journal=journal, strategy="affinity", affinity=AffinityConfig(schedulers=["a"]))
    began = journal.entries[0].event
    assert OfferConfig.model_validate(began.terms).affinity.schedulers == ["a"]  # type: ignore[attr-defined]

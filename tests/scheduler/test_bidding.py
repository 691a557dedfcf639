"""What a scheduler bids, and when it gives way: numbers for a clock, no network."""

from __future__ import annotations

import math

import msgspec
import pytest
from tests.scheduler.test_allocator import NEED, SERVER, TRAIN, accepted, choose, dismissed, give, offer

from hypha.journal import Journal
from hypha.messages import PeerRef, Resources
from hypha.rules.leases import Tick
from hypha.scheduler.leasing.allocator import Allocator
from hypha.scheduler.leasing.events import (
    Adopted,
    Advertise,
    AllocatorAction,
    Begun,
    Contended,
    Decline,
    Gained,
    GiveBack,
    LeaseFailed,
    Search,
    SearchTimes,
    Want,
    Worked,
)
from hypha.scheduler.leasing.track_records import TrackRecord


def raising(**changes: object) -> Search:
    asked = {"bid": 1.0, "max_price": 3.0, "raise_after_s": 10.0, "raise_by": 0.25, **changes}
    return msgspec.structs.replace(TRAIN, **asked)


def bids(allocator: Allocator, until: float) -> list[tuple[float, float]]:
    """Whenever another bid is published: when, and which; by the allocator's own wake-ups."""
    found: list[tuple[float, float]] = []
    while (wake := allocator.next_wake) is not None and wake <= until:
        for action in allocator.handle(Tick(), wake):
            if isinstance(action, Advertise) and (not found or found[-1][1] != action.bid):
                found.append((wake, action.bid))
    return found


def test_the_bid_is_raised_in_steps_up_to_the_private_maximum_while_workers_are_missing() -> None:
    allocator = Allocator([raising()], journal=Journal(checked=True))
    [first] = allocator.handle(Want("train", 2), 0.0)
    assert isinstance(first, Advertise)
    assert first.request(PeerRef(peer="S")).bid == 1.0
    published = bids(allocator, 100.0)
    assert [bid for _, bid in published] == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert [at for at, _ in published[1:]] == [10.0, 20.0, 30.0, 40.0]
    assert allocator.bid("train") == 3.0


def test_without_a_time_for_it_the_bid_stays() -> None:
    allocator = Allocator([raising(raise_after_s=None)], journal=Journal(checked=True))
    allocator.handle(Want("train", 2), 0.0)
    assert [bid for _, bid in bids(allocator, 1000.0)] == [1.0]


def test_once_all_are_held_the_next_search_begins_with_the_bid() -> None:
    allocator = Allocator([raising()], journal=Journal(checked=True))
    allocator.handle(Want("train", 1), 0.0)
    bids(allocator, 25.0)
    assert allocator.bid("train") == 2.0
    assert choose(allocator, offer("W1", price=2.0), at=25.0) == "W1"
    # as long as its acceptance is not confirmed the bid is kept, and not raised either
    assert allocator.bid("train") == 2.0
    allocator.handle(Gained("lease of W1 for rt"), 31.0)
    assert allocator.bid("train") == 1.0
    allocator.handle(Tick(), 500.0)
    [again] = [
        one
        for one in allocator.handle(LeaseFailed("lease of W1 for rt"), 500.0)
        if isinstance(one, Advertise)
    ]
    assert again.bid == 1.0
    assert [bid for _, bid in bids(allocator, 515.0)] == [1.0, 1.5]


def test_a_counter_offer_within_the_maximum_is_taken_and_a_cheaper_offer_before_it() -> None:
    allocator = Allocator([raising()], journal=Journal(checked=True))
    allocator.handle(Want("train", 1), 0.0)
    answers = give(
        allocator, offer("dear", price=3.1), offer("counter", price=2.9), offer("at the bid", price=1.0)
    )
    assert [one.cause for one in answers if isinstance(one, Decline)] == ["price"]
    decided = allocator.handle(Tick(), 0.5)
    assert accepted(decided) == ["at the bid"]
    assert dismissed(decided) == ["counter"]
    allocator.handle(Want("train", 2), 1.0)
    assert choose(allocator, offer("counter", lease_id="l2", price=2.9), at=1.0) == "counter"


@pytest.mark.parametrize(
    "wrong",
    [
        {"bid": math.nan},
        {"bid": -1.0},
        {"bid": 4.0},
        {"max_price": math.inf},
        {"raise_after_s": 0.0},
        {"raise_by": 0.0},
        {"raise_by": 1.5},
    ],
)
def test_bids_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"bid"):
        Allocator([raising(**wrong)])


# --- giving way -------------------------------------------------------------------------------------------

PATIENT = SearchTimes(yield_after_s=60.0)


def short(pace: SearchTimes = PATIENT, request_id: str = "rt", outranked: bool = True) -> Allocator:
    """It needs two to begin, holds one, and others have asked for that one for longer; since 1.0."""
    train = msgspec.structs.replace(TRAIN, least=2, request_id=request_id)
    server = msgspec.structs.replace(SERVER, least=1)
    allocator = Allocator([train, server], pace, Journal(checked=True))
    allocator.handle(Want("train", 2), 0.0)
    give(allocator, offer("W1", request_id=request_id, lease_id="l1"))
    assert accepted(allocator.handle(Tick(), 0.5)) == ["W1"]
    allocator.handle(Gained("l1"), 0.6)
    allocator.handle(Contended("l1", True, outranked), 1.0)
    return allocator


def until_given_back(allocator: Allocator, until: float) -> float | None:
    while (wake := allocator.next_wake) is not None and wake <= until:
        if any(isinstance(one, GiveBack) for one in allocator.handle(Tick(), wake)):
            return wake
    return None


def advertisements(allocator: Allocator, until: float) -> list[float]:
    found = []
    while (wake := allocator.next_wake) is not None and wake <= until:
        found += [wake for one in allocator.handle(Tick(), wake) if isinstance(one, Advertise)]
    return found


def test_a_job_that_cannot_begin_gives_back_what_others_ask_for_and_is_silent_for_a_while() -> None:
    allocator = short()
    at = until_given_back(allocator, 500.0)
    assert at is not None
    assert 61.0 <= at <= 121.0
    # what still comes is not wanted, and the lease is over
    [declined] = give(allocator, offer("W2"), at=at)
    assert isinstance(declined, Decline)
    assert declined.cause == "not-needed"
    actions: list[AllocatorAction] = allocator.handle(LeaseFailed("l1", avoid=False), at)
    assert actions == []
    asked = advertisements(allocator, at + 60.0)
    assert asked[0] == at + 10.0, "twice the longest pause between two requests: the others have been heard"
    # the next time it is silent for twice as long
    give(allocator, offer("W1", lease_id="l2"), at=at + 60.0)
    allocator.handle(Tick(), at + 61.0)
    allocator.handle(Gained("l2"), at + 61.0)
    allocator.handle(Contended("l2", True, True), at + 61.0)
    again = until_given_back(allocator, at + 500.0)
    assert again is not None
    allocator.handle(LeaseFailed("l2", avoid=False), again)
    assert advertisements(allocator, again + 60.0)[0] == again + 20.0


def test_the_job_that_asked_first_gives_way_ten_times_as_late() -> None:
    younger, older = until_given_back(short(), 500.0), until_given_back(short(outranked=False), 5000.0)
    assert younger is not None
    assert older is not None
    assert older - 1.0 == pytest.approx(10.0 * (younger - 1.0))


def test_two_jobs_do_not_give_way_at_the_same_time() -> None:
    times = {until_given_back(short(request_id=f"job {number}"), 500.0) for number in range(20)}
    assert len(times) == 20


def test_a_job_that_is_alone_trains_or_gets_more_keeps_what_it_has() -> None:
    for event in (Contended("l1", False), Begun(), Want("train", 0)):
        allocator = short()
        allocator.handle(event, 2.0)
        assert until_given_back(allocator, 1000.0) is None, event
    assert until_given_back(short(SearchTimes()), 1000.0) is None, "nobody told it to give way"
    # another worker begins the time anew
    allocator = short()
    at = until_given_back(short(), 500.0)
    assert at is not None
    allocator.handle(Want("train", 3), at - 1.0)
    give(allocator, offer("W2", lease_id="l2"), at=at - 1.0)
    allocator.handle(Tick(), at - 0.4)
    allocator.handle(Gained("l2"), at - 0.4)
    allocator.handle(Tick(), at)
    # with two it lacks the parameter server only where one is wanted
    assert until_given_back(allocator, 1000.0) is None


def test_a_lease_of_an_earlier_scheduler_is_given_back_too() -> None:
    allocator = short()
    allocator.handle(Want("aggregate", 1), 2.0)
    allocator.handle(Adopted("train", "l9", "W9"), 2.0)
    # two are held, and two are needed; what lacks is the parameter server
    at = until_given_back(allocator, 500.0)
    assert at is not None
    for lease in ("l1", "l9"):
        allocator.handle(LeaseFailed(lease, avoid=False), at)
    allocator.handle(Contended("l9", True), at)
    assert until_given_back(allocator, at + 500.0) is None, "nothing is held"


def test_a_job_whose_own_workers_leave_no_place_for_its_parameter_server_gives_one_back() -> None:
    train, server = msgspec.structs.replace(TRAIN, least=2), msgspec.structs.replace(SERVER, least=1)
    allocator = Allocator([train, server], PATIENT, Journal(checked=True))
    allocator.handle(Want("aggregate", 1), 0.0)
    allocator.handle(Want("train", 3), 0.0)
    give(allocator, *(offer(f"W{number}", lease_id=f"l{number}") for number in range(3)))
    assert len(accepted(allocator.handle(Tick(), 0.5))) == 3
    for number in range(3):
        allocator.handle(Gained(f"l{number}"), 0.6)
    given: list[str] = []
    while (wake := allocator.next_wake) is not None and wake <= 1000.0:
        for action in allocator.handle(Tick(), wake):
            if isinstance(action, GiveBack):
                given.append(action.lease_id)
                allocator.handle(LeaseFailed(action.lease_id, avoid=False), wake)
    assert given == ["l2"], "two are as many as it needs to begin"


# --- the ledger's word ------------------------------------------------------------------------------------


def test_a_speed_in_the_ledger_counts_after_a_restart() -> None:
    allocator = Allocator([msgspec.structs.replace(TRAIN, useful=2.0)], journal=Journal(checked=True))
    for worker, speed in (("slow", 1.0), ("usual", 40.0), ("fast", 90.0)):
        allocator.handle(TrackRecord(worker, rounds=9, samples_per_s=speed, capacity=1e9), 0.0)
    allocator.handle(Want("train", 1), 0.0)
    offers = [offer("slow", price=1.0), offer("usual", price=1.0), offer("fast", price=2.0)]
    # 90 for 2 is more than 40 for 1
    assert choose(allocator, *offers, at=0.0) == "fast"
    allocator.handle(Worked((("fast", 0.1),) * 20), 6.0)
    allocator.handle(Want("train", 2), 7.0)
    double = Resources(cpu=2 * NEED.cpu, memory=2 * NEED.memory, gpu=2 * NEED.gpu)
    again = [offer("slow", lease_id="s2", resources=double), offer("usual", lease_id="u2")]
    assert choose(allocator, *again, at=7.0) == "usual"

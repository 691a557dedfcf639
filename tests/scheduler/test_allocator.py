"""The allocator under numbers for a clock: which offers are taken, refused, ranked, replaced."""

from __future__ import annotations

import math
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypha import __version__
from hypha.features import NAMES
from hypha.journal import Journal
from hypha.messages import ExecutorDescriptor, PeerRef, Resources, WorkerOffer
from hypha.rules.leases import Tick
from hypha.scheduler.leasing.allocator import Allocator
from hypha.scheduler.leasing.events import (
    Accept,
    Advertise,
    AllocatorAction,
    Decline,
    Dismiss,
    Gained,
    GatewayChanged,
    Keep,
    LeaseFailed,
    Offered,
    Search,
    SearchTimes,
    Want,
    Worked,
    WorkerLeaves,
)
from hypha.scheduler.leasing.track_records import TrackRecord

NEED = Resources(cpu=1, memory=4, gpu=2)
TRAIN = Search(
    request_id="rt",
    executor=ExecutorDescriptor(kind="train", name="t"),
    resources=NEED,
    bid=1.0,
    max_price=2.0,
    dataset="digits",
)
SERVER = Search(
    request_id="ra",
    executor=ExecutorDescriptor(kind="aggregate", name="a"),
    resources=Resources(cpu=1),
    bid=1.0,
    max_price=1.0,
)


def offer(
    worker: str = "W1",
    *,
    lease_id: str | None = None,
    request_id: str = "rt",
    resources: Resources = NEED,
    price: float = 1.0,
    expires_in_s: float = 5.0,
) -> WorkerOffer:
    return WorkerOffer(
        lease_id=lease_id or f"lease of {worker} for {request_id}",
        request_id=request_id,
        worker=PeerRef(peer=worker),
        resources=resources,
        price=price,
        expires_in_s=expires_in_s,
    )


def wanting(count: int = 1, checked: bool = True) -> Allocator:
    allocator = Allocator([TRAIN, SERVER], journal=Journal(checked=checked))
    [advertised] = allocator.handle(Want("train", count), 0.0)
    assert advertised == Advertise(TRAIN, count, 0.5)
    return allocator


def give(allocator: Allocator, *offers: WorkerOffer, at: float = 0.1) -> list[AllocatorAction]:
    actions: list[AllocatorAction] = []
    for one in offers:
        actions += allocator.handle(Offered(one.worker.peer, one), at)
    return actions


def accepted(actions: list[AllocatorAction]) -> list[str]:
    return [action.offer.worker.peer for action in actions if isinstance(action, Accept)]


def dismissed(actions: list[AllocatorAction]) -> list[str]:
    return [action.worker.peer for action in actions if isinstance(action, Dismiss)]


def advertised(actions: list[AllocatorAction]) -> list[int]:
    return [action.count for action in actions if isinstance(action, Advertise)]


def test_a_request_says_what_is_asked_for_but_not_the_private_maximum() -> None:
    request = Advertise(TRAIN, 3, 0.5).request(PeerRef(peer="S"))
    assert (request.request_id, request.scheduler.peer, request.count, request.bid) == ("rt", "S", 3, 1.0)
    assert (request.resources, request.dataset, request.offer_within_s) == (NEED, "digits", 0.5)


def test_offers_are_collected_until_the_deadline_however_many_there_are() -> None:
    allocator = wanting(1)
    assert give(allocator, offer("W1", price=1.5), offer("W2", price=1.5)) == [
        Keep("lease of W1 for rt"),
        Keep("lease of W2 for rt"),
    ]
    assert allocator.next_wake == 0.5
    assert allocator.handle(Tick(), 0.49) == []
    give(allocator, offer("W3", price=0.5), at=0.49)
    actions = allocator.handle(Tick(), 0.5)
    assert accepted(actions) == ["W3"]
    assert dismissed(actions) == ["W1", "W2"]
    assert allocator.next_wake is None


def test_another_is_looked_for_as_soon_as_a_worker_says_that_it_ends() -> None:
    allocator = wanting(1)
    give(allocator, offer("first"))
    assert accepted(allocator.handle(Tick(), 1.0)) == ["first"]
    taken, other = (f"lease of {name} for rt" for name in ("first", "second"))
    allocator.handle(Gained(taken), 1.1)
    assert allocator.missing("train") == 0
    # said again and again, it is one worker that is missing
    assert advertised(allocator.handle(WorkerLeaves(taken), 5.0)) == [1]
    allocator.handle(WorkerLeaves(taken), 6.0)
    assert allocator.missing("train") == 1
    give(allocator, offer("second"), at=6.1)
    assert accepted(allocator.handle(Tick(), 7.0)) == ["second"]
    allocator.handle(Gained(other), 7.1)
    assert allocator.missing("train") == 0
    # its end changes nothing any more, and is no fault of it
    assert advertised(allocator.handle(LeaseFailed(taken, avoid=False), 9.0)) == []
    assert allocator.missing("train") == 0


def test_ranking_is_by_capacity_for_the_price() -> None:
    allocator = wanting(2)
    give(
        allocator,
        offer("small", price=1.0),
        offer("large", price=2.0, resources=Resources(cpu=2, memory=8, gpu=8)),
        offer("dear", price=2.0),
        offer("cheap", price=0.9),
    )
    actions = allocator.handle(Tick(), 0.5)
    assert accepted(actions) == ["large", "cheap"]
    assert dismissed(actions) == ["small", "dear"]


@given(st.integers())
def test_ranking_is_a_total_order(seed: int) -> None:
    everyone = [
        offer(f"W{index}", price=price, resources=Resources(cpu=1, memory=4, gpu=gpu))
        for index, (price, gpu) in enumerate([(1, 2), (1, 2), (2, 4), (0, 2), (0, 4), (0.5, 2), (1, 2)])
    ]
    Random(seed).shuffle(everyone)
    allocator = wanting(7)
    give(allocator, *everyone)
    assert accepted(allocator.handle(Tick(), 0.5)) == ["W4", "W3", "W5", "W0", "W1", "W6", "W2"]


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (offer(request_id="other"), "not-found"),
        (offer(resources=Resources()), "invalid"),
        (offer(resources=Resources(cpu=64, memory=400, gpu=1)), "invalid"),
        (offer(resources=Resources(cpu=1, memory=4, gpu=math.nan)), "invalid"),
        (offer(resources=Resources(cpu=1, memory=4, gpu=2, storage=-1)), "invalid"),
        (offer(resources=Resources(cpu=1, memory=4, gpu=math.inf)), "invalid"),
        (offer(price=-1.0), "invalid"),
        (offer(price=math.nan), "invalid"),
        (offer(price=2.01), "invalid"),
        (offer(expires_in_s=0.0), "invalid"),
        (offer(expires_in_s=math.nan), "invalid"),
    ],
)
def test_an_offer_that_does_not_answer_the_request_is_declined(bad: WorkerOffer, code: str) -> None:
    allocator = wanting()
    [declined] = give(allocator, bad)
    assert isinstance(declined, Decline)
    assert declined.code == code
    assert "2" not in declined.reason.replace("2.01", "")
    assert accepted(allocator.handle(Tick(), 0.5)) == []


def test_a_worker_that_lacks_what_the_job_needs_is_declined_and_told_what_to_do() -> None:
    needy = msgspec.structs.replace(TRAIN, needs=("bf16", "multi-label"))
    allocator = Allocator([needy, SERVER], journal=Journal(checked=True))
    [advertised] = allocator.handle(Want("train", 3), 0.0)
    assert isinstance(advertised, Advertise)
    request = advertised.request(PeerRef(peer="S"))
    assert (request.version, request.needs) == (__version__, ("bf16", "multi-label"))

    def stating(worker: str, version: str, *features: str) -> WorkerOffer:
        return msgspec.structs.replace(offer(worker), version=version, features=features)

    [declined] = give(allocator, stating("W1", ""))
    assert declined == Decline(
        "lease of W1 for rt",
        "unsupported",
        "the worker lacks what the job needs (multi-label); upgrade it to Hypha "
        f"{__version__} or later, or leave the multi-label loss out of the job",
        "features",
    )
    # a later version that gave a feature up
    [declined] = give(allocator, stating("W2", "9.0", "multi-label"))
    assert isinstance(declined, Decline)
    assert declined.cause == "features"
    give(allocator, stating("W3", "9.0", "multi-label", "bf16", "of-a-later-version"))
    give(allocator, stating("W4", __version__, *NAMES))
    assert accepted(allocator.handle(Tick(), 0.5)) == ["W3", "W4"]


def test_a_worker_that_states_no_version_is_taken_for_what_such_workers_can_do() -> None:
    needy = msgspec.structs.replace(TRAIN, needs=("torch-models", "bf16", "gradient-accumulation"))
    allocator = Allocator([needy, SERVER], journal=Journal(checked=True))
    allocator.handle(Want("train", 1), 0.0)
    give(allocator, offer("W1"))
    assert accepted(allocator.handle(Tick(), 0.5)) == ["W1"]


def test_nobody_offers_in_anothers_name() -> None:
    allocator = wanting()
    [declined] = allocator.handle(Offered("X", offer("W1")), 0.1)
    assert isinstance(declined, Decline)


def test_nobody_takes_the_lease_id_of_another() -> None:
    allocator = wanting(2)
    give(allocator, offer("W1", lease_id="l"))
    [declined] = give(allocator, offer("W2", lease_id="l"))
    assert isinstance(declined, Decline)
    assert accepted(allocator.handle(Tick(), 0.5)) == ["W1"]


def test_a_worker_is_taken_once_for_each_class_of_executor() -> None:
    allocator = wanting(2)
    allocator.handle(Want("aggregate", 1), 0.0)
    give(allocator, offer("W1"), offer("W1", request_id="ra"))
    assert accepted(allocator.handle(Tick(), 0.5)) == ["W1", "W1"]
    [declined] = give(allocator, offer("W1", lease_id="another"), at=0.6)
    assert isinstance(declined, Decline)
    assert declined.code == "duplicate"


def test_a_newer_offer_replaces_the_one_its_worker_gave_up() -> None:
    allocator = wanting()
    give(allocator, offer("W1", lease_id="old"))
    assert give(allocator, offer("W1", lease_id="new"), at=0.2) == [
        Keep("new"),
        Dismiss("old", PeerRef(peer="W1")),
    ]
    [accept] = allocator.handle(Tick(), 0.5)
    assert isinstance(accept, Accept)
    assert accept.offer.lease_id == "new"
    assert accept.expires_at == 5.2


def test_the_same_offer_again_gets_the_same_answer_and_counts_once() -> None:
    allocator = wanting(2)
    give(allocator, offer("W1"))
    assert give(allocator, offer("W1")) == [Keep("lease of W1 for rt")]
    assert accepted(allocator.handle(Tick(), 0.5)) == ["W1"]
    assert give(allocator, offer("W1"), at=0.6) == [Keep("lease of W1 for rt")]


def test_short_lived_offers_are_decided_on_while_they_can_still_be_accepted() -> None:
    allocator = wanting()
    give(allocator, offer("W1", expires_in_s=0.4))
    assert allocator.next_wake == pytest.approx(0.3)
    assert accepted(allocator.handle(Tick(), 0.31)) == ["W1"]


def test_an_offer_that_expired_meanwhile_is_not_accepted() -> None:
    allocator = wanting()
    give(allocator, offer("W1", expires_in_s=0.2))
    assert accepted(allocator.handle(Tick(), 0.4)) == []


def test_what_is_missing_is_advertised_again_with_growing_pauses() -> None:
    allocator = wanting(2)
    times = []
    while len(times) < 8:
        now = allocator.next_wake
        assert now is not None
        if advertised(allocator.handle(Tick(), now)):
            times.append(now)
    pauses = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0, 5.0]


def test_offers_after_the_deadline_are_decided_on_as_soon_as_no_more_come() -> None:
    allocator = wanting()
    allocator.handle(Tick(), 0.5)
    give(allocator, offer("late"), at=0.6)
    assert allocator.next_wake == pytest.approx(0.7)
    give(allocator, offer("later", price=0.5), at=0.69)
    assert allocator.handle(Tick(), 0.7) == []
    assert accepted(allocator.handle(Tick(), 0.79)) == ["later"]


def test_offers_that_trickle_in_late_do_not_put_the_decision_off_for_ever() -> None:
    allocator = wanting()
    allocator.handle(Tick(), 0.5)
    for index in range(7):
        now = 0.52 + index * 0.06
        give(allocator, offer(f"W{index}"), at=now)
        assert accepted(allocator.handle(Tick(), now)) == []
    assert allocator.next_wake == pytest.approx(0.98)
    allocator.handle(Tick(), 0.98)
    assert allocator.next_wake is None


def test_a_request_lets_late_offers_compete_with_its_own() -> None:
    allocator = wanting()
    allocator.handle(Tick(), 0.5)
    give(allocator, offer("late"), at=0.95)
    assert advertised(allocator.handle(Tick(), 1.0)) == [1]
    give(allocator, offer("own", price=0.5), at=1.3)
    assert allocator.next_wake == pytest.approx(1.45)
    assert accepted(allocator.handle(Tick(), 1.45)) == ["own"]


def test_nobody_is_taken_beyond_what_is_wanted() -> None:
    allocator = wanting()
    give(allocator, offer("W1"))
    allocator.handle(Tick(), 0.5)
    [declined] = give(allocator, offer("W2"), at=0.6)
    assert isinstance(declined, Decline)
    assert "no more" in declined.reason


def test_wanting_fewer_dismisses_what_is_on_the_table() -> None:
    allocator = wanting(2)
    give(allocator, offer("W1"))
    assert dismissed(allocator.handle(Want("train", 0), 0.2)) == ["W1"]
    assert allocator.next_wake is None


def test_a_lost_worker_is_replaced_at_once_by_another_if_there_is_one() -> None:
    allocator = wanting()
    give(allocator, offer("W1"))
    allocator.handle(Tick(), 0.5)
    allocator.handle(Gained("lease of W1 for rt"), 0.6)
    assert advertised(allocator.handle(LeaseFailed("lease of W1 for rt"), 50.0)) == [1]
    give(allocator, offer("W1", lease_id="again", price=0.1), offer("W2", price=2.0), at=50.1)
    actions = allocator.handle(Tick(), 50.5)
    assert accepted(actions) == ["W2"]
    assert dismissed(actions) == ["W1"]


def test_a_failed_worker_is_taken_when_nobody_else_offers_and_forgiven_later() -> None:
    allocator = wanting()
    give(allocator, offer("W1"))
    allocator.handle(Tick(), 0.5)
    allocator.handle(LeaseFailed("lease of W1 for rt"), 1.0)
    give(allocator, offer("W1", lease_id="again"), at=1.1)
    assert accepted(allocator.handle(Tick(), 1.6)) == ["W1"]
    allocator.handle(LeaseFailed("again", avoid=False), 2.0)
    late = 1.0 + SearchTimes().avoid_s
    allocator.handle(Tick(), late - 1)
    allocator.handle(Tick(), late - 0.5)
    give(allocator, offer("W1", lease_id="third", price=0.1), offer("W2"), at=late)
    assert accepted(allocator.handle(Tick(), late + 0.5)) == ["W1"]


def test_acceptances_that_always_fail_do_not_flood_the_network() -> None:
    allocator = wanting()
    now, requests, number = 0.0, 1, 0
    while now < 60.0:
        number += 1
        give(allocator, offer("W1", lease_id=f"l{number}"), at=now + 0.1)
        now += 0.7
        for action in allocator.handle(Tick(), now):
            if isinstance(action, Accept):
                requests += len(advertised(allocator.handle(LeaseFailed(action.offer.lease_id), now)))
            requests += isinstance(action, Advertise)
    assert 10 < requests < 35


def test_a_changed_gateway_hears_the_request_at_once_only_while_something_is_missing() -> None:
    allocator = wanting()
    for now in (0.5, 1.0, 1.5, 2.0):
        allocator.handle(Tick(), now)
    assert advertised(allocator.handle(GatewayChanged(), 2.1)) == [1]
    give(allocator, offer("W1"), at=2.2)
    allocator.handle(Tick(), 2.6)
    assert allocator.handle(GatewayChanged(), 2.7) == []


def test_a_gateway_that_changes_right_after_a_request_is_told_after_the_usual_pause() -> None:
    allocator = wanting()
    assert advertised(allocator.handle(GatewayChanged(), 0.1)) == []
    assert advertised(allocator.handle(Tick(), 0.5)) == []
    assert allocator.next_wake == 1.0
    assert advertised(allocator.handle(Tick(), 1.0)) == [1]
    # whoever was heard meanwhile is enough
    satisfied = wanting()
    satisfied.handle(GatewayChanged(), 0.1)
    give(satisfied, offer("W1"), at=0.2)
    actions = satisfied.handle(Tick(), 0.5)
    assert accepted(actions) == ["W1"]
    assert advertised(actions) == []
    assert satisfied.next_wake is None


def test_wanting_the_same_again_is_not_said_again() -> None:
    allocator = wanting()
    assert allocator.handle(Want("train", 1), 0.1) == []


def test_what_makes_no_sense_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="two asks"):
        Allocator([TRAIN, TRAIN])
    with pytest.raises(ValueError, match="aggregate"):
        Allocator([TRAIN]).handle(Want("aggregate", 1), 0.0)
    with pytest.raises(ValueError, match="cannot be wanted"):
        Allocator([TRAIN]).handle(Want("train", -1), 0.0)


def test_a_market_of_ten_thousand_offers_is_decided_quickly() -> None:
    # to check all of them after each of them would be what takes the time
    allocator = wanting(100, checked=False)
    random = Random(1)
    prices = [random.uniform(0.1, 2.0) for _ in range(10_000)]
    for index, price in enumerate(prices):
        allocator.handle(Offered(f"W{index:05}", offer(f"W{index:05}", price=price)), 0.1)
    actions = allocator.handle(Tick(), 0.5)
    best = sorted(range(10_000), key=prices.__getitem__)[:100]
    assert accepted(actions) == [f"W{index:05}" for index in best]
    assert len(dismissed(actions)) == 9_900


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.floats(0, 1.0)), max_size=80))
def test_never_more_than_wanted_and_every_offer_ends_somewhere(
    history: list[tuple[int, int, float]],
) -> None:
    """Whatever happens, taken <= the most wanted, and each kept offer is accepted or dismissed."""
    allocator = Allocator([TRAIN], journal=Journal(checked=True))
    now, number, most = 0.0, 0, 0
    kept: set[str] = set()
    taken: set[str] = set()

    def follow(actions: list[AllocatorAction]) -> None:
        for action in actions:
            match action:
                case Keep(lease_id):
                    kept.add(lease_id)
                case Accept(_, accepted_offer, expires_at):
                    assert expires_at > now
                    kept.remove(accepted_offer.lease_id)
                    taken.add(accepted_offer.lease_id)
                case Dismiss(lease_id, _):
                    kept.remove(lease_id)
                case _:
                    pass

    for what, argument, seconds in history:
        now += seconds
        if what == 0:
            most = max(most, argument)
            follow(allocator.handle(Want("train", argument), now))
        elif what in (1, 2):
            number += 1
            worker = f"W{argument}"
            follow(allocator.handle(Offered(worker, offer(worker, lease_id=f"l{number}")), now))
        elif what == 3 and taken:
            follow(allocator.handle(LeaseFailed(lost := min(taken)), now))
            taken.discard(lost)
        elif what == 4 and taken:
            follow(allocator.handle(Gained(min(taken)), now))
        else:
            follow(allocator.handle(Tick(), now))
        assert len(taken) <= most
    follow(allocator.handle(Want("train", 0), now))
    now += 10.0
    follow(allocator.handle(Tick(), now))
    assert not kept


# --- what was seen of workers ---------------------------------------------------------------------------


def choose(allocator: Allocator, *offers: WorkerOffer, at: float) -> str:
    """Who is taken of ``offers``, for the one place that is free from ``at`` on."""
    give(allocator, *offers, at=at + 0.1)
    (worker,) = accepted(allocator.handle(Tick(), at + 5.0))
    return worker


def test_capacity_that_the_job_cannot_use_counts_for_nothing() -> None:
    asked = msgspec.structs.replace(TRAIN, useful=2.0)
    allocator = Allocator([asked], journal=Journal(checked=True))
    allocator.handle(Want("train", 1), 0.0)
    moon = offer("moon", price=1.0, resources=Resources(cpu=1e9, memory=1e9, gpu=1e9))
    twice = offer("twice", price=0.9, resources=Resources(cpu=2, memory=8, gpu=4))
    assert choose(allocator, moon, twice, at=0.0) == "twice"


def test_an_absurd_offer_for_nothing_does_not_win_for_ever() -> None:
    allocator = wanting()
    now, taken = 0.0, []
    for number in range(12):
        for one in ("moon", "honest"):
            absurd = one == "moon"
            give(
                allocator,
                offer(
                    one,
                    lease_id=f"{one} {number}",
                    price=0.0 if absurd else 1.0,
                    resources=NEED,
                ),
                at=now + 0.1,
            )
        taken += accepted(allocator.handle(Tick(), now + 5.0))
        # whoever was taken is lost again: the one by its own fault, the other as the job is over
        allocator.handle(LeaseFailed(f"{taken[-1]} {number}", avoid=taken[-1] == "moon"), now + 6.0)
        # long after it was forgiven
        now += 3600.0
        allocator.handle(Tick(), now - 1.0)
        allocator.handle(Tick(), now - 0.5)
    assert taken[0] == "moon"
    assert taken[4:] == ["honest"] * 8


def test_who_fails_again_and_again_is_avoided_for_longer_each_time() -> None:
    allocator = wanting()
    for number, until in enumerate((120.0, 240.0, 360.0)):
        at = 10_000.0 * number
        allocator.handle(Tick(), at)
        give(allocator, offer("W1", lease_id=f"l{number}"), at=at + 0.1)
        assert accepted(allocator.handle(Tick(), at + 5.0)) == ["W1"]
        allocator.handle(LeaseFailed(f"l{number}"), at + 10.0)
        assert not allocator._is_avoided("W1", at + 11.0 + until)
        assert allocator._is_avoided("W1", at + 9.0 + until)


def test_a_measured_speed_goes_before_a_claimed_capacity() -> None:
    allocator = wanting(2)
    large = Resources(cpu=2, memory=8, gpu=4)
    give(allocator, offer("slow", resources=large), offer("fast", resources=NEED))
    assert set(accepted(allocator.handle(Tick(), 0.5))) == {"slow", "fast"}
    for _ in range(5):
        allocator.handle(Worked((("slow", 1.0), ("fast", 40.0))), 1.0)
    allocator.handle(Want("train", 0), 2.0)
    for worker in ("slow", "fast"):
        allocator.handle(LeaseFailed(f"lease of {worker} for rt", avoid=False), 2.0)
    allocator.handle(Want("train", 1), 3.0)
    offers = [offer("slow", lease_id="s2", resources=large), offer("fast", lease_id="f2", resources=NEED)]
    assert choose(allocator, *offers, at=3.0) == "fast"


def test_a_parameter_server_is_chosen_by_what_the_ledger_says_of_it() -> None:
    for known, chosen in (
        ([], "large"),
        ([TrackRecord("large", rounds=0, failures=1)], "small"),
        ([TrackRecord("small", rounds=3)], "small"),
        ([TrackRecord("large", rounds=200, failures=1), TrackRecord("small", rounds=1)], "large"),
    ):
        allocator = Allocator([SERVER], journal=Journal(checked=True))
        for record in known:
            allocator.handle(record, 0.0)
        allocator.handle(Want("aggregate", 1), 0.0)
        large = offer("large", request_id="ra", resources=Resources(cpu=8), price=0.5)
        small = offer("small", request_id="ra", resources=Resources(cpu=1))
        assert choose(allocator, large, small, at=0.0) == chosen, known

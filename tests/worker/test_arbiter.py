"""The arbiter under numbers for a clock: who gets an offer, of what, for how much, and who does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count

import msgspec
import pytest

from hypha import __version__
from hypha.config.offers import OfferConfig
from hypha.features import NAMES
from hypha.journal import Journal
from hypha.messages import ExecutorClass, ExecutorDescriptor, PeerRef, Resources, WorkerRequest
from hypha.rules.leases import Bind, Granted, LeaseEnded, Release, Tick
from hypha.worker.leasing.arbiter import MAX_WAITING, MAX_WAITING_OF_ONE, Arbiter
from hypha.worker.leasing.events import (
    ArbiterAction,
    Close,
    Ignored,
    OfferFailed,
    Reached,
    RenewAsked,
    RequestReceived,
    SendOffer,
)
from hypha.worker.leasing.vetting import LONGEST_PAUSE_S, WorkerCapacity

TOTAL = Resources(cpu=8, memory=32, gpu=16, storage=100)
TRAIN = ExecutorDescriptor(kind="train", name="diloco-transformer")
AGGREGATE = ExecutorDescriptor(kind="aggregate", name="parameter-server")


def arbiter(
    total: Resources = TOTAL, journal: Journal | None = None, gpus: Sequence[float] = (), **terms: object
) -> Arbiter:
    numbers = count(1)
    return Arbiter(
        WorkerCapacity(total, [TRAIN, AGGREGATE], gpus),
        OfferConfig(**terms),  # type: ignore[arg-type]
        lambda: PeerRef(peer="W"),
        lambda: f"lease-{next(numbers)}",
        journal or Journal(checked=True),
    )


def request(
    scheduler: str = "S",
    request_id: str = "r1",
    *,
    bid: float = 1.0,
    kind: ExecutorClass = "train",
    offer_within_s: float = 0.5,
    wanted: int = 1,
    resources: Resources = Resources(cpu=2, memory=8, gpu=4),  # noqa: B008  frozen
) -> WorkerRequest:
    return WorkerRequest(
        request_id=request_id,
        scheduler=PeerRef(peer=scheduler),
        resources=resources,
        executor=TRAIN if kind == "train" else AGGREGATE,
        count=wanted,
        bid=bid,
        offer_within_s=offer_within_s,
    )


def hear(worker: Arbiter, now: float, *requests: WorkerRequest) -> list[ArbiterAction]:
    """All in one window; what follows at its end."""
    actions: list[ArbiterAction] = []
    for one in requests:
        actions += worker.handle(RequestReceived(one.scheduler.peer, one), now)
    if worker.next_wake is not None and worker.next_wake <= now + 0.2:
        actions += worker.handle(Tick(), worker.next_wake)
    return actions


def offers(actions: list[ArbiterAction]) -> list[SendOffer]:
    return [action for action in actions if isinstance(action, SendOffer)]


def reasons(actions: list[ArbiterAction]) -> list[str]:
    return [action.reason for action in actions if isinstance(action, Ignored)]


def test_a_request_gets_an_offer_at_the_end_of_the_window_with_a_temporary_lease_behind_it() -> None:
    worker = arbiter()
    assert worker.handle(RequestReceived("S", request()), 10.0) == []
    assert worker.next_wake == 10.2
    assert worker.handle(Tick(), 10.19) == []
    [sent] = offers(worker.handle(Tick(), 10.2))
    assert sent.scheduler.peer == "S"
    assert sent.before == 10.5
    assert sent.offer.worker.peer == "W"
    assert (sent.offer.request_id, sent.offer.resources) == ("r1", request().resources)
    assert (sent.offer.price, sent.offer.expires_in_s) == (1.0, 5.0)
    assert worker.book.free == Resources(cpu=6, memory=24, gpu=12, storage=100)
    [ended] = worker.handle(Tick(), 15.2)
    assert isinstance(ended, LeaseEnded)
    assert worker.book.free == TOTAL


def test_an_offer_states_the_version_and_features_of_its_worker() -> None:
    [sent] = offers(hear(arbiter(), 0.0, request()))
    assert (sent.offer.version, sent.offer.features) == (__version__, NAMES)


def test_a_request_for_what_this_version_lacks_gets_no_offer() -> None:
    worker = arbiter()
    asked = msgspec.structs.replace(request(), needs=("bf16", "of-a-later-version"), version="9.0")
    [ignored] = hear(worker, 0.0, asked)
    assert ignored == Ignored(
        "r1",
        "S",
        f"its job needs what Hypha {__version__} does not have (of-a-later-version); upgrade this worker",
        "features",
    )
    assert worker.book.free == TOTAL
    assert offers(hear(worker, 1.0, msgspec.structs.replace(asked, needs=("bf16", "multi-label"))))


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (request(resources=Resources(cpu=1, gpu=80)), "more than this worker has"),
        (request(resources=Resources(cpu=1, gpu=math.nan)), "no sense"),
        (request(resources=Resources(cpu=-1)), "no sense"),
        (request(bid=math.nan), "bid makes no sense"),
        (request(bid=math.inf), "bid makes no sense"),
        (request(bid=-1.0), "bid makes no sense"),
        (request(bid=0.4), "floor of 0.5"),
        (request(offer_within_s=0.0), "no time"),
        (request(offer_within_s=math.nan), "no time"),
        (request(wanted=0), "no sense"),
    ],
)
@pytest.mark.parametrize("strategy", ["flexible", "whole"])
def test_what_the_worker_cannot_or_will_not_serve_gets_no_offer(
    bad: WorkerRequest, why: str, strategy: str
) -> None:
    worker = arbiter(floor=0.5, strategy=strategy)
    actions = hear(worker, 0.0, bad)
    assert offers(actions) == []
    assert why in reasons(actions)[0]
    assert worker.book.free == TOTAL


def test_an_executor_is_matched_by_class_and_name() -> None:
    worker = Arbiter(WorkerCapacity(TOTAL, [TRAIN]), OfferConfig(), lambda: PeerRef(peer="W"))
    assert "no executor 'parameter-server'" in reasons(hear(worker, 0.0, request(kind="aggregate")))[0]
    assert len(offers(hear(worker, 1.0, request()))) == 1


def test_nobody_asks_in_anothers_name() -> None:
    worker = arbiter()
    actions = worker.handle(RequestReceived("X", request("S")), 0.0)
    assert "another scheduler" in reasons(actions)[0]
    assert worker.next_wake is None


def test_the_price_is_the_owners_or_the_bid_where_that_is_higher() -> None:
    assert offers(hear(arbiter(price=2.0), 0.0, request(bid=1.0)))[0].offer.price == 2.0
    assert offers(hear(arbiter(price=2.0), 0.0, request(bid=3.0)))[0].offer.price == 3.0


def test_the_higher_bid_per_weighted_unit_goes_first_when_there_is_not_enough_for_all() -> None:
    small = Resources(gpu=4)
    worker = arbiter(Resources(gpu=16))
    actions = hear(
        worker,
        0.0,
        request("A", bid=1.0, resources=small),
        request("B", bid=3.0, resources=Resources(gpu=16)),
        request("C", bid=2.0, resources=Resources(gpu=12)),
    )
    # per weighted unit: A 1/100, B 3/400, C 2/300
    assert [sent.scheduler.peer for sent in offers(actions)] == ["A", "C"]
    assert reasons(actions) == ["what it asks for is not free now"]


def test_a_later_higher_bid_in_the_same_window_wins_and_equal_bids_go_by_arrival() -> None:
    worker = arbiter(Resources(cpu=2, memory=8, gpu=4))
    worker.handle(RequestReceived("A", request("A", bid=1.0)), 0.0)
    worker.handle(RequestReceived("B", request("B", bid=1.0)), 0.1)
    worker.handle(RequestReceived("C", request("C", bid=1.5)), 0.15)
    [sent] = offers(worker.handle(Tick(), 0.2))
    assert sent.scheduler.peer == "C"
    worker.handle(OfferFailed(sent.offer.lease_id, "gone"), 0.3)
    actions = hear(worker, 1.0, request("A"), request("B"))
    assert [sent.scheduler.peer for sent in offers(actions)] == ["A"]


def test_a_request_for_nothing_does_not_outbid_anybody() -> None:
    worker = arbiter()
    actions = hear(worker, 0.0, request("Z", resources=Resources()), request("A", bid=0.01))
    assert [sent.scheduler.peer for sent in offers(actions)] == ["A", "Z"]


def test_a_repeated_request_gets_no_second_reservation_while_a_lease_for_it_lives() -> None:
    worker = arbiter()
    assert len(offers(hear(worker, 0.0, request(), request()))) == 1
    assert reasons(hear(worker, 1.0, request())) == ["there is a lease for it"]
    worker.handle(RenewAsked("lease-1", "S"), 2.0)
    assert reasons(hear(worker, 10.0, request())) == ["there is a lease for it"]
    worker.handle(Release("lease-1", "S"), 11.0)
    assert len(offers(hear(worker, 11.0, request()))) == 1
    assert len(offers(hear(worker, 11.5, request("T")))) == 1


def test_a_repeated_request_gets_another_offer_after_expiry_even_when_nobody_looked_before() -> None:
    worker = arbiter()
    hear(worker, 0.0, request())
    assert len(offers(hear(worker, 5.2, request()))) == 1


def test_a_failed_offer_frees_at_once() -> None:
    worker = arbiter()
    [sent] = offers(hear(worker, 0.0, request()))
    worker.handle(OfferFailed(sent.offer.lease_id, "unreachable"), 0.3)
    assert worker.book.free == TOTAL


def test_a_short_deadline_shortens_the_window() -> None:
    worker = arbiter()
    worker.handle(RequestReceived("S", request(offer_within_s=0.1)), 0.0)
    assert worker.next_wake == 0.05


def test_an_offer_that_would_come_too_late_is_not_made() -> None:
    worker = arbiter()
    worker.handle(RequestReceived("S", request(offer_within_s=0.5)), 0.0)
    actions = worker.handle(Tick(), 0.5)
    assert reasons(actions) == ["an offer would come too late"]
    assert worker.book.free == TOTAL


def gpus_of(actions: list[ArbiterAction], worker: Arbiter) -> list[tuple[float, tuple[int, ...]]]:
    """Of each offer: GB of GPU memory, and the GPUs that its lease was given."""
    offers = [action.offer for action in actions if isinstance(action, SendOffer)]
    return [(offer.resources.gpu, worker.gpus.share_of(offer.lease_id).numbers) for offer in offers]


def test_each_job_gets_a_gpu_and_none_gets_what_is_left_of_two() -> None:
    worker = arbiter(gpus=(8.0, 8.0))
    one, other, third = (
        request(f"S{number}", f"r{number}", resources=Resources(cpu=1, gpu=gpu))
        for number, gpu in enumerate((6, 6, 4))
    )
    assert gpus_of(hear(worker, 0.0, one, other), worker) == [(6, (0,)), (6, (1,))]
    (ignored,) = hear(worker, 1.0, third)
    assert isinstance(ignored, Ignored)
    assert (ignored.cause, ignored.reason) == ("resources", "no GPU has as much memory free as it asks for")
    # temporary leases are over
    assert gpus_of(hear(worker, 20.0, msgspec.structs.replace(third, request_id="again")), worker) == [
        (4, (0,))
    ]


def test_whole_gives_what_one_job_can_use() -> None:
    worker = arbiter(strategy="whole", gpus=(8.0, 8.0))
    small = request("S1", "r1", kind="aggregate", resources=Resources(cpu=1, gpu=2))
    assert gpus_of(hear(worker, 0.0, small), worker) == [(2, (0,))]
    assert gpus_of(hear(worker, 0.5, request("S2", "r2")), worker) == [(8, (1,))], "not 14, of two"
    alone = arbiter(strategy="whole", gpus=(8.0, 8.0))
    assert gpus_of(hear(alone, 0.0, request()), alone) == [(16, (0, 1))]


def test_whole_gives_a_training_job_all_that_is_free_and_a_parameter_server_what_it_asked_for() -> None:
    worker = arbiter(strategy="whole")
    [server] = offers(hear(worker, 0.0, request(kind="aggregate", resources=Resources(cpu=1, memory=2))))
    assert server.offer.resources == Resources(cpu=1, memory=2)
    [train] = offers(hear(worker, 1.0, request(request_id="r2")))
    assert train.offer.resources == Resources(cpu=7, memory=30, gpu=16, storage=100)
    assert worker.book.free == Resources()
    assert reasons(hear(worker, 2.0, request("T"))) == ["what it asks for is not free now"]


def test_a_training_job_and_a_parameter_server_fit_side_by_side() -> None:
    worker = arbiter()
    actions = hear(worker, 0.0, request(), request(request_id="r2", kind="aggregate"))
    assert [sent.offer.request_id for sent in offers(actions)] == ["r1", "r2"]
    for lease_id in ("lease-1", "lease-2"):
        worker.handle(RenewAsked(lease_id, "S"), 1.0)
    assert isinstance(worker.handle(Bind("lease-1", "S", "train", "job"), 2.0)[-1], Granted)
    assert isinstance(worker.handle(Bind("lease-2", "S", "aggregate", "job"), 2.0)[-1], Granted)


def test_the_first_renewal_accepts_for_the_length_of_a_lease() -> None:
    worker = arbiter(lease_s=30.0)
    hear(worker, 0.0, request())
    [granted] = worker.handle(RenewAsked("lease-1", "S"), 1.0)
    assert isinstance(granted, Granted)
    assert granted.lease.expires_at == 31.0


def test_a_flood_of_requests_does_not_grow_without_bound() -> None:
    worker = arbiter()
    refused = 0
    for index in range(MAX_WAITING + 10):
        asked = request(f"S{index}")
        refused += len(reasons(worker.handle(RequestReceived(f"S{index}", asked), 0.0)))
    assert refused == 10
    assert len(offers(worker.handle(Tick(), 0.2))) == 4


def test_a_scheduler_that_asks_under_many_names_holds_one_temporary_lease_and_leaves_room_for_others() -> (
    None
):
    worker = arbiter()
    refused = [
        one
        for index in range(100)
        for one in reasons(worker.handle(RequestReceived("S", request(request_id=f"r{index}", bid=9.0)), 0.0))
    ]
    assert len(refused) == 100 - MAX_WAITING_OF_ONE
    worker.handle(RequestReceived("S", request(request_id="server", kind="aggregate")), 0.0)
    worker.handle(RequestReceived("T", request("T")), 0.0)
    sent = [one.scheduler.peer for one in offers(worker.handle(Tick(), 0.2))]
    assert sent == ["S", "T"], "one for each class of executor, and the flood took the places of that"
    # until it has answered that one it gets no other
    assert "not answered" in reasons(worker.handle(RequestReceived("S", request(request_id="new")), 0.3))[0]
    worker.handle(RenewAsked("lease-1", "S"), 0.4)
    worker.handle(RequestReceived("S", request(request_id="new")), 0.5)
    assert len(offers(worker.handle(Tick(), 0.7))) == 1


def test_nothing_is_held_for_a_scheduler_that_cannot_be_reached() -> None:
    worker = arbiter()
    worker.handle(RequestReceived("gone", request("gone", resources=TOTAL, bid=99.0), reached=False), 0.0)
    worker.handle(RequestReceived("S", request("S", resources=TOTAL)), 0.1)
    # who bids more is waited for a moment longer, and not beyond what the other one allows
    assert offers(worker.handle(Tick(), 0.2)) == []
    assert worker.next_wake == pytest.approx(0.1 + 0.35)
    assert [one.scheduler.peer for one in offers(worker.handle(Tick(), 0.45))] == ["S"]
    assert reasons(worker.handle(Tick(), 0.5)) == ["its scheduler could not be reached in time"]
    worker.handle(Reached("gone", False), 0.6)
    worker.handle(RequestReceived("late", request("late", resources=Resources(cpu=0)), reached=False), 1.0)
    assert offers(worker.handle(Tick(), 1.2)) == []
    assert [one.scheduler.peer for one in offers(worker.handle(Reached("late", True), 1.3))] == ["late"]


def test_the_higher_bid_wins_though_it_is_connected_a_moment_later() -> None:
    for reached, first in ((True, "rich"), (False, "poor")):
        worker = arbiter()
        worker.handle(RequestReceived("poor", request("poor", resources=TOTAL)), 0.0)
        worker.handle(RequestReceived("rich", request("rich", resources=TOTAL, bid=9.0), reached=False), 0.0)
        assert offers(worker.handle(Tick(), 0.2)) == []
        sent = offers(worker.handle(Reached("rich", reached), 0.25))
        assert [one.scheduler.peer for one in sent] == [first]


@pytest.mark.parametrize("how", ["undelivered", "expired", "given back late"])
def test_offers_that_come_to_nothing_are_made_ever_more_seldom(how: str) -> None:
    worker = arbiter(temporary_lease_s=4.0)
    now, made = 0.0, []
    while now < 300.0:
        worker.handle(RequestReceived("S", request(request_id=f"at {now:g}")), now)
        for one in offers(worker.handle(Tick(), now + 0.2)):
            made.append(now)
            if how == "undelivered":
                worker.handle(OfferFailed(one.offer.lease_id, "no answer", undelivered=True), now + 0.3)
            elif how == "given back late":
                worker.handle(Tick(), now + 3.5)
                now += 3.5
                worker.handle(Release(one.offer.lease_id, "S"), now)
        now += 0.5
        worker.handle(Tick(), now)
    assert made[0] == 0.0
    assert made[1] < 5.0, "once may happen to anybody"
    assert 8 <= len(made) <= 18
    assert made[-1] - made[-2] >= LONGEST_PAUSE_S
    # who accepts one has a clean sheet
    worker.handle(Tick(), 310.0)
    now = 370.0
    worker.handle(RequestReceived("S", request(request_id="good")), now)
    (good,) = offers(worker.handle(Tick(), now + 0.2))
    worker.handle(RenewAsked(good.offer.lease_id, "S"), now + 0.3)
    worker.handle(RequestReceived("S", request(request_id="next")), now + 0.4)
    (following,) = offers(worker.handle(Tick(), now + 0.7))
    worker.handle(OfferFailed(following.offer.lease_id, "no answer", undelivered=True), now + 0.8)
    worker.handle(RequestReceived("S", request(request_id="one more")), now + 0.9)
    assert len(offers(worker.handle(Tick(), now + 1.2))) == 1


def test_offers_that_are_declined_or_given_back_at_once_are_no_failures() -> None:
    worker = arbiter()
    for number in range(20):
        now = float(number)
        worker.handle(RequestReceived("S", request(request_id=f"r{number}")), now)
        (one,) = offers(worker.handle(Tick(), now + 0.2))
        if number % 2:
            worker.handle(OfferFailed(one.offer.lease_id, "not needed"), now + 0.3)
        else:
            worker.handle(Release(one.offer.lease_id, "S"), now + 0.8)


def test_a_stopping_worker_offers_nothing_but_keeps_its_leases() -> None:
    worker = arbiter()
    hear(worker, 0.0, request())
    worker.handle(RenewAsked("lease-1", "S"), 1.0)
    worker.handle(RequestReceived("T", request("T")), 2.0)
    worker.handle(Close(), 2.1)
    assert worker.handle(Tick(), 2.2) == []
    assert reasons(hear(worker, 3.0, request("U"))) == ["this worker is drained, or stopping"]
    assert isinstance(worker.handle(RenewAsked("lease-1", "S"), 4.0)[-1], Granted)

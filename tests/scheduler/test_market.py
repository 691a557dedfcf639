"""Arbiters and allocators against each other under a virtual clock: no network, the real decisions.

Every message takes a random while, some are lost. What must hold whatever happens: no worker promises
more than it has, no scheduler believes in a lease that its worker has ended, and everybody gets what
there is.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import partial
from itertools import count
from random import Random

import pytest

from hypha.config.models import OfferConfig
from hypha.journal import Journal
from hypha.leases import Denied, Granted, Release, Tick
from hypha.messages import ExecutorDescriptor, PeerRef, Resources, WorkerOffer
from hypha.resources import fits
from hypha.scheduler.allocation import Accept, Advertise, Ask, Dismiss, Gained, Lost, Offered, Want
from hypha.scheduler.allocator import Allocator
from hypha.scheduler.allocator import Decline as OfferDeclined
from hypha.scheduler.renewal import Attempt, Lapsed, Renewal, RenewalFailed, RenewalRefused, Renewed
from hypha.worker.arbiter import Arbiter, Heard, OfferFailed, RenewAsked, SendOffer

TRAIN = ExecutorDescriptor(kind="train", name="t")
NEED = Resources(cpu=1, memory=1)


class World:
    """A heap of what happens when; ``loss`` is the chance that a message or its answer is lost."""

    def __init__(self, seed: int, loss: float = 0.0, delay_s: float = 0.05) -> None:
        self.random = Random(seed)
        self.loss = loss
        self.delay_s = delay_s
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self.workers: dict[str, Worker] = {}
        self.schedulers: dict[str, Scheduler] = {}

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (max(when, self.now), next(self._order), what))

    def travel(self, what: Callable[[], None]) -> None:
        """One way through the network."""
        if self.random.random() >= self.loss:
            self.at(self.now + self.random.uniform(0.2, 1.8) * self.delay_s, what)

    def run(self, until: float) -> None:
        while self._heap and self._heap[0][0] <= until:
            self.now, _, what = heapq.heappop(self._heap)
            what()
        self.now = until


class Worker:
    def __init__(self, world: World, name: str, total: Resources, price: float) -> None:
        self.world, self.name = world, name
        numbers = count()
        self.arbiter = Arbiter(
            total,
            [TRAIN],
            OfferConfig(price=price),
            lambda: PeerRef(peer=name),
            lambda: f"{name}/{next(numbers)}",
            Journal(checked=True),
        )
        self.alive = True

    def tell(self, event: object) -> list[object]:
        if not self.alive:
            return []
        actions = self.arbiter.handle(event, self.world.now)  # type: ignore[arg-type]
        assert fits(self.arbiter.book.used, self.arbiter.book.total)
        for action in actions:
            if isinstance(action, SendOffer):
                self.send(action)
        if self.arbiter.next_wake is not None:
            self.world.at(self.arbiter.next_wake, self.tick)
        return list(actions)

    def tick(self) -> None:
        wake = self.arbiter.next_wake
        if wake is not None and wake <= self.world.now:
            self.tell(Tick())

    def send(self, action: SendOffer) -> None:
        scheduler = self.world.schedulers[action.scheduler.peer]
        lease_id = action.offer.lease_id

        def arrive() -> None:
            for answer in scheduler.tell(Offered(self.name, action.offer)):
                if isinstance(answer, OfferDeclined):
                    self.world.travel(lambda: self.ignore(OfferFailed(lease_id, "declined")))

        self.world.travel(arrive)

    def ignore(self, event: object) -> None:
        self.tell(event)


class Scheduler:
    def __init__(self, world: World, name: str, bid: float, max_price: float) -> None:
        self.world, self.name = world, name
        ask = Ask(f"request of {name}", TRAIN, NEED, bid, max_price)
        self.allocator = Allocator([ask], journal=Journal(checked=True))
        self.renewals: dict[str, tuple[WorkerOffer, Renewal]] = {}
        self.held: dict[str, str] = {}

    def tell(self, event: object) -> list[object]:
        actions = self.allocator.handle(event, self.world.now)  # type: ignore[arg-type]
        for action in actions:
            match action:
                case Advertise():
                    heard = Heard(self.name, action.request(PeerRef(peer=self.name)))
                    for worker in self.world.workers.values():
                        self.world.travel(partial(worker.ignore, heard))
                case Accept(_, offer, expires_at):
                    now = self.world.now
                    journal = Journal(checked=True)
                    renewal = Renewal(expires_at - now, now, self.world.random, journal=journal)
                    self.renewals[offer.lease_id] = (offer, renewal)
                    self.renew(offer.lease_id, Tick())
                case Dismiss(lease_id, worker):
                    self.release(worker.peer, lease_id)
                case _:
                    pass
        if self.allocator.next_wake is not None:
            self.world.at(self.allocator.next_wake, self.tick)
        return list(actions)

    def tick(self) -> None:
        wake = self.allocator.next_wake
        if wake is not None and wake <= self.world.now:
            self.tell(Tick())

    def release(self, worker: str, lease_id: str) -> None:
        self.world.travel(lambda: self.world.workers[worker].ignore(Release(lease_id, self.name)))

    def renew(self, lease_id: str, event: object) -> None:
        if lease_id not in self.renewals:
            return
        offer, renewal = self.renewals[lease_id]
        if isinstance(event, Renewed) and lease_id not in self.held:
            self.held[lease_id] = offer.worker.peer
            self.tell(Gained(lease_id))
        for action in renewal.handle(event, self.world.now):  # type: ignore[arg-type]
            if isinstance(action, Attempt):
                self.attempt(offer, action.timeout_s)
            elif isinstance(action, Lapsed):
                del self.renewals[lease_id]
                self.held.pop(lease_id, None)
                self.tell(Lost(lease_id, avoid=not action.refused))
                if not action.refused:
                    self.release(offer.worker.peer, lease_id)
        self.world.at(min(renewal.next_wake, self.world.now + 1e6), lambda: self.wake(lease_id))

    def wake(self, lease_id: str) -> None:
        if lease_id in self.renewals and self.renewals[lease_id][1].next_wake <= self.world.now:
            self.renew(lease_id, Tick())

    def attempt(self, offer: WorkerOffer, timeout_s: float) -> None:
        lease_id = offer.lease_id
        answered = False

        def answer(event: object) -> None:
            nonlocal answered
            if not answered:
                answered = True
                self.renew(lease_id, event)

        def arrive() -> None:
            for action in self.world.workers[offer.worker.peer].tell(RenewAsked(lease_id, self.name)):
                if isinstance(action, Granted):
                    self.world.travel(partial(answer, Renewed(action.lease.expires_at - self.world.now)))
                elif isinstance(action, Denied):
                    self.world.travel(partial(answer, RenewalRefused(action.code, action.reason)))

        self.world.travel(arrive)
        self.world.at(self.world.now + timeout_s, lambda: answer(RenewalFailed("no answer")))

    def check(self) -> None:
        """Whoever is believed to be held really is: its worker has that lease for this scheduler."""
        for lease_id, peer in self.held.items():
            worker = self.world.workers[peer]
            if worker.alive:
                lease = worker.arbiter.book.get(lease_id)
                assert lease is not None
                assert lease.scheduler == self.name
                assert lease.accepted


def build(
    world: World, workers: int, schedulers: dict[str, tuple[float, float]], cpu: float = 1.0
) -> list[Scheduler]:
    for index in range(workers):
        name = f"W{index:05}"
        price = 0.5 + 0.5 * world.random.random()
        world.workers[name] = Worker(world, name, Resources(cpu=cpu, memory=4), price)
    for name, (bid, max_price) in schedulers.items():
        world.schedulers[name] = Scheduler(world, name, bid, max_price)
    return list(world.schedulers.values())


def test_twenty_workers_are_held_within_a_second_and_stay_held() -> None:
    world = World(1)
    [scheduler] = build(world, 20, {"S": (1.0, 1.0)})
    scheduler.tell(Want("train", 20))
    world.run(1.0)
    assert len(scheduler.held) == 20
    leases = set(scheduler.held)
    for second in range(1, 300):
        world.run(float(second))
        scheduler.check()
    assert set(scheduler.held) == leases


def test_the_higher_bid_gets_the_workers_when_there_are_not_enough() -> None:
    world = World(2, delay_s=0.02)
    poor, rich = build(world, 10, {"poor": (1.0, 5.0), "rich": (2.0, 5.0)})
    poor.tell(Want("train", 10))
    rich.tell(Want("train", 10))
    world.run(10.0)
    assert len(rich.held) == 10
    assert len(poor.held) == 0


def test_what_one_scheduler_leaves_the_other_gets() -> None:
    world = World(3)
    poor, rich = build(world, 10, {"poor": (1.0, 5.0), "rich": (2.0, 5.0)})
    poor.tell(Want("train", 6))
    rich.tell(Want("train", 4))
    world.run(20.0)
    assert (len(poor.held), len(rich.held)) == (6, 4)
    assert not set(poor.held.values()) & set(rich.held.values())


@pytest.mark.parametrize("seed", range(5))
def test_with_a_tenth_of_all_messages_lost_nothing_is_promised_twice_and_pools_fill(
    seed: int,
) -> None:
    world = World(seed, loss=0.1, delay_s=0.2)
    first, second = build(world, 12, {"A": (1.0, 2.0), "B": (1.0, 2.0)})
    first.tell(Want("train", 6))
    second.tell(Want("train", 6))
    filled = 0
    for half_second in range(1, 600):
        world.run(half_second / 2)
        first.check()
        second.check()
        filled += len(first.held) + len(second.held) == 12
    assert filled > 500


def test_dead_workers_are_replaced_and_their_leases_end_by_themselves() -> None:
    world = World(5)
    [scheduler] = build(world, 15, {"S": (1.0, 1.0)})
    scheduler.tell(Want("train", 10))
    world.run(5.0)
    dead = list(scheduler.held.values())[:4]
    for name in dead:
        world.workers[name].alive = False
    world.run(40.0)
    assert len(scheduler.held) == 10
    assert not set(dead) & set(scheduler.held.values())
    # the scheduler dies: without a word from it everything is free again
    scheduler.renewals.clear()
    scheduler.held.clear()
    world.schedulers["S"].allocator = Allocator([Ask("none", TRAIN, NEED, 1.0, 1.0)])
    world.run(80.0)
    for worker in world.workers.values():
        if worker.alive:
            assert worker.arbiter.book.free == worker.arbiter.book.total


def test_two_thousand_workers_in_one_market() -> None:
    world = World(6)
    everyone = build(world, 2000, {f"S{index}": (1.0, 1.0) for index in range(3)})
    for scheduler in everyone:
        scheduler.tell(Want("train", 300))
    world.run(5.0)
    assert [len(scheduler.held) for scheduler in everyone] == [300, 300, 300]

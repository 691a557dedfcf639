"""A market of workers and schedulers in memory: their real decisions, no network, no processes, no trio.

Arbiters, allocators and renewals are what the programs run; here messages between them take a random while,
and some are lost. One heap holds what happens when, so a run is decided by its seed, and thousands of them
take minutes: for rules that must hold in every interleaving. What must hold is asserted while a market runs.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from hypha.config.offers import OfferConfig
from hypha.journal import Journal
from hypha.messages import ExecutorDescriptor, PeerRef, Resources
from hypha.rules.leases import Tick
from hypha.scheduler.leasing.events import Decline, Offered
from hypha.worker.leasing.arbiter import Arbiter
from hypha.worker.leasing.events import ArbiterAction, ArbiterEvent, OfferFailed, SendOffer
from hypha.worker.leasing.terms import WorkerCapacity

if TYPE_CHECKING:
    from tests.market.scheduler import MarketScheduler

TRAIN = ExecutorDescriptor(kind="train", name="t")
AGGREGATE = ExecutorDescriptor(kind="aggregate", name="a")


def checked_journal() -> Journal:
    """Machines that have it assert what must hold after every event."""
    return Journal(kept=1, checked=True)


class Market:
    """``loss`` is the chance that a message is lost; one takes ``delay_s`` on average."""

    def __init__(self, seed: int | str, loss: float = 0.0, delay_s: float = 0.05) -> None:
        self.random = Random(seed)
        self.loss = loss
        self.delay_s = delay_s
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self.workers: dict[str, MarketWorker] = {}
        self.schedulers: dict[str, MarketScheduler] = {}

    def at(self, when: float, what: Callable[[], object]) -> None:
        """``what`` happens then, or now where that is over."""
        heapq.heappush(self._heap, (max(when, self.now), next(self._order), what))

    def travel(self, what: Callable[[], object]) -> None:
        """A message goes one way, and ``what`` happens where it arrives, if it does."""
        if self.random.random() >= self.loss:
            self.at(self.now + self.random.uniform(0.2, 1.8) * self.delay_s, what)

    def run(self, until: float) -> None:
        """Whatever happens up to ``until``."""
        while self._heap and self._heap[0][0] <= until:
            self.now, _, what = heapq.heappop(self._heap)
            self.events += 1
            what()
        self.now = max(self.now, until)

    def check(self) -> None:
        """Assert that nothing is booked twice: whatever a scheduler believes to hold, its worker holds for
        it alone, at a price that both agreed to. Each LeaseBook asserts that it holds no more than there is.
        """
        owners: dict[str, str] = {}
        for scheduler in self.schedulers.values():
            for lease_id, offer in scheduler.held.items():
                assert lease_id not in owners, (
                    f"{lease_id} is held by {owners[lease_id]} and {scheduler.name}"
                )
                owners[lease_id] = scheduler.name
                worker = self.workers[offer.worker.peer]
                if not worker.alive or lease_id.rpartition("/")[0] != worker.start_id:
                    continue
                lease = worker.arbiter.book.get(lease_id)
                assert lease is not None, f"{scheduler.name} believes in {lease_id}, which has ended"
                assert (lease.scheduler, lease.accepted) == (scheduler.name, True), f"{lease_id} is another's"
                assert worker.terms.floor <= lease.price == offer.price <= scheduler.purse.maximum, (
                    f"{lease_id} of {worker.name} is sold to {scheduler.name} at {lease.price}"
                )


class MarketWorker:
    """A worker with an arbiter, whose offers travel; it may die with all that it knew, and come back."""

    def __init__(self, market: Market, name: str, total: Resources, terms: OfferConfig) -> None:
        self.market, self.name, self.total, self.terms = market, name, total, terms
        self.alive = False
        self.starts = 0
        self._wake_at: float | None = None
        #: names of datasets of which it has slices
        self.datasets: set[str] = set()
        market.workers[name] = self
        self.start()

    def start(self) -> None:
        if self.alive:
            return
        self.alive = True
        self.starts += 1
        self.start_id = f"{self.name}.{self.starts}"
        numbers = itertools.count()
        self.arbiter = Arbiter(
            WorkerCapacity(self.total, [TRAIN, AGGREGATE]),
            self.terms,
            lambda: PeerRef(peer=self.name),
            lambda: f"{self.start_id}/{next(numbers)}",
            checked_journal(),
        )
        self._wake_at = None

    def die(self) -> None:
        """At once: nobody is told."""
        self.alive = False

    def tell(self, event: ArbiterEvent) -> list[ArbiterAction]:
        if not self.alive:
            return []
        actions = self.arbiter.handle(event, self.market.now)
        for action in actions:
            if isinstance(action, SendOffer):
                self._send(action)
        self._sleep()
        return actions

    def _sleep(self) -> None:
        wake = self.arbiter.next_wake
        if wake is not None and (self._wake_at is None or wake < self._wake_at):
            self._wake_at = wake
            self.market.at(wake, partial(self._woken, self.arbiter, wake))

    def _woken(self, arbiter: Arbiter, at: float) -> None:
        if not self.alive or arbiter is not self.arbiter or self._wake_at != at:
            return
        self._wake_at = None
        wake = arbiter.next_wake
        if wake is not None and wake <= self.market.now:
            self.tell(Tick())
        self._sleep()

    def _send(self, action: SendOffer) -> None:
        scheduler = self.market.schedulers[action.scheduler.peer]
        lease_id, start_id = action.offer.lease_id, self.start_id
        answered = False

        def failed(undelivered: bool) -> None:
            nonlocal answered
            if not answered and self.start_id == start_id:
                answered = True
                self.tell(OfferFailed(lease_id, "", undelivered=undelivered))

        def taken() -> None:
            nonlocal answered
            answered = True

        def arrive() -> None:
            if not scheduler.alive:
                return
            declined = any(
                isinstance(answer, Decline) and answer.lease_id == lease_id
                for answer in scheduler.tell(Offered(self.name, action.offer))
            )
            self.market.travel(partial(failed, False) if declined else taken)

        self.market.travel(arrive)
        # no answer for as long as the lease behind it lasts
        self.market.at(self.market.now + action.offer.expires_in_s, partial(failed, True))

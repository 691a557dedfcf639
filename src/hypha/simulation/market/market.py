"""A market of workers and schedulers in memory: their real decisions, no network, no processes, no trio.

Arbiters, allocators and renewals are what the programs run; here messages between them take a random while,
and some are lost. One heap holds what happens when, so a run is decided by its seed, and thousands of them
take minutes: for rules that must hold in every interleaving. What must hold is asserted while a market runs.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from hypha.journal import Journal
from hypha.messages import ExecutorDescriptor

if TYPE_CHECKING:
    from hypha.simulation.market.scheduler import MarketScheduler
    from hypha.simulation.market.worker import MarketWorker

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

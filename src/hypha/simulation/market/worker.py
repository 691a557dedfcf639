"""A worker of a market: its arbiter, whose offers travel, and which may die with all that it knew."""

from __future__ import annotations

import itertools
from functools import partial

from hypha.config.offers import OfferConfig
from hypha.leases import Tick
from hypha.messages import PeerRef, Resources
from hypha.scheduler.leasing.events import (
    Decline,
    Offered,
)
from hypha.simulation.market.market import AGGREGATE, TRAIN, Market, checked_journal
from hypha.worker.leasing.arbiter import Arbiter
from hypha.worker.leasing.events import ArbiterAction, ArbiterEvent, OfferFailed, SendOffer
from hypha.worker.leasing.terms import WorkerCapacity


class MarketWorker:
    """A worker with an arbiter, which may die and come back with nothing."""

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
        """From nothing."""
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
        """Its arbiter; offers are sent."""
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
        scheduler, lease_id, start_id = (
            self.market.schedulers[action.scheduler.peer],
            action.offer.lease_id,
            self.start_id,
        )
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

"""An owner's terms, as pure machines: which requests a worker would serve, and what it asks for one lease.

At rest the price is ``offer.price``. With the strategy ``utilization`` it follows the load in steps, so that
an overloaded worker becomes dearer and an idle one cheaper; between the two thresholds of the load it stays
as it is (hysteresis), so that one lease more or less does not make it swing. With ``affinity`` it is lower
for schedulers and data that the owner prefers. It is never below ``offer.floor``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hypha.config.offers import OfferConfig
from hypha.features import OURS, Abilities, printable
from hypha.messages import ExecutorDescriptor, Resources, WorkerRequest
from hypha.rules.resources import fits, is_valid
from hypha.worker.leasing.events import Cause

#: a bid below this share of the price counts as this share when requests are put in order: one of nothing
#: would count as nothing however long it waits
LEAST_SHARE = 0.01


def load_of(used: Resources, total: Resources) -> float:
    """The share of the most used resource, 0 to 1; what there is nothing of does not count."""
    shares = (
        min(1.0, getattr(used, name) / getattr(total, name))
        for name in ("cpu", "memory", "gpu", "storage")
        if getattr(total, name) > 0
    )
    return max(shares, default=0.0)


class Pricing:
    """On the terms ``terms``, from a load of nothing."""

    def __init__(self, terms: OfferConfig) -> None:
        self.terms = terms
        self.load = 0.0
        #: steps above (below) the price at rest
        self.level = 0
        #: when the next step is due; None while the price stays
        self.next_wake: float | None = None
        #: whether the load was looked at before
        self._begun = False

    @property
    def at_rest(self) -> float:
        """What is asked for without any load, and of nobody in particular."""
        return max(self.terms.floor, self.terms.price)

    @property
    def in_words(self) -> str:
        """For people: ``1.5 a lease (1 at rest, floor 0.2, utilization, load 80 %)``."""
        terms = self.terms
        return (
            f"{self.asked:g} a lease ({self.at_rest:g} at rest, floor {terms.floor:g}, {terms.strategy}, "
            f"load {100 * self.load:.0f} %)"
        )

    @property
    def asked(self) -> float:
        """For one lease, of whoever is not preferred."""
        return self._at(self.level)

    def asked_of(self, scheduler: str, cached: bool) -> float:
        """For one lease of ``scheduler``; ``cached``: its job's dataset is in the worker's cache."""
        return max(self.terms.floor, self.asked / self.preference(scheduler, cached))

    def too_low(self, request: WorkerRequest, cached: bool) -> tuple[str, Cause] | None:
        """Why its bid gets no offer at this moment, not even one at another price."""
        asked = self.asked_of(request.scheduler.peer, cached)
        if self.terms.counter or request.bid >= asked:
            return None
        return f"its bid is below this worker's price of {asked:g}", "price"

    def preference(self, scheduler: str, cached: bool) -> float:
        """How many times as much its bids count."""
        if self.terms.strategy != "affinity":
            return 1.0
        affinity = self.terms.affinity
        preferred = scheduler in affinity.schedulers or (cached and affinity.cached)
        return affinity.preference if preferred else 1.0

    def worth(self, bid: float, scheduler: str, cached: bool) -> float:
        """What ``bid`` counts as when requests are put in order, before anybody has waited."""
        least = LEAST_SHARE * (self.asked or 1.0)
        return max(bid, least) * self.preference(scheduler, cached)

    def follow(self, load: float, now: float) -> None:
        """The load is ``load`` from ``now`` on; steps that were due before are taken first."""
        if self.terms.strategy != "utilization":
            self.load = load
            return
        every_s = self.terms.utilization.every_s
        direction = self._direction(self.load)
        while self.next_wake is not None and now >= self.next_wake:
            self.level += direction
            self.next_wake = self.next_wake + every_s if self._moves(direction) else None
        wanted = self._direction(load)
        self.load = load
        if wanted != direction or not self._begun:
            self.next_wake = now + every_s if self._moves(wanted) else None
        self._begun = True

    def validate(self) -> None:
        """Assert what always holds. For tests and simulation."""
        least, most = self._bounds()
        assert 0.0 <= self.load <= 1.0, f"a load of {self.load}"
        assert least <= self.asked <= most, f"{self.asked} is asked, which is not in {least} to {most}"
        moves = self._begun and self._moves(self._direction(self.load))
        assert (self.next_wake is not None) == moves, "the price stands still, or moves for no reason"

    def _bounds(self) -> tuple[float, float]:
        price, floor = self.terms.price, self.terms.floor
        if self.terms.strategy != "utilization":
            return self.at_rest, self.at_rest
        load = self.terms.utilization
        return max(floor, price * load.least), max(floor, price * load.most)

    def _at(self, level: int) -> float:
        least, most = self._bounds()
        # beyond the bounds no step is taken, so the power stays small
        return min(most, max(least, self.terms.price * (1.0 + self.terms.utilization.step) ** level))

    def _direction(self, load: float) -> int:
        thresholds = self.terms.utilization
        return (load >= thresholds.high) - (load <= thresholds.low)

    def _moves(self, direction: int) -> bool:
        """Whether a step in ``direction`` changes the price."""
        if self.terms.strategy != "utilization" or direction == 0:
            return False
        return self._at(self.level + direction) != self.asked


@dataclass(frozen=True)
class WorkerCapacity:
    """What a worker has: ``total`` resources, the GPU memory among them that of ``gpus`` (GB of each, where
    these are known), the executors it runs, and what its version can do.
    """

    total: Resources
    executors: Sequence[ExecutorDescriptor]
    gpus: Sequence[float] = ()
    abilities: Abilities = OURS

    def unfit(self, publisher: str, request: WorkerRequest, floor: float) -> tuple[str, Cause] | None:
        """Why a worker that takes ``floor`` at the least will never serve ``request``, whatever is free."""
        wanted = request.executor
        if request.scheduler.peer != publisher:
            return "it names another scheduler than the one that published it", "other"
        if wanted not in self.executors:
            return f"no executor {wanted.name!r} for {wanted.kind} jobs here", "executor"
        if lacking := self.abilities.lacks(request.needs):
            named = ", ".join(printable(name) for name in lacking)
            return (
                f"its job needs what {self.abilities} does not have ({named}); upgrade this worker",
                "features",
            )
        if not is_valid(request.resources) or request.count < 1:
            return "it asks for amounts that make no sense", "resources"
        # a comparison with NaN is always False, so each bound is stated as what must hold
        if not (math.isfinite(request.bid) and request.bid >= 0):
            return "its bid makes no sense", "price"
        if not (math.isfinite(request.offer_within_s) and request.offer_within_s > 0):
            return "it leaves no time for an offer", "other"
        if not request.bid >= floor:
            return f"its bid is below this worker's floor of {floor:g}", "price"
        if not fits(request.resources, self.total):
            return "it asks for more than this worker has", "resources"
        return None

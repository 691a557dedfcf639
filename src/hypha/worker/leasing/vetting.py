"""Which requests a worker would serve, whatever is free, and which schedulers get no offer for a while.

Both are pure, and parts of :mod:`hypha.worker.leasing.arbiter`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hypha.backoff import pause_after
from hypha.config.offers import OfferConfig
from hypha.features import OURS, Abilities, printable
from hypha.messages import ExecutorDescriptor, Resources, WorkerRequest
from hypha.rules.resources import fits, is_valid
from hypha.worker.leasing.events import Cause
from hypha.worker.leasing.pricing import Pricing

#: After a second offer in a row that came to nothing, its scheduler gets none for so long; each time it
#: doubles.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
#: Schedulers whose failures are remembered; the oldest are forgotten.
_REMEMBERED = 1024


@dataclass(frozen=True)
class WorkerCapacity:
    """What a worker has: ``total`` resources, the GPU memory among them that of ``gpus`` (GB of each, where
    these are known), the executors it runs, and what its version can do.
    """

    total: Resources
    executors: Sequence[ExecutorDescriptor]
    gpus: Sequence[float] = ()
    abilities: Abilities = OURS


class Vetting:
    """Judges single requests by what the worker has and by the owner's ``terms``."""

    def __init__(self, capacity: WorkerCapacity, terms: OfferConfig, pricing: Pricing) -> None:
        self._total, self._abilities = capacity.total, capacity.abilities
        self._executors = frozenset((executor.kind, executor.name) for executor in capacity.executors)
        self._terms = terms
        self._pricing = pricing

    def unfit(self, publisher: str, request: WorkerRequest) -> tuple[str, Cause] | None:
        """Why this worker will never serve ``request``, whatever is free."""
        if request.scheduler.peer != publisher:
            return "it names another scheduler than the one that published it", "other"
        if (request.executor.kind, request.executor.name) not in self._executors:
            return f"no executor {request.executor.name!r} for {request.executor.kind} jobs here", "executor"
        if lacking := self._abilities.lacks(request.needs):
            named = ", ".join(printable(name) for name in lacking)
            return (
                f"its job needs what {self._abilities} does not have ({named}); upgrade this worker",
                "features",
            )
        if not is_valid(request.resources) or request.count < 1:
            return "it asks for amounts that make no sense", "resources"
        # a comparison with NaN is always False, so each bound is stated as what must hold
        if not (math.isfinite(request.bid) and request.bid >= 0):
            return "its bid makes no sense", "price"
        if not (math.isfinite(request.offer_within_s) and request.offer_within_s > 0):
            return "it leaves no time for an offer", "other"
        if not request.bid >= self._terms.floor:
            return f"its bid is below this worker's floor of {self._terms.floor:g}", "price"
        if not fits(request.resources, self._total):
            return "it asks for more than this worker has", "resources"
        return None

    def too_low(self, request: WorkerRequest, cached: bool) -> tuple[str, Cause] | None:
        """Why its bid gets no offer at this moment, not even one at another price."""
        asked = self._pricing.asked_of(request.scheduler.peer, cached)
        if self._terms.counter or request.bid >= asked:
            return None
        return f"its bid is below this worker's price of {asked:g}", "price"


class FailedOffers:
    """Offers to each scheduler that came to nothing, one after the other."""

    def __init__(self) -> None:
        #: scheduler -> how many, and until when it gets no other
        self._of: dict[str, tuple[int, float]] = {}

    def count(self, scheduler: str, now: float) -> None:
        """One more."""
        times = self._of.pop(scheduler, (0, 0.0))[0] + 1
        pause_s = pause_after(times - 2, FIRST_PAUSE_S, LONGEST_PAUSE_S) if times > 1 else 0.0
        self._of[scheduler] = (times, now + pause_s)
        while len(self._of) > _REMEMBERED:
            del self._of[next(iter(self._of))]

    def forget(self, scheduler: str) -> None:
        """It has accepted one."""
        self._of.pop(scheduler, None)

    def pausing(self, scheduler: str, now: float) -> str | None:
        """Why it gets no offer for now."""
        times, until = self._of.get(scheduler, (0, now))
        return f"{times} offers to its scheduler came to nothing" if now < until else None

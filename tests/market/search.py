"""Random markets by seed: who competes for which workers on what terms, who dies, and what must come of it.

``python -m tests.market.search`` (``make market``) runs thousands. In each, nothing may be booked twice,
every lease must end with its job or its scheduler, and every job that could be served must be, though others,
with higher bids, come back for more all the time until it is.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from random import Random

from msgspec import Struct
from tests.market.market import Market, MarketWorker
from tests.market.scheduler import MarketJob, MarketScheduler, Purse

from hypha.config.offers import AffinityConfig, OfferConfig, UtilizationConfig
from hypha.messages import Resources
from hypha.rules.resources import fits
from hypha.scheduler.leasing.events import SearchTimes

#: a job that has not begun so long after it first asked starves: jobs last for ten seconds at most, so it
#: could have been three hundred of them, one after the other
STARVED_S = 3_000.0
#: leases of the dead have ended by then, and whatever was on its way has arrived
_SETTLE_S = 60.0
#: schedulers look for faults this often
_LOOK_S = 1.0

_STRATEGIES = ("flexible", "flexible", "whole", "utilization", "affinity")


class MarketOutcome(Struct, frozen=True):
    """Of one market. ``problems`` is empty where all was as it must be; ``digest`` is of what happened."""

    seed: int
    problems: tuple[str, ...]
    workers: int
    schedulers: int
    served: int
    deaths: int
    gave_way: int
    events: int
    longest_wait_s: float
    lasted_s: float
    digest: str


def random_terms(random: Random, schedulers: Sequence[str]) -> OfferConfig:
    """What a worker asks. All times are a tenth of the defaults or so, as a market is over sooner then."""
    price = round(random.uniform(0.2, 2.0), 2)
    return OfferConfig(
        price=price,
        floor=random.choice((0.0, 0.0, round(random.uniform(0.0, 1.5), 2))),
        strategy=random.choice(_STRATEGIES),
        counter=random.random() < 0.8,
        ageing_s=3.0,
        keep_after_s=15.0,
        temporary_lease_s=random.choice((1.0, 3.0)),
        lease_s=random.choice((4.0, 10.0)),
        utilization=UtilizationConfig(every_s=2.0, step=0.5, most=random.choice((2.0, 4.0))),
        affinity=AffinityConfig(schedulers=random.sample(list(schedulers), 1)),
    )


def dearest(terms: OfferConfig) -> float:
    """The most that a worker on these terms ever asks for."""
    most = terms.utilization.most if terms.strategy == "utilization" else 1.0
    return max(terms.floor, terms.price * most)


class _Run:
    """One market, its schedulers' jobs, and what was seen of it."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(f"market {seed}")
        self.seed = seed
        loss = random.choice((0.0, 0.0, 0.02, 0.1))
        self.market = Market(f"market {seed} messages", loss, random.choice((0.01, 0.05, 0.15)))
        names = [f"S{number}" for number in range(random.randrange(2, 5))]
        for number in range(random.randrange(2, 7)):
            cpu = float(random.choice((1, 2, 2, 4)))
            terms = random_terms(random, names)
            worker = MarketWorker(self.market, f"W{number}", Resources(cpu=cpu, memory=8), terms)
            worker.datasets.update(random.sample(("digits", "text"), random.randrange(3)))
        self.deaths = 0
        self.told: list[str] = []
        self.first: list[MarketJob] = []
        self.asked_at: dict[int, float] = {}
        self.waits: list[float] = []
        pace = SearchTimes(
            offer_deadline_s=random.choice((0.2, 0.5)),
            longest_pause_s=2.0,
            avoid_s=10.0,
            yield_after_s=random.choice((4.0, 8.0)),
        )
        for name in names:
            bid = round(random.uniform(0.1, 2.0), 2)
            raised = random.choice((None, 2.0, 5.0))
            purse = Purse(bid, bid * random.choice((1.0, 2.0, 5.0)), raised)
            scheduler = MarketScheduler(self.market, name, purse, pace)
            scheduler.on_end = self._ended
            self.market.at(random.uniform(0.0, 5.0), partial(self._next_job, scheduler))
        self._plan_deaths()

    def _plan_deaths(self) -> None:
        """The last worker always stays, so there is somebody to serve."""
        random = self.random
        for worker in list(self.market.workers.values())[:-1]:
            if random.random() < 0.2:
                at = random.uniform(1.0, 60.0)
                self.market.at(at, partial(self._worker_dies, worker))
                self.market.at(at + random.uniform(0.1, 30.0), worker.start)
        for scheduler in list(self.market.schedulers.values())[1:]:
            if random.random() < 0.2:
                self.market.at(random.uniform(1.0, 60.0), partial(self._dies, scheduler))

    def _worker_dies(self, worker: MarketWorker) -> None:
        self.deaths += 1
        worker.die()

    def _dies(self, scheduler: MarketScheduler) -> None:
        self.deaths += 1
        if scheduler.job in self.first:
            self.first.remove(scheduler.job)
        scheduler.die()

    def _next_job(self, scheduler: MarketScheduler) -> None:
        """One that can be served: on workers that it can pay at any load, as many as it needs to begin."""
        if not scheduler.alive:
            return
        random = self.random
        cpu = float(random.choice((1, 1, 2)))
        need, memory = Resources(cpu=cpu, memory=1), Resources(cpu=1)
        purse = scheduler.purse
        bid = purse.bid if purse.raise_after_s is None else purse.maximum
        able = 0
        for worker in self.market.workers.values():
            asked = dearest(worker.terms)
            answered = bid >= worker.terms.floor and (worker.terms.counter or bid >= asked)
            able += fits(need, worker.total) and answered and purse.maximum >= asked
        if not able:
            return
        least = random.randrange(1, able + 1)
        # on its own worker, or beside a training executor where there is room for both
        server = memory if able > least and random.random() < 0.5 else None
        wanted = least + random.randrange(3)
        dataset = random.choice((None, "digits", "text"))
        job = MarketJob(wanted, need, least, random.uniform(1.0, 10.0), server, dataset)
        self.asked_at[id(job)] = self.market.now
        if scheduler.jobs == 0:
            self.first.append(job)
        scheduler.work_for(job)

    def _ended(self, job: MarketJob) -> None:
        begun_at = self.market.now if job.begun_at is None else job.begun_at
        self.waits.append(begun_at - self.asked_at.pop(id(job)))
        self.told.append(f"{self.market.now:.6f} {job}")
        if job in self.first:
            self.first.remove(job)
        if self.first:
            # as long as anybody waits for a first job, whoever has had one comes back for more
            for scheduler in self.market.schedulers.values():
                if scheduler.alive and scheduler.job is None and scheduler.jobs:
                    self.market.at(self.market.now, partial(self._come_back, scheduler))

    def _come_back(self, scheduler: MarketScheduler) -> None:
        if scheduler.job is None and self.first:
            self._next_job(scheduler)

    def run(self) -> MarketOutcome:
        market, problems = self.market, []
        try:
            while market.now < STARVED_S and (market.now < 10.0 or self._busy()):
                market.run(market.now + _LOOK_S)
                market.check()
            problems += [
                f"{one.name} starves: after {STARVED_S:g} s it holds {len(one.held)} for {one.job}"
                for one in market.schedulers.values()
                if one.job is not None
            ]
            lasted_s = market.now
            if not problems:
                market.run(market.now + _SETTLE_S)
                problems += self._left_over()
        except AssertionError as exc:
            lasted_s = market.now
            problems.append(f"at {market.now:.3f} s: {exc}")
        digest = hashlib.blake2b(repr((market.now, market.events, self.told)).encode(), digest_size=8)
        return MarketOutcome(
            seed=self.seed,
            problems=tuple(problems),
            workers=len(market.workers),
            schedulers=len(market.schedulers),
            served=len(self.waits),
            deaths=self.deaths,
            gave_way=sum(scheduler.gave_way for scheduler in market.schedulers.values()),
            events=market.events,
            longest_wait_s=max(self.waits, default=0.0),
            lasted_s=lasted_s,
            digest=digest.hexdigest(),
        )

    def _busy(self) -> bool:
        return any(scheduler.job is not None for scheduler in self.market.schedulers.values())

    def _left_over(self) -> list[str]:
        """Nobody works: no worker reserves anything, and no price is higher than at rest."""
        found = []
        for worker in self.market.workers.values():
            book, pricing = worker.arbiter.book, worker.arbiter.pricing
            if len(book) or book.draining:
                found.append(f"{worker.name} still reserves {[lease.lease_id for lease in book]}")
            if pricing.load or pricing.level > 0:
                found.append(f"{worker.name} asks for {pricing.asked:g} at a load of {pricing.load:g}")
        return found


def run_market(seed: int) -> MarketOutcome:
    """The market that ``seed`` stands for, to its end."""
    return _Run(seed).run()


def search_markets(first: int, count: int, processes: int, tell: Callable[[str], object]) -> int:
    """Run so many; ``tell`` what came of each that fails, and of all. How many failed."""
    began = time.monotonic()
    outcomes: list[MarketOutcome] = []
    failed = 0
    with ProcessPoolExecutor(max(1, processes)) as pool:
        for outcome in pool.map(run_market, range(first, first + count), chunksize=20):
            outcomes.append(outcome)
            if outcome.problems:
                failed += 1
                tell(f"seed {outcome.seed}: {'; '.join(outcome.problems)}")
    took_s = time.monotonic() - began
    longest_s = max((one.longest_wait_s for one in outcomes), default=0.0)
    tell(
        f"{len(outcomes)} markets, {sum(one.served for one in outcomes)} jobs served, "
        f"{sum(one.deaths for one in outcomes)} deaths, {sum(one.gave_way for one in outcomes)} leases given "
        f"back to make way, {sum(one.events for one in outcomes)} events in {took_s:.0f} s; the longest wait "
        f"was {longest_s:.0f} s, of {STARVED_S:g} s; {failed} failed"
    )
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.market.search")
    parser.add_argument("--seeds", type=int, default=100, help="how many random markets")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    sys.exit(1 if search_markets(options.first, options.seeds, options.processes, print) else 0)

"""Schedulers that compete for workers under a virtual clock: no network, the real decisions.

Every message takes a random while, some are lost. What must hold whatever happens: no worker promises more
than it has, no scheduler believes in a lease that its worker has ended, everybody gets what there is, and
nobody waits for ever.
"""

from __future__ import annotations

import pytest
from tests.market.market import Market, MarketWorker
from tests.market.scheduler import MarketJob, MarketScheduler, Purse
from tests.market.search import run_market

from hypha.config.offers import OfferConfig, UtilizationConfig
from hypha.messages import Resources
from hypha.scheduler.leasing.events import SearchTimes, Want

NEED = Resources(cpu=1, memory=1)
FOR_EVER_S = 1e9


def build(
    market: Market, workers: int, purses: dict[str, Purse], cpu: float = 1.0, **terms: object
) -> list[MarketScheduler]:
    for index in range(workers):
        price = 0.5 + 0.5 * market.random.random()
        made = OfferConfig(**{"price": price, **terms})  # type: ignore[arg-type]
        MarketWorker(market, f"W{index:05}", Resources(cpu=cpu, memory=4), made)
    return [MarketScheduler(market, name, purse) for name, purse in purses.items()]


def hold(scheduler: MarketScheduler, count: int, least: int = 1, lasts_s: float = FOR_EVER_S) -> MarketJob:
    """Have it look for so many, from now on."""
    job = MarketJob(count, NEED, least, lasts_s)
    scheduler.work_for(job)
    return job


def taken(scheduler: MarketScheduler) -> list[str]:
    return sorted(offer.worker.peer for offer in scheduler.held.values())


def test_twenty_workers_are_held_within_a_second_and_stay_held() -> None:
    market = Market(1)
    [scheduler] = build(market, 20, {"S": Purse(1.0, 1.0)})
    hold(scheduler, 20)
    market.run(1.0)
    assert len(scheduler.held) == 20
    leases = set(scheduler.held)
    for second in range(1, 300):
        market.run(float(second))
        market.check()
    assert set(scheduler.held) == leases


def test_the_higher_bid_gets_the_workers_when_there_are_not_enough() -> None:
    market = Market(2, delay_s=0.02)
    poor, rich = build(market, 10, {"poor": Purse(1.0, 5.0), "rich": Purse(2.0, 5.0)})
    hold(poor, 10)
    hold(rich, 10)
    market.run(10.0)
    assert len(rich.held) == 10
    assert len(poor.held) == 0


def test_what_one_scheduler_leaves_the_other_gets() -> None:
    market = Market(3)
    poor, rich = build(market, 10, {"poor": Purse(1.0, 5.0), "rich": Purse(2.0, 5.0)})
    hold(poor, 6)
    hold(rich, 4)
    market.run(20.0)
    assert (len(poor.held), len(rich.held)) == (6, 4)
    assert not set(taken(poor)) & set(taken(rich))


@pytest.mark.parametrize("seed", range(5))
def test_with_a_tenth_of_all_messages_lost_nothing_is_promised_twice_and_pools_fill(seed: int) -> None:
    market = Market(seed, loss=0.1, delay_s=0.2)
    first, second = build(market, 12, {"A": Purse(1.0, 2.0), "B": Purse(1.0, 2.0)})
    hold(first, 6)
    hold(second, 6)
    filled = 0
    for half_second in range(1, 600):
        market.run(half_second / 2)
        market.check()
        filled += len(first.held) + len(second.held) == 12
    assert filled > 500


def test_dead_workers_are_replaced_and_their_leases_end_by_themselves() -> None:
    market = Market(5)
    [scheduler] = build(market, 15, {"S": Purse(1.0, 1.0)})
    hold(scheduler, 10)
    market.run(5.0)
    dead = taken(scheduler)[:4]
    for name in dead:
        market.workers[name].die()
    market.run(40.0)
    assert len(scheduler.held) == 10
    assert not set(dead) & set(taken(scheduler))
    # the scheduler dies: without a word from it everything is free again
    scheduler.die()
    market.run(80.0)
    for worker in market.workers.values():
        if worker.alive:
            assert worker.arbiter.book.free == worker.arbiter.book.total


def test_two_thousand_workers_in_one_market() -> None:
    market = Market(6)
    everyone = build(market, 2000, {f"S{index}": Purse(1.0, 1.0) for index in range(3)})
    for scheduler in everyone:
        hold(scheduler, 300)
    market.run(5.0)
    assert [len(scheduler.held) for scheduler in everyone] == [300, 300, 300]


# --- prices -----------------------------------------------------------------------------------------------


def test_prices_rise_with_the_load_and_fall_back_when_a_scheduler_is_gone() -> None:
    market = Market(7)
    load = UtilizationConfig(step=0.5, every_s=10.0, least=0.5, most=2.0)
    poor, rich = build(
        market,
        6,
        {"poor": Purse(1.0, 1.2), "rich": Purse(3.0, 3.0)},
        price=1.0,
        strategy="utilization",
        utilization=load,
    )
    hold(rich, 4, lasts_s=100.0)
    market.run(5.0)
    hold(poor, 6)
    market.run(50.0)
    asked = {name: worker.arbiter.pricing.asked for name, worker in market.workers.items()}
    assert all(asked[name] == 2.0 for name in (*taken(rich), *taken(poor)))
    # the poor one got what was left before it became dearer
    assert len(taken(poor)) == 2
    market.run(100.0)
    assert len(taken(poor)) == 2
    market.run(200.0)
    assert len(taken(rich)) == 0
    assert len(taken(poor)) == 6, "at 2.0 it was too dear; the idle ones lowered their price"
    assert all(offer.price <= 1.2 for offer in poor.held.values())
    poor.end()
    market.run(400.0)
    assert {worker.arbiter.pricing.asked for worker in market.workers.values()} == {0.5}


def test_a_bid_that_is_raised_takes_the_workers_from_one_that_is_not() -> None:
    for raise_after_s, winner in ((None, "fixed"), (5.0, "raising")):
        market = Market(8)
        purses = {"fixed": Purse(2.0, 2.0), "raising": Purse(1.0, 4.0, raise_after_s)}
        fixed, raising = build(market, 4, purses, ageing_s=None)
        # somebody holds all of them at first
        first = MarketScheduler(market, "first", Purse(3.0, 3.0))
        hold(first, 4, lasts_s=30.0)
        market.run(1.0)
        hold(fixed, 4)
        hold(raising, 4)
        market.run(60.0)
        assert {one.name for one in (fixed, raising) if one.held} == {winner}


# --- nobody waits for ever --------------------------------------------------------------------------------


def test_a_low_bid_is_served_though_higher_ones_come_back_for_ever() -> None:
    served = {}
    for ageing_s in (60.0, None):
        market = Market(9)
        poor, *rich = build(
            market,
            2,
            {"poor": Purse(1.0, 1.0), "rich": Purse(4.0, 4.0), "richer": Purse(5.0, 5.0)},
            ageing_s=ageing_s,
            keep_after_s=None,
        )
        for scheduler in rich:
            scheduler.on_end = lambda _, scheduler=scheduler: hold(scheduler, 2, lasts_s=20.0)  # type: ignore[misc]
            hold(scheduler, 2, lasts_s=20.0)
        job = hold(poor, 1, lasts_s=10.0)
        market.run(1000.0)
        served[ageing_s] = job.begun_at
    assert served[None] is None
    # the rich wait for each other, 40 s at most, and 5 becomes 5 (1 + 40 / 60); 1 (1 + t / 60) is as much
    # after 440 s, and then a job has to end
    assert served[60.0] is not None
    assert served[60.0] < 440.0 + 20.0


@pytest.mark.parametrize("seed", range(5))
def test_two_jobs_that_hold_half_of_what_each_needs_do_not_wait_for_each_other_for_ever(seed: int) -> None:
    begun = {}
    for yield_after_s in (60.0, None):
        market = Market(seed)
        first, second = build(market, 4, {"A": Purse(1.0, 1.0), "B": Purse(1.0, 1.0)})
        for scheduler in (first, second):
            scheduler.pace = SearchTimes(yield_after_s=yield_after_s)
        # each has two before it asks for the rest
        jobs = [hold(scheduler, 2, least=4, lasts_s=30.0) for scheduler in (first, second)]
        market.run(5.0)
        assert (len(first.held), len(second.held)) == (2, 2)
        for scheduler in (first, second):
            scheduler.tell(Want("train", 4))
        market.run(600.0)
        market.check()
        begun[yield_after_s] = [job.begun_at for job in jobs]
    assert begun[None] == [None, None]
    assert None not in begun[60.0]


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_random_markets_book_nothing_twice_leak_no_lease_and_starve_nobody(first: int) -> None:
    for seed in range(first, first + 25):
        outcome = run_market(seed)
        assert outcome.problems == (), f"python -m tests.market.search --first {seed} --seeds 1"


def test_the_same_seed_is_the_same_market() -> None:
    once, again, other = run_market(5), run_market(5), run_market(6)
    assert once == again
    assert once.events > 100
    assert once.digest != other.digest

"""Several schedulers in one simulated world: whole jobs that compete for workers, and all of them end."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import get_args

import pytest

from hypha.simulation.scenario import Scenario, Strategy, Strike, random_fault
from hypha.simulation.search import Runner


def random_market(seed: int) -> Scenario:
    """Two or three schedulers that compete for workers on different terms, and maybe a fault."""
    random = Random(f"market {seed}")
    workers = random.choice((2, 3))
    rounds = random.choice((2, 3))
    bids = tuple(
        (bid, bid * random.choice((2.0, 4.0))) for bid in (random.uniform(0.5, 2.0) for _ in range(3))
    )
    strategies: tuple[Strategy, ...] = get_args(Strategy)
    return Scenario(
        seed=seed,
        workers=workers,
        spare_workers=random.choice((0, 1)),
        rivals=random.choice((1, 1, 2)),
        bids=bids,
        # nobody is too dear for anybody at rest
        prices=tuple(round(random.uniform(0.1, 1.0), 2) for _ in range(4)),
        # where all give all that they have to training there is no place for a parameter server
        strategies=("flexible", *(random.choice(strategies) for _ in range(3))),
        rounds=rounds,
        load_s=random.choice((0.5, 2.0)),
        latency_s=random.choice((0.001, 0.01, 0.08)),
        min_workers=random.choice((None, 1)),
        faults=tuple(random_fault(random, rounds) for _ in range(random.choice((0, 1)))),
        patience_s=1200.0,
    )


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as one:
        yield one


def test_the_same_seed_gives_the_same_market_byte_for_byte(runner: Runner) -> None:
    scenario = Scenario(
        workers=2, spare_workers=0, rivals=1, rounds=2, bids=((1.0, 3.0), (2.0, 2.0)), load_s=0.5
    )
    with Runner() as another:
        one, two = runner.run(scenario, journal=True), another.run(scenario, journal=True)
    assert one.problems == ()
    assert one.journal == two.journal
    # the job of the one scheduler and that of the other
    assert one.journal.count(b'"LifeBegan"') == 2


def test_a_rival_gets_what_a_dead_scheduler_held(runner: Runner) -> None:
    """It holds all workers and is killed; its leases end by themselves, and both jobs are done at last."""
    scenario = Scenario(
        workers=2,
        spare_workers=0,
        rivals=1,
        rounds=2,
        bids=((2.0, 2.0), (1.0, 1.0)),
        load_s=0.5,
        faults=(Strike("scheduler", "kill", 0, "training", for_s=60.0),),
    )
    verdict = runner.run(scenario)
    assert verdict.problems == ()
    assert verdict.struck[0].startswith("kill scheduler at")


@pytest.mark.parametrize("seed", range(2))
def test_random_markets(runner: Runner, seed: int) -> None:
    assert runner.run(random_market(seed)).problems == ()

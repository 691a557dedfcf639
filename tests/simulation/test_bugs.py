"""Bugs that are put in by hand are found, each by the shortest scenario that a search came down to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.simulation import bugs

from hypha.simulation.scenario import Scenario, Strike
from hypha.simulation.search import Runner

pytestmark = pytest.mark.simulated

FOUND_BY: dict[Callable[[], None], Scenario] = {
    bugs.dropped_action: Scenario(
        seed=13,
        workers=4,
        rounds=4,
        faults=(Strike(role="worker", way="full-disk", round=2, phase="scheduled", for_s=16.418),),
    ),
    bugs.lease_freed_twice: Scenario(workers=4, rounds=2),
    bugs.slice_used_too_early: Scenario(
        seed=3,
        spare_workers=2,
        rounds=5,
        slices=5,
        rows=10,
        checkpoint_every=1,
        faults=(
            Strike(role="parameter-server", way="kill", round=2, phase="updating", after_s=0.1, for_s=20.0),
            Strike(role="worker", way="lose", round=2, phase="updating", after_s=0.1, for_s=1.0),
        ),
    ),
    bugs.update_counted_twice: Scenario(
        workers=2,
        rounds=4,
        faults=(Strike(role="scheduler", way="kill", round=1, phase="scheduled", for_s=2.0),),
    ),
    bugs.stale_generation_accepted: Scenario(
        seed=62,
        spare_workers=2,
        rounds=4,
        slices=12,
        batch_s=(0.289, 0.452, 0.228, 0.044),
        latency_s=0.001,
        disk_s=0.0,
        apart=True,
        min_workers=1,
        checkpoint_every=1,
        faults=(
            Strike(role="scheduler", way="kill", round=3, phase="closing", for_s=11.075),
            Strike(role="parameter-server-executor", way="freeze", round=2, phase="scheduled", for_s=18.052),
            Strike(role="worker", way="corrupt", round=0, phase="updating", for_s=1.038),
            Strike(role="data", way="full-disk", round=3, phase="scheduled", for_s=0.967),
        ),
    ),
    bugs.checkpoint_announced_too_early: Scenario(rounds=4, checkpoint_every=1, disk_s=0.1),
    bugs.theta_never_sent_again: Scenario(
        seed=1,
        rounds=5,
        apart=True,
        deadline_s=200.0,
        faults=(
            Strike(role="gateway", way="kill", round=1, phase="training", for_s=220.0),
            Strike(role="parameter-server", way="partition", round=2, phase="closing", for_s=150.0),
        ),
    ),
    bugs.wrong_deadline: Scenario(
        seed=1,
        rounds=4,
        faults=(Strike(role="training-executor", way="stall", round=2, phase="training", for_s=500.0),),
    ),
    bugs.leaked_transfer_place: Scenario(
        seed=1,
        rounds=4,
        faults=(Strike(role="worker", way="full-disk", round=1, phase="training", for_s=4.0),),
    ),
    bugs.cut_never_noticed: Scenario(rounds=8, samples_a_round=160, batch_s=(0.4,)),
}


@pytest.mark.parametrize("bug", bugs.BUGS, ids=lambda bug: bug.__name__)
def test_it_is_found(bug: Callable[[], None]) -> None:
    scenario = FOUND_BY[bug]
    with Runner() as runner:
        assert runner.run(scenario).problems == ()
    with Runner(f"{bug.__module__}:{bug.__name__}") as runner:
        problems = runner.run(scenario).problems
    print("\n".join(problems))
    assert problems

"""A whole job in a simulated world: it ends, its ledger gives the same theta, the same seed the same run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest
import trio

from hypha.simulation.running import run_scenario
from hypha.simulation.scenario import LIES, Role, Scenario, Strike, Way, random_scenario
from hypha.simulation.search import Runner


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as one:
        yield one


def test_an_undisturbed_job_is_all_that_it_should_be(runner: Runner) -> None:
    verdict = runner.run(Scenario(rounds=3))
    assert verdict.problems == ()
    assert verdict.lasted_s < 60


def test_the_same_seed_gives_the_same_run_byte_for_byte(runner: Runner) -> None:
    scenario = msgspec.structs.replace(
        random_scenario(59),
        faults=(
            Strike(role="parameter-server", way="freeze", round=0, phase="training", for_s=6.0),
            Strike(role="worker", way="kill", round=1, phase="training", for_s=3.0),
            Strike(role="scheduler", way="lossy", round=1, phase="updating", for_s=9.0),
        ),
    )
    with Runner() as another:
        one, two = runner.run(scenario, journal=True), another.run(scenario, journal=True)
    assert len(one.struck) == 3
    assert one.journal
    assert one.journal == two.journal
    assert (one.struck, one.lasted_s) == (two.struck, two.lasted_s)
    assert runner.run(random_scenario(60), journal=True).journal != one.journal


@pytest.mark.parametrize("role", ["worker", "data"])
def test_no_thread_takes_part(role: Role, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end at a moment that depends on the machine: what strikes is no process of the world."""

    def no_thread(*_: object, **__: object) -> NoReturn:
        pytest.fail("a thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", no_thread)
    strike = Strike(role=role, way="corrupt", round=1, phase="training", for_s=2.0)
    verdict = run_scenario(Scenario(workers=2, rounds=3, checkpoint_every=1, faults=(strike,)), tmp_path)
    assert verdict.problems == ()
    assert len(verdict.struck) == 1


def test_a_worker_that_has_begun_the_next_round_is_given_no_slice_that_is_taken_back(runner: Runner) -> None:
    """It was left out of a round, heard so before the scheduler did, and asked for a slice in between: the
    scheduler took that back a moment later, and gave it out once more.
    """
    scenario = Scenario(
        seed=104,
        workers=2,
        data_nodes=1,
        rounds=8,
        samples_a_round=160,
        batch_s=(0.044, 0.174, 0.381, 0.163),
        faults=(Strike(role="data", way="mute", round=4, phase="loading", for_s=22.931),),
    )
    assert runner.run(scenario).problems == ()


def test_a_worker_that_is_left_out_twice_in_a_row_goes_on(runner: Runner) -> None:
    """Its second theta found its prefetcher waiting still, and was lost to an error."""
    fault = Strike(role="training-executor", way="stall", round=2, phase="training", for_s=500.0)
    assert runner.run(Scenario(seed=1, faults=(fault,))).problems == ()


def test_an_update_of_an_executor_that_has_not_come_back_counts_in_its_round_alone(runner: Runner) -> None:
    """The scheduler was killed; a round was applied before one of its executors had answered the new one."""
    fault = Strike(role="scheduler", way="kill", round=1, phase="loading", for_s=2.053)
    scenario = Scenario(seed=1173, workers=2, rounds=3, checkpoint_every=1, faults=(fault,))
    assert runner.run(scenario).problems == ()


@pytest.mark.parametrize(("behind_nat", "way"), [(4, "restart"), (0, "notice")])
def test_a_worker_that_ends_is_missed_at_once_and_its_lease_does_not_expire(
    behind_nat: int, way: Way
) -> None:
    """Relayed or not: nobody waits for its lease, which would live for ten minutes."""
    fault = Strike(role="worker", way=way, round=1, phase="training", for_s=1.0)
    scenario = Scenario(
        rounds=4, apart=True, lease_s=600.0, samples_a_round=200, behind_nat=behind_nat, faults=(fault,)
    )
    verdict = run_scenario(scenario)
    assert verdict.problems == ()
    (struck,) = verdict.struck
    name, at = struck.split()[1], float(struck.split()[-1])
    told = [line for line in verdict.log if "A leased worker ends in" in line and name in line]
    assert at < float(told[0].split()[0]) < at + 1.0
    ends = ("A worker handed its lease back", "A lease is given back: its worker leaves")
    gone = [line for line in verdict.log if any(text in line for text in ends) and name in line]
    assert float(gone[0].split()[0]) < at + (2.0 if way == "restart" else scenario.notice_s)
    assert not any("A lease was lost" in line or "expired" in line for line in verdict.log)
    assert verdict.lasted_s < 60.0


def test_a_checkpoint_is_forgotten_before_it_is_deleted(runner: Runner) -> None:
    """On a slow disk there was time to be killed between its deletion and the ledger's word of it."""
    scenario = Scenario(seed=3, workers=2, rounds=7, disk_s=0.1, checkpoint_every=1)
    assert runner.run(scenario).problems == ()


def test_a_worker_that_stalls_is_replaced_when_the_job_goes_on(runner: Runner) -> None:
    """A job that wants all of its workers waited without end for one to report its model in the new life."""
    faults = (
        Strike(role="training-executor", way="stall", round=1, phase="training", for_s=500.0),
        Strike(role="parameter-server", way="kill", round=1, phase="training", after_s=0.5, for_s=13.0),
    )
    assert runner.run(Scenario(seed=1, rounds=4, apart=True, faults=faults)).problems == ()


#: one worker among four
FOUR = Scenario(seed=7, workers=4, batch_s=(0.2,), model_s=20.0)


@pytest.fixture(scope="module")
def honest_s(runner: Runner) -> float:
    """How long the job of :data:`FOUR` takes where nobody lies."""
    verdict = runner.run(FOUR)
    assert verdict.problems == ()
    return verdict.lasted_s


@pytest.mark.simulated
@pytest.mark.parametrize("way", LIES)
def test_a_worker_among_four_that_lies_costs_its_share_and_a_deadline_and_is_named(
    runner: Runner, honest_s: float, way: Way
) -> None:
    loading = way in ("never-load", "boast")
    lie = Strike("worker", way, 0 if loading else 1, "loading" if loading else "training")
    with tempfile.TemporaryDirectory() as root:
        ending = run_scenario(msgspec.structs.replace(FOUR, faults=(lie,)), Path(root))
    assert ending.problems == ()
    (struck,) = ending.struck
    assert struck.startswith(f"{way} worker-")
    most_s = honest_s * 4 / 3 + FOUR.deadline_s + 5.0
    if loading:
        # it holds up the start, as all four are wanted for that, until it is replaced
        most_s = honest_s + FOUR.model_s + 10.0
    assert ending.lasted_s < most_s
    liar = struck.split()[1]
    named = [line for line in ending.log if liar in line and (" WARNING " in line or " ERROR " in line)]
    assert named or way == "boast", "who offers the moon is not even taken, as it is not needed"
    assert ending.journal

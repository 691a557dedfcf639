"""Projection: together, on target, at any scale."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.stopwatch import Stopwatch

from hypha.scheduler.rounds.projection import BatchTime, ProjectedWorker, project


def test_batch_time_follows_a_jump_within_a_few_batches() -> None:
    estimate = BatchTime()
    for batch in range(1, 1001):
        estimate.update(batch, batch * 0.1)
    assert estimate.value_s == pytest.approx(0.1)
    for batch in range(1, 41):
        estimate.update(1000 + batch, 100 + batch * 0.2)
    assert estimate.value_s == pytest.approx(0.2, rel=0.05)


def test_batch_time_does_not_depend_on_the_report_interval() -> None:
    fine, coarse = BatchTime(), BatchTime()
    for batch in range(1, 65):
        fine.update(batch, batch * 0.5)
    for batch in range(16, 65, 16):
        coarse.update(batch, batch * 0.5)
    assert fine.value_s == pytest.approx(coarse.value_s or 0)


@given(st.permutations(list(range(1, 12))), st.floats(1e-4, 1e4))
def test_repeats_and_reordering_do_no_harm(order: list[int], batch_s: float) -> None:
    estimate = BatchTime()
    for batch in [*order, *order]:
        estimate.update(batch, batch * batch_s)
    assert estimate.value_s == pytest.approx(batch_s)


def test_a_new_round_counts_from_zero() -> None:
    estimate = BatchTime()
    estimate.update(10, 1.0)
    estimate.start_round()
    estimate.update(2, 0.2)
    assert estimate.value_s == pytest.approx(0.1)


def test_all_arrive_together_and_the_target_is_met() -> None:
    paces = [ProjectedWorker("fast", 0, 0.0, 1.0, 8), ProjectedWorker("slow", 0, 0.0, 7.0, 8)]
    got = project(paces, 8 * 16)
    assert got.batches == {"fast": 14, "slow": 2}
    assert got.ends_in_s == pytest.approx(14.0)


def test_what_is_done_counts_and_the_horizon_is_relative_to_now() -> None:
    # hours into the round, with 40 samples to go
    paces = [ProjectedWorker("a", 10_000, 0.0, 1.0, 1), ProjectedWorker("b", 5_000, 0.0, 2.0, 1)]
    got = project(paces, 15_000 + 30, elapsed_s=10_000)
    assert got.batches == {"a": 10_020, "b": 5_010}
    assert got.ends_in_s == pytest.approx(20.0, abs=1.1)


def test_who_leaves_early_does_what_it_can_and_the_others_the_rest() -> None:
    stays, leaves = (
        ProjectedWorker("stays", 0, 0.0, 0.1, 4),
        ProjectedWorker("leaves", 20, 0.0, 0.1, 4, most=50),
    )
    found = project([stays, leaves], 800)
    assert found.batches == {"stays": 150, "leaves": 50}
    assert found.ends_in_s == pytest.approx(15.0)


def test_where_everybody_leaves_the_round_is_what_they_can_do() -> None:
    found = project([ProjectedWorker(name, 0, 0.0, 0.1, 4, 2, most=31) for name in "ab"], 10_000)
    assert found.batches == {"a": 30, "b": 30}
    # one that has done more than it could is at its end
    assert project([ProjectedWorker("a", 7, 0.0, 0.1, 4, most=3)], 10_000).batches == {"a": 7}


def test_a_target_already_reached_is_now() -> None:
    got = project([ProjectedWorker("a", 50, 0.0, 1.0, 4), ProjectedWorker("b", 0, 0.0, 9.0, 4)], 100)
    assert got.batches["a"] >= 50
    # whoever has nothing yet still takes part with one batch
    assert got.batches["b"] == 1


def test_gradient_accumulation_is_never_cut() -> None:
    got = project(
        [ProjectedWorker("a", 3, 0.0, 1.0, 1, multiple=4), ProjectedWorker("b", 0, 0.0, 1.7, 1, multiple=4)],
        21,
    )
    assert all(count % 4 == 0 and count > 0 for count in got.batches.values())
    assert sum(got.batches.values()) >= 21


paces_strategy = st.lists(
    st.tuples(st.floats(0.001, 600), st.integers(1, 64), st.integers(0, 500), st.floats(0, 1)),
    min_size=1,
    max_size=8,
).map(
    lambda rows: [
        ProjectedWorker(str(i), done, share * batch_s, batch_s, size)
        for i, (batch_s, size, done, share) in enumerate(rows)
    ]
)


@given(paces_strategy, st.integers(1, 100_000))
def test_any_projection_meets_its_target_without_more_than_a_batch_of_waiting(
    paces: list[ProjectedWorker], wanted: int
) -> None:
    got = project(paces, wanted)
    assert sum(got.batches[pace.worker] * pace.batch_size for pace in paces) >= wanted
    for pace in paces:
        assert got.batches[pace.worker] >= max(1, pace.done)
        waits = got.ends_in_s - pace.finish_s(got.batches[pace.worker])
        assert (
            -1e-6 <= waits <= pace.batch_s * (1 + 1e-6) + got.ends_in_s * 1e-5
            or got.batches[pace.worker] == 1
        )


@pytest.mark.parametrize("scale", [0.001, 0.1, 1.0, 600.0])
@pytest.mark.parametrize("workers", [2, 7])
def test_idle_time_is_under_five_percent_at_speed_ratio_seven(scale: float, workers: int) -> None:
    """60 batches of the fastest a round, batch times from 1 to 7: the same at every scale."""
    dice = random.Random(4)
    idle = []
    for _ in range(50):
        times = [scale, 7 * scale, *(scale * dice.uniform(1, 7) for _ in range(workers - 2))]
        paces = [ProjectedWorker(str(i), 0, 0.0, batch_s, 8) for i, batch_s in enumerate(times)]
        wanted = math.ceil(sum(8 * 60 * scale / batch_s for batch_s in times))
        got = project(paces, wanted)
        ends = [pace.finish_s(got.batches[pace.worker]) for pace in paces]
        idle.append(sum(max(ends) - end for end in ends) / (len(ends) * max(ends)))
    assert sum(idle) / len(idle) < 0.05


def test_a_hundred_workers_are_fast() -> None:
    dice = random.Random(1)
    paces = [ProjectedWorker(str(i), 0, dice.random(), dice.uniform(0.1, 0.7), 32) for i in range(100)]
    started = Stopwatch()
    project(paces, 1_000_000)
    assert started.elapsed_s() < 0.5

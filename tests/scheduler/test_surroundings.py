"""What the round machine is told of its surroundings: leases, data, refusals; and what one life hands on."""

from __future__ import annotations

import pytest
from tests.scheduler.test_rounds import rules
from tests.scheduler.world import Worker, World, received

from hypha.errors import AllocationFailed, JobFailed, ModelError
from hypha.messages import Contribution, ExecutorError, JobStamp, ModelReady, NextSlice, PeerRef, SliceRange
from hypha.scheduler.data.slices import SliceTracker
from hypha.scheduler.rounds.events import (
    AnswerSlice,
    DataServed,
    Disregarded,
    Drop,
    Fail,
    FirstTheta,
    JobRefused,
    Joined,
    KeepSlices,
    LeasesHeld,
    Publish,
    Record,
    Restart,
    SliceAsked,
    TimePassed,
    Told,
)
from hypha.scheduler.rounds.machine import RoundMachine
from hypha.scheduler.rounds.policy import CarriedOver, Start

SERVER = PeerRef(peer="ps")


def machine(
    start: Start | None = None, carried: CarriedOver | None = None, **changes: object
) -> RoundMachine:
    made = RoundMachine(
        rules(**changes),
        start or Start("job"),
        SliceTracker((40,) * 10),
        PeerRef(peer="scheduler"),
        carried or CarriedOver(),
    )
    made.handle(Joined(SERVER, "aggregate"), 0.0)
    return made


def training(**changes: object) -> World:
    world = World(rules(**{"samples": 40_000, **changes}))
    world.begin()
    for peer in "ab":
        world.add(Worker(peer, 0.05))
    world.run(60, until=lambda: all(world.workers[peer].batches > 3 for peer in "ab"))
    return world


def kinds(actions: list[object]) -> list[type]:
    return [type(action) for action in actions]


# --- leases -----------------------------------------------------------------------------------------------


def test_too_few_leases_for_too_long_end_the_job_with_what_is_missing() -> None:
    one = machine(wait_s=2.0, min_workers=2)
    assert one.handle(LeasesHeld(1, 1, "waiting for workers: 2 of 3 leases"), 10.0) == []
    one.handle(TimePassed(), 11.9)
    assert one.phase == "loading"
    (fail,) = [action for action in one.handle(TimePassed(), 12.0) if isinstance(action, Fail)]
    assert isinstance(fail.error, AllocationFailed)
    assert str(fail.error) == (
        "after 2 s still waiting for workers: 2 of 3 leases; "
        "start more workers, ask for less or raise price.max"
    )
    assert one.handle(TimePassed(), 13.0) == []


def test_the_wait_for_leases_begins_anew_with_enough_of_them() -> None:
    one = machine(wait_s=2.0, min_workers=2)
    for held, at in [((1, 1), 0.0), ((2, 1), 1.9), ((2, 0), 2.0), ((3, 1), 3.9), ((0, 1), 9.0)]:
        one.handle(LeasesHeld(*held, "short"), at)
    one.handle(TimePassed(), 10.9)
    assert one.phase == "loading"
    assert Fail in kinds(one.handle(TimePassed(), 11.0))


def test_without_a_limit_leases_are_waited_for_and_before_anything_is_known_nobody_is_blamed() -> None:
    one = machine(wait_s=2.0)
    one.handle(TimePassed(), 100.0)
    assert one.phase == "loading", "nobody has said how many leases are held"
    one = machine(wait_s=None)
    one.handle(LeasesHeld(0, 0, "none"), 0.0)
    one.handle(TimePassed(), 1e6)
    assert one.phase == "loading"


# --- data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("served", [True, False])
def test_while_nobody_serves_data_no_deadline_runs(served: bool) -> None:
    world = training(samples=400, rounds=2, deadline_s=1.0, grace_s=0.5)
    world.feed(DataServed(served))
    world.workers["b"].hung = True
    world.run(30, until=lambda: world.machine.round > 0)
    assert (world.machine.round > 0) == served
    world.feed(DataServed(True))
    world.run(60, until=lambda: world.machine.round > 0)
    assert world.machine.round > 0


# --- refusals and what does not count ---------------------------------------------------------------------


def test_a_worker_that_refuses_the_job_is_replaced_and_the_others_are_told() -> None:
    world = training()
    actions = world.machine.handle(JobRefused("a", "train", "no such executor (unsupported)"), world.now)
    assert actions[0] == Drop("a", "train", "no such executor (unsupported)")
    assert set(world.machine.members) == {"b"}
    assert world.machine.failures.in_a_row == 1


def test_a_parameter_server_that_refuses_the_job_ends_the_life() -> None:
    one = machine()
    actions = one.handle(JobRefused("ps", "aggregate", "no"), 1.0)
    assert kinds(actions) == [Drop, KeepSlices, Restart]
    assert isinstance(actions[-1], Restart)
    assert actions[-1].carried.in_a_row == 1
    assert one.handle(Joined(SERVER, "aggregate"), 2.0) == [], "it is over"


def test_refusals_count_as_failures_over_all_lives_together() -> None:
    carried = CarriedOver()
    for _ in range(4):
        (*_, restart) = machine(carried=carried).handle(JobRefused("ps", "aggregate", "no"), 1.0)
        assert isinstance(restart, Restart)
        carried = restart.carried
    (fail,) = machine(carried=carried).handle(JobRefused("ps", "aggregate", "no"), 1.0)
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, JobFailed)
    assert "5 executors failed in a row" in str(fail.error)


def test_what_is_handed_on_comes_out_as_it_was() -> None:
    world = training(executor_restarts=9)
    for peer, kind in (("a", "not-finite"), ("b", "internal")):
        world.run(60, until=lambda: world.workers[peer].batches > 3)  # noqa: B023 - awaited in this turn
        world.fail(peer, kind, "broken")
        world.run(0.5)
    carried = world.machine.failures.hand_on(7.0)
    assert (carried.in_a_row, carried.short_since) == (2, 7.0)
    assert dict(carried.not_finite) == {"a": 1}
    assert dict(carried.restarts) == {"a": 1, "b": 1}
    again = machine(carried=carried, executor_restarts=9)
    assert again.failures.hand_on(again.short_since) == carried


def test_what_was_received_in_vain_is_counted() -> None:
    one = machine()
    one.handle(Disregarded("no lease"), 1.0)
    one.handle(Disregarded("no lease"), 1.0)
    assert one.counts["no lease"] == 2


# --- what is made durable ---------------------------------------------------------------------------------


def test_theta_of_round_0_is_told_once() -> None:
    one = machine()
    ready = ModelReady(round=0, theta="t0", parameters=1, size_bytes=4)
    told = Told("ps", "aggregate", "i", JobStamp(job_id="job"), ready)
    assert FirstTheta("t0") in one.handle(told, 1.0)
    assert FirstTheta not in kinds(one.handle(told, 2.0) + one.handle(TimePassed(), 3.0))
    later = machine(Start("job", 0, 2, 5, "t2"))
    ready = ModelReady(round=2, theta="t2", parameters=1, size_bytes=4)
    told = Told("ps", "aggregate", "i", JobStamp(job_id="job"), ready)
    assert FirstTheta not in kinds(later.handle(told, 1.0) + later.handle(TimePassed(), 2.0))


def test_slices_are_kept_before_their_answer_and_only_when_they_changed() -> None:
    world = training()
    one, seq = world.machine, world.workers["a"].seq + 1
    stamp = JobStamp(job_id="job", round=one.round)
    question = NextSlice(stamp=stamp, incarnation=world.workers["a"].incarnation, seq=seq)
    one.handle(TimePassed(), world.now)
    keep, answer = one.handle(SliceAsked("a", question), world.now)
    assert isinstance(keep, KeepSlices)
    assert isinstance(answer, AnswerSlice)
    assert answer.slice is not None
    assert keep.tracker == one.tracker.to_state()
    assert one.handle(SliceAsked("a", question), world.now) == [answer], "the same question"
    assert KeepSlices not in kinds(one.handle(TimePassed(), world.now)), "nothing has changed since"
    one.handle(JobRefused("b", "train", "no"), world.now)
    assert KeepSlices in kinds(one.handle(TimePassed(), world.now))


def test_a_round_that_is_recorded_has_its_slices_with_it() -> None:
    world = training(samples=400, rounds=3)
    world.run(60)
    assert isinstance(world.ended, Publish)
    for before, action in zip(world.actions, world.actions[1:], strict=False):
        if isinstance(before, Record) and isinstance(action, KeepSlices):
            assert before.tracker is not None
            assert action.tracker.version > before.tracker.version


def test_a_round_that_has_not_begun_here_gets_slices_only_with_an_update_in_this_one() -> None:
    world = training()
    one, worker = world.machine, world.workers["a"]
    stamp = JobStamp(job_id="job", round=one.round + 1)
    question = NextSlice(stamp=stamp, incarnation=worker.incarnation, seq=worker.seq + 1)
    (answer,) = one.handle(SliceAsked("a", question), world.now)
    assert isinstance(answer, AnswerSlice)
    assert (answer.slice, "has not begun here yet" in answer.reason) == (None, True)
    part = Contribution(
        round=one.round,
        worker="a",
        incarnation=worker.incarnation,
        samples=8,
        batches=2,
        batch_size=4,
        steps=0,
        ranges=(SliceRange(epoch=0, slice=0, start=0, stop=8),),
    )
    one.handle(Told("ps", "aggregate", "ps-1", JobStamp(job_id="job"), received(part)), world.now)
    (_, answer) = one.handle(SliceAsked("a", question), world.now)
    assert isinstance(answer, AnswerSlice)
    assert answer.slice is not None


def test_a_model_that_two_parameter_servers_on_one_machine_cannot_build_ends_the_job() -> None:
    def failing(life: int, carried: CarriedOver) -> list[object]:
        error = ExecutorError(kind="model", message=f"the source lacks {life} shards")
        told = Told("ps", "aggregate", f"e-{life}", JobStamp(job_id="job"), error)
        return list(machine(carried=carried).handle(told, 1.0))

    (*_, restart) = failing(1, CarriedOver())
    assert isinstance(restart, Restart)
    (fail,) = failing(2, restart.carried)
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, ModelError)
    assert "the source lacks 2 shards (said by 2 executors)" in str(fail.error)

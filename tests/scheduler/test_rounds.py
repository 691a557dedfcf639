"""The round machine against a virtual network: workers of all speeds that die, hang, repeat and reorder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import example
from hypothesis import strategies as st
from tests.scheduler.world import Worker, World
from tests.support.examples import few_and_many

from hypha.errors import JobFailed, ModelError
from hypha.journal import Journal
from hypha.messages import (
    CheckpointSaved,
    CloseRound,
    ExecutorError,
    JobStamp,
    ModelReady,
    NextSlice,
    PeerRef,
    Plan,
    Progress,
    RoundApplied,
    RoundStarted,
    SaveCheckpoint,
    SendModel,
    UpdateReceived,
)
from hypha.scheduler.data.slices import SliceTracker
from hypha.scheduler.rounds.events import (
    Again,
    AnswerSlice,
    Drop,
    Fail,
    Joined,
    KeepSlices,
    LeasesHeld,
    LetGo,
    ParticipantLeaves,
    ParticipantLost,
    Publish,
    Reachable,
    Record,
    Reported,
    Restart,
    Send,
    SliceAsked,
    Told,
    Unreachable,
)
from hypha.scheduler.rounds.machine import RoundMachine
from hypha.scheduler.rounds.policy import CarriedOver, Rules, Start


def rules(**changes: object) -> Rules:
    given_ = {"rounds": 5, "samples": 400, "min_workers": 1, "grace_s": 1.0, "deadline_s": 5.0, **changes}
    return Rules(**given_)  # type: ignore[arg-type]


def check_contributions(world: World, rounds: int) -> None:
    """Every round applied once; every sample of every complete epoch in exactly one applied update."""
    assert [number for number, _ in world.applied] == list(range(rounds))
    assert sorted(world.records) == list(range(rounds))
    rows: Counter[tuple[int, int, int]] = Counter()
    for number, parts in world.applied:
        entry = world.records[number]
        assert {part.worker for part in entry.contributors} <= {part.worker for part in parts}
        for part in parts:
            assert sum(span.stop - span.start for span in part.ranges) == part.samples
            for span in part.ranges:
                rows.update((span.epoch, span.slice, row) for row in range(span.start, span.stop))
    world.rows = rows


def exactly_once(world: World, complete: int) -> None:
    """In all epochs before ``complete`` every row was used exactly once."""
    rows = world.rows
    assert all(count == 1 for count in rows.values())
    for epoch in range(complete):
        for index, samples in enumerate(world.samples):
            assert all(rows[epoch, index, row] == 1 for row in range(samples))


def test_a_job_of_five_rounds() -> None:
    world = World(rules())
    world.begin()
    world.add(Worker("a", 0.05))
    world.add(Worker("b", 0.12))
    world.run(600)
    assert isinstance(world.ended, Publish)
    assert world.machine.phase == "done"
    check_contributions(world, 5)
    exactly_once(world, world.machine.tracker.epoch)
    for _, parts in world.applied[1:]:
        assert {part.worker for part in parts} == {"a", "b"}
        assert 400 <= sum(part.samples for part in parts) <= 440
    closes = [
        a.directive for a in world.actions if isinstance(a, Send) and isinstance(a.directive, CloseRound)
    ]
    assert [close.final for close in closes] == [False] * 4 + [True]
    assert closes[-1].checkpoint


def test_fixed_inner_steps_are_told_from_the_start() -> None:
    world = World(rules(inner_steps=12))
    world.begin()
    world.add(Worker("a", 0.05))
    world.add(Worker("b", 0.35))
    world.run(600)
    assert isinstance(world.ended, Publish)
    check_contributions(world, 5)
    for _, parts in world.applied:
        assert [part.batches for part in parts] == [12, 12]
    plans = [a.directive for a in world.actions if isinstance(a, Send) and isinstance(a.directive, Plan)]
    assert len(plans) == 10


def test_inner_steps_are_of_as_many_batches_as_gradients_are_accumulated_over() -> None:
    world = World(rules(inner_steps=12, multiple=3))
    world.begin()
    world.add(Worker("a", 0.05))
    world.add(Worker("b", 0.35))
    world.run(600)
    assert isinstance(world.ended, Publish)
    for _, parts in world.applied:
        assert [part.batches for part in parts] == [36, 36]


@pytest.mark.parametrize(
    ("fast_s", "target"),
    [(1.0, 8 * 70), (0.002, 8 * 60), (60.0, 8 * 70)],
    ids=["a minute", "a tenth of a second", "an hour"],
)
def test_idle_time_at_speed_ratio_seven(fast_s: float, target: int) -> None:
    """After the first rounds, in which speeds are learnt: less than 5 % waiting at sync points."""
    world = World(
        rules(rounds=12, samples=target, deadline_s=1000.0, grace_s=100.0),
        samples=(64,) * 200,
        delay=(fast_s / 1000, fast_s / 500),
        outer_s=fast_s / 1000,
        report_s=max(0.1, fast_s / 2),
    )
    world.begin()
    fast = world.add(Worker("fast", fast_s, batch_size=8, upload_s=0.0))
    slow = world.add(Worker("slow", 7 * fast_s, batch_size=8, upload_s=0.0))
    world.run(1e7, until=lambda: world.machine.round >= 2)
    began, idle = world.now, fast.idle_s + slow.idle_s
    world.run(1e7)
    assert isinstance(world.ended, Publish)
    share = (fast.idle_s + slow.idle_s - idle) / (2 * (world.now - began))
    assert share < 0.05
    check_contributions(world, 12)
    planned = [
        a.directive.batches for a in world.actions if isinstance(a, Send) and isinstance(a.directive, Plan)
    ]
    assert all(batches > 0 for batches in planned)


@pytest.mark.parametrize("round_s", [5.0, 60.0])
@pytest.mark.parametrize("slow_s", [0.4, 2.0])
def test_idle_time_of_each_at_speeds_of_one_to_ten(round_s: float, slow_s: float) -> None:
    """Batches of the slowest are up to two fifths of a round: nobody waits for a twentieth of its time."""
    speeds = (1, 2, 4, 10)
    rounds = 12 if round_s < 10 else 6
    samples = round(sum(8 * speed / slow_s for speed in speeds) * round_s)
    world = World(
        rules(rounds=rounds, samples=samples, deadline_s=1000.0, grace_s=100.0),
        samples=(64,) * 2000,
        # as executors report
        report_s=0.05,
    )
    world.begin()
    workers = [world.add(Worker(f"{speed}", slow_s / speed, batch_size=8, upload_s=0.02)) for speed in speeds]
    world.run(1e4, until=lambda: world.machine.round >= 2)
    began, idle = world.now, [worker.idle_s for worker in workers]
    world.run(1e4, until=lambda: world.machine.round == rounds - 1)
    told = {peer: member.idle_share for peer, member in world.machine.members.items()}
    world.run(1e4)
    assert isinstance(world.ended, Publish)
    length_s = world.now - began
    shares = {
        worker.peer: (worker.idle_s - before) / length_s for worker, before in zip(workers, idle, strict=True)
    }
    assert max(shares.values()) < 0.05, shares
    assert round_s <= length_s / (rounds - 2) < 1.3 * round_s
    # what the machine says of them is what they have seen
    assert told == pytest.approx(shares, abs=0.02)


def test_a_report_costs_the_same_however_many_slices_a_dataset_has() -> None:
    """Of a million slices none is looked at, as each worker reports many times a second."""

    class Counted(tuple[int, ...]):
        looked_at = 0

        def __iter__(self) -> Iterator[int]:
            Counted.looked_at += 1
            return super().__iter__()

    world = World(rules(samples=4000), journal=Journal())
    world.begin()
    for name in "abc":
        world.add(Worker(name, 0.05))
    world.run(60, until=lambda: world.workers["a"].batches > 5)
    world.machine.tracker.samples = Counted(world.machine.tracker.samples)
    before = world.workers["a"].batches
    for worker in world.workers.values():
        # what is asked for is another matter
        worker.slices[0][3] = 10**6
    world.run(60, until=lambda: world.workers["a"].batches > before + 50)
    assert world.workers["a"].batches > before + 50
    assert Counted.looked_at == 0


def test_a_worker_that_slows_down_by_half_is_planned_again_within_the_round() -> None:
    world = World(rules(rounds=4, samples=4000, deadline_s=1000.0, grace_s=100.0), samples=(64,) * 200)
    world.begin()
    slowing, steady = world.add(Worker("slowing", 0.05)), world.add(Worker("steady", 0.05))
    world.run(1e4, until=lambda: 2 in slowing.plan and slowing.round == 2 and slowing.batches > 60)
    first, began, idle = slowing.plan[2], world.now, steady.idle_s
    assert first is not None
    slowing.batch_s *= 2.0
    world.run(1e4, until=lambda: world.machine.round == 3 and bool(steady.batches))
    assert slowing.plan[2] < 0.75 * first
    parts = {part.worker: part.batches for part in world.applied[2][1]}
    assert parts["steady"] > 1.2 * first
    # the other one did the rest, and did not wait
    assert steady.idle_s - idle < 0.05 * (world.now - began)
    world.run(1e4)
    assert isinstance(world.ended, Publish)


def test_batches_that_grow_are_planned_with_and_impossible_ones_are_not_believed() -> None:
    world = World(rules(samples=4000, most_batch_size=16))
    world.begin()
    world.add(Worker("a", 0.05, batch_size=4))
    machine = world.machine
    world.run(600, until=lambda: machine.round == 1 and machine.members["a"].started == 0)
    member = machine.members["a"]
    learnt = member.batch_time.value_s
    assert learnt is not None
    stamp = JobStamp(job_id="job", round=1)

    def started(size: int, attempt: int) -> None:
        event = RoundStarted(round=1, theta=machine.theta, attempt=attempt, batch_size=size)
        machine.handle(Told("a", "train", member.incarnation, stamp, event), world.now)

    started(8, 1)
    assert (member.batch_size, member.attempt, member.batches) == (8, 1, 0)
    # twice the rows are thought to take twice the time, until one batch was measured
    assert member.batch_time.value_s == pytest.approx(2 * learnt)
    started(17, 2)
    assert (member.batch_size, member.impossible) == (8, 1)
    report = Progress(round=1, batches=1, samples=8, busy_s=learnt, loss=1.0, attempt=1)
    machine.handle(Reported("a", member.incarnation, stamp, report), world.now + 0.1)
    assert member.batch_time.value_s < 1.6 * learnt


def test_nobody_passes_its_last_plan_by_more_than_a_batch_and_refinements_are_few() -> None:
    world = World(rules(rounds=6, samples=4000), delay=(0.05, 0.15))
    world.begin()
    world.add(Worker("a", 0.05))
    world.add(Worker("b", 0.11))
    world.add(Worker("c", 0.07))
    world.run(6000)
    assert isinstance(world.ended, Publish)
    for number, parts in world.applied[1:]:
        for part in parts:
            assert abs(part.batches - world.workers[part.worker].plan[number]) <= 1
    plans = [a for a in world.actions if isinstance(a, Send) and isinstance(a.directive, Plan)]
    assert len(plans) < 6 * 3 * 20


def test_a_worker_that_dies_mid_round_is_not_waited_for_and_its_slices_return() -> None:
    world = World(rules(rounds=6))
    world.begin()
    world.add(Worker("a", 0.05))
    world.add(Worker("b", 0.05))
    world.run(60, until=lambda: world.machine.round == 1 and world.workers["b"].batches > 10)
    world.kill("b")
    world.run(600)
    assert isinstance(world.ended, Publish)
    check_contributions(world, 6)
    assert world.machine.tracker.held("b") == []
    # what b had in applied rounds may occur again, because its slice was not finished; nothing is missing
    for epoch in range(world.machine.tracker.epoch):
        for index in range(10):
            assert all(world.rows[epoch, index, row] >= 1 for row in range(40))


def test_whoever_ends_soon_hands_over_what_it_has_trained_and_the_round_goes_on() -> None:
    """A round of 40 s, of three equal workers: one is told 10 s after its beginning that it has 10 s left."""
    world = World(rules(rounds=3, samples=9600, quorum=0.5, min_workers=2))
    world.begin()
    for peer in "abc":
        world.add(Worker(peer, 0.05))
    world.run(600, until=lambda: world.workers["c"].round == 1 and world.workers["c"].batches >= 200)
    told = world.now
    world.leave("c", 10.0)
    world.run(60, until=lambda: world.let_go == ["c"])
    # a second is kept for the update, and half a batch
    assert 8.5 < world.now - told < 9.5
    (part,) = [part for part in world.updates.values() if part.worker == "c"]
    assert 370 <= part.batches <= 382
    # neither the quorum nor its early update ends the round of those who stay, and who comes joins it
    assert world.machine.phase == "training"
    world.add(Worker("d", 0.05))
    world.run(600, until=lambda: world.machine.round == 2)
    assert {one.worker for one in world.applied[1][1]} == {"a", "b", "c", "d"}
    assert 9600 <= sum(one.samples for one in world.applied[1][1]) <= 9700
    world.run(600)
    assert isinstance(world.ended, Publish)
    assert world.let_go == ["c"]
    assert world.dropped == []
    check_contributions(world, 3)


@pytest.mark.parametrize("inner_steps", [None, 400])
def test_whoever_has_a_second_hands_its_update_over_at_once(inner_steps: int | None) -> None:
    world = World(rules(rounds=2, samples=4800, inner_steps=inner_steps))
    world.begin()
    for peer in "ab":
        world.add(Worker(peer, 0.05))
    world.run(600, until=lambda: world.machine.round == 0 and world.workers["b"].batches >= 100)
    told = world.now
    world.leave("b", 1.2)
    world.run(60, until=lambda: world.let_go == ["b"])
    assert world.now - told < 0.3
    world.run(600)
    assert isinstance(world.ended, Publish)
    assert [part.batches for part in world.applied[0][1] if part.worker == "b"] in ([101], [102], [103])
    check_contributions(world, 2)


def test_the_only_worker_that_leaves_keeps_its_round_open_for_the_next() -> None:
    world = World(rules(rounds=2, samples=800))
    world.begin()
    world.add(Worker("a", 0.05))
    world.run(600, until=lambda: world.workers["a"].round == 1 and world.workers["a"].batches >= 20)
    world.leave("a", 3.0)
    world.run(10)
    assert world.let_go == ["a"]
    assert world.machine.round == 1
    assert world.machine.paused
    world.add(Worker("b", 0.05))
    world.run(600)
    assert isinstance(world.ended, Publish)
    # what it has trained counts, whether the next one comes in time for that round or for the next
    assert "a" in {part.worker for part in world.applied[1][1]}
    check_contributions(world, 2)


def test_a_long_notice_is_used_for_more_rounds_and_none_is_begun_that_cannot_be_ended() -> None:
    world = World(rules(rounds=12, samples=400))
    world.begin()
    for peer in "ab":
        world.add(Worker(peer, 0.05))
    world.run(600, until=lambda: world.workers["b"].round == 1 and world.workers["b"].batches >= 10)
    world.leave("b", 12.0)
    world.run(600)
    assert isinstance(world.ended, Publish)
    assert world.let_go == ["b"]
    inside = [number for number, parts in world.applied if any(part.worker == "b" for part in parts)]
    # a round takes 2.6 s: those that were over before, and the one in which it left
    assert inside == list(range(inside[-1] + 1))
    assert inside[-1] >= 4
    check_contributions(world, 12)
    assert not world.machine.counts["lost samples"]


def test_a_parameter_server_that_leaves_saves_itself_and_goes_when_there_is_another() -> None:
    world = World(rules(rounds=3, samples=4000))
    world.begin()
    for peer in "ab":
        world.add(Worker(peer, 0.05))
    world.run(600, until=lambda: world.workers["a"].round == 1 and world.workers["a"].batches >= 10)
    world.feed(LeasesHeld(2, 1, ""))
    world.feed(ParticipantLeaves("ps", "aggregate", 20.0))
    asked = [
        one for one in world.actions if isinstance(one, Send) and isinstance(one.directive, SaveCheckpoint)
    ]
    assert [(one.to.peer, one.directive) for one in asked] == [("ps", SaveCheckpoint(round=1))]
    world.feed(ParticipantLeaves("ps", "aggregate", 19.0))
    world.feed(LeasesHeld(2, 2, ""))
    assert world.ended is None
    world.say_server(CheckpointSaved(round=1, place="scheduler"))
    world.run(5, until=lambda: world.ended is not None)
    assert isinstance(world.ended, Restart)
    (went,) = [one for one in world.actions if isinstance(one, LetGo)]
    assert (went.peer, went.kind) == ("ps", "aggregate")
    assert (
        len([one for one in world.actions if isinstance(one, Send) and one.directive == asked[0].directive])
        == 1
    )


def test_a_machine_with_worker_and_parameter_server_ends_the_round_before_it_goes() -> None:
    """Nobody could send the update of a worker that is gone again to another parameter server."""
    world = World(rules(rounds=3, samples=9600, checkpoint_every=100))
    world.begin()
    for peer in "abc":
        world.add(Worker(peer, 0.05))
    world.run(600, until=lambda: world.workers["c"].round == 1 and world.workers["c"].batches >= 50)
    told = world.now
    world.feed(LeasesHeld(3, 1, ""))
    world.feed(ParticipantLeaves("ps", "aggregate", 10.0))
    world.say_server(CheckpointSaved(round=1, place="scheduler"))
    world.leave("c", 10.0)
    world.run(5)
    # there is another one for the parameter server, and the round is finished with this one nevertheless
    world.feed(LeasesHeld(4, 2, ""))
    world.run(60, until=lambda: world.machine.round == 2 or world.ended is not None)
    assert world.machine.round == 2
    assert 5.0 < world.now - told < 9.0
    assert {part.worker for part in world.applied[1][1]} == set("abc")
    world.run(10, until=lambda: world.ended is not None)
    assert isinstance(world.ended, Restart)
    assert world.book[0] == 2
    assert world.let_go == ["c"]
    closes = [one.directive for one in world.actions if isinstance(one, Send)]
    assert CloseRound(round=1, final=False, checkpoint=True) in closes


def test_an_executor_that_ends_while_its_worker_leaves_is_not_started_again() -> None:
    world = World(rules(rounds=2, samples=800))
    world.begin()
    for peer in "ab":
        world.add(Worker(peer, 0.05))
    world.run(600, until=lambda: world.workers["b"].batches >= 10)
    world.leave("b", 20.0)
    world.crash("b")
    world.run(600)
    assert isinstance(world.ended, Publish)
    assert world.let_go == ["b"]
    assert not [one for one in world.actions if isinstance(one, Again | Drop)]


def test_who_cannot_be_reached_is_not_waited_for_and_the_others_do_its_part() -> None:
    """Its lease lives for minutes, the deadline is far away: the round ends when it would have, at two
    thirds of the pace.
    """
    world = World(rules(rounds=3, samples=2400, min_workers=2, grace_s=500.0, deadline_s=500.0))
    world.begin()
    for peer in "abc":
        world.add(Worker(peer, 0.05))
    world.run(600, until=lambda: world.machine.round == 1)
    began = world.now
    world.run(60, until=lambda: world.workers["c"].batches > 10)
    world.kill("c", noticed_s=120.0)
    world.at(0.5, lambda: world.feed(Unreachable("c", "train")))
    world.run(600, until=lambda: world.machine.round == 2)
    # 600 batches of 0.05 s between three take 10 s, between two 15 s
    assert world.now - began < 17
    assert {part.worker for part in world.applied[1][1]} == {"a", "b"}
    assert sum(part.samples for part in world.applied[1][1]) >= 2400
    world.run(600)
    assert isinstance(world.ended, Publish)
    check_contributions(world, 3)


def test_who_comes_back_before_the_round_is_over_is_in_it() -> None:
    world = World(rules(rounds=2, samples=1600))
    world.begin()
    world.add(Worker("a", 0.05))
    world.add(Worker("b", 0.05))
    world.run(60, until=lambda: world.workers["b"].batches > 10)
    world.feed(Unreachable("b", "train"))
    assert world.machine.members["b"].state(0) == "unreachable"
    world.feed(Reachable("b", "train"))
    assert world.machine.members["b"].state(0) in ("training", "scheduled")
    world.run(600)
    assert isinstance(world.ended, Publish)
    assert all({part.worker for part in parts} == {"a", "b"} for _, parts in world.applied)
    check_contributions(world, 2)


def test_what_somebody_says_shows_that_it_is_reachable() -> None:
    world = World(rules(rounds=2, samples=1600))
    world.begin()
    world.add(Worker("a", 0.05))
    world.feed(Unreachable("a", "train"))
    world.run(60, until=lambda: world.machine.members["a"].started == 0)
    assert not world.machine.members["a"].absent


def test_a_round_is_kept_while_too_few_can_be_reached() -> None:
    world = World(rules(rounds=3, min_workers=2))
    world.begin()
    world.add(Worker("a", 0.05))
    world.add(Worker("b", 0.05))
    world.run(60, until=lambda: world.machine.round == 1 and world.workers["b"].batches > 5)
    world.workers["b"].hung = True
    world.feed(Unreachable("b", "train"))
    world.run(60)
    assert world.machine.paused
    assert world.machine.round == 1
    world.kill("b")
    world.add(Worker("c", 0.05))
    world.run(300)
    assert isinstance(world.ended, Publish)
    assert {part.worker for part in world.applied[1][1]} == {"a"}
    assert {part.worker for part in world.applied[2][1]} == {"a", "c"}


def test_too_few_workers_pause_the_job_and_lose_no_round() -> None:
    world = World(rules(rounds=4, min_workers=2))
    world.begin()
    world.add(Worker("a", 0.05))
    world.run(30)
    assert world.machine.phase == "loading"
    world.add(Worker("b", 0.05))
    world.run(60, until=lambda: world.machine.round == 2 and world.workers["b"].batches > 5)
    world.kill("b")
    world.run(300)
    assert world.machine.paused
    assert world.machine.round == 2
    world.add(Worker("c", 0.05))
    world.run(300)
    assert isinstance(world.ended, Publish)
    check_contributions(world, 4)
    assert {part.worker for part in world.applied[3][1]} == {"a", "c"}


def test_a_late_joiner_in_training_joins_the_open_round() -> None:
    world = World(rules(rounds=3, samples=4000))
    world.begin()
    world.add(Worker("a", 0.05))
    world.run(60, until=lambda: world.machine.phase == "training" and world.workers["a"].batches > 100)
    world.add(Worker("late", 0.05))
    world.run(6000)
    assert isinstance(world.ended, Publish)
    assert {part.worker for part in world.applied[0][1]} == {"a", "late"}
    check_contributions(world, 3)
    exactly_once(world, world.machine.tracker.epoch)


def test_a_late_joiner_past_training_joins_the_next_round() -> None:
    world = World(rules(rounds=3))
    world.begin()
    world.add(Worker("a", 0.05))
    world.add(Worker("b", 0.05, upload_s=3.0))
    world.run(60, until=lambda: world.machine.phase == "updating")
    world.add(Worker("late", 0.05, load_s=0.0))
    world.run(600)
    assert isinstance(world.ended, Publish)
    assert {part.worker for part in world.applied[0][1]} == {"a", "b"}
    assert {part.worker for part in world.applied[1][1]} == {"a", "b", "late"}


def test_a_hung_worker_is_left_out_at_the_deadline_and_then_replaced() -> None:
    world = World(rules(rounds=8))
    world.begin()
    world.add(Worker("a", 0.05))
    world.add(Worker("b", 0.05))
    world.run(60, until=lambda: world.machine.round == 1 and world.workers["b"].batches > 10)
    world.workers["b"].hung = True
    began = world.now
    world.run(600, until=lambda: world.machine.round == 2)
    assert world.now - began < 20
    world.run(600)
    assert isinstance(world.ended, Publish)
    assert "b" in world.dropped
    check_contributions(world, 8)


def test_a_quorum_closes_the_round_after_the_grace() -> None:
    world = World(rules(rounds=2, quorum=0.6, grace_s=2.0, deadline_s=500.0))
    world.begin()
    for peer in "abc":
        world.add(Worker(peer, 0.05))
    world.run(60, until=lambda: world.machine.phase in ("scheduled", "updating"))
    world.workers["c"].upload_s = 60.0
    began = world.now
    world.run(600, until=lambda: world.machine.round == 1)
    assert world.now - began < 15
    assert {part.worker for part in world.applied[0][1]} == {"a", "b"}
    # its late update is refused as stale; theta brings it back, without its old slices
    world.workers["c"].upload_s = 0.01
    world.run(600)
    assert isinstance(world.ended, Publish)
    check_contributions(world, 2)


def test_rounds_shorter_than_the_way_of_theta_keep_nobody_out_for_ever() -> None:
    """Such as that to a worker which has to be reached through a relay first."""
    world = World(rules(rounds=12, quorum=0.5, grace_s=1.0, deadline_s=20.0, min_workers=1))
    world.begin()
    world.add(Worker("a", 0.05))
    world.run(60, until=lambda: world.machine.round == 1)
    world.add(Worker("far", 0.05, theta_s=6.0))
    world.run(600)
    assert isinstance(world.ended, Publish)
    assert world.dropped == []
    with_it = [round_ for round_, parts in world.applied if "far" in {part.worker for part in parts}]
    assert len(with_it) >= 3
    check_contributions(world, 12)


def test_a_worker_that_theta_never_reaches_is_replaced_and_holds_the_others_up_once() -> None:
    world = World(rules(rounds=8, quorum=0.5, grace_s=1.0, deadline_s=20.0, min_workers=1))
    world.begin()
    world.add(Worker("a", 0.05))
    world.run(60, until=lambda: world.machine.round == 1)
    began = world.now
    world.add(Worker("deaf", 0.05, theta_s=1e6))
    world.run(600)
    assert isinstance(world.ended, Publish)
    assert world.dropped == ["deaf"]
    # seven rounds of five seconds by "a" alone
    assert world.now - began < 35 + 20 + 5
    check_contributions(world, 8)


def test_whoever_cannot_be_reached_is_kept_while_its_lease_lives() -> None:
    world = World(rules(rounds=12, min_workers=1))
    world.begin()
    world.add(Worker("a", 0.05))
    world.add(Worker("b", 0.05))
    world.run(60, until=lambda: world.machine.round == 1)
    world.workers["b"].hung = True
    world.feed(Unreachable("b", "train"))
    world.run(60, until=lambda: world.machine.round == 7)
    world.workers["b"].hung = False
    world.feed(Reachable("b", "train"))
    world.run(600)
    assert isinstance(world.ended, Publish)
    assert world.dropped == []
    assert any("b" in {part.worker for part in parts} for round_, parts in world.applied if round_ >= 7)
    check_contributions(world, 12)


def test_a_slow_upload_is_learnt_not_left_out() -> None:
    world = World(rules(rounds=6, deadline_s=5.0))
    world.begin()
    world.add(Worker("a", 0.05))
    world.add(Worker("far", 0.05, upload_s=8.0))
    world.run(6000)
    assert isinstance(world.ended, Publish)
    for _, parts in world.applied:
        assert {part.worker for part in parts} == {"a", "far"}


def test_a_refused_update_is_not_in_the_round_and_the_worker_comes_back() -> None:
    world = World(rules(rounds=4))
    world.begin()
    world.add(Worker("a", 0.05))
    world.add(Worker("b", 0.05))
    world.run(60, until=lambda: world.machine.round == 1)
    world.workers["b"].poisoned = True
    world.run(60, until=lambda: world.machine.round == 2)
    world.workers["b"].poisoned = False
    world.run(600)
    assert isinstance(world.ended, Publish)
    assert [len(parts) for _, parts in world.applied] == [2, 1, 2, 2]
    assert world.machine.counts["update refused: invalid"] == 1
    check_contributions(world, 4)
    assert world.machine.failures.in_a_row == 0


def test_when_all_updates_are_refused_the_round_is_tried_again_and_then_given_up() -> None:
    world = World(rules(rounds=2))
    world.begin()
    world.add(Worker("a", 0.05, poisoned=True))
    world.run(60, until=lambda: world.machine.counts["update refused: invalid"] == 2)
    world.workers["a"].poisoned = False
    world.run(60)
    assert isinstance(world.ended, Publish)
    check_contributions(world, 2)
    # told apart from repetitions, and what the void attempts said is not taken for the last one's
    sent = [action.directive for action in world.actions if isinstance(action, Send)]
    attempts = [directive.attempt for directive in sent if isinstance(directive, SendModel)]
    assert attempts[:3] == [0, 1, 2]
    assert [part.attempt for _, parts in world.applied for part in parts] == [2, 0]
    assert [record.contributors[0].attempt for record in world.records.values()] == [2, 0]
    exactly_once(world, world.machine.tracker.epoch)


@pytest.mark.parametrize("seed", range(6))
def test_words_of_a_refused_attempt_may_come_late_twice_and_out_of_order(seed: int) -> None:
    world = World(rules(rounds=3), seed=seed, delay=(0.01, 0.9), repeat=0.4)
    world.begin()
    world.add(Worker("a", 0.05, poisoned=True))
    world.run(60, until=lambda: world.machine.counts["update refused: invalid"] >= 1)
    world.workers["a"].poisoned = False
    world.run(300)
    assert isinstance(world.ended, Publish)
    check_contributions(world, 3)
    exactly_once(world, world.machine.tracker.epoch)

    world = World(rules(rounds=2, max_failures=1))
    world.begin()
    world.add(Worker("a", 0.05, poisoned=True))
    world.run(600)
    assert isinstance(world.ended, Fail)
    assert isinstance(world.ended.error, JobFailed)
    assert "not finite" in str(world.ended.error)


def test_crashes_of_many_workers_end_the_job() -> None:
    world = World(rules(executor_restarts=0))
    world.begin()
    for number in range(5):
        peer = f"w{number}"
        world.add(Worker(peer, 0.05))
        world.run(0.5)
        world.crash(peer)
        world.run(0.5)
    assert world.dropped == ["w0", "w1", "w2", "w3"]
    assert isinstance(world.ended, Fail)
    assert world.ended.error.exit_code == 5
    assert "Segmentation fault" in str(world.ended.error)


def test_a_wrong_model_is_believed_when_two_say_so() -> None:
    world = World(rules())
    world.begin()
    world.add(Worker("a", 0.05, load_s=1e9))
    world.add(Worker("b", 0.05, load_s=1e9))
    for peer in "ab":
        assert world.ended is None
        world.say(world.workers[peer], ExecutorError(kind="model", message="no such file config.json"))
        world.run(1)
    assert isinstance(world.ended, Fail)
    assert isinstance(world.ended.error, ModelError)
    assert "config.json" in str(world.ended.error)


def test_the_parameter_server_lost_asks_for_a_new_life() -> None:
    world = World(rules())
    world.begin()
    world.add(Worker("a", 0.05))
    world.run(5)
    world.feed(ParticipantLost("ps", "aggregate", "its lease ended"))
    assert world.ended == Restart("its lease ended", carried=CarriedOver(had_model=("a",)))


JOB = JobStamp(job_id="job")
APPLIED = RoundApplied(round=0, theta="x", contributors=("a",))

# --- what strangers and ghosts say -------------------------------------------------------------------


def running() -> World:
    world = World(rules(samples=40_000))
    world.begin()
    world.add(Worker("a", 0.05))
    world.add(Worker("b", 0.05))
    world.run(60, until=lambda: world.machine.phase == "training" and world.workers["a"].batches > 5)
    return world


@pytest.mark.parametrize(
    ("sender", "kind", "stamp", "event", "counted"),
    [
        ("eve", "train", JOB, RoundStarted(round=0, theta="t0"), "uninvited"),
        ("a", "aggregate", JOB, APPLIED, "uninvited"),
        ("a", "train", JOB, APPLIED, "foreign event"),
        ("a", "train", JOB, UpdateReceived(round=0, worker="a", samples=1), "foreign event"),
        ("ps", "aggregate", JOB, RoundStarted(round=0, theta="t0"), "foreign event"),
        ("ps", "aggregate", JOB, RoundApplied(round=7, theta="x", contributors=()), "stale round"),
        ("ps", "aggregate", JobStamp(job_id="other"), APPLIED, "stale generation"),
        ("ps", "aggregate", JobStamp(job_id="job", generation=3), APPLIED, "stale generation"),
    ],
)
def test_strangers_ghosts_and_wrong_roles_are_counted_not_obeyed(
    sender: str, kind: str, stamp: JobStamp, event: object, counted: str
) -> None:
    world = running()
    machine = world.machine
    incarnation = machine.members["a"].incarnation if sender == "a" else "x"
    before = machine.tracker.to_state()
    got = machine.handle(Told(sender, kind, incarnation, stamp, event), world.now)  # type: ignore
    assert [action for action in got if not isinstance(action.directive, Plan)] == []
    assert machine.counts[counted] == 1
    assert machine.round == 0
    assert machine.tracker.to_state() == before


@pytest.mark.parametrize(
    "progress",
    [
        Progress(round=0, batches=1, samples=4, busy_s=0.1, loss=1.0),
        Progress(round=0, batches=10**6, samples=10**9, busy_s=0.1, loss=1.0),
        Progress(round=0, batches=10**6, samples=4, busy_s=float("nan"), loss=1.0),
        Progress(round=3, batches=10**6, samples=10**6, busy_s=1.0, loss=1.0),
    ],
)
def test_old_or_impossible_progress_changes_nothing(progress: Progress) -> None:
    world = running()
    machine = world.machine
    member = machine.members["a"]
    before = (member.batches, member.samples, member.batch_time.value_s)
    machine.handle(Reported("a", member.incarnation, JobStamp(job_id="job"), progress), world.now)  # type: ignore
    assert (member.batches, member.samples, member.batch_time.value_s) == before


def test_a_slice_for_members_only() -> None:
    world = running()
    machine = world.machine
    alive = machine.members["a"].incarnation
    for caller, incarnation, stamp in [
        ("eve", alive, JobStamp(job_id="job")),
        ("a", "ghost", JobStamp(job_id="job")),
        ("a", alive, JobStamp(job_id="job", generation=1)),
        ("a", alive, JobStamp(job_id="elsewhere")),
    ]:
        asked = SliceAsked(caller, NextSlice(stamp=stamp, incarnation=incarnation, seq=9))
        (answer,) = machine.handle(asked, world.now)
        assert isinstance(answer, AnswerSlice)
        assert answer.slice is None
        assert answer.reason


def test_a_worker_on_a_wrong_theta_is_sent_the_right_one() -> None:
    world = running()
    machine = world.machine
    stamp, member = JobStamp(job_id="job"), machine.members["a"]
    wrong = RoundStarted(round=0, theta="something else")
    got = machine.handle(Told("a", "train", member.incarnation, stamp, wrong), world.now)  # type: ignore
    assert SendModel(to=PeerRef(peer="a")) in [action.directive for action in got if isinstance(action, Send)]


@pytest.mark.parametrize("samples", [400, 4000], ids=["short rounds", "long rounds"])
def test_theta_that_never_arrived_is_sent_again(samples: int) -> None:
    world = World(rules(rounds=10, samples=samples))
    world.begin()
    world.add(Worker("a", 0.05))
    world.add(Worker("b", 0.05))
    world.run(600, until=lambda: world.machine.round == 1)
    world.lost_theta.add("b")
    world.run(600)
    assert isinstance(world.ended, Publish)
    assert world.lost_theta == set()
    assert {part.worker for part in world.applied[-1][1]} == {"a", "b"}
    check_contributions(world, 10)


def test_an_update_that_overtakes_the_start_of_its_round_needs_no_theta_again() -> None:
    world = World(rules(rounds=3, inner_steps=5), delay=(0.001, 1.5), seed=3, repeat=0.3)
    world.begin()
    world.add(Worker("fast", 0.001))
    world.add(Worker("slow", 4.0))
    world.run(600)
    assert isinstance(world.ended, Publish)
    sent = [a.directive for a in world.actions if isinstance(a, Send) and isinstance(a.directive, SendModel)]
    assert sorted(directive.to.peer for directive in sent) == ["fast", "slow"]
    exactly_once_after(world, 3)


def exactly_once_after(world: World, rounds: int) -> None:
    check_contributions(world, rounds)
    exactly_once(world, world.machine.tracker.epoch)


# --- other lives --------------------------------------------------------------------------------------


@few_and_many(
    pytest.mark.simulated,
    seed=st.integers(0, 10**6),
    speeds=st.lists(st.floats(0.02, 0.5), min_size=2, max_size=4),
    slow_net=st.booleans(),
    losses=st.lists(
        st.tuples(
            st.floats(0.2, 25), st.sampled_from(["scheduler", "server"]), st.floats(0.1, 4), st.integers(0, 2)
        ),
        min_size=1,
        max_size=4,
    ),
)
@example(
    # the parameter server is lost before anybody records what it applied, the scheduler right after it
    seed=792063,
    speeds=[0.2892416405134119, 0.03983346145625159, 0.22175543609588755, 0.07816378018483464],
    slow_net=True,
    losses=[(5.74, "scheduler", 2.86, 0), (8.73, "scheduler", 0.8, 1), (5.182153960706624, "server", 3.9, 2)],
)
@example(
    # what was applied is reported to the scheduler's successor before the updates that are in it
    seed=0,
    speeds=[0.10546875, 0.046875, 0.109375],
    slow_net=True,
    losses=[(15.0, "scheduler", 1.0, 0)],
)
@example(
    # the same in the first round, of whose theta nothing is recorded yet
    seed=202,
    speeds=[0.341796875, 0.39234004918394905, 0.2191776060982367],
    slow_net=True,
    losses=[(17.75, "scheduler", 0.25, 0)],
)
def test_whoever_dies_whenever_every_round_counts_once_and_no_sample_is_skipped(
    seed: int, speeds: list[float], slow_net: bool, losses: list[tuple[float, str, float, int]]
) -> None:
    world = World(
        rules(rounds=5, samples=600, max_failures=99, min_workers=len(speeds)),
        seed=seed,
        delay=(0.001, 0.6) if slow_net else (0.001, 0.05),
        repeat=0.2,
    )
    world.begin()
    for number, speed in enumerate(speeds):
        world.add(Worker(f"w{number}", speed))
    for when, who, away_s, back in losses:
        if who == "scheduler":
            world.at(when, lambda away_s=away_s: world.take_over(away_s))
        else:
            # from the open round's own checkpoint, or from an older one
            world.at(when, lambda back=back: world.lose_server(world.book[0] - back))
    world.run(5000)
    assert isinstance(world.ended, Publish), (world.machine.phase, world.machine.round, world.machine.counts)
    check_contributions(world, 5)
    if world.rounds_lost:
        # of slices that spanned the checkpoint the first rows come again
        assert all(
            world.rows[epoch, index, row] >= 1
            for epoch in range(world.machine.tracker.epoch)
            for index, samples in enumerate(world.samples)
            for row in range(samples)
        )
    else:
        exactly_once(world, world.machine.tracker.epoch)
    for number, parts in world.applied:
        told = world.records[number].contributors
        assert {part.worker for part in told} == {part.worker for part in parts}


def test_a_worker_whose_batch_does_not_end_is_not_waited_for_in_another_life() -> None:
    world = World(rules(rounds=4, samples=200, min_workers=3, max_failures=9))
    world.begin()
    for name in "abc":
        world.add(Worker(name, 0.1))
    world.run(600, until=lambda: world.machine.round == 1)
    world.workers["c"].stalled = True
    world.workers["c"].training = False
    world.lose_server(1)
    world.run(1000, until=lambda: "c" in world.dropped)
    assert world.dropped == ["c"]
    world.add(Worker("d", 0.1))
    world.run(600)
    assert isinstance(world.ended, Publish)
    check_contributions(world, 4)


def test_an_executor_that_loads_its_model_is_waited_for_in_another_life() -> None:
    world = World(rules(rounds=3, samples=200, min_workers=3, max_failures=9))
    world.begin()
    for name in "ab":
        world.add(Worker(name, 0.1))
    world.add(Worker("c", 0.1, load_s=2000.0))
    world.run(5)
    world.lose_server(0)
    world.run(5000)
    assert isinstance(world.ended, Publish)
    assert world.dropped == []
    check_contributions(world, 3)


# --- everything at once --------------------------------------------------------------------------------


@few_and_many(
    pytest.mark.simulated,
    seed=st.integers(0, 10**6),
    speeds=st.lists(st.floats(0.02, 0.5), min_size=2, max_size=5),
    slow_net=st.booleans(),
    faults=st.lists(
        st.tuples(
            st.floats(0.5, 30), st.integers(0, 4), st.sampled_from(["kill", "crash", "hang", "join", "leave"])
        ),
        max_size=5,
    ),
    fixed=st.booleans(),
)
def test_any_faults_any_order_the_job_ends_and_the_books_are_right(
    seed: int, speeds: list[float], slow_net: bool, faults: list[tuple[float, int, str]], fixed: bool
) -> None:
    world = World(
        rules(rounds=4, samples=600, inner_steps=20 if fixed else None, max_failures=99),
        seed=seed,
        delay=(0.001, 1.5) if slow_net else (0.001, 0.05),
        repeat=0.3,
    )
    world.begin()
    names = [f"w{i}" for i in range(len(speeds))]
    for name, speed in zip(names, speeds, strict=True):
        world.add(Worker(name, speed))
    extra = iter(range(100, 200))

    def strike(victim: int, what: str) -> None:
        name = names[victim % len(names)]
        if what == "join":
            names.append(f"w{next(extra)}")
            world.add(Worker(names[-1], 0.1))
        elif world.workers[name].alive and name in world.machine.members:
            {
                "kill": lambda: world.kill(name),
                "crash": lambda: world.crash(name),
                "leave": lambda: world.leave(name, 1.0 + victim),
                "hang": lambda: setattr(world.workers[name], "hung", True),
            }[what]()

    for when, victim, what in faults:
        world.at(when, lambda victim=victim, what=what: strike(victim, what))

    def replace() -> None:
        if sum(1 for worker in world.workers.values() if worker.alive and not worker.hung) < 1:
            world.add(Worker(f"w{next(extra)}", 0.1))
        world.at(5.0, replace)

    world.at(5.0, replace)
    seen: list[int] = []
    world.hooks.append(lambda action: seen.append(action.entry.round) if isinstance(action, Record) else None)
    world.run(5000)
    assert isinstance(world.ended, Publish), (world.machine.phase, world.machine.round)
    check_contributions(world, 4)
    assert sorted(set(seen)) == [0, 1, 2, 3]
    if not faults and not slow_net:
        exactly_once(world, world.machine.tracker.epoch)
    for epoch in range(world.machine.tracker.epoch):
        for index in range(10):
            assert all(world.rows[epoch, index, row] >= 1 for row in range(40))
    assert not any(isinstance(action, Drop) and action.peer == "ps" for action in world.actions)


def test_a_theta_that_is_not_the_checkpoints_is_not_trained_on() -> None:
    def made() -> RoundMachine:
        start = Start("job", 1, 2, 10, theta="t2")
        return RoundMachine(rules(), start, SliceTracker((40,) * 4), PeerRef(peer="s"))

    machine = made()
    machine.handle(Joined(PeerRef(peer="ps"), "aggregate"), 0.0)
    stamp = JobStamp(job_id="job", generation=1, round=2)
    ready = ModelReady(round=2, theta="t1", parameters=1, size_bytes=4)
    actions = machine.handle(Told("ps", "aggregate", "i", stamp, ready), 1.0)
    assert [type(action) for action in actions] == [Drop, KeepSlices, Restart]
    assert not machine.server_ready
    machine = made()
    machine.handle(Joined(PeerRef(peer="other"), "aggregate"), 2.0)
    ready = ModelReady(round=2, theta="t2", parameters=1, size_bytes=4)
    assert machine.handle(Told("other", "aggregate", "i", stamp, ready), 3.0) == []
    assert machine.server_ready


def test_a_checkpoint_that_cannot_be_used_is_no_fault_of_its_worker() -> None:
    tracker = SliceTracker([10])
    scheduler, server = PeerRef(peer="s"), PeerRef(peer="p")
    stamp = JobStamp(job_id="job", generation=1)
    said = Told(
        "p", "aggregate", "p1", stamp, ExecutorError(kind="checkpoint", message="momentum is damaged")
    )
    machine = RoundMachine(rules(), Start("job", 1, 3, 0), tracker, scheduler)
    machine.handle(Joined(server, "aggregate"), 0.0)
    assert machine.handle(said, 1.0)[-1] == Restart("momentum is damaged", unusable=True)
    assert machine.failures.in_a_row == 0
    # from round 0 there is nothing to restore: then it is a failure as any other
    machine = RoundMachine(rules(), Start("job", 1, 0, 0), tracker, scheduler)
    machine.handle(Joined(server, "aggregate"), 0.0)
    assert [type(action) for action in machine.handle(said, 1.0)] == [Drop, KeepSlices, Restart]
    assert machine.failures.in_a_row == 1

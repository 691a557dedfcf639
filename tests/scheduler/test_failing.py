"""Executors that fail: once more under the same lease, then another worker; and how a life begins."""

from __future__ import annotations

import pytest
from tests.scheduler.test_rounds import check_contributions, rules
from tests.scheduler.world import Worker, World

from hypha.errors import ExecutorFailed, JobFailed, ModelError, NotFinite
from hypha.messages import ExecutorExited, Loaded, PeerRef
from hypha.scheduler.rounds import failures as failing
from hypha.scheduler.rounds.events import Again, Drop, Fail, Joined, ParticipantLost, Publish

NAN = "the loss is not finite"


def world_of(*peers: str, **changes: object) -> World:
    """All of them train in the first round, which is long."""
    world = World(rules(**{"samples": 40_000, "rounds": 3, **changes}))
    world.begin()
    for peer in peers:
        world.add(Worker(peer, 0.05))
    world.run(60, until=lambda: all(world.workers[peer].batches > 3 for peer in peers))
    return world


def answers(world: World) -> list[Again | Drop | Fail]:
    return [action for action in world.actions if isinstance(action, Again | Drop | Fail)]


def trains(world: World, peer: str) -> bool:
    return world.workers[peer].alive and world.workers[peer].batches > 3


def test_an_executor_is_started_again_with_growing_pauses_and_then_its_worker_replaced() -> None:
    world = world_of("a", "b", executor_restarts=3, max_failures=9)
    pauses = []
    for _ in range(3):
        incarnation = world.workers["a"].incarnation
        world.crash("a")
        world.run(60, until=lambda: not trains(world, "a"))
        world.run(0.1)
        again = answers(world)[-1]
        assert isinstance(again, Again)
        assert again.instead_of == incarnation
        assert "exit code 1\nSegmentation fault" in again.reason
        assert set(world.machine.members) == {"b"}, "b does its part meanwhile"
        pauses.append(again.pause_s)
        world.run(60, until=lambda: trains(world, "a"))
    assert pauses == pytest.approx([0.2, 0.8, 3.2])
    world.crash("a")
    world.run(1)
    assert isinstance(answers(world)[-1], Drop)
    world.run(3000)
    assert isinstance(world.ended, Publish)
    check_contributions(world, 3)


def test_a_round_with_its_update_clears_its_account() -> None:
    world = world_of("a", "b", executor_restarts=1, samples=1200, rounds=9)
    for count in (1, 2):
        world.crash("a")
        world.run(60, until=lambda: len(answers(world)) == count)  # noqa: B023 - awaited in this turn
        applied = len(world.records)
        world.run(60, until=lambda: len(world.records) > applied + 1)  # noqa: B023 - awaited in this turn
        assert "a" in {part.worker for part in world.records[max(world.records)].contributors}
        assert not world.machine.failures.restarts
    assert [type(action) for action in answers(world)] == [Again, Again]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Executors that failed stay away for longer than a short round lasts."""
    monkeypatch.setattr(failing, "_FIRST_PAUSE_S", 1.0)
    monkeypatch.setattr(failing, "_PAUSE_GROWTH", 2.0)


@pytest.mark.usefixtures("slow")
def test_without_an_update_of_its_own_the_rounds_of_others_do_not_help() -> None:
    world = world_of("a", "b", samples=60, rounds=40)
    struck = []
    for _ in range(3):
        world.run(60, until=lambda: "a" in world.machine.members)
        struck.append(world.machine.round)
        world.crash("a")
        world.run(60, until=lambda: "a" not in world.machine.members)
    assert struck[0] < struck[1] < struck[2], "the others went on"
    assert [type(action) for action in answers(world)] == [Again, Again, Drop]


@pytest.mark.usefixtures("slow")
def test_what_an_executor_says_and_its_end_are_one_failure() -> None:
    world = world_of("a", "b")
    old = world.workers["a"]
    world.fail("a", "internal", "the disk is gone")
    world.run(0.5)
    (again,) = answers(world)
    assert isinstance(again, Again)
    assert again.reason.startswith("the disk is gone; the executor ended with exit code 1\nSegmentation")
    assert world.machine.failures.in_a_row == 1
    # the ghost speaks late, and before its successor does: that is not believed of the latter
    world.run(60, until=lambda: "a" in world.machine.members)
    assert world.machine.members["a"].incarnation == ""
    before = world.machine.counts["stale incarnation"]
    world.tell("a", "train", old.incarnation, Loaded(incarnation=old.incarnation))
    world.tell("a", "train", old.incarnation, ExecutorExited(exit_code=1, tail=""))
    world.run(60, until=lambda: trains(world, "a"))
    assert world.machine.counts["stale incarnation"] == before + 2
    assert world.machine.members["a"].incarnation == world.workers["a"].incarnation
    assert len(answers(world)) == 1


def test_an_executor_whose_end_is_not_heard_of_is_judged_all_the_same() -> None:
    world = world_of("a", "b")
    world.fail("a", "internal", "the disk is gone", ends=False)
    world.run(5)
    assert answers(world) == []
    world.run(6)
    assert [type(action) for action in answers(world)] == [Again]


def test_with_its_lease_an_executor_is_not_started_again() -> None:
    world = world_of("a", "b")
    world.fail("a", "internal", "the disk is gone", ends=False)
    world.run(1)
    world.feed(ParticipantLost("a", "train", "expired"))
    world.run(30)
    assert answers(world) == []


def test_training_that_diverges_everywhere_ends_the_job_with_the_reason() -> None:
    world = world_of("a", "b")
    for peer in "aba":
        world.run(60, until=lambda: trains(world, peer))  # noqa: B023 - awaited in this turn
        world.fail(peer, "not-finite", NAN)
        world.run(0.5)
    assert [type(action) for action in answers(world)] == [Again, Again, Fail]
    assert isinstance(world.ended, Fail)
    assert isinstance(world.ended.error, NotFinite)
    assert world.ended.error.exit_code == 5
    for text in (NAN, "3 times on 2 worker(s)", "exit code 1", "Segmentation fault"):
        assert text in str(world.ended.error)


def test_one_worker_whose_loss_is_not_finite_is_replaced() -> None:
    world = world_of("a", "b", executor_restarts=2)
    for _ in range(3):
        world.run(60, until=lambda: trains(world, "a"))
        world.fail("a", "not-finite", NAN)
        world.run(0.5)
    assert [type(action) for action in answers(world)] == [Again, Again, Drop]
    assert world.ended is None


@pytest.mark.parametrize(
    ("kind", "error"), [(None, ExecutorFailed), ("internal", JobFailed)], ids=["crash", "error"]
)
def test_too_many_failures_end_the_job(kind: str | None, error: type[Exception]) -> None:
    world = world_of("a", "b", executor_restarts=9)
    for number in range(5):
        peer = "ab"[number % 2]
        world.run(60, until=lambda: trains(world, peer))  # noqa: B023 - awaited in this turn
        if kind is None:
            world.crash(peer)
        else:
            world.fail(peer, kind, "the disk is gone")
        world.run(0.5)
    assert isinstance(world.ended, Fail)
    assert type(world.ended.error) is error


LABELS = "the labels run from 0 to {}, but the model has 4 classes; set model.arguments num_labels"
TRACE = "\nTraceback (most recent call last):\nIndexError: Target 7 is out of bounds."


@pytest.mark.parametrize(("kind", "error"), [("batch", JobFailed), ("model", ModelError)])
def test_what_two_workers_say_alike_ends_the_job_at_once(kind: str, error: type[Exception]) -> None:
    world = world_of("a", "b", "c")
    world.fail("a", kind, LABELS.format(7) + TRACE)
    world.run(0.1)
    assert world.ended is None
    # another batch, another number, the same mistake
    world.fail("b", kind, LABELS.format(11) + TRACE)
    world.run(0.1)
    assert isinstance(world.ended, Fail)
    assert type(world.ended.error) is error
    assert world.ended.error.exit_code == 5
    first, second, *_ = str(world.ended.error).splitlines()
    assert LABELS.format(11) in first
    assert "said by 2 executors" in first
    assert second.startswith("Traceback"), "what to change comes first"


def test_different_mistakes_of_two_workers_are_no_end() -> None:
    world = world_of("a", "b", "c")
    world.fail("a", "batch", LABELS.format(7))
    world.run(0.1)
    world.fail("b", "batch", "the images have 3 channel(s)")
    world.run(0.1)
    assert world.ended is None


def test_one_of_several_workers_is_not_believed_alone() -> None:
    world = world_of("a", "b")
    for _ in range(3):
        world.run(60, until=lambda: trains(world, "a"))
        world.fail("a", "batch", LABELS.format(7))
        world.run(0.5)
    assert [type(action) for action in answers(world)] == [Again, Again, Drop]
    assert world.ended is None


@pytest.mark.parametrize("kind", ["batch", "model"])
def test_the_only_worker_is_believed_the_second_time(kind: str) -> None:
    world = world_of("a", workers=1, min_workers=1)
    world.fail("a", kind, LABELS.format(7))
    world.run(0.1)
    assert world.ended is None
    if kind == "model":
        # its lease was given up; the pool has found the same worker once more
        world.add(Worker("a", 0.05))
    world.run(60, until=lambda: trains(world, "a"))
    world.fail("a", kind, LABELS.format(9))
    world.run(0.1)
    assert isinstance(world.ended, Fail)
    assert "said by 2 executors" in str(world.ended.error)


def test_an_applied_round_clears_what_was_said_before() -> None:
    world = world_of("a", "b", samples=1200, rounds=9)
    world.fail("a", "batch", LABELS.format(7))
    world.run(60, until=lambda: len(answers(world)) == 1)
    applied = len(world.records)
    world.run(60, until=lambda: len(world.records) > applied + 1)
    world.fail("b", "batch", LABELS.format(7))
    world.run(0.5)
    assert world.ended is None


# --- the start ------------------------------------------------------------------------------------------


def start(grace_s: float, workers: int = 3) -> World:
    world = World(rules(min_workers=2, workers=workers, start_grace_s=grace_s))
    world.begin()
    return world


def began_with(world: World) -> set[str]:
    world.run(60, until=lambda: world.machine.phase == "training")
    assert world.machine.phase == "training"
    return {member.peer for member in world.machine.participants}


def test_the_start_waits_a_while_for_the_rest() -> None:
    world = start(5.0)
    for number, peer in enumerate("abc"):
        world.at(2.0 * number, lambda peer=peer: world.add(Worker(peer, 0.05)))
    begin = world.now
    assert began_with(world) == {"a", "b", "c"}
    assert world.now - begin == pytest.approx(4.1, abs=0.3), "nobody is waited for once all are here"


def test_the_start_does_not_wait_longer_and_who_is_late_joins() -> None:
    world = start(5.0)
    for peer, at in {"a": 1.0, "b": 3.0, "c": 9.0}.items():
        world.at(at, lambda peer=peer: world.add(Worker(peer, 0.05)))
    begin = world.now
    assert began_with(world) == {"a", "b"}
    assert world.now - begin == pytest.approx(8.1, abs=0.3)
    world.run(600)
    assert isinstance(world.ended, Publish)
    assert {part.worker for part in world.applied[-1][1]} == {"a", "b", "c"}
    check_contributions(world, 5)


def test_the_wait_begins_anew_when_there_are_too_few_again() -> None:
    world = start(5.0)
    for peer in "ab":
        world.add(Worker(peer, 0.05))
    world.run(4)
    world.feed(ParticipantLost("b", "train", "expired"))
    world.run(4)
    assert world.machine.phase == "loading"
    world.machine.handle(Joined(PeerRef(peer="x"), "train"), world.now)
    world.add(Worker("c", 0.05))
    begin = world.now
    assert began_with(world) == {"a", "c"}
    assert world.now - begin == pytest.approx(5.1, abs=0.3)

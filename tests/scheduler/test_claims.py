"""What a worker states about itself does not count before it was held against what it was given."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.scheduler.test_ledger import MANIFEST, opening
from tests.scheduler.test_rounds import check_contributions, rules
from tests.scheduler.world import Worker, World, received

from hypha.errors import ModelError, Refused
from hypha.executor.outer.admission import admit, check_contribution
from hypha.messages import (
    AggregateJob,
    Contribution,
    ExecutorDescriptor,
    JobStamp,
    Members,
    ModelSpec,
    NextSlice,
    PeerRef,
    Progress,
    ReceivedFile,
    RoundApplied,
    RoundStarted,
    SliceRange,
    TransferMeta,
    UpdateReceived,
    UpdateRefused,
)
from hypha.rules.contributions import MOST_COUNT, contribution_problem
from hypha.scheduler.data.slices import SliceTracker
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.rounds.closing import PATIENCE
from hypha.scheduler.rounds.events import (
    AnswerSlice,
    Drop,
    Fail,
    Publish,
    Record,
    Reported,
    Restart,
    Send,
    SliceAsked,
    Told,
    with_early,
)

GOOD = Contribution(
    round=0,
    worker="a",
    incarnation="a-1",
    samples=60,
    batches=15,
    batch_size=4,
    steps=0,
    ranges=(SliceRange(epoch=0, slice=0, start=0, stop=40), SliceRange(epoch=0, slice=1, start=0, stop=20)),
    finished=((0, 0),),
)
#: of a slice that was taken back, and given again
AGAIN = SliceRange(epoch=0, slice=2, start=0, stop=20)


def held() -> SliceTracker:
    tracker = SliceTracker((40,) * 4)
    for worker, seq in (("a", 1), ("a", 2), ("b", 1)):
        tracker.next(worker, f"{worker}-1", seq)
    return tracker


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"samples": 10**12}, "are not what 15 batches"),
        ({"samples": -1}, "no counts"),
        ({"batches": MOST_COUNT + 1}, "no counts"),
        ({"steps": 1 << 60}, "no counts"),
        ({"batch_size": -4}, "no counts"),
        ({"threads": 0}, "no counts"),
        ({"batch_size": 8}, "batches of 8 samples"),
        ({"ranges": ()}, "0 rows for 60 samples"),
        # taken back, while its worker was out of reach; and given again, from its beginning
        ({"ranges": (SliceRange(epoch=0, slice=2, start=0, stop=40), AGAIN), "finished": ((0, 2),)}, ""),
        ({"ranges": (SliceRange(epoch=0, slice=2, start=0, stop=40),) * 2}, "80 rows for 60 samples"),
        ({"ranges": (SliceRange(epoch=0, slice=9, start=0, stop=40),)}, "slice 9 has no rows"),
        ({"ranges": (SliceRange(epoch=0, slice=0, start=0, stop=60),)}, "slice 0 has no rows 0 to 60"),
        ({"finished": ((0, 1),)}, "calls slices finished"),
        ({"ranges": (SliceRange(epoch=0, slice=0, start=0, stop=1),) * 10_001}, "10001 ranges of rows"),
        ({"finished": ((0, 3),)}, "calls slices finished"),
    ],
)
def test_an_update_stands_for_rows_that_there_are(changes: dict[str, Any], problem: str) -> None:
    part = msgspec.structs.replace(GOOD, **changes)
    found = contribution_problem(part, 4, held().samples)
    assert (found == "") == (problem == "")
    assert problem in found


def test_batches_that_may_grow_are_believed_up_to_what_they_may_grow_to() -> None:
    grown = msgspec.structs.replace(GOOD, batch_size=8, batches=8)
    assert contribution_problem(grown, 4, held().samples, most_batch_size=8) == ""
    assert "batches of 8" in contribution_problem(grown, 4, held().samples, most_batch_size=7)
    assert "are not what" in contribution_problem(
        msgspec.structs.replace(grown, batches=7), 4, held().samples, most_batch_size=8
    )


def training(*peers: str, **changes: object) -> World:
    world = World(rules(**{"samples": 4000, "rounds": 3, **changes}))
    world.begin()
    for peer in peers:
        world.add(Worker(peer, 0.05))
    world.run(60, until=lambda: all(world.workers[peer].batches > 3 for peer in peers))
    return world


def stamp(world: World) -> JobStamp:
    return JobStamp(job_id="job", round=world.machine.round)


def replaced(world: World) -> dict[str, str]:
    return {action.peer: action.reason for action in world.actions if isinstance(action, Drop)}


@pytest.mark.parametrize(
    "lie",
    [
        {"batches": 10**12, "samples": 10**12},
        {"batches": 1 << 60, "samples": 4000},
        {"batches": 4000, "samples": 4001},
        {"busy_s": float("nan")},
        {"busy_s": float("inf")},
    ],
    ids=str,
)
def test_progress_that_cannot_be_is_not_believed_and_its_worker_replaced(
    lie: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    world = training("a", "b", "c", "d")
    liar = world.workers["d"]
    fields = {"round": 0, "batches": 900, "samples": 900, "busy_s": 1.0, "loss": 1.0, **lie}
    for _ in range(3):
        world.feed(Reported("d", liar.incarnation, stamp(world), Progress(**fields)))
    assert "cannot be" in replaced(world)["d"]
    assert {getattr(record, "worker_peer_id", "") for record in caplog.records} == {"d"}
    world.run(600)
    assert isinstance(world.ended, Publish)
    check_contributions(world, 3)
    assert sum(record.samples for record in world.records.values()) < 3 * 4400


@pytest.mark.parametrize("busy_s", [1e-300, 1e300, 0.0, -5.0])
def test_absurd_batch_times_neither_end_the_scheduler_nor_stop_the_round(busy_s: float) -> None:
    world = training("a", "b", samples=2000)
    liar = world.workers["b"]
    told = Progress(round=0, batches=liar.batches + 1, samples=4 * liar.batches, busy_s=busy_s, loss=1e300)
    began = world.now
    world.feed(Reported("b", liar.incarnation, stamp(world), told))
    world.run(600)
    assert isinstance(world.ended, Publish)
    assert world.now - began < 3 * 30
    assert all(abs(record.loss) < 1e15 for record in world.records.values())


def test_an_update_of_a_trillion_samples_costs_its_worker_its_place_and_nothing_else() -> None:
    """The parameter server refuses it, and each that follows, as its worker starts over."""
    world = training("a", "b", "c", "d", rounds=5)
    for _ in range(PATIENCE):
        refused = UpdateRefused(
            round=world.machine.round, worker="d", code="invalid", reason="10**12 samples"
        )
        world.feed(Told("ps", "aggregate", "ps-1", stamp(world), refused))
        open_ = world.machine.round
        world.workers["d"].plan.clear()
        world.run(600, until=lambda open_=open_: world.machine.round > open_)
    assert "10**12 samples" in replaced(world)["d"]
    world.run(600)
    assert isinstance(world.ended, Publish)
    assert {part.worker for part in world.records[0].contributors} == {"a", "b", "c"}
    check_contributions(world, 5)


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": 10**12},
        {"batch_size": 8, "batches": 8},
        {"ranges": (SliceRange(epoch=0, slice=900, start=0, stop=60),)},
        {"round": 1},
        {"worker": "b"},
        None,
    ],
    ids=str,
)
def test_a_parameter_server_that_adds_what_cannot_be_is_replaced(changes: dict[str, Any] | None) -> None:
    """Theta has it then, and no ledger could say of what: the job goes on from its last checkpoint."""
    world = training("a", "b")
    part = None
    if changes is not None:
        good = msgspec.structs.replace(GOOD, incarnation=world.workers["a"].incarnation)
        part = msgspec.structs.replace(good, **changes)
    said = UpdateReceived(round=0, worker="a", samples=60, contribution=part)
    world.feed(Told("ps", "aggregate", "ps-1", stamp(world), said))
    assert isinstance(world.ended, Restart)
    assert world.ended.reason.startswith("the parameter server accepted an update that cannot be")
    assert "ps" in replaced(world)


def test_an_update_of_an_executor_that_is_gone_may_have_had_other_batches() -> None:
    world = training("a", "b")
    part = msgspec.structs.replace(GOOD, batch_size=60, batches=1, incarnation="the one before")
    world.feed(Told("ps", "aggregate", "ps-1", stamp(world), received(part)))
    assert world.machine.updates.accepted == {"a": part}


def test_what_was_applied_is_recorded_once_each_update_in_it_was_reported() -> None:
    """The ledger would lack a contribution otherwise, and a replay of it be another theta."""
    world = training("a", "b")
    part = msgspec.structs.replace(GOOD, incarnation=world.workers["a"].incarnation)
    other = msgspec.structs.replace(part, worker="b", incarnation=world.workers["b"].incarnation)
    applied = RoundApplied(round=0, theta="t1", contributors=("a", "b"))
    world.feed(Told("ps", "aggregate", "ps-1", stamp(world), received(part)))
    world.feed(Told("ps", "aggregate", "ps-1", stamp(world), applied))
    assert not world.records
    world.feed(Told("ps", "aggregate", "ps-1", stamp(world), received(other)))
    assert world.records[0].contributors == (part, other)
    assert world.machine.round == 1


def test_what_is_said_without_end_takes_no_more_room() -> None:
    """Of rounds that are not open yet, of workers that there are not, with ever new codes."""
    world = training("a", "b")
    machine = world.machine
    for number in range(3000):
        names = {"round": machine.round, "worker": f"nobody-{number}"}
        for event in (
            UpdateReceived(**names, samples=4, contribution=msgspec.structs.replace(GOOD, **names)),
            UpdateRefused(**names, code=f"code-{number}", reason="none"),
        ):
            world.feed(Told("ps", "aggregate", "ps-1", stamp(world), event))
    assert len(machine.updates.accepted) <= 110
    assert len(machine.counts) < 20
    early: list[Told] = []
    for number in range(3000):
        started = RoundStarted(round=0, theta="t", attempt=number)
        early = with_early(early, Told("a", "train", "a-1", stamp(world), started))
        known = UpdateReceived(round=0, worker=f"{number}", samples=1)
        early = with_early(early, Told("ps", "aggregate", "ps-1", stamp(world), known))
    assert [told.event for told in early if told.sender == "a"] == [started]
    assert len(early) < 2100
    world.run(600)
    assert isinstance(world.ended, Publish)


def test_the_parameter_server_knows_for_how_many_samples_an_update_may_stand_before_it_comes() -> None:
    world = World(rules(samples=400, rounds=6))
    limits: dict[int, dict[str, int]] = {}

    def hear(action: object) -> None:
        if isinstance(action, Send) and isinstance(action.directive, Members):
            told = action.directive
            assert told.round is not None
            limits.setdefault(told.round, {}).update(told.most_samples)

    world.hooks.append(hear)
    world.begin()
    world.add(Worker("a", 0.05))
    world.add(Worker("b", 0.2))
    world.run(600)
    assert isinstance(world.ended, Publish)
    for round_, parts in world.applied:
        for part in parts:
            assert part.samples <= limits[round_][part.worker]
            if round_:
                # not much more than its share: what it may do in a second, and two batches of a plan that
                # was longer before
                assert limits[round_][part.worker] <= part.samples + 4 * 20 + 4 * 2


def arrived(round_: int = 3, peer: str = "a", **changes: Any) -> ReceivedFile:
    fields = {"job_id": "job", "generation": 1, "round": round_, **changes}
    meta = TransferMeta(kind="update", name="u", size=1, stamp=JobStamp(**fields))
    return ReceivedFile(path="u", size=1, from_peer=peer, meta=meta)


def aggregate_job(generation: int, slice_rows: tuple[int, ...]) -> AggregateJob:
    return AggregateJob(
        job_id="job",
        generation=generation,
        executor=ExecutorDescriptor(kind="aggregate", name="parameter-server"),
        me="ps",
        scheduler=PeerRef(peer="s"),
        model=ModelSpec(task="torch"),
        slice_rows=slice_rows,
    )


def test_which_updates_a_parameter_server_judges() -> None:
    job = aggregate_job(1, ())
    peers = (PeerRef(peer="a"), PeerRef(peer="b"))
    told = Members(peers=peers, round=3, most_samples={"a": 48})
    assert not admit(arrived(), job, 3, None), "nobody has said yet who takes part"
    assert admit(arrived(), job, 3, told)
    assert not admit(arrived(peer="b"), job, 3, told), "b was not sent a plan, as far as is known"
    assert not admit(arrived(), job, 3, msgspec.structs.replace(told, round=2))
    assert admit(arrived(), job, 3, Members(peers=peers)), "an earlier scheduler says nothing about samples"
    for file, code in (
        (arrived(peer="stranger"), "uninvited"),
        (arrived(round_=2), "stale"),
        (arrived(generation=0), "stale"),
        (arrived(job_id="another"), "uninvited"),
    ):
        with pytest.raises(Refused) as caught:
            admit(file, job, 3, told)
        assert caught.value.code == code


def test_a_worker_holds_slices_that_it_can_use_and_one_that_hoards_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World(rules(samples=400, rounds=3), samples=(40,) * 200)
    world.begin()
    for peer in ("a", "b", "hoarder"):
        world.add(Worker(peer, 0.05))
    world.run(60, until=lambda: all(worker.batches > 3 for worker in world.workers.values()))
    liar, tracker = world.workers["hoarder"], world.machine.tracker
    refused = 0
    for seq in range(1000, 1300):
        question = NextSlice(stamp=stamp(world), incarnation=liar.incarnation, seq=seq, cached=(10**9, -1))
        (*_, answer) = world.machine.handle(SliceAsked("hoarder", question), world.now)
        assert isinstance(answer, AnswerSlice)
        refused += answer.slice is None
    assert tracker.rows_held("hoarder") <= 400 + 36 * 40
    assert refused > 250
    named = [record for record in caplog.records if "more than it can use" in record.getMessage()]
    assert [getattr(record, "worker_peer_id", "") for record in named] == ["hoarder"]
    world.run(600)
    assert isinstance(world.ended, Publish)


def test_a_worker_that_reports_progress_and_sends_no_update_is_replaced_after_two_rounds() -> None:
    times = []
    for upload_s in (0.01, 1e9):
        world = World(rules(samples=400, rounds=6, grace_s=1.0, deadline_s=5.0))
        world.begin()
        for peer in "abc":
            world.add(Worker(peer, 0.05))
        world.add(Worker("d", 0.05, upload_s=upload_s))
        world.run(600)
        assert isinstance(world.ended, Publish)
        times.append(world.now - 1000.0)
    assert replaced(world) == {"d": "it began 2 rounds in a row, and sent no update in time"}
    honest_s, with_it_s = times
    # its first synchronisation has three deadlines, as nobody knows yet what that takes; then three graces
    assert with_it_s < honest_s * 4 / 3 + 15.0 + 3.0 + 2.0


def test_one_that_puts_the_end_of_its_batches_off_with_ever_new_reports_is_not_waited_for() -> None:
    world = World(rules(samples=400, rounds=4, deadline_s=5.0))
    world.begin()
    world.add(Worker("a", 0.05))
    slow = world.add(Worker("b", 0.05))
    world.run(60, until=lambda: world.machine.round == 1 and slow.batches > 3)
    slow.batch_s, began = 30.0, world.now
    world.run(600, until=lambda: world.machine.round == 2)
    assert world.now - began < 2 * 5.0 + 5.0


def test_one_that_never_loads_is_replaced_once_others_have_loaded() -> None:
    world = World(rules(samples=400, rounds=40, load_s=20.0))
    world.begin()
    world.add(Worker("idle", 0.05, load_s=1e9))
    world.run(100)
    assert replaced(world) == {}, "it may be the model that takes so long"
    world.add(Worker("a", 0.05))
    began = world.now
    world.run(60, until=lambda: bool(replaced(world)))
    assert set(replaced(world)) == {"idle"}
    assert world.now - began < 21.0
    world.add(Worker("spare", 0.05))
    world.run(600)
    assert isinstance(world.ended, Publish)
    # ten seconds are little to one for which the quickest needs a minute
    world = World(rules(load_s=10.0))
    world.begin()
    world.add(Worker("a", 0.05, load_s=60.0))
    world.add(Worker("b", 0.05, load_s=150.0))
    world.run(600)
    assert replaced(world) == {}


def test_two_of_four_that_call_the_model_wrong_do_not_end_a_job_that_the_others_train() -> None:
    world = training("a", "b", "c", "d", rounds=2)
    for liar in "cd":
        world.fail(liar, "model", "the model has no forward")
        world.run(0.5)
    assert set(replaced(world)) == {"c", "d"}
    world.run(600)
    assert isinstance(world.ended, Publish)
    check_contributions(world, 2)
    # most of them are right
    world = training("a", "b", "c", "d", rounds=2)
    for peer in "bcd":
        assert world.ended is None
        world.fail(peer, "model", "the model has no forward")
        world.run(0.5)
    assert isinstance(world.ended, Fail)
    assert isinstance(world.ended.error, ModelError)


def test_a_round_that_holds_odd_claims_is_written_and_read_and_the_job_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = training("a", "b", samples=400)
    odd = msgspec.structs.replace(GOOD, loss=float("nan"), steps=1 << 52)
    for peer in "ab":
        part = msgspec.structs.replace(odd, worker=peer, incarnation=world.workers[peer].incarnation)
        world.feed(Told("ps", "aggregate", "ps-1", stamp(world), received(part)))
    applied = RoundApplied(round=0, theta="t1", contributors=("a", "b"), update_norm=float("inf"))
    world.feed(Told("ps", "aggregate", "ps-1", stamp(world), applied))
    record = next(action for action in world.actions if isinstance(action, Record))
    assert 0 < record.entry.samples < 1000
    assert 0 < record.steps < 1000
    ledger = Ledger(tmp_path / "job.db")
    ledger.open_job(opening(), MANIFEST, record.tracker or world.machine.tracker.to_state())
    ledger.record(record.entry, record.tracker, record.steps)
    assert [entry.round for entry in ledger.to_file().rounds] == [0]
    ledger.failed("c", "its executor failed")
    ledger.failed("c", "again")
    known = {one.worker: one for one in ledger.track_records()}
    assert (known["a"].rounds, known["a"].failures) == (1, 0)
    assert known["a"].samples_per_s > 0
    assert (known["c"].rounds, known["c"].failures) == (0, 2)
    # an entry of a version that wrote what it should not have
    with closing(sqlite3.connect(ledger.path)) as db, db:
        db.execute(
            "INSERT INTO rounds (generation, round, samples, theta, entry) VALUES (0, 1, 0, '', ?)",
            ('{"round": 1, "theta": "", "loss": null}',),
        )
    with caplog.at_level(logging.ERROR):
        assert [entry.round for entry in ledger.to_file().rounds] == [0]
        assert len(ledger.track_records()) == 3
    assert "holds a round that cannot be read" in caplog.text
    ledger.close()


def test_a_parameter_server_adds_nothing_that_cannot_be_replayed() -> None:
    job = aggregate_job(0, (40,) * 4)
    told = Members(peers=(PeerRef(peer="a"),), round=0, most_samples={"a": 60}, batch_sizes={"a": 4})
    file = arrived(0, generation=0)
    check_contribution(file, GOOD, job, told)
    beyond = msgspec.structs.replace(GOOD, ranges=(SliceRange(epoch=0, slice=9, start=0, stop=60),))
    for part, reason in (
        (beyond, "slice 9 has no rows"),
        (msgspec.structs.replace(GOOD, batch_size=60, batches=1), "and was told 4"),
        (msgspec.structs.replace(GOOD, samples=56, batches=14), "60 rows for 56 samples"),
        (msgspec.structs.replace(GOOD, worker="b"), "it is of round 0 of b"),
        (msgspec.structs.replace(GOOD, round=1), "it is of round 1 of a"),
    ):
        with pytest.raises(Refused, match=reason) as caught:
            check_contribution(file, part, job, told)
        assert caught.value.code == "invalid"
    with pytest.raises(Refused, match="its worker was given 59 at most"):
        check_contribution(file, GOOD, job, msgspec.structs.replace(told, most_samples={"a": 59}))
    # a scheduler of an earlier version says nothing of rows
    check_contribution(file, beyond, msgspec.structs.replace(job, slice_rows=()), told)
    # of batches that grow it says only what they may grow to
    grows = msgspec.structs.replace(told, batch_sizes={}, most_batch_size=8)
    grown = msgspec.structs.replace(GOOD, batch_size=8, batches=8)
    check_contribution(file, GOOD, job, grows)
    check_contribution(file, grown, job, grows)
    with pytest.raises(Refused, match="batches of 9 samples, and was told 8"):
        check_contribution(file, msgspec.structs.replace(grown, batch_size=9), job, grows)


def test_the_parameter_server_is_told_what_batches_its_members_train_on() -> None:
    world = World(rules(samples=400, rounds=1))
    sizes: dict[str, int] = {}

    def hear(action: object) -> None:
        if isinstance(action, Send) and isinstance(action.directive, Members):
            sizes.update(action.directive.batch_sizes)

    world.hooks.append(hear)
    world.begin()
    world.add(Worker("a", 0.05))
    world.run(600)
    assert sizes == {"a": 4}

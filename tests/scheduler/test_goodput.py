"""Where the seconds of worker places go: each reason of badput, recoveries, and sums that are exact."""

from __future__ import annotations

import pytest
from tests.scheduler.scene import BATCHES, Scene

from hypha.messages import (
    CheckpointSaved,
    ExecutorError,
    ExecutorExited,
    LedgerRound,
    UpdateRefused,
)
from hypha.scheduler.goodput.place import GoodputPlace
from hypha.scheduler.rounds.events import DataServed, GoesOn, JobRefused, Reachable, TimePassed, Unreachable
from hypha.scheduler.rounds.policy import Rules, Start


def test_a_round_that_nothing_disturbs() -> None:
    scene = Scene().opened().trains(4, "a", "b").at(8)
    assert scene.report().pending_s == 8.0
    scene.at(8.5).update("a")
    scene.at(9).update("b")
    scene.at(9.5).applied("a", "b")
    scene.at(10).started("a", "b")
    assert scene.split() == {
        "allocating": 2.0,  # two places until 1 s
        "loading": 4.0,  # until 3 s
        # until theta of round 0 is there; then updates on their way; then round 1 after it was closed at 9 s
        "waiting-for-theta": 2.0 + 0.5 + 1.0 + 2.0,
        "waiting-for-stragglers": 0.5,
        "goodput": 8.0,
    }
    report = scene.report()
    assert report.pending_s == 0.0
    assert (report.samples, report.samples_per_s) == (80, 8.0)
    assert report.scheduling == 0.9
    assert report.recoveries == ()
    assert scene.news == []


def test_who_is_done_early_waits_for_the_others() -> None:
    scene = Scene().opened().trains(4, "a")
    scene.at(8).update("a")
    scene.trains(8, "b").at(12).update("b")
    scene.applied("a", "b")
    split = scene.split()
    assert split["waiting-for-stragglers"] == 4.0
    # b was busy for 4 of 8 s
    assert (split["waiting-for-data"], split["goodput"]) == (4.0, 8.0)


def test_time_of_a_round_without_a_batch_waited_for_data() -> None:
    scene = Scene().opened().trains(4, "b")
    scene.at(7).reported("a", 1, busy_s=1.0)
    scene.at(10).reported("a", 4, busy_s=4.0)
    split = scene.split()
    assert split["waiting-for-data"] == 2.0
    scene.update("b")
    scene.update("a")
    scene.applied("a", "b")
    assert scene.split()["goodput"] == 8.0


def test_while_nobody_serves_data_the_job_pauses() -> None:
    scene = Scene().opened()
    scene.at(5).reported("a", 1)
    scene.feed(DataServed(False))
    scene.at(8).feed(DataServed(True))
    scene.at(10).reported("a", 2)
    assert {key: scene.split()[key] for key in ("paused", "waiting-for-data")} == {
        "paused": 3.0,
        "waiting-for-data": 1.0,
    }


def test_a_round_that_is_kept_open_for_lack_of_workers_is_paused() -> None:
    rules = Rules(rounds=100, samples=80, inner_steps=BATCHES, min_workers=2, workers=2, deadline_s=20.0)
    scene = Scene(rules=rules).opened().trains(4, "a")
    scene.at(8).update("a")
    scene.at(8).lease_lost("b", "expired; the last renewal: timed out")
    assert scene.at(20).split()["paused"] == 12.0
    assert "waiting-for-stragglers" not in scene.split()


def test_before_there_is_a_parameter_server_the_job_allocates() -> None:
    scene = Scene()
    scene.at(1).leased("a", "b")
    scene.at(5).leased("ps")
    scene.at(6)
    assert scene.split() == {"allocating": 10.0, "loading": 2.0}


# --- failures --------------------------------------------------------------------------------------------


def test_a_lost_worker_costs_until_another_trains_in_its_place() -> None:
    scene = Scene().opened()
    scene.at(5).reported("a", 1)
    scene.at(5).reported("b", 1)
    scene.at(6).renewed("b")
    # b dies at once; its lease is over at 10 s
    scene.at(8).reported("a", 4)
    scene.update("a")
    scene.at(10).lease_lost("b", "nobody is there any more: refused")
    scene.at(10).applied("a")
    scene.at(11).started("a")
    scene.trains(11, "a").at(12).leased("c")
    scene.at(12).joined("c")
    scene.at(14).loaded("c")
    scene.at(15).started("c")
    split = scene.split()
    # what b trained until its last sign of life, at 6 s, is for nothing
    assert split["replayed"] == 2.0
    assert split["failure"] == 9.0
    (lost,) = scene.report().recoveries
    assert (lost.kind, lost.peer, lost.reason) == ("train", "b", "unreachable")
    assert (lost.at_s, lost.detect_s, lost.replace_s, lost.catch_up_s) == (10.0, 4.0, 5.0, None)
    scene.trains(15, "c")
    scene.at(19).update("a")
    scene.at(19).update("c")
    scene.at(20).applied("a", "c")
    assert scene.report().recoveries[0].catch_up_s == 10.0
    assert scene.steps() == [("unreachable", 4.0), ("replace", 5.0), ("catch-up", 10.0)]


def test_who_reports_before_the_round_machine_hears_that_its_lease_is_over_trains_at_no_place() -> None:
    """The pool knows first; a report that was under way meanwhile is believed, and the place is vacant."""
    scene = Scene().opened().trains(4, "a", "b")
    scene.at(8).update("a")
    scene.update("b")
    scene.at(9).applied("a", "b")
    scene.at(9.5).lease_expired("a")
    scene.at(9.6).started("a", "b")
    assert not scene.goodput.places[0].peer
    assert scene.goodput.places[0].effort is None
    assert scene.at(11).split()["failure"] > 0


def test_who_leaves_costs_nothing_where_another_is_there_before() -> None:
    """What it has trained counts, and is no failure; the one that comes has its place from then on."""
    scene = Scene().opened().trains(4, "a", "b").at(6)
    scene.leaves("b", 1.1, spare="c")
    scene.at(8).update("a")
    scene.update("b")
    assert "b" not in scene.machine.members
    scene.let_go("b")
    assert scene.goodput.places[1].peer == "c"
    scene.at(8.5).loaded("c")
    scene.at(9).applied("a", "b")
    scene.started("a", "c")
    scene.trains(9, "a", "c").at(13).update("a")
    scene.update("c")
    scene.applied("a", "c")
    split = scene.split()
    # with a second left it was told to hand over at once what it had done by 6 s
    assert split["goodput"] == 4.0 + 2.0 + 4.0 + 4.0
    assert "failure" not in split
    assert "replayed" not in split
    assert scene.report().recoveries == ()


def test_who_trains_already_when_its_place_becomes_free_is_counted_from_then_on() -> None:
    scene = Scene().opened().at(4.5)
    scene.leaves("b", 2.0, spare="c")
    scene.at(5).loaded("c")
    scene.started("c")
    scene.trains(4, "a").trains(5, "c").at(7).update("b")
    scene.let_go("b")
    scene.at(8).update("a")
    scene.at(9).update("c")
    scene.applied("a", "b", "c")
    # a and b from 4 s on, for 4 and 3 s; c at the place of b from 7 s on
    assert scene.split()["goodput"] == 4.0 + 3.0 + 2.0


def test_an_update_counts_though_its_worker_is_lost_before_the_round_is_closed() -> None:
    scene = Scene().opened().trains(4, "a", "b")
    scene.at(8).update("a")
    scene.at(8).lease_lost("a", "expired; the last renewal: timed out")
    scene.at(8.5).update("b")
    scene.at(9).applied("a", "b")
    split = scene.split()
    assert split["goodput"] == 8.0
    assert split["failure"] == 1.0
    assert scene.report().recoveries[0].reason == "lease"


def test_an_executor_that_ends_is_started_again_in_its_place() -> None:
    scene = Scene().opened().trains(4, "b")
    scene.at(6).reported("a", 2)
    scene.at(7).tell("a", ExecutorExited(exit_code=1, tail="Segmentation fault"))
    scene.lives["a"] = 1
    scene.at(8).joined("a")
    scene.at(9).loaded("a")
    scene.at(10).started("a")
    split = scene.split()
    # what becomes of its two batches is not decided before the round is closed
    assert "replayed" not in split
    assert split["failure"] == 4.0
    (failed,) = scene.report().recoveries
    assert (failed.reason, failed.detect_s, failed.replace_s) == ("executor", 1.0, 3.0)
    scene.trains(10, "a").at(14).update("b")
    scene.update("a")
    scene.applied("b", "a")
    # two batches of the executor that ended were done again
    assert scene.split()["replayed"] == 2.0
    assert scene.split()["goodput"] == 8.0


def test_a_hang_is_known_by_how_long_it_lasted() -> None:
    scene = Scene().opened()
    tail = "it hung: no sign of life for 30 s (30 are allowed), so it was killed"
    scene.at(40).tell("b", ExecutorExited(exit_code=-9, tail=tail))
    (failed,) = scene.report().recoveries
    assert (failed.reason, failed.detect_s) == ("hang", 30.0)
    assert scene.split()["failure"] == 30.0


def test_what_an_executor_says_and_how_it_ends_is_one_failure() -> None:
    scene = Scene().opened()
    scene.at(5).tell("a", ExecutorError(kind="oom", message="out of memory"))
    scene.at(6).tell("a", ExecutorExited(exit_code=1, tail=""))
    assert [one.reason for one in scene.news] == ["executor"]


def test_a_worker_that_will_not_do_the_job_is_replaced() -> None:
    scene = Scene()
    scene.at(1).leased("ps", "a", "b")
    scene.at(2).joined("ps", "a", "b")
    scene.at(3).feed(JobRefused("b", "train", "no such executor"))
    assert scene.steps() == [("refused", 0.0)]
    scene.at(5)
    assert scene.split()["failure"] == 2.0


def test_one_that_cannot_be_reached_for_a_while_has_lost_nothing() -> None:
    scene = Scene().opened().trains(4, "a", "b")
    scene.at(5).feed(Unreachable("a", "train"))
    scene.at(7).feed(Reachable("a", "train"))
    scene.at(8)
    scene.update("a")
    scene.update("b")
    scene.applied("a", "b")
    assert scene.split()["goodput"] == 8.0
    assert scene.news == []


# --- what is done again ----------------------------------------------------------------------------------


def test_an_update_that_is_left_out_was_for_nothing_and_so_is_what_follows() -> None:
    scene = Scene().opened().trains(4, "a")
    scene.at(8).update("a")
    scene.at(10).applied("a")  # b trains on, and does not know yet
    scene.at(11).started("a")
    scene.at(13).started("b")
    split = scene.split()
    assert split["replayed"] == 6.0 + 3.0
    assert split["goodput"] == 4.0 + 2.0  # a's round, and what it does now


def test_a_refused_update_is_replayed_and_the_next_attempt_counts() -> None:
    scene = Scene().opened().trains(4, "a", "b").at(8)
    scene.tell("ps", UpdateRefused(round=0, worker="a", code="invalid", reason="not finite"))
    scene.at(8).tell("ps", UpdateRefused(round=0, worker="b", code="invalid", reason="not finite"))
    assert scene.machine.round == 0
    scene.at(9).started("a", "b", attempt=1)
    scene.trains(9, "a", "b", attempt=1).at(13).update("a", attempt=1)
    scene.at(13).update("b", attempt=1)
    scene.at(13).applied("a", "b")
    split = scene.split()
    assert (split["replayed"], split["goodput"]) == (8.0, 8.0)


def test_a_parameter_server_that_is_lost_takes_rounds_with_it() -> None:
    scene = Scene().opened().trains(4, "a", "b")
    scene.at(8).update("a")
    scene.at(8).update("b")
    scene.at(8).applied("a", "b")
    scene.at(8).started("a", "b")
    scene.at(10).renewed("ps")
    assert scene.report().goodput_s == 12.0
    scene.at(11).lease_lost("ps", "nobody is there any more: refused")
    scene.next_generation(0)
    assert scene.split()["replayed"] == 8.0 + 6.0
    assert scene.report().samples == 0
    scene.at(12).leased("ps")
    scene.at(12).joined("ps", "a", "b")
    scene.at(14).loaded("ps", "a", "b")
    scene.at(15).started("a", "b")
    split = scene.split()
    assert split["failure"] == 8.0
    assert "goodput" not in split
    (lost,) = scene.report().recoveries
    assert (lost.kind, lost.peer, lost.detect_s, lost.replace_s) == ("aggregate", "ps", 1.0, 3.0)
    scene.trains(15, "a", "b").at(19)
    scene.update("a")
    scene.update("b")
    scene.at(20).applied("a", "b")
    assert scene.report().recoveries[0].catch_up_s == 9.0
    assert (scene.report().samples, scene.split()["goodput"]) == (80, 8.0)


def test_who_trains_while_the_parameter_server_is_away_loses_nothing_where_no_round_is_lost() -> None:
    scene = Scene().opened().trains(4, "a")
    scene.at(8).update("a")
    scene.at(8.5).renewed("ps")
    scene.at(9).lease_lost("ps", "nobody is there any more: refused")
    scene.next_generation(0)
    scene.at(9).leased("ps")
    scene.at(9).joined("ps", "a", "b")
    scene.feed(GoesOn("a", "train"))
    scene.at(9.5).loaded("a", "b")
    scene.at(9.5).started("a", "b")
    scene.at(10).loaded("ps")
    scene.at(10).update("a")
    scene.at(10.5).reported("b", 4, busy_s=6.5)
    scene.at(10.5).update("b")
    scene.at(11).applied("a", "b")
    split = scene.split()
    assert split["goodput"] == 4.0 + 6.5
    # a had nothing to do since the server's last sign of life, and was with it again at 10 s
    assert split["failure"] == 1.5
    assert "replayed" not in split


def test_of_an_executor_that_did_not_outlive_another_life_nobody_says_that_it_is_lost() -> None:
    scene = Scene().opened()
    scene.at(5).reported("b", 1)
    scene.at(9).lease_lost("ps", "nobody is there any more: refused")
    scene.next_generation(0)
    scene.at(9).leased("ps")
    scene.at(9).joined("ps", "a", "b")
    scene.lives["b"] = 1
    scene.at(10).loaded("ps", "a", "b")
    scene.at(10).started("a")
    scene.at(11).started("b")
    assert scene.split()["failure"] == 6.0
    assert [(one.kind, one.peer) for one in scene.report().recoveries] == [
        ("aggregate", "ps"),
        ("train", "b"),
    ]


def test_another_scheduler_counts_since_it_began_and_knows_the_samples_before() -> None:
    scene = Scene(start=None)
    scene.progressed.resume(
        LedgerRound(round=number, theta="", contributors=(), samples=80) for number in range(7)
    )
    scene.at(1).leased("ps", "a", "b")
    scene.at(2).begin(Start("job", 3, 7, 0, "t7", taken_over=True))
    scene.joined("ps", "a", "b")
    scene.at(3).loaded("ps", "a", "b")
    scene.started("a", "b")
    assert (scene.report().samples, scene.report().samples_per_s) == (560, 0.0)
    # both were at it for long when it heard of them
    scene.at(4).reported("a", 3, busy_s=40.0)
    scene.at(6).reported("a", 4, busy_s=41.0)
    assert scene.split() == {"failure": 6.0, "waiting-for-data": 1.0, "goodput": 5.0}
    scene.update("a")
    scene.update("b")
    scene.at(8).applied("a", "b")
    assert (scene.report().samples, scene.report().samples_per_s) == (640, 10.0)


# --- what is certain -------------------------------------------------------------------------------------


def test_counters_hold_what_cannot_change_any_more() -> None:
    scene = Scene().opened().trains(4, "a", "b").at(8)
    good_s, bad_s = scene.goodput.certain(scene.now)
    assert good_s == 0.0
    assert bad_s["allocating"] == 2.0
    for peer in ("a", "b"):
        scene.at(8).update(peer)
    scene.at(8).applied("a", "b")
    assert scene.goodput.certain(scene.now)[0] == 0.0
    scene.at(9).tell("ps", CheckpointSaved(round=1, place="scheduler"))
    assert scene.goodput.certain(scene.now)[0] == 8.0


def test_after_the_end_no_time_passes() -> None:
    scene = Scene().opened()
    scene.at(6).give_everything_back()
    ended = scene.report()
    scene.at(60).feed(TimePassed())
    assert scene.report() == ended
    assert ended.wall_s == 6.0


def test_calm_is_the_median_of_rounds_in_which_nothing_failed() -> None:
    scene = Scene().opened()
    began = 4.0
    for _ in range(3):
        scene.trains(began, "a", "b").at(began + 4)
        scene.update("a")
        scene.update("b")
        scene.applied("a", "b")
        scene.started("a", "b")
        began += 4.0
    report = scene.report()
    # the first round is that of a start
    assert report.calm_samples_per_s == 20.0
    assert report.runtime == pytest.approx(240 / 16 / 20)


# --- a bug is found ----------------------------------------------------------------------------------------


def test_a_stretch_that_is_lost_is_found() -> None:
    scene = Scene().opened()
    scene.goodput.places[0].pending.pop()
    with pytest.raises(AssertionError, match="do not make"):
        scene.at(6).feed(TimePassed())


def test_a_stretch_that_nobody_closed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def turn(place: GoodputPlace, what: str, at: int) -> None:
        place.what, place.effort, place.since = what, None, at

    scene = Scene().opened()
    monkeypatch.setattr(GoodputPlace, "turn", turn)
    with pytest.raises(AssertionError, match="do not make"):
        scene.trains(4, "a").at(8)


def test_an_unknown_reason_is_found() -> None:
    scene = Scene().opened()
    scene.goodput.places[1].turn("idling", 105_000_000_000)
    with pytest.raises(AssertionError, match="no reasons"):
        scene.at(6).feed(TimePassed())

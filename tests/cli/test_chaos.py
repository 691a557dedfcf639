"""hypha chaos: its schedule, its arithmetic, and a short run of the whole with real faults."""

from __future__ import annotations

import io
import json
import os
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tests.support.commands import hypha_in
from tests.support.system import leftovers

from hypha.cli.chaos import run
from hypha.cli.chaos.faults import How
from hypha.cli.chaos.measuring import (
    Account,
    Applied,
    Reading,
    RoundSpan,
    account,
    costs_s,
    gaps,
    goodput,
    recovery_s,
)
from hypha.cli.chaos.report import ChaosReport, InjectedFault, show
from hypha.cli.chaos.run import ChaosOptions, parse_faults, run_chaos
from hypha.cli.chaos.striking import RESTART_S, TARGETS, plan
from hypha.cli.local.children import Children, NetworkFailed
from hypha.cli.local.network import Network
from hypha.errors import ConfigError
from hypha.scheduler.goodput.report import GoodputReport

USUAL: tuple[How, ...] = ("kill", "stop", "cut")

# --- the schedule ----------------------------------------------------------------------------------------


def test_a_seed_decides_the_schedule() -> None:
    assert plan(1, 600, 20, USUAL) == plan(1, 600, 20, USUAL)
    assert plan(1, 600, 20, USUAL) != plan(2, 600, 20, USUAL)


def test_every_role_is_struck_in_every_way_before_any_comes_again() -> None:
    planned = [(one.role, one.how) for one in plan(3, 600, 20, USUAL)]
    pairs = {(role, how) for how in USUAL for role in TARGETS[how]}
    assert len(planned) == 29
    assert set(planned[: len(pairs)]) == pairs
    assert len(set(planned[len(pairs) :])) == len(planned) - len(pairs)


@given(st.integers(0, 10_000), st.floats(15, 3600), st.floats(2, 60), st.sets(st.sampled_from([*TARGETS])))
def test_faults_are_healed_before_the_next_and_before_the_end(
    seed: int, seconds: float, interval_s: float, hows: set[How]
) -> None:
    planned = plan(seed, seconds, interval_s, sorted(hows | {"kill"}))
    for one, after in pairwise(planned):
        assert 0 < one.at_s < after.at_s
        assert one.how == "kill" or one.at_s + one.hold_s <= after.at_s
    for one in planned:
        assert one.at_s + max(one.hold_s, interval_s / 2) < seconds
        assert one.role in TARGETS[one.how]
        assert 0 <= one.pick < 1
        assert (one.hold_s == RESTART_S) or one.how != "kill"


@pytest.mark.parametrize("text", ["", "kill,burn", ","])
def test_an_unknown_fault_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="there are kill, stop, cut"):
        parse_faults(text)


def test_faults_are_read_from_a_list() -> None:
    assert parse_faults("cut, kill") == ("kill", "cut")


async def test_where_there_are_no_namespaces_cuts_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NetworkFailed, match="no fault is left"):
        await run_chaos(ChaosOptions(60.0, 2, 20.0, 0, ("cut", "slow"), None, None))
    assert "Left out: cut, slow (needs root)." in capsys.readouterr().out


# --- goodput ---------------------------------------------------------------------------------------------


def applied(*pairs: tuple[float, int]) -> list[Applied]:
    return [Applied(at, round_) for at, round_ in pairs]


def test_goodput_is_of_rounds_that_count_over_the_wall_clock() -> None:
    stretch = RoundSpan(100.0, 110.0, first=2, stop=5)
    assert goodput(stretch, {0: 900, 1: 900, 2: 100, 3: 150, 4: 250, 5: 900}) == 50.0
    assert goodput(stretch, {2: 100, 4: 250}) == 35.0


def test_gaps_are_rounds_that_do_not_count() -> None:
    assert gaps({0: 1, 1: 1, 2: 1}, 3) == []
    assert gaps({0: 1, 2: 1}, 4) == [1, 3]


def test_recovery_is_until_the_next_applied_round() -> None:
    seen = applied((1.0, 0), (2.0, 1), (7.5, 1))
    assert recovery_s(2.0, seen) == 5.5
    assert recovery_s(7.5, seen) is None


def test_a_fault_costs_what_was_not_trained_until_the_next() -> None:
    # 100 samples a second when calm; the first fault stops all for 3 s, the second does nothing
    seen = applied((0.0, 0), (1.0, 1), (5.0, 2), (6.0, 3), (7.0, 4))
    samples = dict.fromkeys(range(5), 100)
    assert costs_s([1.0, 5.0], 7.0, seen, samples, 100.0) == pytest.approx([3.0, 0.0])


def test_a_fault_that_strikes_within_a_round_shares_it_with_what_was_before() -> None:
    seen = applied((0.0, 0), (2.0, 1), (4.0, 2))
    assert costs_s([1.0, 3.0], 4.0, seen, dict.fromkeys(range(3), 200), 100.0) == pytest.approx([0.0, 0.0])


def test_of_a_round_that_was_applied_again_the_last_time_counts() -> None:
    seen = applied((0.0, 0), (1.0, 1), (2.0, 2), (5.0, 2), (6.0, 3))
    samples = dict.fromkeys(range(4), 100)
    # round 2 was trained between 2 s and 5 s; its first life, after the fault at 1 s, is lost
    assert costs_s([1.0], 6.0, seen, samples, 100.0) == pytest.approx([3.0])


def test_goodput_is_measured_against_the_faster_calm_stretch() -> None:
    stretches = [RoundSpan(0, 10, 0, 10), RoundSpan(10, 30, 10, 26), RoundSpan(30, 40, 26, 34)]
    seen = applied(*((float(number + 1), number) for number in range(34)))
    struck = [InjectedFault(12.5, 2.5, "worker", "kill", "worker-1", 12)]
    report = ChaosReport(stretches, seen, dict.fromkeys(range(34), 100), struck)
    assert report.undisturbed == (100.0, 80.0)
    assert report.goodput == pytest.approx(0.8)
    assert report.rows[0].recovery_s == 0.5
    assert report.failure == ""
    assert json.loads(json.dumps(report.to_json()))["survived"]


def test_a_gap_in_the_ledger_is_a_failure() -> None:
    report = ChaosReport([RoundSpan(0, 3, 0, 3)], applied((3.0, 2)), {0: 100, 2: 100})
    assert "rounds [1] are missing" in report.failure


# --- the scheduler's own account -----------------------------------------------------------------------


def reading(at: float, round_: int, wall_s: float, samples: int, scheduler: str = "scheduler") -> Reading:
    """Of two places, one of which trains and one of which waits."""
    report = GoodputReport(
        wall_s=wall_s,
        places=2,
        goodput_s=wall_s,
        pending_s=0.0,
        badput_s={"failure": wall_s * 0.75, "loading": wall_s * 0.25},
        samples=samples,
        samples_per_s=0.0,
        calm_samples_per_s=None,
        runtime=None,
        scheduling=1.0,
    )
    return Reading(at, scheduler, round_, report)


def test_an_account_is_between_the_readings_that_show_the_stretch_s_ends() -> None:
    readings = [
        reading(99.9, 1, 9.9, 100),
        reading(100.0, 1, 10.0, 100),  # the round was applied, and the reading does not have it yet
        reading(100.2, 2, 10.2, 200),
        reading(105.0, 4, 15.0, 400),
        reading(110.0, 6, 20.0, 600),
        reading(110.2, 7, 20.2, 700),
        reading(120.0, 9, 30.0, 900),
    ]
    found = account(readings, RoundSpan(100.0, 110.0, first=2, stop=7))
    assert found is not None
    assert (found.samples, found.places) == (500, 2)
    assert found.wall_s == pytest.approx(10.0)
    assert found.seen_s == pytest.approx(10.0)
    assert found.goodput_s == pytest.approx(10.0)
    assert found.badput_s == pytest.approx({"failure": 7.5, "loading": 2.5})
    assert found.adds_up


def test_accounts_of_schedulers_that_follow_each_other_are_added_up() -> None:
    readings = [
        reading(100.0, 2, 10.0, 200),
        reading(103.0, 3, 13.0, 300),
        reading(105.0, 3, 0.5, 300, "scheduler+1"),  # it began at 104.5
        reading(110.0, 5, 5.5, 500, "scheduler+1"),
    ]
    found = account(readings, RoundSpan(100.0, 110.0, first=2, stop=5))
    assert found is not None
    assert (found.wall_s, found.seen_s) == (10.0, 8.5)
    assert found.samples_per_s == 30.0
    assert found.goodput_s == 8.5
    assert found.adds_up


def test_without_a_reading_after_the_end_there_is_no_account() -> None:
    readings = [reading(100.0, 2, 10.0, 200), reading(109.0, 4, 19.0, 400)]
    assert account(readings, RoundSpan(100.0, 110.0, first=2, stop=5)) is None
    assert account([], RoundSpan(100.0, 110.0, first=2, stop=5)) is None


def judged(own: Account | None) -> ChaosReport:
    stretches = [RoundSpan(0, 10, 0, 10), RoundSpan(10, 30, 10, 26), RoundSpan(30, 40, 26, 34)]
    seen = applied(*((float(number + 1), number) for number in range(34)))
    return ChaosReport(stretches, seen, dict.fromkeys(range(34), 100), own=own)


def shown(report: ChaosReport) -> str:
    console = Console(width=200, record=True, quiet=False, file=io.StringIO())
    show(console, report)
    return console.export_text()


def test_the_report_has_the_scheduler_s_account_beside_its_own() -> None:
    own = Account(1608, 20.0, 19.0, 2, 30.0, {"failure": 6.0, "loading": 2.0})
    report = judged(own)
    assert report.difference == pytest.approx(0.005)
    assert report.agrees
    assert report.badput_s == {"failure": 6.0, "loading": 2.0, "unseen": 2.0}
    assert json.loads(json.dumps(report.to_json()))["badput_s"] == report.badput_s
    text = shown(report)
    assert "80 samples/s, +0.50% from what was measured" in text
    assert "goodput 75.0%, failure 15.0%, loading 5.0%, unseen 5.0%" in text
    assert "ACCOUNT" not in text


@pytest.mark.parametrize(
    ("own", "text"),
    [
        (Account(1500, 20.0, 20.0, 2, 30.0, {"failure": 10.0}), "ACCOUNT IS WRONG by more than 1%"),
        (Account(1600, 20.0, 20.0, 2, 30.0, {"failure": 9.0}), "ACCOUNT DOES NOT ADD UP"),
        (None, "could not be read"),
    ],
)
def test_an_account_that_is_wrong_is_said_to_be(own: Account | None, text: str) -> None:
    report = judged(own)
    assert not report.agrees
    assert text in shown(report)


async def test_a_job_that_gets_stuck_among_faults_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    ledger = tmp_path / "state" / run.JOB / "job.db"

    async def start(network: Network, workers: int, small_disks: bool) -> None:
        ledger.parent.mkdir(parents=True)
        with closing(sqlite3.connect(ledger)) as db:
            db.execute("CREATE TABLE rounds (number INTEGER PRIMARY KEY, round, samples, discarded)")
            db.execute("CREATE TABLE job (generation)")
        nursery.start_soon(train)

    async def train() -> None:
        """A round a second, for a minute: that is within the disturbed stretch."""
        for number in range(60):
            with closing(sqlite3.connect(ledger)) as db, db:
                db.execute("INSERT INTO rounds VALUES (?, ?, 100, 0)", (number + 1, number))
            await trio.sleep(1)

    monkeypatch.setattr(run, "_start", start)
    options = ChaosOptions(240.0, 2, 20.0, 0, ("kill",), None, None)
    console = Console(file=io.StringIO())
    async with trio.open_nursery() as nursery:
        network = Network(tmp_path, Children(tmp_path, {}))
        report = await run._course(console, network, options, ("kill",))
    assert "no round was applied for 120 s: the job is stuck at round 60" in report.failure
    assert len(report.undisturbed) == 1


# --- the whole -------------------------------------------------------------------------------------------


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a path short enough for Unix sockets below it, and an empty ``tmp`` in it."""
    with TemporaryDirectory(prefix="hc-", dir="/tmp") as directory:
        (Path(directory) / "tmp").mkdir()
        yield Path(directory)


@pytest.mark.fault
@pytest.mark.timeout(330)
def test_a_job_survives_a_minute_of_kills_and_freezes(short: Path) -> None:
    arguments = ("--minutes", "0.6", "--interval", "6", "--workers", "2", "--seed", "1")
    with hypha_in(short, "chaos", *arguments, "--faults", "kill,stop", "--summary", "summary.json") as chaos:
        output, _ = chaos.communicate(timeout=320)
    print(output)
    assert chaos.returncode == 0, output
    summary = json.loads((short / "summary.json").read_text())
    assert summary["survived"]
    assert len(summary["rows"]) >= 4
    assert {row["how"] for row in summary["rows"]} == {"kill", "stop"}
    assert all(row["recovery_s"] is not None for row in summary["rows"])
    assert summary["ended"] == []
    assert summary["goodput"] > 0
    # goodput and badput make the wall clock, and the scheduler's own rate is what was measured
    assert summary["agrees"], (summary["own"], summary["difference"])
    assert leftovers(short) == []
    assert list((short / "tmp").iterdir()) == []


@pytest.mark.real
@pytest.mark.fault
@pytest.mark.timeout(120)
@pytest.mark.parametrize("until", ["Preparing", "worker"])
def test_interrupted_nothing_is_left(short: Path, until: str) -> None:
    arguments = ("--minutes", "2", "--interval", "2", "--workers", "2", "--faults", "stop,cut,fill_disk")
    with hypha_in(short, "chaos", *arguments) as chaos:
        assert chaos.stdout is not None
        for line in chaos.stdout:
            if until in line:
                break
        tags = set()
        for child in psutil.Process(chaos.pid).children(recursive=True):
            said = subprocess.run(["ip", "netns", "identify", str(child.pid)], capture_output=True, text=True)
            tags |= {said.stdout.partition("-")[0]} - {"", "\n"}
        assert tags or until == "Preparing"
        chaos.send_signal(signal.SIGINT)
        rest, _ = chaos.communicate(timeout=40)
    assert chaos.returncode == 130, rest
    assert leftovers(short) == []
    assert str(short) not in Path("/proc/mounts").read_text()
    places = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not any(tag in places for tag in tags)
    assert list((short / "tmp").iterdir()) == []

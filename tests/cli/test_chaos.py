"""hypha chaos: its schedule, its arithmetic, and a short run of the whole with real faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.commands import hypha_in
from tests.support.system import leftovers

from hypha.cli.chaos.faults import How
from hypha.cli.chaos.goodput import Applied, Stretch, costs_s, gaps, goodput, recovery_s
from hypha.cli.chaos.network import NetworkFailed
from hypha.cli.chaos.report import Struck, judge
from hypha.cli.chaos.run import Options, parse_faults, run_chaos
from hypha.cli.chaos.schedule import RESTART_S, TARGETS, plan
from hypha.errors import ConfigError

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
        await run_chaos(Options(60.0, 2, 20.0, 0, ("cut", "slow"), None, None))
    assert "Left out: cut, slow (needs root)." in capsys.readouterr().out


# --- goodput ---------------------------------------------------------------------------------------------


def applied(*pairs: tuple[float, int]) -> list[Applied]:
    return [Applied(at, round_) for at, round_ in pairs]


def test_goodput_is_of_rounds_that_count_over_the_wall_clock() -> None:
    stretch = Stretch(100.0, 110.0, first=2, stop=5)
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
    stretches = [Stretch(0, 10, 0, 10), Stretch(10, 30, 10, 26), Stretch(30, 40, 26, 34)]
    seen = applied(*((float(number + 1), number) for number in range(34)))
    struck = [Struck(12.5, 2.5, "worker", "kill", "worker-1", 12)]
    report = judge(stretches, seen, dict.fromkeys(range(34), 100), struck, [], 0, "")
    assert report.undisturbed == (100.0, 80.0)
    assert report.goodput == pytest.approx(0.8)
    assert report.rows[0].recovery_s == 0.5
    assert report.failure == ""
    assert json.loads(json.dumps(report.to_json()))["survived"]


def test_a_gap_in_the_ledger_is_a_failure() -> None:
    report = judge([Stretch(0, 3, 0, 3)], applied((3.0, 2)), {0: 100, 2: 100}, [], [], 0, "")
    assert "rounds [1] are missing" in report.failure


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

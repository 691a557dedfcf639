"""How large slices should be, by arithmetic, and as `hypha-data advise` says it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.data.test_command import command

from hypha.data.serving.slice_advice import BUSY, LEAST_PER_WORKER, TrainingPace, advise, fit
from hypha.messages import Manifest, SliceInfo

PACE = TrainingPace(workers=4, sample_bytes=3136, batch_size=32, batch_s=0.05, mbit=100)


def manifest(count: int, size: int) -> Manifest:
    parts = tuple(SliceInfo(file=f"{n}", samples=size // 3136, size=size, blake3="") for n in range(count))
    return Manifest(name="set", columns=(), slices=parts)


def fetched_in_s(pace: TrainingPace, size_mb: float) -> float:
    return pace.fixed_s + size_mb * 1e6 / pace.share


@pytest.mark.parametrize("batch_s", [0.045, 0.05, 0.5, 5.0, 60.0])
@pytest.mark.parametrize("mbit", [100.0, 1000.0])
@pytest.mark.parametrize("round_trip_s", [0.0, 0.05, 0.5])
def test_the_next_slice_is_there_before_the_present_one_ends(
    batch_s: float, mbit: float, round_trip_s: float
) -> None:
    pace = replace(PACE, batch_s=batch_s, mbit=mbit, round_trip_s=round_trip_s)
    advice = advise(pace)
    assert advice.smallest_mb <= advice.largest_mb
    assert advice.smallest_mb * 0.95 <= advice.slice_mb <= advice.largest_mb * 1.05
    assert advice.load == pytest.approx(pace.need * 4 * 8 / 1e6 / mbit)
    assert advice.problems == () or advice.load >= BUSY
    if advice.load < BUSY:
        assert advice.fetched_in_s <= 1.05 * advice.lasts_s
        # and not at half of the smallest
        half = advice.smallest_mb / 2
        assert fetched_in_s(pace, half) > half * 1e6 / pace.need
    # the first slices are there in time
    assert advice.fetched_in_s <= 1.05 * pace.start_s
    assert advice.slice_samples == pytest.approx(advice.slice_mb * 1e6 / 3136, abs=1)


def test_a_line_that_cannot_keep_up_is_told_whatever_the_slices() -> None:
    (told,) = advise(replace(PACE, batch_s=0.01)).problems
    assert "workers wait 69% of the time; 321 Mbit/s are needed: 5 data nodes like this one" in told
    assert advise(replace(PACE, batch_s=0.01, data_nodes=5)).problems == ()
    (told,) = advise(replace(PACE, mbit=1000, worker_mbit=10)).problems
    assert "each needs 16.1 Mbit/s and can receive less" in told
    (told,) = advise(replace(PACE, mbit=75)).problems
    assert "used to 86%" in told


def test_where_no_size_is_right_that_is_said() -> None:
    advice = advise(replace(PACE, batch_s=0.04, round_trip_s=0.5))
    assert advice.slice_mb == advice.largest_mb < advice.smallest_mb
    assert "no size is right: slices should have 58 MB at least and 25 MB at most" in advice.problems[-1]


def test_a_small_dataset_is_cut_so_that_everybody_has_some() -> None:
    pace = replace(PACE, dataset_bytes=16e6)
    advice = advise(pace)
    assert 16 / advice.slice_mb >= 0.9 * LEAST_PER_WORKER * pace.workers
    assert any("fewer than 4 a worker and epoch" in why for why in advice.because)
    assert any("only the first epoch is fetched" in why for why in advice.because)


def test_whether_a_dataset_fits() -> None:
    advice = advise(PACE)
    assert advice.slice_mb == 16
    assert fit(manifest(100, 16 * 10**6), PACE, advice).fits
    for count, size, wrong in (
        (3, 16 * 10**6, "it has 3 slices for 4 workers"),
        (12, 16 * 10**6, "fewer than 4 a worker"),
        (100, 60 * 10**6, "its largest slice has 60.0 MB, and above 30 MB the start waits"),
        (100, 10**6, "its slices have 1 MB, and below 1.4 MB a worker waits"),
    ):
        found = fit(manifest(count, size), PACE, advice)
        assert not found.fits
        assert wrong in found.problems[0]
        assert "prepare it again with --slice-mb 16" in found.problems[0]


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4000, 100), np.float32))
    made = tmp_path / "made"
    assert command(monkeypatch, "prepare", tmp_path / "x.npy", "-o", made, "--slice-mb", 0.8) == 0
    capsys.readouterr()
    words = ("advise", made, "--workers", 2, "--batch-s", 0.1, "--round-trip-ms", 1)
    assert command(monkeypatch, *words) == 0
    told = capsys.readouterr().out
    assert f"{made}: 2 slices of 0.8 MB do not fit" in told
    assert command(monkeypatch, *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fit"]["fits"] is False
    assert (
        command(
            monkeypatch, "prepare", tmp_path / "x.npy", "-o", made, "--force", "--slice-mb", found["slice_mb"]
        )
        == 0
    )
    capsys.readouterr()
    assert command(monkeypatch, *words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["fit"]["fits"] is True
    assert command(monkeypatch, "advise", "--batch-s", 1) == 2
    assert "give a prepared dataset, or --sample-bytes" in capsys.readouterr().err
    assert command(monkeypatch, "advise", "--sample-bytes", 1, "--mbit", 0) == 2

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypha.data.preparing import pipeline
from hypha.data.preparing.pipeline import Holdout, Shuffle, SliceWriter, samples_for
from hypha.data.slices import hash_file
from hypha.messages import Column

DTYPE = np.dtype([("x", "<i8"), ("y", "<f4", (2,))])
COLUMNS = (Column(name="x", dtype="I64", shape=()), Column(name="y", dtype="F32", shape=(2,)))


class Sink:
    def __init__(self) -> None:
        self.rows: list[int] = []
        self.closed = 0

    def write(self, rows: Any) -> None:
        assert np.array_equal(rows["y"][:, 0], rows["x"].astype(np.float32))
        self.rows += rows["x"].tolist()

    def close(self) -> None:
        self.closed += 1


def records(start: int, stop: int) -> Any:
    rows = np.empty(stop - start, DTYPE)
    rows["x"] = np.arange(start, stop)
    rows["y"] = np.arange(start, stop)[:, None]
    return rows


def feed(stage: Any, total: int, block: int) -> None:
    for start in range(0, total, block):
        stage.write(records(start, min(start + block, total)))
    stage.close()


@given(
    total=st.integers(1, 700),
    block=st.integers(1, 300),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(-(2**40), 2**40),
)
@settings(max_examples=60, deadline=None)
def test_a_holdout_takes_its_exact_share_whatever_the_blocks(
    total: int, block: int, fraction: float, seed: int
) -> None:
    train, held = Sink(), Sink()
    feed(Holdout(train, held, fraction, seed), total, block)
    assert sorted(train.rows + held.rows) == list(range(total))
    assert len(held.rows) == round(total * fraction)
    assert train.closed == held.closed == 1
    again = Sink()
    feed(Holdout(Sink(), again, fraction, seed), total, total)
    assert again.rows == held.rows


def test_a_holdout_of_a_sorted_source_is_spread_over_it() -> None:
    held = Sink()
    feed(Holdout(Sink(), held, 0.2, seed=3), 10 * 128, 100)
    parts = np.bincount(np.array(held.rows) // 128, minlength=10)
    assert set(parts.tolist()) <= {25, 26}
    other = Sink()
    feed(Holdout(Sink(), other, 0.2, seed=4), 10 * 128, 100)
    assert other.rows != held.rows


def shuffled(tmp_path: Path, total: int, block: int, seed: int) -> list[int]:
    sink = Sink()
    feed(Shuffle(sink, tmp_path, seed), total, block)
    assert sink.closed == 1
    assert list(tmp_path.iterdir()) == []
    return sink.rows


def test_a_shuffle_keeps_every_row_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    first = shuffled(tmp_path, 1000, 64, seed=1)
    assert sorted(first) == list(range(1000))
    assert first == shuffled(tmp_path, 1000, 999, seed=1)
    assert first != shuffled(tmp_path, 1000, 64, seed=2)
    assert first != sorted(first)


def test_a_shuffle_larger_than_memory_goes_through_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # two levels of files: 20,000 rows of 16 bytes, 8 files of about 40,000 bytes, each over the limit
    monkeypatch.setattr(pipeline, "SHUFFLE_BYTES", 8192)
    monkeypatch.setattr(pipeline, "SHUFFLE_FILES", 8)
    first = shuffled(tmp_path, 20_000, 700, seed=1)
    assert sorted(first) == list(range(20_000))
    assert first == shuffled(tmp_path, 20_000, 1024, seed=1)
    # no trace of the order before: neighbours are far apart, each part of the result is from everywhere
    steps = np.abs(np.diff(first))
    assert abs(steps.mean() / (20_000 / 3) - 1) < 0.05
    for part in np.array_split(np.array(first), 10):
        assert abs(part.mean() / 10_000 - 1) < 0.1


def test_every_order_is_equally_likely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "SHUFFLE_BYTES", 2 * DTYPE.itemsize)
    monkeypatch.setattr(pipeline, "SHUFFLE_FILES", 2)
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(300):
        order = tuple(shuffled(tmp_path, 3, 1, seed))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    # chi-square with 5 degrees of freedom: 25.7 is exceeded once in 10,000
    assert sum((count - 50) ** 2 / 50 for count in counts.values()) < 25.7


def writer(directory: Path, samples: int) -> SliceWriter:
    return SliceWriter(directory, "set", COLUMNS, samples, "no rows")


@pytest.mark.parametrize("block", [1, 7, 10, 11, 100])
def test_slices_are_the_same_whatever_the_blocks(tmp_path: Path, block: int) -> None:
    slices = writer(tmp_path, 10)
    feed(slices, 37, block)
    assert [part.samples for part in slices.manifest.slices] == [10, 10, 10, 7]
    reference = tmp_path / "reference"
    reference.mkdir()
    other = writer(reference, 10)
    feed(other, 37, 37)
    assert slices.manifest.slices == other.manifest.slices
    assert hash_file(tmp_path / "slice-0000.safetensors") == slices.manifest.slices[0].blake3


def test_names_of_very_many_slices_sort_as_they_are_numbered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "DIGITS", 1)
    slices = writer(tmp_path, 1)
    feed(slices, 101, 20)
    names = [part.file for part in slices.manifest.slices]
    assert names[0] == "slice-000.safetensors"
    assert names == sorted(names) == sorted(path.name for path in tmp_path.glob("*.safetensors"))


def test_slices_by_size() -> None:
    assert samples_for(COLUMNS, 1600) == 100
    assert samples_for(COLUMNS, 1) == 1

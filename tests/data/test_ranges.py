"""Which numbers a dataset's columns hold, as its manifest says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from hypha.data import PrepareOptions, manifest_hash, prepare, read_manifest
from hypha.data.manifest import MANIFEST_FILE, make_manifest
from hypha.data.slices import Ranges
from hypha.messages import Column, ColumnRange, Manifest


def of(dtype: str, *blocks: np.ndarray) -> tuple[ColumnRange, ...]:
    column = Column(name="x", dtype=dtype, shape=())
    ranges = Ranges()
    for block in blocks:
        ranges.see(column, block)
    return ranges.of((column,))


def test_a_prepared_dataset_says_which_numbers_its_columns_hold(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    labels = np.array([3, -100, 7, 0] * 10, dtype=np.int64)
    np.save(raw / "labels.npy", labels)
    np.save(raw / "x.npy", np.linspace(-1.5, 2.0, 80, dtype=np.float32).reshape(40, 2))
    np.save(raw / "whole.npy", np.arange(40, dtype=np.float32))
    options = PrepareOptions((raw,), tmp_path / "out", slice_samples=8, holdout=0.25)
    made = prepare(options)
    assert made.holdout is not None
    found = {one.column: one for one in made.manifest.ranges}
    assert found["labels"] == ColumnRange(column="labels", low=0, high=7, ignored=found["labels"].ignored)
    (held,) = [one for one in made.holdout.ranges if one.column == "labels"]
    assert found["labels"].ignored + held.ignored == 10, "each of the two says what it holds itself"
    assert not found["x"].whole
    assert found["whole"].whole
    assert read_manifest(tmp_path / "out") == made.manifest
    # slices that somebody else has made are looked at when they get a manifest
    (tmp_path / "out" / MANIFEST_FILE).unlink()
    again = make_manifest(tmp_path / "out", "out")
    assert {one.column: one for one in again.ranges} == found


def test_a_manifest_of_an_earlier_version_is_read_and_means_the_same(tmp_path: Path) -> None:
    save_file({"labels": np.arange(4)}, tmp_path / "slice-0000.safetensors")
    now = make_manifest(tmp_path, "d")
    before = msgspec.structs.replace(now, ranges=())
    assert b"ranges" not in msgspec.json.encode(before)
    assert manifest_hash(now) == manifest_hash(before), "replicas of both versions serve one dataset"
    decoded = msgspec.json.decode(msgspec.json.encode(before), type=Manifest)
    assert decoded == before


@given(st.lists(st.lists(st.integers(-200, 200), min_size=1), min_size=1, max_size=4))
def test_in_however_many_blocks_it_comes(blocks: list[list[int]]) -> None:
    values = [value for block in blocks for value in block]
    kept = [value for value in values if value != -100]
    found = of("I16", *(np.array(block, dtype=np.int16) for block in blocks))
    if not kept:
        assert found == ()
        return
    ignored = len(values) - len(kept)
    assert found == (ColumnRange(column="x", low=min(kept), high=max(kept), ignored=ignored),)


def test_types_that_numpy_has_not_and_numbers_that_are_none() -> None:
    halves = (np.array([0.5, -2.0], dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    assert of("BF16", halves) == (ColumnRange(column="x", low=-2, high=0.5, whole=False),)
    assert of("F32", np.array([1, np.nan], dtype=np.float32)) == ()
    assert of("F8_E4M3", np.zeros(2, dtype=np.uint8)) == ()
    assert of("BOOL", np.array([True, False])) == (ColumnRange(column="x", low=0, high=1),)
    assert of("F32", np.zeros((0,), dtype=np.float32)) == ()

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.data.reading import write_slices

from hypha.data import load_dataset_directory, read_manifest, verify
from hypha.data.manifest import write_manifest
from hypha.data.slices import hash_file


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    directory = write_slices(tmp_path / "set")
    load_dataset_directory(directory)
    return directory


def test_a_whole_dataset_has_no_problems(dataset: Path) -> None:
    seen: list[str] = []
    assert verify(dataset, seen.append) == []
    assert len(seen) == 3


def test_every_kind_of_damage_is_told_at_once(dataset: Path) -> None:
    write_slices(dataset, count=6, seed=5)  # 0 to 2 get other content, 3 to 5 are new
    load_dataset_directory(write_slices(dataset.parent / "again"))
    (dataset / "part-1.safetensors").unlink()
    with (dataset / "part-2.safetensors").open("r+b") as file:
        file.truncate(100)
    found = {problem.key: problem.message for problem in verify(dataset)}
    assert "BLAKE3" in found["part-0.safetensors"]
    assert "missing" in found["part-1.safetensors"]
    assert "100 bytes" in found["part-2.safetensors"]
    assert all("does not list" in found[f"part-{number}.safetensors"] for number in (3, 4, 5))
    assert len(found) == 6
    assert all(str(dataset) in str(problem) for problem in verify(dataset))


def test_a_single_flipped_bit_is_found(dataset: Path) -> None:
    path = dataset / "part-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (problem,) = verify(dataset)
    assert problem.key == "part-1.safetensors"


def test_a_manifest_that_does_not_fit_its_files_is_found(dataset: Path) -> None:
    path = dataset / "part-0.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "labels": tensors["labels"].astype(np.int32)}, path)
    manifest = read_manifest(dataset)
    part = msgspec.structs.replace(manifest.slices[0], size=path.stat().st_size, blake3=hash_file(path))
    other = msgspec.structs.replace(manifest.slices[1], samples=5)
    write_manifest(dataset, msgspec.structs.replace(manifest, slices=(part, other, manifest.slices[2])))
    found = {problem.key: problem.message for problem in verify(dataset)}
    assert "labels I32" in found["part-0.safetensors"]
    assert "holds 4 samples, the manifest says 5" in found["part-1.safetensors"]


def test_without_a_manifest_there_is_one_problem(tmp_path: Path) -> None:
    (problem,) = verify(write_slices(tmp_path / "raw"))
    assert problem.key == "manifest.json"
    (problem,) = verify(tmp_path / "absent")
    assert "cannot be read" in problem.message


def test_a_holdout_inside_is_verified_too(dataset: Path) -> None:
    holdout = write_slices(dataset / "holdout")
    load_dataset_directory(holdout)
    assert verify(dataset) == []
    (holdout / "part-0.safetensors").unlink()
    (problem,) = verify(dataset)
    assert problem.source == str(holdout)

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.data.reading import write_slices

from hypha.data import load_dataset_directory, manifest_hash, read_manifest
from hypha.data.manifest import MANIFEST_FILE, write_manifest
from hypha.errors import DataError
from hypha.messages import Column, Manifest, SliceInfo

MANIFEST = Manifest(
    name="digits",
    columns=(
        Column(name="labels", dtype="I64", shape=()),
        Column(name="pixel_values", dtype="F32", shape=(1, 8, 8)),
    ),
    slices=(
        SliceInfo(file="slice-0000.safetensors", samples=100, size=26640, blake3="ab" * 32),
        SliceInfo(file="slice-0001.safetensors", samples=97, size=25000, blake3="cd" * 32),
    ),
)


def test_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_FILE]
    assert (tmp_path / MANIFEST_FILE).stat().st_mode & 0o777 == 0o644
    assert msgspec.json.decode((tmp_path / MANIFEST_FILE).read_bytes())["version"] == 1


def test_equal_manifests_are_equal_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for directory in (first, second):
        directory.mkdir()
        write_manifest(directory, MANIFEST)
    assert (first / MANIFEST_FILE).read_bytes() == (second / MANIFEST_FILE).read_bytes()


def test_the_hash_covers_what_is_trained_on_and_nothing_of_the_host() -> None:
    replace = msgspec.structs.replace
    digest = manifest_hash(MANIFEST)
    assert len(digest) == 64
    renamed = replace(MANIFEST.slices[0], file="part-a.safetensors")
    same = [
        replace(MANIFEST, name="other"),
        replace(MANIFEST, slices=(renamed, MANIFEST.slices[1])),
        replace(MANIFEST, columns=MANIFEST.columns[::-1]),
    ]
    assert {manifest_hash(one) for one in same} == {digest}
    other = [
        replace(MANIFEST, slices=MANIFEST.slices[::-1]),
        replace(MANIFEST, slices=MANIFEST.slices[:1]),
        replace(MANIFEST, columns=MANIFEST.columns[:1]),
        replace(MANIFEST, slices=(replace(MANIFEST.slices[0], blake3="ef" * 32), MANIFEST.slices[1])),
    ]
    assert len({manifest_hash(one) for one in other} | {digest}) == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file": "../secret.safetensors"}, "no name of a slice"),
        ({"file": "/etc/passwd"}, "no name of a slice"),
        ({"file": ".hidden.safetensors"}, "no name of a slice"),
        ({"file": "slice-0001.safetensors"}, "listed twice"),
        ({"samples": 0}, "hold nothing"),
    ],
)
def test_a_manifest_cannot_name_files_elsewhere_or_twice(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    part = msgspec.structs.replace(MANIFEST.slices[0], **change)
    write_manifest(tmp_path, msgspec.structs.replace(MANIFEST, slices=(part, MANIFEST.slices[1])))
    with pytest.raises(DataError, match=said):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"name": 3}', b'{"name":"x","columns":[]}'])
def test_what_is_no_manifest_is_told_by_its_path(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(DataError, match=MANIFEST_FILE):
        load_dataset_directory(tmp_path)


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, msgspec.structs.replace(MANIFEST, version=2))
    with pytest.raises(DataError, match="version 2"):
        read_manifest(tmp_path)


def test_a_directory_without_manifest_gets_one_sorted_by_name(tmp_path: Path) -> None:
    directory = write_slices(tmp_path / "mnist")
    (directory / ".hidden.safetensors").write_bytes(b"junk")
    (directory / "sub.safetensors").mkdir()
    (directory / "readme.txt").write_text("not data")
    dataset = load_dataset_directory(directory)
    assert dataset.name == "mnist"
    assert [part.file for part in dataset.manifest.slices] == [f"part-{i}.safetensors" for i in range(3)]
    assert dataset.manifest.samples == 12
    assert dataset.manifest.columns == (
        Column(name="labels", dtype="I64", shape=()),
        Column(name="pixel_values", dtype="F32", shape=(1, 2, 2)),
    )
    assert read_manifest(directory) == dataset.manifest
    assert load_dataset_directory(directory).manifest_hash == dataset.manifest_hash


def test_replicas_under_other_names_have_one_hash(tmp_path: Path) -> None:
    here = load_dataset_directory(write_slices(tmp_path / "here"), "shared")
    there = load_dataset_directory(write_slices(tmp_path / "there"), "shared")
    other = load_dataset_directory(write_slices(tmp_path / "other", seed=1), "shared")
    assert here.name == there.name == "shared"
    assert here.manifest_hash == there.manifest_hash != other.manifest_hash


def test_a_file_with_other_columns_is_named(tmp_path: Path) -> None:
    directory = write_slices(tmp_path / "set")
    save_file({"labels": np.zeros(3, np.int32)}, directory / "part-9.safetensors")
    with pytest.raises(DataError, match=r"part-9\.safetensors has other columns.*labels I32.*labels I64"):
        load_dataset_directory(directory)
    assert not (directory / MANIFEST_FILE).exists()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": np.zeros(3), "b": np.zeros(4)}, "different lengths"),
        ({"a": np.array(1.0)}, "single value"),
        ({}, "no columns"),
        ({"a": np.zeros((0, 2))}, "no samples"),
    ],
)
def test_a_file_that_is_no_slice_is_named(tmp_path: Path, tensors: dict[str, object], said: str) -> None:
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(DataError, match=f"odd.safetensors.*{said}"):
        load_dataset_directory(tmp_path)


def test_a_directory_without_slices_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hypha-data prepare"):
        load_dataset_directory(tmp_path)
    with pytest.raises(DataError, match="is no directory"):
        load_dataset_directory(tmp_path / "absent")


def test_all_missing_and_cut_files_are_told_at_once(tmp_path: Path) -> None:
    directory = write_slices(tmp_path / "set")
    load_dataset_directory(directory)
    (directory / "part-0.safetensors").unlink()
    with (directory / "part-2.safetensors").open("r+b") as file:
        file.truncate(50)
    with pytest.raises(DataError) as caught:
        load_dataset_directory(directory)
    assert "part-0.safetensors cannot be read" in str(caught.value)
    assert "part-2.safetensors has 50 bytes" in str(caught.value)


def test_a_directory_that_cannot_be_written_is_served_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = write_slices(tmp_path / "set")
    caplog.set_level(logging.WARNING, "hypha.data")
    if os.geteuid() == 0:  # permissions do not hold root up; a directory in the manifest's place does

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("hypha.files.staging.os.open", refuse)
    else:
        directory.chmod(0o500)
    try:
        dataset = load_dataset_directory(directory)
    finally:
        directory.chmod(0o700)
    assert len(dataset.paths) == 3
    assert not (directory / MANIFEST_FILE).exists()
    assert "hashed at every start" in caplog.text

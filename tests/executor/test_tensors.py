"""Tensor files: canonical, streamed, checked, with ties and buffers intact."""

from __future__ import annotations

import errno
from pathlib import Path

import blake3
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import nn

from hypha.errors import DataError, ModelError, NotFinite, Refused
from hypha.executor.files import tensors, updates
from hypha.executor.files.tensors import CHUNK, Digests, TensorFile
from hypha.executor.files.theta import Theta, theta_of
from hypha.executor.files.updates import UpdateFile
from hypha.executor.running import kind_of
from hypha.messages import (
    MAX_CONTRIBUTION_BYTES,
    MAX_EVENT_BYTES,
    Contribution,
    RoundApplied,
    SliceRange,
    UpdateReceived,
    UpdateStatistics,
    encode_json,
)


def theta(seed: int = 0) -> Theta:
    generator = torch.Generator().manual_seed(seed)
    return Theta(
        {
            "b.weight": torch.randn(700, 800, generator=generator),
            "a": torch.randn(3, generator=generator),
            "scalar": torch.randn((), generator=generator),
        },
        {"count": torch.tensor(7), "mean": torch.randn(5, generator=generator)},
    )


def test_file_is_what_the_safetensors_library_writes_and_its_hash(tmp_path: Path) -> None:
    values = theta().all()
    found = tensors.write(tmp_path / "ours", values)
    save_file(values, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    content = (tmp_path / "ours").read_bytes()
    assert found == Digests(blake3.blake3(content).hexdigest(), xxhash.xxh3_128(content).hexdigest())
    loaded = load_file(tmp_path / "ours")
    assert all(torch.equal(loaded[name], value) for name, value in values.items())


def test_equal_values_give_equal_bytes_whatever_the_order(tmp_path: Path) -> None:
    values = theta().all()
    backwards = dict(reversed(values.items()))
    assert tensors.write(tmp_path / "1", values) == tensors.write(tmp_path / "2", backwards)


def test_read_fills_in_place_and_returns_the_hash(tmp_path: Path) -> None:
    written = tensors.write(tmp_path / "t", theta().all())
    other = theta(seed=1)
    address = other.parameters["b.weight"].data_ptr()
    assert tensors.read(tmp_path / "t", other.all()) == written
    assert tensors.read(tmp_path / "t", other.all(), quick=True) == Digests("", written.xxh3)
    assert other.parameters["b.weight"].data_ptr() == address
    assert all(torch.equal(value, other.all()[name]) for name, value in theta().all().items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-1], "bytes where its header says"),
        (lambda data: data + b"x", "bytes where its header says"),
        (lambda data: data[:5], "header would take"),
        (lambda data: b"\xff" * 8 + data[8:], "header would take"),
        (lambda data: data[:8] + b"[" + data[9:], "no valid safetensors"),
        (lambda data: data.replace(b"I64", b"X64"), "dtype X64"),
        (lambda data: data.replace(b"[700,800]", b"[700,801]"), "not its own"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, change: object, words: str) -> None:
    tensors.write(tmp_path / "t", theta().all())
    (tmp_path / "t").write_bytes(change((tmp_path / "t").read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=words):
        tensors.read(tmp_path / "t", theta().all())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("a", torch.zeros(4), r"a is F32\[4\] where the model has F32\[3\]"),
        ("a", torch.zeros(3, dtype=torch.float64), "a is F64"),
        ("new", torch.zeros(1), "holds new"),
        ("a", None, "lacks a"),
    ],
)
def test_a_file_of_another_model_is_refused(
    tmp_path: Path, name: str, value: torch.Tensor | None, words: str
) -> None:
    values = theta().all()
    values.pop(name, None)
    if value is not None:
        values[name] = value
    tensors.write(tmp_path / "t", values)
    with pytest.raises(DataError, match=words):
        tensors.read(tmp_path / "t", theta().all())


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    values = theta().all() | {"odd": torch.zeros(2, dtype=torch.complex128)}
    with pytest.raises(KeyError):
        tensors.write(tmp_path / "t", values)
    assert list(tmp_path.iterdir()) == []


def decoded(update: UpdateFile, name: str, count: int) -> torch.Tensor:
    reader = update.reader()
    return torch.cat([reader.chunk(name, at).clone() for at in range(0, count, CHUNK)])


@pytest.mark.parametrize(("encoding", "tolerance"), [("none", 0.0), ("bf16", 2**-8), ("int8", 1 / 250)])
def test_update_holds_differences_and_the_model_is_left_alone(
    tmp_path: Path, encoding: updates.Encoding, tolerance: float
) -> None:
    base, local = theta(0), theta(1)
    before = local.copy()
    updates.write_update(tmp_path / "u", local, base, encoding)
    with TensorFile(tmp_path / "u") as file:
        update = UpdateFile(file, base)
        for name, start in base.parameters.items():
            wanted = local.parameters[name] - start
            found = decoded(update, name, start.numel()).view(start.shape)
            limit = tolerance * float(wanted.abs().max())
            assert float((found - wanted).abs().max()) <= limit
        assert update.buffer("count") == local.buffers["count"]
        assert torch.equal(update.buffer("mean"), local.buffers["mean"])
    assert all(torch.equal(value, local.all()[name]) for name, value in before.all().items())


def test_encoded_updates_are_as_small_as_promised(tmp_path: Path) -> None:
    sizes: dict[updates.Encoding, int] = {}
    for encoding in ("none", "bf16", "int8"):
        updates.write_update(tmp_path / encoding, theta(1), theta(0), encoding)  # type: ignore[arg-type]
        sizes[encoding] = (tmp_path / encoding).stat().st_size  # type: ignore[index]
    assert sizes["bf16"] < 0.51 * sizes["none"]
    assert sizes["int8"] < 0.26 * sizes["none"]


def contribution(worker: str, ranges: int = 1) -> Contribution:
    rows = tuple(SliceRange(epoch=0, slice=number, start=0, stop=1) for number in range(ranges))
    return Contribution(
        round=3, worker=worker, incarnation="i", samples=1, batches=1, batch_size=1, steps=0, ranges=rows
    )


def test_what_an_update_states_of_itself_is_bounded(tmp_path: Path) -> None:
    """Parameter servers report it to the scheduler: an event that is too large would never arrive."""
    path, part = tmp_path / "u", contribution("w", 450)
    updates.write_update(path, theta(1), theta(0), contribution=part)
    assert updates.contribution_in(path) == part
    received = UpdateReceived(round=3, worker="w", samples=1, contribution=part)
    assert len(encode_json(received)) < MAX_EVENT_BYTES / 8
    updates.write_update(path, theta(1), theta(0), contribution=contribution("w", 20_000))
    with pytest.raises(DataError, match=f"{MAX_CONTRIBUTION_BYTES} are enough"):
        updates.contribution_in(path)
    updates.write_update(path, theta(1), theta(0))
    with pytest.raises(DataError, match="does not state what it stands for; upgrade"):
        updates.contribution_in(path)
    save_file({"w": torch.zeros(1)}, path, {"contribution": '{"round": "three"}'})
    with pytest.raises(DataError, match="cannot be read"):
        updates.contribution_in(path)
    content = path.read_bytes()
    header = b'{"__metadata__":{"a":"' + b" " * updates.MAX_HEADER_BYTES + b'"}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[-4:])
    with pytest.raises(DataError, match="its header would take"):
        updates.contribution_in(path)


def test_that_a_round_is_applied_can_always_be_reported() -> None:
    names = tuple("12D3KooW" + f"{number}".rjust(44, "x") for number in range(1000))
    found = tuple(
        UpdateStatistics(worker=name, norm=1 / 3, cosine=1 / 3, size_bytes=1 << 40, clip=1 / 3)
        for name in names
    )
    applied = RoundApplied(round=3, theta="t" * 64, contributors=names, updates=found)
    assert len(encode_json(applied)) < MAX_EVENT_BYTES


@pytest.mark.parametrize("encoding", ["none", "bf16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_model_makes_no_update(tmp_path: Path, encoding: updates.Encoding, value: float) -> None:
    local = theta(1)
    local.parameters["b.weight"][3, 3] = value
    with pytest.raises(NotFinite):
        updates.write_update(tmp_path / "u", local, theta(0), encoding)
    assert list(tmp_path.iterdir()) == []


def test_an_update_that_was_not_moved_is_zero_in_every_encoding(tmp_path: Path) -> None:
    for encoding in ("none", "bf16", "int8"):
        updates.write_update(tmp_path / "u", theta(), theta(), encoding)  # type: ignore[arg-type]
        with TensorFile(tmp_path / "u") as file:
            for name, value in theta().parameters.items():
                assert not decoded(UpdateFile(file, theta()), name, value.numel()).any()


def test_int8_without_scales_and_unknown_encodings_are_refused(tmp_path: Path) -> None:
    for metadata, words in (({"encoding": "int8"}, "one scale"), ({"encoding": "zip"}, "unknown")):
        save_file(theta().all(), tmp_path / "u", metadata)
        with TensorFile(tmp_path / "u") as file, pytest.raises(DataError, match=words):
            UpdateFile(file, theta())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.ones(3), persistent=False)


def test_tied_tensors_appear_once_and_stay_tied(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    held = theta_of(model)
    assert set(held.parameters) == {"embedding.weight", "norm.weight", "norm.bias"}
    assert set(held.buffers) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    tensors.write(tmp_path / "t", held.all())
    copy = theta_of(other).copy()
    tensors.read(tmp_path / "t", copy.all())
    theta_of(other).assign(copy)
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other.head.weight, model.head.weight)


def test_a_full_disk_is_no_fault_of_the_model() -> None:
    assert kind_of(OSError(errno.ENOSPC, "No space left on device", "theta")) == "disk"
    assert kind_of(Refused("no-space", "the disk of /somewhere is full")) == "disk"
    assert kind_of(ModelError("no such architecture")) == "model"

"""A checkpoint is read without the model that it is of, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from hypha.errors import CheckpointUnusable
from hypha.executor.files import tensors
from hypha.executor.files.theta import theta_of
from hypha.executor.outer.archive import MOMENTUM, STATE, THETA, CheckpointState, read_checkpoint


class Tied(nn.Module):
    """A parameter under two names, BatchNorm's buffers (one of integers), and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.arange(3), persistent=False)


def saved(directory: Path, **changes: object) -> dict[str, Path]:
    """The files of a checkpoint of round 3 of ``job``."""
    directory.mkdir(exist_ok=True)
    torch.manual_seed(1)
    theta = theta_of(Tied())
    momentum = {name: torch.randn_like(value) for name, value in theta.parameters.items()}
    state = CheckpointState(
        job_id="job",
        generation=0,
        round=3,
        theta=tensors.write(directory / THETA, theta.all()).blake3,
        momentum=tensors.write(directory / MOMENTUM, momentum).blake3,
    )
    state = msgspec.structs.replace(state, **changes)
    (directory / STATE).write_bytes(msgspec.json.encode(state))
    return {name: directory / name for name in (THETA, MOMENTUM, STATE)}


def test_what_was_saved_is_read_and_fits_the_model(tmp_path: Path) -> None:
    files = saved(tmp_path)
    theta, momentum, state = read_checkpoint(files, "job", 3)
    assert state.round == 3
    fresh = Tied()
    place = theta_of(fresh)
    assert theta.parameters.keys() == place.parameters.keys() == momentum.keys()
    assert theta.buffers.keys() == place.buffers.keys()
    assert tensors.difference(theta.specs(), place.specs()) is None
    place.assign(theta)
    assert tensors.write(tmp_path / "again", theta_of(fresh).all()).blake3 == state.theta
    assert fresh.head.weight is fresh.embedding.weight
    # their place on the disk is given back
    assert [path.exists() for path in files.values()] == [False, False, True]


@pytest.mark.parametrize("name", [THETA, MOMENTUM, STATE])
def test_what_is_damaged_or_missing_is_refused_by_name(tmp_path: Path, name: str) -> None:
    files = saved(tmp_path)
    whole = files[name].read_bytes()
    for data in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-3], b""):
        saved(tmp_path)
        files[name].write_bytes(data)
        with pytest.raises(CheckpointUnusable, match=name):
            read_checkpoint(files, "job", 3)
    saved(tmp_path)
    with pytest.raises(CheckpointUnusable, match=f"lacks {name}"):
        read_checkpoint({one: path for one, path in files.items() if one != name}, "job", 3)


def test_another_rounds_or_jobs_checkpoint_is_refused(tmp_path: Path) -> None:
    for job, round_ in (("job", 4), ("other", 3)):
        with pytest.raises(CheckpointUnusable, match="is of round 3 of job job"):
            read_checkpoint(saved(tmp_path), job, round_)


def test_momentum_of_another_model_is_refused(tmp_path: Path) -> None:
    files = saved(tmp_path)
    digest = tensors.write(files[MOMENTUM], {"stranger": torch.zeros(2)}).blake3
    files = saved(tmp_path, momentum=digest)
    tensors.write(files[MOMENTUM], {"stranger": torch.zeros(2)})
    with pytest.raises(CheckpointUnusable, match="stranger"):
        read_checkpoint(files, "job", 3)

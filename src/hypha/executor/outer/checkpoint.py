"""A checkpoint: theta, momentum, and a description that is written last, so that with it the two are whole.

Reading one needs no model: the files say what the tensors look like, the description which bytes they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from hypha.decoding import decode_json
from hypha.errors import CheckpointUnusable, DataError, Undecodable
from hypha.executor.files import tensors
from hypha.executor.files.tensors import TensorFile
from hypha.executor.files.theta import Theta

THETA, MOMENTUM, STATE = "theta.safetensors", "momentum.safetensors", "state.json"


class CheckpointState(msgspec.Struct, frozen=True):
    """``state.json``; ``theta`` and ``momentum`` are the BLAKE3 of the two files."""

    job_id: str
    generation: int
    round: int
    theta: str
    momentum: str
    contributors: tuple[str, ...] = ()
    version: int = 1


def read_checkpoint(
    files: Mapping[str, Path], job_id: str, round_: int
) -> tuple[Theta, dict[str, Tensor], CheckpointState]:
    """Theta, momentum by parameter, and the description, if ``files`` (by name) are the checkpoint of that
    round of that job, and each is what was saved; else :class:`CheckpointUnusable`. Theta and momentum are
    deleted once they were read.
    """
    if missing := {THETA, MOMENTUM, STATE} - files.keys():
        raise CheckpointUnusable(f"the checkpoint lacks {', '.join(sorted(missing))}")
    try:
        state = decode_json(files[STATE].read_bytes(), CheckpointState)
    except Undecodable as exc:
        raise CheckpointUnusable(f"{STATE} of the checkpoint cannot be read: {exc}") from exc
    if (state.job_id, state.round) != (job_id, round_):
        raise CheckpointUnusable(f"the checkpoint is of round {state.round} of job {state.job_id}")
    everything = _read(files[THETA], state.theta)
    # each parameter has a momentum, a buffer has none
    momentum = _read(files[MOMENTUM], state.momentum)
    if strangers := momentum.keys() - everything.keys():
        raise CheckpointUnusable(f"{MOMENTUM} of the checkpoint holds {min(strangers)}, which theta lacks")
    parameters = {name: everything.pop(name) for name in momentum}
    return Theta(parameters, everything), momentum, state


def _read(path: Path, expected: str) -> dict[str, Tensor]:
    try:
        with TensorFile(path) as file:
            into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in file.specs().items()}
        found = tensors.read(path, into).blake3
    except DataError as exc:
        raise CheckpointUnusable(f"{path.name} of the checkpoint cannot be read: {exc}") from exc
    if found != expected:
        raise CheckpointUnusable(f"{path.name} of the checkpoint is not the file that was saved")
    path.unlink()
    return into

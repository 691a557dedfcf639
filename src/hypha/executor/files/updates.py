"""Update files: what a round of training did, as it travels from a worker to the parameter server.

An update has theta's names and shapes. Parameters hold theta_local - theta_r, in fp32 or encoded (``bf16``,
or ``int8`` with one scale a tensor); buffers hold their local values, never encoded. The header holds the
:class:`~hypha.messages.Contribution` that it stands for: the parameter server reads it there and reports it
to the scheduler, and nobody else states it. A replay, which nobody reports, writes files without.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import Tensor

from hypha.decoding import decode_json
from hypha.errors import DataError, NotFinite, Undecodable
from hypha.executor.files.reused import ReusedFiles
from hypha.executor.files.tensors import (
    CHUNK,
    Hasher,
    TensorFile,
    difference,
    one_thread,
    pieces,
    write_pieces,
)
from hypha.executor.files.theta import Theta
from hypha.messages import MAX_CONTRIBUTION_BYTES, Contribution, encode_json

Encoding = Literal["none", "bf16", "int8"]
_ENCODED = {"none": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
_CONTRIBUTION = "contribution"
#: Far more than the header of a model with fifty thousand tensors; read, it takes ten times the memory, and
#: it is the worker's.
MAX_HEADER_BYTES = 16 << 20


@one_thread()
@torch.no_grad()
def write_update(
    path: Path,
    local: Theta,
    base: Theta,
    encoding: Encoding = "none",
    reused: ReusedFiles | None = None,
    contribution: Contribution | None = None,
) -> str:
    """Write the update ``local - base`` to ``path``, leaving both alone, perhaps over one of ``reused``; the
    file says itself what it stands for. Its XXH3 in hex.

    Raises :class:`NotFinite` when the model has diverged; then no file is left.
    """
    metadata: dict[str, str] = {} if encoding == "none" else {"encoding": encoding}
    scales: dict[str, float] = {}
    if encoding == "int8":
        for name in base.parameters:
            peak = max((float(piece.abs().max()) for piece in _differences(local, base, name)), default=0.0)
            scales[name] = peak / 127.0
        metadata["scales"] = msgspec.json.encode(dict(sorted(scales.items()))).decode()
    if contribution is not None:
        metadata[_CONTRIBUTION] = encode_json(contribution).decode()

    squares = 0.0

    def encoded(name: str) -> Iterator[Tensor]:
        nonlocal squares
        if name not in base.parameters:
            yield from pieces(local.buffers[name])
            return
        for piece in _differences(local, base, name):
            squares += float(torch.dot(piece, piece))
            if encoding == "int8":
                scale = scales[name]
                piece = (piece / scale).round_().clamp_(-127, 127) if scale > 0 else torch.zeros_like(piece)
            yield piece.to(_ENCODED[encoding])

    hasher = Hasher(quick=True)
    write_pieces(path, base.specs(_ENCODED[encoding]), encoded, metadata, hasher, reused)
    if not math.isfinite(squares):
        path.unlink()
        raise NotFinite("the local model holds values that are not finite; the learning rate may be too high")
    return hasher.digests().xxh3


def _differences(local: Theta, base: Theta, name: str) -> Iterator[Tensor]:
    """In pieces that are good until the next one."""
    start = base.parameters[name].reshape(-1)
    end = local.parameters[name].to("cpu", torch.float32).reshape(-1)
    buffer = torch.empty(min(start.numel(), CHUNK))
    for at in range(0, start.numel(), CHUNK):
        piece = start[at : at + CHUNK]
        yield torch.sub(end[at : at + CHUNK], piece, out=buffer[: piece.numel()])


def contribution_in(path: Path) -> Contribution:
    """What the update file at ``path`` states that it stands for. Raises :class:`DataError` when it states
    nothing, or more than any update has to, or is no tensor file.
    """
    with TensorFile(path, MAX_HEADER_BYTES) as file:
        text = file.metadata.get(_CONTRIBUTION, "")
    if not text:
        raise DataError("its header does not state what it stands for; upgrade Hypha on its worker")
    if len(text) > MAX_CONTRIBUTION_BYTES:
        raise DataError(
            f"its header takes {len(text)} characters to state what it stands for; "
            f"{MAX_CONTRIBUTION_BYTES} are enough"
        )
    try:
        return decode_json(text, Contribution)
    except Undecodable as exc:
        raise DataError(f"what its header states that it stands for cannot be read: {exc}") from exc


class UpdateFile:
    """An update as the parameter server reads it: checked against theta, decoded to fp32 chunk by chunk."""

    def __init__(self, file: TensorFile, theta: Theta) -> None:
        """Raises :class:`DataError` when names, shapes, dtypes or the encoding's data do not fit."""
        self._file = file
        encoding = file.metadata.get("encoding", "none")
        if encoding not in _ENCODED:
            raise DataError(f"the update encoding {encoding} is unknown")
        self._scales: dict[str, float] = {}
        if encoding == "int8":
            try:
                self._scales = decode_json(file.metadata.get("scales", "{}"), dict[str, float])
            except Undecodable as exc:
                raise DataError(f"the scales of an int8 update cannot be read: {exc}") from exc
            if self._scales.keys() != theta.parameters.keys():
                raise DataError("an int8 update needs one scale for each parameter")
        if problem := difference(file.specs, theta.specs(_ENCODED[encoding])):
            raise DataError(f"the update does not fit the model: {problem}")

    def reader(self) -> ChunkReader:
        """For one thread."""
        return ChunkReader(self._file, self._scales)

    def buffer(self, name: str) -> Tensor:
        spec = self._file.specs[name]
        out = torch.empty(spec.shape, dtype=spec.dtype)
        self._file.read_into(name, out)
        return out


class ChunkReader:
    """Reads decoded chunks of an update, for one thread; each is good until the next one."""

    def __init__(self, file: TensorFile, scales: Mapping[str, float]) -> None:
        self._file = file
        self._scales = scales
        self._buffers: dict[torch.dtype, Tensor] = {}

    def chunk(self, name: str, at: int) -> Tensor:
        """At most ``CHUNK`` elements of the parameter ``name``, from ``at`` on."""
        dtype = self._file.specs[name].dtype
        buffer = self._buffers.get(dtype)
        if buffer is None:
            buffer = self._buffers[dtype] = torch.empty(CHUNK, dtype=dtype)
        piece = self._file.read_chunk(name, at, buffer).to(torch.float32)
        scale = self._scales.get(name)
        return piece if scale is None else piece.mul_(scale)

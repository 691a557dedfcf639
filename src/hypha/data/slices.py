"""Slice files: safetensors whose tensors are columns of equal length. Written durably, described, hashed.

Equal rows give equal bytes, and with them equal BLAKE3 hashes, wherever they are prepared.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file

from hypha.errors import SliceCorrupt
from hypha.files.disks import sync
from hypha.messages import Column

Array = npt.NDArray[Any]

#: dtype of a column -> how numpy holds it (``BF16`` as its bits), and what safetensors calls it on writing
DTYPES = {
    "F64": ("<f8", "float64"),
    "F32": ("<f4", "float32"),
    "F16": ("<f2", "float16"),
    "BF16": ("<u2", "bfloat16"),
    "I64": ("<i8", "int64"),
    "I32": ("<i4", "int32"),
    "I16": ("<i2", "int16"),
    "I8": ("|i1", "int8"),
    "U8": ("|u1", "uint8"),
    "BOOL": ("|b1", "bool"),
}
SUFFIX = ".safetensors"
_HASHED_IN_MEMORY_BYTES = 1 << 20


def record_dtype(columns: tuple[Column, ...]) -> np.dtype[np.void]:
    """One row of ``columns`` as a numpy record."""
    return np.dtype([(column.name, DTYPES[column.dtype][0], column.shape) for column in columns])


@dataclass(frozen=True)
class SliceContent:
    """What a slice file holds: its columns by name, and how many samples."""

    columns: tuple[Column, ...]
    samples: int


def write_slice(path: Path, columns: tuple[Column, ...], rows: Array) -> None:
    """Write ``rows`` (records of ``columns``) to ``path`` and make it durable. OSError when it cannot be."""
    held = {column.name: np.ascontiguousarray(rows[column.name]) for column in columns}
    tensors = {
        column.name: TensorSpec(
            dtype=DTYPES[column.dtype][1],
            shape=held[column.name].shape,
            data_ptr=held[column.name].ctypes.data,
            data_len=held[column.name].nbytes,
        )
        for column in columns
    }
    try:
        serialize_file(tensors, path, metadata=None)
    except SafetensorError as exc:
        raise OSError(f"{path} cannot be written: {exc}") from exc
    path.chmod(mode_in(path.parent))
    sync(path)


def describe_slice(path: Path) -> SliceContent:
    """Read the header of a slice file. Raises SliceCorrupt when it is none, truncated ones included."""
    try:
        with safe_open(path, "np") as file:
            found = []
            lengths = set()
            for name in sorted(file.keys()):
                tensor = file.get_slice(name)
                shape = tuple(tensor.get_shape())
                if not shape:
                    raise SliceCorrupt(
                        f"{path}: column {name!r} is a single value; it needs an axis of samples"
                    )
                lengths.add(shape[0])
                found.append(Column(name=name, dtype=str(tensor.get_dtype()), shape=shape[1:]))
    except (SafetensorError, OSError) as exc:
        raise SliceCorrupt(f"{path} is no whole safetensors file: {exc}") from exc
    if len(lengths) != 1:
        what = "it has no columns" if not lengths else f"its columns have different lengths {sorted(lengths)}"
        raise SliceCorrupt(f"{path} is no slice: {what}")
    return SliceContent(tuple(found), lengths.pop())


def columns_of(path: Path, columns: tuple[Column, ...]) -> Iterator[tuple[Column, Array]]:
    """The values of each of those columns that numpy can hold, one after the other. Raises SliceCorrupt."""
    try:
        with safe_open(path, "np") as file:
            for column in columns:
                if column.dtype in DTYPES and column.dtype != "BF16":
                    yield column, file.get_tensor(column.name)
    except (SafetensorError, OSError) as exc:
        raise SliceCorrupt(f"{path} cannot be read: {exc}") from exc


def hash_file(path: Path) -> str:
    """BLAKE3 of a file, in hex, with all cores. OSError when it cannot be read."""
    if path.stat().st_size <= _HASHED_IN_MEMORY_BYTES:
        return blake3.blake3(path.read_bytes()).hexdigest()
    return blake3.blake3(max_threads=blake3.blake3.AUTO).update_mmap(path).hexdigest()


def mode_in(directory: Path) -> int:
    """That of files in ``directory`` which whoever may read it reads, too: the node that serves a dataset
    often runs as another user than who prepared it, and safetensors makes files that only their owner reads.
    """
    return stat.S_IMODE(directory.stat().st_mode) & 0o666

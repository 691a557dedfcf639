"""NumPy files as a source: each ``.npy`` is a column called like the file, each array in a ``.npz`` one
called like the array; several ``.npz`` with the same arrays are parts of one dataset.
"""

from __future__ import annotations

import contextlib
import functools
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from hypha.data.columns import Block, listed, needed, rows_a_block, rows_from
from hypha.data.options import PrepareOptions
from hypha.data.slices import Array
from hypha.errors import InputUnusable

#: reads rows of a column: from which one on, which is the next one of a stream, and how many
ReadRows = Callable[[int, int], Array]


@dataclass(frozen=True)
class _Column:
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    read: ReadRows

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class ArraySource:
    def __init__(self, files: list[Path], options: PrepareOptions) -> None:
        suffixes = {path.suffix.lower() for path in files}
        if len(suffixes) > 1:
            raise InputUnusable(
                f"{listed(map(str, files))}: .npy and .npz files cannot be mixed in one dataset"
            )
        self.labels: Mapping[str, tuple[str, ...]] = {}
        self.notes: list[str] = []
        self._files = files
        self._options = options
        self._archives = suffixes == {".npz"}
        if not self._archives and len({path.stem for path in files}) < len(files):
            raise InputUnusable(
                f"{listed(map(str, files))}: two files would give columns of one name; rename a file"
            )

    def blocks(self) -> Iterator[Block]:
        if not self._archives:
            where = str(self._files[0]) if len(self._files) == 1 else str(self._files[0].parent)
            with contextlib.ExitStack() as stack:
                yield from self._read(where, {path.stem: _open_npy(path, stack) for path in self._files})
            return
        names: set[str] = set()
        for path in self._files:
            with contextlib.ExitStack() as stack:
                columns = _open_npz(path, stack)
                names = names or set(columns)
                if set(columns) != names:
                    raise InputUnusable(
                        f"{path} has the arrays {listed(sorted(columns))}, {self._files[0]} has "
                        f"{listed(sorted(names))}; all parts must have the same"
                    )
                yield from self._read(str(path), columns)

    def _read(self, where: str, columns: dict[str, _Column]) -> Iterator[Block]:
        columns = {name: columns[name] for name in needed(columns, self._options)}
        lengths = {name: column.shape[0] for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise InputUnusable(
                f"{where}: columns differ in their number of rows ({told}); they must be equally long"
            )
        total = next(iter(lengths.values()))
        step = rows_a_block(sum(column.row_bytes for column in columns.values()))
        for start in range(0, total, step):
            count = min(step, total - start)
            try:
                rows = {name: column.read(start, count) for name, column in columns.items()}
            except (OSError, ValueError, EOFError, zipfile.BadZipFile) as exc:
                raise InputUnusable(f"{where}, row {start + 1}: cannot be read: {exc}") from exc
            yield Block(rows_from(where, start), rows)


def _open_npy(path: Path, stack: contextlib.ExitStack) -> _Column:
    try:
        return _open_array(str(path), stack.enter_context(path.open("rb")), lambda: np.load(path, "r"))
    except (OSError, ValueError, EOFError) as exc:
        raise InputUnusable(f"{path} is no .npy file of numbers: {exc}") from exc


def _open_npz(path: Path, stack: contextlib.ExitStack) -> dict[str, _Column]:
    def load(name: str) -> Array:
        with np.load(path) as archive:
            array: Array = archive[name]
        return array

    columns = {}
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            file = stack.enter_context(archive.open(member))
            columns[name] = _open_array(f"{path}, array {name!r}", file, functools.partial(load, name))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as exc:
        raise InputUnusable(f"{path} is no .npz file of numbers: {exc}") from exc
    if not columns:
        raise InputUnusable(f"{path} holds no arrays")
    return columns


def _open_array(where: str, file: IO[bytes], load: Callable[[], Array]) -> _Column:
    """A column that is read from ``file`` row by row, or ``load``ed where that does not work."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise InputUnusable(f"{where} has the format version {version}; save it again as an array of numbers")
    if dtype.kind not in "fiub":
        raise InputUnusable(f"{where} holds {dtype}; only arrays of numbers or booleans can be columns")
    if not shape or 0 in shape:
        raise InputUnusable(
            f"{where} has the shape {list(shape)}; the first axis is that of samples, none may be 0"
        )
    if fortran and len(shape) > 1:
        # the rows of column-major data are all over the file
        array = load()
        return _Column(dtype, shape, lambda start, count: array[start : start + count])
    return _Column(dtype, shape, lambda _, count: _read_rows(file, count, dtype, shape[1:]))


def _read_rows(file: IO[bytes], count: int, dtype: np.dtype[np.generic], row_shape: tuple[int, ...]) -> Array:
    wanted = count * math.prod(row_shape) * dtype.itemsize
    data = file.read(wanted)
    if len(data) < wanted:
        raise EOFError("the file ends before its last row")
    return np.frombuffer(data, dtype=dtype).reshape(count, *row_shape)

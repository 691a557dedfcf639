"""From a stream of rows to slice files, in bounded memory: split off a holdout, shuffle, cut into slices.

Rows are numpy records. Each stage takes blocks by ``write`` and passes on what it has; ``close`` ends the
stream. The result depends on the rows, their order and the seed alone, never on how they came in blocks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from hypha.data.manifest import write_manifest
from hypha.data.slices import SUFFIX, Array, Ranges, hash_file, record_dtype, write_slice
from hypha.errors import InputUnusable
from hypha.messages import Column, Manifest, SliceInfo

#: The holdout is drawn from each block of so many rows: of a sorted source it takes evenly.
HOLDOUT_BLOCK = 128
#: The shuffle holds this much in memory; more goes through files.
SHUFFLE_BYTES = 256 << 20
#: into so many files (each open at once), and again where one of them is still too large
SHUFFLE_FILES = 64

#: in the number of a slice, at least
DIGITS = 4


class Stage(Protocol):
    """Takes rows."""

    def write(self, rows: Array) -> None:
        """Take a block of rows; the caller does not change it afterwards."""

    def close(self) -> None:
        """No more rows come."""


def generator(seed: int, purpose: int) -> np.random.Generator:
    """Random numbers of their own for each purpose."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([abs(seed), int(seed < 0), purpose])))


class Holdout:
    """Sends ``fraction`` of the rows to ``holdout``, exactly but for rounding, the others to ``train``."""

    def __init__(self, train: Stage, holdout: Stage, fraction: float, seed: int) -> None:
        self._train = train
        self._holdout = holdout
        self._fraction = fraction
        self._random = generator(seed, 1)
        self._held: list[Array] = []
        self._count = 0
        self._done = 0

    def write(self, rows: Array) -> None:
        self._held.append(rows)
        self._count += len(rows)
        if self._count < HOLDOUT_BLOCK:
            return
        rows = np.concatenate(self._held) if len(self._held) > 1 else self._held[0]
        whole = len(rows) // HOLDOUT_BLOCK * HOLDOUT_BLOCK
        for start in range(0, whole, HOLDOUT_BLOCK):
            self._split(rows[start : start + HOLDOUT_BLOCK])
        self._held = [rows[whole:]]
        self._count = len(rows) - whole

    def close(self) -> None:
        if self._count:
            self._split(np.concatenate(self._held))
        self._train.close()
        self._holdout.close()

    def _split(self, rows: Array) -> None:
        share = round((self._done + len(rows)) * self._fraction) - round(self._done * self._fraction)
        self._done += len(rows)
        chosen = np.zeros(len(rows), dtype=bool)
        chosen[self._random.permutation(len(rows))[:share]] = True
        if share:
            self._holdout.write(rows[chosen])
        if share < len(rows):
            self._train.write(rows[~chosen])


class Shuffle:
    """Passes rows on in a random order, when all have come.

    What does not fit into memory is dealt out at random to files, which are then shuffled one by one:
    every order is equally likely (Rao 1961, Sandelius 1962).
    """

    def __init__(self, following: Stage, directory: Path, seed: int) -> None:
        self._next = following
        self._directory = directory
        self._random = generator(seed, 2)
        self._held: list[Array] = []
        self._held_bytes = 0
        self._files: _Deal | None = None

    def write(self, rows: Array) -> None:
        if self._files is not None:
            self._files.deal(rows)
            return
        self._held.append(rows)
        self._held_bytes += rows.nbytes
        if self._held_bytes > SHUFFLE_BYTES:
            self._files = _Deal(self._directory / "shuffle", self._random, rows.dtype)
            for held in self._held:
                self._files.deal(held)
            self._held = []

    def close(self) -> None:
        if self._files is not None:
            self._drain(self._files)
        elif self._held:
            self._pass_on(np.concatenate(self._held))
        self._next.close()

    def _drain(self, files: _Deal) -> None:
        for path in files.close():
            if path.stat().st_size <= max(SHUFFLE_BYTES, files.dtype.itemsize):
                self._pass_on(np.fromfile(path, dtype=files.dtype))
            else:
                deeper = _Deal(path.with_suffix(".parts"), self._random, files.dtype)
                for rows in files.read(path):
                    deeper.deal(rows)
                path.unlink()
                self._drain(deeper)
            path.unlink(missing_ok=True)
        files.directory.rmdir()

    def _pass_on(self, rows: Array) -> None:
        order = self._random.permutation(len(rows))
        step = max(1, SHUFFLE_BYTES // 8 // rows.dtype.itemsize)
        for start in range(0, len(rows), step):
            self._next.write(rows[order[start : start + step]])


class _Deal:
    def __init__(self, directory: Path, random: np.random.Generator, dtype: np.dtype[np.generic]) -> None:
        directory.mkdir()
        self.directory = directory
        self.dtype = dtype
        self._random = random
        self._open = contextlib.ExitStack()
        self._paths = [directory / f"{number:02}.rows" for number in range(SHUFFLE_FILES)]
        self._files = [self._open.enter_context(path.open("wb")) for path in self._paths]

    def deal(self, rows: Array) -> None:
        where = self._random.integers(SHUFFLE_FILES, size=len(rows))
        order = np.argsort(where, kind="stable")
        ends = np.searchsorted(where[order], np.arange(SHUFFLE_FILES + 1))
        for number, file in enumerate(self._files):
            if len(chosen := order[ends[number] : ends[number + 1]]):
                file.write(rows[chosen].tobytes())

    def close(self) -> list[Path]:
        self._open.close()
        return self._paths

    def read(self, path: Path) -> Iterator[Array]:
        step = max(1, SHUFFLE_BYTES // 8 // self.dtype.itemsize)
        with path.open("rb") as file:
            while len(rows := np.fromfile(file, dtype=self.dtype, count=step)):
                yield rows


@dataclass
class SliceWriter:
    """Cuts rows into slices of ``slice_samples`` in ``directory``, and ends with the manifest.

    ``empty`` is the error when no row came.
    """

    directory: Path
    name: str
    columns: tuple[Column, ...]
    slice_samples: int
    empty: str
    #: there after :meth:`close`
    manifest: Manifest = field(init=False)
    _held: list[Array] = field(default_factory=list)
    _count: int = 0
    _slices: list[SliceInfo] = field(default_factory=list)
    _ranges: Ranges = field(default_factory=Ranges)

    def write(self, rows: Array) -> None:
        for column in self.columns:
            self._ranges.see(column, rows[column.name])
        while self._count + len(rows) >= self.slice_samples:
            missing = self.slice_samples - self._count
            self._held.append(rows[:missing])
            self._cut()
            rows = rows[missing:]
        if len(rows):
            self._held.append(rows)
            self._count += len(rows)

    def close(self) -> None:
        """Write the last slice and the manifest. Raises InputUnusable when there was no row at all."""
        if self._held:
            self._cut()
        if not self._slices:
            raise InputUnusable(self.empty)
        self._renumber()
        self.manifest = Manifest(
            name=self.name,
            columns=self.columns,
            slices=tuple(self._slices),
            ranges=self._ranges.of(self.columns),
        )
        write_manifest(self.directory, self.manifest)

    def _cut(self) -> None:
        rows = np.concatenate(self._held)
        self._held, self._count = [], 0
        path = self.directory / f"slice-{len(self._slices):0{DIGITS}}{SUFFIX}"
        write_slice(path, self.columns, rows)
        self._slices.append(
            SliceInfo(file=path.name, samples=len(rows), size=path.stat().st_size, blake3=hash_file(path))
        )

    def _renumber(self) -> None:
        """With very many slices, as many digits as it takes, so that names sort as slices do."""
        width = len(str(len(self._slices) - 1))
        if width <= DIGITS:
            return
        for number, part in enumerate(self._slices):
            name = f"slice-{number:0{width}}{SUFFIX}"
            (self.directory / part.file).rename(self.directory / name)
            self._slices[number] = msgspec.structs.replace(part, file=name)


def samples_for(columns: tuple[Column, ...], slice_bytes: float) -> int:
    """How many rows of ``columns`` make a slice of about that size, at least one."""
    row_bytes = max(1, record_dtype(columns).itemsize)
    return max(1, math.floor(slice_bytes / row_bytes))

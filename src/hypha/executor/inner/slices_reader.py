"""The stream of samples: assigned slices, each in its own order, cut into batches that may span slices.

The order of a slice's rows depends on the job's seed, the epoch and the slice alone, so that a ledger of
ranges says exactly which samples a round saw, and in which order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hypha.errors import DataError, SliceCorrupt
from hypha.executor.bridge.client import BridgeClient
from hypha.executor.models.preprocessing import Padding, Preprocessor, joined
from hypha.executor.threads import ThreadCondition
from hypha.messages import SchedulerData, SliceRange, TrainJob

_WORD = (1 << 64) - 1


def slice_order(seed: int, epoch: int, index: int, samples: int, shuffle: bool = True) -> Tensor:
    """The rows of a slice in the order in which they are trained on."""
    if not shuffle:
        return torch.arange(samples)
    key = np.array([seed & _WORD, (epoch << 32 | index) & _WORD], dtype=np.uint64)
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).permutation(samples))


@dataclass(frozen=True)
class Slice:
    """A slice in memory; ``order`` are its rows as they are to be taken, ``asked`` the generation of the job,
    the round and the attempt at it under which it was asked for.
    """

    epoch: int
    index: int
    columns: dict[str, Tensor]
    order: Tensor
    asked: tuple[int, int, int] = (0, 0, 0)

    def rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Positions ``start:stop`` of the order."""
        chosen = self.order[start:stop]
        return {name: column[chosen] for name, column in self.columns.items()}


def read_columns(path: Path) -> dict[str, Tensor]:
    """The columns of a slice file. Raises :class:`SliceCorrupt`."""
    try:
        columns: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError, ValueError) as exc:
        raise SliceCorrupt(f"the slice {path.name} cannot be read: {exc}") from exc
    lengths = {len(column) if column.dim() else None for column in columns.values()}
    if len(lengths) != 1 or None in lengths:
        raise SliceCorrupt(f"the columns of the slice {path.name} differ in length")
    return columns


class RowStream:
    """Cuts batches from slices, and counts for the round: ranges used, slices finished."""

    def __init__(self, padding: Padding | None = None) -> None:
        """``padding``: of rows that are sequences of different lengths."""
        self._padding = padding or Padding()
        self._slices: deque[Slice] = deque()
        self._at = 0
        self.start_round()

    def start_round(self) -> None:
        """Count anew; rows not yet used stay."""
        self.ranges: list[SliceRange] = []
        self.finished: list[tuple[int, int]] = []

    def drop_before(self, asked: tuple[int, int, int]) -> None:
        """Forget the slices asked for earlier: somebody else has them now. What was used of the others is to
        be used again.
        """
        self._slices = deque(part for part in self._slices if part.asked >= asked)
        self._at = 0

    def push(self, part: Slice) -> None:
        if len(part.order):
            self._slices.append(part)

    @property
    def rows(self) -> int:
        """How many are here."""
        return sum(len(part.order) for part in self._slices) - self._at

    def take(self, count: int) -> dict[str, Tensor] | None:
        """The next ``count`` rows, or None while there are fewer."""
        if self.rows < count:
            return None
        pieces: list[dict[str, Tensor]] = []
        while count:
            part = self._slices[0]
            stop = min(self._at + count, len(part.order))
            pieces.append(part.rows(self._at, stop))
            self._note(part, stop)
            count -= stop - self._at
            self._at = stop
            if stop == len(part.order):
                self.finished.append((part.epoch, part.index))
                self._slices.popleft()
                self._at = 0
        return joined(pieces, self._padding)

    def _note(self, part: Slice, stop: int) -> None:
        start = self._at
        if self.ranges:
            last = self.ranges[-1]
            if (last.epoch, last.slice, last.stop) == (part.epoch, part.index, start):
                start = self.ranges.pop().start
        self.ranges.append(SliceRange(epoch=part.epoch, slice=part.index, start=start, stop=stop))


class SliceReadAhead:
    """Keeps the next slice ready in memory, fetched and preprocessed, while another is trained on.

    It fetches only when nothing is ready, so a slow worker never hoards slices. ``changed`` guards what it
    has, and announces it. ``fetching``: the worker has been asked for one, and has not answered yet.
    """

    def __init__(
        self, bridge: BridgeClient, job: TrainJob, preprocess: Preprocessor | None, changed: ThreadCondition
    ) -> None:
        self._bridge = bridge
        self._job = job
        self._preprocess = preprocess
        self._changed = changed
        self._ready: Slice | None = None
        self._failure: Exception | None = None
        self._dropped_before = (0, 0, 0)
        self.fetching = False

    def start(self) -> None:
        self._bridge.threads.start("slices", self._run, self._failed)

    async def _run(self) -> None:
        while True:
            part = await self.fetch()
            with self._changed:
                if part.asked < self._dropped_before:
                    continue
                self._ready = part
                self._changed.notify_all()
                await self._changed.wait_for(self.wanted)

    def _failed(self, exc: Exception) -> None:
        """Handed to whoever takes next."""
        with self._changed:
            self._failure = exc
            self._changed.notify_all()

    def wanted(self) -> bool:
        """Is another one to be fetched?"""
        return self._ready is None

    async def fetch(self) -> Slice:
        """The next one, read and preprocessed. Raises :class:`DataError`."""
        dataset = SchedulerData(peer=self._job.scheduler.peer, dataset=self._job.dataset)
        self.fetching = True
        path, file = (await self._bridge.fetch(dataset))[0]
        self.fetching = False
        assigned = file.slice
        if assigned is None:
            raise DataError(f"the worker did not say which slice {path.name} is")
        columns = read_columns(path)
        samples = len(next(iter(columns.values())))
        if samples != assigned.samples:
            raise DataError(f"slice {assigned.index} has {samples} rows, not the {assigned.samples} promised")
        if self._preprocess is not None:
            columns = self._preprocess(columns)
        # the rows are mapped or in memory: the name is not needed any more, and disks are to stay flat
        path.unlink(missing_ok=True)
        order = slice_order(self._job.seed, assigned.epoch, assigned.index, samples, self._job.shuffle)
        return Slice(
            assigned.epoch, assigned.index, columns, order, (file.generation, file.round, file.attempt)
        )

    @property
    def ready(self) -> bool:
        """Has :meth:`take` something to give, or to raise?"""
        return self._ready is not None or self._failure is not None

    def take(self) -> Slice | None:
        """The ready slice, or None. Raises what fetching raised."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            part, self._ready = self._ready, None
            self._changed.notify_all()
            return part

    def drop_before(self, asked: tuple[int, int, int]) -> None:
        """Forget the slices asked for earlier, the one that is being fetched included."""
        with self._changed:
            self._dropped_before = asked
            if self._ready is not None and self._ready.asked < asked:
                self._ready = None
                self._changed.notify_all()

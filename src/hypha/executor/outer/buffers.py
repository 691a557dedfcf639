"""Buffers of a model in the outer step: BatchNorm's statistics, counters, what a model keeps beside its
parameters. They take no momentum: floating and complex ones become the weighted mean of the workers' values,
integer and boolean ones their maximum. What no worker has changed stays as it is, infinite or NaN though it
may be.

As with updates (:mod:`hypha.executor.outer.admission`) a huge change is scaled down, not believed: what one
worker states must not move a buffer further than the others' do. Each buffer is judged by itself when the
round is closed, as all that it is compared with is known then: the median of the round's changes where there
are three or more, else that of the last rounds. A change of more than ``max_update_ratio`` times that counts
as one of its size; so what most leave alone stays. Flags and counters may be moved by one worker alone, a
counter as far as the rows that it has trained on: the maximum is for those. Until the end of the round the
values wait in a file, so that memory does not grow with the number of workers. By how much each was scaled is
in the ledger (``UpdateStatistics.buffer_clips``), and a replay does the same.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hypha.errors import DataError
from hypha.executor.files import tensors
from hypha.executor.files.theta import Theta
from hypha.executor.files.updates import UpdateFile
from hypha.executor.models.model_tensors import unchanged
from hypha.executor.outer.admission import ROUNDS
from hypha.executor.outer.agreement import JudgedUpdate

logger = logging.getLogger("hypha.executor.parameter_server")

#: of so many updates the round itself says what is usual: most of them are right
_ENOUGH = 3


@dataclass(frozen=True)
class _Part:
    """Of one update: how far it moves each buffer, and its values, in the file at ``path``."""

    update: JudgedUpdate
    moved: dict[str, float]
    path: Path


class BufferSum:
    """The buffers of a round's updates. ``ratio``: how many times the usual change one may have; None: all
    are believed.
    """

    def __init__(self, theta: Theta, ratio: float | None) -> None:
        self._buffers = theta.buffers
        self._ratio = ratio
        self._parts: list[_Part] = []
        #: changes of the last rounds, by buffer
        self._rounds: dict[str, deque[tuple[float, ...]]] = {
            name: deque(maxlen=ROUNDS) for name in theta.buffers
        }

    def read(self, update: UpdateFile) -> dict[str, Tensor]:
        """The buffers of ``update``. Raises :class:`DataError` where training has made them infinite or NaN,
        or their file ends too early.
        """
        found = {name: update.buffer(name) for name in self._buffers}
        for name, value in found.items():
            # a constant may be what it is, such as a mask of -inf
            if not (torch.isfinite(value) | unchanged(value, self._buffers[name])).all():
                raise DataError(f"the buffer {name} holds values that are not finite")
        return found

    def add(self, update: JudgedUpdate, values: dict[str, Tensor]) -> None:
        """Keep the ``values`` of an update beside its file until the round is closed."""
        if not values:
            return
        # the next update may have a file of the same name
        beside = update.path.with_name(f"{update.path.name}.{len(self._parts)}.buffers")
        tensors.write(beside, values)
        moved = {name: _change(value, self._buffers[name]) for name, value in values.items()}
        self._parts.append(_Part(update, moved, beside))

    def apply(self, total_weight: float) -> dict[str, dict[str, float]]:
        """Set the buffers to the round's; what was scaled, by worker and buffer. A new round begins."""
        parts, self._parts = self._parts, []
        sums: dict[str, Tensor] = {}
        #: elements that no update so far has changed
        constant: dict[str, Tensor] = {}
        scaled: dict[str, dict[str, float]] = {}
        for part in parts:
            clips = self._judged(part, parts)
            if clips:
                scaled[part.update.worker] = clips
            for name, kept in self._kept(part).items():
                base = self._buffers[name]
                value = _scaled(kept, base, clips.get(name, 1.0))
                same = unchanged(value, base)
                averaged = _is_averaged(value.dtype)
                if averaged:
                    # a sum of halves would overflow
                    value = value.to(torch.promote_types(value.dtype, torch.float32)) * part.update.weight
                if name not in sums:
                    sums[name], constant[name] = value, same
                    continue
                sums[name] = sums[name].add_(value) if averaged else _maximum(sums[name], value)
                constant[name] &= same
        for name, buffer in self._buffers.items() if parts else ():
            new = sums[name]
            new = (new / total_weight).to(buffer.dtype) if _is_averaged(buffer.dtype) else new
            # what nobody has changed stays bit by bit what it is: infinities too, which make NaN of a sum
            buffer.copy_(torch.where(constant[name], buffer, new))
            self._rounds[name].append(tuple(part.moved[name] for part in parts))
        return scaled

    def _kept(self, part: _Part) -> dict[str, Tensor]:
        values = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in self._buffers.items()}
        tensors.read(part.path, values, quick=True)
        part.path.unlink()
        return values

    def _judged(self, part: _Part, parts: list[_Part]) -> dict[str, float]:
        if part.update.recorded is not None:
            # an entry of an earlier version says nothing of them: they were believed
            return part.update.recorded.buffer_clips or {}
        if self._ratio is None:
            return {}
        found = {}
        for name, moved in part.moved.items():
            usual = self._usual(name, [one.moved[name] for one in parts])
            dtype = self._buffers[name].dtype
            if dtype == torch.bool:
                continue
            if not _is_averaged(dtype):
                usual = max(usual, float(part.update.samples))
            if moved > self._ratio * usual:
                found[name] = usual / moved
        if found:
            name = min(found, key=lambda one: found[one])
            logger.warning(
                "The update of %s moves %d buffers further than is usual, %s by %g: they count with %.3g of "
                "that at least",
                part.update.worker,
                len(found),
                name,
                part.moved[name],
                found[name],
            )
        return found

    def _usual(self, name: str, now: list[float]) -> float:
        before = [moved for moves in self._rounds[name] for moved in moves if moved > 0.0]
        known = now if len(now) >= _ENOUGH or not before else before
        return statistics.median_low(known)


def _change(value: Tensor, base: Tensor) -> float:
    """The L2 norm of what changed; infinite where something that was not finite is now."""
    wide = torch.complex128 if value.is_complex() else torch.float64
    moved = (value.to(wide) - base.to(wide)).abs().masked_fill_(unchanged(value, base), 0.0)
    return float(torch.nan_to_num(moved, nan=math.inf, posinf=math.inf).square().sum().sqrt())


def _scaled(value: Tensor, base: Tensor, clip: float) -> Tensor:
    """``value`` moved only so far from ``base``; a counter in whole steps, towards where it was."""
    if clip >= 1.0:
        return value
    if clip <= 0.0:
        return base.clone()
    if _is_averaged(value.dtype):
        wide = torch.complex128 if value.is_complex() else torch.float64
        moved = base.to(wide) + (value.to(wide) - base.to(wide)) * clip
        return torch.where(unchanged(value, base), base, moved.to(value.dtype))
    # torch cannot compute with all unsigned integers
    one, other = base.numpy(), value.numpy()
    steps = np.trunc((other.astype(np.float64) - one.astype(np.float64)) * clip)
    return torch.from_numpy(np.asarray((one.astype(np.float64) + steps).astype(one.dtype)))


def _is_averaged(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _maximum(one: Tensor, other: Tensor) -> Tensor:
    # torch cannot compare all unsigned integers
    return torch.from_numpy(np.asarray(np.maximum(one.numpy(), other.numpy())))

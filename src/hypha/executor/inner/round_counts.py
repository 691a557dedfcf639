"""What a training executor has done of one round."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hypha.errors import NotFinite
from hypha.executor.bridge.client import PROGRESS_INTERVAL_S

#: Reports become rarer as a round goes on, since what they say of its rest stays as accurate: a tenth of its
#: time so far lies between two. Each takes time of the trainer's, of its device's and the scheduler's.
_SHARE = 0.1
#: The scheduler believes for a second that a worker goes on at its pace.
_LONGEST_INTERVAL_S = 0.5


class Losses:
    """Losses of a round that began at ``now`` (seconds of a monotonic clock, as in all its methods). They
    stay on their device until somebody wants to know.
    """

    def __init__(self, now: float) -> None:
        self._fresh: list[Tensor] = []
        self._sum = 0.0
        self._count = 0
        self._began_at = now
        self._told_at = -math.inf

    @property
    def waiting(self) -> bool:
        """Are there any that were not told yet?"""
        return bool(self._fresh)

    def add(self, loss: Tensor) -> None:
        """The loss of a batch: a scalar, on any device."""
        self._fresh.append(loss)

    def due(self, now: float) -> bool:
        """Is it time to tell?"""
        interval_s = _SHARE * (now - self._began_at)
        return now - self._told_at >= min(max(interval_s, PROGRESS_INTERVAL_S), _LONGEST_INTERVAL_S)

    def latest(self, now: float) -> float:
        """The mean of those since the last call; there must be some. Raises :class:`NotFinite`."""
        count = len(self._fresh)
        total = float(torch.stack(self._fresh).double().sum())
        self._fresh.clear()
        self._told_at = now
        if not math.isfinite(total):
            raise NotFinite("the loss is not finite; the learning rate may be too high, or a sample broken")
        self._sum += total
        self._count += count
        return total / count

    def mean(self) -> float:
        """Of all that were told; 0 when none was."""
        return self._sum / max(1, self._count)


class RoundCounts:
    """Batches of ``rows`` samples each, of a round that began at ``now`` (seconds of a monotonic clock) with
    ``steps`` inner steps taken before.
    """

    def __init__(self, rows: int, steps: int, now: float) -> None:
        self.rows = rows
        self.first_steps = steps
        self.batches = self.samples = 0
        self.busy_s = 0.0
        self.losses = Losses(now)

    def add(self, loss: Tensor, samples: int) -> None:
        self.losses.add(loss)
        self.batches += 1
        self.samples += samples

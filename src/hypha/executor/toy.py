"""A model of eight numbers, for simulated worlds: trained without transformers, accelerate or a process, but
by the real streams of rows, update files and outer step, so that its ledger can be replayed bit by bit.

The "network" is one vector ``w`` that is pulled towards targets made from each row's number; its buffer
counts rows. The inner optimizer is gradient descent with momentum, and its rate falls with the step: theta is
wrong at once when steps, rows or an optimizer's life are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hypha.executor.files import tensors
from hypha.executor.files.tensors import Digests
from hypha.executor.files.theta import Theta

SIZE = 8
#: the dataset's only column: the number of each row
COLUMN = "row"
_RATE, _MOMENTUM, _DECAY = 0.1, 0.5, 0.01


def toy_theta(seed: int = 0) -> Theta:
    """Theta of round 0."""
    generator = torch.Generator().manual_seed(seed)
    return Theta({"w": torch.randn(SIZE, generator=generator)}, {"rows": torch.zeros(1)})


def one_thread_only() -> None:
    """So small a model is not worth another thread."""
    torch.set_num_threads(1)


class ToyInner:
    """One life of an inner optimizer on ``local``, at ``steps``."""

    def __init__(self, local: Theta, steps: int) -> None:
        self._w = local.parameters["w"]
        self._rows = local.buffers["rows"]
        self._velocity = torch.zeros(SIZE)
        self.steps = steps

    def batch(self, columns: Mapping[str, Tensor]) -> Tensor:
        """One step; the loss before it."""
        rows = columns[COLUMN].to(torch.float32)
        targets = torch.sin(rows[:, None] * torch.arange(1, SIZE + 1))
        gradient = (self._w - targets).mean(0)
        loss = (gradient * gradient).sum()
        self._velocity.mul_(_MOMENTUM).add_(gradient)
        self._w.sub_(self._velocity, alpha=_RATE / (1.0 + _DECAY * self.steps))
        self._rows.add_(len(rows))
        self.steps += 1
        return loss


class ToyModel:
    """Of a :class:`~hypha.executor.inner.local_model.LocalModel` what simulated trainers and replays use."""

    learning_rate = 0.0
    fits = True
    config = None

    def __init__(self, steps: int) -> None:
        self.base = toy_theta()
        self.local = self.base.copy()
        self.start_over(steps)

    @property
    def steps(self) -> int:
        return self.inner.steps

    def start_over(self, steps: int) -> None:
        self.inner = ToyInner(self.local, steps)

    def load(self, path: Path) -> Digests:
        return tensors.read(path, self.base.all(), self.local.all(), quick=True)

    def start_round(self, round: int) -> None:
        """Nothing in it is random."""

    def batch(self, columns: dict[str, Tensor]) -> Tensor:
        return self.inner.batch(columns)

    def flush(self) -> None:
        """It takes a step with each batch."""

    def theta(self) -> Theta:
        return self.local

    def end(self) -> None:
        """Nothing more is to be done."""

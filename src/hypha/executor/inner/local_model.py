"""The model that an executor trains: theta comes in, batches are trained on, the local model goes out.

In an executor of one process it is a :class:`LocalModel`; what that is over several processes is in
:mod:`hypha.executor.inner.spread_model`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hypha.errors import HyphaError, ModelError
from hypha.executor.files import tensors
from hypha.executor.files.tensors import Digests
from hypha.executor.files.theta import Theta
from hypha.executor.inner.device_memory import cap_memory
from hypha.executor.inner.loop import Inner, accelerator_for, is_of_machine, round_seed
from hypha.executor.models import loading as models
from hypha.executor.models.forward import Forward
from hypha.executor.models.model_tensors import ModelTensors
from hypha.messages import TrainJob


class TrainedModel(Protocol):
    """What a trainer trains."""

    #: the model's own configuration, where it has one
    config: Any
    #: theta of the open round, on the CPU
    base: Theta

    @property
    def steps(self) -> int:
        """Inner steps so far, those of earlier generations included."""

    @property
    def learning_rate(self) -> float:
        """That of the next step."""

    def load(self, path: Path) -> Digests:
        """Set base and the local model to theta in that file; the file's hashes, without BLAKE3."""

    def start_round(self, round: int) -> None:
        """Seed torch for it."""

    def start_over(self, steps: int) -> None:
        """With a fresh optimizer, at so many steps."""

    def batch(self, columns: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`hypha.executor.inner.loop.Inner.batch`."""

    def flush(self) -> None:
        """See :meth:`hypha.executor.inner.loop.Inner.flush`."""

    @property
    def fits(self) -> bool:
        """Was no batch cut for want of memory lately?"""

    def theta(self) -> Theta:
        """The local model as it is now. Raises :class:`ModelError` when ``forward`` has made another one."""

    def end(self) -> None:
        """Nothing more is to be done."""


class LocalModel:
    """All of it in this process."""

    def __init__(self, job: TrainJob, source: Path | None) -> None:
        """Raises :class:`ModelError` where any other worker would say the same."""
        # theta comes from the parameter server, so that a fresh head is the same everywhere
        model = models.build(job.model, source, weights=False)
        self.config = getattr(model, "config", None)
        self._job = job
        self._accelerator = accelerator_for(job)
        cap_memory(self._accelerator.device)
        with making_ready():
            self._forward = Forward(model, job.model)
            self._model = self._accelerator.prepare(model)
            self._tensors = ModelTensors(self._accelerator.unwrap_model(self._model))
            self.base = self._tensors.theta().copy()
            self._inner = Inner(self._model, self._forward, job, self._accelerator, job.steps)

    @property
    def steps(self) -> int:
        """See :class:`TrainedModel`, as of all that follows."""
        return self._inner.steps

    @property
    def learning_rate(self) -> float:
        return self._inner.learning_rate

    def load(self, path: Path) -> Digests:
        return tensors.read(path, self.base.all(), self._tensors.theta().all(), quick=True)

    def start_round(self, round: int) -> None:
        torch.manual_seed(round_seed(self._job.seed, self._job.me, round))

    def start_over(self, steps: int) -> None:
        rows = self._inner.rows
        self._inner = Inner(self._model, self._forward, self._job, self._accelerator, steps)
        self._inner.rows = rows

    def batch(self, columns: Mapping[str, Tensor]) -> Tensor:
        return self._inner.batch(columns)

    def flush(self) -> None:
        self._inner.flush()

    @property
    def fits(self) -> bool:
        return not self._inner.rows.limited

    def theta(self) -> Theta:
        return self._tensors.theta()

    def end(self) -> None:
        pass


@contextmanager
def making_ready() -> Iterator[None]:
    """What goes wrong with a model is a :class:`ModelError`, but for what another machine might not say."""
    try:
        yield
    except Exception as exc:
        if isinstance(exc, HyphaError) or is_of_machine(exc):
            raise
        # any other worker would say the same
        raise ModelError(f"the model cannot be made ready for training: {type(exc).__name__}: {exc}") from exc

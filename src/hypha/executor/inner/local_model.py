"""The model that an executor trains: theta comes in, batches are trained on, the local model goes out.

What that is over several processes is in :mod:`hypha.executor.inner.spread_model`.

Here, too, an executor is held to the GPU memory of its lease, by torch's own allocator. Nothing else does on
a machine whose GPUs are shared: an executor that allocates more gets torch's ``OutOfMemoryError``, as it
would on a GPU of that size, and its neighbours keep theirs. The worker says how much by
``HYPHA_GPU_MEMORY_BYTES``, of each GPU that it shows. What CUDA itself needs (its context, some hundred MB)
is not in torch's count.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hypha.config.environment import variable
from hypha.errors import HyphaError, ModelError
from hypha.executor.files import tensors
from hypha.executor.files.tensors import Digests
from hypha.executor.files.theta import Theta, theta_of
from hypha.executor.inner.loop import Inner, Processor, accelerator_for, is_of_machine, round_seed
from hypha.executor.models import loading as models
from hypha.executor.models.forward import Forward
from hypha.executor.models.model_tensors import ModelTensors
from hypha.messages import TrainJob

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("hypha.executor")

VARIABLE = "HYPHA_GPU_MEMORY_BYTES"


class LocalModel:
    """All of it in this process, or what this one of several has."""

    def __init__(
        self,
        job: TrainJob,
        source: Path | None,
        accelerator: Accelerator | Processor | None = None,
        *,
        keeps_base: bool = True,
    ) -> None:
        """Raises :class:`ModelError` where any other worker would say the same."""
        # theta comes from the parameter server, so that a fresh head is the same everywhere
        model = models.build(job.model, source, weights=False)
        #: the model's own configuration, where it has one
        self.config = getattr(model, "config", None)
        #: theta of the open round, on the CPU
        self.base = theta_of(model).copy() if keeps_base else Theta({}, {})
        self._job = job
        self._accelerator = accelerator_for(job) if accelerator is None else accelerator
        cap_memory(self._accelerator.device)
        with _making_ready():
            self._forward = Forward(model, job.model)
            self._model = self._accelerator.prepare(model)
            self._tensors = ModelTensors(self._accelerator.unwrap_model(self._model))
            #: the incarnation of the optimizer that takes the steps
            self.inner = Inner(self._model, self._forward, job, self._accelerator, job.steps)

    def load(self, path: Path) -> Digests:
        """Set base and the local model to theta in that file; the file's hashes, without BLAKE3."""
        return tensors.read(path, self.base.all(), self._tensors.theta().all(), quick=True)

    def start_round(self, round: int) -> None:
        """Seed torch for it."""
        torch.manual_seed(round_seed(self._job.seed, self._job.me, round))

    def start_over(self, steps: int) -> None:
        """With a fresh optimizer, at so many steps."""
        rows = self.inner.rows
        self.inner = Inner(self._model, self._forward, self._job, self._accelerator, steps)
        self.inner.rows = rows

    def batch(self, columns: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`hypha.executor.inner.loop.Inner.batch`."""
        return self.inner.batch(columns)

    def flush(self) -> None:
        """See :meth:`hypha.executor.inner.loop.Inner.flush`."""
        self.inner.flush()

    def theta(self) -> Theta:
        """The local model as it is now. Raises :class:`ModelError` when ``forward`` has made another one."""
        return self._tensors.theta()

    def end(self) -> None:
        """Nothing more is to be done."""


@contextmanager
def _making_ready() -> Iterator[None]:
    """What goes wrong with a model is a :class:`ModelError`, but for what another machine might not say."""
    try:
        yield
    except Exception as exc:
        if isinstance(exc, HyphaError) or is_of_machine(exc):
            raise
        # any other worker would say the same
        raise ModelError(f"the model cannot be made ready for training: {type(exc).__name__}: {exc}") from exc


def bytes_allowed(text: str | None) -> int:
    """Of the variable; 0: as much as there is. Raises :class:`ModelError` for what is no amount."""
    if not text:
        return 0
    if not text.isdigit():
        raise ModelError(f"{VARIABLE} is a number of bytes, not {text!r}; mend the executor's env")
    return int(text)


def share_of(allowed: int, there: int) -> float:
    """Which share of a GPU with ``there`` bytes may be used; 1: all of it."""
    return min(1.0, allowed / there) if allowed > 0 and there > 0 else 1.0


def cap_memory(device: torch.device) -> None:
    """From now on torch allocates no more on ``device`` than the worker allows. A CPU is none of its
    business: there the worker bounds the process itself.
    """
    if device.type not in ("cuda", "mps") or not (allowed := bytes_allowed(variable(VARIABLE))):
        return
    if device.type == "cuda":
        # also of ROCm, whose devices torch calls so
        index = torch.cuda.current_device() if device.index is None else device.index
        there = int(torch.cuda.get_device_properties(index).total_memory)
        torch.cuda.set_per_process_memory_fraction(share_of(allowed, there), index)
    else:
        there = int(torch.mps.recommended_max_memory())
        torch.mps.set_per_process_memory_fraction(share_of(allowed, there))
    logger.info("GPU memory: %.1f of %.1f GB may be used.", min(allowed, there) / 1e9, there / 1e9)

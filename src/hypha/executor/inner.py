"""The inner loop of DiLoCo: batches, AdamW, learning-rate schedules, gradient accumulation, precision.

One batch is one forward and backward pass over ``batch_size`` rows. With ``gradient_accumulation`` k an
optimizer step is taken every k batches; what is left over at the sync point makes a last, smaller step of
its own, with the mean of its gradients. Training and replay run this very code.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import blake3
import torch
from torch import Tensor, nn

from hypha.config.environment import process_environment
from hypha.errors import BatchFailed, DataError, ModelError
from hypha.executor.diagnosis import explain, out_of_range
from hypha.executor.forward import Forward
from hypha.messages import LrSchedule, TrainJob

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

#: how torch begins to say that a batch has no variance
_SINGLE_ROW = "Expected more than 1 value per channel when training"


def learning_rate_factor(schedule: LrSchedule, step: int) -> float:
    """What the base learning rate is multiplied with in inner step ``step`` (from 0), as transformers has it.

    ``training_steps`` 0 means that the end is not known: after warm-up nothing decays.
    """
    if schedule.kind == "constant":
        return 1.0
    warmup, total = schedule.warmup_steps, schedule.training_steps
    if step < warmup:
        return step / max(1, warmup)
    if total == 0:
        return 1.0
    if schedule.kind == "wsd":
        decay_from = max(warmup, total - schedule.decay_steps)
        if step < decay_from:
            return 1.0
        progress = min(1.0, (step - decay_from) / max(1, schedule.decay_steps))
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    # past the end the rate stays at zero; a cosine would rise again
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if schedule.kind == "linear-with-warmup":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def round_seed(seed: int, worker: str, round: int) -> int:
    """Seeds torch before the first step of a round, so that dropout can be replayed."""
    return int.from_bytes(blake3.blake3(f"{seed}/{worker}/{round}".encode()).digest(8), "big") >> 1


class Processor:
    """What accelerate's ``Accelerator`` is, of which this has the part used here, on the CPU in fp32: nothing
    is moved, wrapped or cast.
    """

    device = torch.device("cpu")
    scaler: torch.amp.GradScaler | None = None

    def prepare(self, thing: T) -> T:
        """The same."""
        return thing

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """The same."""
        return model

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """No casts."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """As a tensor's own."""
        torch.autograd.backward(loss)

    def unscale_gradients(self, optimizer: object) -> None:
        """They are not scaled."""


def accelerator_for(job: TrainJob) -> Accelerator | Processor:
    """The device and precision of a job. Raises :class:`ModelError` when this machine lacks the precision.

    accelerate, whose import takes a fifth of torch's, is for what needs it: devices, precisions, and what its
    own launcher and configuration say.
    """
    told = any(name == "WORLD_SIZE" or name.startswith("ACCELERATE_") for name in process_environment())
    if job.precision == "no" and not told and not torch.accelerator.is_available():
        return Processor()
    from accelerate import Accelerator

    try:
        return Accelerator(mixed_precision=job.precision)
    except ValueError as exc:
        raise ModelError(f"precision {job.precision} does not work here: {exc}") from exc


def is_of_machine(exc: Exception) -> bool:
    """Might another machine, or the same one later, succeed with the same batch?"""
    text = str(exc)
    if isinstance(exc, MemoryError | torch.OutOfMemoryError | OSError) or "not enough memory" in text:
        return True
    return (
        "CUDA error" in text or "HIP error" in text or "CUBLAS" in text
    ) and "device-side assert" not in text


class Inner:
    """AdamW on a prepared model: one incarnation of an optimizer, with the number of steps it stands at."""

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        job: TrainJob,
        accelerator: Accelerator | Processor,
        steps: int,
    ) -> None:
        self._model = model
        self._forward = forward
        self._job = job
        self._accelerator = accelerator
        #: inner steps so far, those of earlier lives included
        self.steps = steps
        self._waiting = 0
        options = job.optimizer
        self._parameters = [value for value in model.parameters() if value.requires_grad]
        if not self._parameters:
            raise ModelError("the model has no parameter that is trained")
        adamw = torch.optim.AdamW(
            self._parameters,
            lr=options.learning_rate,
            betas=options.betas,
            eps=options.epsilon,
            weight_decay=options.weight_decay,
        )
        #: Nothing is left for accelerate to do in a step: its own looks twice through the disk for a package
        #: that few have, which takes as long as a step of a small model.
        self._bare = True
        self._optimizer: Any = adamw
        if not isinstance(accelerator, Processor):
            self._bare = accelerator.scaler is None and accelerator.distributed_type == "NO"
            if not self._bare:
                self._optimizer = accelerator.prepare(adamw)
                # it would be kept for good, state and all, though a worker that starts over has a fresh one
                accelerator._optimizers.remove(self._optimizer)

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        return self._job.optimizer.learning_rate * learning_rate_factor(self._job.schedule, self.steps)

    def batch(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Train on one batch of ``columns``, on the CPU; returns its loss, detached and still on its device.

        Raises :class:`BatchFailed`, in one line that says what to change, where model and data do not go
        together.
        """
        device, spec = self._accelerator.device, self._job.model
        moved = {name: value.to(device, non_blocking=True) for name, value in columns.items()}
        try:
            self._forward.check(columns)
            if device.type != "cpu" and (
                wrong := out_of_range(self._model, spec, columns, self._forward.classes)
            ):
                raise BatchFailed(wrong)
            with self._accelerator.autocast():
                loss = self._forward.loss(self._model, moved)
            share = loss / self._job.gradient_accumulation
            if self._bare:
                torch.autograd.backward(share)
            else:
                self._accelerator.backward(share)
        except (ModelError, BatchFailed):
            raise
        except DataError as exc:
            raise BatchFailed(str(exc)) from exc
        except Exception as exc:
            if is_of_machine(exc):
                raise
            if _SINGLE_ROW in str(exc):
                raise ModelError(
                    "the model has BatchNorm layers, which cannot be trained on batches of one row; set "
                    "rounds.batch_size (and max_batch_size) to 2 or more"
                ) from exc
            told = explain(exc, self._model, spec, columns, self._forward.classes)
            raise BatchFailed(told) from exc
        self._waiting += 1
        if self._waiting == self._job.gradient_accumulation:
            self._step()
        return loss.detach()

    def flush(self) -> None:
        """Take the step of the batches that are left over, at a sync point."""
        if self._waiting:
            # each was divided by the full number
            scale = self._job.gradient_accumulation / self._waiting
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
            self._step()

    def _step(self) -> None:
        if self._job.optimizer.max_grad_norm is not None:
            self._accelerator.unscale_gradients(self._optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self._job.optimizer.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.steps += 1
        self._waiting = 0

"""The inner loop of DiLoCo: batches, AdamW, learning-rate schedules, gradient accumulation, precision.

One batch is one forward and backward pass over ``batch_size`` rows. With ``gradient_accumulation`` k an
optimizer step is taken every k batches; what is left over at the sync point makes a last, smaller step of
its own, with the mean of its gradients. Training and replay run this very code.

Rows that do not fit into memory at a time go through the model one part of the batch after the other, with
each part's gradients in proportion to what its loss is a mean over. In an executor of several processes each
has a part of the batch, and what they have is added up before a step.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import blake3
import torch
from torch import Tensor, nn

from hypha.config.environment import process_environment
from hypha.errors import BatchFailed, DataError, ModelError
from hypha.executor.inner.batch_size import RowsAtATime, free_cached_memory, is_out_of_memory
from hypha.executor.inner.process_group import is_lost
from hypha.executor.models.diagnosis import explain, out_of_range
from hypha.executor.models.forward import Forward
from hypha.messages import LrSchedule, TrainJob

if TYPE_CHECKING:
    from accelerate import Accelerator

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
    decay = schedule.decay_steps if schedule.kind == "wsd" else total - warmup
    decay_from = max(warmup, total - decay)
    if total == 0 or step < decay_from:
        return 1.0
    # past the end the rate stays at zero; a cosine would rise again
    progress = min(1.0, (step - decay_from) / max(1, decay))
    if schedule.kind == "linear-with-warmup":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def round_seed(seed: int, worker: str, round: int) -> int:
    """Seeds torch before the first step of a round, so that dropout can be replayed."""
    return int.from_bytes(blake3.blake3(f"{seed}/{worker}/{round}".encode()).digest(8), "big") >> 1


def least_step_s(text: str | None) -> float:
    """Of ``HYPHA_STEP_S``, in seconds; 0 without. Raises :class:`ModelError` for what is no time."""
    try:
        value = float(text or 0.0)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < math.inf:
        raise ModelError(
            f"HYPHA_STEP_S is the least seconds of a batch, not {text!r}; mend the executor's env"
        )
    return value


class Processor:
    """What accelerate's ``Accelerator`` is, of which this has the part used here, on the CPU in fp32: nothing
    is moved, wrapped, cast or scaled. What it has beyond that is for processes that train one model together
    (:mod:`hypha.executor.inner.spread_model`).
    """

    device = torch.device("cpu")
    #: by what a loss is multiplied, where whoever adds up the gradients divides them
    factor = 1.0
    #: Is each process free to cut its rows as it likes? Not where a forward pass waits for that of others.
    independent = True

    def prepare(self, model: nn.Module) -> nn.Module:
        return model

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def unscale_gradients(self, optimizer: object) -> None:
        pass

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """Before a step: let all processes have the sum of their gradients."""


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
    if isinstance(exc, OSError) or is_out_of_memory(exc) or is_lost(exc):
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
        #: accelerate is never one of several
        self._processor = accelerator if isinstance(accelerator, Processor) else Processor()
        #: how many fit into memory, as far as that is known; it may be taken from an incarnation before
        self.rows = RowsAtATime(job.micro_batch_size, _least_rows(model))
        #: inner steps so far, those of earlier generations included
        self.steps = steps
        #: the batches since the last step, and what each is a part of
        self._batches: list[tuple[Mapping[str, Tensor], int | None]] = []
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

    def batch(self, columns: Mapping[str, Tensor], terms: int | None = None) -> Tensor:
        """Train on one batch of ``columns``, on the CPU; returns its loss, detached and still on its device.

        With ``terms`` they are a part of a batch whose loss is a mean over so many (:meth:`Forward.terms`):
        gradients and loss are this part's share of the whole. A batch that does not fit into memory is tried
        again in smaller parts, the others since the last step with it. Raises :class:`BatchFailed`, in one
        line that says what to change, where model and data do not go together.
        """
        self._batches.append((columns, terms))
        rows = _rows(columns)
        left = self._batches[-1:]
        while True:
            try:
                for one, of in left:
                    loss = self._gradients(one, of)
                break
            except Exception as exc:
                cut = self._processor.independent and is_out_of_memory(exc) and self.rows.failed(rows)
                if not cut:
                    raise
            # a part of the gradients may have been added: begin with none; the error, and with it what its
            # frames hold, is gone
            self._optimizer.zero_grad()
            free_cached_memory()
            left = self._batches
        self.rows.fitted(rows)
        self._after_batch()
        return loss

    def shares(self, parts: Sequence[tuple[Mapping[str, Tensor], float]]) -> Tensor:
        """As :meth:`batch`, cut into parts by whoever knows those of the other processes; each part's loss
        counts as often as is said.
        """
        self._batches.append(({}, None))
        losses = [self._part(columns, weight) for columns, weight in parts]
        self._after_batch()
        return torch.stack(losses).sum()

    def _gradients(self, columns: Mapping[str, Tensor], terms: int | None) -> Tensor:
        parts = self.rows.parts(_rows(columns))
        if terms is None and parts == 1:
            return self._part(columns, None)
        weighed = [(part, self._forward.terms(part)) for part in in_parts(columns, parts)]
        whole = max(1, sum(of for _, of in weighed)) if terms is None else terms
        losses = [self._part(part, of / whole) for part, of in weighed if of]
        # of rows that count for nothing the loss is not even a number
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self._accelerator.device)

    def _part(self, columns: Mapping[str, Tensor], weight: float | None) -> Tensor:
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
            if weight is not None:
                loss = loss * weight
            share = loss / self._job.gradient_accumulation
            if self._processor.factor != 1.0:
                share = share * self._processor.factor
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
        return loss.detach()

    def _after_batch(self) -> None:
        if len(self._batches) == self._job.gradient_accumulation:
            self._step()

    def flush(self) -> None:
        """Take the step of the batches that are left over, at a sync point."""
        if self._batches:
            # each was divided by the full number
            scale = self._job.gradient_accumulation / len(self._batches)
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
            self._step()

    def _step(self) -> None:
        self._processor.add_up(self._parameters)
        if self._job.optimizer.max_grad_norm is not None:
            self._accelerator.unscale_gradients(self._optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self._job.optimizer.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.steps += 1
        self._batches.clear()


def in_parts(columns: Mapping[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """The rows of ``columns`` in so many parts of nearly the same size, in order; some may have no rows."""
    rows = _rows(columns)
    bounds = [number * rows // parts for number in range(parts + 1)]
    return [
        {name: value[start:stop] for name, value in columns.items()}
        for start, stop in itertools.pairwise(bounds)
    ]


def _rows(columns: Mapping[str, Tensor]) -> int:
    return len(next(iter(columns.values())))


def _least_rows(model: nn.Module) -> int:
    """Layers that normalise a batch want two."""
    return 2 if any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in model.modules()) else 1

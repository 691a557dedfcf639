"""The outer step: a weighted mean of pseudo-gradients, then Nesterov momentum (DiLoCo).

After Douillard et al. 2023. With Delta_i = theta_i - theta_r and weights w_i (samples, or 1): g = sum(w_i
Delta_i) / sum(w_i), m <- mu m + g (so m_0 = g), theta <- theta + lr (mu m + g), which is what
``torch.optim.SGD(nesterov=True)`` does with the gradient -g. Updates are added as they come into one fp32
accumulator, so memory is theta, momentum and accumulator, however many workers there are; only those of the
first round wait on the disk for a while, see :mod:`hypha.executor.outer.admission`.

Buffers are no parameters and take no momentum, see :mod:`hypha.executor.outer.buffers`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from hypha.errors import DataError, Refused
from hypha.executor.files.tensors import CHUNK, TensorFile, one_thread
from hypha.executor.files.theta import Theta
from hypha.executor.files.updates import MAX_HEADER_BYTES, UpdateFile
from hypha.executor.outer.admission import MOST_ASIDE, NormLimit
from hypha.executor.outer.agreement import WIDTH, Agreement, JudgedUpdate
from hypha.executor.outer.buffers import BufferSum
from hypha.messages import AggregateJob, UpdateStatistics

logger = logging.getLogger("hypha.executor.parameter_server")

#: A parameter and the first element of a chunk of it.
Span = tuple[str, int]


class OuterStep:
    """Holds theta (by reference), momentum and the sum of the round's updates."""

    def __init__(self, theta: Theta, job: AggregateJob, threads: int = 1) -> None:
        """``threads`` work on chunks of their own: the results are the same bits with any number of them."""
        for name, tensor in theta.all().items():
            if not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous")
        self.theta = theta
        #: worker -> samples, of the updates in the sum
        self.contributors: dict[str, int] = {}
        #: all zeros, thus absent, before the first step
        self.momentum: dict[str, Tensor] = {}
        self._optimizer = job.optimizer
        self._uniform = job.weighting == "uniform"
        self._limit = NormLimit(job)
        #: updates of a first round that are not in the sum yet, in the order in which they came
        self._aside: list[JudgedUpdate] = []
        self._added = False
        self._sum: dict[str, Tensor] = {}
        self._buffers = BufferSum(theta, job.max_update_ratio)
        self._weight = 0.0
        # by name: norms are the same bits, whether theta came from a model or from a checkpoint
        self._spans = [
            (name, at)
            for name, value in sorted(theta.parameters.items())
            for at in range(0, value.numel(), CHUNK)
        ]
        #: of the updates of the last step, in the order in which they were added
        self.statistics: tuple[UpdateStatistics, ...] = ()
        self._agreement = Agreement(self._spans)
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        if threads > 1:
            # what torch computes with is every thread's own affair
            self._pool = ThreadPoolExecutor(threads, "outer", torch.set_num_threads, (1,))

    def _over_chunks(self, work: Callable[[Sequence[Span]], list[float]]) -> list[float]:
        """What ``work`` gives for the chunks of all parameters, in their order."""
        if self._pool is None:
            return work(self._spans)
        share = math.ceil(len(self._spans) / self._threads) or 1
        parts = [self._spans[at : at + share] for at in range(0, len(self._spans), share)]
        return [value for values in self._pool.map(torch.no_grad()(work), parts) for value in values]

    @one_thread()
    @torch.no_grad()
    def add(self, worker: str, samples: int, path: Path, recorded: UpdateStatistics | None = None) -> float:
        """Add a worker's update file to the sum; return its norm. ``recorded`` says what it and its buffers
        are multiplied by, if that is known, as in a replay. The file may be moved: it is deleted when it is
        in the sum.

        Raises :class:`Refused` (``duplicate``, ``invalid``) before anything was added.
        """
        if recorded is not None and recorded.clip is None:
            recorded = None
        if worker in self.contributors:
            raise Refused("duplicate", "this round already has an update of this worker", worker)
        if samples <= 0:
            raise Refused("invalid", f"an update of {samples} samples cannot be weighted", worker)
        try:
            with TensorFile(path, MAX_HEADER_BYTES) as file:
                update = UpdateFile(file, self.theta)
                # the whole file is judged before its first tensor is added: a sum cannot be taken back
                norm, sketch = self._norm(update)
                buffers = self._buffers.read(update)
                weight = 1.0 if self._uniform else float(samples)
                size = path.stat().st_size
                part = JudgedUpdate(worker, samples, norm, sketch, weight, size, path, recorded)
                waits = recorded is None and not self._limit.is_known
                if not waits:
                    self._accumulate(update, part)
        except DataError as exc:
            raise Refused("invalid", str(exc), worker) from exc
        if waits:
            aside = path.with_name(f"{path.name}.aside")
            path.rename(aside)
            self._aside.append(replace(part, path=aside))
        self._buffers.add(part, buffers)
        self._weight += weight
        self.contributors[worker] = samples
        if len(self._aside) >= MOST_ASIDE:
            self._take_aside()
        return norm

    def _take_aside(self) -> None:
        """Add what was kept aside: the norms of a first round are known."""
        aside, self._aside = self._aside, []
        self._limit.saw(part.norm for part in aside)
        for part in aside:
            with TensorFile(part.path) as file:
                self._accumulate(UpdateFile(file, self.theta), part)
            part.path.unlink()

    def _clip(self, part: JudgedUpdate) -> float:
        if part.recorded is not None and part.recorded.clip is not None:
            return part.recorded.clip
        clip = self._limit.clip(part.norm)
        if clip < 1.0:
            logger.warning(
                "The update of %s has a norm of %g, those of recent rounds have %g in the median: it counts "
                "with %.3g of its length",
                part.worker,
                part.norm,
                self._limit.median(),
                clip,
            )
        return clip

    def _norm(self, update: UpdateFile) -> tuple[float, Tensor]:
        """The norm of ``update``, and its sketch."""
        sketches: list[tuple[Span, Tensor]] = []

        def norms(spans: Sequence[Span]) -> list[float]:
            reader = update.reader()
            sketch = torch.zeros(WIDTH)
            found = []
            for name, at in spans:
                piece = reader.chunk(name, at)
                found.append(float(torch.dot(piece, piece)))
                self._agreement.draw((name, at), piece, sketch)
            sketches.extend([(spans[0], sketch)] if spans else [])
            return found

        squares = 0.0
        for (name, _), square in zip(self._spans, self._over_chunks(norms), strict=True):
            # NaN and infinity survive squaring and summing, so one fast pass finds them all
            squares += square
            if not math.isfinite(squares):
                raise DataError(f"the update of {name} holds values that are not finite")
        total = torch.zeros(WIDTH)
        # in one order, whichever thread was done first
        for _, sketch in sorted(sketches, key=lambda one: one[0]):
            total.add_(sketch)
        return math.sqrt(squares), total

    def _accumulate(self, update: UpdateFile, judged: JudgedUpdate) -> None:
        clip = self._clip(judged)
        weight, first, self._added = judged.weight * clip, not self._added, True
        self._agreement.accept(judged, clip)
        for name, value in self.theta.parameters.items():
            if name not in self._sum:
                self._sum[name] = torch.empty(value.numel())

        def accumulate(spans: Sequence[Span]) -> list[float]:
            reader = update.reader()
            for name, at in spans:
                part = self._sum[name][at : at + CHUNK]
                if first:
                    torch.mul(reader.chunk(name, at), weight, out=part)
                else:
                    part.add_(reader.chunk(name, at), alpha=weight)
            return []

        self._over_chunks(accumulate)

    @one_thread()
    @torch.no_grad()
    def apply(self) -> float:
        """Take the outer step in place and start a new sum; return the norm of the mean update.

        Without any update theta and momentum stay as they are. :attr:`statistics` is of that step then.
        """
        if not self.contributors:
            self.statistics = ()
            return 0.0
        if self._aside:
            self._take_aside()
        else:
            self._limit.saw(self._agreement.norms())
        rate, mu = self._optimizer.learning_rate, self._optimizer.momentum
        for name, total in self._sum.items():
            if name not in self.momentum:
                self.momentum[name] = torch.zeros_like(total)

        def step(spans: Sequence[Span]) -> list[float]:
            found = []
            for name, at in spans:
                mean = self._sum[name][at : at + CHUNK].div_(self._weight)
                found.append(float(torch.dot(mean, mean)))
                part = self.momentum[name][at : at + CHUNK].mul_(mu).add_(mean)
                flat = self.theta.parameters[name].view(-1)
                flat[at : at + CHUNK].add_(mean.add_(part, alpha=mu), alpha=rate)
            return found

        squares = 0.0
        for square in self._over_chunks(step):
            squares += square
        scaled = self._buffers.apply(self._weight)
        self.statistics = tuple(
            msgspec.structs.replace(one, buffer_clips=scaled.get(one.worker, {}))
            for one in self._agreement.close()
        )
        self.contributors.clear()
        self._weight = 0.0
        self._added = False
        return math.sqrt(squares)

    def momentum_or_zeros(self) -> dict[str, Tensor]:
        """Momentum in the parameters' shapes, as a checkpoint holds it."""
        return {
            name: self.momentum[name].view(value.shape) if name in self.momentum else torch.zeros_like(value)
            for name, value in self.theta.parameters.items()
        }

    def restore_momentum(self, momentum: dict[str, Tensor]) -> None:
        """Take momentum from a checkpoint (shares its memory)."""
        self.momentum = {name: momentum[name].view(-1) for name in self.theta.parameters}

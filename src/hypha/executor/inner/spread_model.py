"""The model of an executor of several processes, one for each device
(:mod:`hypha.executor.inner.process_group`).

Rank 0 has a :class:`SpreadModel`; the others do what that one does, in :func:`follow`, each on its rows of
the batch. ``batch_size`` is the executor's: the gradients of all rows are added up before a step, so that a
step is that of one process with the whole batch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from hypha.config.environment import process_environment
from hypha.decoding import decode, decode_json
from hypha.errors import ModelError
from hypha.executor.files import tensors
from hypha.executor.files.tensors import Digests
from hypha.executor.files.theta import Theta, theta_of
from hypha.executor.inner import sharding
from hypha.executor.inner.device_memory import cap_memory
from hypha.executor.inner.local_model import making_ready
from hypha.executor.inner.loop import Inner, Processor, Together, in_parts, round_seed
from hypha.executor.inner.process_group import ProcessGroup, ProcessLost
from hypha.executor.models import loading as models
from hypha.executor.models.forward import Forward
from hypha.executor.models.model_tensors import ModelTensors
from hypha.messages import TrainJob, encode_json

logger = logging.getLogger("hypha.executor.training")


class _Begin(msgspec.Struct, tag="begin", frozen=True):
    """Build the model, from its files in that directory."""

    job: bytes
    source: str | None


class _Load(msgspec.Struct, tag="load", frozen=True):
    """Theta follows."""


class _StartRound(msgspec.Struct, tag="round", frozen=True):
    round: int


class _StartOver(msgspec.Struct, tag="over", frozen=True):
    steps: int


class _Batch(msgspec.Struct, tag="batch", frozen=True):
    """Rows follow, for each process its own: ``terms`` are those of the whole batch. Of a sharded model
    ``parts`` says, for each process, how many rows each part has and how often its loss counts.
    """

    terms: int
    parts: list[list[tuple[int, float]]] | None = None


class _Flush(msgspec.Struct, tag="flush", frozen=True):
    pass


class _Gather(msgspec.Struct, tag="gather", frozen=True):
    """Rank 0 wants the local model."""


class _End(msgspec.Struct, tag="end", frozen=True):
    pass


_Command = _Begin | _Load | _StartRound | _StartOver | _Batch | _Flush | _Gather | _End
_COMMAND: msgspec.msgpack.Decoder[_Command] = msgspec.msgpack.Decoder(_Command)


class _Device(Processor):
    """Where a process of several computes, and in which precision."""

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device = device
        self._precision = precision

    def autocast(self) -> Any:
        """Casts where the job wants them."""
        wanted = self._precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=wanted)


class _Summed:
    """Whole models, whose gradients are added up before a step."""

    factor = 1.0
    independent = True

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        self._group.add_up(parameters)


class _Sharded:
    """One model in all processes; torch takes the mean of the gradients in each backward pass."""

    independent = False

    def __init__(self, group: ProcessGroup) -> None:
        self.factor = float(group.size)

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """It is done."""


class _Member:
    """What each of the processes has; all call its methods at the same time."""

    def __init__(self, group: ProcessGroup, job: TrainJob, source: Path | None) -> None:
        if job.precision == "fp16":
            raise ModelError(
                "an executor of several processes does not train in fp16; set the job's precision to bf16"
            )
        told = process_environment()
        self.group, self.job = group, job
        self.sharded = sharding.is_wanted(told)
        model = models.build(job.model, source, weights=False)
        self.config = getattr(model, "config", None)
        #: of the whole model, where somebody wants it
        self.base = theta_of(model).copy() if group.rank == 0 else None
        cap_memory(group.device)
        self._device = _Device(group.device, job.precision)
        self._together: Together = _Sharded(group) if self.sharded else _Summed(group)
        with making_ready():
            self.forward = Forward(model, job.model)
            if self.sharded:
                sharding.shard(model, group.device, group.size, told)
            # buffers as well
            self._model: nn.Module = model.to(group.device)
            self._tensors = ModelTensors(self._model)
            self.inner = self._fresh(job.steps)

    def _fresh(self, steps: int) -> Inner:
        return Inner(self._model, self.forward, self.job, self._device, steps, self._together)

    def take_theta(self) -> None:
        """Set the local model to base of rank 0."""
        values = None if self.base is None else self.base.all()
        for name, live in self._tensors.theta().all().items():
            if values is None:
                full = torch.empty(live.shape, dtype=live.dtype, device=self.group.device)
            else:
                full = values[name].to(self.group.device)
            self.group.broadcast(full)
            sharding.set_value(live, full)

    def start_round(self, round: int) -> None:
        """Each process drops out other values than the others."""
        name = f"{self.job.me}/{self.group.rank}" if self.group.rank else self.job.me
        torch.manual_seed(round_seed(self.job.seed, name, round))

    def start_over(self, steps: int) -> None:
        rows = self.inner.rows
        self.inner = self._fresh(steps)
        self.inner.rows = rows

    def batch(self, columns: Mapping[str, Tensor], command: _Batch) -> Tensor:
        """The loss of the whole batch."""
        if command.parts is None:
            loss = self.inner.batch(columns, command.terms)
        else:
            parts, at = [], 0
            for rows, weight in command.parts[self.group.rank]:
                parts.append(({name: one[at : at + rows] for name, one in columns.items()}, weight))
                at += rows
            loss = self.inner.shares(parts)
        return self.group.sum(loss.float())

    def gather(self) -> Theta | None:
        """The local model, on the CPU of rank 0."""
        local = self._tensors.theta()
        keeps = self.group.rank == 0
        parameters = {}
        for name, value in local.parameters.items():
            full = sharding.full_value(value)
            if keeps:
                parameters[name] = full.to("cpu", copy=self.sharded)
        return Theta(parameters, dict(local.buffers)) if keeps else None


class SpreadModel:
    """The model of an executor of several processes, as its rank 0 has it."""

    def __init__(self, group: ProcessGroup, job: TrainJob, source: Path | None) -> None:
        """Raises :class:`ModelError` where any other worker would say the same."""
        self._group = group
        path = None if source is None else str(source)
        self._tell(_Begin(job=encode_json(job), source=path))
        self._own = _Member(group, job, source)
        self.config = self._own.config
        assert self._own.base is not None
        self.base: Theta = self._own.base
        logger.info(
            "The model is trained by %d processes, %s.",
            group.size,
            "each with a part of it" if self._own.sharded else "each with all of it",
        )

    def _tell(self, command: _Command) -> None:
        self._group.broadcast_bytes(msgspec.msgpack.encode(command))

    @property
    def steps(self) -> int:
        """See :class:`TrainedModel`, as of all that follows."""
        return self._own.inner.steps

    @property
    def learning_rate(self) -> float:
        return self._own.inner.learning_rate

    def load(self, path: Path) -> Digests:
        found = tensors.read(path, self.base.all(), quick=True)
        self._tell(_Load())
        self._own.take_theta()
        return found

    def start_round(self, round: int) -> None:
        self._tell(_StartRound(round))
        self._own.start_round(round)

    def start_over(self, steps: int) -> None:
        self._tell(_StartOver(steps))
        self._own.start_over(steps)

    def batch(self, columns: Mapping[str, Tensor]) -> Tensor:
        own = self._own
        shares = in_parts(columns, self._group.size)
        terms = [own.forward.terms(share) for share in shares]
        command = _Batch(max(1, sum(terms)))
        if own.sharded:
            shares, command = self._parts(shares, command.terms)
        self._tell(command)
        for rank, share in enumerate(shares):
            if rank:
                self._group.send_rows(share, rank)
        return own.batch(shares[0], command)

    def _parts(self, shares: list[dict[str, Tensor]], whole: int) -> tuple[list[dict[str, Tensor]], _Batch]:
        """All processes go through a sharded model equally often. Who has no rows for that, or none that
        count, takes some of others, which count for nothing.
        """
        forward = self._own.forward
        most = max(len(next(iter(share.values()))) for share in shares)
        number = self._own.inner.rows.parts(most)
        cut = [in_parts(share, number) for share in shares]
        weighed = [[(part, forward.terms(part)) for part in parts] for parts in cut]
        some = max((one for parts in weighed for one in parts), key=lambda one: one[1])[0]
        told: list[list[tuple[int, float]]] = []
        rows: list[dict[str, Tensor]] = []
        for parts in weighed:
            taken = [(part, of / whole) if of else (some, 0.0) for part, of in parts]
            told.append([(len(next(iter(part.values()))), weight) for part, weight in taken])
            rows.append({name: torch.cat([part[name] for part, _ in taken]) for name in some})
        return rows, _Batch(whole, told)

    def flush(self) -> None:
        self._tell(_Flush())
        self._own.inner.flush()

    @property
    def fits(self) -> bool:
        """In this process: of the others nobody asks."""
        return not self._own.inner.rows.limited

    def theta(self) -> Theta:
        self._tell(_Gather())
        found = self._own.gather()
        assert found is not None
        return found

    def end(self) -> None:
        self._tell(_End())


def follow(group: ProcessGroup) -> None:
    """Do what rank 0 does, until it ends. Raises what makes going on impossible."""
    member: _Member | None = None
    while True:
        command = decode(_COMMAND.decode, group.broadcast_bytes(None))
        if isinstance(command, _End):
            return
        if isinstance(command, _Begin):
            source = None if command.source is None else Path(command.source)
            member = _Member(group, decode_json(command.job, TrainJob), source)
            continue
        if member is None:
            raise ProcessLost("rank 0 of this executor began without a job")
        match command:
            case _Load():
                member.take_theta()
            case _StartRound(round=round):
                member.start_round(round)
            case _StartOver(steps=steps):
                member.start_over(steps)
            case _Batch():
                member.batch(group.receive_rows(), command)
            case _Flush():
                member.inner.flush()
            case _Gather():
                member.gather()

"""The model of an executor of several processes, one for each device
(:mod:`hypha.executor.inner.process_group`), whole in each of them or sharded.

Each has a :class:`SpreadModel`; the others do what rank 0 does, in :func:`follow_rank_zero`, each on its rows
of the batch. ``batch_size`` is the executor's: the gradients of all rows are added up before a step, so that
a step is that of one process with the whole batch.

Sharding is as ``accelerate launch`` was configured for it. Its launcher says in environment variables what
its configuration file says. Of its keys those that decide which modules are gathered at a time count here
(``fsdp_auto_wrap_policy``, ``fsdp_transformer_layer_cls_to_wrap``, ``fsdp_min_num_params``,
``fsdp_reshard_after_forward``); what would change more is refused. It is always torch's ``fully_shard``
(version 2), whatever ``fsdp_version`` says.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hypha.config.environment import process_environment
from hypha.errors import ModelError
from hypha.executor.files import tensors
from hypha.executor.files.tensors import Digests
from hypha.executor.files.theta import Theta
from hypha.executor.inner.local_model import LocalModel
from hypha.executor.inner.loop import Processor, in_parts, round_seed
from hypha.executor.inner.process_group import ProcessGroup, is_lost
from hypha.executor.running import set_up_log
from hypha.messages import TrainJob

logger = logging.getLogger("hypha.executor.training")

#: what is refused, and the key of accelerate's file that asks for it
_REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing",
}
_SMALLEST = 1_000_000

#: For each process: how many rows each part of its batch has, and how often the part's loss counts.
_Parts = list[list[tuple[int, float]]]


class _Device(Processor):
    """Where a process of several computes, and in which precision. Each has the whole model; their gradients
    are added up before a step.
    """

    def __init__(self, group: ProcessGroup, job: TrainJob) -> None:
        if job.precision == "fp16":
            raise ModelError(
                "an executor of several processes does not train in fp16; set the job's precision to bf16"
            )
        self.device = group.device
        self._group = group
        self._precision = job.precision

    def prepare(self, model: nn.Module) -> nn.Module:
        """On the device, buffers as well."""
        return model.to(self.device)

    def autocast(self) -> Any:
        wanted = self._precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=wanted)

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        self._group.add_up(parameters)


class _ShardingDevice(_Device):
    """Each has a part of the model; torch takes the mean of the gradients in each backward pass."""

    independent = False

    def __init__(self, group: ProcessGroup, job: TrainJob) -> None:
        super().__init__(group, job)
        self.factor = float(group.size)

    def prepare(self, model: nn.Module) -> nn.Module:
        shard(model, self.device, self._group.size, process_environment())
        return super().prepare(model)

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """It is done."""


class SpreadModel(LocalModel):
    """What each of the processes has: rank 0 has the others call the methods that it calls."""

    def __init__(self, group: ProcessGroup, job: TrainJob, source: Path | None) -> None:
        """Raises :class:`ModelError` where any other worker would say the same."""
        self.group = group
        self._have_others(job, source)
        #: has accelerate's launcher said so?
        self.sharded = process_environment().get("ACCELERATE_USE_FSDP", "").lower() == "true"
        device = (_ShardingDevice if self.sharded else _Device)(group, job)
        super().__init__(job, source, device, keeps_base=group.rank == 0)
        if group.rank == 0:
            logger.info(
                "The model is trained by %d processes, %s.",
                group.size,
                "each with a part of it" if self.sharded else "each with all of it",
            )

    def _have_others(self, *words: Any) -> None:
        """The name of a method, and its arguments."""
        if self.group.rank == 0:
            self.group.command(*words)

    def load(self, path: Path) -> Digests:
        found = tensors.read(path, self.base.all(), quick=True)
        self.take_theta()
        return found

    def take_theta(self) -> None:
        """Set the local model to base of rank 0."""
        self._have_others("take_theta")
        values = self.base.all()
        for name, live in self._tensors.theta().all().items():
            if self.group.rank:
                full = torch.empty(live.shape, dtype=live.dtype, device=self.group.device)
            else:
                full = values[name].to(self.group.device)
            self.group.broadcast(full)
            set_value(live, full)

    def start_round(self, round: int) -> None:
        """Each process drops out other values than the others."""
        self._have_others("start_round", round)
        name = f"{self._job.me}/{self.group.rank}" if self.group.rank else self._job.me
        torch.manual_seed(round_seed(self._job.seed, name, round))

    def start_over(self, steps: int) -> None:
        self._have_others("start_over", steps)
        super().start_over(steps)

    def batch(self, columns: Mapping[str, Tensor]) -> Tensor:
        shares = in_parts(columns, self.group.size)
        terms = max(1, sum(self._forward.terms(share) for share in shares))
        parts: _Parts | None = None
        if self.sharded:
            shares, parts = self._cut(shares, terms)
        self._have_others("train", terms, parts)
        for rank, share in enumerate(shares):
            if rank:
                self.group.send_rows(share, rank)
        return self.train(terms, parts, shares[0])

    def _cut(self, shares: list[dict[str, Tensor]], whole: int) -> tuple[list[dict[str, Tensor]], _Parts]:
        """All processes go through a sharded model equally often. Who has no rows for that, or none that
        count, takes some of others, which count for nothing.
        """
        most = max(len(next(iter(share.values()))) for share in shares)
        number = self.inner.rows.parts(most)
        cut = [in_parts(share, number) for share in shares]
        weighed = [[(part, self._forward.terms(part)) for part in parts] for parts in cut]
        some = max((one for parts in weighed for one in parts), key=lambda one: one[1])[0]
        told: _Parts = []
        rows: list[dict[str, Tensor]] = []
        for parts in weighed:
            taken = [(part, of / whole) if of else (some, 0.0) for part, of in parts]
            told.append([(len(next(iter(part.values()))), weight) for part, weight in taken])
            rows.append({name: torch.cat([part[name] for part, _ in taken]) for name in some})
        return rows, told

    def train(self, terms: int, parts: _Parts | None, columns: Mapping[str, Tensor] | None = None) -> Tensor:
        """The loss of the whole batch, whose terms are ``terms``. Rank 0 has the ``columns`` of its rows, and
        sends the others theirs; of a sharded model ``parts`` says how all are cut.
        """
        columns = self.group.receive_rows() if columns is None else columns
        if parts is None:
            loss = self.inner.batch(columns, terms)
        else:
            shares, at = [], 0
            for rows, weight in parts[self.group.rank]:
                shares.append(({name: one[at : at + rows] for name, one in columns.items()}, weight))
                at += rows
            loss = self.inner.shares(shares)
        return self.group.sum(loss.float())

    def flush(self) -> None:
        self._have_others("flush")
        super().flush()

    def theta(self) -> Theta:
        """The local model, on the CPU of rank 0."""
        self._have_others("theta")
        local = self._tensors.theta()
        parameters = {}
        for name, value in local.parameters.items():
            # all processes do this at the same time
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if self.group.rank == 0:
                parameters[name] = full.to("cpu", copy=self.sharded)
        return Theta(parameters, dict(local.buffers))

    def end(self) -> None:
        self._have_others("end")


def follow_rank_zero(group: ProcessGroup) -> int:
    """What another process than rank 0 runs; its exit code."""
    set_up_log()
    try:
        model = SpreadModel(group, *group.command())
        while (command := group.command())[0] != "end":
            getattr(model, command[0])(*command[1:])
    except Exception as exc:
        if is_lost(exc):
            # it has said why, or the launcher does
            logger.warning("Process %d of this executor ends, as another one has.", group.rank)
            return 1
        logger.exception("Process %d of this executor cannot go on.", group.rank)
        return group.leave_last_words(exc)
    return 0


def shard(model: nn.Module, device: torch.device, processes: int, environment: Mapping[str, str]) -> None:
    """Shard ``model`` in place over all processes. Raises :class:`ModelError` for what is not supported."""
    for name, key in _REFUSED.items():
        if environment.get(name, "").lower() == "true":
            raise ModelError(
                f"the executor's accelerate configuration sets {key}, which is not supported; set it to false"
            )
    mesh = init_device_mesh(device.type, (processes,))
    again = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("false", "shard_grad_op")
    for module in (*_gathered_at_a_time(model, environment), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=again)


def _gathered_at_a_time(model: nn.Module, environment: Mapping[str, str]) -> list[nn.Module]:
    """The modules whose parameters are gathered when they are needed; inner ones first."""
    policy = environment.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP").upper()
    inner = [module for module in model.modules() if module is not model][::-1]
    if policy == "NO_WRAP":
        return []
    if policy == "SIZE_BASED_WRAP":
        least = int(environment.get("FSDP_MIN_NUM_PARAMS", "0")) or _SMALLEST
        taken: set[int] = set()
        found = []
        for module in inner:
            own = [one for one in module.parameters() if id(one) not in taken]
            if sum(one.numel() for one in own) >= least:
                found.append(module)
                taken |= {id(one) for one in own}
        return found
    if policy != "TRANSFORMER_BASED_WRAP":
        raise ModelError(f"accelerate's fsdp_auto_wrap_policy {policy} is unknown")
    told = environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    names = {name.strip() for name in told.split(",") if name.strip()}
    names = names or set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in inner if type(module).__name__ in names]
    if told and not found:
        raise ModelError(
            f"the model has no module of the class {told}, which the executor's accelerate configuration "
            "names as fsdp_transformer_layer_cls_to_wrap"
        )
    return found


@torch.no_grad()
def set_value(live: Tensor, full: Tensor) -> None:
    """Let the tensor, of which this process may have a part alone, have the values of ``full``, which all
    processes have.
    """
    if not isinstance(live, DTensor):
        live.copy_(full)
        return
    part = distribute_tensor(full, live.device_mesh, live.placements, src_data_rank=None)
    live.to_local().copy_(part.to_local())

"""Fully sharded data parallel training, as ``accelerate launch`` was configured for it.

accelerate's launcher says in environment variables what its configuration file says. Of its keys those that
decide which modules are gathered at a time count here (``fsdp_auto_wrap_policy``,
``fsdp_transformer_layer_cls_to_wrap``, ``fsdp_min_num_params``, ``fsdp_reshard_after_forward``); what would
change more is refused. It is always torch's ``fully_shard`` (version 2), whatever ``fsdp_version`` says.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hypha.errors import ModelError

#: what is refused, and the key of accelerate's file that asks for it
_REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing",
}
_SMALLEST = 1_000_000


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Has accelerate's launcher said that the model is to be sharded?"""
    return environment.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shard(model: nn.Module, device: torch.device, processes: int, environment: Mapping[str, str]) -> None:
    """Shard ``model`` in place over all processes. Raises :class:`ModelError` for what is not supported."""
    for name, key in _REFUSED.items():
        if environment.get(name, "").lower() == "true":
            raise ModelError(
                f"the executor's accelerate configuration sets {key}, which is not supported; set it to false"
            )
    mesh = init_device_mesh(device.type, (processes,))
    again = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("false", "shard_grad_op")
    for module in _gathered_at_a_time(model, environment):
        fully_shard(module, mesh=mesh, reshard_after_forward=again)
    fully_shard(model, mesh=mesh, reshard_after_forward=again)


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


def full_value(live: Tensor) -> Tensor:
    """The whole tensor, gathered from all processes, which call this at the same time."""
    return live.full_tensor() if isinstance(live, DTensor) else live

"""Theta: the tensors that define a model's function, as they are trained, sent, saved and hashed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hypha.executor.files.tensors import Spec, one_thread


@dataclass(frozen=True)
class Theta:
    """All that defines a model's function: parameters (each tied tensor once, under the first name of
    ``named_parameters``), and the buffers that a state dict would hold. Both are fp32 or what they are.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def all(self) -> dict[str, Tensor]:
        return self.parameters | self.buffers

    def specs(self) -> dict[str, Spec]:
        return {name: Spec(value.dtype, tuple(value.shape)) for name, value in self.all().items()}

    def copy(self) -> Theta:
        """Its own memory, on the CPU."""
        return Theta(_copied(self.parameters), _copied(self.buffers))

    @one_thread()
    @torch.no_grad()
    def assign(self, other: Theta) -> None:
        """Overwrite the values, in place: tied tensors stay tied."""
        values = other.all()
        for name, tensor in self.all().items():
            tensor.copy_(values[name])

    def size_bytes(self) -> int:
        return sum(spec.size_bytes for spec in self.specs().values())


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def theta_of(model: nn.Module) -> Theta:
    """The tensors of ``model`` as it is now, without non-persistent buffers: they follow from its
    configuration.
    """
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for key, value in module._buffers.items():
            if value is None or key in module._non_persistent_buffers_set or id(value) in seen:
                continue
            seen.add(id(value))
            buffers[f"{prefix}.{key}" if prefix else key] = value.detach()
    return Theta(parameters, buffers)

"""Theta: the tensors that define a model's function, as they are trained, sent, saved and hashed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hypha.executor.files.tensors import Spec, one_thread, specs_of


@dataclass(frozen=True)
class Theta:
    """All that defines a model's function: parameters (each tied tensor once, under the first name of
    ``named_parameters``), and the buffers that a state dict would hold. Both are fp32 or what they are.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def all(self) -> dict[str, Tensor]:
        return self.parameters | self.buffers

    def specs(self, sent_as: torch.dtype | None = None) -> dict[str, Spec]:
        """Those of its tensors; of an update's, where parameters are ``sent_as`` that type."""
        found = specs_of(self.parameters | self.buffers)
        if sent_as is not None:
            found |= {name: Spec(sent_as, found[name].shape) for name in self.parameters}
        return found

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
    for name, module, key in persistent_buffers(model):
        value = module._buffers[key]
        if value is not None and id(value) not in seen:
            seen.add(id(value))
            buffers[name] = value.detach()
    return Theta(parameters, buffers)


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The name of each that a state dict would hold, or that is None, with its module and its key there."""
    for prefix, module in model.named_modules():
        for key in module._buffers:
            if key not in module._non_persistent_buffers_set:
                yield f"{prefix}.{key}" if prefix else key, module, key

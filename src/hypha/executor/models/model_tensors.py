"""What of a model's tensors travels: whether all of it can, and where it is while the model is trained.

A ``forward`` may set a buffer anew (``self.mean = 0.9 * self.mean + ...``), so tensors are looked up by name
each time. What could not be carried to the other workers (a sparse buffer, a buffer that changes its shape, a
parameter that is replaced under its optimizer) is a :class:`ModelError` that names it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from hypha.errors import ModelError, NotFinite
from hypha.executor.files.tensors import DTYPE_NAMES, TensorFile, difference
from hypha.executor.files.theta import Theta, persistent_buffers, theta_of


def settle(model: nn.Module) -> None:
    """Check that all tensors of a model that was just built can travel, and give buffers that overlap in
    memory (``expand``) memory of their own. Raises :class:`ModelError`, which names the tensor.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter) or parameter.is_meta:
            raise ModelError(
                f"the parameter {name} has no values before a first forward; build the model with all its "
                "sizes"
            )
        if parameter.dtype != torch.float32:
            raise ModelError(f"the parameter {name} is {parameter.dtype}; parameters must be float32")
        if parameter.layout != torch.strided:
            raise ModelError(f"the parameter {name} is sparse; parameters must be dense")
    for prefix, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ModelError(
                f"{prefix or 'the model'} keeps extra state (get_extra_state), which would be lost; keep it "
                "in buffers"
            )
    own: dict[int, Tensor] = {}
    for name, module, key in persistent_buffers(model):
        value = module._buffers[key]
        if value is not None:
            _check_buffer(name, value)
            # one tensor under two names stays one
            module._buffers[key] = own.setdefault(id(value), _of_its_own(value))


def _check_buffer(name: str, value: Tensor) -> None:
    if isinstance(value, UninitializedBuffer) or value.is_meta:
        raise ModelError(
            f"the buffer {name} has no values before a first forward; build the model with all its sizes"
        )
    if value.layout != torch.strided or value.is_quantized:
        raise ModelError(
            f"the buffer {name} is {'quantized' if value.is_quantized else 'sparse'}, which cannot travel; "
            "register it dense, or with persistent=False if it follows from the configuration"
        )
    if value.dtype not in DTYPE_NAMES:
        raise ModelError(
            f"the buffer {name} is {value.dtype}, which cannot travel; use another type, or register it with "
            "persistent=False if it follows from the configuration"
        )


def _of_its_own(value: Tensor) -> Tensor:
    """``value``, if values can be written into it one by one; else a copy."""
    if _is_plain(value):
        return value
    return value.clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()


def _is_plain(value: Tensor) -> bool:
    return value.is_contiguous() and not (value.is_conj() or value.is_neg())


def check_finite(model: nn.Module) -> None:
    """No parameter may begin as NaN or infinite: no training gets rid of it. Raises :class:`ModelError`."""
    for name, parameter in model.named_parameters():
        if parameter.numel() and not torch.stack(torch.aminmax(parameter.detach())).isfinite().all():
            raise ModelError(
                f"the parameter {name} holds values that are not finite before training; mend the weights, "
                "or register a constant such as a mask of -inf as a buffer"
            )


class ModelTensors:
    """The tensors of a model that is trained, by the names that it had when it was built."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = dict(model.named_parameters())
        self._specs = theta_of(model).specs()
        #: other names of buffers that are one tensor
        self._aliases: dict[str, str] = {}
        first: dict[int, str] = {}
        for name, module, key in persistent_buffers(model):
            value = module._buffers[key]
            if value is not None and first.setdefault(id(value), name) != name:
                self._aliases[name] = first[id(value)]

    def theta(self) -> Theta:
        """The live tensors, as they are now. Raises :class:`ModelError` when ``forward`` has made others of
        them.
        """
        for name, parameter in self._model.named_parameters():
            if self._parameters.get(name) is not parameter:
                raise ModelError(
                    f"forward has set the parameter {name} anew, so its optimizer trains another one; change "
                    "it in place"
                )
        present = {
            name: (module, key, value)
            for name, module, key in persistent_buffers(self._model)
            if (value := module._buffers[key]) is not None
        }
        for alias, name in self._aliases.items():
            if alias not in present or name not in present or present[alias][2] is not present[name][2]:
                raise ModelError(
                    f"the buffers {name} and {alias} were one tensor when the model was built, and are two "
                    "now; register them as two"
                )
        buffers: dict[str, Tensor] = {}
        for name, (module, key, value) in present.items():
            if name in self._aliases:
                continue
            if value.requires_grad or not _is_plain(value):
                value = module._buffers[key] = _of_its_own(value.detach())
            buffers[name] = value.detach()
        theta = Theta({name: value.detach() for name, value in self._parameters.items()}, buffers)
        if problem := difference(theta.specs(), self._specs):
            raise ModelError(
                f"forward has made other buffers than the model was built with ({problem}); buffers must "
                "keep their names, shapes and types"
            )
        return theta


def unchanged(value: Tensor, before: Tensor) -> Tensor:
    """Which elements are what they were, NaN included."""
    return (value == before) | (value.isnan() & before.isnan())


@torch.no_grad()
def check_buffers(local: Theta, base: Theta) -> None:
    """A constant may be infinite (a causal mask) or NaN; what training has made so is :class:`NotFinite`."""
    for name, value in local.buffers.items():
        if not (value.is_floating_point() or value.is_complex()) or value.isfinite().all():
            continue
        if not (value.isfinite() | unchanged(value, base.buffers[name].to(value.device))).all():
            raise NotFinite(
                f"training has made values of the buffer {name} infinite or NaN; the learning rate may be "
                "too high"
            )


def check_same_model(theta: Path, ours: Theta) -> None:
    """Is theta in that file, the parameter server's, of the model that was built here? Raises
    :class:`ModelError`, which says what differs.
    """
    with TensorFile(theta) as file:
        problem = difference(file.specs, ours.specs())
    if problem:
        raise ModelError(
            "the parameter server has built another model than this worker: its theta does not fit here, "
            f"{problem}; install the same versions of torch (here {torch.__version__}), transformers and of "
            "the model's own code on all workers"
        )

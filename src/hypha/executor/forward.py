"""From the columns of a batch to a loss: which column is which argument, of which type, and the labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from hypha.config.tasks import ALIASES
from hypha.errors import DataError, ModelError
from hypha.messages import ModelSpec

_LABELS = ("labels", "label")


class Forward:
    """Calls a model on columns and returns its loss."""

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        self._spec = spec
        self._causal = ALIASES.get(spec.task, spec.task) == "causal-lm"
        signature = inspect.signature(model.forward).parameters
        self._names = [
            name
            for name, parameter in signature.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        self._own_loss = spec.loss is None

    def loss(self, model: nn.Module, columns: Mapping[str, Tensor]) -> Tensor:
        """Raises :class:`DataError` when the columns do not suit the model."""
        arguments, labels = self.arguments(columns)
        if self._own_loss and labels is not None:
            if "labels" not in self._names:
                raise ModelError("the model's forward takes no labels; the job must name a loss")
            arguments["labels"] = labels
        output = model(**arguments)
        if self._spec.loss is not None:
            if labels is None:
                raise DataError(f"the loss {self._spec.loss} needs a column labels, or inputs must name it")
            return loss_of(self._spec.loss, _logits(output), labels)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise ModelError("the model's forward returned no loss; the job must name one")
        return loss

    def arguments(self, columns: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
        """What forward gets by keyword, and the labels."""
        mapping = self._spec.inputs or self._mapping(columns)
        found: dict[str, Tensor] = {}
        for argument, column in mapping.items():
            if column not in columns:
                raise DataError(f"the dataset has no column {column}; it has {', '.join(sorted(columns))}")
            found[argument] = columns[column]
        labels = found.pop("labels", None)
        if labels is None and self._causal and "input_ids" in found:
            labels = found["input_ids"].long()
            if "attention_mask" in found:
                labels = labels.masked_fill(found["attention_mask"] == 0, -100)
        if labels is not None and not labels.is_floating_point():
            labels = labels.long()
        return {name: _model_dtype(name, value) for name, value in found.items()}, labels

    def _mapping(self, columns: Mapping[str, Tensor]) -> dict[str, str]:
        mapping = {name: name for name in self._names if name in columns and name != "labels"}
        if label := next((name for name in _LABELS if name in columns), None):
            mapping["labels"] = label
        inputs = [name for name in self._names if name != "labels"]
        others = [name for name in columns if name not in _LABELS]
        if not mapping.keys() - {"labels"} and len(inputs) == 1 and len(others) == 1:
            mapping[inputs[0]] = others[0]
        if not mapping.keys() - {"labels"}:
            raise DataError(
                f"none of the columns {', '.join(sorted(columns))} is an argument of the model "
                f"({', '.join(self._names)}); the job's input names must say which is which"
            )
        return mapping


def _model_dtype(argument: str, value: Tensor) -> Tensor:
    # slices keep tokens and pixels as small as they are; embeddings and convolutions want these
    if argument == "pixel_values" and not value.is_floating_point():
        return value.float().div_(255.0)
    if argument.endswith("_ids") and not value.is_floating_point():
        return value.long()
    return value


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise ModelError(f"the model returned a {type(output).__name__} in which no logits can be found")
    return logits


def loss_of(kind: str, output: Tensor, labels: Tensor) -> Tensor:
    """The mean loss. Cross-entropy takes classes on the last axis when the others are those of the labels,
    else on the second, as torch has it.
    """
    if kind == "cross-entropy":
        if not labels.is_floating_point() and output.shape[:-1] == labels.shape:
            return functional.cross_entropy(output.flatten(0, -2), labels.flatten())
        return functional.cross_entropy(output, labels)
    target = labels.to(output.dtype)
    if output.shape != target.shape:
        if output.numel() != target.numel():
            raise DataError(f"labels of shape {list(labels.shape)} do not fit {list(output.shape)} outputs")
        target = target.view(output.shape)
    if kind == "mse":
        return functional.mse_loss(output, target)
    if kind == "l1":
        return functional.l1_loss(output, target)
    return functional.binary_cross_entropy_with_logits(output, target)

"""From the columns of a batch to a loss: which column is which argument, of which type, and the labels.

Slices keep numbers as the user had them: tokens as small integers, pixels as bytes, floats in half precision.
Here they become what the model and its loss need. What a name, the configuration or the loss do not say is
found out with the first batch: a model that does not take integers as they are gets them as ``int64``, then
as floats.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hypha.config.tasks import A_LABEL_A_PLACE, ALIASES, IGNORED, ONE_LABEL_A_ROW
from hypha.errors import DataError, ModelError
from hypha.messages import ModelSpec

_LABELS = ("labels", "label")
#: how torch says that a tensor is of the wrong type
_WRONG_TYPE = re.compile(
    r"dtype|scalar type|should be the same|not implemented for|can't be cast|indices must be|type LongTensor"
    r"|floating point",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Types:
    """What becomes of integers, and of labels, whose type nothing else decides; ``None``: they stay."""

    inputs: torch.dtype | None = None
    labels: torch.dtype | None = None


_TRIED = (
    _Types(),
    _Types(inputs=torch.int64),
    _Types(inputs=torch.float32),
    _Types(labels=torch.float32),
    _Types(labels=torch.int64),
    _Types(torch.int64, torch.float32),
    _Types(torch.float32, torch.float32),
)


class Forward:
    """Calls a model on columns and returns its loss."""

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        self._spec = spec
        task = ALIASES.get(spec.task, spec.task)
        self._causal = task == "causal-lm"
        signature = inspect.signature(model.forward).parameters
        #: the arguments that the model's forward names
        self.names = [
            name
            for name, parameter in signature.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        #: it takes others, too (``**kwargs``)
        self.takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in signature.values())
        self._own_loss = spec.loss is None
        config = getattr(model, "config", None)
        #: of labels of rows: how many a model tells apart, and which of transformers' problems that is
        self._counted: int | None = None
        self._problem: str | None = None
        #: that a label may be one of; None where that is not known, or labels are no classes
        self.classes: int | None = None
        if self._own_loss and task in A_LABEL_A_PLACE:
            self.classes = getattr(config, "num_labels", None)
        elif self._own_loss and task in ONE_LABEL_A_ROW and config is not None:
            self._counted = getattr(config, "num_labels", None)
            self._problem = getattr(config, "problem_type", None)
            if self._problem is None and self._counted == 1:
                self._problem = "regression"
            if self._problem not in ("regression", "multi_label_classification"):
                self.classes = self._counted
        #: found out with the first batch
        self._types: _Types | None = None

    def loss(self, model: nn.Module, columns: Mapping[str, Tensor]) -> Tensor:
        """Raises :class:`DataError` when the columns do not suit the model."""
        if self._types is not None:
            return self._loss(model, columns, self._types)
        first: Exception | None = None
        for types in _TRIED:
            try:
                with _untouched_on_failure(model):
                    loss = self._loss(model, columns, types)
            except (RuntimeError, TypeError, IndexError, DataError) as exc:
                if first is None and not _WRONG_TYPE.search(str(exc)):
                    raise
                first = first or exc
            else:
                self._types = types
                return loss
        assert first is not None
        raise first

    def logits(self, model: nn.Module, columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the model says of the rows, and their labels. Raises :class:`DataError` when the columns do
        not suit the model, or have no labels.
        """
        if self._types is None:
            self.loss(model, columns)
        assert self._types is not None
        arguments, labels = self._typed(columns, self._types)
        if labels is None:
            raise DataError("the dataset has no column of labels to compare with (--input labels=NAME)")
        if self._own_loss:
            arguments["labels"] = labels
        return _logits(model(**arguments)), labels

    def terms(self, columns: Mapping[str, Tensor]) -> int:
        """Over how much the loss of these rows is a mean: labels that count where labels are classes, of
        texts those of the next token; else rows. The gradients of a batch's parts add up to its own in these
        proportions. Raises :class:`DataError` when the columns do not suit the model.
        """
        rows = len(next(iter(columns.values())))
        if not rows:
            return 0
        _, labels = self.arguments(columns)
        if labels is None or labels.is_floating_point() or labels.dtype == torch.bool:
            return rows
        if self._own_loss and self._causal and labels.dim() > 1:
            # the label of a place is that of the place after it
            labels = labels[:, 1:]
        return int((labels != IGNORED).sum())

    def check(self, columns: Mapping[str, Tensor]) -> None:
        """Raises :class:`DataError` for labels that the loss would take without complaint, though they mean
        nothing to it. ``columns`` are on the CPU.
        """
        mapping = self._spec.inputs or {"labels": next((name for name in _LABELS if name in columns), "")}
        labels = columns.get(mapping.get("labels", ""))
        if labels is None:
            return
        # of what is no probability the loss would be something else
        probable = self._spec.loss == "bce-with-logits" or self._problem == "multi_label_classification"
        if probable and labels.numel() and labels.dtype != torch.bool:
            low, high = (float(value) for value in torch.aminmax(labels))
            if low < 0 or high > 1:
                what = self._spec.loss or self._problem
                raise DataError(
                    f"the labels run from {low:g} to {high:g}, but {what} takes 0 to 1; for classes by "
                    "number set model.loss to cross-entropy, or problem_type to single_label_classification"
                )

    def _brought(self, labels: Tensor) -> Tensor:
        """``labels`` as the loss needs them. Raises :class:`DataError` when they mean something else."""
        if self._spec.loss in ("mse", "l1", "bce-with-logits"):
            return labels.float()
        if self._spec.loss == "cross-entropy" or self._counted is None:
            # of floats the loss itself decides: they may be a class's probabilities, or a target
            return labels.float() if labels.is_floating_point() else labels.long()
        many = labels.dim() == 2 and labels.shape[1] > 1
        problem = self._problem
        if problem is None:
            problem = "multi_label_classification" if many else "single_label_classification"
        if problem == "regression":
            return labels.float()
        if problem == "multi_label_classification":
            if labels.dim() != 2 or labels.shape[1] != self._counted:
                have = f"{labels.shape[1]} columns" if many else "one number a row"
                raise DataError(
                    f"the labels have {have}, but with several labels a row (problem_type {problem}) the "
                    f"model wants {self._counted}, each 0 or 1: set model.arguments num_labels to the number "
                    "of columns, or problem_type to single_label_classification"
                )
            return labels.float()
        if labels.is_floating_point():
            labels = whole(labels, self._counted)
        return labels.long()

    def _loss(self, model: nn.Module, columns: Mapping[str, Tensor], types: _Types) -> Tensor:
        arguments, labels = self._typed(columns, types)
        if self._own_loss and labels is not None:
            if "labels" not in self.names:
                raise ModelError("the model's forward takes no labels; the job must name a loss (model.loss)")
            arguments["labels"] = labels
        output = model(**arguments)
        if self._spec.loss is not None:
            if labels is None:
                raise DataError(f"the loss {self._spec.loss} needs a column labels, or inputs must name it")
            logits = _logits(output)
            if self._spec.loss == "cross-entropy" and labels.shape != logits.shape:
                self.classes = logits.shape[-1 if logits.shape[:-1] == labels.shape else 1]
            return loss_of(self._spec.loss, logits, labels)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise ModelError("the model's forward returned no loss; the job must name one (model.loss)")
        return loss

    def _typed(self, columns: Mapping[str, Tensor], types: _Types) -> tuple[dict[str, Tensor], Tensor | None]:
        arguments, labels = self.arguments(columns)
        if types.inputs is not None:
            arguments = {name: _converted(name, value, types.inputs) for name, value in arguments.items()}
        if types.labels is not None and labels is not None:
            to_class = types.labels == torch.int64 and labels.is_floating_point()
            labels = whole(labels) if to_class else labels.to(types.labels)
        return arguments, labels

    def arguments(self, columns: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
        """What forward gets by keyword, and the labels."""
        mapping = self._spec.inputs or self.used(columns)
        found: dict[str, Tensor] = {}
        for argument, column in mapping.items():
            if column not in columns:
                raise DataError(f"the dataset has no column {column}; it has {', '.join(sorted(columns))}")
            found[argument] = columns[column]
        labels = found.pop("labels", None)
        if labels is None and self._causal and "input_ids" in found:
            labels = found["input_ids"].long()
            # padding is marked even for a model that does not look at the mask
            mask = found.get("attention_mask", columns.get("attention_mask"))
            if mask is not None and mask.shape == labels.shape:
                labels = labels.masked_fill(mask == 0, -100)
        if labels is not None:
            labels = self._brought(labels)
        return {name: _model_type(name, value) for name, value in found.items()}, labels

    def used(self, columns: Mapping[str, Tensor]) -> dict[str, str]:
        """Which column becomes which argument, where the job does not say it. Raises :class:`DataError`."""
        mapping = {name: name for name in self.names if name in columns and name != "labels"}
        if label := next((name for name in _LABELS if name in columns), None):
            mapping["labels"] = label
        inputs = [name for name in self.names if name != "labels"]
        others = [name for name in columns if name not in _LABELS]
        if not mapping.keys() - {"labels"} and len(inputs) == 1 and len(others) == 1:
            mapping[inputs[0]] = others[0]
        if not mapping.keys() - {"labels"}:
            raise DataError(
                f"none of the columns {', '.join(sorted(columns))} is an argument of the model "
                f"({', '.join(self.names)}); the job's input names must say which is which "
                "(model.input_names)"
            )
        return mapping


def pixels(value: Tensor) -> Tensor:
    """Pixels as models take them: floats, and bytes from 0 to 1."""
    return value.float() if value.is_floating_point() else value.float().div_(255.0)


def _model_type(argument: str, value: Tensor) -> Tensor:
    # slices keep tokens and pixels as small as they are; embeddings and convolutions want these
    if argument == "pixel_values":
        return pixels(value)
    if value.is_floating_point():
        return value.float()
    return value.long() if _is_index(argument) else value


def _is_index(argument: str) -> bool:
    return argument.endswith("_ids")


def _converted(argument: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    keeps = value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
    return value if keeps or _is_index(argument) else value.to(dtype)


@contextmanager
def _untouched_on_failure(model: nn.Module) -> Iterator[None]:
    """A batch that is tried must leave no trace, so that a replay gets the same numbers: neither in torch's
    generators nor in the model's buffers.
    """
    generator = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    buffers = [
        (module, key, value, value.clone())
        for module in model.modules()
        for key, value in module._buffers.items()
        if value is not None
    ]
    try:
        yield
    except BaseException:
        torch.set_rng_state(generator)
        if devices:
            torch.cuda.set_rng_state_all(devices)
        with torch.no_grad():
            for module, key, value, copy in buffers:
                module._buffers[key] = value
                if not torch.equal(value, copy):
                    value.copy_(copy)
        raise


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


def whole(labels: Tensor, classes: int | None = None) -> Tensor:
    """Classes that are kept as floats, as whole numbers. Raises :class:`DataError` when they are none."""
    if not torch.equal(labels, labels.round()):
        told = (
            f"the model chooses among {classes} classes" if classes else "cross-entropy chooses among classes"
        )
        raise DataError(
            f"the labels are no whole numbers (the first is {float(labels.flatten()[0]):g}), but {told}; for "
            "regression set model.arguments num_labels = 1, or model.loss to mse"
        )
    return labels.long()


def loss_of(kind: str, output: Tensor, labels: Tensor) -> Tensor:
    """The mean loss. Cross-entropy takes classes on the last axis when the others are those of the labels,
    else on the second, as torch has it; of labels in the outputs' shape it takes probabilities.
    """
    if kind == "cross-entropy":
        return _cross_entropy(output, labels)
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


def _cross_entropy(output: Tensor, labels: Tensor) -> Tensor:
    if labels.shape == output.shape and output.dim() > 1:
        # one column a class: one-hot, or probabilities
        return functional.cross_entropy(output, labels.to(output.dtype))
    if labels.is_floating_point():
        labels = whole(labels)
    if labels.dim() == output.dim() and labels.shape[-1] == 1 and labels.shape[:-1] == output.shape[:-1]:
        labels = labels.squeeze(-1)
    if output.shape[:-1] == labels.shape:
        return functional.cross_entropy(output.flatten(0, -2), labels.flatten())
    return functional.cross_entropy(output, labels)

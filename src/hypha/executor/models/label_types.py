"""Labels as a loss needs them: whole numbers for classes, floats for regression and for several
labels a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hypha.config.tasks import ALIASES, ONE_LABEL_A_ROW
from hypha.config.tasks import IGNORED as IGNORED
from hypha.errors import DataError
from hypha.messages import ModelSpec


class LabelTypes:
    """What the loss of a job wants of its labels. ``config`` is the model's configuration,
    where it has one.
    """

    def __init__(self, spec: ModelSpec, config: Any) -> None:
        self._loss = spec.loss
        self._problem: str | None = None
        self._counted: int | None = None
        if spec.loss is None and ALIASES.get(spec.task, spec.task) in ONE_LABEL_A_ROW and config is not None:
            self._counted = getattr(config, "num_labels", None)
            self._problem = getattr(config, "problem_type", None)
            if self._problem is None and self._counted == 1:
                self._problem = "regression"

    @property
    def classes(self) -> int | None:
        """How many classes a row's label may be of; None where that is not known, or labels are
        no classes.
        """
        return None if self._problem in ("regression", "multi_label_classification") else self._counted

    def brought(self, labels: Tensor) -> Tensor:
        """``labels`` as the loss needs them. Raises :class:`DataError` when they mean something else."""
        if self._loss in ("mse", "l1", "bce-with-logits"):
            return labels.float()
        if self._loss == "cross-entropy" or self._counted is None:
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
                    f"the labels have {have}, but with several labels a row (problem_type "
                    f"{problem}) the model wants {self._counted}, each 0 or 1: set model.arguments "
                    "num_labels "
                    "to the number of columns, or problem_type to single_label_classification"
                )
            return labels.float()
        if labels.is_floating_point():
            labels = whole(labels, self._counted)
        return labels.long()

    def check(self, labels: Tensor) -> None:
        """Labels, on the CPU, that are no probabilities make a loss of something else, without complaint:
        raises :class:`DataError`.
        """
        probable = self._loss == "bce-with-logits" or self._problem == "multi_label_classification"
        if probable and labels.numel() and labels.dtype != torch.bool:
            low, high = (float(value) for value in torch.aminmax(labels))
            if low < 0 or high > 1:
                what = self._loss or self._problem
                raise DataError(
                    f"the labels run from {low:g} to {high:g}, but {what} takes 0 to 1; for classes by "
                    "number set "
                    "model.loss to cross-entropy, or problem_type to single_label_classification"
                )


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

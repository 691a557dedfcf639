"""What checks compare and find: what a model's ``config.json`` states of its inputs and labels, as far as it
is known without building the model, and what is wrong, in words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hypha.config.tasks import task_of
from hypha.errors import Problem
from hypha.messages import Column

#: where the keys of a job stand
JOB = "scheduler.job"
#: how many positions a model has, by the names that configurations give it
_POSITIONS = ("max_position_embeddings", "n_positions")
#: what transformers takes where config.json names neither labels nor their number
_DEFAULT_LABELS = 2


@dataclass(frozen=True)
class ModelDescription:
    """``None``: config.json does not state it. ``task`` is that of its architecture; ``image_size`` is
    (height, width); ``num_labels`` is of those tasks that have labels.
    """

    kind: str = ""
    task: str | None = None
    num_labels: int | None = None
    problem_type: str | None = None
    vocab_size: int | None = None
    positions: int | None = None
    channels: int | None = None
    image_size: tuple[int, int] | None = None


def describe_model(described: Mapping[str, object], arguments: Mapping[str, object]) -> ModelDescription:
    """From the content of config.json, as the job's ``model.arguments`` change it."""
    # of models of images and texts, what the text is made of stands one level further in
    text = described.get("text_config")
    layers = [arguments, described, *([text] if isinstance(text, Mapping) else [])]

    def number(*names: str) -> int | None:
        found = (layer.get(name) for layer in layers for name in names)
        return next((one for one in found if isinstance(one, int) and not isinstance(one, bool)), None)

    def words(name: str) -> str | None:
        return next((found for layer in layers[:2] if isinstance(found := layer.get(name), str)), None)

    return ModelDescription(
        kind=words("model_type") or "",
        task=task_of(described.get("architectures")),
        num_labels=_labels(described, arguments),
        problem_type=words("problem_type"),
        vocab_size=number("vocab_size"),
        positions=number(*_POSITIONS),
        channels=number("num_channels"),
        image_size=_size(next((layer["image_size"] for layer in layers if "image_size" in layer), None)),
    )


def _labels(described: Mapping[str, object], arguments: Mapping[str, object]) -> int:
    if isinstance(given := arguments.get("num_labels"), int):
        return given
    if isinstance(names := described.get("id2label"), Mapping):
        return len(names)
    given = described.get("num_labels")
    return given if isinstance(given, int) else _DEFAULT_LABELS


def _size(given: object) -> tuple[int, int] | None:
    if isinstance(given, int):
        return (given, given)
    if isinstance(given, list | tuple) and len(given) == 2:
        height, width = given
        if isinstance(height, int) and isinstance(width, int):
            return (height, width)
    return None


@dataclass(frozen=True)
class PreflightFinding(Problem):
    """Without ``error`` it is advice. ``refutable``: a batch that passes the model proves that it is none."""

    error: bool = True
    refutable: bool = False


def printable(finding: PreflightFinding) -> PreflightFinding:
    """The same on one line, with nothing that controls a terminal: peers choose the names of columns."""
    text = "".join(one if one.isprintable() else "\ufffd" for one in finding.message)
    return replace(finding, message=text)


def described(columns: Mapping[str, Column]) -> str:
    """Columns as people read them: ``labels I64, pixel_values F32 [1, 8, 8]``."""
    return ", ".join(
        f"{one.name} {one.dtype}" + (f" {list(one.shape)}" if one.shape else "")
        for one in sorted(columns.values(), key=lambda one: one.name)
    )


def number(value: float) -> str:
    """Whole numbers with all their digits; what a peer states need not be finite."""
    return f"{value:.0f}" if math.isfinite(value) and value == int(value) else f"{value:g}"

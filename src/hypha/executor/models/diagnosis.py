"""Why a batch cannot be trained on, in one line that says what to change.

What torch says of a label or a token that is out of range names neither the column nor the key of the job.
The columns of the batch and the model's configuration tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hypha.config.tasks import IGNORED
from hypha.messages import ModelSpec

_CHANNELS = re.compile(r"to have (\d+) channels, but got (\d+) channels")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length")
_LABELS = ("labels", "label")
#: how configurations of models of pixels call the class that their loss leaves out
_LEFT_OUT = ("semantic_loss_ignore_index", "loss_ignore_index")


def explain(
    exc: Exception, model: nn.Module, spec: ModelSpec, columns: Mapping[str, Tensor], classes: int | None
) -> str:
    """One line about ``exc``, which a batch of ``columns`` (on the CPU) gave. ``classes``: of the labels, if
    known.
    """
    config = getattr(model, "config", None)
    batch, columns = columns, _as_arguments(spec, columns)
    told = " ".join(str(exc).split())
    for found in (
        _labels(columns, classes, spec, config, told),
        _tokens(columns, model, config, told),
        _positions(columns, config, told),
        _padding(told),
        _channels(told, columns, config),
        _image_size(columns, config, told),
        _arguments(told),
    ):
        if found:
            return found
    return f"the batch cannot be trained on: {type(exc).__name__}: {told}; its columns are {described(batch)}"


def out_of_range(
    model: nn.Module, spec: ModelSpec, columns: Mapping[str, Tensor], classes: int | None
) -> str | None:
    """One line about labels or tokens of a batch that the model cannot have. An accelerator says so much
    later than it should, without words, and is of no use afterwards.
    """
    columns = _as_arguments(spec, columns)
    config = getattr(model, "config", None)
    return _labels(columns, classes, spec, config, "") or _tokens(columns, model, config, "")


def _as_arguments(spec: ModelSpec, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {argument: columns[column] for argument, column in spec.inputs.items() if column in columns}
    return {**columns, **named}


def described(columns: Mapping[str, Tensor]) -> str:
    """Names, types and shapes."""
    return ", ".join(
        f"{name} {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        for name, value in sorted(columns.items())
    )


def _range(value: Tensor) -> tuple[int, int] | None:
    if not value.numel() or value.is_floating_point() or value.is_complex():
        return None
    low, high = torch.aminmax(value.long())
    return int(low), int(high)


def _labels(
    columns: Mapping[str, Tensor], classes: int | None, spec: ModelSpec, config: Any, told: str
) -> str | None:
    labels = next((columns[name] for name in _LABELS if name in columns), None)
    if labels is None or labels.is_floating_point():
        return None
    if classes is None and "out of bounds" in told and (found := _range(labels)):
        return (
            f"the labels run from {found[0]} to {found[1]}, but the model has fewer outputs ({told}); number "
            "the classes from 0, and give the model as many outputs as there are classes (model.arguments)"
        )
    if classes is None:
        return None
    labels = labels.long()
    for ignored in (IGNORED, *(getattr(config, name, None) for name in _LEFT_OUT)):
        if ignored is not None:
            labels = labels[labels != ignored]
    found = _range(labels)
    if found is None or (found[0] >= 0 and found[1] < classes):
        return None
    low, high = found
    text = f"the labels of a batch run from {low} to {high}, but the model has {classes} classes"
    text += f", 0 to {classes - 1}"
    if low < 0:
        return f"{text}; number the classes from 0 when preparing the dataset ({IGNORED} would be left out)"
    if low > 0 and high - low < classes:
        return f"{text}; number the classes from 0 when preparing the dataset"
    if spec.task == "torch":
        return f"{text}; give it as many outputs as there are classes, {high + 1} at least (model.arguments)"
    return f"{text}; set model.arguments num_labels to the number of classes, {high + 1} at least"


def _tokens(columns: Mapping[str, Tensor], model: nn.Module, config: Any, told: str) -> str | None:
    rows = getattr(config, "vocab_size", None)
    named = [name for name in columns if name.endswith("input_ids")]
    if not isinstance(rows, int):
        if "out of range" not in told:
            return None
        # a model of its own: its first table is that of the tokens
        tables = (one for one in model.modules() if isinstance(one, nn.Embedding))
        rows, named = next((one.num_embeddings for one in tables), None), list(columns)
    for name in named:
        found = _range(columns[name]) if name not in _LABELS else None
        if rows is None or found is None or (found[0] >= 0 and found[1] < rows):
            continue
        return (
            f"the column {name} holds token ids from {found[0]} to {found[1]}, but the model's vocabulary "
            f"has {rows}; prepare the dataset with the model's own tokenizer, or, of a model from scratch, "
            f"set model.arguments vocab_size = {found[1] + 1}"
        )
    return None


def _positions(columns: Mapping[str, Tensor], config: Any, told: str) -> str | None:
    if not any(words in told for words in ("out of range", "size of tensor", "expand", "assert")):
        return None
    longest = next((getattr(config, name) for name in _POSITIONS if hasattr(config, name)), None)
    ids = columns.get("input_ids")
    if not isinstance(longest, int) or ids is None or ids.dim() != 2 or ids.shape[1] <= longest:
        return None
    return (
        f"the rows have {ids.shape[1]} tokens, but the model has positions for {longest}; prepare the "
        f"dataset with --sequence-length {longest} or less"
    )


def _padding(told: str) -> str | None:
    if "padding token" not in told and "pad_token" not in told:
        return None
    return (
        "the model needs to know which token is padding; set model.arguments pad_token_id (often that of "
        f"eos_token_id): {told}"
    )


def _channels(told: str, columns: Mapping[str, Tensor], config: Any) -> str | None:
    found = _CHANNELS.search(told)
    pixels = columns.get("pixel_values")
    wanted, got = (int(found[1]), int(found[2])) if found else (getattr(config, "num_channels", None), None)
    if got is None and pixels is not None and pixels.dim() == 4:
        got = pixels.shape[1]
    if wanted is None or got is None or wanted == got:
        return None
    return (
        f"the images have {got} channel(s), but the model takes {wanted}; prepare them with {wanted}, or, of "
        f"a model from scratch, set model.arguments num_channels = {got}"
    )


def _image_size(columns: Mapping[str, Tensor], config: Any, told: str) -> str | None:
    size, pixels = getattr(config, "image_size", None), columns.get("pixel_values")
    if size is None or pixels is None or pixels.dim() != 4 or "size" not in told:
        return None
    wanted = [size, size] if isinstance(size, int) else list(size)
    if list(pixels.shape[2:]) == wanted:
        return None
    return (
        f"the images are {pixels.shape[2]}x{pixels.shape[3]}, but the model takes {wanted[0]}x{wanted[1]}; "
        "prepare them in that size, or, of a model from scratch, set model.arguments image_size"
    )


def _arguments(told: str) -> str | None:
    if "missing" not in told or "positional argument" not in told:
        return None
    return (
        f"the model's forward wants more than the dataset's columns give it ({told}); say with "
        "model.input_names which column is which argument"
    )

"""A source's weight files: which of them can be read, and whether they were the model's when they were
loaded.

A model is trained from scratch only where its source holds no weights at all. Weights in a form that is not
read, a missing shard, keys with a prefix that the model lacks: each is a :class:`ModelError` that names files
or keys, because weights that are silently not used look like a model that learns badly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hypha.decoding import decode_json
from hypha.errors import ModelError, Undecodable

#: what ``from_pretrained`` reads, first choice first
_PRETRAINED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: what a model of the task ``torch`` reads
_TORCH = ("model.safetensors",)
_INDEX = ".index.json"
_SUFFIXES = frozenset(
    (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz")
)
#: of those suffixes, what a training program keeps beside the weights
_STATE = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "random_states")
_LFS = b"version https://git-lfs"
#: parts of a pretrained body that its publishers often left out, as pretraining did not use them
_OPTIONAL = frozenset(("pooler", "masked_spec_embed"))
#: names of tensors or files in one message
_SHOWN = 4


class _Index(msgspec.Struct):
    #: the file of each tensor
    weight_map: dict[str, str]


def is_weight_file(path: Path) -> bool:
    """Does the name say that it holds weights, a piece of them, an index of them or a trainer's state?"""
    return path.suffix in _SUFFIXES or path.name.endswith(_INDEX) or path.name in ("checkpoint", "latest")


def weight_file(source: Path, task: str) -> Path | None:
    """The file, or the index of shards, that holds the weights; None where the source has none.

    Raises :class:`ModelError` for weights that are there and cannot be read.
    """
    names = _TORCH if task == "torch" else _PRETRAINED
    found = next((source / name for name in names if (source / name).is_file()), None)
    if found is None:
        others = sorted(
            path.relative_to(source).as_posix()
            for path in source.rglob("*")
            if path.is_file() and is_weight_file(path) and not path.name.startswith(_STATE)
        )
        if others:
            raise ModelError(
                f"the model's source holds weights that are not read: {listed(others)}; a model of the task "
                f"{task} is read from {' or '.join(name for name in names if not name.endswith(_INDEX))}: "
                "convert them (save_pretrained, safetensors.torch.save_model), or leave them out of the "
                "source to train from scratch"
            )
        return None
    for path in (found, *_shards(found)):
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise ModelError(
                    f"{path.name} is a pointer of Git LFS, not the weights themselves; fetch them (git lfs "
                    "pull)"
                )
    return found


def _shards(file: Path) -> list[Path]:
    if not file.name.endswith(_INDEX):
        return []
    shards = sorted(set(_index(file).values()))
    if missing := [name for name in shards if not (file.parent / name).is_file()]:
        raise ModelError(
            f"{file.name} names {len(shards)} files of weights, of which the source lacks {listed(missing)}"
        )
    return [file.parent / name for name in shards]


def _index(file: Path) -> dict[str, str]:
    try:
        return decode_json(file.read_bytes(), _Index).weight_map
    except Undecodable as exc:
        raise ModelError(f"{file.name} is no index of weights: {exc}") from exc


def keys_in(file: Path) -> frozenset[str]:
    """The names of the tensors that a weight file, or an index of several, holds."""
    if file.name.endswith(_INDEX):
        return frozenset(_index(file))
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return frozenset(opened.keys())
        return frozenset(torch.load(file, map_location="meta", mmap=True, weights_only=True))
    except (SafetensorError, RuntimeError, OSError, ValueError) as exc:
        raise ModelError(f"{file.name} cannot be read: {exc}") from exc


def tie_in_doubt(model: nn.Module, file: Path) -> bool:
    """Does ``file`` hold two matrices, or more, for one that is tied in ``model``? Then only their values
    tell whether it is.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = [group for group in names.values() if len(group) > 1]
    if not tied:
        return False
    keys = keys_in(file)
    return any(sum(_holds(keys, name) for name in group) > 1 for group in tied)


def _holds(keys: Collection[str], name: str) -> bool:
    # transformers adds and drops the name of the base model
    return name in keys or any(name.endswith(f".{key}") or key.endswith(f".{name}") for key in keys)


def loading_notes(
    file: Path, info: Mapping[str, Iterable[object]], model: nn.Module, other_labels: bool
) -> list[str]:
    """What the user is to know of the weights of ``file`` in ``model``, one line each: a head that begins
    fresh, weights that are not used. ``info`` is what ``from_pretrained`` gives with ``output_loading_info``;
    ``other_labels``: the job has asked for a head of another size.

    Raises :class:`ModelError` when it is not only a head that the file does not give.
    """
    mismatched = sorted(str(one[0]) for one in info["mismatched_keys"] if isinstance(one, tuple))
    fresh = sorted({str(key) for key in info["missing_keys"]} | set(mismatched))
    unexpected = sorted({str(key) for key in info["unexpected_keys"]})
    if lost := [name for name in fresh if not _may_be_fresh(model, name)]:
        what = " have another shape there" if set(lost) <= set(mismatched) else " are not in it"
        text = f"{len(lost)} of {len(model.state_dict())} tensors{what} ({listed(lost)})"
        if unexpected:
            text += f", and {len(unexpected)} of its own are not used ({listed(unexpected)})"
        if prefix := _prefix(unexpected, model):
            text += (
                f"; its keys begin with {prefix!r}, which what the model was wrapped in has left: save the "
                "inner model's weights, or take the prefix off the keys"
            )
        else:
            text += (
                "; give the weights of the architecture that config.json (and model.arguments) describe, or "
                "leave the weights out of the source to train from scratch"
            )
        raise ModelError(f"{file.name} does not fit the model: {text}")
    if mismatched and not other_labels:
        raise ModelError(
            f"{file.name} does not fit config.json: {listed(mismatched)} have another shape there; for a "
            "head for other labels, which begins fresh, set model.arguments num_labels"
        )
    notes = []
    if fresh:
        notes.append(f"{file.name} does not give all of the model; fresh, from the seed: {listed(fresh)}")
    if unexpected:
        notes.append(f"the model has no use for {listed(unexpected)} of {file.name}")
    return notes


def _prefix(unexpected: list[str], model: nn.Module) -> str:
    """What the unexpected keys have in common before the name of a tensor of the model."""
    names = model.state_dict().keys()
    for key in unexpected:
        parts = key.split(".")
        for at in range(1, len(parts)):
            prefix = ".".join(parts[:at]) + "."
            found = ".".join(parts[at:])
            known = found in names or any(name.endswith(f".{found}") for name in names)
            if known and all(other.startswith(prefix) for other in unexpected):
                return prefix
    return ""


def _may_be_fresh(model: nn.Module, name: str) -> bool:
    """Is that a tensor of a head, which is trained for a task of its own, and not of the pretrained body?"""
    prefix = str(getattr(model, "base_model_prefix", ""))
    body = getattr(model, prefix, None) if prefix else None
    if not isinstance(body, nn.Module):
        return False
    if not name.startswith(f"{prefix}.") or name in dict(model.named_buffers()):
        return True
    return not _OPTIONAL.isdisjoint(name.split("."))


def listed(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    shown = list(names)[:_SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")

"""Models: from a task's name and a directory of files to an ``nn.Module``, a loss, and an export.

A Hugging Face task is one of :data:`hypha.config.tasks.TASKS`; the directory holds ``config.json`` and
perhaps weights, and without weights the model is built from its configuration with the job's seed. The task
``torch`` is any callable that returns a module. transformers is imported only for the tasks that need it.
"""

from __future__ import annotations

import importlib
import inspect
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional

from hypha.config.tasks import ALIASES, TASKS, unknown_task
from hypha.errors import DataError, ModelError
from hypha.messages import ModelSpec, PreprocessorSpec

_PREPROCESSORS = {
    "auto": "AutoProcessor",
    "feature": "AutoFeatureExtractor",
    "image": "AutoImageProcessor",
    "tokenizer": "AutoTokenizer",
    "video": "AutoVideoProcessor",
}

#: files of a source that belong to its model wherever it goes, beside weights and configuration
_COMPANIONS = (
    "*preprocessor_config.json",
    "processor_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*.py",
)
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_LABELS = ("labels", "label")


def build(spec: ModelSpec, source: Path | None, weights: bool = True) -> nn.Module:
    """The model in fp32, in training mode, with what no checkpoint gives initialised from ``spec.seed``.

    ``weights`` false skips the weights in ``source`` (theta is to come). Raises :class:`ModelError`.
    """
    if spec.task == "torch":
        model = _build_torch(spec, source if weights else None)
    else:
        model = _build_transformers(spec, source, weights)
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ModelError(f"the parameter {name} is {parameter.dtype}; parameters must be float32")
    return model.train()


def _build_torch(spec: ModelSpec, source: Path | None) -> nn.Module:
    if spec.entrypoint is None or spec.entrypoint.count(":") != 1:
        raise ModelError("a model of the task torch needs an entrypoint package.module:callable")
    module, name = spec.entrypoint.split(":")
    torch.manual_seed(spec.seed)
    try:
        target: Any = importlib.import_module(module)
        for part in name.split("."):
            target = getattr(target, part)
        model = target(**spec.arguments)
    except Exception as exc:
        raise ModelError(f"{spec.entrypoint} did not build a model: {type(exc).__name__}: {exc}") from exc
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec.entrypoint} returned a {type(model).__name__}, not a torch.nn.Module")
    if source is not None and (source / "model.safetensors").exists():
        try:
            load_model(model, source / "model.safetensors")
        except Exception as exc:
            raise ModelError(f"model.safetensors does not fit {spec.entrypoint}: {exc}") from exc
    return model


def _build_transformers(spec: ModelSpec, source: Path | None, weights: bool) -> nn.Module:
    auto = auto_class(spec.task)
    if source is None or not (source / "config.json").exists():
        raise ModelError(f"a model of the task {spec.task} needs a source with a config.json")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(spec.seed)
    # passed on only when the job says so; whether it may is the worker's decision, taken before
    remote = {"trust_remote_code": True} if spec.trust_remote_code else {}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **remote)
        _override(config, spec.arguments)
        if weights and has_weights(source):
            # a head for other labels is a fresh one; anything else must fit
            fresh_head = "num_labels" in spec.arguments
            model = auto.from_pretrained(
                source, config=config, dtype=torch.float32, ignore_mismatched_sizes=fresh_head, **remote
            )
        else:
            model = auto.from_config(config, dtype=torch.float32, **remote)
    except ModelError:
        raise
    except Exception as exc:
        raise ModelError(f"{auto.__name__} cannot load the model: {type(exc).__name__}: {exc}") from exc
    return _checked(model)


def _override(config: object, arguments: Mapping[str, object]) -> None:
    """Change the model's configuration. Only what it has: ``from_pretrained`` takes arguments that a job
    has no business with.
    """
    for name, value in arguments.items():
        if name.startswith("_") or not hasattr(config, name):
            raise ModelError(f"model.arguments: the model's configuration has no {name!r}")
        setattr(config, name, value)


def _checked(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(f"transformers returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def auto_class(task: str) -> Any:
    """transformers' class for a task. Raises :class:`ModelError` for one that nobody knows."""
    name = TASKS.get(ALIASES.get(task, task))
    if name is None:
        raise ModelError(unknown_task(task) or f"the task {task} has no class in transformers")
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        raise ModelError(f"transformers {transformers.__version__} has no {name} for the task {task}")
    return found


def has_weights(source: Path) -> bool:
    """Does the directory hold a model's weights?"""
    return any(any(source.glob(pattern)) for pattern in _WEIGHTS)


def directory_of(files: Iterable[Path]) -> Path:
    """The directory of a fetched source: where its ``config.json`` is, else the only one there is."""
    paths = sorted(files, key=lambda path: len(path.parts))
    if not paths:
        raise ModelError("the model's source holds no files")
    return next((path.parent for path in paths if path.name == "config.json"), paths[0].parent)


def export(model: nn.Module, spec: ModelSpec, sources: Iterable[Path], destination: Path) -> list[str]:
    """Write the model as users load it: ``from_pretrained(destination)``, or for ``torch`` the entrypoint's
    model and ``safetensors.torch.load_model``. Returns the files' names.
    """
    destination.mkdir(parents=True, exist_ok=True)
    for source in sources:
        for pattern in _COMPANIONS:
            for path in source.glob(pattern):
                shutil.copyfile(path, destination / path.name)
    if spec.task == "torch":
        save_model(model, str(destination / "model.safetensors"), metadata={"format": "pt"})
        description = {"task": "torch", "entrypoint": spec.entrypoint, "arguments": spec.arguments}
        (destination / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(description)))
    else:
        # one file: its name is part of what users load
        model.save_pretrained(destination, max_shard_size="1000GB")  # type: ignore[operator]
    return sorted(path.name for path in destination.iterdir() if path.is_file())


# --- from rows to a loss ------------------------------------------------------------------------------


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


# --- preprocessing ------------------------------------------------------------------------------------


class Preprocessor:
    """A Hugging Face preprocessor over the columns of a slice; it replaces those it consumes."""

    def __init__(self, spec: PreprocessorSpec, source: Path) -> None:
        import transformers

        self._spec = spec
        try:
            self._call = getattr(transformers, _PREPROCESSORS[spec.kind]).from_pretrained(source)
        except Exception as exc:
            message = f"the preprocessor cannot be loaded: {type(exc).__name__}: {exc}"
            raise ModelError(message) from exc

    def __call__(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        left = dict(columns)
        arguments: dict[str, list[object]] = {}
        for argument, column in self._spec.inputs.items():
            if column not in left:
                raise DataError(f"the preprocessor wants the column {column}, which the dataset lacks")
            arguments[argument] = _rows(argument, left.pop(column))
        options = {"padding": True, "truncation": True} if self._spec.kind == "tokenizer" else {}
        made = self._call(**arguments, **options, return_tensors="pt")
        return left | {name: value for name, value in made.items() if isinstance(value, Tensor)}


def _rows(argument: str, column: Tensor) -> list[object]:
    """Text is kept in slices as UTF-8 bytes, padded with zeros."""
    if argument.startswith("text") and column.dtype == torch.uint8 and column.dim() == 2:
        return [bytes(row.tolist()).rstrip(b"\0").decode() for row in column]
    return [row.numpy() for row in column]

"""Models: from a task's name and a directory of files to an ``nn.Module``, and to an export.

A Hugging Face task is one of :data:`hypha.config.tasks.TASKS`; the directory holds ``config.json`` and
perhaps weights, and without weights the model is built from its configuration with the job's seed. The task
``torch`` is any callable that returns a module. transformers is imported only for the tasks that need it.

The parameter server builds the model with its weights, trainers without: theta comes to them. Both must find
the same tensors. Where the weights hold two matrices for one that the configuration ties, only their values
tell whether it is one, so then trainers read them as well, and the decision is the same everywhere.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from hypha.config.tasks import A_LABEL_A_PLACE, ALIASES, ONE_LABEL_A_ROW, TASKS, unknown_task
from hypha.errors import ModelError
from hypha.executor.models.model_tensors import check_finite, settle
from hypha.executor.models.weights import is_weight_file, loading_notes, tie_in_doubt, weight_file
from hypha.messages import ModelSpec

#: files of a preprocessor's source that go with the model
_OF_PREPROCESSOR = (
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
#: files of the model's own source that are written anew, or are of another training
_NOT_OF_MODEL = frozenset(("config.json", "adapter_config.json", "trainer_state.json", "hypha.json"))

logger = logging.getLogger("hypha.executor.models")


def build(
    spec: ModelSpec, source: Path | None, weights: bool = True, tell: Callable[[str], None] = logger.warning
) -> nn.Module:
    """The model in fp32, in training mode, with what no checkpoint gives initialised from ``spec.seed``.

    ``weights`` false skips the weights in ``source`` (theta is to come). ``tell`` is told, one line each,
    what was chosen that the user may not have meant: a fresh head, weights that are not used, no weights at
    all. Raises :class:`ModelError`.
    """
    if spec.task == "torch":
        model = _build_torch(spec, source if weights else None, tell)
    else:
        model = _build_transformers(spec, source, weights, tell)
    settle(model)
    if weights:
        check_finite(model)
        for parameter in model.parameters():
            # this one is theta, which is handled in chunks; trainers keep their own layout
            parameter.data = parameter.data.contiguous()
    return model.train()


def skeleton(spec: ModelSpec, source: Path | None) -> nn.Module:
    """The model in training mode on torch's ``meta`` device: shapes and types, and no memory for numbers.
    Raises :class:`ModelError`, and whatever torch does where it cannot be built without numbers.
    """
    with torch.device("meta"):
        if spec.task == "torch":
            return _build_torch(spec, None, lambda note: None).train()
        auto, place = auto_class(spec.task), _configured(spec, source)
        try:
            config = _configuration(spec, place)
            return _from_config(auto, spec, config).train()
        except (ModelError, NotImplementedError, RuntimeError):
            raise
        except Exception as exc:
            raise ModelError(f"{auto.__name__} cannot load the model: {type(exc).__name__}: {exc}") from exc


def _configured(spec: ModelSpec, source: Path | None) -> Path:
    if source is None or not (source / "config.json").exists():
        raise ModelError(f"a model of the task {spec.task} needs a source with a config.json")
    return source


def _configuration(spec: ModelSpec, source: Path) -> Any:
    """The model's configuration as the job changes it. Raises what transformers does."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # said each time, as without a word transformers asks at the terminal; whether it may is the worker's
    # decision, taken before
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=spec.trust_remote_code)
    _override(config, spec.arguments)
    return config


def _from_config(auto: Any, spec: ModelSpec, config: Any) -> nn.Module:
    return _checked(auto.from_config(config, dtype=torch.float32, trust_remote_code=spec.trust_remote_code))


def _name_classes(config: Any, spec: ModelSpec) -> list[str]:
    """Call the classes of ``config`` as the dataset does, where nobody else has named them; what differs, in
    lines for the user.
    """
    names, task = spec.class_names, ALIASES.get(spec.task, spec.task)
    classes = getattr(config, "num_labels", None)
    if not names or task not in ONE_LABEL_A_ROW | A_LABEL_A_PLACE or not isinstance(classes, int):
        return []
    if getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        return []
    if classes != len(names):
        return [
            f"the model has {classes} classes and the dataset {len(names)}: the trained model calls them as "
            "its own config.json does (id2label)"
        ]
    own = [config.id2label.get(number) for number in range(classes)]
    if own == list(names):
        return []
    if own != [f"LABEL_{number}" for number in range(classes)]:
        number = next(number for number in range(classes) if own[number] != names[number])
        return [
            f"config.json calls class {number} {own[number]!r} and the dataset {names[number]!r}: the "
            "trained model keeps config.json's names (id2label); take them out to have the dataset's"
        ]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    return []


def _build_torch(spec: ModelSpec, source: Path | None, tell: Callable[[str], None]) -> nn.Module:
    if spec.entrypoint is None or spec.entrypoint.count(":") != 1:
        raise ModelError("a model of the task torch needs an entrypoint package.module:callable")
    torch.manual_seed(spec.seed)
    try:
        model = _entrypoint(spec.entrypoint)(**spec.arguments)
    except ModelError:
        raise
    except Exception as exc:
        raise ModelError(f"{spec.entrypoint} did not build a model: {type(exc).__name__}: {exc}") from exc
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec.entrypoint} returned a {type(model).__name__}, not a torch.nn.Module")
    if source is not None:
        file = weight_file(source, spec.task)
        if file is None:
            tell(f"the model's source holds no weights: {spec.entrypoint} is trained from scratch")
        else:
            try:
                load_model(model, file)
            except Exception as exc:
                raise ModelError(f"{file.name} does not fit {spec.entrypoint}: {exc}") from exc
    return model


def _entrypoint(text: str) -> Callable[..., Any]:
    """The class or function that ``text`` names. Raises :class:`ModelError` for what is none, or is defined
    in another package: whoever allows the code of one package does not allow all that it imports.
    """
    module, _, name = text.partition(":")
    target: Any = getattr(importlib.import_module(module), name)
    if not (inspect.isclass(target) or inspect.isroutine(target)):
        raise ModelError(f"{text} is a {type(target).__name__}; an entrypoint is a class or a function")
    package = module.partition(".")[0]
    defined = str(getattr(target, "__module__", None) or "")
    if defined.partition(".")[0] != package:
        raise ModelError(
            f"{text} is defined in {defined or 'no module'}, not in {package}; name it where it is defined"
        )
    return target


def _build_transformers(
    spec: ModelSpec, source: Path | None, weights: bool, tell: Callable[[str], None]
) -> nn.Module:
    auto, source = auto_class(spec.task), _configured(spec, source)
    try:
        config = _configuration(spec, source)
        for note in _name_classes(config, spec):
            tell(note)
        file = weight_file(source, spec.task)
        if file is None and weights:
            tell(
                f"the model's source holds no weights: it is trained from scratch, from the seed {spec.seed}"
            )
        if file is None or not weights:
            torch.manual_seed(spec.seed)
            model = _from_config(auto, spec, config)
        if file is not None and (weights or tie_in_doubt(model, file)):
            torch.manual_seed(spec.seed)
            loaded, info = auto.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                # what may be of another size is judged below
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=spec.trust_remote_code,
            )
            model = _checked(loaded)
            # a head for other labels is a fresh one; anything else must fit
            notes = loading_notes(file, info, model, other_labels="num_labels" in spec.arguments)
            for note in (*notes, *_untied(model)):
                if weights:
                    tell(note)
    except ModelError:
        raise
    except Exception as exc:
        raise ModelError(f"{auto.__name__} cannot load the model: {type(exc).__name__}: {exc}") from exc
    return model


def _untied(model: Any) -> list[str]:
    """Whoever loads the export is to find two matrices too, where the configuration says one and the weights
    hold two: says so in the model's configuration, and to the user.
    """
    text = model.config.get_text_config()
    if not getattr(text, "tie_word_embeddings", False):
        return []
    try:
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        # a model of images or sounds, which has none
        return []
    ours, theirs = getattr(inputs, "weight", None), getattr(outputs, "weight", None)
    if ours is None or theirs is None or ours is theirs or ours.shape != theirs.shape:
        return []
    text.tie_word_embeddings = model.config.tie_word_embeddings = False
    return [
        "config.json ties the output embeddings to the input embeddings, but the weights hold two different "
        "matrices: both are trained, and the export says tie_word_embeddings = false"
    ]


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


def directory_of(files: Iterable[Path]) -> Path:
    """The directory of a fetched source: where its ``config.json`` is, else the only one there is."""
    paths = sorted(files, key=lambda path: len(path.parts))
    if not paths:
        raise ModelError("the model's source holds no files")
    return next((path.parent for path in paths if path.name == "config.json"), paths[0].parent)


def export(
    model: nn.Module,
    spec: ModelSpec,
    source: Path | None,
    destination: Path,
    preprocessor: Path | None = None,
) -> list[str]:
    """Write the model as users load it: ``from_pretrained(destination)``, or for ``torch`` the entrypoint's
    model and ``safetensors.torch.load_model``. Returns the files' names, relative to ``destination``.

    All files of the model's own ``source`` go with it, below subdirectories too, but weights, what was
    written anew (``config.json``) and what is hidden: tokenizer, ``generation_config.json``, chat templates,
    its code, licence and model card, which say what the model is made from. Of ``preprocessor``
    go the preprocessor's files.
    """
    destination.mkdir(parents=True, exist_ok=True)
    if spec.task == "torch":
        save_model(model, str(destination / "model.safetensors"), metadata={"format": "pt"})
        description = {"task": "torch", "entrypoint": spec.entrypoint, "arguments": spec.arguments}
        (destination / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(description)))
    else:
        # one file: its name is part of what users load
        model.save_pretrained(destination, max_shard_size="1000GB")  # type: ignore[operator]
    if preprocessor is not None:
        for pattern in _OF_PREPROCESSOR:
            for path in preprocessor.glob(pattern):
                shutil.copyfile(path, destination / path.name)
    if source is not None:
        for path in source.rglob("*"):
            name = path.relative_to(source)
            hidden = any(part.startswith((".", "__pycache__")) for part in name.parts)
            if path.is_file() and not (hidden or name.as_posix() in _NOT_OF_MODEL or is_weight_file(path)):
                (destination / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, destination / name)
    return sorted(
        path.relative_to(destination).as_posix() for path in destination.rglob("*") if path.is_file()
    )

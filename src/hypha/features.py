"""What the code of a version of Hypha can do that another version may not: features, each a short name.

Nodes of several versions run together. A worker states its version and its features with every offer, a
scheduler states in its request which of them the job needs, and a worker that lacks one is not given the
job. What a job needs follows from its description alone (:func:`needs`). A peer that states no version is
older than this module, and has the features of :data:`BASELINE`.

Gateways and data nodes state theirs, too (:data:`SERVICES`), with their health and their manifests. Nothing
is refused for what they lack: it is shown, and said once, as somebody will wonder why it is not there.

Whoever adds to job descriptions a field, a value or a task that an executor must not ignore adds a feature
here, with ``baseline=False``; ``tests/test_features.py``, which lists what may be ignored, fails until that
is decided for each of them. A feature that is taken away leaves the list: other versions see from then on
that it is not there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import msgspec
from msgspec import Struct

from hypha import __version__
from hypha.messages import (
    MAX_VERSION_LENGTH,
    DatasetDescription,
    HealthReport,
    Job,
    WorkerOffer,
    WorkerRequest,
)


@dataclass(frozen=True)
class Feature:
    """``says`` completes "this version ...". A job needs it whose description has one of ``words`` (see
    :func:`words`); ``instead`` tells an operator what to leave out of the job to do without it.
    """

    name: str
    says: str
    words: tuple[str, ...]
    instead: str
    #: whether peers that state no version have it
    baseline: bool = True


def _both(word: str) -> tuple[str, str]:
    return f"train.{word}", f"aggregate.{word}"


FEATURES = (
    Feature(
        "torch-models",
        "builds plain PyTorch models with a function that is importable where the executor runs",
        _both("model.entrypoint"),
        "model.entrypoint",
    ),
    Feature(
        "served-files",
        "loads models and preprocessors that the scheduler serves",
        (*_both("model.source=peers"), *_both("preprocessor.source=peers")),
        "path of the model and of the preprocessor",
    ),
    Feature(
        "hub-files",
        "loads models and preprocessors from the Hugging Face hub",
        (*_both("model.source=huggingface"), *_both("preprocessor.source=huggingface")),
        "repository of the model and of the preprocessor",
    ),
    Feature(
        "remote-code",
        "runs the code of a model's repository where the worker's owner allows that",
        _both("model.trust_remote_code"),
        "model.trust_remote_code",
    ),
    Feature(
        "preprocessors",
        "runs a Hugging Face preprocessor over each slice",
        _both("preprocessor"),
        "the preprocessor",
    ),
    Feature(
        "named-losses",
        "computes the loss that the job names where the model returns none",
        _both("model.loss"),
        "model.loss",
    ),
    Feature(
        "multi-label",
        "brings labels of several classes a row to the floats that binary cross-entropy needs",
        (
            *_both("model.loss=bce-with-logits"),
            *_both("model.arguments.problem_type=multi_label_classification"),
        ),
        "the multi-label loss",
        baseline=False,
    ),
    Feature("fp16", "trains in mixed precision with fp16", ("train.precision=fp16",), 'precision = "fp16"'),
    Feature("bf16", "trains in mixed precision with bf16", ("train.precision=bf16",), 'precision = "bf16"'),
    Feature(
        "learning-rate-schedules",
        "follows cosine, linear and warmup-stable-decay schedules",
        ("train.schedule.kind",),
        "schedule.type",
    ),
    Feature(
        "gradient-clipping",
        "clips the norm of gradients",
        ("train.optimizer.max_grad_norm",),
        "inner_optimizer.max_grad_norm",
    ),
    Feature(
        "gradient-accumulation",
        "takes an optimizer step after several batches",
        ("train.gradient_accumulation",),
        "rounds.gradient_accumulation",
    ),
    Feature(
        "bf16-updates",
        "sends pseudo-gradients as bf16",
        ("train.update_encoding=bf16",),
        'update_encoding = "bf16"',
    ),
    Feature(
        "int8-updates",
        "sends pseudo-gradients as int8",
        ("train.update_encoding=int8",),
        'update_encoding = "int8"',
    ),
    Feature(
        "uniform-weighting",
        "gives each update the same weight, however many samples it stands for",
        ("aggregate.weighting=uniform",),
        'outer_optimizer.weighting = "uniform"',
    ),
    Feature(
        "update-norm-limit",
        "refuses updates whose norm is over the job's limit",
        ("aggregate.max_update_norm",),
        "outer_optimizer.max_update_norm",
    ),
    Feature(
        "checkpoint-places",
        "writes checkpoints to a path or an fsspec URL",
        ("aggregate.checkpoint.place",),
        "checkpoint.place",
    ),
)


@dataclass(frozen=True)
class Service:
    """What gateways or data nodes do since they have stated it. ``says`` completes "it ..."."""

    name: str
    kind: str
    says: str


SERVICES = (
    Service("finds-doubles", "gateway", "finds a certificate that is used on two machines at two gateways"),
    Service("bounds-all-peers", "gateway", "bounds what all peers together take of its memory"),
    Service("class-names", "data node", "says what the classes of a dataset are called"),
)
_KINDS = {"hypha-gateway": "gateway", "hypha-data": "data node"}

#: Names of all features of this version.
NAMES = tuple(feature.name for feature in FEATURES)
#: What peers that state no version can do.
BASELINE = frozenset(feature.name for feature in FEATURES if feature.baseline)

_SAYS = {one.name: one.says for one in (*FEATURES, *SERVICES)}


class Abilities(Struct, frozen=True):
    """What a node states of itself. Without a version it is older than versions were stated."""

    version: str = ""
    features: tuple[str, ...] = ()

    @property
    def known(self) -> Collection[str]:
        """All that it can do."""
        return self.features if self.version else BASELINE

    def lacks(self, needed: Collection[str]) -> tuple[str, ...]:
        """Which of ``needed`` it cannot do."""
        known = frozenset(self.known)
        return tuple(name for name in needed if name not in known)

    def __str__(self) -> str:
        return f"Hypha {printable(self.version)}" if self.version else "a version of Hypha that states none"


#: This node's.
OURS = Abilities(__version__, NAMES)


def stated(message: WorkerOffer | WorkerRequest | HealthReport | DatasetDescription) -> Abilities:
    """What the sender of ``message`` states of itself; a scheduler states no features."""
    return Abilities(message.version, () if isinstance(message, WorkerRequest) else message.features)


def features_of(component: str) -> tuple[str, ...]:
    """What a node of this version states, by its component: ``hypha-worker`` and so on."""
    if component == "hypha-worker":
        return NAMES
    return tuple(one.name for one in SERVICES if one.kind == _KINDS.get(component))


def kind_of(component: str) -> str:
    """``gateway`` or ``data node``; empty for another ``component``."""
    return _KINDS.get(component, "")


def missing_services(kind: str, abilities: Abilities) -> tuple[str, ...]:
    """What a ``gateway`` or a ``data node`` lacks of that which one of this version has."""
    return tuple(one.name for one in SERVICES if one.kind == kind and one.name not in abilities.features)


def needs(job: Job) -> tuple[str, ...]:
    """The features without which an executor cannot do ``job``, in the order of :data:`FEATURES`."""
    said = words(job)
    return tuple(feature.name for feature in FEATURES if not said.isdisjoint(feature.words))


def words(job: Job) -> frozenset[str]:
    """What ``job`` asks for: the dotted path of every field that is not as by default, and of strings and
    tagged values also ``path=value`` and ``path=tag``, such as ``train.precision=fp16``.
    """
    return frozenset(_words(str(job.__struct_config__.tag), job))


def _words(path: str, value: object) -> Iterator[str]:
    if isinstance(value, Struct):
        for field in msgspec.structs.fields(value):
            found = getattr(value, field.name)
            if found is not None and found != default_of(field):
                yield from _field(f"{path}.{field.name}", found)
    elif isinstance(value, dict):
        for key, found in value.items():
            yield from _field(f"{path}.{key}", found)


def _field(path: str, value: object) -> Iterator[str]:
    yield path
    if isinstance(value, str):
        yield f"{path}={value}"
    elif isinstance(value, Struct):
        tag = value.__struct_config__.tag
        if tag is not None:
            yield f"{path}={tag}"
    yield from _words(path, value)


def default_of(field: msgspec.structs.FieldInfo) -> object:
    """What a message without this field says; ``NODEFAULT`` of a field that must be there."""
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


def advice(lacking: Collection[str]) -> str:
    """How an operator gets a worker that lacks these to do the job."""
    instead = {feature.name: feature.instead for feature in FEATURES}
    without = " and ".join(instead[name] for name in lacking if name in instead)
    upgrade = f"upgrade it to Hypha {__version__} or later"
    return f"{upgrade}, or leave {without} out of the job" if without else upgrade


def in_words(lacking: Collection[str]) -> str:
    """``multi-label (a version with it brings labels ...)``; names that nobody here knows stand alone."""
    return ", ".join(
        f"{name} (a version with it {_SAYS[name]})" if name in _SAYS else printable(name) for name in lacking
    )


def printable(text: str) -> str:
    """``text`` of a peer, fit for a line of a log or a cell of a table."""
    short = text if len(text) <= MAX_VERSION_LENGTH else f"{text[: MAX_VERSION_LENGTH - 3]}..."
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in short)

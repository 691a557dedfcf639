"""The keys of a job: model, data, rounds, optimizers, whom it asks for, and where its figures go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hypha.config.offers import MAX_PRICE, ResourcesConfig
from hypha.config.section import PathOrUrl, Section

#: samples in a batch of a job that says nothing about it, on workers whose offer says nothing either
DEFAULT_BATCH_SIZE = 16
#: the training executor that comes with Hypha
DEFAULT_EXECUTOR = "diloco-transformer"
#: near the best outer learning rate and momentum that were measured, from 8 rounds to 200 (docs/defaults.md)
OUTER_LEARNING_RATE, OUTER_MOMENTUM = 1.0, 0.6
#: number of rounds -> the momentum of a job that has no more than these: it is over before momentum pays
#: back, which takes some 1 / (1 - momentum) rounds
FEW_ROUNDS = {1: 0.0, 3: 0.3, 5: 0.5}


class ModelConfig(Section):
    """Exactly one of ``path`` (a local directory, served to the workers by the scheduler),
    ``repository`` (Hugging Face) and ``entrypoint`` (plain PyTorch, with ``type = "torch"``).
    """

    type: str
    """the task, as in the name of its class in transformers: causal-lm of AutoModelForCausalLM,
    image-classification, sequence-classification, masked-lm ...; torch for an entrypoint
    """
    path: Path | None = None
    repository: str | None = None
    revision: str = "main"
    filenames: list[str] = []
    token: str | None = None
    entrypoint: str | None = None
    arguments: dict[str, str | int | float | bool | None] = {}
    """of the entrypoint; else changes of the model's config.json, such as num_labels for a fresh head"""
    input_names: dict[str, str] | list[str] = {}
    """model argument -> dataset column; a list means columns of the same names"""
    loss: Literal["cross-entropy", "mse", "l1", "bce-with-logits"] | None = None
    """cross-entropy, mse, l1 or bce-with-logits, for a model whose forward takes no labels; not set: the
    model's own
    """
    seed: int = 0
    trust_remote_code: bool = False


class PreprocessorConfig(Section):
    """A Hugging Face preprocessor; ``path`` or ``repository`` as for the model."""

    type: Literal["auto", "feature", "image", "tokenizer", "video"]
    """auto, feature, image, tokenizer or video"""
    path: Path | None = None
    repository: str | None = None
    revision: str = "main"
    filenames: list[str] = []
    token: str | None = None
    input_names: dict[str, str] | list[str] = {}


class DatasetRef(Section):
    """The dataset by the name it is announced under."""

    dataset: str
    manifest_hash: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """of the manifest, in hex, as `hypha-data verify` and data nodes say it: other data under the name is not
    used; ``None``: that of the job's ledger, or what most data nodes serve
    """
    shuffle: bool = True
    organizations: list[str] = []
    """only data nodes of these organisations, as their CAs are called, and those of ``data_nodes``"""
    data_nodes: list[str] = []
    """only these data nodes (PeerIDs), and those of ``organizations``"""
    wait_s: float | None = Field(default=60.0, gt=0)
    """give up (exit code 3) when nobody has served it for so many seconds after the start"""


class RoundsConfig(Section):
    """How many rounds, and how long each is: ``avg_samples_between_updates`` samples over all workers,
    or, with ``inner_steps`` (DiLoCo's fixed H), that many optimizer steps a worker, each of
    ``gradient_accumulation`` batches.
    """

    update_rounds: int = Field(default=100, ge=1)
    avg_samples_between_updates: int | None = Field(default=None, ge=1)
    inner_steps: int | None = Field(default=None, ge=1)
    max_batch_size: int = Field(default=64, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    """fixed batch size; ``None``: 16, and where resources.worker says what one sample needs and a worker
    offers twice as much or more (offer.strategy = "whole"), as many as fit; at most ``max_batch_size``
    """
    grow_batch_size: bool = False
    """without ``batch_size``: let each worker's batches grow to ``max_batch_size`` samples, doubled from
    round to round, while they fit into its memory and make it faster. Larger batches train otherwise
    """
    micro_batch_size: int | None = Field(default=None, ge=1)
    """rows of a batch that go through the model at a time, on each device; the gradients of the rest are
    added to theirs, so that the batch stays what it is. ``None``: all, and where they do not fit into
    memory half as many, until they do
    """
    gradient_accumulation: int = Field(default=1, ge=1)
    """batches an optimizer step"""
    quorum: float = Field(default=1.0, gt=0, le=1)
    """share of the members' updates with which a round may be closed after ``grace_s``"""
    grace_s: float = Field(default=10.0, ge=0)
    deadline_s: float = Field(default=60.0, gt=0)
    """a round is closed at the latest this long after its projected end"""


class InnerOptimizerConfig(Section):
    """AdamW."""

    learning_rate: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float | None = Field(default=None, gt=0)


class OuterOptimizerConfig(Section):
    """Nesterov momentum over what the workers have changed in a round (DiLoCo)."""

    learning_rate: float | None = Field(default=None, gt=0)
    """``None``: 1"""
    momentum: float | None = Field(default=None, ge=0, lt=1)
    """``None``: 0.6, and less in a job of 5 update_rounds or fewer, which is over before momentum pays back
    (docs/defaults.md)
    """
    weighting: Literal["samples", "uniform"] = "samples"
    max_update_norm: float | None = Field(default=None, gt=0)
    """an update with a larger norm is scaled down to it; ``None``: ``max_update_ratio`` decides"""
    max_update_ratio: float | None = Field(default=10.0, gt=1)
    """an update whose norm is so many times the median of those of the last rounds is scaled down to that;
    ``None``: never
    """


def outer_defaults(rounds: int) -> tuple[float, float]:
    """Learning rate and momentum for a job of ``rounds`` rounds of which nothing is set."""
    few = [momentum for most, momentum in FEW_ROUNDS.items() if rounds <= most]
    return OUTER_LEARNING_RATE, few[0] if few else OUTER_MOMENTUM


def outer_values(config: OuterOptimizerConfig, rounds: int) -> tuple[float, float]:
    """Learning rate and momentum of a job of ``rounds`` rounds: what is set stays as it is, and what is not
    is chosen.
    """
    rate, momentum = outer_defaults(rounds)
    return (
        rate if config.learning_rate is None else config.learning_rate,
        momentum if config.momentum is None else config.momentum,
    )


class ScheduleConfig(Section):
    """Learning rate over inner steps."""

    type: Literal["constant", "cosine-with-warmup", "linear-with-warmup", "wsd"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    training_steps: int = Field(default=0, ge=0)
    decay_steps: int = Field(default=0, ge=0)


class PriceConfig(Section):
    """``bid`` is published, ``max`` is private: dearer offers are not taken."""

    bid: float = Field(default=1.0, ge=0, le=MAX_PRICE)
    max: float = Field(default=1.0, ge=0, le=MAX_PRICE)
    raise_after_s: float | None = Field(default=10.0, ge=0.1)
    """while workers are missing, the published bid is raised each time so many seconds have passed, up to
    ``max``; once none is missing it is ``bid`` again. ``None``: it stays
    """
    raise_by: float = Field(default=0.25, gt=0, le=1)
    """of the way from ``bid`` to ``max``, how much at a time"""


class NeedsConfig(ResourcesConfig):
    """What a job needs of a worker: cores, and GB of the rest."""

    memory: float = Field(default=1.0, ge=0)
    storage: float = Field(default=0.0, ge=0)


class JobResourcesConfig(Section):
    """Whom to ask for. Where workers offer more than is asked for, ``worker.gpu`` (else ``worker.memory``) is
    what one sample of a batch needs, see ``rounds.batch_size``.
    """

    num_workers: int = Field(default=2, ge=1)
    min_workers: int | None = Field(default=None, ge=1)
    """start and go on with at least this many; ``None``: ``num_workers``"""
    start_grace_s: float = Field(default=5.0, ge=0)
    """with ``min_workers`` ready the start waits so long for the rest of ``num_workers``; who is later joins
    """
    executor_restarts: int = Field(default=2, ge=0)
    """a failed training executor is started again so often, with growing pauses, before its worker is
    replaced; counted anew with each applied round that holds its update
    """
    hang_s: float | None = Field(default=None, gt=0)
    """a training executor without a sign of life for so long is taken for hung, where that is less than its
    worker's own ``hang_s``; longer than the longest batch
    """
    load_s: float | None = Field(default=300.0, gt=0)
    """a worker that has not loaded the model after so long, or after three times what the quickest one
    needed, is replaced, once another one has; ``None``: it may take for ever
    """
    worker: NeedsConfig = NeedsConfig()
    parameter_server: NeedsConfig = NeedsConfig()
    worker_price: PriceConfig = PriceConfig()
    parameter_server_price: PriceConfig = PriceConfig()
    worker_executor: str = DEFAULT_EXECUTOR
    parameter_server_executor: str = "parameter-server"
    offer_deadline_s: float = Field(default=0.5, gt=0)
    """how long one request collects offers"""
    yield_after_s: float | None = Field(default=60.0, gt=0)
    """before it begins, a job with fewer than ``min_workers`` gives those back that other schedulers ask for,
    so long (up to twice) after it got the last one, and asks again later: two jobs that hold half each
    would wait for each other for ever. ``None``: it keeps them
    """
    wait_s: float | None = Field(default=None, gt=0)
    """give up when the pool is not full after this long; ``None``: wait, and say so"""


class CheckpointConfig(Section):
    """``place`` is ``scheduler`` (the scheduler's state directory), a path or an fsspec URL."""

    every_rounds: int = Field(default=10, ge=1)
    keep: int = Field(default=3, ge=1)
    place: Annotated[str, PathOrUrl(("scheduler",))] = "scheduler"
    replicas: int = Field(default=0, ge=0)
    """copies of each on workers that offer storage (``storage.checkpoints_gb``), with place = "scheduler"
    """


class JobConfig(Section):
    """The job: which model, on which data, for how long, on how many workers."""

    type: Literal["diloco"] = "diloco"
    name: str = "job"
    model: ModelConfig
    preprocessor: PreprocessorConfig | None = None
    dataset: DatasetRef
    rounds: RoundsConfig = RoundsConfig()
    inner_optimizer: InnerOptimizerConfig = InnerOptimizerConfig()
    outer_optimizer: OuterOptimizerConfig = OuterOptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    resources: JobResourcesConfig = JobResourcesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    precision: Literal["no", "fp16", "bf16"] = "no"
    update_encoding: Literal["none", "bf16", "int8"] = "none"
    """of what workers send for each round: bf16 halves it and int8 quarters it, with rounding; for lines on
    which sending takes longer than a tenth of a round
    """
    seed: int = 0
    check: Literal["full", "quick", "none"] = "full"
    """before anybody is leased: full compares the dataset with the model and tries a batch on it, in a child
    process of some seconds; quick only compares what both say of themselves; none checks nothing
    """
    output: Annotated[str, PathOrUrl()]
    """a directory, an fsspec URL or ``hf://<repository>``"""
    output_token: str | None = None
    """token for an ``hf://`` output"""


class SinkConfig(Section):
    """Where the figures of each round go, for researchers. All but http need an extra of the same name, such
    as `pip install 'hypha-train[wandb]'`.
    """

    type: Literal["tensorboard", "trackio", "wandb", "aim", "http"]
    project: str = "hypha"
    name: str | None = None
    """the run's name there; ``None``: the job's"""
    directory: Path | None = None
    """where the tool keeps what it writes; ``None``: ``<state_dir>/<job>/sinks/<type>``"""
    url: str | None = None
    """a server of the tool's; of http, what answers POST <url>/status (the status bridge of the Rust Hypha)
    """
    token: str | None = Field(default=None, repr=False)
    """the server's key or token; never logged or shown"""
    offline: bool = False
    """of wandb: nothing is sent, `wandb sync` does that later"""

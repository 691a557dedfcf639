"""Descriptions of jobs, what they refer to, and the requests that start, stop and try them."""

from __future__ import annotations

from typing import Literal

from hypha.messages.data import Column, ColumnRange
from hypha.messages.values import ExecutorClass, ExecutorDescriptor, Id, Message, PeerRef, Value


class Uri(Message, tag="uri"):
    """An http(s) address."""

    value: str


class HuggingFace(Message, tag="huggingface"):
    """Files of a repository on the Hugging Face hub; all files when ``filenames`` is empty."""

    repository: str
    revision: str = "main"
    filenames: tuple[str, ...] = ()
    token: str | None = None


class Peers(Message, tag="peers"):
    """Named things at peers: ``resource`` is ``model`` (the model directory that a scheduler serves),
    ``checkpoint/<round>``, ``update``, ``theta``, ``export``.
    """

    peers: tuple[PeerRef, ...]
    strategy: Literal["all", "random", "one"] = "one"
    resource: str | None = None


class SchedulerData(Message, tag="scheduler"):
    """The next slice of ``dataset`` that the scheduler ``peer`` assigns."""

    peer: str
    dataset: str


class Local(Message, tag="local"):
    """A path on the worker, or any fsspec URL the worker can open."""

    url: str


Reference = Uri | HuggingFace | Peers | SchedulerData | Local

Scalar = str | int | float | bool | None


class ModelSpec(Value):
    """The model of a job.

    ``task`` is one of the Hugging Face tasks in ``hypha.config.tasks`` (``image-classification``,
    ``causal-lm`` ...) with files from ``source`` (weights optional: without them the model is built
    from ``config.json`` with ``seed``), or ``torch``: then ``entrypoint`` is ``package.module:callable``,
    importable where the executor runs and allowed by the worker's owner, called with ``arguments``, which
    for the other tasks change ``config.json`` (another ``num_labels`` gives a fresh head). ``inputs`` maps
    model argument -> dataset column (empty: same names). ``loss`` is needed by models whose forward returns
    no ``loss``. ``class_names`` are those of the dataset's labels, for the export of a parameter server.
    """

    task: str
    source: Reference | None = None
    entrypoint: str | None = None
    arguments: dict[str, Scalar] = {}
    inputs: dict[str, str] = {}
    loss: Literal["cross-entropy", "mse", "l1", "bce-with-logits"] | None = None
    seed: int = 0
    trust_remote_code: bool = False
    class_names: tuple[str, ...] = ()


class PreprocessorSpec(Value):
    """A Hugging Face preprocessor run over each slice before training."""

    kind: Literal["auto", "feature", "image", "tokenizer", "video"]
    source: Reference
    #: preprocessor argument -> dataset column it consumes
    inputs: dict[str, str] = {}


class InnerOptimizer(Value):
    """AdamW (Loshchilov & Hutter 2019)."""

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float | None = None


class OuterOptimizer(Value):
    """Nesterov momentum over pseudo-gradients (DiLoCo, Douillard et al. 2023)."""

    learning_rate: float = 0.7
    momentum: float = 0.9


class LrSchedule(Value):
    """Learning-rate schedule over *inner* steps; WSD is warmup-stable-decay (Hu et al. 2024)."""

    kind: Literal["constant", "cosine-with-warmup", "linear-with-warmup", "wsd"] = "constant"
    warmup_steps: int = 0
    training_steps: int = 0
    decay_steps: int = 0


class Traced(Value):
    """That a job is traced: ``traceparent`` is the W3C context of its dispatch, ``ratio`` the share of its
    rounds whose traces are sampled. An executor of a job without it records no spans.
    """

    traceparent: str
    ratio: float


class TrainJob(Message, tag="train"):
    """What a training executor is to do. ``me`` is its own worker's PeerID.

    ``steps`` is the number of inner steps taken by earlier generations, for the learning-rate schedule. An
    executor that gives no sign of life for ``hang_s`` may be taken for hung (see :class:`Alive`), but only
    sooner than by its worker's own rule. Its worker trains on nothing that is not in the manifest of
    ``manifest_hash``.
    """

    job_id: Id
    generation: int
    executor: ExecutorDescriptor
    me: str
    scheduler: PeerRef
    parameter_server: PeerRef
    model: ModelSpec
    dataset: str
    batch_size: int
    preprocessor: PreprocessorSpec | None = None
    optimizer: InnerOptimizer = InnerOptimizer()
    schedule: LrSchedule = LrSchedule()
    gradient_accumulation: int = 1
    #: rows of a batch that go through the model at a time; None: all, or as many as fit into memory
    micro_batch_size: int | None = None
    #: to how many rows the executor may let its batches grow, from round to round; None: they stay
    most_batch_size: int | None = None
    precision: Literal["no", "fp16", "bf16"] = "no"
    shuffle: bool = True
    seed: int = 0
    steps: int = 0
    update_encoding: Literal["none", "bf16", "int8"] = "none"
    hang_s: float | None = None
    traced: Traced | None = None
    manifest_hash: str = ""


class CheckpointPolicy(Value):
    """``place`` is ``scheduler`` (kept in the scheduler's state directory), a path or an fsspec URL."""

    every_rounds: int = 10
    keep: int = 3
    place: str = "scheduler"


class AggregateJob(Message, tag="aggregate"):
    """What a parameter server is to do. It starts at ``round`` from the model, or from ``restore``.
    ``slice_rows`` are those of each slice of the dataset: an update of rows that do not exist is refused.
    """

    job_id: Id
    generation: int
    executor: ExecutorDescriptor
    me: str
    scheduler: PeerRef
    model: ModelSpec
    preprocessor: PreprocessorSpec | None = None
    optimizer: OuterOptimizer = OuterOptimizer()
    weighting: Literal["samples", "uniform"] = "samples"
    max_update_norm: float | None = None
    #: without ``max_update_norm``: how many times the median norm of recent updates one may have before it is
    #: scaled down to that (:mod:`hypha.executor.outer.admission`)
    max_update_ratio: float | None = None
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    round: int = 0
    restore: Reference | None = None
    traced: Traced | None = None
    slice_rows: tuple[int, ...] = ()


Job = TrainJob | AggregateJob


class DispatchJob(Message):
    """Start this job's executor under that lease. Idempotent by lease and job id; with ``instead_of`` it
    replaces the executor of that incarnation, however far that one has got with its end.
    """

    lease_id: Id
    job: Job
    instead_of: Id = ""


class CancelJob(Message):
    """Stop the executor of this job of this class; the lease stays."""

    job_id: Id
    kind: ExecutorClass


class Trial(Value):
    """Has a child process of the scheduler try a batch on the model of ``job`` before anybody is leased.

    ``model`` and ``preprocessor`` are directories with their files, where there are any; ``weights`` says
    whether the model's are among them. The batch has ``rows`` rows of ``columns``, with the smallest and the
    largest numbers of ``ranges``.
    """

    job: TrainJob
    model: str | None
    preprocessor: str | None
    weights: bool
    columns: tuple[Column, ...]
    ranges: tuple[ColumnRange, ...]
    rows: int


class TrialReport(Value):
    """What came of a :class:`Trial`. ``failed``: any worker would fail, because of ``reason``; ``unknown``:
    it could not be tried, because of ``reason``. ``shapes_only``: the model is too large to be built just for
    this, so it had no numbers. ``notes`` are sentences that the user should read.
    """

    outcome: Literal["passed", "failed", "unknown"]
    reason: str = ""
    parameters: int = 0
    shapes_only: bool = False
    notes: tuple[str, ...] = ()

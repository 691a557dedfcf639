"""The words every room shares: what travels between nodes, and between a worker and its executor.

All are msgspec Structs: MessagePack on the wire, JSON over an executor's bridge, the same shapes in
both. Tags are kebab-case in the field ``type``. Durations cross the wire, never wall-clock times.
Reports and directives are *level-triggered*: each states the whole of what it is about (counts so far
in the round, the plan for the round), so that a lost, repeated or reordered one does no harm.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

#: Version of every envelope; a node refuses another one as ``malformed``.
WIRE_VERSION = 1
#: Gossip topic on which schedulers ask for workers.
WORKER_TOPIC = "hypha/worker"

MAX_REQUEST_BYTES = 1 << 20
MAX_RESPONSE_BYTES = 10 << 20
#: An executor's event, as JSON. It goes to the scheduler in one request, beside its envelope, which also has
#: to take what the contributions of a thousand workers to one round take.
MAX_EVENT_BYTES = 512 << 10
#: What one update may say of what it stands for, as JSON: some five hundred slices.
MAX_CONTRIBUTION_BYTES = 32 << 10

#: Bounds of what a peer states of itself (:mod:`hypha.features`); a message beyond them is ``malformed``.
MAX_VERSION_LENGTH = 64
MAX_FEATURES = 256
#: A PeerID as text, and an address with two of them and a name: what is longer is no such thing, and telling
#: so would take time that grows with the square of its length.
MAX_PEER_ID_LENGTH = 128
MAX_ADDRESS_LENGTH = 512
#: Addresses of one peer: those of all its network interfaces, and through each of its gateways.
MAX_ADDRESSES_SENT = 128
#: Of a job, a lease, a request or an executor process. Others remember them.
MAX_ID_LENGTH = 256
Id = Annotated[str, Meta(max_length=MAX_ID_LENGTH)]
VersionName = Annotated[str, Meta(max_length=MAX_VERSION_LENGTH)]
FeatureNames = Annotated[
    tuple[Annotated[str, Meta(max_length=MAX_VERSION_LENGTH)], ...], Meta(max_length=MAX_FEATURES)
]

Addresses = Annotated[
    tuple[Annotated[str, Meta(max_length=MAX_ADDRESS_LENGTH)], ...], Meta(max_length=MAX_ADDRESSES_SENT)
]

#: The number of a node that runs, and of how many of them a gateway asks another one in one request.
MAX_INSTANCE_LENGTH = 256
MAX_NODE_RUNS = 500

#: Few, so that looking for a path among them costs little.
MAX_CERTIFICATES = 4
MAX_CERTIFICATE_BYTES = 16 << 10
CertificateChain = Annotated[
    tuple[Annotated[bytes, Meta(max_length=MAX_CERTIFICATE_BYTES)], ...], Meta(max_length=MAX_CERTIFICATES)
]

#: Of one :class:`MeasureBandwidth`, each way; the request with its envelope stays below MAX_REQUEST_BYTES.
MAX_MEASURED_BYTES = 1 << 19
#: Addresses that one :class:`DialBack` may name.
MAX_DIALLED_BACK = 8
#: Packages of which a node states the version it runs with.
MAX_PACKAGES = 32


def _kebab(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


class Message(Struct, frozen=True, tag=_kebab, tag_field="type", kw_only=True, omit_defaults=True):
    """A frozen, tagged struct."""


class Value(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A frozen struct that is part of messages."""


# --- who and what -----------------------------------------------------------------------------


class PeerRef(Value):
    """A peer and where it may be reached; ``addresses`` are multiaddrs, circuit addresses included."""

    peer: Annotated[str, Meta(max_length=MAX_PEER_ID_LENGTH)]
    addresses: Addresses = ()


class Resources(Value):
    """Amounts a worker has, a request needs or a lease reserves; GB for all but ``cpu`` (cores)."""

    cpu: float = 0.0
    memory: float = 0.0
    gpu: float = 0.0
    storage: float = 0.0


ExecutorClass = Literal["train", "aggregate"]


class ExecutorDescriptor(Value):
    """What kind of executor is wanted or offered, and its name (``diloco-transformer``)."""

    kind: ExecutorClass
    name: str


class JobStamp(Value):
    """Which job, which generation of it, which round: what fences off late and foreign messages.

    ``attempt``, of theta and of what depends on it: how often its receiver has begun the round anew
    (see :class:`SendModel`).
    """

    job_id: Id
    generation: int = 0
    round: int = 0
    attempt: int = 0


# --- references: where an executor's input comes from, where its output goes ---------------------


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


# --- job descriptions -----------------------------------------------------------------------------

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
    #: scaled down to that (:mod:`hypha.executor.outer.outliers`)
    max_update_ratio: float | None = None
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    round: int = 0
    restore: Reference | None = None
    traced: Traced | None = None
    slice_rows: tuple[int, ...] = ()


Job = TrainJob | AggregateJob


# --- directives: scheduler -> executor, through its worker ------------------------------------------


class Plan(Message):
    """For a training executor: in ``round``, synchronise after ``batches`` batches counted from the
    round's start (already passed: at once). ``None``: go on, the sync point is not known yet.
    """

    round: int
    batches: int | None = None


class Rejoin(Message):
    """The job goes on in another generation, ``generation``, after its parameter server or its scheduler was
    lost. Everybody reports again what it holds: a training executor ``Loaded`` and ``RoundStarted``; a
    parameter server the last ``RoundApplied``, ``ModelReady``, and each ``UpdateReceived`` of both rounds.

    For a training executor, ``parameter_server`` is where it is now; with ``resend`` it is a new one, which
    needs the open round's update. With ``start_over`` rounds were lost: what is held of them (theta, slices,
    the optimizer's state) is dropped, and theta of ``round`` comes; ``steps`` inner steps were taken before.
    """

    generation: int
    round: int
    steps: int = 0
    parameter_server: PeerRef | None = None
    resend: bool = False
    start_over: bool = False


class Members(Message):
    """For a parameter server: the workers whose updates count, complete each time.

    ``most_samples`` says for how many samples their updates of ``round`` may stand at most: a larger one is
    refused, and one of a worker that is not named in it waits for the next of these messages. Without
    ``round`` nothing is said about that. ``batch_sizes`` are those that the workers were told,
    ``most_batch_size`` what they may grow to (None: they do not grow, or an earlier version does not say).
    """

    peers: tuple[PeerRef, ...]
    round: int | None = None
    most_samples: dict[str, int] = {}
    batch_sizes: dict[str, int] = {}
    most_batch_size: int | None = None


class SendModel(Message):
    """For a parameter server: send theta of the current round to ``to`` (a joiner, or one left out).

    ``attempt`` counts how often ``to`` has to begin this round anew, because its update was refused: theta of
    a higher attempt is no repetition, even though it is the same.
    """

    to: PeerRef
    attempt: int = 0


class CloseRound(Message):
    """For a parameter server: apply the outer step of ``round`` to what was received (from anybody
    else it is refused as stale from now on), then send the new theta to all members.
    """

    round: int
    final: bool = False
    checkpoint: bool = False


class SaveCheckpoint(Message):
    """For a parameter server: save a checkpoint of the open round as it began (``round``, or a later one that
    it is in by now), unless that is done or under way.
    """

    round: int


class Export(Message):
    """For a parameter server: write the model as users load it and send its files to ``to``."""

    to: PeerRef


class Finish(Message):
    """The job is over (or stops): end cleanly with exit code 0."""

    reason: str = "done"


Directive = Plan | Rejoin | Members | SendModel | CloseRound | SaveCheckpoint | Export | Finish


# --- events: executor (or its worker) -> scheduler ----------------------------------------------------


class SliceRange(Value):
    """Rows ``start:stop`` of a slice in this epoch's order (shuffled by seed, epoch and slice)."""

    epoch: int
    slice: int
    start: int
    stop: int


class Contribution(Value):
    """What one update stands for: enough to compute it again (``hypha.executor.replay``).

    ``incarnation`` names the executor process (its optimizer state lives and dies with it);
    ``steps`` is its inner step count before this round's first step, ``finished`` the
    (epoch, slice) pairs whose last row is in here. ``restarts`` counts how often the process has begun
    a fresh optimizer, because a round went on without steps that it had taken. ``threads`` is what
    torch computed with: sums come out otherwise with another number, and Adam makes much of that.
    """

    round: int
    worker: str
    incarnation: Id
    samples: int
    batches: int
    batch_size: int
    steps: int
    ranges: tuple[SliceRange, ...]
    finished: tuple[tuple[int, int], ...] = ()
    loss: float = 0.0
    restarts: int = 0
    threads: int = 1
    #: of the round, as in :class:`SendModel`
    attempt: int = 0


class UpdateStatistics(Value):
    """What a parameter server measured of one update: its L2 norm, its cosine to the weighted mean of all
    updates of the round (estimated, see :mod:`hypha.executor.outer.agreement`; None where there is none, as
    of zeros), the size of its file, and what it was multiplied by before it was added, as it was larger than
    it may be (None: this version does not say). ``buffer_clips`` are the same for buffers that it moved too
    far.
    """

    worker: str
    norm: float = 0.0
    cosine: float | None = None
    size_bytes: int = 0
    clip: float | None = None
    buffer_clips: dict[str, float] | None = None


class Alive(Message):
    """Said by the executor to its worker, which keeps it to itself: the thread that does the work goes on,
    or has nothing to do (it waits for theta, a plan, data, updates). Every other event says so too. Who has
    said it once is to give a sign of life every second or so; silent for ``hang_s``, it is killed.
    """


class Loaded(Message):
    """A training executor has built its model and waits for theta."""

    incarnation: Id


class RoundStarted(Message):
    """A training executor runs on theta of ``round``, whose hash is ``theta``. ``batch_size``: how many rows
    its batches have in it, where they may grow (None: as many as its job says).
    """

    round: int
    theta: str
    attempt: int = 0
    batch_size: int | None = None


class Progress(Message):
    """Counts since the round's start. ``busy_s`` is time spent in batches, ``loss`` the latest mean
    over the batches since the previous report.
    """

    round: int
    batches: int
    samples: int
    busy_s: float
    loss: float
    learning_rate: float = 0.0
    attempt: int = 0


class UpdateSent(Message):
    """The update of a round is with the parameter server (acknowledged). Schedulers of earlier versions wait
    for it; those of this one learn of updates from the parameter server alone, and pass over it.
    """

    contribution: Contribution


class ModelReady(Message):
    """A parameter server holds theta of ``round``; it takes updates from now on. ``notes`` are lines for the
    user: what was chosen when the model was built (a fresh head, weights that are not used, no weights at
    all).
    """

    round: int
    theta: str
    parameters: int
    size_bytes: int
    notes: tuple[str, ...] = ()


class UpdateReceived(Message):
    """A parameter server accepted the update of ``worker`` for ``round``. ``contribution`` is what the file's
    header states, checked: all that the scheduler learns of the update, even if its worker is gone.
    """

    round: int
    worker: str
    samples: int
    contribution: Contribution | None = None


class UpdateRefused(Message):
    """A parameter server refused an update; ``code`` as in ``errors.REFUSALS``."""

    round: int
    worker: str
    code: str
    reason: str


class RoundApplied(Message):
    """The outer step of ``round`` is done; ``theta`` is the hash of theta of ``round + 1``.
    ``contributors`` in the order in which their updates were added, each after its ``UpdateReceived``;
    ``updates`` is what was measured of each. ``contributions``: only parameter servers of earlier versions,
    which do not report ``UpdateReceived`` again after a ``Rejoin``.
    """

    round: int
    theta: str
    contributors: tuple[str, ...]
    contributions: tuple[Contribution, ...] = ()
    update_norm: float = 0.0
    checkpoint: bool = False
    updates: tuple[UpdateStatistics, ...] = ()


class CheckpointSaved(Message):
    """A checkpoint from which ``round`` can be started is durable at ``place``."""

    round: int
    place: str


class Exported(Message):
    """All files of the trained model are with the scheduler, which acknowledged them."""

    round: int
    files: tuple[str, ...]


class ExecutorError(Message):
    """An executor cannot go on, and says why before it exits. ``kind``: ``model``, ``batch`` (model and data
    do not go together; the first line of ``message`` says what to change), ``data``, ``oom``, ``not-finite``,
    ``checkpoint`` (the one it was to restore is not there, or damaged), ``disk`` (it is full), ``internal``.
    """

    kind: str
    message: str


class ExecutorExited(Message):
    """Said by the worker, never the executor: the process ended. ``tail`` is its last output."""

    exit_code: int
    tail: str
    incarnation: Id = ""


Event = (
    Alive
    | Loaded
    | RoundStarted
    | Progress
    | UpdateSent
    | ModelReady
    | UpdateReceived
    | UpdateRefused
    | RoundApplied
    | CheckpointSaved
    | Exported
    | ExecutorError
    | ExecutorExited
)


# --- gossip -----------------------------------------------------------------------------------------


class WorkerRequest(Message):
    """A scheduler wants ``count`` more workers with ``resources`` each. Offers are to reach it within
    ``offer_within_s`` of hearing this. ``dataset`` lets a worker prefer what it has cached. ``version`` is
    the scheduler's, ``needs`` the features (:mod:`hypha.features`) without which a worker need not offer.
    """

    request_id: Id
    scheduler: PeerRef
    resources: Resources
    executor: ExecutorDescriptor
    count: int
    bid: float
    offer_within_s: float
    dataset: str | None = None
    version: VersionName = ""
    needs: FeatureNames = ()


# --- requests and responses (RPC) ---------------------------------------------------------------------


class Health(Message):
    """Are you well? Answered by every component."""


class SameCertificate(Message):
    """Another node uses the certificate of the one that is told so; it has come from ``address`` to
    ``gateway``, where it did not come to the one that tells it, and was turned away. Answered by every
    component.
    """

    address: str = ""
    gateway: Annotated[str, Meta(max_length=MAX_PEER_ID_LENGTH)] = ""


class NodeRun(Value):
    """A node that a gateway is connected with, for ``connected_s`` by now, or that asks to be let in, without
    it. ``instance`` is the number that the node states in its handshake.
    """

    peer: Annotated[str, Meta(max_length=MAX_PEER_ID_LENGTH)]
    instance: Annotated[str, Meta(max_length=MAX_INSTANCE_LENGTH)]
    address: Annotated[str, Meta(max_length=MAX_ADDRESS_LENGTH)] = ""
    connected_s: float | None = None


class FindDoubles(Message):
    """A gateway asks another: which of ``nodes`` are there as well, as other nodes with the same certificate
    that have been connected for longer and are alive?
    """

    nodes: Annotated[tuple[NodeRun, ...], Meta(max_length=MAX_NODE_RUNS)] = ()


#: In one answer: more say how many they are.
MAX_LISTED_PEERS = 1000


class ListPeers(Message):
    """Which nodes are connected with the gateway that is asked? With ``peer``: that one alone, and where it
    may be dialled.
    """

    peer: Annotated[str, Meta(max_length=MAX_PEER_ID_LENGTH)] = ""


class ListedPeer(Value):
    """A node that is connected with a gateway, by its certificate, and by which ``way``. ``addresses`` are
    what it says of itself.
    """

    peer: str
    name: str = ""
    organization: str = ""
    roles: tuple[str, ...] = ()
    way: Literal["direct", "relayed"] = "direct"
    round_trip_s: float | None = None
    addresses: tuple[str, ...] = ()


class DialBack(Message):
    """Can the caller be dialled at these addresses? Answered by gateways, which try those alone whose host is
    the IP address that a connection of the caller comes from: nobody has a third party dialled.
    """

    addresses: Annotated[
        tuple[Annotated[str, Meta(max_length=MAX_ADDRESS_LENGTH)], ...], Meta(max_length=MAX_DIALLED_BACK)
    ]


class MeasureBandwidth(Message):
    """How fast is the way between us? The answer to ``payload`` has ``reply_bytes`` bytes. Answered by every
    component, for one caller at a time and within a budget.
    """

    payload: Annotated[bytes, Meta(max_length=MAX_MEASURED_BYTES)] = b""
    reply_bytes: Annotated[int, Meta(ge=0, le=MAX_MEASURED_BYTES)] = 0


class WorkerOffer(Message):
    """A worker holds ``resources`` for the scheduler under a temporary lease of ``expires_in_s``. ``version``
    and ``features`` (:mod:`hypha.features`) are the worker's; without them it is older than these fields.
    """

    lease_id: Id
    request_id: Id
    worker: PeerRef
    resources: Resources
    price: float
    expires_in_s: float
    version: VersionName = ""
    features: FeatureNames = ()


class RenewLease(Message):
    """First renewal = acceptance."""

    lease_id: Id


class ReleaseLease(Message):
    """A courtesy: the resources may go to somebody else before the lease expires."""

    lease_id: Id


class WorkerLeaving(Message):
    """A worker tells a scheduler that it ends in ``left_s`` seconds, and with it what runs under its lease:
    until then the open round's update can be sent, and another worker looked for. Repeated once a second,
    each time with what is left. With ``left_s = 0`` the lease is handed back now: it is over at the worker. A
    scheduler older than this message refuses it, and notices the end as it ever did.
    """

    lease_id: str
    left_s: float
    reason: str = ""


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


class Steer(Message):
    """A directive for the executor of ``kind`` of a job; ``seq`` grows, an older one is ignored."""

    stamp: JobStamp
    kind: ExecutorClass
    seq: int
    directive: Directive


class ReportEvent(Message):
    """An event that must arrive (everything but ``Progress``), repeated until acknowledged.
    ``seq`` counts per job, kind and incarnation: the scheduler handles each once.
    """

    stamp: JobStamp
    kind: ExecutorClass
    incarnation: Id
    seq: int
    event: Event


class NextSlice(Message):
    """A worker asks for its next slice; the same ``seq`` gets the same answer again. ``cached`` lists
    slices of the dataset it holds. What it got for a ``seq`` before ``held_from`` it has dropped, unused
    rows and all, because it started over.
    """

    stamp: JobStamp
    incarnation: Id
    seq: int
    cached: tuple[int, ...] = ()
    held_from: int = 0


class DescribeDataset(Message):
    """Do you serve this dataset? Send its manifest."""

    dataset: str


class PullFile(Message):
    """A bulk transfer the other way round: please offer me that file. ``kind`` and ``name``:
    ``slice`` ``<dataset>/<index>``, ``model`` ``<file>``, ``checkpoint`` ``<round>/<file>``. Answered by
    the offer that is about to come under ``token`` (set by the bulk plane); the same token asks again how
    that goes.
    """

    kind: str
    name: str
    job_id: str | None = None
    token: Id = ""


class ListFiles(Message):
    """Which files has a directory-like resource (``model``, ``checkpoint/<round>``)?"""

    kind: str
    name: str = ""
    job_id: str | None = None


class CheckpointFile(Value):
    """A file of a checkpoint; ``name`` is relative to the checkpoint, ``blake3`` hex."""

    name: str
    size: int
    blake3: str


class CheckpointIndex(Value):
    """``index.json``: all files of the checkpoint from which ``round`` is started, and the generation of the
    job that saved it. ``signature`` (hex) is that of the scheduler which left a copy with a worker: by it the
    scheduler knows the copy again when it has lost its ledger (:mod:`hypha.scheduler.durable.copies`).
    """

    job_id: Id
    round: int
    files: tuple[CheckpointFile, ...]
    generation: int = 0
    signature: Annotated[str, Meta(max_length=256)] = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


_REPLICAS = "checkpoints/"


def replica_name(scheduler: str, job: str) -> str:
    """Under which name workers that keep copies of the scheduler's job are found, as a dataset is."""
    return f"{_REPLICAS}{scheduler}/{job}"


def is_replica_name(name: str) -> bool:
    """Whether ``name`` is one of :func:`replica_name`, and not that of a dataset."""
    return name.startswith(_REPLICAS)


class HoldCheckpoint(Message):
    """A scheduler asks a worker to keep a copy of a checkpoint of its job called ``job``. Of the job's other
    rounds only those of ``keep`` are to stay. Said again when the files that the answer misses were sent, in
    bulk (kind ``checkpoint``, name ``<round>/<file>``): with none missing the copy is complete.
    """

    stamp: JobStamp
    job: str
    index: CheckpointIndex
    keep: tuple[int, ...] = ()


class DropCheckpoints(Message):
    """No copy of that job's checkpoints is needed any more."""

    job_id: Id


class FindCheckpoints(Message):
    """Which copies of checkpoints of the caller's job called ``job`` are there?"""

    job: str


#: Files that come over TLS from whom they are of and go no further: they are checked for damage only.
QUICK_KINDS = frozenset({"update", "theta"})


class TransferMeta(Value):
    """What a bulk transfer carries. Hashes are hex, over the plain bytes.

    ``blake3`` says what a file is, wherever it comes from; an update needs none. What is of ``QUICK_KINDS``
    is checked by ``xxh3`` (XXH3, 128 bits), which takes a tenth of the processor's time or less.
    """

    kind: str
    name: str
    size: int
    blake3: str = ""
    stamp: JobStamp | None = None
    samples: int = 0
    #: with theta: the workers whose updates are in it
    contributors: tuple[str, ...] = ()
    encoding: Literal["none", "zstd"] = "none"
    xxh3: str = ""

    @property
    def checked(self) -> str:
        """The hash that the receiver checks."""
        return self.xxh3 if self.kind in QUICK_KINDS else self.blake3


class BulkOffer(Message):
    """I will send this. ``addresses``: where you may dial me for it. ``traceparent``: of which operation the
    transfer is part; over a connection that was kept an offer has no envelope that could say so.
    ``zstd_blocks``: I would compress single blocks, and say of each whether it is.
    """

    token: Id
    meta: TransferMeta
    addresses: Addresses
    traceparent: str | None = None
    zstd_blocks: bool = False


class BulkDial(Message):
    """My dial failed: please dial me for the transfer with this token."""

    token: Id
    addresses: Addresses


class Acknowledged(Message):
    """Done, or already done."""


class HealthReport(Message):
    """``component`` is ``hypha-worker`` and so on; ``details`` says more in words. ``features``
    (:mod:`hypha.features`): without them it is older than that field.

    The rest is for whoever looks for a fault, nothing is decided by it: ``time_s`` is the sender's time of
    day in seconds since 1970, the only one on the wire, ``seen_at`` (multiaddrs, the newest last) where
    direct connections of the caller come from as the sender sees it, and ``packages`` has the versions that
    it runs with.
    """

    healthy: bool
    component: str
    version: str
    peer: str
    uptime_s: float
    details: dict[str, str] = {}
    features: FeatureNames = ()
    time_s: float | None = None
    seen_at: Annotated[
        tuple[Annotated[str, Meta(max_length=MAX_ADDRESS_LENGTH)], ...], Meta(max_length=MAX_DIALLED_BACK)
    ] = ()
    packages: Annotated[
        dict[
            Annotated[str, Meta(max_length=MAX_VERSION_LENGTH)],
            Annotated[str, Meta(max_length=MAX_VERSION_LENGTH)],
        ],
        Meta(max_length=MAX_PACKAGES),
    ] = {}


class DialResult(Value):
    """What came of dialling ``address``: the PeerID of the node there, or why there is none."""

    address: str
    peer: str = ""
    reason: str = ""


class DialedBack(Message):
    """One result for each address that was asked for, in that order."""

    results: tuple[DialResult, ...]


class BandwidthMeasured(Message):
    """As many bytes as were asked for."""

    payload: bytes = b""


class PeerList(Message):
    """Those connected with a gateway, in order of their PeerIDs, and how many ``more`` there are."""

    peers: tuple[ListedPeer, ...] = ()
    more: int = 0


class LeaseRenewed(Message):
    """The lease now lives ``expires_in_s`` from when the answer was sent. ``contended``: other schedulers ask
    for what it holds, ``outranked``: one of them for longer than its owner. It is not ended for them.
    """

    lease_id: Id
    expires_in_s: float
    contended: bool = False
    outranked: bool = False


class SliceAssigned(Message):
    """Slice ``index`` of the dataset, in ``epoch``, from any of ``providers``. Up to ``ahead`` slices may be
    fetched before they are needed.
    """

    dataset: str
    index: int
    epoch: int
    samples: int
    size: int
    blake3: str
    providers: tuple[PeerRef, ...]
    ahead: int = 1


class NoSlice(Message):
    """Nothing to train on right now; ask again. ``reason`` says why."""

    retry_in_s: float
    reason: str


class SliceInfo(Value):
    """One slice of a manifest."""

    file: str
    samples: int
    size: int
    blake3: str


class Column(Value):
    """A column: dtype as safetensors spells it (``F32``, ``I64``), shape without the sample axis."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class ColumnRange(Value):
    """The smallest and the largest number of a column, over all samples. Without those that are -100, which
    no loss counts: there are ``ignored`` of them. ``whole``: all are whole numbers.
    """

    column: str
    low: float
    high: float
    whole: bool = True
    ignored: int = 0


class ClassNames(Value):
    """What the classes of a ``column`` are called: the first name is that of class 0, and so on."""

    column: str
    names: tuple[str, ...]


class Manifest(Value):
    """``manifest.json`` of a prepared dataset. ``ranges`` are empty, or lack columns, where nobody has looked
    (as in manifests of earlier versions); they follow from the slices, and are no part of the hash. Neither
    are ``labels``, which a data node takes from ``labels.json`` beside it.
    """

    name: str
    columns: tuple[Column, ...]
    slices: tuple[SliceInfo, ...]
    version: int = 1
    ranges: tuple[ColumnRange, ...] = ()
    labels: tuple[ClassNames, ...] = ()

    @property
    def samples(self) -> int:
        """Samples in all slices."""
        return sum(part.samples for part in self.slices)


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


class DatasetDescription(Message):
    """The manifest, and its hash: replicas are interchangeable when that is the same. ``version`` and
    ``features`` are the data node's; without them it is older than these fields.
    """

    manifest: Manifest
    manifest_hash: str
    version: VersionName = ""
    features: FeatureNames = ()


class FileList(Message):
    """Name, size and hash of each file of a resource."""

    files: tuple[TransferMeta, ...]


class CheckpointHeld(Message):
    """Names of the files that are still ``missing``; the copy is complete and durable when none is."""

    missing: tuple[str, ...] = ()


class CheckpointList(Message):
    """Complete copies, the newest round of each job first."""

    found: tuple[CheckpointIndex, ...] = ()


class BulkAnswer(Message):
    """Send from ``offset`` on; ``done`` when it is all here already. ``addresses``: dial me there."""

    offset: int
    addresses: Addresses
    done: bool = False
    #: not 0: others are served first; offer again, with the same token, after this long
    wait_s: float = 0.0


class DoublesFound(Message):
    """Those that are, each with its address there."""

    found: Annotated[tuple[NodeRun, ...], Meta(max_length=MAX_NODE_RUNS)] = ()


class RefusedReply(Message):
    """The typed no."""

    code: str
    reason: str


Request = (
    Health
    | SameCertificate
    | FindDoubles
    | ListPeers
    | DialBack
    | MeasureBandwidth
    | WorkerOffer
    | RenewLease
    | ReleaseLease
    | WorkerLeaving
    | DispatchJob
    | CancelJob
    | Steer
    | ReportEvent
    | NextSlice
    | DescribeDataset
    | PullFile
    | ListFiles
    | HoldCheckpoint
    | DropCheckpoints
    | FindCheckpoints
    | BulkOffer
    | BulkDial
)

Response = (
    Acknowledged
    | HealthReport
    | PeerList
    | DialedBack
    | BandwidthMeasured
    | LeaseRenewed
    | SliceAssigned
    | NoSlice
    | DatasetDescription
    | FileList
    | CheckpointHeld
    | CheckpointList
    | DoublesFound
    | BulkOffer
    | BulkAnswer
    | RefusedReply
)


class RequestEnvelope(Value):
    """One request on a fresh stream of ``/hypha/rpc/1``."""

    body: Request
    v: int = WIRE_VERSION
    traceparent: str | None = None


class ResponseEnvelope(Value):
    """Its one response."""

    body: Response
    v: int = WIRE_VERSION


class GossipEnvelope(Value):
    """One gossip message. ``certificates`` are the publisher's (DER), its own first, and the CAs above it: a
    receiver that has never met the publisher sees its role before it reserves anything.
    """

    body: WorkerRequest
    v: int = WIRE_VERSION
    traceparent: str | None = None
    certificates: CertificateChain = ()


class Report(Value):
    """One entry of the long-lived report stream ``/hypha/report/1`` (worker -> scheduler). The first one on a
    new stream may say of which operation the stream's opening is part.
    """

    stamp: JobStamp
    incarnation: Id
    progress: Progress
    v: int = WIRE_VERSION
    traceparent: str | None = None


# --- the bridge between an executor and its worker (JSON over a Unix socket) ----------------------------


class FetchCall(Value):
    """POST /resources/fetch -> list of :class:`FetchedFile`."""

    resource: Reference


class FetchedFile(Value):
    """A file in the job directory; ``path`` is relative to it. ``slice``: set for dataset slices, and
    ``generation``, ``round`` and ``attempt`` then are those under which the slice was asked for: who starts
    over with theta of a generation, round and attempt drops its slices of earlier ones, no others.
    """

    path: str
    size: int
    slice: SliceAssigned | None = None
    round: int = 0
    attempt: int = 0
    generation: int = 0


class SendCall(Value):
    """POST /resources/send -> :class:`Sent`, once it is decided for every receiver; an error only when
    nobody acknowledged.

    A directory goes to a ``Local`` place only, where it is complete with its file ``marker``; with ``keep``
    so many complete ones of its siblings whose names are numbers stay, and older ones are deleted.
    ``blake3`` and ``xxh3`` (hex) spare the worker the hashing, where the executor knows them; see
    :class:`TransferMeta`.
    ``generation`` is that of the job's generation in which the file was made; ``None``: the present one.
    ``name`` is what the receiver is to call it, a relative path; else it is the last part of ``path``.
    """

    resource: Reference
    path: str
    round: int
    samples: int = 0
    contributors: tuple[str, ...] = ()
    marker: str = ""
    keep: int | None = None
    blake3: str = ""
    attempt: int = 0
    generation: int | None = None
    xxh3: str = ""
    name: str = ""


class Delivery(Value):
    """What became of a file at one receiver. ``error``: a refusal code, or ``unreachable``."""

    peer: str
    acknowledged: bool
    error: str = ""
    detail: str = ""


class Sent(Value):
    """One entry a receiver; at least one acknowledged."""

    deliveries: tuple[Delivery, ...]


class ReceiveCall(Value):
    """POST /resources/receive -> SSE of :class:`ReceivedFile`; only ``peers`` may send (never empty,
    ``members`` means those the scheduler named).
    """

    kinds: tuple[str, ...]


class ReceivedFile(Value):
    """A file that arrived whole and verified. The executor deletes it when it is done with it."""

    path: str
    size: int
    from_peer: str
    meta: TransferMeta


class StatusCall(Value):
    """POST /status/send: one event; ``Progress`` may be dropped for a newer one, others never are."""

    event: Event


#: Spans in one call; an executor posts the rest in the next one.
MAX_SPANS_A_CALL = 256

#: What an attribute of a span may be.
SpanAttribute = bool | int | float | str


class SpanEvent(Value):
    """Something that happened during a span. Times are nanoseconds since 1970, as OpenTelemetry has them."""

    name: str
    time_ns: int
    attributes: dict[str, SpanAttribute] = {}


class FinishedSpan(Value):
    """A span that has ended, as an executor hands it to its worker. Identifiers are lower-case hex: 32 digits
    of the trace, 16 of a span. ``links`` are traceparents. ``error`` says what went wrong, where it did.
    """

    name: str
    trace_id: str
    span_id: str
    start_ns: int
    end_ns: int
    parent_id: str | None = None
    kind: Literal["internal", "client", "server", "producer", "consumer"] = "internal"
    status: Literal["unset", "ok", "error"] = "unset"
    error: str = ""
    attributes: dict[str, SpanAttribute] = {}
    events: tuple[SpanEvent, ...] = ()
    links: tuple[str, ...] = ()


class SpansCall(Value):
    """POST /spans: spans that the worker exports for its executor. Too many at once are ``too-large``, too
    many in a while ``busy``; neither is worth a repetition.
    """

    spans: tuple[FinishedSpan, ...]


class BridgeError(Value):
    """Body of every 4xx and 5xx answer of the bridge."""

    error: str
    detail: str


# --- between a worker and an executor host (MessagePack over a Unix socket, one message a packet) ----------


class ForkRequest(Value):
    """Fork an executor that runs ``main`` of ``module`` with ``arguments`` in ``directory``. With it go three
    descriptors: where it is answered, the lifeline of the executor's keeper, and where output goes.

    ``python``, ``package`` and ``inherited`` are the worker's own interpreter, installation and limits: a
    host with other ones would make another executor than the worker itself.
    """

    module: str
    arguments: tuple[str, ...]
    directory: str
    environment: dict[str, str]
    python: str
    package: str
    inherited: dict[str, str]
    #: as :class:`hypha.keeper.Confinement` takes them
    keeper_options: tuple[str, ...] = ()
    #: the host need not have imported transformers and accelerate yet
    torch_only: bool = False


class Forked(Message):
    """The keeper runs; it leads a session and a process group of its own."""

    pid: int


class NotForked(Message):
    """The worker has to start this executor itself."""

    reason: str


class KeeperEnded(Message):
    """Nothing of the executor is left; ``status`` is its wait status. One that was killed says nothing."""

    status: int


ForkReply = Forked | NotForked | KeeperEnded


# --- the ledger: what a job did, enough to do it again (``ledger.json``, JSON) --------------------------


class LedgerRound(Value):
    """One outer step. ``theta`` is the hash of theta of ``round + 1``, that is, after this step (as in
    :class:`RoundApplied`). ``contributors`` are in the mean; ``left_out``, which only earlier versions wrote,
    trained but are not. ``generation`` is the job's generation; after a restore from a checkpoint rounds
    occur again under a higher one, and the earlier ones are ``discarded``.
    """

    round: int
    theta: str
    contributors: tuple[Contribution, ...]
    left_out: tuple[Contribution, ...] = ()
    generation: int = 0
    discarded: bool = False
    samples: int = 0
    loss: float = 0.0
    update_norm: float = 0.0
    #: from theta_r at the parameter server to its being applied
    duration_s: float = 0.0
    #: what was measured of each contributor's update; earlier versions kept nothing of it
    updates: tuple[UpdateStatistics, ...] = ()


class LedgerFile(Value):
    """``ledger.json``. ``job`` and ``aggregate`` are the descriptions as dispatched, without tokens;
    their ``me`` is empty and ``job.batch_size`` 0, as these differ by worker (see each Contribution).
    ``theta`` is the hash of theta of round 0; ``rounds`` are in the order in which they happened.
    """

    job: TrainJob
    aggregate: AggregateJob
    manifest: Manifest
    manifest_hash: str
    theta: str
    rounds: tuple[LedgerRound, ...]
    version: int = 1


def encode(value: Struct) -> bytes:
    """MessagePack of ``value``."""
    return msgspec.msgpack.encode(value)


def encode_json(value: Struct) -> bytes:
    """JSON of ``value``."""
    return msgspec.json.encode(value)

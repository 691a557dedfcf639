"""What each component can be told: one pydantic model a component, the names of operations.md.

Keys may be written with underscores or hyphens. Unknown keys are errors. Sizes are GB unless the name
says otherwise, durations seconds (``_s``). Loading and layering are in :mod:`hypha.config.reading.loading`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from hypha.config.bandwidth import LimitsConfig, WorkerLimitsConfig
from hypha.config.reading.pairs import pairs_of
from hypha.config.section import Section as Section
from hypha.config.tuning import GatewayTuningConfig, TuningConfig

#: Addresses a node neither dials nor announces unless told otherwise: loopback, private, link-local.
RESERVED_CIDR = (
    "127.0.0.0/8",
    "::1/128",
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "169.254.0.0/16",
    "fe80::/10",
    "fc00::/7",
)


@dataclass(frozen=True)
class PathOrUrl:
    """Marks text that is a path or a URL; as a path it is relative to its file, but for ``words``."""

    words: tuple[str, ...] = ()


#: samples in a batch of a job that says nothing about it, on workers whose offer says nothing either
DEFAULT_BATCH_SIZE = 16
#: the training executor that comes with Hypha
DEFAULT_EXECUTOR = "diloco-transformer"


# --- every node -----------------------------------------------------------------------------------


#: how telemetry is sent
OtlpProtocol = Literal["grpc", "http/protobuf", "http/json"]
#: which traces are recorded
Sampler = Literal[
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
]


class NodeConfig(Section):
    """What every component has."""

    cert_pem: Path
    """this node's certificate (a chain may follow it), made by `hypha-certutil node`"""
    key_pem: Path
    """its Ed25519 private key, readable by its owner only"""
    trust_pem: Path
    """the CAs whose nodes are trusted"""
    crls_pem: Path | None = None
    """revocation lists of those CAs; re-read when the file changes, and none while there is no such file yet
    """
    require_roles: bool = True
    """refuse peers whose certificate carries no role at all: one that could play every role"""
    listen_addresses: list[str] = Field(default=["/ip4/0.0.0.0/tcp/0"], min_length=1)
    """where to listen; port 0 takes any free one"""
    external_addresses: list[str] = []
    """where others may dial this node, if that is not where it listens"""
    exclude_cidr: list[str] = list(RESERVED_CIDR)
    """networks whose addresses are neither dialled nor announced"""
    http_address: str | None = None
    """local HTTP: /health, and /metrics for Prometheus; ``host:port``"""
    max_connections: int = Field(default=1024, ge=1)
    """of peers with a certificate; each takes a file descriptor (`ulimit -n`)"""
    log_level: str = "info"
    """error, warn, info, debug, trace, or a filter such as "info,hypha_network=debug"
    """
    log_format: Literal["auto", "text", "json"] = "auto"
    """text (in colour) for people, json for machines; ``auto``: text where logs go to a terminal"""
    telemetry_endpoint: str | None = None
    """where traces, metrics and logs are sent over OTLP, usually an OpenTelemetry Collector, such as
    "http://otel-collector:4318" (4317 with grpc); not set: nowhere
    """
    telemetry_protocol: OtlpProtocol = "http/protobuf"
    telemetry_sampler: Sampler | None = None
    """which traces are recorded; ``parentbased_*`` do as whoever asked them did. Default: all"""
    telemetry_sample_ratio: float | None = Field(default=None, ge=0, le=1)
    """share of traces for ``traceidratio``; alone it means ``parentbased_traceidratio``"""
    telemetry_interval_s: float = Field(default=15.0, gt=0)
    """seconds between two exports of metrics"""
    telemetry_attributes: Annotated[dict[str, str | int | float | bool], BeforeValidator(pairs_of)] = {}
    """more about this node, beside service.name, service.version and service.instance.id; a table, or
    "key=value,key=value"; {component} stands for the component's name
    """
    telemetry_headers: Annotated[dict[str, str], BeforeValidator(pairs_of)] = {}
    """HTTP headers (gRPC metadata) for the endpoint, such as Authorization; a table, or "key=value,key=value"
    """
    limits: LimitsConfig = LimitsConfig()
    tuning: TuningConfig = TuningConfig()


class LeafConfig(NodeConfig):
    """What every component but the gateway has: gateways, and a relay circuit when it needs one."""

    gateway_addresses: list[str] = Field(min_length=1)
    """gateways, with or without /p2p/<PeerID>; one is used, the others are for when it is lost"""
    relay_circuit: bool = True
    """keep a relay reservation with the active gateway, so that peers behind NAT are reachable"""


class GatewayConfig(NodeConfig):
    """``hypha-gateway``."""

    external_addresses: list[str] = Field(min_length=1)
    """where nodes dial this gateway"""
    gateway_addresses: list[str] = []
    """other gateways to link with"""
    max_circuits: int = Field(default=256, ge=1)
    """connections relayed at once"""
    max_reservations: int = Field(default=1024, ge=1)
    """nodes that may be reached through this gateway"""
    tuning: GatewayTuningConfig = GatewayTuningConfig()


# --- data node --------------------------------------------------------------------------------------


class DatasetConfig(Section):
    """One served dataset; ``name`` defaults to the manifest's, else to the directory's name."""

    path: Path
    name: str | None = None
    organizations: list[str] = []
    """organisations whose nodes get it, as their CAs are called (`hypha-certutil show`); none: all do"""


class DataConfig(LeafConfig):
    """``hypha-data``."""

    datasets: list[DatasetConfig] = []
    dataset_path: Path | None = None
    """short for one entry of ``datasets``"""
    announce_interval_s: float = Field(default=600.0, gt=0)
    verify_at_start: bool = False
    """re-hash every slice at start-up, not only when it is first served"""


# --- worker -----------------------------------------------------------------------------------------


class ResourcesConfig(Section):
    """What the worker has to offer: cores, and GB of the rest. No more than there is (`detect_resources`)."""

    cpu: float = Field(default=1.0, ge=0)
    memory: float = Field(default=8.0, ge=0)
    gpu: float = Field(default=0.0, ge=0)
    storage: float = Field(default=20.0, ge=0)


#: prices and bids are numbers up to this; what they count is between schedulers and owners
MAX_PRICE = 1e12


class UtilizationConfig(Section):
    """With ``offer.strategy = "utilization"``: the price asked follows the load, which is the share of the
    worker's most used resource that is leased. It moves by ``step`` every ``every_s`` while the load is
    ``high`` or more (up) or ``low`` or less (down), and stays where it is in between.
    """

    low: float = Field(default=0.3, ge=0, le=1)
    high: float = Field(default=0.8, gt=0, le=1)
    step: float = Field(default=0.25, ge=0.01, le=10)
    """0.25: a quarter dearer each time, and back"""
    every_s: float = Field(default=30.0, ge=0.1)
    least: float = Field(default=0.5, gt=0, le=1)
    """as multiples of ``offer.price``; never below ``offer.floor``"""
    most: float = Field(default=4.0, ge=1, le=1000)


class AffinityConfig(Section):
    """With ``offer.strategy = "affinity"``: for whom and for what this worker works at a lower price."""

    schedulers: list[str] = []
    """PeerIDs of schedulers"""
    cached: bool = True
    """jobs on a dataset of which slices are in this worker's cache"""
    preference: float = Field(default=1.5, ge=1, le=1000)
    """their bids count as so many times as high as they are, and so much less is asked of them"""


class OfferConfig(Section):
    """On what terms. ``price`` is asked for one lease, whatever it reserves; bids below ``floor`` are not
    answered. docs/prices.md has the rules.
    """

    price: float = Field(default=1.0, ge=0, le=MAX_PRICE)
    floor: float = Field(default=0.0, ge=0, le=MAX_PRICE)
    strategy: Literal["flexible", "whole", "utilization", "affinity"] = "flexible"
    """flexible: exactly what was asked for; whole: to training jobs all that is free, for larger batches;
    utilization: as flexible, at a price that follows the load; affinity: as flexible, cheaper for some
    """
    counter: bool = True
    """a bid below the price is answered with an offer at the price; false: not at all"""
    ageing_s: float | None = Field(default=60.0, ge=0.1)
    """a request that has waited for so long here counts as if it had bid twice as much (three times after
    twice as long ...), so that nobody waits for ever; ``None``: bids alone count
    """
    keep_after_s: float | None = Field(default=600.0, ge=0.1)
    """for a request that has waited for so long here, and needs more than is free, what becomes free is
    kept, so that smaller ones do not overtake it for ever; ``None``: never
    """
    request_window_s: float = Field(default=0.2, ge=0)
    temporary_lease_s: float = Field(default=5.0, gt=0)
    """how long an offer is good; twice tuning.liveness.round_trip_s at least"""
    lease_s: float = Field(default=30.0, gt=0)
    """a lease that is not renewed is over after so long; four times tuning.liveness.round_trip_s at least.
    More rides out interruptions of a quarter of it, less notices sooner that a scheduler has died
    """
    utilization: UtilizationConfig = UtilizationConfig()
    affinity: AffinityConfig = AffinityConfig()


class ExecutorConfig(Section):
    """A program this worker runs for jobs of ``kind`` and ``name``.

    ``args`` may hold ``{SOCKET_PATH} {WORK_DIR} {JOB_JSON} {JOB_FILE}``. Without ``cmd`` it is Hypha's
    own executor of that kind, run by this very Python.
    """

    kind: Literal["train", "aggregate"] = Field(alias="class")
    name: str
    runtime: Literal["process", "bwrap"] = "process"
    """process: as this worker's user, beside the worker; bwrap: in namespaces of its own (bubblewrap), where
    it sees its job's files and read-only libraries, and neither the network nor other files or processes
    """
    read_only: list[Path] = []
    """with bwrap: what else it may read, such as the directory that ``cmd`` is installed in"""
    cmd: str | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    threads: int | None = Field(default=None, ge=1)
    """of its libraries, each (OMP_NUM_THREADS and so on); ``None``: as many as its lease has whole cores.
    Fewer where several libraries take turns on the same cores; more than there are cores never helps
    """
    accelerate: Path | None = None
    """for Hypha's own training executor: the file that ``accelerate config`` writes, so that it trains on
    several devices of this machine, with a process each (distributed_type MULTI_GPU, FSDP or MULTI_CPU)
    """
    hang_s: float | None = Field(default=None, ge=0)
    """as the worker's, for this program alone; a foreign one is then watched from its start, not only from
    the first ``alive`` that it says on its bridge
    """


class AllowConfig(Section):
    """What jobs may make this worker fetch, write and load. Patterns are shell-style (``fnmatch``); those of
    URLs are matched part by part, their host a name, ``*.name`` or ``*``.
    """

    peers: bool = True
    uri: list[str] = []
    """URL patterns for http(s), such as "https://models.example.org/*"
    """
    huggingface: list[str] = ["*"]
    """repository patterns on the Hugging Face hub, owner and name each by itself"""
    local_read: list[str] = []
    """path and fsspec URL patterns that may be read from: models, and checkpoints to go on from"""
    local_write: list[str] = []
    """path and fsspec URL patterns that checkpoints may be written to; list them in local_read as well"""
    local: list[str] = []
    """the earlier name of both, still taken for both: write local_read and local_write instead"""
    trust_remote_code: list[str] = []
    """repositories (and URLs, paths) whose own code may run"""
    entrypoints: list[str] = []
    """``package.module:name`` patterns for plain PyTorch models: classes and functions that are defined there
    """
    max_file_gb: float = Field(default=100.0, gt=0)


class CacheConfig(Section):
    """The slice cache, least recently used out first; whichever bound is hit first."""

    max_slices: int = Field(default=10, ge=2)
    """raise both where workers fetch again what they have had (hypha_data_cache_lookups_total)"""
    max_gb: float = Field(default=20.0, gt=0)
    """of disk, in work_dir"""
    prefetch_s: float = Field(default=10.0, ge=0)
    """slices for so many seconds of training are fetched ahead (half of max_gb at most), and one at least"""


class StorageConfig(Section):
    """What this worker keeps for schedulers that lease it: copies of their jobs' checkpoints."""

    checkpoints_gb: float = Field(default=0.0, ge=0)
    """0: none"""
    keep_days: float = Field(default=30.0, gt=0)
    """copies that no scheduler has asked about for so many days are deleted"""


class PreemptionConfig(Section):
    """How this worker learns that its machine ends soon, as spot machines do: what it has trained is handed
    over then, and its leases given back, before it ends.
    """

    notice_s: float | None = Field(default=None, ge=2)
    """seconds from a notice to the machine's end (AWS 120, Google Cloud and Azure 30); SIGTERM is such a
    notice then. ``None``: none is expected, and SIGTERM ends the worker within 5 s
    """
    file: Path | None = None
    """a file that appears"""
    command: list[str] = []
    """a program and its arguments: exit code 0 is the notice"""
    url: str | None = None
    """an address of the cloud's metadata service: an answer with status 200 is the notice ..."""
    url_pattern: str = ""
    """... if its text holds this regular expression"""
    url_headers: dict[str, str] = {}
    poll_s: float = Field(default=2.0, ge=0.1)
    """how often all these are looked at"""


class WorkerConfig(LeafConfig):
    """``hypha-worker``."""

    work_dir: Path = Path("work")
    """job directories, the slice cache and copies of checkpoints"""
    resources: ResourcesConfig = ResourcesConfig()
    offer: OfferConfig = OfferConfig()
    executors: list[ExecutorConfig] = [
        ExecutorConfig(kind="train", name=DEFAULT_EXECUTOR),
        ExecutorConfig(kind="aggregate", name="parameter-server"),
    ]
    allow: AllowConfig = AllowConfig()
    cache: CacheConfig = CacheConfig()
    storage: StorageConfig = StorageConfig()
    preemption: PreemptionConfig = PreemptionConfig()
    keep_failed_jobs: bool = True
    """keep the job directory of an executor that failed"""
    stop_grace_s: float = Field(default=5.0, ge=0)
    """seconds between SIGTERM and SIGKILL for an executor's process group"""
    hang_s: float = Field(default=600.0, ge=0)
    """an executor that gave no sign of life for so long is killed, and reported; longer than the longest
    batch and outer step. 0: never. Jobs may ask for less
    """
    detect_resources: bool = True
    """no more is offered than this machine is found to have when the worker starts; false: what ``resources``
    says is believed, for machines whose devices cannot be looked at
    """
    limits: WorkerLimitsConfig = WorkerLimitsConfig()
    warm: bool = True
    """Hypha's own executors are forked by a host, a process that has imported what they need (some 330 MB,
    shared with them), and start in a fraction of a second; those with a ``cmd`` are started as ever
    """
    warm_host: Path | None = None
    """the socket of a host that the nodes of this machine and user share, started with
    ``python -m hypha.executor.host --socket PATH``; ``None``: this worker has a host of its own
    """


# --- scheduler ----------------------------------------------------------------------------------------


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


class SchedulerSection(Section):
    """What the scheduler is to do."""

    job: JobConfig
    sinks: list[SinkConfig] = []


class SchedulerConfig(LeafConfig):
    """``hypha-scheduler``."""

    state_dir: Path = Path("state")
    """the job's state, checkpoints and ledger"""
    scheduler: SchedulerSection


#: Of all four components, by program.
COMPONENTS: dict[str, type[NodeConfig]] = {
    "gateway": GatewayConfig,
    "scheduler": SchedulerConfig,
    "worker": WorkerConfig,
    "data": DataConfig,
}

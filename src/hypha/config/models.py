"""The keys of each component: one pydantic model a component, the names of operations.md.

Keys may be written with underscores or hyphens. Unknown keys are errors. Sizes are GB unless the name
says otherwise, durations seconds (``_s``). Loading and layering are in :mod:`hypha.config.reading.loading`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from hypha.config.job import DEFAULT_EXECUTOR, JobConfig, SinkConfig
from hypha.config.offers import OfferConfig, ResourcesConfig
from hypha.config.section import Section, pairs_of
from hypha.config.tuning import GatewayTuningConfig, LimitsConfig, TuningConfig, WorkerLimitsConfig

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

"""Every metric of Hypha, declared once: name, kind, unit, labels with their values, and what it means.

The table in docs/observability.md, the lint of rules, dashboards and documented queries, and the tests read
this registry. Names that operations.md gives are exact; OpenTelemetry's own (``system.*``, ``process.*``,
``hw.gpu.*``) stand beside ours where there is one. In Prometheus dots become underscores, counters get
``_total``; the job of a scheduler or worker is a resource attribute (``target_info{hypha_job="..."}``).
"""

from __future__ import annotations

from typing import get_args

from hypha.errors import REFUSALS
from hypha.messages import ExecutorClass, Request
from hypha.telemetry.metrics import OTHER, Counter, Gauge, Histogram, Label

#: of what is answered from memory
FAST_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
#: of rounds and jobs
LONG_SECONDS = (1, 5, 15, 30, 60, 120, 300, 600, 1200, 3600, 14400, 86400, 604800)

#: what a worker's time goes to that is no training which counts
BADPUT_REASONS = (
    "allocating",
    "loading",
    "waiting-for-data",
    "waiting-for-theta",
    "waiting-for-stragglers",
    "failure",
    "replayed",
    "paused",
)
JOB_STATES = ("allocating", "loading", "training", "paused", "exporting", "done", "failed")
SLICE_STATES = ("available", "assigned", "used")
TRANSFER_KINDS = ("slice", "update", "theta", "checkpoint", "export", "model", "preprocessor")

_refusals = tuple(sorted(REFUSALS))
_status = Label("status", ("success", "failure"))
_kind = Label("kind", get_args(ExecutorClass))
_peer = Label("peer", bound="peers that are connected")
_worker = Label("worker", bound="workers of the job")
_dataset = Label("dataset", bound="datasets that are served or asked for")
_transfer = Label("kind", TRANSFER_KINDS)
_direction = Label("direction", ("inbound", "outbound"))
_way = Label("way", ("direct", "relayed"))
_plane = Label("plane", ("control", "bulk"))
_gpu = Label("gpu", bound="GPUs of the machine")
_hw_id = Label("hw.id", bound="GPUs of the machine")
_operation = Label("operation", ("find", "provide"))
_resource = Label("resource", ("cpu", "memory", "gpu", "storage"))
_request = Label("type", tuple(sorted(one.__name__ for one in get_args(Request))))

# --- every component -----------------------------------------------------------------------------------

CONNECTIONS = Gauge("hypha.network.connections", "connection", "Live connections.", _direction, _way)
CONNECTIONS_ESTABLISHED = Counter(
    "hypha.network.connections.established", "connection", "Connections that were made.", _direction, _way
)
CONNECTIONS_FAILED = Counter(
    "hypha.network.connections.failed",
    "connection",
    "Connections that could not be made, or were refused at their handshake.",
    _direction,
    Label("reason", ("unreachable", "timeout", "certificate", "limit", OTHER)),
)
CONNECTIONS_LOST = Counter(
    "hypha.network.connections.lost",
    "connection",
    "Connections that ended.",
    Label("reason", ("closed", "silent", "revoked", "double", "limit", OTHER)),
)
STREAMS_REFUSED = Counter(
    "hypha.network.streams.refused",
    "stream",
    "Streams and requests of peers that had more open than they may; any: of a connection in all.",
    Label("service", ("any", "rpc", "reports", "bulk", "dht", "relay", "gossip", "other")),
)
BYTES_SENT = Counter("hypha.network.bytes_sent", "byte", "Bytes sent, encrypted.", _plane)
BYTES_RECEIVED = Counter("hypha.network.bytes_received", "byte", "Bytes received, encrypted.", _plane)
ROUND_TRIP = Gauge(
    "hypha.network.round_trip", "second", "Round trip to a peer, smoothed over its pings.", _peer
)
GOSSIP_MESH = Gauge("hypha.gossip.mesh.peers", "peer", "Peers in the gossip mesh.")
GOSSIP_MESSAGES = Counter(
    "hypha.gossip.messages",
    "message",
    "Gossip messages.",
    Label("event", ("published", "received", "relayed", "dropped")),
)
DHT_ROUTING_TABLE = Gauge("hypha.dht.routing_table.size", "peer", "Peers in the DHT's routing table.")
DHT_QUERIES = Counter(
    "hypha.dht.queries",
    "query",
    "DHT queries: those this node made, and at gateways those it answered.",
    Label("side", ("client", "server")),
    _operation,
    _status,
)
DHT_QUERY_DURATION = Histogram(
    "hypha.dht.query.duration",
    "How long a DHT query of this node took.",
    _operation,
)
REQUEST_DURATION = Histogram(
    "hypha.rpc.client.duration",
    "From asking a peer to its answer; a refusal's code, unreachable, timeout or success.",
    _request,
    Label("status", ("success", "timeout", "cancelled", *_refusals)),
    bounds=FAST_SECONDS,
)
ANSWER_DURATION = Histogram(
    "hypha.rpc.server.duration",
    "From a peer's request to our answer.",
    _request,
    Label("status", ("success", *_refusals)),
    bounds=FAST_SECONDS,
)
REPORTS = Counter(
    "hypha.network.reports", "report", "Progress reports.", Label("event", ("sent", "received", "replaced"))
)
TRANSFERS = Gauge("hypha.transfers.active", "transfer", "Files on their way.", _direction)
TRANSFER_DURATION = Histogram(
    "hypha.transfer.duration", "From a file's offer to its acknowledgement.", _transfer, _direction, _status
)
TRANSFER_BYTES = Counter(
    "hypha.transfer.bytes", "byte", "Bytes of files that arrived.", _transfer, _direction
)
PACKED_BYTES = Counter(
    "hypha.transfer.packed.bytes",
    "byte",
    "Blocks of files that were compressed on their way, before and after; the others do not count.",
    Label("stage", ("before", "after")),
)
CAPPED = Counter(
    "hypha.transfer.capped",
    "second",
    "Seconds that transfers, and at a gateway circuits, have waited for a cap of the line ([limits]).",
    _direction,
)
CERTIFICATE_EXPIRES = Gauge(
    "hypha.certificate.expires",
    "second",
    "Until the certificate, or a revocation list, expires; negative: since then.",
    Label("file", ("certificate", "issuer", "crl")),
)
CLOCK = Gauge("hypha.clock.unix", "second", "This machine's time of day, as seconds since 1970.")
DISK_FREE = Gauge(
    "hypha.disk.free",
    "byte",
    "Free space where the component writes.",
    Label("place", ("work_dir", "state_dir", "datasets")),
)
UPTIME = Gauge("hypha.uptime", "second", "Since the component was started.")
LOG_ENTRIES = Counter(
    "hypha.log.entries", "entry", "Log entries.", Label("level", ("error", "warn", "info", "debug", "trace"))
)
EXPORT_FAILURES = Counter(
    "hypha.telemetry.export.failures",
    "failure",
    "Batches of telemetry that the collector did not take.",
    Label("signal", ("traces", "metrics", "logs")),
)

# --- scheduler -----------------------------------------------------------------------------------------

ACTIVE_WORKERS = Gauge("hypha.active.workers", "worker", "Workers leased for training.")
LEASES = Gauge("hypha.scheduler.leases", "lease", "Leases that the job holds.", _kind)
LEASES_WANTED = Gauge("hypha.scheduler.leases.wanted", "lease", "Leases that the job wants to hold.", _kind)
RENEWALS = Counter("hypha.lease.renewals", "renewal", "Attempts to renew a lease.", _status)
RENEWAL_DURATION = Histogram("hypha.lease.renewal.duration", "From an attempt to its answer.", _status)
LEASES_LOST = Counter(
    "hypha.scheduler.leases.lost",
    "lease",
    "Leases that ended before the job did.",
    _kind,
    Label("reason", ("expired", "refused", "gone", "revoked", "dropped", OTHER)),
)
WORKER_REQUESTS = Counter(
    "hypha.scheduler.worker.requests", "request", "Requests for workers that were published.", _kind
)
OFFERS_RECEIVED = Counter(
    "hypha.scheduler.offers",
    "offer",
    "Offers of workers, by what became of them.",
    _kind,
    Label(
        "outcome",
        ("accepted", "late", "price", "resources", "features", "avoided", "not-needed", "lost", OTHER),
    ),
)
PRICES = Gauge(
    "hypha.scheduler.price",
    "price",
    "What is bid for a worker now, and what all leases that the job holds cost.",
    _kind,
    Label("of", ("bid", "leases")),
)
ALLOCATION_WAIT = Gauge(
    "hypha.scheduler.waiting", "second", "How long the job has been short of leases, by kind.", _kind
)
SLICES = Gauge(
    "hypha.data.slices", "slice", "Slices of the dataset in this epoch.", Label("state", SLICE_STATES)
)
SLICES_ASSIGNED = Counter(
    "hypha.data.slices.assigned",
    "slice",
    "Slices given to workers.",
    Label("source", ("cached", "fresh", "repeated")),
)
EPOCH = Gauge("hypha.data.epoch", "epoch", "Epoch that is being trained, from 0.")
PROVIDERS = Gauge("hypha.data.providers", "node", "Data nodes that serve the job's dataset.")
ROUND = Gauge("hypha.job.round", "round", "Rounds applied.")
ROUNDS = Gauge("hypha.job.rounds", "round", "Rounds that the job is to have.")
SYNCHRONIZATIONS = Counter(
    "hypha.job.synchronizations", "round", "Rounds applied, those lost later included."
)
ROUND_DURATION = Histogram("hypha.job.round.duration", "Of an applied round.", bounds=LONG_SECONDS)
ROUND_AGE = Gauge("hypha.job.round.age", "second", "Since the last round was applied, or the job began.")
ROUND_BYTES = Gauge(
    "hypha.job.round.bytes",
    "byte",
    "Sent and received for the last round.",
    Label("kind", ("update", "theta")),
)
JOB_SAMPLES = Counter("hypha.job.samples", "sample", "Samples in applied updates.")
JOB_DURATION = Histogram(
    "hypha.job.duration",
    "Of jobs that ended.",
    Label("status", ("done", "failed", "stopped")),
    bounds=LONG_SECONDS,
)
JOB_STATE = Gauge(
    "hypha.job.state", "job", "1 for the job's present state, 0 for the others.", Label("state", JOB_STATES)
)
LOSS = Gauge("hypha.job.loss", "nat", "Mean loss of the last round.")
WORKER_LOSS = Gauge("hypha.worker.loss", "nat", "A worker's loss in its last round.", _worker)
UPDATE_NORM = Gauge(
    "hypha.worker.update.norm", "weight", "L2 norm of a worker's last pseudo-gradient.", _worker
)
UPDATE_COSINE = Gauge(
    "hypha.worker.update.cosine",
    "cosine",
    "Between a worker's last pseudo-gradient and the mean of all, estimated.",
    _worker,
)
BATCH_TIME = Gauge("hypha.worker.batch.time", "second", "Smoothed time of a worker's batches.", _worker)
IDLE = Gauge(
    "hypha.worker.idle.ratio",
    "ratio",
    "Smoothed share of a worker's rounds from its last batch to the first of the next round.",
    _worker,
)
GOODPUT = Gauge(
    "hypha.job.goodput", "sample_per_second", "Samples that count, by wall clock, since the scheduler began."
)
GOODPUT_SECONDS = Counter(
    "hypha.job.goodput.seconds",
    "second",
    "Worker seconds of training that counts, in rounds before the newest checkpoint.",
)
BADPUT_SECONDS = Counter(
    "hypha.job.badput.seconds",
    "second",
    "Worker seconds that were no training which counts, by reason.",
    Label("reason", BADPUT_REASONS),
)
FAILURES = Counter(
    "hypha.job.failures",
    "failure",
    "Executors and workers that were lost or failed.",
    _kind,
    Label("reason", ("lease", "unreachable", "executor", "hang", "refused", "dropped", OTHER)),
)
RECOVERY_DURATION = Histogram(
    "hypha.job.recovery.duration",
    "After a failure: until it was noticed, until the place was taken again, until the next applied round.",
    Label("phase", ("detect", "replace", "catch-up")),
)
CHECKPOINT_ROUND = Gauge("hypha.checkpoint.round", "round", "Round of the newest durable checkpoint.")
CHECKPOINT_AGE = Gauge("hypha.checkpoint.age", "second", "Since the newest checkpoint became durable.")
MESSAGES_REFUSED = Counter(
    "hypha.job.messages.refused",
    "message",
    "Messages that changed nothing, being late, repeated or uninvited.",
    Label("reason", bound="words of the round machine"),
)

# --- worker --------------------------------------------------------------------------------------------

TRAINING_SAMPLES = Counter("hypha.training.samples", "sample", "Samples that this worker has trained on.")
WORKER_JOBS = Gauge("hypha.worker.jobs", "job", "Executors that run.", _kind)
EXECUTION_DURATION = Histogram(
    "hypha.job.execution.duration",
    "Of an executor, from dispatch to end.",
    _kind,
    _status,
    bounds=LONG_SECONDS,
)
EXECUTOR_STARTS = Counter(
    "hypha.executor.starts", "process", "Executors started.", _kind, Label("way", ("warm", "cold"))
)
EXECUTOR_LOADING = Histogram("hypha.executor.loading.duration", "From dispatch to a loaded model.", _kind)
WORKER_LEASES = Gauge(
    "hypha.worker.leases",
    "lease",
    "Leases that this worker has given.",
    Label("state", ("temporary", "accepted")),
)
WORKER_OFFERS = Counter(
    "hypha.worker.offers",
    "request",
    "Requests for workers received, by what came of them.",
    Label(
        "outcome",
        ("offered", "price", "resources", "executor", "features", "disk", "duplicate", "closed", OTHER),
    ),
)
WORKER_PRICE = Gauge(
    "hypha.worker.price",
    "price",
    "What this worker takes for a lease: its floor, its price at rest, the threshold that it asks for "
    "now, and what all of its leases bring.",
    Label("of", ("floor", "rest", "threshold", "leases")),
)
WORKER_LOAD = Gauge(
    "hypha.worker.load", "ratio", "The share of this worker's most used resource that is leased, 0 to 1."
)
FETCH_DURATION = Histogram("hypha.data.fetch.duration", "Until a slice was fetched and verified.", _status)
CACHE_LOOKUPS = Counter(
    "hypha.data.cache.lookups", "lookup", "Slices looked for in the cache.", Label("result", ("hit", "miss"))
)
CACHE_BYTES = Gauge("hypha.data.cache.bytes", "byte", "Size of the slice cache.")
UPDATE_SEND_DURATION = Histogram(
    "hypha.update.send.duration",
    "Gradient transmission: from a pseudo-gradient on disk to its acknowledgement.",
    _status,
)
OUTER_STEP_DURATION = Histogram("hypha.outer_step.duration", "Of closing a round at the parameter server.")
BROADCAST_DURATION = Histogram("hypha.broadcast.duration", "Until a worker had the new theta.", _status)
CPU_UTILIZATION = Gauge("hypha.worker.cpu.utilization", "ratio", "Of this machine's cores, 0 to 1.")
MEMORY_USED = Gauge("hypha.worker.memory.used", "byte", "Of this machine.")
EXECUTOR_MEMORY = Gauge(
    "hypha.executor.memory.used", "byte", "Resident, of executors and their children.", _kind
)
GPU_UTILIZATION = Gauge("hypha.worker.gpu.utilization", "ratio", "Of a GPU, 0 to 1.", _gpu)
GPU_MEMORY_USED = Gauge("hypha.worker.gpu.memory.used", "byte", "Of a GPU.", _gpu)
RESOURCES_FREE = Gauge(
    "hypha.worker.resources.free",
    "unit",
    "What could be offered now: cores, and GB of the rest.",
    _resource,
)
RESOURCES_CAPACITY = Gauge(
    "hypha.worker.resources.capacity",
    "unit",
    "What there is to offer: as configured, and no more than this machine has.",
    _resource,
)
LIMITS_EXCEEDED = Counter(
    "hypha.executor.limits.exceeded",
    "executor",
    "Executors that ended for what they took beyond their lease.",
    Label("resource", ("memory", "disk", "processes")),
)
SYSTEM_CPU = Gauge("system.cpu.utilization", "ratio", "OpenTelemetry's name for the same.")
SYSTEM_MEMORY = Gauge(
    "system.memory.usage", "byte", "OpenTelemetry's.", Label("system.memory.state", ("used", "free"))
)
PROCESS_CPU = Gauge("process.cpu.utilization", "ratio", "Of this process, in cores.")
PROCESS_MEMORY = Gauge("process.memory.usage", "byte", "Resident, of this process.")
HW_GPU_UTILIZATION = Gauge(
    "hw.gpu.utilization",
    "ratio",
    "OpenTelemetry's name for the same.",
    _hw_id,
)
HW_GPU_MEMORY = Gauge("hw.gpu.memory.usage", "byte", "OpenTelemetry's.", _hw_id)

# --- gateway -------------------------------------------------------------------------------------------

CIRCUITS = Gauge("hypha.relay.circuits", "circuit", "Connections that are relayed now.")
RESERVATIONS = Gauge(
    "hypha.relay.reservations", "reservation", "Nodes that may be reached through this gateway."
)
CIRCUITS_OPENED = Counter(
    "hypha.relay.circuits.opened",
    "circuit",
    "Circuits asked for, by what became of them.",
    Label("status", ("accepted", "refused", "unreachable")),
)
RELAY_BYTES = Counter("hypha.relay.bytes", "byte", "Bytes relayed, both ways.")

# --- data node -----------------------------------------------------------------------------------------

STREAMS = Gauge("hypha.data.streams.active", "stream", "Slices being served.")
SERVED_BYTES = Counter("hypha.data.served.bytes", "byte", "Bytes of slices served.", _dataset)
SLICE_REQUESTS = Counter("hypha.data.slice.requests", "request", "Requests for slices.", _dataset, _status)
SERVE_DURATION = Histogram(
    "hypha.data.serve.duration", "From a request for a slice to its acknowledgement.", _dataset
)

"""Every operation that is traced, declared once: the span's name, who has it, and what it covers.

The table in docs/observability.md and the tests read this. Names are those of the specification's example
and lists; they hold no identifier. Attributes are OpenTelemetry's where it has one (``rpc.system``,
``rpc.method``, ``network.peer.address``, ``messaging.operation.name``, ``error.type``), else ``hypha.*``:
``hypha.peer``, ``hypha.job``, ``hypha.job.generation``, ``hypha.round``, ``hypha.lease``, ``hypha.dataset``,
``hypha.slice``, ``hypha.transfer.kind``, ``hypha.transfer.bytes``; of the network also ``hypha.protocol``,
``hypha.transfer.way`` (``direct``, ``dial-back`` or ``stream``), ``hypha.transfer.kept`` (over the connection
of an earlier file), ``hypha.transfer.relayed``, ``hypha.relay.target``, ``hypha.receivers`` (of a gossip
message that was passed on) and ``hypha.answers`` (of gateways, to a DHT query).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Operation:
    """``who`` are the components that have it."""

    name: str
    who: str
    what: str
    declared: ClassVar[dict[str, Operation]] = {}

    def __post_init__(self) -> None:
        Operation.declared[self.name] = self


# --- the network ---------------------------------------------------------------------------------------

CONNECT = Operation("Connect", "all", "a connection to a peer, over all addresses tried")
REQUEST = Operation("Request", "all", "a request to a peer, from asking to the answer")
ANSWER = Operation("Answer", "all", "a peer's request, until it is answered")
OPEN_STREAM = Operation("Open stream", "all", "a libp2p stream to a peer")
REPORT_STREAM = Operation("Report stream", "worker", "the first batch on a new stream of progress reports")
DHT_LOOKUP = Operation("DHT lookup", "scheduler", "who serves a dataset, asked at the gateways")
DHT_PROVIDE = Operation("DHT provide", "data", "an announcement of a dataset at the gateways")
DHT_ANSWER = Operation("DHT answer", "gateway", "a query of a peer")
GOSSIP_PUBLISH = Operation("Gossipsub publish", "scheduler", "a message given to the gossip mesh")
GOSSIP_RELAY = Operation("Relay message", "gateway", "a gossip message passed on")
GOSSIP_RECEIVE = Operation("Receive advertisement", "worker", "a request for workers that arrived")
RELAY_CIRCUIT = Operation(
    "Relay circuit", "gateway", "a connection relayed between two nodes, while it lasts"
)
SEND_FILE = Operation("Send file", "all", "a bulk transfer, from the offer to the acknowledgement")
RECEIVE_FILE = Operation("Receive file", "all", "the same at its receiver")

# --- leases and jobs -----------------------------------------------------------------------------------

RUN_JOB = Operation("Run job", "scheduler", "a job, as long as this scheduler runs it")
ADVERTISE = Operation("Publish task advertisement", "scheduler", "one request for workers")
EVALUATE = Operation(
    "Evaluate request", "worker", "a request for workers weighed against price and resources"
)
SEND_OFFER = Operation("Send offer", "worker", "an offer delivered to the scheduler")
RECEIVE_OFFER = Operation("Receive offer", "scheduler", "an offer weighed")
ACCEPT_OFFER = Operation("Accept offer", "scheduler", "the first renewal of a lease")
RENEW_LEASE = Operation("Renew lease", "scheduler", "a later renewal, all attempts")
DISPATCH = Operation("Dispatch job", "scheduler", "a job given to a leased worker")
EXECUTE = Operation("Execute job", "worker", "an executor, from its start to its end")
LOAD_MODEL = Operation("Load model", "executor", "the model and what belongs to it, fetched and built")
BRIDGE = Operation("Bridge call", "executor", "a call of an executor to its worker")

# --- a round -------------------------------------------------------------------------------------------

ROUND = Operation("Round", "scheduler", "from the moment a round is open until it is applied")
PLAN = Operation("Plan", "scheduler", "the sync point given to a worker")
TRAIN = Operation("Train", "executor", "a worker's inner steps of a round")
FETCH_SLICE = Operation("Fetch slice", "worker", "a slice asked for, fetched and verified")
SERVE_SLICE = Operation("Serve slice", "data", "a slice sent to a worker")
SEND_UPDATE = Operation("Send update", "executor", "a pseudo-gradient, until the parameter server has it")
RECEIVE_UPDATE = Operation(
    "Receive update", "executor", "a pseudo-gradient checked and added at the parameter server"
)
OUTER_STEP = Operation("Outer step", "executor", "the round closed: Nesterov momentum on the mean")
BROADCAST = Operation("Broadcast weights", "executor", "theta of the next round sent to all members")
LOAD_WEIGHTS = Operation("Load weights", "executor", "theta that arrived, checked and loaded")
CHECKPOINT = Operation("Save checkpoint", "executor", "the state of a round made durable")
EXPORT = Operation("Export model", "executor", "the trained model's files sent to the scheduler")

"""Who may do what: the roles of certificates, and for each request, topic, stream, directory entry and
transfer kind those that may use it.

This is the only place where that is said. Nodes look here before they answer, pass on, accept or use
anything (:mod:`hypha.net`, and the simulated node of :mod:`hypha.simulation`); ``python -m deploy.tables``
writes the table of ``docs/security.md`` from here. A role is compared as it is written: another case, or a
longer name that begins with a role, is another role, which may do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hypha.messages import (
    WORKER_TOPIC,
    BulkDial,
    BulkOffer,
    CancelJob,
    DescribeDataset,
    DialBack,
    DispatchJob,
    DropCheckpoints,
    FindCheckpoints,
    FindDoubles,
    Health,
    HoldCheckpoint,
    ListFiles,
    ListPeers,
    MeasureBandwidth,
    NextSlice,
    PullFile,
    ReleaseLease,
    RenewLease,
    ReportEvent,
    SameCertificate,
    Steer,
    WorkerLeaving,
    WorkerOffer,
    is_replica_name,
)

ROLES = ("gateway", "scheduler", "worker", "data")
#: Whoever may use something; ``None``: everybody whose certificate is accepted.
Allowed = frozenset[str] | None

EVERYBODY: Allowed = None
NOBODY: Allowed = frozenset()
GATEWAY: Allowed = frozenset({"gateway"})
SCHEDULER: Allowed = frozenset({"scheduler"})
WORKER: Allowed = frozenset({"worker"})
DATA: Allowed = frozenset({"data"})
_CONSUMERS: Allowed = frozenset({"scheduler", "worker"})
_ENDS: Allowed = frozenset({"scheduler", "worker", "data"})


@dataclass(frozen=True)
class Use:
    """Something that one node does at another: ``by`` whom it may be done, and ``what`` for, in a phrase."""

    by: Allowed
    what: str


@dataclass(frozen=True)
class Transfer:
    """A kind of file: who may send it, and who may take it or ask for it."""

    senders: Allowed
    receivers: Allowed
    what: str


#: Requests over ``/hypha/rpc/1``, by the roles of the caller.
REQUESTS: Mapping[type, Use] = {
    Health: Use(EVERYBODY, "how the node is"),
    SameCertificate: Use(EVERYBODY, "whether a second node uses the caller's certificate"),
    FindDoubles: Use(GATEWAY, "at a gateway: whether other nodes with the same certificates are there"),
    ListPeers: Use(EVERYBODY, "which nodes are connected with the gateway that is asked"),
    DialBack: Use(EVERYBODY, "be dialled by a gateway, to see whether that can be, at one's own IP address"),
    MeasureBandwidth: Use(EVERYBODY, "a few hundred kilobytes there and back, to see how long they take"),
    WorkerOffer: Use(WORKER, "a worker offers a temporary lease to the scheduler that asked for workers"),
    RenewLease: Use(SCHEDULER, "take up or renew a lease of the worker that is asked"),
    ReleaseLease: Use(SCHEDULER, "give a lease back"),
    WorkerLeaving: Use(WORKER, "a worker that ends tells its scheduler by when, or hands a lease back"),
    DispatchJob: Use(SCHEDULER, "start an executor under a lease"),
    CancelJob: Use(SCHEDULER, "stop it"),
    Steer: Use(SCHEDULER, "tell it what to do next"),
    ReportEvent: Use(WORKER, "what an executor did, to its job's scheduler"),
    NextSlice: Use(WORKER, "which slice comes next, from the job's scheduler"),
    DescribeDataset: Use(_CONSUMERS, "the manifest of a dataset"),
    PullFile: Use(NOBODY, "not used"),
    ListFiles: Use(_CONSUMERS, "what files there are to pull"),
    HoldCheckpoint: Use(SCHEDULER, "have a worker keep a copy of a checkpoint"),
    DropCheckpoints: Use(SCHEDULER, "have it delete such copies"),
    FindCheckpoints: Use(SCHEDULER, "what copies of the caller's jobs a worker has"),
    BulkOffer: Use(NOBODY, "not used"),
    BulkDial: Use(_ENDS, "be dialled, to send a file or to ask for one"),
}

#: Gossip topics, by the roles of the publisher, whose certificate travels with the message.
TOPICS: Mapping[str, Use] = {
    WORKER_TOPIC: Use(SCHEDULER, "ask for workers"),
}

#: Frames that begin a file on a connection of the bulk plane, by the roles of whoever sends one.
FRAMES: Mapping[str, Use] = {
    "Hello": Use(_ENDS, "a connection that was asked for by `BulkDial`, of whom was asked"),
    "BulkOffer": Use(_ENDS, "send a file; its kind says to whom"),
    "WantFile": Use(_CONSUMERS, "ask for a file; its kind says of whom"),
}

HOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/hop"
STOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/stop"
KADEMLIA_PROTOCOL = "/ipfs/kad/1.0.0"

#: Protocols of streams, by the roles of whoever opens one.
STREAMS: Mapping[str, Use] = {
    "/hypha/rpc/1": Use(EVERYBODY, "one request; its type says by whom"),
    "/hypha/report/1": Use(WORKER, "progress, to the job's scheduler"),
    "/hypha/bulk/1": Use(_ENDS, "a file, where no socket can be had; its kind says to and from whom"),
    HOP_PROTOCOL: Use(EVERYBODY, "at a gateway: be reachable through it, or reach somebody who is"),
    STOP_PROTOCOL: Use(GATEWAY, "a circuit that arrives"),
    KADEMLIA_PROTOCOL: Use(EVERYBODY, "at a gateway: one query of the directory; its type says by whom"),
}
#: What libp2p itself answers; nothing of Hypha is decided by it.
LIBRARY_STREAMS: Mapping[str, Use] = {
    "/meshsub/1.2.0": Use(EVERYBODY, "gossip; the topic says who may publish"),
    "/ipfs/id/1.0.0": Use(EVERYBODY, "what the node is and speaks"),
    "/ipfs/ping/1.0.0": Use(EVERYBODY, "an echo"),
}

#: Queries of the gateways' directory of providers, by the roles of whoever asks.
DIRECTORY: Mapping[str, Use] = {
    "provide dataset": Use(DATA, "announce a dataset"),
    "provide checkpoints": Use(WORKER, "announce copies of checkpoints"),
    "find": Use(EVERYBODY, "who has announced it"),
    "find node": Use(GATEWAY, "which gateways there are"),
    "ping": Use(GATEWAY, "an echo"),
    "put value": Use(NOBODY, "not used"),
    "get value": Use(NOBODY, "not used"),
}

#: What a node may be used for without being asked by it, by its own roles.
SERVICES: Mapping[str, Use] = {
    "gateway": Use(GATEWAY, "be the gateway of a node"),
    "relay": Use(GATEWAY, "carry a circuit"),
    "directory": Use(GATEWAY, "answer who provides a dataset"),
    "dataset": Use(DATA, "describe and serve a dataset"),
}

#: Kinds of files.
KINDS: Mapping[str, Transfer] = {
    "slice": Transfer(DATA, _CONSUMERS, "a slice of a dataset"),
    "model": Transfer(SCHEDULER, WORKER, "files of the model"),
    "preprocessor": Transfer(SCHEDULER, WORKER, "files of the preprocessor"),
    "theta": Transfer(WORKER, WORKER, "the parameters of a round, from the parameter server"),
    "update": Transfer(WORKER, WORKER, "a pseudo-gradient, to the parameter server"),
    "checkpoint": Transfer(_CONSUMERS, _CONSUMERS, "a checkpoint, or a copy of one"),
    "export": Transfer(WORKER, SCHEDULER, "the trained model"),
}


def announcing(name: str) -> Use:
    """Who may announce what is looked up by ``name``."""
    return DIRECTORY["provide checkpoints" if is_replica_name(name) else "provide dataset"]


def may_act_as(has: frozenset[str], allowed: Allowed) -> bool:
    """Whether a certificate with the roles ``has`` may do what ``allowed`` may.

    One without any role may do everything: nodes with ``require_roles`` (the default) do not connect with
    it at all.
    """
    return allowed is None or not has or bool(has & allowed)


def named(roles: Allowed) -> str:
    """``roles`` in words."""
    return "any role" if roles is None else " or ".join(one for one in ROLES if one in roles) or "no role"


def carries(roles: frozenset[str]) -> str:
    """What a certificate with ``roles`` carries, in words; roles as they are written in it."""
    return f"the role {' and '.join(sorted(roles))}" if roles else "no role"

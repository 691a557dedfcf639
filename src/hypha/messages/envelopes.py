"""What goes over a connection between two nodes: every request and response, and what each is wrapped in."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from hypha.messages.data import DatasetDescription, DescribeDataset, NextSlice, NoSlice, SliceAssigned
from hypha.messages.events import Progress, ReportEvent, Steer
from hypha.messages.jobs import CancelJob, DispatchJob
from hypha.messages.leases import (
    LeaseRenewed,
    ReleaseLease,
    RenewLease,
    WorkerLeaving,
    WorkerOffer,
    WorkerRequest,
)
from hypha.messages.ledger import (
    CheckpointHeld,
    CheckpointList,
    DropCheckpoints,
    FindCheckpoints,
    HoldCheckpoint,
)
from hypha.messages.nodes import (
    BandwidthMeasured,
    DialBack,
    DialedBack,
    DoublesFound,
    FindDoubles,
    Health,
    HealthReport,
    ListPeers,
    MeasureBandwidth,
    PeerList,
    SameCertificate,
)
from hypha.messages.transfers import BulkAnswer, BulkDial, BulkOffer, FileList, ListFiles, PullFile
from hypha.messages.values import Id, JobStamp, Message, Value

#: Version of every envelope; a node refuses another one as ``malformed``.
WIRE_VERSION = 1
MAX_REQUEST_BYTES = 1 << 20
MAX_RESPONSE_BYTES = 10 << 20

#: Few, so that looking for a path among them costs little.
MAX_CERTIFICATES = 4
MAX_CERTIFICATE_BYTES = 16 << 10
CertificateChain = Annotated[
    tuple[Annotated[bytes, Meta(max_length=MAX_CERTIFICATE_BYTES)], ...], Meta(max_length=MAX_CERTIFICATES)
]


class Acknowledged(Message):
    """Done, or already done."""


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

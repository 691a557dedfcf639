"""What goes over a connection between two nodes: every request and response, and what each is wrapped in."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from hypha.messages import data, events, jobs, leases, ledger, nodes, transfers
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
    nodes.Health
    | nodes.SameCertificate
    | nodes.FindDoubles
    | nodes.ListPeers
    | nodes.DialBack
    | nodes.MeasureBandwidth
    | leases.WorkerOffer
    | leases.RenewLease
    | leases.ReleaseLease
    | leases.WorkerLeaving
    | jobs.DispatchJob
    | jobs.CancelJob
    | events.Steer
    | events.ReportEvent
    | data.NextSlice
    | data.DescribeDataset
    | transfers.PullFile
    | transfers.ListFiles
    | ledger.HoldCheckpoint
    | ledger.DropCheckpoints
    | ledger.FindCheckpoints
    | transfers.BulkOffer
    | transfers.BulkDial
)
Response = (
    Acknowledged
    | nodes.HealthReport
    | nodes.PeerList
    | nodes.DialedBack
    | nodes.BandwidthMeasured
    | leases.LeaseRenewed
    | data.SliceAssigned
    | data.NoSlice
    | data.DatasetDescription
    | transfers.FileList
    | ledger.CheckpointHeld
    | ledger.CheckpointList
    | nodes.DoublesFound
    | transfers.BulkOffer
    | transfers.BulkAnswer
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

    body: leases.WorkerRequest
    v: int = WIRE_VERSION
    traceparent: str | None = None
    certificates: CertificateChain = ()


class Report(Value):
    """One entry of the long-lived report stream ``/hypha/report/1`` (worker -> scheduler). The first one on a
    new stream may say of which operation the stream's opening is part.
    """

    stamp: JobStamp
    incarnation: Id
    progress: events.Progress
    v: int = WIRE_VERSION
    traceparent: str | None = None

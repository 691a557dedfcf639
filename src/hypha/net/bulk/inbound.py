"""What the receiving end knows of one transfer, and of those who take files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import trio

from hypha.errors import Refused
from hypha.messages import TransferMeta
from hypha.net.bulk.connection import BulkConnection
from hypha.net.bulk.files import DiskFailed, WrongHash
from hypha.net.bulk.rendezvous import Expected
from hypha.net.bulk.wire import Verdict
from hypha.node import Arrived, Gate

#: Less than this within ``STILL_S`` of ``bulk_places`` is a trickle.
TRICKLE_BYTES = 128 << 10


@dataclass(eq=False)
class Acceptor:
    """Takes files of one kind (of one job); ``limit`` in bytes."""

    gate: Gate
    arrived: Arrived
    limit: int
    inbound: set[Inbound] = field(default_factory=set)

    def came_over(self, link: BulkConnection) -> None:
        """A file has arrived, over ``link``."""

    def failed(self, reason: Refused | WrongHash | DiskFailed) -> None:
        """An attempt came to an end that another one cannot mend."""


@dataclass(eq=False)
class Inbound:
    """One transfer on its way in."""

    token: str
    caller: str
    meta: TransferMeta
    acceptor: Acceptor
    destination: Path
    expected: Expected
    offered_at: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    #: the connection in use; cancelled when the sender offers anew, as it then has given that one up
    link_scope: trio.CancelScope | None = None
    #: an offer over a connection that was kept, while it waits for its turn
    offering: trio.CancelScope | None = None
    #: its connection was cut, and the sender has not offered again
    cut: bool = False
    #: waiting for a connection ends at its deadline
    waiting: trio.CancelScope | None = None
    turn: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    started_afresh: bool = False
    #: the connection in use, or the last one
    link: BulkConnection | None = None
    #: all bytes are here; it is being verified and taken, and must not be disturbed
    settling: bool = False
    #: of which operation of its sender it is part
    traceparent: str | None = None
    #: its sender would compress single blocks
    zstd_blocks: bool = False
    #: a pull of this node has asked for it
    pulled: bool = False
    #: what its sender is told in the end
    verdict: Verdict | None = None

    def come_another_way(self) -> None:
        """Its sender offers it anew: what it offered over a kept connection before is void."""
        if self.offering is not None:
            self.offering.cancel()

    @property
    def log_fields(self) -> dict[str, str]:
        """Whose it is, for the log."""
        stamp = self.meta.stamp
        return {"peer_id": self.caller} | ({"job_id": stamp.job_id} if stamp is not None else {})

    def moved(self) -> tuple[int, int]:
        """What changes while so much comes that its place is in use: a trickle fills nothing, and its place
        is lent.
        """
        link, heard = self.heard()
        return link, heard // TRICKLE_BYTES

    def heard(self) -> tuple[int, int]:
        """What changes while something comes: the connection, and the bytes that came over it."""
        return (id(self.link), self.link.heard) if self.link is not None else (0, 0)

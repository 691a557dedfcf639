"""One transfer on its way in: what is known of it, and how what comes becomes a file.

A file is collected beside its destination, verified, handed over. What is cut stays in the ``.part`` file for
the next attempt; what is corrupt or refused is deleted. The other end is told how it ended when it has ended,
and not before."""

from __future__ import annotations

import contextlib
import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import trio

from hypha.errors import Refused
from hypha.messages import PullFile, TransferMeta
from hypha.net.bulk.connections import BulkConnection
from hypha.net.bulk.files import DiskFailed, PartFile, WrongHash
from hypha.net.bulk.wire import ConnectionBroken, Go, Verdict
from hypha.net.peers.inbound_limits import Recent
from hypha.node import Arrived, Gate

logger = logging.getLogger(__name__)

#: Less than this within ``STILL_S`` of ``turns.py`` is a trickle.
TRICKLE_BYTES = 128 << 10
#: Part files of which it is remembered what they are parts of.
MAX_PARTS = 4096
#: Finished transfers remembered, for a sender that did not hear the acknowledgement.
MAX_REMEMBERED = 512


@dataclass(eq=False)
class Acceptor:
    """Takes files of one kind (of one job) that others send."""

    gate: Gate
    arrived: Arrived
    inbound: set[Inbound] = field(default_factory=set)


@dataclass(eq=False)
class Inbound:
    """One attempt to receive a file, over one connection."""

    token: str
    caller: str
    meta: TransferMeta
    destination: Path
    #: who takes it; None where this node has asked for it
    acceptor: Acceptor | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    #: it has a place here, and it is its sender that owes something
    has_turn: bool = False
    link: BulkConnection | None = None
    #: all bytes are here; it is being verified and taken, and must not be disturbed
    settling: bool = False
    #: of which operation of its sender it is part
    traceparent: str | None = None
    #: what its sender is told in the end
    verdict: Verdict | None = None

    @property
    def log_fields(self) -> dict[str, str]:
        stamp = self.meta.stamp
        return {"peer_id": self.caller} | ({"job_id": stamp.job_id} if stamp is not None else {})

    @property
    def arrived(self) -> bool:
        return self.verdict is not None and self.verdict.outcome == "ok"

    def moved(self) -> tuple[int, int]:
        """What changes while its place is in use: a trickle fills nothing, and its place is lent."""
        link, heard = self.heard()
        return link, heard // TRICKLE_BYTES

    def heard(self) -> tuple[int, int]:
        """What changes while something comes: the connection, and the bytes that came over it."""
        return (id(self.link), self.link.heard) if self.link is not None else (0, 0)


class Collecting:
    """Collects files; ``limiter`` is for threads that write them."""

    def __init__(self, limiter: trio.CapacityLimiter) -> None:
        self._limiter = limiter
        #: what the .part files of this process are parts of
        self._parts: Recent[Path, TransferMeta] = Recent(MAX_PARTS)
        #: by caller and token: transfers that were finished
        self.done: Recent[tuple[str, str], int] = Recent(MAX_REMEMBERED)

    def part_of(self, destination: Path, request: PullFile) -> TransferMeta | None:
        """What this process has begun for such a ``request`` at ``destination``."""
        meta = self._parts.get(destination)
        same = meta is not None and (meta.kind, meta.name) == (request.kind, request.name)
        return meta if same else None

    async def open_part(self, inbound: Inbound, stack: ExitStack, fresh: bool = False) -> PartFile:
        """Its part file, open where it goes on (``fresh``: from the beginning), to be filled by ``collect``;
        ``stack`` closes it at its true length where it does not become a file. DiskFailed.
        """
        meta, destination = inbound.meta, inbound.destination
        part = PartFile(destination, meta)
        stack.callback(part.abandon)
        fresh = fresh or self._parts.get(destination, meta).checked != meta.checked
        self._parts[destination] = meta
        try:
            await trio.to_thread.run_sync(part.open, fresh, abandon_on_cancel=True, limiter=self._limiter)
        except DiskFailed:
            part.discard()
            raise
        return part

    async def collect(self, link: BulkConnection, inbound: Inbound, part: PartFile, go: Go) -> Verdict:
        """Receive, verify, hand over; how that ended, which the other end is told. ConnectionBroken."""
        try:
            await link.collect(part, inbound.meta, go)
            inbound.settling = True
            await link.while_working(lambda: trio.to_thread.run_sync(part.finish, limiter=self._limiter))
        except WrongHash as exc:
            logger.warning("What arrived is corrupt and was deleted: %s", exc, extra=inbound.log_fields)
            # what an earlier process left behind may have been part of something else: once more, from 0
            verdict = Verdict("corrupt", reason=str(exc), again=go.offset > 0)
        except DiskFailed as exc:
            part.discard()
            return await self.disk_failed(link, inbound, exc)
        else:
            verdict = await link.while_working(lambda: self._hand_over(inbound))
        self._parts.pop(inbound.destination, None)
        if verdict.outcome == "ok":
            self.done[inbound.caller, inbound.token] = inbound.meta.size
        with contextlib.suppress(ConnectionBroken):  # a sender that misses it asks again
            await link.say(verdict)
        return verdict

    async def disk_failed(self, link: BulkConnection, inbound: Inbound, exc: DiskFailed) -> Verdict:
        """Tell the other end that it cannot be written."""
        logger.error("%s", exc, extra=inbound.log_fields)
        refusal = Verdict("refused", "no-space" if exc.full else "internal", str(exc))
        with contextlib.suppress(ConnectionBroken):
            await link.say(refusal)
        await link.drain()
        return refusal

    async def _hand_over(self, inbound: Inbound) -> Verdict:
        if inbound.acceptor is None:
            return Verdict("ok")
        try:
            await inbound.acceptor.arrived(inbound.caller, inbound.meta, inbound.destination)
        except Refused as exc:
            refused = exc
        except Exception:  # the edge of the service: the receiver's own code failed
            logger.exception("Taking %s failed.", inbound.meta.name, extra=inbound.log_fields)
            refused = Refused("internal", f"taking {inbound.meta.name} failed there; its log says more")
        else:
            return Verdict("ok")
        inbound.destination.unlink(missing_ok=True)
        return Verdict("refused", refused.code, refused.reason)

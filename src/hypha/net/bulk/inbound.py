"""One transfer on its way in: what is known of it, who takes it, and how what comes becomes a file.

A file is collected beside its destination, verified, handed over. What is cut stays in the ``.part`` file for
the next attempt; what is corrupt or refused is deleted. The other end is told how it ended when it has ended,
and not before."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

import trio

from hypha.errors import NetworkError, Refused, TransferCorrupt, TransferFailed
from hypha.messages import PeerRef, PullFile, TransferMeta
from hypha.net.bulk.connections import BulkConnection
from hypha.net.bulk.files import DiskFailed, PartFile, WrongHash
from hypha.net.bulk.rendezvous import Expected
from hypha.net.bulk.wire import ConnectionBroken, Go, Verdict, id_of, new_token
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
    """Takes files of one kind (of one job); ``limit`` in bytes."""

    gate: Gate
    arrived: Arrived
    limit: int
    inbound: set[Inbound] = field(default_factory=set)
    #: by which way its last file came
    came_by: str = ""

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
        stamp = self.meta.stamp
        return {"peer_id": self.caller} | ({"job_id": stamp.job_id} if stamp is not None else {})

    def moved(self) -> tuple[int, int]:
        """What changes while its place is in use: a trickle fills nothing, and its place is lent."""
        link, heard = self.heard()
        return link, heard // TRICKLE_BYTES

    def heard(self) -> tuple[int, int]:
        """What changes while something comes: the connection, and the bytes that came over it."""
        return (id(self.link), self.link.heard) if self.link is not None else (0, 0)


class WantedFile(Acceptor):
    """One pull: what it is willing to take, and how it ended."""

    def __init__(
        self,
        peer: PeerRef | str,
        request: PullFile,
        destination: Path,
        expect: TransferMeta | None,
        max_bytes: int,
    ) -> None:
        super().__init__(self._gate, self._arrived, max_bytes)
        self.peer = peer
        self.peer_id = id_of(peer)
        self.token = new_token()
        self.request = request
        self.destination = destination
        self.expect = expect
        self.over = trio.Event()
        self.error: NetworkError | None = None
        #: what the provider said of the file
        self.meta: TransferMeta | None = None
        #: the provider has answered with the file
        self.agreed = False
        #: what lay here was a part of something else
        self.afresh = False
        #: what was here already when the last attempt began
        self.offset = 0

    @property
    def log_fields(self) -> dict[str, str]:
        return {"peer_id": self.peer_id}

    def begin(self) -> Inbound:
        """An attempt over a connection of ours, for which nothing need be offered."""
        meta = self.expect or TransferMeta(kind=self.request.kind, name=self.request.name, size=0)
        expected = Expected(self.peer_id)
        expected.close()
        return Inbound(
            token=self.token,
            caller=self.peer_id,
            meta=meta,
            acceptor=self,
            destination=self.destination,
            expected=expected,
            offered_at=trio.current_time(),
            started_afresh=self.afresh,
            pulled=True,
        )

    def failure(self, why: str) -> TransferFailed:
        """What to raise where it did not come; another attempt may."""
        return TransferFailed(self.peer_id, self.request.name, why)

    def result(self) -> TransferMeta:
        """What the provider said of the file, which is here; else raises why it is not."""
        self.raise_if_failed()
        if self.meta is None:
            raise self.failure("it ended without a result")
        return self.meta

    def raise_if_failed(self) -> None:
        if self.error is not None:
            raise self.error

    def check(self, meta: TransferMeta) -> None:
        """Refused or TransferCorrupt when that is not what was asked for."""
        name = self.request.name
        if meta.size > self.limit:
            raise Refused(
                "too-large", f"{name} has {meta.size} bytes, over the limit of {self.limit}", self.peer_id
            )
        expect = self.expect
        if meta.kind != self.request.kind:
            # the kind decides how what arrives is checked and kept
            raise TransferCorrupt(self.peer_id, name, f"it offers a file of the kind {meta.kind!r}")
        if expect is not None and (meta.size, meta.blake3) != (expect.size, expect.blake3):
            raise TransferCorrupt(self.peer_id, name, "it offers other content than was promised")
        self.meta = meta

    def failed(self, reason: Refused | WrongHash | DiskFailed) -> None:
        if isinstance(reason, WrongHash):
            self._end(TransferCorrupt(self.peer_id, self.request.name, str(reason)))
        else:
            self._end(self.failure(str(reason)))

    async def _gate(self, caller: str, meta: TransferMeta) -> Path:
        try:
            self.check(meta)
        except NetworkError as exc:
            self._end(exc)
            raise Refused("invalid", "that is not what was asked for") from exc
        return self.destination

    async def _arrived(self, caller: str, meta: TransferMeta, path: Path) -> None:
        self._end(None)

    def _end(self, error: NetworkError | None) -> None:
        if not self.over.is_set():
            self.error = error
            self.over.set()


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

    async def open_part(self, inbound: Inbound) -> PartFile:
        """Its part file, open where it goes on, to be filled by ``collect`` or abandoned. DiskFailed."""
        meta, destination = inbound.meta, inbound.destination
        part = PartFile(destination, meta)
        known = self._parts.get(destination, meta)
        fresh = inbound.started_afresh or known.checked != meta.checked
        self._parts[destination] = meta
        try:
            await trio.to_thread.run_sync(part.open, fresh, abandon_on_cancel=True, limiter=self._limiter)
        except DiskFailed:
            part.discard()
            raise
        except BaseException:
            part.abandon()
            raise
        return part

    async def collect(self, link: BulkConnection, inbound: Inbound, part: PartFile, go: Go) -> Verdict | None:
        """Receive, verify, hand over, tell the other end; None when another attempt is left.
        ConnectionBroken.
        """
        try:
            await link.collect(part, inbound.meta, go)
            inbound.settling = True
            await link.while_working(lambda: trio.to_thread.run_sync(part.finish, limiter=self._limiter))
        except WrongHash as exc:
            return await self._corrupt(link, inbound, exc, again=go.offset > 0 and not inbound.started_afresh)
        except DiskFailed as exc:
            part.discard()
            return await self.disk_failed(link, inbound, exc)
        finally:
            part.abandon()
        verdict = await link.while_working(lambda: self._arrived(inbound))
        self._parts.pop(inbound.destination, None)
        if verdict.outcome == "ok":
            inbound.acceptor.came_by = link.way
            self.done[inbound.caller, inbound.token] = inbound.meta.size
        with contextlib.suppress(ConnectionBroken):  # a sender that misses it asks again
            await link.say(verdict)
        return verdict

    async def disk_failed(self, link: BulkConnection, inbound: Inbound, exc: DiskFailed) -> Verdict:
        """Tell both ends that it cannot be written."""
        logger.error("%s", exc, extra=inbound.log_fields)
        refusal = Verdict("refused", "no-space" if exc.full else "internal", str(exc))
        inbound.acceptor.failed(exc)
        with contextlib.suppress(ConnectionBroken):
            await link.say(refusal)
        await link.drain()
        return refusal

    async def _corrupt(
        self, link: BulkConnection, inbound: Inbound, exc: WrongHash, again: bool
    ) -> Verdict | None:
        # what an earlier process left behind may have been part of something else: once more, from 0
        inbound.started_afresh = True
        inbound.settling = False
        self._parts.pop(inbound.destination, None)
        logger.warning("What arrived is corrupt and was deleted: %s", exc, extra=inbound.log_fields)
        if not again:
            inbound.acceptor.failed(exc)
        verdict = Verdict("corrupt", reason=str(exc), again=again)
        with contextlib.suppress(ConnectionBroken):
            await link.say(verdict)
        return None if again else verdict

    async def _arrived(self, inbound: Inbound) -> Verdict:
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
        inbound.acceptor.failed(refused)
        return Verdict("refused", refused.code, refused.reason)

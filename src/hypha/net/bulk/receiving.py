"""The receiving end of files that others send: who may send what, and when it is really here.

An offer is admitted by the gate of whoever accepts such files, waits for one of few places, is received,
verified, handed to ``arrived``, and only then acknowledged. A file is collected beside its destination. What
is cut stays in the ``.part`` file for the next attempt; what is corrupt or refused is deleted. The other end
is told how it ended when it has ended, and not before.
"""

from __future__ import annotations

import contextlib
import logging
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import trio

from hypha.errors import Refused, TransferCorrupt, TransferFailed
from hypha.messages import BulkOffer, PullFile, TransferMeta
from hypha.net.bulk.blocks import new_key
from hypha.net.bulk.connections import BulkConnection
from hypha.net.bulk.files import DiskFailed, FileChanged, PartFile, WrongHash, copy_verified, free_bytes
from hypha.net.bulk.inbound import Acceptance, Acceptor, Inbound
from hypha.net.bulk.signals import note_link, receiving
from hypha.net.bulk.turns import TransferSlots
from hypha.net.bulk.wire import BulkConnections, ConnectionBroken, Go, Verdict, require_sender
from hypha.net.peers.inbound_limits import Recent

logger = logging.getLogger(__name__)

#: Part files of which it is remembered what they are parts of.
MAX_PARTS = 4096
#: Finished transfers remembered, for a sender that did not hear the acknowledgement.
MAX_REMEMBERED = 512
#: No larger file is taken of those that others send.
MAX_ACCEPTED_BYTES = 100 << 30
#: This much of a disk is left to others.
RESERVE_BYTES = 16 << 20


class Receiving:
    """Receives what others offer."""

    def __init__(self, links: BulkConnections, at_once: int) -> None:
        """``at_once`` are received, where bytes move."""
        self._me = links.identity.peer_id
        self._links = links
        self.places = TransferSlots(at_once)
        self._limiter = trio.CapacityLimiter(2 * at_once)
        self.acceptance = Acceptance()
        #: what the .part files of this process are parts of
        self._parts: Recent[Path, TransferMeta] = Recent(MAX_PARTS)
        #: by caller and token: transfers that were finished
        self._done: Recent[tuple[str, str], int] = Recent(MAX_REMEMBERED)

    async def offered(self, link: BulkConnection, offer: BulkOffer) -> bool:
        """Receive the file that is offered over ``link``; whether that is as it was. Refused,
        ConnectionBroken.
        """
        caller, meta, token = link.peer, offer.meta, offer.token
        if not 16 <= len(token) <= 64:
            raise Refused("malformed", "the token of an offer has 16 to 64 characters")
        require_sender(self._links, caller, meta.kind)
        if (earlier := self.acceptance.by_token.get(token)) is not None:
            if (earlier.caller, earlier.meta) != (caller, meta):
                raise Refused("not-found", "this token belongs to another transfer")
            # its sender has given that connection up
            await link.while_working(earlier.end)
        if (caller, token) in self._done:
            await link.say(Verdict("ok"))
            return True
        with ExitStack() as under_way:
            inbound = await link.decided(lambda: self._admit(link, offer, under_way))
            with receiving(inbound), inbound.scope:
                async with AsyncExitStack() as stack:
                    place = self.places.hold(inbound.moved)
                    await link.while_working(lambda: stack.enter_async_context(place))
                    inbound.has_turn = True
                    inbound.verdict = await self._receive(link, inbound)
        return inbound.arrived

    async def _receive(self, link: BulkConnection, inbound: Inbound) -> Verdict:
        note_link(link)
        with ExitStack() as stack:
            try:
                part = await link.while_working(lambda: self.open_part(inbound, stack))
            except DiskFailed as exc:
                return await self.disk_failed(link, inbound, exc)
            go = Go(part.received, new_key())
            await link.say(go)
            return await self.collect(link, inbound, part, go)

    async def _admit(self, link: BulkConnection, offer: BulkOffer, under_way: ExitStack) -> Inbound:
        acceptor, destination = await self._gated(link.peer, offer.meta)
        inbound = Inbound(
            offer.token,
            link.peer,
            offer.meta,
            destination,
            acceptor,
            link=link,
            traceparent=offer.traceparent,
        )
        await self.make_space(inbound)
        under_way.enter_context(self.acceptance.tracked(inbound))
        return inbound

    async def _gated(self, caller: str, meta: TransferMeta) -> tuple[Acceptor, Path]:
        """Who takes the file that ``caller`` would send, and where to. Refused."""
        acceptor = self.acceptance.acceptor_of(meta)
        if not 0 <= meta.size <= MAX_ACCEPTED_BYTES:
            allowed = f"{MAX_ACCEPTED_BYTES} are allowed for {meta.kind}"
            raise Refused("too-large", f"{meta.name} has {meta.size} bytes, {allowed}")
        return acceptor, await acceptor.gate(caller, meta)

    async def make_space(self, inbound: Inbound) -> None:
        """See that the disk has room for it, and that nothing else writes to its destination. Refused."""
        meta, destination = inbound.meta, inbound.destination
        free = await trio.to_thread.run_sync(free_bytes, destination)
        if free is not None and meta.size > max(0, free - RESERVE_BYTES):
            text = f"{meta.name} has {meta.size} bytes; the disk of {destination.parent} has {free} left"
            logger.error("%s is not taken: %s", meta.kind, text, extra=inbound.log_fields)
            raise Refused("no-space", text)
        await self.acceptance.claim(inbound)

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
            await link.while_working(
                lambda: trio.to_thread.run_sync(part.finish, limiter=self._limiter), to_its_end=True
            )
        except WrongHash as exc:
            logger.warning("What arrived is corrupt and was deleted: %s", exc, extra=inbound.log_fields)
            # what an earlier process left behind may have been part of something else: once more, from 0
            verdict = Verdict("corrupt", reason=str(exc), again=go.offset > 0)
        except DiskFailed as exc:
            part.discard()
            return await self.disk_failed(link, inbound, exc)
        else:
            verdict = await link.while_working(lambda: self._hand_over(inbound), to_its_end=True)
        self._parts.pop(inbound.destination, None)
        if verdict.outcome == "ok":
            self._done[inbound.caller, inbound.token] = inbound.meta.size
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

    async def take_local(self, path: Path, meta: TransferMeta) -> None:
        """A node sends to itself: the same gates and checks, and no network."""
        acceptor, destination = await self._gated(self._me, meta)
        await self.copy(path, meta, destination)
        try:
            await acceptor.arrived(self._me, meta, destination)
        except Refused:
            destination.unlink(missing_ok=True)
            raise

    async def copy(self, path: Path, meta: TransferMeta, destination: Path) -> None:
        """What a transfer does, within this machine. Refused, TransferCorrupt, TransferFailed."""
        await self.make_space(Inbound("", self._me, meta, destination))
        async with self.places.hold(trio.current_time):
            try:
                await trio.to_thread.run_sync(copy_verified, path, destination, meta, limiter=self._limiter)
            except WrongHash as exc:
                raise TransferCorrupt(self._me, meta.name, str(exc)) from exc
            except DiskFailed as exc:
                raise Refused("no-space" if exc.full else "internal", str(exc), self._me) from exc
            except FileChanged as exc:
                raise TransferFailed(self._me, meta.name, str(exc)) from exc

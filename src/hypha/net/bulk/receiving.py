"""The receiving end of files that others send: who may send what, and when it is really here.

An offer is admitted by the gate of whoever accepts such files, waits for one of few places, is received,
verified, handed to ``arrived``, and only then acknowledged. Whoever offers anew what was cut goes on with it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import trio

from hypha.errors import Refused, TransferCorrupt, TransferFailed
from hypha.messages import BulkOffer, TransferMeta
from hypha.net.bulk.blocks import new_key
from hypha.net.bulk.connections import BulkConnection
from hypha.net.bulk.files import DiskFailed, FileChanged, WrongHash, copy_verified, free_bytes
from hypha.net.bulk.inbound import Acceptor, Collecting, Inbound
from hypha.net.bulk.signals import note_link, receiving
from hypha.net.bulk.turns import TransferSlots
from hypha.net.bulk.wire import BulkConnections, Go, Verdict, require_sender
from hypha.node import Arrived, Gate

logger = logging.getLogger(__name__)

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
        self._acceptors: dict[tuple[str, str | None], Acceptor] = {}
        #: by token
        self._inbound: dict[str, Inbound] = {}
        self.collecting = Collecting(self._limiter)

    @property
    def under_way(self) -> int:
        return len(self._inbound)

    def accept(self, kind: str, job_id: str | None, gate: Gate, arrived: Arrived) -> Callable[[], None]:
        key = (kind, job_id)
        if key in self._acceptors:
            raise ValueError(f"files of kind {kind!r} of job {job_id!r} are accepted by somebody already")
        acceptor = self._acceptors[key] = Acceptor(gate, arrived)

        def stop() -> None:
            if self._acceptors.get(key) is acceptor:
                del self._acceptors[key]
            for inbound in acceptor.inbound:
                # ``arrived`` itself may be the one that stops
                if not inbound.settling:
                    inbound.scope.cancel()

        return stop

    @contextlib.contextmanager
    def tracked(self, inbound: Inbound) -> Iterator[None]:
        """The transfer is under way meanwhile."""
        self._inbound[inbound.token] = inbound
        alike = set() if inbound.acceptor is None else inbound.acceptor.inbound
        alike.add(inbound)
        try:
            yield
        finally:
            inbound.ended.set()
            alike.discard(inbound)
            if self._inbound.get(inbound.token) is inbound:
                del self._inbound[inbound.token]

    async def offered(self, link: BulkConnection, offer: BulkOffer) -> bool:
        """Receive the file that is offered over ``link``; whether that is as it was. Refused,
        ConnectionBroken.
        """
        caller, meta, token = link.peer, offer.meta, offer.token
        if not 16 <= len(token) <= 64:
            raise Refused("malformed", "the token of an offer has 16 to 64 characters")
        require_sender(self._links, caller, meta.kind)
        if (earlier := self._inbound.get(token)) is not None:
            if (earlier.caller, earlier.meta) != (caller, meta):
                raise Refused("not-found", "this token belongs to another transfer")
            # its sender has given that connection up
            await link.while_working(lambda: _end(earlier))
        if (caller, token) in self.collecting.done:
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
                part = await link.while_working(lambda: self.collecting.open_part(inbound, stack))
            except DiskFailed as exc:
                return await self.collecting.disk_failed(link, inbound, exc)
            go = Go(part.received, new_key())
            await link.say(go)
            return await self.collecting.collect(link, inbound, part, go)

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
        under_way.enter_context(self.tracked(inbound))
        return inbound

    async def _gated(self, caller: str, meta: TransferMeta) -> tuple[Acceptor, Path]:
        """Who takes the file that ``caller`` would send, and where to. Refused."""
        job_id = meta.stamp.job_id if meta.stamp is not None else None
        acceptor = self._acceptors.get((meta.kind, job_id)) or self._acceptors.get((meta.kind, None))
        if acceptor is None:
            raise Refused("not-found", f"nobody here takes files of kind {meta.kind!r} for this job")
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
        while others := [
            one for one in self._inbound.values() if one.destination == destination and one is not inbound
        ]:
            # a sender that starts anew ends its own earlier transfer
            if others[0].caller != inbound.caller or others[0].settling:
                raise Refused("busy", f"{others[0].meta.name} is being received already")
            await _end(others[0])

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


async def _end(inbound: Inbound) -> None:
    if not inbound.settling:
        inbound.scope.cancel()
    await inbound.ended.wait()

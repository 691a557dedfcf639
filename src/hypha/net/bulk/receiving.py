"""The receiving end of transfers: who may send what, whose turn it is, and when it is really here.

An offer is admitted by the gate of whoever accepts such files (or by the pull that asked for it), waits
for one of few places, is received, verified, handed to ``arrived``, and only then acknowledged. A sender
whose turn has not come is told to ask again, so nothing but a token waits.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import trio

from hypha.errors import Refused, TransferCorrupt, TransferFailed
from hypha.messages import Acknowledged, BulkAnswer, BulkDial, BulkOffer, TransferMeta
from hypha.net.bulk.connections import BulkConnection
from hypha.net.bulk.files import DiskFailed, FileChanged, PartFile, WrongHash, copy_verified, free_bytes
from hypha.net.bulk.inbound import Acceptor, Collecting, Inbound, WantedFile
from hypha.net.bulk.kept_connections import KeptConnections
from hypha.net.bulk.rendezvous import Expected, Rendezvous
from hypha.net.bulk.signals import note_link, receiving
from hypha.net.bulk.turns import TransferSlots
from hypha.net.bulk.wire import BulkConnections, ConnectionBroken, Verdict, require_sender
from hypha.node import Arrived, Gate

logger = logging.getLogger(__name__)

#: Offers that may wait for their turn, in all and from one peer.
MAX_WAITING = 4096
MAX_WAITING_PER_PEER = 64
#: The first few in the queue are answered when their turn comes, the others ask again.
MAX_HELD_ANSWERS = 8
HOLD_S = 4.0
ASK_AGAIN_S = 1.0
#: A waiting offer that was not repeated for this long is forgotten.
FORGET_S = 20.0
#: A sender whose turn it is must connect within this, the fallbacks included.
CONNECT_S = 40.0
#: After a cut its place is kept this long, unless the sender offers again; what is cut later begins anew.
BROKEN_S = 5.0
#: A pull that has its file lets the acknowledgement go out for this long.
SETTLE_S = 2.0
#: No larger file is taken of those that others send.
MAX_ACCEPTED_BYTES = 100 << 30
#: This much of a disk is left to others.
RESERVE_BYTES = 16 << 20


class Receiving:
    """Answers offers."""

    def __init__(
        self, links: BulkConnections, rendezvous: Rendezvous, kept: KeptConnections, at_once: int
    ) -> None:
        """``at_once`` are received, where bytes move."""
        self._links = links
        self._rendezvous = rendezvous
        self.places = TransferSlots(at_once)
        self._limiter = trio.CapacityLimiter(2 * at_once)
        self._acceptors: dict[tuple[str, str | None], Acceptor] = {}
        #: pulls that have asked to be sent a file, by token
        self._wanted: dict[str, WantedFile] = {}
        self._inbound: dict[str, Inbound] = {}
        self._held = 0
        self._kept = kept
        self.collecting = Collecting(self._limiter)
        self.nursery: trio.Nursery | None = None
        links.answer(BulkOffer, self._offered)
        links.answer(BulkDial, self._dial)

    @property
    def under_way(self) -> int:
        return len(self._inbound)

    def accept(self, kind: str, job_id: str | None, gate: Gate, arrived: Arrived) -> Callable[[], None]:
        key = (kind, job_id)
        if key in self._acceptors:
            raise ValueError(f"files of kind {kind!r} of job {job_id!r} are accepted by somebody already")
        acceptor = Acceptor(gate, arrived, MAX_ACCEPTED_BYTES)
        self._acceptors[key] = acceptor

        def stop() -> None:
            if self._acceptors.get(key) is acceptor:
                del self._acceptors[key]
            for inbound in acceptor.inbound:
                # ``arrived`` itself may be the one that stops
                if not inbound.settling:
                    inbound.scope.cancel()

        return stop

    @contextlib.asynccontextmanager
    async def wanting(self, pull: WantedFile) -> AsyncIterator[None]:
        """Take the offer of ``pull`` when it comes; afterwards nothing of it runs any more."""
        self._wanted[pull.token] = pull
        try:
            yield
        finally:
            del self._wanted[pull.token]
            await self._end(pull.token)

    async def _end(self, token: str) -> None:
        inbound = self._inbound.get(token)
        if inbound is not None:
            with trio.CancelScope(shield=True):
                if inbound.settling:
                    # it is here: the sender is just about to hear of it
                    with trio.move_on_after(SETTLE_S):
                        await inbound.ended.wait()
                inbound.scope.cancel()
                await inbound.ended.wait()

    def is_coming(self, token: str) -> bool:
        """Whether the transfer is being received, or its sender asked not long ago (and since any cut)."""
        inbound = self._inbound.get(token)
        if inbound is None:
            return False
        asked = trio.current_time() - inbound.offered_at < FORGET_S / 2
        return inbound.link_scope is not None or inbound.settling or (asked and not inbound.cut)

    def heard(self, token: str) -> tuple[int, int]:
        """What changes while something comes for the transfer: its connection, and the bytes that came."""
        inbound = self._inbound.get(token)
        return inbound.heard() if inbound is not None else (0, 0)

    async def wait_still(self, token: str, still_s: float) -> None:
        """Return when nothing has come for the transfer for ``still_s``. While it waits for a place here, or
        is being verified, its sender owes nothing.
        """
        heard, since = self.heard(token), trio.current_time()
        while trio.current_time() < since + still_s:
            await trio.sleep(still_s / 8)
            inbound = self._inbound.get(token)
            ours = inbound is not None and (inbound.settling or not inbound.turn.is_set())
            if ours or self.heard(token) != heard:
                heard, since = self.heard(token), trio.current_time()

    async def take_local(self, path: Path, meta: TransferMeta, token: str) -> None:
        """A node sends to itself: the same gates and checks, and no network."""
        me = self._links.identity.peer_id
        acceptor, destination = await self.admit(me, meta, token)
        async with self.places.hold(trio.current_time):
            try:
                await trio.to_thread.run_sync(copy_verified, path, destination, meta, limiter=self._limiter)
            except WrongHash as exc:
                raise TransferCorrupt(me, meta.name, str(exc)) from exc
            except DiskFailed as exc:
                raise Refused("no-space" if exc.full else "internal", str(exc), me) from exc
            except FileChanged as exc:
                raise TransferFailed(me, meta.name, str(exc)) from exc
        try:
            await acceptor.arrived(me, meta, destination)
        except Refused:
            destination.unlink(missing_ok=True)
            raise

    async def _offered(self, caller: str, offer: BulkOffer) -> BulkAnswer:
        inbound = await self.agree(caller, offer)
        if inbound is None:
            return BulkAnswer(offset=offer.meta.size, addresses=(), done=True)
        inbound.come_another_way()
        return await self._answer(inbound)

    async def agree(self, caller: str, offer: BulkOffer) -> Inbound | None:
        """The transfer that ``offer`` begins or goes on with; None when it is done already. Refused."""
        if not 16 <= len(offer.token) <= 64:
            raise Refused("malformed", "the token of an offer has 16 to 64 characters")
        if (caller, offer.token) in self.collecting.done:
            return None
        inbound = self._inbound.get(offer.token)
        if inbound is None:
            require_sender(self._links, caller, offer.meta.kind)
            acceptor, destination = await self.admit(caller, offer.meta, offer.token)
            # the gate may have taken its time: the same offer could be here twice
            inbound = self._inbound.get(offer.token)
            if inbound is None:
                inbound = self._begin(caller, offer, acceptor, destination)
        elif inbound.link_scope is not None and inbound.caller == caller and not inbound.settling:
            inbound.link_scope.cancel()
        if inbound.caller != caller or inbound.meta != offer.meta:
            raise Refused("not-found", "this token belongs to another transfer")
        inbound.offered_at = trio.current_time()
        inbound.zstd_blocks = offer.zstd_blocks
        inbound.cut = False
        if inbound.waiting is not None:
            inbound.waiting.deadline = inbound.offered_at + CONNECT_S
        return inbound

    async def _answer(self, inbound: Inbound) -> BulkAnswer:
        awaited = inbound.ended if inbound.settling else inbound.turn
        if not awaited.is_set() and self._held < MAX_HELD_ANSWERS:
            self._held += 1
            try:
                with trio.move_on_after(HOLD_S):
                    await awaited.wait()
            finally:
                self._held -= 1
        if (inbound.caller, inbound.token) in self.collecting.done:
            return BulkAnswer(offset=inbound.meta.size, addresses=(), done=True)
        if not inbound.turn.is_set() or inbound.ended.is_set() or inbound.settling:
            return BulkAnswer(offset=0, addresses=(), wait_s=ASK_AGAIN_S)
        return BulkAnswer(offset=0, addresses=tuple(self._links.bulk_addresses()))

    async def admit(
        self, caller: str, meta: TransferMeta, token: str, taker: Acceptor | None = None
    ) -> tuple[Acceptor, Path]:
        """Who takes the file that ``caller`` would send, and where to; nothing else writes there. Refused."""
        others = [inbound for inbound in self._inbound.values() if inbound.token != token]
        mine = sum(inbound.caller == caller for inbound in others)
        if len(others) >= MAX_WAITING or mine >= MAX_WAITING_PER_PEER:
            raise Refused("busy", "too many transfers are waiting here; try again later")
        acceptor: Acceptor | None
        if taker is not None:
            acceptor = taker
        elif token in self._wanted:
            acceptor = wanted = self._wanted[token]
            if wanted.peer_id != caller:
                raise Refused("not-found", "this token belongs to another transfer")
        else:
            job_id = meta.stamp.job_id if meta.stamp is not None else None
            acceptor = self._acceptors.get((meta.kind, job_id)) or self._acceptors.get((meta.kind, None))
        if acceptor is None:
            raise Refused("not-found", f"nobody here takes files of kind {meta.kind!r} for this job")
        if not 0 <= meta.size <= acceptor.limit:
            allowed = f"{acceptor.limit} are allowed for {meta.kind}"
            raise Refused("too-large", f"{meta.name} has {meta.size} bytes, {allowed}")
        destination = await acceptor.gate(caller, meta)
        free = await trio.to_thread.run_sync(free_bytes, destination)
        if free is not None and meta.size > max(0, free - RESERVE_BYTES):
            text = f"{meta.name} has {meta.size} bytes; the disk of {destination.parent} has {free} left"
            logger.error("%s is not taken: %s", meta.kind, text, extra={"peer_id": caller})
            raise Refused("no-space", text)
        await self._supersede(caller, token, destination)
        return acceptor, destination

    async def _supersede(self, caller: str, token: str, destination: Path) -> None:
        """One file is written by one transfer: a sender that starts anew ends its own earlier one."""
        for one in list(self._inbound.values()):
            if one.destination == destination and one.token != token:
                if one.caller != caller or one.settling:
                    raise Refused("busy", f"{one.meta.name} is being received already")
                one.scope.cancel()
                await one.ended.wait()

    def _begin(self, caller: str, offer: BulkOffer, acceptor: Acceptor, destination: Path) -> Inbound:
        if self.nursery is None:
            raise Refused("busy", "this node is closing")
        inbound = Inbound(
            token=offer.token,
            caller=caller,
            meta=offer.meta,
            acceptor=acceptor,
            destination=destination,
            expected=Expected(caller),
            offered_at=trio.current_time(),
            traceparent=offer.traceparent,
            pulled=offer.token in self._wanted,
        )
        self._inbound[offer.token] = inbound
        acceptor.inbound.add(inbound)
        self.nursery.start_soon(self._run, inbound)
        return inbound

    async def _dial(self, caller: str, request: BulkDial) -> Acknowledged:
        """A sender could not dial us: we dial it."""
        if not self._rendezvous.is_expected(request.token, caller):
            raise Refused("not-found", "this transfer is not expected here, or no longer")
        try:
            await self._rendezvous.dial_and_arrive(caller, request.addresses, request.token)
        except ConnectionBroken as exc:
            raise Refused("unreachable", f"no direct connection to the caller: {exc}") from exc
        return Acknowledged()

    async def _run(self, inbound: Inbound) -> None:
        try:
            with (
                self.tracked(inbound),
                receiving(inbound),
                inbound.scope,
                self._rendezvous.expect(inbound.token, inbound.expected),
            ):
                async with self.places.hold(inbound.moved):
                    if trio.current_time() - inbound.offered_at < FORGET_S:
                        inbound.turn.set()
                        await self._receive(inbound)
        except Exception:  # the edge of a task for a sender: its transfer ends, and the node does not
            logger.exception("Receiving %s failed.", inbound.meta.name, extra=inbound.log_fields)

    @contextlib.contextmanager
    def tracked(self, inbound: Inbound) -> Iterator[None]:
        """The transfer is under way meanwhile."""
        self._inbound[inbound.token] = inbound
        inbound.acceptor.inbound.add(inbound)
        try:
            yield
        finally:
            inbound.ended.set()
            inbound.turn.set()
            inbound.acceptor.inbound.discard(inbound)
            if self._inbound.get(inbound.token) is inbound:
                del self._inbound[inbound.token]

    async def _receive(self, inbound: Inbound) -> None:
        verdict: Verdict | None = None
        patience_s = CONNECT_S
        while verdict is None:
            link = None
            with trio.move_on_after(patience_s) as inbound.waiting:
                link = await inbound.expected.take()
            inbound.waiting = None
            if link is None:
                return
            offered_at = inbound.offered_at
            with trio.CancelScope() as inbound.link_scope:
                try:
                    verdict = await self._receive_over(link, inbound)
                except ConnectionBroken as exc:
                    logger.info(
                        "Receiving %s was interrupted: %s.", inbound.meta.name, exc, extra=inbound.log_fields
                    )
                finally:
                    # where both ends know how, whoever wanted this file asks for the next one over it
                    speaks = inbound.pulled and link.knows_want
                    if not (
                        verdict is not None and verdict.outcome == "ok" and self._kept.give(link, speaks)
                    ):
                        await link.close()
            inbound.link_scope, inbound.verdict = None, verdict
            # a sender that is still there offers again at once; if it did, it is about to connect
            inbound.cut = inbound.offered_at <= offered_at
            patience_s = BROKEN_S if inbound.cut else CONNECT_S

    async def _receive_over(self, link: BulkConnection, inbound: Inbound) -> Verdict | None:
        """Receive over one connection; the verdict, or None when there is something left to try."""
        inbound.link = link
        note_link(link)
        part: PartFile | None = None

        async def open_part() -> PartFile:
            nonlocal part
            part = await self.collecting.open_part(inbound)
            return part

        try:
            opened = await link.while_working(open_part)
            go = link.new_go(opened.received, inbound.zstd_blocks)
            await link.say(go)
            return await self.collecting.collect(link, inbound, opened, go)
        except DiskFailed as exc:
            return await self.collecting.disk_failed(link, inbound, exc)
        finally:
            # also where it is cancelled: a part is closed at its true length
            if part is not None:
                part.abandon()

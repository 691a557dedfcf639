"""The sending end of transfers: offer, connect by whatever way leads there, send, hear the verdict.

A cut transfer is offered again and goes on where it was cut. Only so many are sent at once; the others queue,
first come first served, and one that needs another attempt queues anew.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from hypha.config.tuning import TransferTuning
from hypha.errors import (
    NetworkError,
    PeerUnreachable,
    Refused,
    RequestTimeout,
    TransferCorrupt,
    TransferFailed,
)
from hypha.messages import BulkAnswer, BulkDial, BulkOffer, PeerRef, TransferMeta
from hypha.net.bulk.blocks import KINDS as PACKED_KINDS
from hypha.net.bulk.blocks import BlockPacker, Known, Packing
from hypha.net.bulk.connections import BulkConnection
from hypha.net.bulk.files import FileChanged, SourceFile
from hypha.net.bulk.kept_connections import KeptConnections
from hypha.net.bulk.rendezvous import Expected, Rendezvous
from hypha.net.bulk.signals import note_link, sending
from hypha.net.bulk.turns import Retries, TransferSlots
from hypha.net.bulk.ways import Way, Ways
from hypha.net.bulk.wire import (
    BulkConnections,
    ConnectionBroken,
    Frame,
    Go,
    Verdict,
    Working,
    fits,
    id_of,
    require_receiver,
)
from hypha.net.peers.inbound_limits import Recent
from hypha.telemetry.instruments import PACKED_BYTES
from hypha.tracing import traceparent

logger = logging.getLogger(__name__)

DIAL_BACK_TIMEOUT_S = 15.0
#: From the greeting to the receiver's first word.
FIRST_WORD_S = 10.0
#: Peers of which it is remembered how fast the way to them is.
MAX_LINES = 1024


class Sending:
    """Sends files, also those that others ask to be sent."""

    def __init__(
        self,
        links: BulkConnections,
        rendezvous: Rendezvous,
        kept: KeptConnections,
        ways: Ways,
        tuning: TransferTuning,
    ) -> None:
        self._links = links
        self._rendezvous = rendezvous
        self._kept = kept
        self._ways = ways
        self._tuning = tuning
        #: what is known of the ways to peers, for whether compressing pays; the oldest go first
        self._lines: Recent[str, Known] = Recent(MAX_LINES)
        at_once = tuning.sends
        self.places = TransferSlots(at_once)
        self._limiter = trio.CapacityLimiter(2 * at_once)
        #: files that are being sent, or are to be
        self.under_way = 0

    async def send(
        self,
        peer: PeerRef | str,
        path: Path,
        meta: TransferMeta,
        token: str,
        patience_s: float = 0.0,
        pulled: bool = False,
    ) -> None:
        """``pulled``: the peer has asked for it."""
        wanted = SendAttempt(peer, path, meta, token, pulled=pulled)
        with sending(wanted.peer_id, meta), self.counted():
            await self._send(wanted, Retries(patience_s))

    @contextmanager
    def counted(self) -> Iterator[None]:
        """One more file is under way meanwhile."""
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    async def _send(self, wanted: SendAttempt, retries: Retries) -> None:
        peer_id, meta = wanted.peer_id, wanted.meta
        while True:
            attempt = replace(wanted, packing=self.packing_for(peer_id, meta))
            try:
                async with self.places.hold(attempt.moved):
                    verdict = await self._attempt(attempt)
                if verdict.outcome == "ok":
                    return
                verdict.raise_if_refused(peer_id)
                if not verdict.again:
                    raise TransferCorrupt(
                        peer_id, meta.name, verdict.reason or "it arrived with another hash"
                    )
                reason = verdict.reason
            except FileChanged as exc:
                raise TransferFailed(peer_id, meta.name, str(exc)) from exc
            except Refused as exc:
                pause_s = retries.refused(exc, trio.current_time())
                logger.debug("%s is sent again in %.1f s: %s", meta.name, pause_s, exc)
                # without a place of ours: others are not busy
                await trio.sleep(pause_s)
                continue
            except (ConnectionBroken, PeerUnreachable, RequestTimeout) as exc:
                reason = str(exc)
                self._kept.drop(peer_id)
                logger.info("Sending %s was interrupted: %s.", meta.name, reason, extra={"peer_id": peer_id})
            failure = TransferFailed(peer_id, meta.name, reason)
            await trio.sleep(retries.broke(failure, trio.current_time(), attempt.offset))

    async def _attempt(self, attempt: SendAttempt) -> Verdict:
        require_receiver(self._links, attempt.peer_id, attempt.meta.kind, met=False)
        # an offer is repeated while it waits; what is offered must be there first
        with (
            await self.opened(attempt) as source,
            self._rendezvous.expect(attempt.token, Expected(attempt.peer_id)) as expected,
        ):
            met = await self._offer_over_kept(attempt)
            if met is None:
                answer = await self._offer(attempt)
                require_receiver(self._links, attempt.peer_id, attempt.meta.kind)
                if answer.done:
                    return Verdict("ok")
                met = await self._connect(attempt, answer, expected)
            link, go = met
            done = False
            try:
                if isinstance(go, Verdict):
                    return go
                verdict = await self.deliver(attempt, source, link, go)
                done = verdict.outcome == "ok"
                return verdict
            finally:
                # where both ends know how, whoever asked for this file asks for the next one over it
                speaks = not (attempt.pulled and link.knows_want)
                if not (done and self._kept.give(link, speaks)):
                    await link.close()

    async def opened(self, attempt: SendAttempt) -> closing[SourceFile]:
        """Its file, to be closed. FileChanged."""
        return closing(
            await trio.to_thread.run_sync(SourceFile, attempt.path, attempt.meta.size, limiter=self._limiter)
        )

    async def deliver(
        self, attempt: SendAttempt, source: SourceFile, link: BulkConnection, go: Go
    ) -> Verdict:
        """Send what ``go`` asks for over ``link``; the receiver's verdict. ConnectionBroken, FileChanged."""
        meta, offset = attempt.meta, go.offset
        if not 0 <= offset <= meta.size:
            raise ConnectionBroken(f"the peer wants to start at byte {offset} of {meta.size}")
        attempt.offset, attempt.link = offset, link
        note_link(link, offset)
        started = trio.current_time()
        try:
            verdict = await link.deliver(source, BlockPacker(meta, go, attempt.packing))
        finally:
            self._learn(attempt)
        if verdict.outcome == "ok":
            logger.info(
                "Sent %s, %d bytes in %.2f s (%s).",
                meta.name,
                meta.size - offset,
                trio.current_time() - started,
                link.way,
                extra={"peer_id": attempt.peer_id},
            )
        return verdict

    def packing_for(self, peer: str, meta: TransferMeta, go: Go | None = None) -> Packing | None:
        """Who decides whether its blocks are compressed; None: they are not, or ``go`` does not allow it."""
        mode = self._tuning.compression
        if go is not None and not go.zstd_blocks:
            return None
        if mode == "none" or meta.encoding != "none" or meta.kind not in PACKED_KINDS:
            return None
        return Packing(mode, self._tuning.compression_level, self._lines.get(peer))

    def _learn(self, attempt: SendAttempt) -> None:
        packing = attempt.packing
        if packing is None:
            return
        self._lines[attempt.peer_id] = packing.known
        if packing.plain_bytes:
            PACKED_BYTES.add(packing.plain_bytes, stage="before")
            PACKED_BYTES.add(packing.packed_bytes, stage="after")
            logger.debug(
                "Of %s, %d bytes were compressed to %d.",
                attempt.meta.name,
                packing.plain_bytes,
                packing.packed_bytes,
                extra={"peer_id": attempt.peer_id},
            )

    async def _offer_over_kept(self, attempt: SendAttempt) -> tuple[BulkConnection, Go | Verdict] | None:
        """A kept link and the receiver's word; None when a request has to offer the file. Refused."""
        offer = attempt.offer()
        link = self._kept.take(attempt.peer_id) if fits(offer) else None
        if link is None:
            return None
        word = None
        try:
            word = _go(await first_word(link, lambda: link.ask(offer)))
        except ConnectionBroken as exc:
            self._kept.drop(link.peer)
            # it may have cost a while
            logger.info("A connection that was kept is of no use: %s.", exc, extra={"peer_id": link.peer})
        finally:
            if not isinstance(word, Go):
                await link.close()
        if isinstance(word, Verdict):
            word.raise_if_refused(link.peer)
        return None if word is None else (link, word)

    async def _offer(self, attempt: SendAttempt) -> BulkAnswer:
        """The answer when it is our turn there."""
        offer = attempt.offer(*self._links.bulk_addresses())
        while True:
            answer = await self._links.request(attempt.peer, offer)
            if not isinstance(answer, BulkAnswer):
                text = f"it answered an offer with {type(answer).__name__}"
                raise Refused("malformed", text, attempt.peer_id)
            if not answer.wait_s > 0:
                return answer
            await trio.sleep(min(answer.wait_s, 10.0))

    async def _connect(
        self, attempt: SendAttempt, answer: BulkAnswer, expected: Expected
    ) -> tuple[BulkConnection, Go | Verdict]:
        problems = []
        for way in self._ways.to(attempt.peer_id):
            try:
                with self._ways.trying(attempt.peer_id, way):
                    link = await self._try_way(way, attempt, answer, expected)
                    try:
                        link.way = way
                        return link, _go(await first_word(link, link.hear))
                    except BaseException:
                        await link.close()
                        raise
            except ConnectionBroken as exc:
                problems.append(f"{way}: {exc}")
        self._ways.forget(attempt.peer_id)
        raise ConnectionBroken("; ".join(problems))

    async def _try_way(
        self, way: Way, attempt: SendAttempt, answer: BulkAnswer, expected: Expected
    ) -> BulkConnection:
        if way == "direct":
            return await self._rendezvous.dial(attempt.peer_id, answer.addresses, attempt.token)
        if way == "stream":
            return await self._rendezvous.open_stream(attempt.peer_id, attempt.token)
        request = BulkDial(token=attempt.token, addresses=tuple(self._links.bulk_addresses()))
        try:
            await self._links.request(attempt.peer, request, DIAL_BACK_TIMEOUT_S)
        except NetworkError as exc:
            raise ConnectionBroken(str(exc)) from exc
        with trio.move_on_after(FIRST_WORD_S):
            return await expected.take()
        raise ConnectionBroken("the peer says that it connected, but nothing came")


@dataclass(eq=False)
class SendAttempt:
    """One attempt to send; ``offset`` is what was there already, ``link`` where it goes."""

    peer: PeerRef | str
    path: Path
    meta: TransferMeta
    token: str
    packing: Packing | None = None
    #: the peer has asked to be sent it
    pulled: bool = False
    offset: int = 0
    link: BulkConnection | None = None

    @property
    def peer_id(self) -> str:
        return id_of(self.peer)

    def offer(self, *addresses: str) -> BulkOffer:
        """What to say of it to a receiver, which may dial this node at ``addresses``."""
        return BulkOffer(
            token=self.token,
            meta=self.meta,
            addresses=addresses,
            traceparent=traceparent(),
            zstd_blocks=self.packing is not None,
        )

    def moved(self) -> object:
        return None if self.link is None else (self.link.went, self.link.heard)


async def first_word(link: BulkConnection, hear: Callable[[], Awaitable[Frame]]) -> Frame:
    """What the other end says to a file. ConnectionBroken when it says nothing for ``FIRST_WORD_S``."""
    word: Frame | None = None
    with trio.move_on_after(FIRST_WORD_S):
        word = await hear()
    if word is None:
        raise ConnectionBroken(f"no word within {FIRST_WORD_S:g} s")
    while isinstance(word, Working):
        # hashing what it has already may take the other end minutes
        word = await link.hear()
    return word


def _go(word: Frame) -> Go | Verdict:
    if not isinstance(word, Go | Verdict):
        raise ConnectionBroken(f"the peer said {type(word).__name__} where Go was due")
    return word

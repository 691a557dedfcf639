"""The sending end of transfers: offer, connect by whatever way leads there, send, hear the verdict.

A file is offered and sent over a connection that was kept from the last one
(:mod:`hypha.net.bulk.kept_connections`). Where there is none, ways are tried in this order: dial the
receiver, ask it to dial us (first, where it has dialled us already), a libp2p stream (through a relay when
need be); the one that worked is tried first next time. A cut transfer is offered again and goes on where it
was cut. Only so many are sent at once; the others queue, first come first served, and one that needs another
attempt queues anew.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import trio

from hypha.backoff import Backoff
from hypha.config.tuning import TransferTuning
from hypha.errors import (
    NetworkError,
    PeerUnreachable,
    Refused,
    RequestTimeout,
    TransferCorrupt,
    TransferFailed,
)
from hypha.messages import BulkAnswer, BulkDial, BulkOffer, PeerRef, PullFile, TransferMeta
from hypha.net.bulk.compression import KINDS as PACKED_KINDS
from hypha.net.bulk.compression import Known, Packing
from hypha.net.bulk.connection import BulkConnection
from hypha.net.bulk.files import FileChanged, SourceFile
from hypha.net.bulk.kept_connections import SENDER_KEEPS_S, KeptConnections
from hypha.net.bulk.rendezvous import Expected, Rendezvous
from hypha.net.bulk.roles import require_receiver
from hypha.net.bulk.signals import note_link, sending
from hypha.net.bulk.slots import TransferSlots
from hypha.net.bulk.wire import BulkConnections, ConnectionBroken, Frame, Go, Verdict, Working, fits
from hypha.node import Provider, Served
from hypha.telemetry.instruments import PACKED_BYTES
from hypha.tracing import traceparent

logger = logging.getLogger(__name__)

Way = Literal["direct", "dial-back", "stream"]

#: Attempts without progress before a transfer fails.
MAX_ATTEMPTS = 3
#: A peer that is busy is asked again for so long, and after pauses no longer than that: it may be a parameter
#: server that is being restored, and whoever comes late to it is left out of its first round.
BUSY_FOR_S = 40.0
FIRST_BUSY_PAUSE_S, LONGEST_BUSY_PAUSE_S = 0.2, 1.0
#: Before the second attempt at what was interrupted, and before further ones.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.4, 0.8
#: Pulls being served, in all and to one peer.
MAX_SERVED = 1024
MAX_SERVED_PER_PEER = 64
#: A way that worked is preferred for this long; one that did not, or not soon enough for whoever waited for
#: it, is tried last.
WAY_LIFE_S = 600.0
FAILED_WAY_LIFE_S = 60.0
SLOW_WAY_S = 1.0
DIAL_BACK_TIMEOUT_S = 15.0
#: From the greeting to the receiver's first word.
FIRST_WORD_S = 10.0
#: How long the end of a served pull is remembered for a puller that asks.
REMEMBER_S = 60.0
#: Peers of which it is remembered how fast the way to them is.
MAX_LINES = 1024
_WAYS: tuple[Way, ...] = ("direct", "dial-back", "stream")


@dataclass(eq=False)
class _Served:
    """A pull being answered."""

    meta: TransferMeta | None = None
    ready: trio.Event = field(default_factory=trio.Event)
    error: NetworkError | None = None


class Sending:
    """Sends files, also those that others pull."""

    def __init__(self, links: BulkConnections, rendezvous: Rendezvous, tuning: TransferTuning) -> None:
        self._links = links
        self._rendezvous = rendezvous
        self._tuning = tuning
        #: what is known of the ways to peers, for whether compressing pays; the oldest go first
        self._lines: dict[str, Known] = {}
        at_once = tuning.sends
        self.places = TransferSlots(at_once)
        self.kept = KeptConnections(SENDER_KEEPS_S)
        self._limiter = trio.CapacityLimiter(2 * at_once)
        self._ways: dict[str, tuple[Way, float]] = {}
        #: until when, and what was wrong
        self._failed_ways: dict[tuple[str, Way], tuple[float, str]] = {}
        self._providers: dict[str, Provider] = {}
        self._told_of_served: dict[str, Served] = {}
        self._served: dict[tuple[str, str], _Served] = {}
        #: files that are being sent, or are to be
        self.under_way = 0
        self.nursery: trio.Nursery | None = None
        links.answer(PullFile, self._pulled)

    def serve(self, kind: str, provider: Provider, served: Served | None = None) -> None:
        """As ``BulkTransfers.serve``."""
        self._providers[kind] = provider
        if served is not None:
            self._told_of_served[kind] = served

    # --- sending ------------------------------------------------------------------------------------

    async def send(self, peer: PeerRef | str, path: Path, meta: TransferMeta, token: str) -> None:
        """As ``BulkTransfers.send``."""
        peer_id = peer.peer if isinstance(peer, PeerRef) else peer
        self.under_way += 1
        try:
            with sending(peer_id, meta):
                await self._send(peer, peer_id, path, meta, token)
        finally:
            self.under_way -= 1

    async def _send(
        self, peer: PeerRef | str, peer_id: str, path: Path, meta: TransferMeta, token: str
    ) -> None:
        failures, best, reason = 0, 0, ""
        pauses = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        busy, give_up_at = Backoff(FIRST_BUSY_PAUSE_S, LONGEST_BUSY_PAUSE_S), math.inf
        while failures < MAX_ATTEMPTS:
            if failures:
                await trio.sleep(pauses.next_s())
            attempt = _Attempt(peer, peer_id, path, meta, token, packing=self._packing(peer_id, meta))
            try:
                async with self.places.hold(attempt.moved):
                    verdict = await self._attempt(attempt)
            except FileChanged as exc:
                raise TransferFailed(peer_id, meta.name, str(exc)) from exc
            except Refused as exc:
                now = trio.current_time()
                give_up_at = min(give_up_at, now + BUSY_FOR_S)
                # only a place is waited for here; what else may pass is for whoever sends the file
                if exc.code != "busy" or now >= give_up_at:
                    raise
                # without a place of ours: others are not busy
                await trio.sleep(busy.next_s())
                continue
            except (ConnectionBroken, PeerUnreachable, RequestTimeout) as exc:
                reason = str(exc)
                self.kept.drop(peer_id)
                logger.info("Sending %s was interrupted: %s.", meta.name, reason, extra={"peer_id": peer_id})
                busy.reset()
                give_up_at = math.inf
                if attempt.offset > best:
                    pauses.reset()
                    failures = 0
                failures += 1
                best = max(best, attempt.offset)
                continue
            if verdict.outcome == "ok":
                return
            if verdict.outcome == "refused":
                raise Refused(verdict.code, verdict.reason, peer_id)
            if not verdict.again:
                raise TransferCorrupt(peer_id, meta.name, verdict.reason or "it arrived with another hash")
            failures += 1
            reason = verdict.reason
        raise TransferFailed(peer_id, meta.name, reason)

    async def _attempt(self, attempt: _Attempt) -> Verdict:
        meta = attempt.meta
        require_receiver(self._links, attempt.peer_id, meta.kind, met=False)
        # an offer is repeated while it waits; what is offered must be there first
        source = await trio.to_thread.run_sync(SourceFile, attempt.path, meta.size, limiter=self._limiter)
        try:
            with self._rendezvous.expect(attempt.token, Expected(attempt.peer_id)) as expected:
                met = await self._offer_over_kept(attempt)
                # without the wait for our turn there
                started = trio.current_time()
                if met is None:
                    answer = await self._offer(attempt)
                    require_receiver(self._links, attempt.peer_id, meta.kind)
                    if answer.done:
                        return Verdict("ok")
                    started = trio.current_time()
                    met = await self._connect(attempt, answer, expected)
                link, go = met
                verdict = None
                try:
                    if isinstance(go, Verdict):
                        return go
                    before = go.offset
                    if not 0 <= before <= meta.size:
                        raise ConnectionBroken(f"the peer wants to start at byte {before} of {meta.size}")
                    attempt.offset = before
                    attempt.link = link
                    note_link(link, before)
                    verdict = await link.deliver(source, meta, go, attempt.packing)
                finally:
                    self._learn(attempt)
                    if not (verdict is not None and verdict.outcome == "ok" and self.kept.give(link)):
                        await link.close()
            if verdict.outcome == "ok":
                logger.info(
                    "Sent %s, %d bytes in %.2f s (%s).",
                    meta.name,
                    meta.size - before,
                    trio.current_time() - started,
                    link.way,
                    extra={"peer_id": attempt.peer_id},
                )
            return verdict
        finally:
            source.close()

    def _packing(self, peer: str, meta: TransferMeta) -> Packing | None:
        """Who decides whether its blocks are compressed; None: nobody, they are not."""
        mode = self._tuning.compression
        if mode == "none" or meta.encoding != "none" or meta.kind not in PACKED_KINDS:
            return None
        return Packing(mode, self._tuning.compression_level, self._lines.get(peer))

    def _learn(self, attempt: _Attempt) -> None:
        packing = attempt.packing
        if packing is None:
            return
        self._lines.pop(attempt.peer_id, None)
        self._lines[attempt.peer_id] = packing.known
        if len(self._lines) > MAX_LINES:
            del self._lines[next(iter(self._lines))]
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

    async def _offer_over_kept(self, attempt: _Attempt) -> tuple[BulkConnection, Go | Verdict] | None:
        """A link that was kept and the receiver's word for this file; None when it has to be offered by a
        request. Refused.
        """
        offer = BulkOffer(
            token=attempt.token,
            meta=attempt.meta,
            addresses=(),
            traceparent=traceparent(),
            zstd_blocks=attempt.packing is not None,
        )
        link = self.kept.take(attempt.peer_id, self._links.identity) if fits(offer) else None
        if link is None:
            return None
        word = None
        try:
            word = await _first_word(link, lambda: link.ask(offer))
        except ConnectionBroken as exc:
            self.kept.drop(link.peer)
            # it may have cost a while
            logger.info("A connection that was kept is of no use: %s.", exc, extra={"peer_id": link.peer})
        finally:
            if not isinstance(word, Go):
                await link.close()
        if isinstance(word, Verdict) and word.outcome == "refused":
            raise Refused(word.code, word.reason, attempt.peer_id)
        return None if word is None else (link, word)

    async def _offer(self, attempt: _Attempt) -> BulkAnswer:
        """The answer when it is our turn there."""
        offer = BulkOffer(
            token=attempt.token,
            meta=attempt.meta,
            addresses=tuple(self._links.bulk_addresses()),
            traceparent=traceparent(),
            zstd_blocks=attempt.packing is not None,
        )
        while True:
            answer = await self._links.request(attempt.peer, offer)
            if not isinstance(answer, BulkAnswer):
                raise Refused(
                    "malformed", f"it answered an offer with {type(answer).__name__}", attempt.peer_id
                )
            if not answer.wait_s > 0:
                return answer
            await trio.sleep(min(answer.wait_s, 10.0))

    # --- ways ---------------------------------------------------------------------------------------

    async def _connect(
        self, attempt: _Attempt, answer: BulkAnswer, expected: Expected
    ) -> tuple[BulkConnection, Go | Verdict]:
        peer = attempt.peer_id
        problems = []
        for way in self._ways_to(peer):
            link = None
            began = trio.current_time()
            try:
                link = await self._try_way(way, attempt, answer, expected)
                word = await _first_word(link, link.hear)
            except ConnectionBroken as exc:
                problems.append(f"{way}: {exc}")
                self._way_failed(peer, way, str(exc))
                if link is not None:
                    await link.close()
            except BaseException:
                # given up, such as theta for the next one: that would fare no better
                if trio.current_time() - began >= SLOW_WAY_S:
                    self._way_failed(peer, way, "it took too long")
                if link is not None:
                    await link.close()
                raise
            else:
                self._failed_ways.pop((peer, way), None)
                if self._ways.get(peer, (None,))[0] != way and (failed := self._failed(peer)):
                    reasons = "; ".join(f"{other}: {reason}" for other, reason in failed.items())
                    logger.info("%s reached by way of %s (%s).", peer, way, reasons)
                self._ways[peer] = (way, trio.current_time() + WAY_LIFE_S)
                link.way = way
                return link, word
        self._ways.pop(peer, None)
        raise ConnectionBroken("; ".join(problems))

    def _ways_to(self, peer: str) -> list[Way]:
        now = trio.current_time()
        best, until = self._ways.get(peer, (_WAYS[0], 0.0))
        if now >= until:
            # a peer that has dialled us can do it again; dialling one behind a NAT takes seconds to fail
            best = "dial-back" if self._links.reached_by(peer) else _WAYS[0]
        failed = self._failed(peer)
        return sorted(_WAYS, key=lambda way: (way in failed, way != best))

    def _failed(self, peer: str) -> dict[Way, str]:
        """The ways to ``peer`` that failed lately, and why."""
        now = trio.current_time()
        self._failed_ways = {key: told for key, told in self._failed_ways.items() if told[0] > now}
        return {way: why for (other, way), (_, why) in self._failed_ways.items() if other == peer}

    def _way_failed(self, peer: str, way: Way, why: str) -> None:
        self._failed_ways[peer, way] = (trio.current_time() + FAILED_WAY_LIFE_S, why)

    async def _try_way(
        self, way: Way, attempt: _Attempt, answer: BulkAnswer, expected: Expected
    ) -> BulkConnection:
        if way == "direct":
            return await self._rendezvous.dial(attempt.peer_id, answer.addresses, attempt.token)
        if way == "stream":
            return await self._rendezvous.open_stream(attempt.peer_id, attempt.token)
        addresses = tuple(self._links.bulk_addresses())
        request = BulkDial(token=attempt.token, addresses=addresses)
        try:
            await self._links.request(attempt.peer, request, DIAL_BACK_TIMEOUT_S)
        except NetworkError as exc:
            raise ConnectionBroken(str(exc)) from exc
        with trio.move_on_after(FIRST_WORD_S):
            return await expected.take()
        raise ConnectionBroken("the peer says that it connected, but nothing came")

    async def provide(self, caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        """The file that a pull names. Refused."""
        require_receiver(self._links, caller, request.kind)
        provider = self._providers.get(request.kind)
        if provider is None:
            raise Refused("not-found", f"no files of kind {request.kind!r} are served here")
        return await provider(caller, request)

    # --- pulls --------------------------------------------------------------------------------------

    async def _pulled(self, caller: str, request: PullFile) -> BulkOffer:
        """Somebody wants a file: say what it is, and start sending. The same token asks how it goes."""
        if self.nursery is None:
            raise Refused("busy", "this node is closing")
        if not 16 <= len(request.token) <= 64:
            raise Refused("malformed", "the token of a pull has 16 to 64 characters")
        key = (caller, request.token)
        served = self._served.get(key)
        if served is None:
            if len(self._served) >= MAX_SERVED or sum(one == caller for one, _ in self._served) >= (
                MAX_SERVED_PER_PEER
            ):
                raise Refused("busy", "too many files are being sent from here; try again later")
            served = self._served[key] = _Served()
            try:
                path, served.meta = await self.provide(caller, request)
            except BaseException:
                del self._served[key]
                raise
            finally:
                served.ready.set()
            self.nursery.start_soon(self._serve, key, served, path, served.meta, request)
        await served.ready.wait()
        if served.error is not None:
            if isinstance(served.error, Refused):
                raise Refused(served.error.code, served.error.reason)
            raise Refused("unreachable", str(served.error))
        if served.meta is None:
            raise Refused("internal", f"{request.name} could not be provided")
        return BulkOffer(token=request.token, meta=served.meta, addresses=())

    async def _serve(
        self, key: tuple[str, str], served: _Served, path: Path, meta: TransferMeta, request: PullFile
    ) -> None:
        caller, token = key
        tell = self._told_of_served.get(request.kind, _nobody)
        try:
            await self.send(caller, path, meta, token)
            tell(caller, request, None)
        except NetworkError as exc:
            tell(caller, request, exc)
            served.error = exc
            logger.warning(
                "Sending %s, which a peer asked for, failed: %s", meta.name, exc, extra={"peer_id": caller}
            )
            await trio.sleep(REMEMBER_S)
        except Exception as exc:  # the edge of a task for a peer that pulls
            logger.exception("Sending %s failed.", meta.name, extra={"peer_id": caller})
            served.error = TransferFailed(caller, meta.name, f"it failed there ({exc!r})")
            tell(caller, request, served.error)
            await trio.sleep(REMEMBER_S)
        finally:
            self._served.pop(key, None)


@dataclass(eq=False)
class _Attempt:
    """One attempt to send; ``offset`` is what was there already, ``link`` where it goes."""

    peer: PeerRef | str
    peer_id: str
    path: Path
    meta: TransferMeta
    token: str
    offset: int = 0
    link: BulkConnection | None = None
    packing: Packing | None = None

    def moved(self) -> object:
        """Changes while something moves."""
        return None if self.link is None else (self.link.went, self.link.heard)


def _nobody(caller: str, request: PullFile, error: Exception | None) -> None:
    """Told of a file that was served where nobody wants to know."""


async def _first_word(link: BulkConnection, hear: Callable[[], Awaitable[Frame]]) -> Go | Verdict:
    """What the receiver says to a file. LinkBroken when it says nothing for ``FIRST_WORD_S``, or nonsense."""
    word: Frame | None = None
    with trio.move_on_after(FIRST_WORD_S):
        word = await hear()
    if word is None:
        raise ConnectionBroken(f"no word within {FIRST_WORD_S:g} s")
    while isinstance(word, Working):
        # hashing what it has already may take the receiver minutes
        word = await link.hear()
    if not isinstance(word, Go | Verdict):
        raise ConnectionBroken(f"the peer said {type(word).__name__} where Go was due")
    return word


def new_token() -> str:
    """Unguessable, though knowing it is not enough."""
    return secrets.token_urlsafe(24)

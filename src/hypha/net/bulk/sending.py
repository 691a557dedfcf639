"""The sending end of files: those that this node offers, and those that others ask it for.

A cut transfer is offered again and goes on where it was cut. Only so many are sent at once; the others queue,
first come first served, and one that needs another attempt queues anew.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
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
from hypha.messages import BulkOffer, PeerRef, PullFile, TransferMeta
from hypha.net.bulk.blocks import KINDS as PACKED_KINDS
from hypha.net.bulk.blocks import BlockPacker, Known, Packing
from hypha.net.bulk.connections import BulkConnection
from hypha.net.bulk.files import FileChanged, SourceFile
from hypha.net.bulk.inbound import TRICKLE_BYTES
from hypha.net.bulk.kept_connections import KeptConnections
from hypha.net.bulk.rendezvous import Rendezvous
from hypha.net.bulk.signals import note_link, sending
from hypha.net.bulk.turns import Retries, TransferSlots
from hypha.net.bulk.wire import (
    BulkConnections,
    ConnectionBroken,
    FileFound,
    Go,
    Verdict,
    WantFile,
    id_of,
    new_token,
    require_receiver,
)
from hypha.net.peers.inbound_limits import Recent
from hypha.node import Provider, Served
from hypha.telemetry.instruments import PACKED_BYTES
from hypha.tracing import traceparent

logger = logging.getLogger(__name__)

#: Peers of which it is remembered how fast the way to them is.
MAX_LINES = 1024


class Sending:
    """Sends files: its own, and by :meth:`wanted` those that ``serve`` provides."""

    def __init__(
        self, links: BulkConnections, rendezvous: Rendezvous, kept: KeptConnections, tuning: TransferTuning
    ) -> None:
        self._links = links
        self._rendezvous = rendezvous
        self._kept = kept
        self._tuning = tuning
        #: what is known of the ways to peers, for whether compressing pays; the oldest go first
        self._lines: Recent[str, Known] = Recent(MAX_LINES)
        self.places = TransferSlots(tuning.sends)
        self._limiter = trio.CapacityLimiter(2 * tuning.sends)
        self._providers: dict[str, tuple[Provider, Served | None]] = {}
        #: files that are being sent, or are to be
        self.under_way = 0
        #: whether anybody gives files
        self.gives = False

    # --- offering -------------------------------------------------------------------------------------

    async def send(self, peer: PeerRef | str, path: Path, meta: TransferMeta, patience_s: float) -> None:
        peer_id, token, retries = id_of(peer), new_token(), Retries(patience_s)
        with self._counted(peer_id, meta):
            while True:
                attempt = SendAttempt(peer_id, path, meta, token, self._packing_for(peer_id, meta))
                try:
                    async with self.places.hold(attempt.moved):
                        verdict = await self._attempt(peer, attempt)
                    if verdict.outcome == "ok":
                        return
                    verdict.raise_if_refused(peer_id)
                    if not verdict.again:
                        raise _corrupt(peer_id, meta, verdict)
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
                    logger.info(
                        "Sending %s was interrupted: %s.", meta.name, reason, extra={"peer_id": peer_id}
                    )
                failure = TransferFailed(peer_id, meta.name, reason)
                await trio.sleep(retries.broke(failure, trio.current_time(), attempt.offset))

    @contextmanager
    def _counted(self, peer: str, meta: TransferMeta) -> Iterator[None]:
        self.under_way += 1
        try:
            with sending(peer, meta):
                yield
        finally:
            self.under_way -= 1

    async def _attempt(self, peer: PeerRef | str, attempt: SendAttempt) -> Verdict:
        def offer() -> BulkOffer:
            require_receiver(self._links, attempt.peer, attempt.meta.kind)
            return BulkOffer(token=attempt.token, meta=attempt.meta, addresses=(), traceparent=traceparent())

        # what is offered must be there first
        async with self._opened(attempt) as source:
            link, answer = await self._rendezvous.ask(peer, offer)
            reusable = False
            try:
                if isinstance(answer, Verdict):
                    reusable = True
                    return answer
                if not isinstance(answer, Go):
                    raise ConnectionBroken(f"the peer said {type(answer).__name__} where Go was due")
                verdict = await self._deliver(attempt, source, link, answer)
                reusable = verdict.outcome == "ok"
                return verdict
            finally:
                await self._kept.release(link, reusable)

    @asynccontextmanager
    async def _opened(self, attempt: SendAttempt) -> AsyncIterator[SourceFile]:
        """Its file. FileChanged."""
        with closing(
            await trio.to_thread.run_sync(SourceFile, attempt.path, attempt.meta.size, limiter=self._limiter)
        ) as source:
            yield source

    async def _deliver(
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
                extra={"peer_id": attempt.peer},
            )
        return verdict

    def _packing_for(self, peer: str, meta: TransferMeta) -> Packing | None:
        """Who decides whether its blocks are compressed; None: they are not."""
        mode = self._tuning.compression
        if mode == "none" or meta.kind not in PACKED_KINDS:
            return None
        return Packing(mode, self._tuning.compression_level, self._lines.get(peer))

    def _learn(self, attempt: SendAttempt) -> None:
        packing = attempt.packing
        if packing is None:
            return
        self._lines[attempt.peer] = packing.known
        if packing.plain_bytes:
            PACKED_BYTES.add(packing.plain_bytes, stage="before")
            PACKED_BYTES.add(packing.packed_bytes, stage="after")
            logger.debug(
                "Of %s, %d bytes were compressed to %d.",
                attempt.meta.name,
                packing.plain_bytes,
                packing.packed_bytes,
                extra={"peer_id": attempt.peer},
            )

    # --- serving --------------------------------------------------------------------------------------

    def serve(self, kind: str, provider: Provider, served: Served | None = None) -> None:
        self._providers[kind] = (provider, served)
        self.gives = True

    async def provide(self, caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        """The file that a pull names. Refused."""
        require_receiver(self._links, caller, request.kind)
        provider, _ = self._providers.get(request.kind, (None, None))
        if provider is None:
            raise Refused("not-found", f"no files of kind {request.kind!r} are served here")
        return await provider(caller, request)

    async def wanted(self, link: BulkConnection, want: WantFile) -> bool:
        """Answer with the file; whether the link is as it was. Refused, ConnectionBroken."""
        caller, request = link.peer, want.request
        path, meta = await link.decided(lambda: self.provide(caller, request))
        failure: NetworkError | None = None
        try:
            with self._counted(caller, meta):
                await self._deliver_wanted(link, want, path, meta)
        except NetworkError as exc:
            failure = exc
            logger.warning(
                "Sending %s, which a peer asked for, failed: %s", meta.name, exc, extra={"peer_id": caller}
            )
        except Exception as exc:  # the edge of a task for a peer that pulls
            failure = TransferFailed(caller, meta.name, f"it failed there ({exc!r})")
            logger.exception("Sending %s failed.", meta.name, extra={"peer_id": caller})
        # whoever provided it is told how that ended
        if (served := self._providers[request.kind][1]) is not None:
            served(caller, request, failure)
        return failure is None

    async def _deliver_wanted(
        self, link: BulkConnection, want: WantFile, path: Path, meta: TransferMeta
    ) -> None:
        """Raises TransferFailed, TransferCorrupt and Refused."""
        attempt = SendAttempt(link.peer, path, meta, "", self._packing_for(link.peer, meta))
        try:
            async with AsyncExitStack() as stack:
                place = self.places.hold(attempt.moved)
                await link.while_working(lambda: stack.enter_async_context(place))
                source = await stack.enter_async_context(self._opened(attempt))
                await link.say(FileFound(meta, traceparent()))
                verdict = await self._deliver(attempt, source, link, want.go)
        except FileChanged as exc:
            if attempt.link is None:
                with suppress(ConnectionBroken):
                    await link.say(Verdict("failed", reason=str(exc)))
            raise TransferFailed(link.peer, meta.name, str(exc)) from exc
        except ConnectionBroken as exc:
            raise TransferFailed(link.peer, meta.name, str(exc)) from exc
        verdict.raise_if_refused(link.peer)
        if verdict.outcome != "ok":
            raise _corrupt(link.peer, meta, verdict)


@dataclass(eq=False)
class SendAttempt:
    """One attempt to send; ``offset`` is what was there already, ``link`` where it goes."""

    peer: str
    path: Path
    meta: TransferMeta
    token: str
    packing: Packing | None = None
    offset: int = 0
    link: BulkConnection | None = None

    def moved(self) -> object:
        """What changes while its place is in use: a trickle fills nothing, and its place is lent."""
        if self.link is None:
            return None
        return self.link.went // TRICKLE_BYTES, self.link.heard // TRICKLE_BYTES


def _corrupt(peer: str, meta: TransferMeta, verdict: Verdict) -> TransferCorrupt:
    return TransferCorrupt(peer, meta.name, verdict.reason or "it arrived with another hash")

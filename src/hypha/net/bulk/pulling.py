"""Pulls: whoever wants a file asks for it, and the answer to what is asked is the file, over that connection:
one round trip where it is open. What was cut is asked for again and goes on where it was cut."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from hypha.errors import NetworkError, PeerUnreachable, Refused, TransferCorrupt, TransferFailed
from hypha.messages import PeerRef, PullFile, TransferMeta
from hypha.net.bulk.blocks import new_key
from hypha.net.bulk.files import DiskFailed, PartFile
from hypha.net.bulk.inbound import Inbound
from hypha.net.bulk.kept_connections import KeptConnections
from hypha.net.bulk.receiving import Receiving
from hypha.net.bulk.rendezvous import Rendezvous
from hypha.net.bulk.signals import note_link, receiving
from hypha.net.bulk.turns import Retries
from hypha.net.bulk.wire import (
    BulkConnections,
    ConnectionBroken,
    FileFound,
    Go,
    Verdict,
    WantFile,
    id_of,
    new_token,
    require_sender,
)
from hypha.tracing import traceparent

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class WantedFile:
    """One pull: what it is willing to take, and how far it is. ``max_bytes``: no larger file is taken."""

    peer: PeerRef | str
    request: PullFile
    destination: Path
    expect: TransferMeta | None
    max_bytes: int
    #: what the provider said of the file, once it has
    meta: TransferMeta | None = None
    #: the last attempt
    inbound: Inbound | None = None
    #: what was here already when that began
    offset: int = 0

    @property
    def peer_id(self) -> str:
        return id_of(self.peer)

    @property
    def log_fields(self) -> dict[str, str]:
        return {"peer_id": self.peer_id}

    def failure(self, why: str) -> TransferFailed:
        """What to raise where it did not come; another attempt may."""
        return TransferFailed(self.peer_id, self.request.name, why)

    def check(self, meta: TransferMeta) -> None:
        """Refused or TransferCorrupt when that is not what was asked for."""
        name, expect = self.request.name, self.expect
        if meta.size > self.max_bytes:
            text = f"{name} has {meta.size} bytes, over the limit of {self.max_bytes}"
            raise Refused("too-large", text, self.peer_id)
        if meta.kind != self.request.kind:
            # the kind decides how what arrives is checked and kept
            raise TransferCorrupt(self.peer_id, name, f"it offers a file of the kind {meta.kind!r}")
        if expect is not None and (meta.size, meta.blake3) != (expect.size, expect.blake3):
            raise TransferCorrupt(self.peer_id, name, "it offers other content than was promised")
        self.meta = meta


class Pulling:
    """Pulls files from other nodes."""

    def __init__(
        self, links: BulkConnections, rendezvous: Rendezvous, kept: KeptConnections, receiving: Receiving
    ) -> None:
        self._links = links
        self._rendezvous = rendezvous
        self._kept = kept
        self._receiving = receiving

    async def pull(self, pull: WantedFile, still_s: float | None) -> TransferMeta:
        """Have the file come; what was said of it. Raises Refused and TransferFailed."""
        if still_s is None:
            return await self._pull(pull)
        found: TransferMeta | NetworkError = pull.failure(f"nothing came for {still_s:g} s")

        async def pull_on() -> None:
            nonlocal found
            try:
                found = await self._pull(pull)
            except NetworkError as exc:
                found = exc
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull_on)
            await _wait_still(pull, still_s)
            nursery.cancel_scope.cancel()
        if isinstance(found, NetworkError):
            raise found
        return found

    async def _pull(self, pull: WantedFile) -> TransferMeta:
        """Ask, and ask again where it was cut, until the file is here or will not come."""
        retries = Retries()
        while True:
            pull.offset = 0
            try:
                if (meta := await self._attempt(pull)) is not None:
                    return meta
                reason = "it arrived with another hash"
            except Refused as exc:
                # without a place of ours: others are not busy
                await trio.sleep(retries.refused(exc, trio.current_time()))
                continue
            except PeerUnreachable as exc:
                reason = str(exc)
                if pull.meta is None:
                    raise pull.failure(reason) from exc
            except ConnectionBroken as exc:
                reason = str(exc)
                self._kept.drop(pull.peer_id)
            logger.info("Receiving %s was interrupted: %s.", pull.request.name, reason, extra=pull.log_fields)
            failure = pull.failure(reason)
            await trio.sleep(retries.broke(failure, trio.current_time(), pull.offset))

    async def _attempt(self, pull: WantedFile) -> TransferMeta | None:
        """What was said of the file, which is here; None when what came was not it, and another attempt may
        bring it. Refused, ConnectionBroken, PeerUnreachable, TransferFailed.
        """
        known = pull.expect or pull.meta or self._receiving.part_of(pull.destination, pull.request)
        meta = known or TransferMeta(kind=pull.request.kind, name=pull.request.name, size=0)
        inbound = pull.inbound = Inbound(new_token(), pull.peer_id, meta, pull.destination)
        with self._receiving.acceptance.tracked(inbound), inbound.scope, ExitStack() as stack:
            try:
                async with self._receiving.places.hold(inbound.moved):
                    part = await self._open_part(inbound, stack) if known is not None else None
                    inbound.has_turn = True
                    verdict = await self._receive(pull, inbound, part, stack)
            except DiskFailed as exc:
                raise pull.failure(str(exc)) from exc
            except (NetworkError, ConnectionBroken):
                raise
            except Exception as exc:  # the edge of what a peer or a disk can do: this pull ends, and no more
                logger.exception("Receiving %s failed.", pull.request.name, extra=pull.log_fields)
                raise pull.failure(f"it failed here ({exc!r})") from exc
            if verdict.outcome == "ok":
                return inbound.meta
            if verdict.outcome == "corrupt" and not verdict.again:
                raise TransferCorrupt(pull.peer_id, pull.request.name, verdict.reason)
            if verdict.outcome != "corrupt":
                raise pull.failure(verdict.reason)
            return None
        raise pull.failure("another transfer has taken its place")

    async def _open_part(self, inbound: Inbound, stack: ExitStack, fresh: bool = False) -> PartFile:
        """Refused, DiskFailed."""
        await self._receiving.make_space(inbound)
        return await self._receiving.open_part(inbound, stack, fresh)

    async def _receive(
        self, pull: WantedFile, inbound: Inbound, part: PartFile | None, stack: ExitStack
    ) -> Verdict:
        """Ask for the file, and receive it over the same connection; how that ended."""
        go = Go(0 if part is None else part.received)

        def want() -> WantFile:
            nonlocal go
            require_sender(self._links, pull.peer_id, pull.request.kind)
            go = msgspec.structs.replace(go, key=new_key())
            return WantFile(pull.request, go, traceparent())

        link, answer = await self._rendezvous.ask(pull.peer, want)
        reusable = False
        try:
            if isinstance(answer, Verdict):
                reusable = True
                answer.raise_if_refused(pull.peer_id)
                raise pull.failure(answer.reason)
            if not isinstance(answer, FileFound):
                raise ConnectionBroken(f"the peer said {type(answer).__name__} where an answer was due")
            pull.check(answer.meta)
            if part is None:
                inbound.meta = answer.meta
                # what lies there may be a part of anything
                part = await self._open_part(inbound, stack, fresh=True)
            elif inbound.meta.checked != answer.meta.checked:
                raise ConnectionBroken("it is another file than it was")
            inbound.meta, inbound.traceparent, inbound.link = answer.meta, answer.traceparent, link
            pull.offset = go.offset
            with receiving(inbound):
                note_link(link)
                verdict = inbound.verdict = await self._receiving.collect(link, inbound, part, go)
            reusable = inbound.arrived
            return verdict
        finally:
            await self._kept.release(link, reusable)


async def _wait_still(pull: WantedFile, still_s: float) -> None:
    """Return when nothing has come for the file for ``still_s``. While it waits for a place here, or is being
    verified, its sender owes nothing.
    """
    heard, since = None, trio.current_time()
    while trio.current_time() < since + still_s:
        await trio.sleep(still_s / 8)
        inbound = pull.inbound
        if inbound is None or inbound.ended.is_set():
            continue
        if inbound.settling or not inbound.has_turn or inbound.heard() != heard:
            heard, since = inbound.heard(), trio.current_time()

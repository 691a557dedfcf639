"""Pulls: whoever wants a file asks for it over a connection of its own, and has it come.

The connection is one that was kept, else one that this node opens to the provider. The answer to what is
asked over it is the file: one round trip on an open connection. What was cut is asked for again and goes on
where it was cut. Where that cannot be, the provider is asked by a request to send the file by whatever way
leads here."""

from __future__ import annotations

import logging

import msgspec
import trio

from hypha.errors import NetworkError, PeerUnreachable, Refused, RequestTimeout
from hypha.messages import BulkOffer
from hypha.net.bulk.connections import BulkConnection
from hypha.net.bulk.files import DiskFailed, PartFile
from hypha.net.bulk.inbound import Inbound, WantedFile
from hypha.net.bulk.kept_connections import KeptConnections
from hypha.net.bulk.receiving import Receiving
from hypha.net.bulk.rendezvous import Rendezvous
from hypha.net.bulk.sending import first_word
from hypha.net.bulk.signals import note_link, receiving
from hypha.net.bulk.turns import Retries
from hypha.net.bulk.ways import WAY_LIFE_S, Ways
from hypha.net.bulk.wire import (
    BulkConnections,
    ConnectionBroken,
    FileFound,
    Go,
    Verdict,
    WantFile,
    new_token,
    require_sender,
)
from hypha.tracing import traceparent

logger = logging.getLogger(__name__)


class Pulling:
    """Pulls files from other nodes."""

    def __init__(
        self,
        links: BulkConnections,
        rendezvous: Rendezvous,
        kept: KeptConnections,
        ways: Ways,
        receiving: Receiving,
    ) -> None:
        self._links = links
        self._rendezvous = rendezvous
        self._kept = kept
        self._ways = ways
        self._receiving = receiving
        #: peers of a version that knows no ``WantFile``, and until when they are taken for such
        self._earlier: dict[str, float] = {}

    async def pull(self, pull: WantedFile, still_s: float | None) -> None:
        """Have the file come; see ``pull`` for how that ended. Raises Refused and TransferFailed."""
        if still_s is None:
            return await self._pull(pull)
        failure: NetworkError | None = pull.failure(f"nothing came for {still_s:g} s")

        async def pull_on() -> None:
            nonlocal failure
            try:
                await self._pull(pull)
                failure = None
            except NetworkError as exc:
                failure = exc
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull_on)
            await self._receiving.wait_still(pull.token, still_s)
            nursery.cancel_scope.cancel()
        if failure is not None and not pull.over.is_set():
            raise failure

    async def _pull(self, pull: WantedFile) -> None:
        """Ask, and ask again where it was cut, until the file is here or will not come."""
        retries = Retries()
        while True:
            pull.offset = 0
            try:
                if not await self._ask(pull):
                    return await self._be_sent(pull)
                if pull.over.is_set():
                    return
                reason = "it arrived with another hash"
            except Refused as exc:
                # without a place of ours: others are not busy
                await trio.sleep(retries.refused(exc, trio.current_time()))
                continue
            except (ConnectionBroken, PeerUnreachable) as exc:
                reason = str(exc)
                if isinstance(exc, PeerUnreachable) and not pull.agreed:
                    raise pull.failure(reason) from exc
                self._kept.drop(pull.peer_id)
                logger.info(
                    "Receiving %s was interrupted: %s.", pull.request.name, reason, extra=pull.log_fields
                )
            failure = pull.failure(reason)
            await trio.sleep(retries.broke(failure, trio.current_time(), pull.offset))

    async def _ask(self, pull: WantedFile) -> bool:
        """One attempt over a connection of ours; False when there can be none. Refused, ConnectionBroken."""
        if self._earlier.get(pull.peer_id, 0.0) > trio.current_time():
            return False
        inbound = pull.begin()
        asked = False
        with self._receiving.tracked(inbound), inbound.scope:
            try:
                async with self._receiving.places.hold(inbound.moved):
                    asked = await self._ask_in_turn(pull, inbound)
            except (NetworkError, ConnectionBroken):
                raise
            except Exception as exc:  # the edge of what a peer or a disk can do: this pull ends, and no more
                logger.exception("Receiving %s failed.", pull.request.name, extra=pull.log_fields)
                raise pull.failure(f"it failed here ({exc!r})") from exc
        if inbound.scope.cancelled_caught:
            raise pull.failure("another transfer has taken its place")
        return asked

    async def _ask_in_turn(self, pull: WantedFile, inbound: Inbound) -> bool:
        part: PartFile | None = None
        known = pull.expect or pull.meta or self._receiving.collecting.part_of(pull.destination, pull.request)
        if known is not None:
            inbound.meta = known
            try:
                part = await self._open_part(pull, inbound)
            except DiskFailed as exc:
                pull.failed(exc)
                return True
        # from now on it is the provider that owes something
        inbound.turn.set()
        try:
            met = await self._connect(pull, 0 if part is None else part.received)
            if met is None:
                return False
            link, go, answer = met
            if isinstance(answer, Verdict):
                if not self._kept.give(link, speaks=True):
                    await link.close()
                answer.raise_if_refused(pull.peer_id)
                raise pull.failure(answer.reason)
            await self._take(pull, inbound, part, (link, go, answer))
            return True
        finally:
            # where it did not become a file, it is closed at its true length
            if part is not None:
                part.abandon()

    async def _open_part(self, pull: WantedFile, inbound: Inbound) -> PartFile:
        """Refused, DiskFailed."""
        try:
            await self._receiving.admit(pull.peer_id, inbound.meta, inbound.token, pull)
        except Refused:
            pull.raise_if_failed()
            raise
        return await self._receiving.collecting.open_part(inbound)

    async def _take(
        self,
        pull: WantedFile,
        inbound: Inbound,
        part: PartFile | None,
        met: tuple[BulkConnection, Go, FileFound],
    ) -> None:
        link, go, found = met
        known = inbound.meta
        inbound.meta, inbound.traceparent, inbound.link = found.meta, found.traceparent, link
        go = msgspec.structs.replace(go, zstd_blocks=found.zstd_blocks)
        done, pull.agreed = False, True
        try:
            require_sender(self._links, pull.peer_id, pull.request.kind)
            pull.check(found.meta)
            if part is None:
                # what lies there may be a part of anything
                inbound.started_afresh = True
                part = await self._open_part(pull, inbound)
            elif known.checked != found.meta.checked:
                raise ConnectionBroken("it is another file than it was")
            pull.offset = go.offset
            with receiving(inbound):
                note_link(link)
                verdict = inbound.verdict = await self._receiving.collecting.collect(link, inbound, part, go)
            pull.afresh = inbound.started_afresh
            done = verdict is not None and verdict.outcome == "ok"
        except DiskFailed as exc:
            pull.failed(exc)
        finally:
            if not (done and self._kept.give(link, speaks=True)):
                await link.close()

    async def _connect(
        self, pull: WantedFile, offset: int
    ) -> tuple[BulkConnection, Go, FileFound | Verdict] | None:
        """Over what it was asked for, how, and the answer; None when it has to be asked for otherwise."""
        peer = pull.peer_id
        link: BulkConnection | None = self._kept.take(peer, to_want=True)
        if link is not None:
            try:
                return await _say(link, pull, offset)
            except ConnectionBroken as exc:
                # it may have cost a while
                logger.info("A connection that was kept is of no use: %s.", exc, extra=pull.log_fields)
                self._kept.drop(peer)
            except BaseException:
                self._kept.drop(peer)
                raise
        # each end has to know the other's roles
        await self._links.connect(pull.peer)
        for way in self._ways.to(peer):
            if way == "dial-back":
                return None
            try:
                with self._ways.trying(peer, way):
                    if way == "direct":
                        link = await self._rendezvous.dial(peer, (), None)
                    else:
                        link = await self._rendezvous.open_stream(peer, None)
                    if link.knows_want:
                        return await _say(link, pull, offset)
            except ConnectionBroken as exc:
                logger.debug("No file can be asked for by way of %s: %s", way, exc, extra=pull.log_fields)
            else:
                await link.close()
                self._earlier = {one: at for one, at in self._earlier.items() if at > trio.current_time()}
                self._earlier[peer] = trio.current_time() + WAY_LIFE_S
                return None
        return None

    async def _be_sent(self, pull: WantedFile) -> None:
        """Ask by a request to be sent the file, and again until it is here or will not come."""
        async with self._receiving.wanting(pull):
            await self._follow(pull)
        if pull.came_by == "stream":
            self._ways.worked(pull.peer_id, "stream")

    async def _follow(self, pull: WantedFile) -> None:
        token = pull.token
        request = msgspec.structs.replace(pull.request, token=token)
        failures, retries = 0, Retries()
        heard = (0, 0)
        pause_s = 0.5
        while not pull.over.is_set():
            try:
                offer = await self._links.request(pull.peer, request)
                require_sender(self._links, pull.peer_id, request.kind)
                if not isinstance(offer, BulkOffer):
                    text = f"it answered a pull with {type(offer).__name__}"
                    raise Refused("malformed", text, pull.peer_id)
                pull.check(offer.meta)
                failures = 0
            except Refused as exc:
                if pull.over.is_set():
                    return
                if exc.code == "unreachable":
                    raise pull.failure(exc.reason) from exc
                await trio.sleep(retries.refused(exc, trio.current_time()))
                continue
            except (PeerUnreachable, RequestTimeout) as exc:
                if self._receiving.heard(token) == heard:
                    # one that is silent in both ways has had its time
                    failures += 1 if isinstance(exc, PeerUnreachable) else 2
                pause_s = 0.5
                # before anything was agreed there is nothing to wait for
                if (failures > 1 or pull.meta is None) and not pull.over.is_set():
                    raise pull.failure(str(exc)) from exc
            coming = True
            while coming and not pull.over.is_set():
                heard = self._receiving.heard(token)
                with trio.move_on_after(pause_s):
                    await pull.over.wait()
                pause_s = min(2 * pause_s, 4.0)
                # a connection on which nothing moves may be one whose other end has vanished
                moves = self._receiving.heard(token) != heard
                coming = moves and self._receiving.is_coming(token)


async def _say(
    link: BulkConnection, pull: WantedFile, offset: int
) -> tuple[BulkConnection, Go, FileFound | Verdict]:
    """Ask for the file over ``link``, which is closed when that fails."""
    go = link.new_go(offset, zstd_blocks=True)
    # a token of its own: what an attempt that was cut began is another one there
    want = WantFile(msgspec.structs.replace(pull.request, token=new_token()), go, traceparent())
    try:
        answer = await first_word(link, lambda: link.ask(want))
        if not isinstance(answer, FileFound | Verdict):
            raise ConnectionBroken(f"the peer said {type(answer).__name__} where an answer was due")
    except BaseException:
        await link.close()
        raise
    return link, go, answer

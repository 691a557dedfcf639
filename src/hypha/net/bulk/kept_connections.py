"""Connections that have carried a file and are kept for the next one.

To offer a file by a request, to connect and to shake hands takes five round trips, and over a connection that
is there one. Slices come so one after the other, and so do the updates and thetas of short rounds. One end of
such a connection speaks first each time, so that they never speak at once: whoever asked for the file that it
carried, else whoever sent it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from hypha.errors import Refused
from hypha.messages import BulkOffer
from hypha.net.bulk.connections import BulkConnection, SocketConnection, is_trusted
from hypha.net.bulk.inbound import Inbound
from hypha.net.bulk.wire import (
    HANDSHAKE_TIMEOUT_S,
    WORKING_INTERVAL_S,
    ConnectionBroken,
    Verdict,
    WantFile,
    Working,
)
from hypha.net.peers.inbound_limits import counted
from hypha.pki.identity import Identity
from hypha.tracing import untraced

logger = logging.getLogger(__name__)

#: Idle for longer, it is closed: what is on the way forgets connections on which nothing moves. Whoever
#: speaks first closes first, so that nothing that is said meets the end of its connection.
SPEAKER_KEEPS_S = 120.0
LISTENER_KEEPS_S = 150.0
#: Kept at once, of those on which this end speaks first and of the others: in all and of one peer; the oldest
#: go first.
MAX_KEPT = 64
MAX_KEPT_PER_PEER = 2
#: On which one peer speaks, or is served, at once; more are closed, and it opens new ones.
MAX_SPEAKING_PER_PEER = 8
#: A sender whose offer has to wait hears so after this, and then every ``WORKING_INTERVAL_S``.
SOON_S = 0.5


@dataclass(eq=False)
class _Kept:
    link: SocketConnection
    #: this end speaks first
    speaks: bool
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    #: somebody else owns the link
    taken: bool = False


class KeptConnections:
    """Idle links. Nothing is kept without ``nursery``; when that ends, all are closed.

    ``agree`` gives the transfer that an offer of a peer begins or goes on with, or None when it is done
    already; it raises Refused. ``serve`` answers a ``WantFile``, and owns the link.
    """

    agree: Callable[[str, BulkOffer], Awaitable[Inbound | None]]
    serve: Callable[[BulkConnection, WantFile], Awaitable[None]]

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._kept: list[_Kept] = []
        #: by peer, how many links it speaks on now: each takes a thread until its first word is whole
        self._speaking: Counter[str] = Counter()
        self.nursery: trio.Nursery | None = None

    def give(self, link: BulkConnection, speaks: bool) -> bool:
        """Keep ``link``, on which this end ``speaks`` first; False when the caller has to close it."""
        if self.nursery is None or not isinstance(link, SocketConnection):
            return False
        alike = [one for one in self._kept if one.speaks == speaks]
        same = [one for one in alike if one.link.peer == link.peer]
        for kept, most in ((same, MAX_KEPT_PER_PEER), (alike, MAX_KEPT)):
            for one in kept[: max(0, len(kept) + 1 - most)]:
                one.scope.cancel()
        new = _Kept(link, speaks)
        self._kept.append(new)
        link.was_kept = True
        with untraced():  # whatever it carries next is part of another operation
            self.nursery.start_soon(self._watch, new)
        return True

    def take(self, peer: str, to_want: bool = False) -> SocketConnection | None:
        """The newest link to ``peer`` on which this end speaks first (``to_want``: a ``WantFile``), for the
        caller to close or to give back; None when there is none whose certificate is trusted now.
        """
        for kept in reversed(self._kept):
            fits = kept.speaks and (kept.link.knows_want or not to_want)
            if fits and kept.link.peer == peer and not kept.scope.cancel_called:
                kept.scope.cancel()
                if is_trusted(kept.link, self._identity):
                    self._release(kept)
                    return kept.link
        return None

    def drop(self, peer: str) -> None:
        """Close what is kept of ``peer``: another connection to it has just failed."""
        for kept in self._kept:
            if kept.link.peer == peer and kept.speaks:
                kept.scope.cancel()

    def _release(self, kept: _Kept) -> None:
        kept.taken = True
        self._kept.remove(kept)

    async def _watch(self, kept: _Kept) -> None:
        spoke = False
        try:
            with kept.scope, trio.move_on_after(SPEAKER_KEEPS_S if kept.speaks else LISTENER_KEEPS_S):
                await kept.link.wait_word()
                spoke = True
        finally:
            ours = not kept.taken
            if ours:
                self._release(kept)
                if not spoke or kept.speaks:
                    kept.link.close_now()
        if not (ours and spoke and not kept.speaks):
            return
        if self._speaking[kept.link.peer] >= MAX_SPEAKING_PER_PEER:
            kept.link.close_now()
            return
        with counted(self._speaking, kept.link.peer):
            await self._hear(kept.link)

    async def _hear(self, link: SocketConnection) -> None:
        """Hear an offer, a want or the link's end; the link is a transfer's when its turn has come."""
        handed_over = False
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT_S):
                frame = await link.hear()
            if not is_trusted(link, self._identity):
                raise ConnectionBroken("the peer's certificate is not trusted any more")
            if isinstance(frame, WantFile):
                handed_over = True
                await self.serve(link, frame)
                return
            if not isinstance(frame, BulkOffer):
                raise ConnectionBroken(f"the peer said {type(frame).__name__} where an offer was due")
            answer = await self._answer(link, frame)
            if isinstance(answer, Verdict):
                await link.say(answer)
            else:
                handed_over = await self._wait_for_turn(link, answer) and answer.expected.arrive(link)
        except (ConnectionBroken, trio.TooSlowError) as exc:
            logger.debug("A connection that was kept has ended: %s", exc, extra={"peer_id": link.peer})
        except Exception:  # the edge of a task for a peer: its connection ends, and the node does not
            logger.exception("A connection that was kept failed.", extra={"peer_id": link.peer})
        finally:
            if not handed_over:
                await link.close()

    async def _answer(self, link: SocketConnection, offer: BulkOffer) -> Inbound | Verdict:
        try:
            return await self.agree(link.peer, offer) or Verdict("ok")
        except Refused as exc:
            return Verdict("refused", exc.code, exc.reason)
        except Exception:  # the edge of the service: one bad offer must not end the node
            logger.exception("An offer of %s failed.", offer.meta.name, extra={"peer_id": link.peer})
            return Verdict("refused", "internal", "the offer failed there; its log says more")

    @staticmethod
    async def _wait_for_turn(link: SocketConnection, inbound: Inbound) -> bool:
        """False when the sender has come by another way meanwhile."""
        inbound.come_another_way()
        pause_s = SOON_S
        with trio.CancelScope() as inbound.offering:
            while not inbound.turn.is_set():
                with trio.move_on_after(pause_s):
                    await inbound.turn.wait()
                if not inbound.turn.is_set():
                    inbound.offered_at = trio.current_time()
                    await link.say(Working())
                    pause_s = WORKING_INTERVAL_S
            return True
        return False

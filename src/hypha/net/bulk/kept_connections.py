"""Connections that have carried a file and are kept for the next one.

To connect and to shake hands takes four round trips, and over a connection that is there a file takes one.
Slices come so one after the other, and so do the updates and thetas of short rounds. The end that has opened
such a connection speaks first each time, so that they never speak at once.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from hypha.net.bulk.connections import BulkConnection
from hypha.net.bulk.sockets import SocketConnection, is_trusted
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


@dataclass(eq=False)
class _Kept:
    link: SocketConnection
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    #: somebody else owns the link
    taken: bool = False


class KeptConnections:
    """Idle links. Nothing is kept without ``nursery``; when that ends, all are closed. ``hear`` answers what
    the other end says on one, and owns it.
    """

    hear: Callable[[SocketConnection], Awaitable[None]]

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._kept: list[_Kept] = []
        self.nursery: trio.Nursery | None = None

    async def release(self, link: BulkConnection, reusable: bool) -> None:
        """Keep ``link``, which has carried a file, if it is ``reusable``; else close it."""
        if not (reusable and self.nursery is not None and isinstance(link, SocketConnection)):
            return await link.close()
        alike = [one for one in self._kept if one.link.speaks == link.speaks]
        same = [one for one in alike if one.link.peer == link.peer]
        for kept, most in ((same, MAX_KEPT_PER_PEER), (alike, MAX_KEPT)):
            for one in kept[: max(0, len(kept) + 1 - most)]:
                one.scope.cancel()
        new = _Kept(link)
        link.was_kept = True
        try:
            with untraced():  # whatever it carries next is part of another operation
                self.nursery.start_soon(self._watch, new)
        except RuntimeError:  # this node is closing
            return await link.close()
        self._kept.append(new)

    def take(self, peer: str) -> SocketConnection | None:
        """The newest link to ``peer`` on which this end speaks first, for the caller to release; None when
        there is none whose certificate is trusted now.
        """
        for kept in reversed(self._kept):
            if kept.link.speaks and kept.link.peer == peer and not kept.scope.cancel_called:
                kept.scope.cancel()
                if is_trusted(kept.link, self._identity):
                    kept.taken = True
                    self._kept.remove(kept)
                    return kept.link
        return None

    def drop(self, peer: str) -> None:
        """Close what is kept to speak on to ``peer``: another connection to it has just failed."""
        for kept in self._kept:
            if kept.link.peer == peer and kept.link.speaks:
                kept.scope.cancel()

    async def _watch(self, kept: _Kept) -> None:
        speaks, spoke = kept.link.speaks, False
        try:
            with kept.scope, trio.move_on_after(SPEAKER_KEEPS_S if speaks else LISTENER_KEEPS_S):
                await kept.link.wait_word()
                spoke = True
        except Exception:  # the edge of a task for a peer: its connection ends, and the node does not
            logger.exception("A connection that was kept failed.", extra={"peer_id": kept.link.peer})
        finally:
            ours = not kept.taken
            if ours:
                kept.taken = True
                self._kept.remove(kept)
                if speaks or not spoke:
                    kept.link.close_now()
        if ours and spoke and not speaks:
            await self.hear(kept.link)

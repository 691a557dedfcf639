"""What all peers of a node take of its memory together: streams that they have opened, and bytes that wait to
be read. How much each may have is bounded elsewhere (:mod:`hypha.net.libp2p.yamux_reader`); whoever holds a
hundred certificates would have a hundred times that.

Where the node has as many streams as it may, a peer that has its few opens no more of them. Where as many
bytes wait as may, the connections of the peer of whom most wait are ended. Those who share a lease with this
node are asked for neither, but for a flood: a renewal is one stream and some hundred bytes, so it is never
refused.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypha.naming import shown
from hypha.net.peers.over_limit import OverLimit
from hypha.telemetry.instruments import STREAMS_REFUSED

logger = logging.getLogger(__name__)

#: Inbound streams of all connections together; on top of them each peer has a few of its own.
MAX_STREAMS = 4096
OWN_STREAMS = 4
#: Bytes that wait to be read. From half of them on windows grow no further. A peer has so many of its own; a
#: lease's partner more, as a request may have a megabyte, and there may be several.
MAX_BYTES = 512 << 20
OWN_BYTES = 256 << 10
PARTNER_BYTES = 16 << 20
#: Bytes are counted again after so many have come: the limit may be passed by that.
RECOUNT_BYTES = 8 << 20
#: It is logged again after this long, by peer.
TELL_AGAIN_S = 60.0


class InboundBudget:
    """Of one node."""

    def __init__(self, max_streams: int = MAX_STREAMS, max_bytes: int = MAX_BYTES) -> None:
        self.is_partner: Callable[[str], bool] = lambda peer: False
        self._max_streams = max_streams
        self._max_bytes = max_bytes
        self._recount_bytes = min(RECOUNT_BYTES, max_bytes // 8)
        #: yamux connections that are open
        self._connections: set[Any] = set()
        #: at least as many as there are
        self._streams = 0
        self._waiting = 0
        self._fresh = 0
        self._over_limit = OverLimit()

    def opened(self, connection: Any) -> None:
        """What comes in on ``connection`` counts from now on."""
        self._connections.add(connection)

    def closed(self, connection: Any) -> None:
        """It is over."""
        self._connections.discard(connection)

    @property
    def is_tight(self) -> bool:
        """Whether windows should grow no further."""
        return self._waiting + self._fresh > self._max_bytes // 2

    def admit(self, connection: Any) -> bool:
        """Whether the peer of ``connection`` may open one more stream."""
        if self._streams >= self._max_streams:
            self._streams = sum(map(_inbound, self._connections))
        peer = str(connection.peer_id)
        if self._streams >= self._max_streams and not self.is_partner(peer):
            mine = sum(_inbound(one) for one in self._connections if str(one.peer_id) == peer)
            if mine >= OWN_STREAMS:
                STREAMS_REFUSED.add(service="any")
                self._tell(peer, "is refused a stream", f"all peers together have {self._streams} open")
                return False
        self._streams += 1
        return True

    async def received(self, connection: Any, count: int) -> str | None:
        """``count`` bytes came in on ``connection``. Where as many wait as may, ends those of whom most do;
        returns why, where that is ``connection`` itself.
        """
        self._fresh += count
        if self._fresh < self._recount_bytes and self._waiting + self._fresh < self._max_bytes:
            return None
        by_peer = self._count()
        reason: str | None = None
        while self._waiting >= self._max_bytes and (peer := self._largest(by_peer)) is not None:
            size = by_peer.pop(peer)
            self._waiting -= size
            text = f"{size} of its bytes wait to be read, the most of all peers', who together have too many"
            self._tell(peer, "has its connections ended", text)
            for one in [one for one in self._connections if str(one.peer_id) == peer]:
                if one is connection:
                    reason = text
                else:
                    one.__dict__["_breach"] = text
                    await one.secured_conn.abort()
        return reason

    def _count(self) -> Counter[str]:
        by_peer: Counter[str] = Counter()
        for one in self._connections:
            by_peer[str(one.peer_id)] += _waiting(one)
        self._waiting, self._fresh = by_peer.total(), 0
        return by_peer

    def _largest(self, by_peer: Counter[str]) -> str | None:
        for peer, size in by_peer.most_common():
            if size > (PARTNER_BYTES if self.is_partner(peer) else OWN_BYTES):
                return peer
        return None

    def _tell(self, peer: str, what: str, why: str) -> None:
        if self._over_limit.is_first(peer, what, TELL_AGAIN_S):
            logger.warning("%s %s: %s.", shown(peer), what, why, extra={"peer_id": peer})


def _inbound(connection: Any) -> int:
    return sum(not one.is_initiator for one in connection.streams.values())


def _waiting(connection: Any) -> int:
    """Bytes that came in on ``connection`` and nobody has read, what is decrypted of a frame included."""
    unread = sum(len(one) for one in connection.stream_buffers.values())
    return unread + int(getattr(connection.secured_conn, "pending_bytes", 0))


def budget_of(connection: Any) -> InboundBudget | None:
    """That of the node whose yamux connection this is; None of one that has none, as in a test of yamux."""
    budget: InboundBudget | None = getattr(connection.secured_conn, "budget", None)
    return budget

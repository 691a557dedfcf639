"""What peers may take of a node: connections that they have dialled, streams, and bytes that wait to be read.

Connections that others have dialled have few and short places until the certificate of who dialled is
verified, and apart from them those of peers that are known. So whoever has no certificate takes no place of
those who have one, and from one address only a part of the anonymous ones. Where these are full, the oldest
that has had time enough for a handshake gives way. Where those of known peers are full, one of the peer that
has the most gives way to whoever shares a lease with this node.

How many streams and bytes each peer may have is bounded elsewhere (:mod:`hypha.net.libp2p.yamux`); whoever
holds a hundred certificates would have a hundred times that. Where the node has as many streams as it may, a
peer that has its few opens no more of them. Where as many bytes wait as may, the connections of the peer of
whom most wait are ended. Those who share a lease with this node are asked for neither, but for a flood: a
renewal is one stream and some hundred bytes, so it is never refused.

What is refused is counted each time and logged once a peer: whoever floods a node must not fill its log, too.
Tables of what peers do are kept within bounds by :class:`Recent` and :func:`counted`.
"""

from __future__ import annotations

import ipaddress
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio

from hypha.config.tuning import ConnectionTuning
from hypha.naming import shown
from hypha.telemetry.instruments import STREAMS_REFUSED

logger = logging.getLogger(__name__)

K = TypeVar("K")
V = TypeVar("V")

#: Peers, each with what it was refused, of which it is known that the log has them.
REMEMBERED = 1024
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
#: A place that is needed is not taken from who has had it for a shorter time: a handshake over a long way
#: takes five round trips.
GRACE_S = 2.0


@contextmanager
def counted(counter: Counter[K], key: K) -> Iterator[None]:
    """One more of ``key`` meanwhile; a counter holds only those of which there is one."""
    counter[key] += 1
    try:
        yield
    finally:
        less(counter, key)


def less(counter: Counter[K], key: K) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


class Recent(dict[K, V]):
    """The ``most`` keys that were set last, the oldest first; what is older is forgotten."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, key: K, value: V) -> None:
        self.pop(key, None)
        super().__setitem__(key, value)
        if len(self) > self._most:
            del self[next(iter(self))]


class OverLimit:
    def __init__(self) -> None:
        #: when each was logged last
        self._logged: Recent[tuple[str, str], float] = Recent(REMEMBERED)

    def is_first(self, who: str, what: str, again_after_s: float = math.inf) -> bool:
        """Whether ``what`` is refused to ``who`` (a peer or an address) for the first time that is known, or
        was logged longer ago than ``again_after_s``.
        """
        now = trio.current_time()
        last = self._logged.get((who, what))
        if last is not None and now < last + again_after_s:
            return False
        self._logged[who, what] = now
        return True

    def note(self, peer: str, service: str, limit: str) -> None:
        """A stream or request of ``peer`` for ``service`` was refused: it is over ``limit``, a sentence's end
        such as "it has 4 open already".
        """
        STREAMS_REFUSED.add(service=service)
        if self.is_first(peer, service):
            logger.warning(
                "Refused %s a stream for %s: %s. This is logged once a peer.",
                shown(peer),
                service,
                limit,
                extra={"peer_id": peer},
            )


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
        self._connections.add(connection)

    def closed(self, connection: Any) -> None:
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
                    one.breach = text
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
    return unread + int(connection.secured_conn.pending_bytes)


def source_of(host: str) -> str:
    """What counts as one address: of IPv6 the network of 64 bits, which one customer has for itself."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


@dataclass(eq=False)
class InboundConnection:
    """A connection that was dialled from outside. ``cut`` ends it; None when nothing can end it early."""

    places: InboundConnections
    source: str
    cut: Callable[[], None] | None
    since: float = field(default_factory=trio.current_time)
    #: once its certificate is verified
    peer: str | None = None


class InboundConnections:
    """``max_connections`` of peers that are known; the anonymous ones come on top of them.

    Two sides that dial each other at once have a connection each, and one more is there while the end of the
    one before has not been noticed. A handshake takes about ten milliseconds of processor time, so sixty-four
    workers behind one address are through within a second; who is refused dials again.
    """

    def __init__(self, max_connections: int, limits: ConnectionTuning | None = None) -> None:
        self._max_known = max_connections
        self._limits = limits or ConnectionTuning()
        #: in the order in which they came
        self._anonymous: dict[InboundConnection, None] = {}
        self._per_source: Counter[str] = Counter()
        self._known: dict[InboundConnection, None] = {}
        self._per_peer: Counter[str] = Counter()
        self.over_limit = OverLimit()
        #: who shares a lease with this node
        self.is_partner: Callable[[str], bool] = lambda peer: False

    def arrive(self, host: str, cut: Callable[[], None] | None) -> InboundConnection | None:
        """A place for a connection from ``host``; None when there is none."""
        source = source_of(host)
        if self._per_source[source] >= self._limits.unproven_per_address:
            crowded: str | None = source
        elif len(self._anonymous) >= self._limits.unproven:
            crowded = None
        else:
            return self._admit(source, cut)
        if not self._make_space(crowded):
            return None
        return self._admit(source, cut)

    def _admit(self, source: str, cut: Callable[[], None] | None) -> InboundConnection:
        arrival = InboundConnection(self, source, cut)
        self._anonymous[arrival] = None
        self._per_source[source] += 1
        return arrival

    def _make_space(self, source: str | None) -> bool:
        """End the oldest one of ``source``, or of the one that has the most; False when all are young."""
        if source is None:
            ((source, _),) = self._per_source.most_common(1)
        before = trio.current_time() - GRACE_S
        for one in self._anonymous:
            if one.since > before:
                return False
            if one.source == source and one.cut is not None:
                one.cut()
                self.leave(one)
                return True
        return False

    def authenticate(self, arrival: InboundConnection, peer: str) -> str | None:
        """It is ``peer``, and has one of the places of known peers from now on; or why it has none."""
        if arrival not in self._anonymous:
            return "it took too long, and its place was needed"
        reason = None
        full = len(self._known) >= self._max_known
        if full and not (self.is_partner(peer) and self._make_known_slot()):
            reason = f"it has {self._max_known} connections, as many as it may"
        elif self._per_peer[peer] >= self._limits.per_peer:
            reason = f"it has {self._limits.per_peer} connections of this node already"
        if reason is not None:
            if self.over_limit.is_first(peer, "connections"):
                logger.warning(
                    "Turned %s away: %s. This is logged once a peer.",
                    shown(peer),
                    f"{len(self._known)} connections are open, {self._per_peer[peer]} of them its own",
                    extra={"peer_id": peer},
                )
            return reason
        self.leave(arrival)
        arrival.peer = peer
        self._known[arrival] = None
        self._per_peer[peer] += 1
        return None

    def _make_known_slot(self) -> bool:
        """End one of the connections of the peer with the most, no partner's; False where there is none."""
        for peer, _ in self._per_peer.most_common():
            if self.is_partner(peer):
                continue
            for one in self._known:
                if one.peer == peer and one.cut is not None:
                    one.cut()
                    self.leave(one)
                    logger.warning(
                        "Ended a connection of %s: all places are taken, and a lease's partner needs one.",
                        shown(peer),
                        extra={"peer_id": peer},
                    )
                    return True
        return False

    def leave(self, arrival: InboundConnection) -> None:
        """It has ended. May be called twice."""
        if arrival in self._anonymous:
            del self._anonymous[arrival]
            less(self._per_source, arrival.source)
        elif arrival in self._known and arrival.peer is not None:
            del self._known[arrival]
            less(self._per_peer, arrival.peer)

"""Places of connections that others have dialled: few and short ones until the certificate of who dialled is
verified, and apart from them those of peers that are known.

So whoever has no certificate takes no place of those who have one, and from one address only a part of the
anonymous ones. Where these are full, the oldest that has had time enough for a handshake gives way. Where
those of known peers are full, one of the peer that has the most gives way to whoever shares a lease with this
node.
"""

from __future__ import annotations

import ipaddress
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from hypha.config.tuning import ConnectionTuning
from hypha.naming import shown
from hypha.net.peers.over_limit import OverLimit

logger = logging.getLogger(__name__)

#: A place that is needed is not taken from who has had it for a shorter time: a handshake over a long way
#: takes five round trips.
GRACE_S = 2.0


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

    def authenticate(self, peer: str) -> str | None:
        """Its certificate is that of ``peer``: it has one of the places of those from now on, or, when this
        returns a reason, none.
        """
        return self.places._authenticate(self, peer)

    def leave(self) -> None:
        """It has ended. May be called twice."""
        self.places._leave(self)


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

    @property
    def anonymous(self) -> int:
        """How many are being looked at."""
        return len(self._anonymous)

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
                self._leave(one)
                return True
        return False

    def _authenticate(self, arrival: InboundConnection, peer: str) -> str | None:
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
        self._leave(arrival)
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
                    self._leave(one)
                    logger.warning(
                        "Ended a connection of %s: all places are taken, and a lease's partner needs one.",
                        shown(peer),
                        extra={"peer_id": peer},
                    )
                    return True
        return False

    def _leave(self, arrival: InboundConnection) -> None:
        if arrival in self._anonymous:
            del self._anonymous[arrival]
            _less(self._per_source, arrival.source)
        elif arrival in self._known and arrival.peer is not None:
            del self._known[arrival]
            _less(self._per_peer, arrival.peer)


def _less(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]

"""Which ways to a peer there are for a bulk connection, and which one to try first.

A node dials the peer, or asks it to dial (first, where the peer has dialled it already), or opens a libp2p
stream, through a relay when need be. The way that worked is tried first next time, and one that failed last:
for a while, as nothing works while a line is cut, and longer each time that it fails again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import trio

from hypha.net.bulk.wire import BulkConnections, ConnectionBroken
from hypha.net.peers.inbound_limits import REMEMBERED, Recent

logger = logging.getLogger(__name__)

Way = Literal["direct", "dial-back", "stream"]

#: A way that worked is preferred for this long, or until those that failed are tried again.
WAY_LIFE_S = 600.0
#: One that did not work, or not soon enough for whoever waited for it, is tried last for so long at first.
FAILED_WAY_LIFE_S = 15.0
SLOW_WAY_S = 1.0
_WAYS: tuple[Way, ...] = ("direct", "dial-back", "stream")


@dataclass(frozen=True)
class _Failure:
    why: str
    until: float
    #: how long it is tried last
    life_s: float


class Ways:
    """What is known of the ways to each peer, whichever end wants the connection."""

    def __init__(self, links: BulkConnections) -> None:
        self._links = links
        self._best: Recent[str, tuple[Way, float]] = Recent(REMEMBERED)
        self._failed: dict[tuple[str, Way], _Failure] = {}

    def to(self, peer: str) -> list[Way]:
        """All of them, the most promising first."""
        best, until = self._best.get(peer, (_WAYS[0], 0.0))
        if trio.current_time() >= until:
            # a peer that has dialled us can do it again; dialling one behind a NAT takes seconds to fail
            best = "dial-back" if self._links.reached_by(peer) else _WAYS[0]
        failed = self._failed_to(peer)
        return sorted(_WAYS, key=lambda way: (way in failed, way != best))

    @contextmanager
    def trying(self, peer: str, way: Way) -> Iterator[None]:
        """``way`` is tried meanwhile; a ConnectionBroken says that it failed."""
        began = trio.current_time()
        try:
            yield
        except ConnectionBroken as exc:
            self._note_failed(peer, way, str(exc))
            raise
        except BaseException:
            # given up, such as theta for the next one: that would fare no better
            if trio.current_time() - began >= SLOW_WAY_S:
                self._note_failed(peer, way, "it took too long")
            raise
        self.worked(peer, way)

    def worked(self, peer: str, way: Way) -> None:
        """A connection to ``peer`` came about by ``way``."""
        self._failed.pop((peer, way), None)
        if self._best.get(peer, (None,))[0] != way and (failed := self._failed_to(peer)):
            reasons = "; ".join(f"{other}: {failure.why}" for other, failure in failed.items())
            logger.info("%s reached by way of %s (%s).", peer, way, reasons)
        until = min((one.until for one in self._failed_to(peer).values()), default=math.inf)
        self._best[peer] = (way, min(until, trio.current_time() + WAY_LIFE_S))

    def forget(self, peer: str) -> None:
        """No way works: the next time all are tried in their order."""
        self._best.pop(peer, None)

    def _failed_to(self, peer: str) -> dict[Way, _Failure]:
        now = trio.current_time()
        # known for as long again, to see whether it fails again
        self._failed = {key: one for key, one in self._failed.items() if one.until + one.life_s > now}
        return {way: one for (other, way), one in self._failed.items() if other == peer and one.until > now}

    def _note_failed(self, peer: str, way: Way, why: str) -> None:
        now, earlier = trio.current_time(), self._failed.get((peer, way))
        if earlier is None:
            failure = _Failure(why, now + FAILED_WAY_LIFE_S, FAILED_WAY_LIFE_S)
        elif earlier.until > now:
            # it was tried as nothing else worked either, which proves nothing more
            failure = replace(earlier, why=why)
        else:
            life_s = min(2 * earlier.life_s, WAY_LIFE_S)
            failure = _Failure(why, now + life_s, life_s)
        self._failed[peer, way] = failure

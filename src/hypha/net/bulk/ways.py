"""Which ways to a peer there are for a bulk connection, and which one to try first.

A node dials the peer, or asks it to dial (first, where the peer has dialled it already), or opens a libp2p
stream, through a relay when need be. The way that worked is tried first next time, and one that failed last.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import trio

from hypha.net.bulk.wire import BulkConnections, ConnectionBroken
from hypha.net.peers.inbound_limits import REMEMBERED, Recent

logger = logging.getLogger(__name__)

Way = Literal["direct", "dial-back", "stream"]

#: A way that worked is preferred for this long; one that did not, or not soon enough for whoever waited for
#: it, is tried last.
WAY_LIFE_S = 600.0
FAILED_WAY_LIFE_S = 60.0
SLOW_WAY_S = 1.0
_WAYS: tuple[Way, ...] = ("direct", "dial-back", "stream")


class Ways:
    """What is known of the ways to each peer, whichever end wants the connection."""

    def __init__(self, links: BulkConnections) -> None:
        self._links = links
        self._best: Recent[str, tuple[Way, float]] = Recent(REMEMBERED)
        #: until when, and what was wrong
        self._failed: dict[tuple[str, Way], tuple[float, str]] = {}

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
            reasons = "; ".join(f"{other}: {reason}" for other, reason in failed.items())
            logger.info("%s reached by way of %s (%s).", peer, way, reasons)
        self._best[peer] = (way, trio.current_time() + WAY_LIFE_S)

    def forget(self, peer: str) -> None:
        """No way works: the next time all are tried in their order."""
        self._best.pop(peer, None)

    def _failed_to(self, peer: str) -> dict[Way, str]:
        now = trio.current_time()
        self._failed = {key: told for key, told in self._failed.items() if told[0] > now}
        return {way: why for (other, way), (_, why) in self._failed.items() if other == peer}

    def _note_failed(self, peer: str, way: Way, why: str) -> None:
        self._failed[peer, way] = (trio.current_time() + FAILED_WAY_LIFE_S, why)

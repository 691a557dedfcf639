"""What is refused to a peer that asks for more than its share: counted each time, logged once a peer.

Whoever floods a node must not fill its log, too. The peers that were logged are remembered within a bound,
the oldest is forgotten first.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict

import trio

from hypha.naming import shown
from hypha.telemetry.instruments import STREAMS_REFUSED

logger = logging.getLogger(__name__)

#: Peers, each with what it was refused, of which it is known that the log has them.
REMEMBERED = 1024


class OverLimit:
    """Of one node, or of one part of it."""

    def __init__(self) -> None:
        #: when each was logged last, the longest ago first
        self._logged: OrderedDict[tuple[str, str], float] = OrderedDict()

    def is_first(self, who: str, what: str, again_after_s: float = math.inf) -> bool:
        """Whether ``what`` is refused to ``who`` (a peer or an address) for the first time that is known, or
        was logged longer ago than ``again_after_s``.
        """
        now = trio.current_time()
        last = self._logged.get((who, what))
        if last is not None and now < last + again_after_s:
            return False
        self._logged[who, what] = now
        self._logged.move_to_end((who, what))
        if len(self._logged) > REMEMBERED:
            self._logged.popitem(last=False)
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

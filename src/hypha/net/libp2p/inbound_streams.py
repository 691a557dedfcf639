"""How many streams of one protocol a peer may have served at once, of every protocol that this node answers.

The library serves each stream that arrives, in a task of its own. Here the handlers of all protocols, its
own included, are wrapped: what is over the limit is reset before a handler sees it. Requests are not limited
here, as :mod:`hypha.net.rpc` answers those over its limit with ``busy``; neither are circuits, which the
relay counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from libp2p.protocol_muxer.multiselect import Multiselect

from hypha.net.libp2p.streams import discard
from hypha.net.peers.over_limit import OverLimit

#: Of one protocol, from one peer, over all its connections. Identify and ping need one.
DEFAULT_PER_PEER = 32
#: Where it is another number, by the beginning of the protocol's name, and what it is called when refused.
PER_PEER: tuple[tuple[str, int | None, str], ...] = (
    ("/hypha/rpc/", None, "rpc"),
    ("/libp2p/circuit/relay/", None, "relay"),
    # one that lasts, and others whose end was not noticed here yet
    ("/hypha/report/", 4, "reports"),
    ("/meshsub/", 4, "gossip"),
    ("/floodsub/", 4, "gossip"),
    # as many transfers of one peer may wait for their turn (MAX_WAITING_PER_PEER of bulk_receiving)
    ("/hypha/bulk/", 64, "bulk"),
    # one for each dataset that is announced or looked up at that moment
    ("/ipfs/kad/", 32, "dht"),
)

_Handler = Callable[[Any], Awaitable[None]]


def limit_of(protocol: str) -> tuple[int | None, str]:
    """Streams of one peer that are served at once (None: not limited here), and the name for the metric."""
    for beginning, limit, service in PER_PEER:
        if protocol.startswith(beginning):
            return limit, service
    return DEFAULT_PER_PEER, "other"


class InboundStreams(Multiselect):  # type: ignore[misc]
    """The library's table of handlers by protocol, each of them limited."""

    def __init__(self, others: Multiselect) -> None:
        super().__init__({})
        self._served: Counter[tuple[str, str]] = Counter()
        self._over_limit = OverLimit()
        for protocol, handler in others.handlers.items():
            self.add_handler(protocol, handler)

    def add_handler(self, protocol: Any, handler: Any) -> None:
        """Serve streams of ``protocol`` with ``handler``, so many of each peer at a time."""
        limit, service = limit_of(str(protocol))
        limited = handler if handler is None or limit is None else self._limited(handler, limit, service)
        super().add_handler(protocol, limited)

    def _limited(self, handler: _Handler, limit: int, service: str) -> _Handler:
        async def serve(stream: Any) -> None:
            peer = str(stream.muxed_conn.peer_id)
            key = (peer, str(stream.get_protocol()))
            if self._served[key] >= limit:
                self._over_limit.note(peer, service, f"it has {limit} such streams open already")
                await discard(stream)
                return
            self._served[key] += 1
            try:
                await handler(stream)
            finally:
                self._served[key] -= 1
                if not self._served[key]:
                    del self._served[key]

        return serve

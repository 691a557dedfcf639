"""What a DHT server takes of a peer: small queries of four kinds, and so many records.

As shipped, the library keeps values of anybody under any key, addresses of any peer that a message names,
and as many provider records as arrive, for two days.
"""

from __future__ import annotations

from typing import Any

from libp2p.kad_dht.pb.kademlia_pb2 import Message

#: An announcement is a key, an identifier and the announcer's addresses, about a hundred bytes each.
MAX_QUERY_BYTES = 16 << 10
MAX_RECORD_ADDRESSES = 64
#: Records of one key that a server keeps; beyond it the oldest goes (the library would refuse the new).
MAX_PROVIDERS = 20
#: Keys, so datasets, under which one peer is kept; beyond it the one that was announced longest ago goes.
MAX_KEYS_PER_PEER = 1024

_SERVED = (Message.ADD_PROVIDER, Message.GET_PROVIDERS, Message.FIND_NODE, Message.PING)


def trimmed_query(query: Any) -> Any | None:
    """What of ``query`` the library is to see: no records of peers that it would keep, and no more than one
    provider with its addresses; None for a kind that is not served.
    """
    if query.type not in _SERVED:
        return None
    trimmed = Message(type=query.type, key=query.key)
    for provider in query.providerPeers[:1]:
        kept = trimmed.providerPeers.add()
        kept.id = provider.id
        kept.addrs.extend(provider.addrs[:MAX_RECORD_ADDRESSES])
    return trimmed


class Records:
    """Bounds the library's table of records, by key and then by PeerID."""

    def __init__(self, table: dict[bytes, dict[str, Any]]) -> None:
        self._table = table
        #: of each peer the keys under which it may be kept, the one announced longest ago first
        self._keys: dict[str, dict[bytes, None]] = {}

    def make_space(self, key: bytes, peer: str) -> None:
        """Before ``peer`` is kept under ``key``."""
        known = self._table.get(key, {})
        if len(known) >= MAX_PROVIDERS and peer not in known:
            oldest = min(known, key=lambda one: known[one].timestamp)
            del known[oldest]
            self._forget(oldest, key)
        mine = self._keys.setdefault(peer, {})
        mine.pop(key, None)
        mine[key] = None
        if len(mine) > MAX_KEYS_PER_PEER:
            self._drop(next(iter(mine)), peer)

    def _drop(self, key: bytes, peer: str) -> None:
        known = self._table.get(key, {})
        known.pop(peer, None)
        if not known:
            self._table.pop(key, None)
        self._forget(peer, key)

    def _forget(self, peer: str, key: bytes) -> None:
        mine = self._keys.get(peer, {})
        mine.pop(key, None)
        if not mine:
            self._keys.pop(peer, None)

"""A gateway's answer to who is connected with it: what operators look up nodes by.

Whoever may connect may ask. Where a node may be dialled is told of one that is asked for by its PeerID alone,
so that nobody copies the whole network's addresses in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import structs

from hypha.messages import MAX_LISTED_PEERS, ListedPeer, ListPeers, PeerList
from hypha.node import ConnectionInfo


class Listing:
    """Of the gateway whose ``connections`` these are; ``addresses_of`` is what a peer has said of itself."""

    def __init__(
        self,
        connections: Callable[[], Sequence[ConnectionInfo]],
        addresses_of: Callable[[str], Sequence[str]],
    ) -> None:
        self._connections = connections
        self._addresses_of = addresses_of

    async def answer(self, caller: str, request: ListPeers) -> PeerList:
        """A handler of requests; the caller is left out."""
        found = [one for one in self._newest() if one.peer != caller]
        if request.peer:
            asked = [one for one in found if one.peer == request.peer]
            return PeerList(
                peers=tuple(
                    structs.replace(one, addresses=tuple(self._addresses_of(one.peer))) for one in asked
                )
            )
        return PeerList(peers=tuple(found[:MAX_LISTED_PEERS]), more=max(0, len(found) - MAX_LISTED_PEERS))

    def all(self) -> PeerList:
        """Everybody, without addresses: for this machine's own operator."""
        return PeerList(peers=tuple(self._newest()))

    def _newest(self) -> list[ListedPeer]:
        """In order of PeerIDs, each once: by its direct connection, where there is one."""
        found: dict[str, ConnectionInfo] = {}
        for one in self._connections():
            known = found.get(one.peer)
            if known is None or (one.kind, known.kind) == ("direct", "relayed"):
                found[one.peer] = one
        return [
            ListedPeer(
                peer=one.peer,
                name=one.name,
                organization=one.organization,
                roles=tuple(sorted(one.roles)),
                way=one.kind,
                round_trip_s=one.round_trip_s,
            )
            for _, one in sorted(found.items())
        ]

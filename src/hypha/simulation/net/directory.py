"""Who serves which dataset: announced to gateways, which hold it in memory, and looked up there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypha.access import announcing
from hypha.errors import NetworkError
from hypha.messages import PeerRef

if TYPE_CHECKING:
    from hypha.simulation.net.node import SimulatedNode

_LOOKUP_S = 5.0


class SimulatedDirectory:
    """Of one node: what it provides, and of a gateway the records of others."""

    def __init__(self, node: SimulatedNode) -> None:
        self._node = node
        self._provided: dict[str, None] = {}
        #: of a gateway: who serves what
        self._records: dict[str, dict[str, PeerRef]] = {}

    async def provide(self, dataset: str) -> int:
        """Announce that this node serves ``dataset``, now and whenever its gateway changes."""
        self._provided[dataset] = None
        taken = 0
        for gateway in self._node.connected_gateways():
            taken += await self._announce(gateway, dataset)
        return taken

    async def _announce(self, gateway: str, dataset: str) -> bool:
        ref = self._node.ref()
        try:
            return bool(
                await self._node.ask_there(gateway, lambda node: node.directory.take(dataset, ref), _LOOKUP_S)
            )
        except NetworkError:
            return False

    async def take(self, dataset: str, ref: PeerRef) -> bool:
        """Of a gateway: note who serves ``dataset``, where it may."""
        if not self._node.may(ref.peer, announcing(dataset).by):
            return False
        self._records.setdefault(dataset, {})[ref.peer] = ref
        return True

    def withdraw(self, dataset: str) -> None:
        """Stop announcing ``dataset``."""
        self._provided.pop(dataset, None)

    async def find_providers(self, dataset: str) -> list[PeerRef]:
        """Who says it serves ``dataset``. Hints: probe them."""
        found: dict[str, PeerRef] = {}
        for gateway in self._node.connected_gateways():
            found |= await self._ask_records(gateway, dataset, linked=True)
        refs = [found[peer] for peer in sorted(found) if peer != self._node.peer_id]
        for ref in refs:
            self._node.learn(ref)
        return refs

    async def _ask_records(self, gateway: str, dataset: str, linked: bool) -> dict[str, PeerRef]:
        async def find(node: SimulatedNode) -> dict[str, PeerRef]:
            return await node.directory.find(dataset, linked)

        try:
            found: dict[str, PeerRef] | None = await self._node.ask_there(gateway, find, _LOOKUP_S)
        except NetworkError:
            return {}
        return found or {}

    async def find(self, dataset: str, linked: bool) -> dict[str, PeerRef]:
        """Of a gateway, and of those that it is ``linked`` with."""
        found: dict[str, PeerRef] = {}
        for gateway in self._node.connected_gateways() if linked else ():
            found |= await self._ask_records(gateway, dataset, linked=False)
        return found | self._records.get(dataset, {})

    async def announce_again(self, gateway: str) -> None:
        """Have a gateway that is new to this node know all that it serves."""
        for dataset in list(self._provided):
            await self._announce(gateway, dataset)

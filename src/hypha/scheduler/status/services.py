"""What gateways and data nodes of a job state of their versions: for the status, and for the log, once each,
where one lacks what this version of them has.

The scheduler's gateway is asked how it is whenever that is another one, and now and then; a data node says it
with its manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import trio

from hypha import __version__
from hypha.errors import NetworkError
from hypha.features import Abilities, missing_services, printable, services_in_words, stated
from hypha.messages import Health, HealthReport
from hypha.naming import name_of, shown
from hypha.node import Node
from hypha.scheduler.status.snapshot import ServiceSnapshot

logger = logging.getLogger(__name__)

#: Its gateway is asked again after this long: it may have been upgraded.
ASK_EVERY_S = 300.0
_ASK_TIMEOUT_S = 5.0
#: gateways that are remembered, of a scheduler that has changed between them
MAX_GATEWAYS = 16


@dataclass
class Services:
    """Of one run of a job."""

    gateways: dict[str, Abilities] = field(default_factory=dict)
    _told: set[tuple[str, Abilities]] = field(default_factory=set)

    async def run(self, node: Node) -> None:
        """Ask the gateways until cancelled."""
        seen = 0
        while True:
            if (gateway := node.gateway) is not None:
                await self._ask(node, gateway)
            with trio.move_on_after(ASK_EVERY_S):
                seen = await node.gateway_changed.wait(seen)

    async def _ask(self, node: Node, gateway: str) -> None:
        try:
            answer = await node.request(gateway, Health(), timeout_s=_ASK_TIMEOUT_S)
        except NetworkError as exc:
            logger.debug("The gateway did not say what it runs: %s", exc, extra={"peer_id": gateway})
            return
        if isinstance(answer, HealthReport):
            self.gateways.pop(gateway, None)
            self.gateways[gateway] = stated(answer)
            while len(self.gateways) > MAX_GATEWAYS:
                del self.gateways[next(iter(self.gateways))]
            self.note("gateway", gateway, self.gateways[gateway])

    def note(self, kind: str, peer: str, abilities: Abilities) -> None:
        """Log what a node of ``kind`` lacks, once for each version of it."""
        lacking = missing_services(kind, abilities)
        key = (peer, abilities)
        if not lacking or key in self._told or len(self._told) >= 4 * MAX_GATEWAYS:
            return
        self._told.add(key)
        logger.info(
            "The %s %s runs %s, this scheduler %s; it lacks %s",
            kind,
            shown(peer),
            abilities,
            __version__,
            services_in_words(lacking),
            extra={"peer_id": peer},
        )

    def snapshot(self, data_nodes: Mapping[str, Abilities]) -> tuple[ServiceSnapshot, ...]:
        """The gateways, the present one last, and the data nodes in order of peers."""
        return (
            *(_snapshot("gateway", peer, one) for peer, one in self.gateways.items()),
            *(_snapshot("data node", peer, one) for peer, one in sorted(data_nodes.items())),
        )


def _snapshot(kind: str, peer: str, abilities: Abilities) -> ServiceSnapshot:
    features = tuple(map(printable, abilities.features))
    return ServiceSnapshot(
        kind=kind, peer=peer, name=name_of(peer), version=printable(abilities.version), features=features
    )

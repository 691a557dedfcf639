"""What nodes state of their versions: which worker, gateway or data node lacks what, or runs another version.

Each is logged once for a node, however often it states it, and who lacks what is kept for the status and for
whoever asks why the job waits. All is bounded, as it is peers who make it grow.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import trio

from hypha import __version__
from hypha.errors import NetworkError
from hypha.features import (
    BASELINE,
    OURS,
    Abilities,
    advice,
    in_words,
    missing_services,
    printable,
    stated,
)
from hypha.messages import ExecutorClass, Health, HealthReport, WorkerOffer
from hypha.naming import name_of, shown
from hypha.node import Node
from hypha.scheduler.leasing.events import Search
from hypha.scheduler.status.snapshot import ServiceSnapshot

logger = logging.getLogger(__name__)

#: Workers that are remembered; of more the job is as short as before, only without a reason in its status.
MAX_WORKERS = 1024
#: Workers that are named in a sentence.
_NAMED = 3
#: The gateway is asked again after this long: it may have been upgraded.
ASK_EVERY_S = 300.0
_ASK_TIMEOUT_S = 5.0
#: gateways that are remembered, of a scheduler that has changed between them
MAX_GATEWAYS = 16


class StatedVersions:
    """Of the workers that answer ``asks``."""

    def __init__(self, asks: Iterable[Search]) -> None:
        self._asks = {ask.request_id: ask for ask in asks}
        self._lacking: dict[tuple[ExecutorClass, str], tuple[str, ...]] = {}
        self._logged: set[str] = set()

    def declined(self, worker: str, offer: WorkerOffer) -> None:
        """``offer`` of ``worker`` was declined because it lacks a feature."""
        ask = self._asks.get(offer.request_id)
        if ask is None:
            return
        abilities = stated(offer)
        lacking = abilities.lacks(ask.needs)
        key = (ask.kind, worker)
        if self._lacking.get(key) == lacking or len(self._lacking) >= MAX_WORKERS:
            return
        self._lacking[key] = lacking
        logger.warning(
            "Worker %s runs %s and is not given %s jobs, as it lacks what the job needs: %s; %s.",
            shown(worker),
            abilities,
            ask.kind,
            in_words(lacking),
            advice(lacking),
            extra={"worker_peer_id": worker},
        )

    def leased(self, kind: ExecutorClass, worker: str, abilities: Abilities) -> None:
        """``worker`` was leased, so it lacks nothing (any more)."""
        self._lacking.pop((kind, worker), None)
        if abilities.version == OURS.version or worker in self._logged or len(self._logged) >= MAX_WORKERS:
            return
        self._logged.add(worker)
        logger.info(
            "Worker %s runs %s, this scheduler %s; it has all that the job needs.",
            shown(worker),
            abilities,
            __version__,
            extra={"worker_peer_id": worker},
        )

    def shortage(self, kind: ExecutorClass) -> str:
        """Who offered and was declined for what it lacks, in words. Workers that know what they lack do not
        offer: then, what they may lack. Empty where any worker will do.
        """
        found = {worker: lacks for (one, worker), lacks in self._lacking.items() if one == kind}
        if not found:
            asked = (ask for ask in self._asks.values() if ask.kind == kind)
            rare = [name for ask in asked for name in ask.needs if name not in BASELINE]
            return f"it needs {', '.join(rare)}, which older versions of Hypha lack" if rare else ""
        names = ", ".join(map(shown, list(found)[:_NAMED]))
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        lacking = tuple(dict.fromkeys(name for lacks in found.values() for name in lacks))
        features = ", ".join(printable(name) for name in lacking)
        return f"{names}{more} offered, but without {features}: {advice(lacking)}"


@dataclass
class ServiceVersions:
    """Of the gateways and data nodes of one run of a job. The scheduler's gateway is requested to state its
    version whenever that is another one, and now and then; a data node states it with its manifest.
    """

    gateways: dict[str, Abilities] = field(default_factory=dict)
    _logged: set[tuple[str, Abilities]] = field(default_factory=set)

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
            logger.debug("The gateway did not report what it runs: %s", exc, extra={"peer_id": gateway})
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
        if not lacking or key in self._logged or len(self._logged) >= 4 * MAX_GATEWAYS:
            return
        self._logged.add(key)
        logger.info(
            "The %s %s runs %s, this scheduler %s; it lacks %s",
            kind,
            shown(peer),
            abilities,
            __version__,
            in_words(lacking),
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

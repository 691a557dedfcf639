"""What workers state of their versions: who lacks what the job needs, and who runs another version.

Each is logged once a worker, however often it offers, and who lacks what is kept for whoever asks why the
job waits. Both are bounded, as it is peers who make them grow.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from hypha import __version__
from hypha.features import BASELINE, OURS, Abilities, advice, in_words, printable, stated
from hypha.messages import ExecutorClass, WorkerOffer
from hypha.naming import shown
from hypha.scheduler.leasing.events import Search

logger = logging.getLogger(__name__)

#: Workers that are remembered; of more the job is as short as before, only without being told why.
MAX_WORKERS = 1024
#: Workers that are named in a sentence.
_NAMED = 3


class StatedVersions:
    """Of the workers that answer ``asks``."""

    def __init__(self, asks: Iterable[Search]) -> None:
        self._asks = {ask.request_id: ask for ask in asks}
        self._lacking: dict[tuple[ExecutorClass, str], tuple[str, ...]] = {}
        self._told: set[str] = set()

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
        if abilities.version == OURS.version or worker in self._told or len(self._told) >= MAX_WORKERS:
            return
        self._told.add(worker)
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

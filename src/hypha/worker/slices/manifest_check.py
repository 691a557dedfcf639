"""Slices are what the dataset's manifest says: a worker asks a data node for the manifest, computes its hash
again, and holds each slice that it is assigned against it. So it need not believe the scheduler about what
it trains on, as the scheduler need not take a data node's.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

from hypha.errors import NetworkError
from hypha.messages import DatasetDescription, DescribeDataset, PeerRef, Request, Response, SliceAssigned
from hypha.naming import shown
from hypha.rules.manifests import manifest_problem
from hypha.runtime import in_thread

logger = logging.getLogger("hypha.worker.slices")

#: ``await request(peer, request, timeout_s)`` of the node
Ask = Callable[[PeerRef, Request, float], Awaitable[Response]]
_ASK_S = 5.0


class ManifestCheck:
    """Of one training job. ``manifest_hash`` is what the job's description says; empty: nothing is known, and
    nothing is asked, as for jobs of earlier schedulers.
    """

    def __init__(self, request: Ask, dataset: str, manifest_hash: str) -> None:
        self._request = request
        self._dataset = dataset
        self._hash = manifest_hash
        #: samples, size and hash of each slice, once they are known
        self._slices: Sequence[tuple[int, int, str]] | None = None
        #: who serves something else, and was named in the log
        self._refused: set[str] = set()
        self._told = ""

    async def knows(self, assigned: SliceAssigned) -> bool:
        """Whether the slice can be what the manifest says; logged where it cannot. True where no data node
        has replied yet what that is: the slice's own hash is checked in any case.
        """
        if not self._hash:
            return True
        if self._slices is None:
            await self._look_up(assigned.providers)
        if self._slices is None:
            return True
        given = (assigned.samples, assigned.size, assigned.blake3)
        if assigned.dataset == self._dataset and 0 <= assigned.index < len(self._slices):
            if self._slices[assigned.index] == given:
                self._told = ""
                return True
            what = f"slice {assigned.index} as {given[0]} samples, {given[1]} bytes, hash {given[2][:16]}"
        else:
            what = f"slice {assigned.index} of {assigned.dataset}"
        where = f"the manifest {self._hash[:16]} of {self._dataset}"
        self._tell(logging.ERROR, f"Not used: the scheduler names {what}, which is not in {where}")
        return False

    async def _look_up(self, providers: Sequence[PeerRef]) -> None:
        why = "it names no data node"
        for provider in providers:
            if provider.peer in self._refused:
                why = "data nodes serve another manifest"
                continue
            try:
                answer = await self._request(provider, DescribeDataset(dataset=self._dataset), _ASK_S)
            except NetworkError as exc:
                why = str(exc)
                continue
            if not isinstance(answer, DatasetDescription):
                continue
            manifest = answer.manifest
            if not (problem := await in_thread(manifest_problem, manifest, self._hash)):
                self._slices = [(part.samples, part.size, part.blake3) for part in manifest.slices]
                return
            self._refused.add(provider.peer)
            logger.error(
                "Data node %s does not serve %s as the job says: %s",
                shown(provider.peer),
                self._dataset,
                problem,
                extra={"peer_id": provider.peer, "dataset": self._dataset},
            )
        self._tell(logging.WARNING, f"The manifest of {self._dataset} cannot be checked yet: {why}")

    def _tell(self, level: int, text: str) -> None:
        """Once, while nothing else is to be said."""
        if text != self._told:
            self._told = text
            logger.log(level, "%s", text, extra={"dataset": self._dataset})

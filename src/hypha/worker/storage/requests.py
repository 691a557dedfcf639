"""What schedulers may ask of the copies of checkpoints that a worker keeps, and how these are found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import trio

from hypha.errors import NetworkError, Refused
from hypha.messages import (
    Acknowledged,
    CheckpointHeld,
    CheckpointList,
    DropCheckpoints,
    FindCheckpoints,
    HoldCheckpoint,
    PullFile,
    TransferMeta,
    replica_name,
)
from hypha.node import Node
from hypha.rules.leases import Lease
from hypha.runtime import in_thread
from hypha.worker.storage.replicas import GB, ReplicaStore

logger = logging.getLogger("hypha.worker.storage")

#: announcements in the DHT are repeated this often, beside those after a change of gateway or address
ANNOUNCE_S = 300.0


class StorageService:
    """Wires ``store`` to ``node``; ``leases`` are those of this worker now."""

    def __init__(self, node: Node, store: ReplicaStore, leases: Callable[[], Iterable[Lease]]) -> None:
        self._node = node
        self._store = store
        self._leases = leases
        self._announced: set[str] = set()
        self._changed = trio.Event()

    def answer(self) -> None:
        self._node.answer(HoldCheckpoint, self._hold)
        self._node.answer(DropCheckpoints, self._drop)
        self._node.answer(FindCheckpoints, self._find)
        self._node.transfers.serve("checkpoint", self._file)
        self._node.transfers.accept(
            "checkpoint",
            None,
            lambda caller, meta: in_thread(self._store.place_for, caller, meta),
            lambda caller, meta, path: in_thread(self._store.arrived, caller, meta),
        )
        self._node.health_details.append(self._health)

    async def announce(self) -> None:
        """Announce in the DHT whose copies are here, so that they are found wherever this worker is."""
        while True:
            self._changed = trio.Event()
            names = {replica_name(peer, job) for peer, job in self._store.owners}
            for gone in sorted(self._announced - names):
                self._node.withdraw(gone)
            self._announced = names
            for name in sorted(names):
                try:
                    await self._node.provide(name)
                except NetworkError as exc:
                    logger.info("Announcing %s failed, it is repeated: %s", name, exc)
            with trio.move_on_after(ANNOUNCE_S):
                await self._changed.wait()

    def _health(self) -> dict[str, str]:
        used, offered = self._store.used_bytes / GB, self._store.max_bytes / GB
        return {"checkpoints": f"{used:.3g} of {offered:.3g} GB"} if used or offered else {}

    async def _hold(self, caller: str, request: HoldCheckpoint) -> CheckpointHeld:
        leased = frozenset(lease.scheduler for lease in self._leases() if lease.accepted)
        missing = await in_thread(self._store.hold, caller, request, leased)
        if not missing:
            self._look()
        return CheckpointHeld(missing=missing)

    def _look(self) -> None:
        if {replica_name(peer, job) for peer, job in self._store.owners} != self._announced:
            self._changed.set()

    async def _drop(self, caller: str, request: DropCheckpoints) -> Acknowledged:
        await in_thread(self._store.drop, caller, request.job_id)
        self._look()
        return Acknowledged()

    async def _find(self, caller: str, request: FindCheckpoints) -> CheckpointList:
        return CheckpointList(found=await in_thread(self._store.find, caller, request.job))

    async def _file(self, caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        if request.job_id is None:
            raise Refused("malformed", "of which job?")
        return await in_thread(self._store.file, caller, request.job_id, request.name)

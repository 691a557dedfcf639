"""Copying checkpoints to workers that offer storage, in the background, the newest one only.

Who offers storage is found out by asking: a worker that keeps none says so. Workers are asked one after the
other, so the scheduler's line carries one copy at a time: first those who have copies of this job already,
the parameter server's own worker last, for it and its copy would be lost together.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import trio

from hypha.errors import NetworkError, Refused
from hypha.messages import (
    CheckpointFile,
    CheckpointHeld,
    CheckpointIndex,
    HoldCheckpoint,
    JobStamp,
    PeerRef,
    TransferMeta,
)
from hypha.net.bulk.transfers import meta_of
from hypha.node import Node
from hypha.runtime import in_thread
from hypha.scheduler.durable.checkpoints import CheckpointStore
from hypha.scheduler.durable.copies import BOOK, Copies, with_book
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.durable.state_directory import StateDirectory
from hypha.scheduler.leasing.leases import LeaseGained

logger = logging.getLogger(__name__)

#: while there are too few copies it is tried again this often
RETRY_S = 5.0
_ASK_S = 30.0


def ranked(leases: Iterable[LeaseGained], holders: Collection[str]) -> list[LeaseGained]:
    """One lease of each worker, in the order in which they are asked for storage."""
    leases = list(leases)
    servers = {lease.worker.peer for lease in leases if lease.kind == "aggregate"}
    by_peer = {lease.worker.peer: lease for lease in leases}
    return sorted(by_peer.values(), key=lambda lease: _rank(lease.worker.peer, servers, holders))


def _rank(peer: str, servers: Collection[str], holders: Collection[str]) -> tuple[bool, bool, str]:
    return (peer in servers, peer not in holders, peer)


class Replicating:
    """Keeps ``wanted`` copies of the newest checkpoint of the job called ``job``; :meth:`run` does the work.
    ``stamp`` is the job's current one, ``leases`` are those held now, ``copies`` hears who is asked.
    """

    def __init__(
        self,
        node: Node,
        copies: Copies,
        ledger: Ledger,
        state: StateDirectory,
        stamp: Callable[[], JobStamp],
        leases: Callable[[], Iterable[LeaseGained]],
        job: str,
        wanted: int,
    ) -> None:
        self._node = node
        self._copies = copies
        self._ledger = ledger
        self._state = state
        self._stamp = stamp
        self._leases = leases
        self._job = job
        self._wanted = wanted
        self._store: CheckpointStore | None = None
        self._round = -1
        self._changed = trio.Event()
        self._scope = trio.CancelScope()
        self._index: CheckpointIndex | None = None
        #: leases of workers that keep nothing
        self._without: set[str] = set()
        self._said: tuple[int, str] = (-1, "")

    def put(self, round_: int, store: CheckpointStore) -> None:
        """The checkpoint for ``round_``, in ``store``, is the newest one."""
        self._round, self._store, self._index = round_, store, None
        self._changed.set()

    async def run(self) -> None:
        """Until :meth:`close`, or cancelled."""
        with self._scope:
            while self._wanted:
                self._changed = trio.Event()
                enough = self._store is None or await self._copy(self._store, self._round)
                with trio.move_on_after(math.inf if enough else RETRY_S):
                    await self._changed.wait()

    def close(self) -> None:
        """No more copies are wanted."""
        self._scope.cancel()

    async def _copy(self, store: CheckpointStore, round_: int) -> bool:
        """True when there are as many copies as are wanted, or none is possible any more."""
        book = self._state.incoming / f"book-{round_}.db"
        try:
            index = self._index or await self._describe(store, round_, book)
        except (Refused, OSError) as exc:
            logger.error("The checkpoint for round %d cannot be copied: %s", round_, exc)
            return True
        if round_ == self._round:
            self._index = index
        copies = await self._ledger.run(Ledger.replicas)
        done = {worker.peer for worker, copy in copies if copy.round == round_}
        reason = "nobody who is leased offers storage (storage.checkpoints_gb of workers)"
        for lease in ranked(self._leases(), {worker.peer for worker, _ in copies}):
            if len(done) >= self._wanted or round_ != self._round:
                break
            peer = lease.worker.peer
            if peer in done or lease.lease_id in self._without:
                continue
            fields = {"worker_peer_id": peer, "job_id": index.job_id, "round": round_}
            try:
                await self._copy_to(lease.worker, index, store, round_, book)
            except Refused as exc:
                if exc.code in ("not-allowed", "unsupported"):
                    self._without.add(lease.lease_id)
                    continue
                reason = str(exc)
            except NetworkError as exc:
                reason = str(exc)
            else:
                await self._ledger.run(Ledger.replicated, lease.worker, index)
                done.add(peer)
                logger.info("A worker keeps a copy of the checkpoint for round %d", round_, extra=fields)
                continue
            logger.info("A copy of the checkpoint was not taken: %s", reason, extra=fields)
        return round_ != self._round or self._enough(round_, len(done), reason)

    def _enough(self, round_: int, count: int, reason: str) -> bool:
        if count >= self._wanted:
            return True
        if self._said != (round_, reason):
            self._said = (round_, reason)
            logger.warning(
                "There are %d of %d copies of the checkpoint for round %d: %s",
                count,
                self._wanted,
                round_,
                reason,
            )
        return False

    async def _describe(self, store: CheckpointStore, round_: int, book: Path) -> CheckpointIndex:
        """What is to be copied: the checkpoint, and the ledger as it is now, in ``book``."""
        index = await in_thread(store.index, round_)
        for old in self._state.incoming.glob("book-*.db"):
            old.unlink()
        await self._ledger.run(Ledger.copy_to, book)
        meta = await meta_of(book, "checkpoint", BOOK)
        whole = with_book(index, CheckpointFile(name=BOOK, size=meta.size, blake3=meta.blake3))
        return self._copies.signed(whole)

    async def _copy_to(
        self, worker: PeerRef, index: CheckpointIndex, store: CheckpointStore, round_: int, book: Path
    ) -> None:
        starts = await self._ledger.run(Ledger.starts)
        stamp = self._stamp()
        keep = tuple(start.round for start in starts if start.place)
        hold = HoldCheckpoint(stamp=stamp, job=self._job, index=index, keep=keep)
        files = {file.name: file for file in index.files}
        self._copies.asked[worker.peer] = worker
        # what is missing once more after it was sent is not going to come
        for last in (False, True):
            answer = await self._node.request(worker, hold, timeout_s=_ASK_S)
            if not isinstance(answer, CheckpointHeld) or not files.keys() >= set(answer.missing):
                raise Refused("malformed", "it does not say which files it misses", worker.peer)
            if not answer.missing:
                return
            if last:
                raise Refused("internal", f"{', '.join(answer.missing)} did not stay there", worker.peer)
            for name in answer.missing:
                path = book if name == BOOK else store.path(round_, name)
                meta = TransferMeta(
                    kind="checkpoint",
                    name=f"{round_}/{name}",
                    size=files[name].size,
                    blake3=files[name].blake3,
                    stamp=stamp,
                )
                await self._node.transfers.send(worker, path, meta)

"""Getting checkpoints back from workers that keep copies of them, when what the scheduler kept is lost.

Where copies are is in the ledger; where their workers are now, in the DHT. Every file is verified against
the hash that the ledger has of it. A copy holds the ledger itself too, as it was when the copy was made, so
that a job goes on even when the whole state directory is gone: then the DHT alone says who has copies, and
they are given to nobody but the PeerID that left them there. Any worker may announce that it has some, so
the scheduler signs the index of each copy, and then believes what its own key has signed.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import msgspec
import trio

from hypha.errors import ConfigError, NetworkError, Problem, Refused, TransferCorrupt
from hypha.messages import (
    CheckpointFile,
    CheckpointIndex,
    CheckpointList,
    DropCheckpoints,
    FindCheckpoints,
    PeerRef,
    PullFile,
    TransferMeta,
    replica_name,
)
from hypha.node import Node
from hypha.runtime import in_thread
from hypha.scheduler.durable.checkpoints import CheckpointStore, safe_relative
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.durable.state_directory import StateDirectory

logger = logging.getLogger(__name__)

#: the ledger's name among the files of a copy
BOOK = "job.db"
#: workers that cannot be reached may be restarting: they are asked again for so long
PATIENCE_S = 30.0
#: more than a job can have begun between two of its checkpoints
LIVES_SKIPPED = 1000
_PAUSE_S = 2.0
_ASK_S = 10.0
_DROP_S = 2.0

Copy = tuple[PeerRef, CheckpointIndex]


class Copies:
    """Copies of the checkpoints of the job called ``job``, as ``node`` left them with workers."""

    def __init__(self, node: Node, job: str, patience_s: float = PATIENCE_S) -> None:
        self._node = node
        self._job = job
        self._patience_s = patience_s
        #: who was asked to keep one in this generation of the scheduler, whatever came of it
        self.asked: dict[str, PeerRef] = {}

    def signed(self, index: CheckpointIndex) -> CheckpointIndex:
        """``index`` as it is left with workers, by which this scheduler knows it again."""
        unsigned = msgspec.structs.replace(index, signature="")
        data = f"checkpoint of {self._job}:".encode() + msgspec.json.encode(unsigned, order="deterministic")
        return msgspec.structs.replace(index, signature=self._node.sign(data).hex())

    async def bring_back(self, ledger: Ledger, store: CheckpointStore, round_: int) -> bool:
        """Fetch the checkpoint for ``round_`` into ``store``; False when nobody has it undamaged."""
        copies = await ledger.run(Ledger.replicas, round_)
        place = store.returning(round_)
        copies = [(worker, without_book(index)) for worker, index in copies]
        found = await self._fetch_one_of(copies, place) if copies else None
        if found is None:
            return False
        worker, index = found
        await in_thread(store.adopt, index, place)
        logger.warning(
            "The checkpoint for round %d was lost here; the copy of a worker takes its place",
            round_,
            extra={"worker_peer_id": worker.peer, "job_id": index.job_id, "round": round_},
        )
        return True

    async def bring_back_ledger(self, state: StateDirectory) -> None:
        """Put the ledger of the newest copy into ``state``, if there is none; do nothing when there is no
        copy either. :class:`ConfigError` when there are copies of several jobs of this name.
        """
        if state.ledger.exists():
            return
        copies = [copy for copy in await self._ask_around(self._patience_s) if self._is_own(*copy)]
        jobs = sorted({index.job_id for _, index in copies})
        if not jobs:
            return
        if len(jobs) > 1:
            text = (
                f"{state.path} holds no ledger, and workers have checkpoints of several jobs of this name: "
                f"{', '.join(jobs)}; start anew with --fresh, which drops them, or give the job another name"
            )
            raise ConfigError([Problem("scheduler.job.name", text)])
        newest = max((index.generation, index.round) for _, index in copies)
        copies = [copy for copy in copies if (copy[1].generation, copy[1].round) == newest]
        place = state.path / "returning"
        updates = [(worker, only_book(index)) for worker, index in copies]
        found = await self._fetch_one_of(updates, place)
        if found is None:
            return
        worker, index = found
        for stale in state.path.glob(f"{state.ledger.name}-*"):
            stale.unlink()
        (place / BOOK).replace(state.ledger)
        shutil.rmtree(place, ignore_errors=True)
        ledger = await in_thread(Ledger, state.ledger)
        try:
            # this copy was not yet complete when its book was written
            for holder, whole in copies:
                if only_book(whole) == index:
                    await ledger.run(Ledger.replicated, holder, whole)
            await ledger.run(Ledger.checkpoint, index.round, "scheduler")
            # who wrote this book went on since: leases end by themselves, later generations are fenced off
            await ledger.run(Ledger.lease_ended)
            await ledger.run(Ledger.skip_generations, LIVES_SKIPPED)
        finally:
            ledger.close()
        logger.warning(
            "There is no ledger in %s; it is taken from the copy that a worker has of round %d (--fresh "
            "would start anew)",
            state.path,
            index.round,
            extra={"worker_peer_id": worker.peer, "job_id": index.job_id, "round": index.round},
        )

    def _is_own(self, worker: PeerRef, index: CheckpointIndex) -> bool:
        """Whether this scheduler has left that copy there, in whatever generation."""
        if index == self.signed(index):
            return True
        logger.warning(
            "A worker says that it has a copy of round %d which this scheduler has not signed; it is not "
            "used (workers of earlier versions do not keep the signature)",
            index.round,
            extra={"worker_peer_id": worker.peer, "job_id": index.job_id, "round": index.round},
        )
        return False

    async def forget(self, ledger: Ledger, job_id: str) -> None:
        """The job is done: ask whoever has copies, or was asked, to drop them. Who does not hear it deletes
        them after a while.
        """
        holders = {worker.peer: worker for worker, _ in await ledger.run(Ledger.replicas)} | self.asked
        # an earlier scheduler may have been killed before it wrote down that a copy was made
        holders |= {worker.peer: worker for worker in await self._node.find_providers(self._name)}
        await self._drop_all({(peer, job_id): worker for peer, worker in holders.items()})

    async def forget_all(self) -> None:
        """Have the copies of all jobs of this name dropped, wherever the DHT leads."""
        copies = await self._ask_around()
        await self._drop_all({(worker.peer, index.job_id): worker for worker, index in copies})

    async def _drop_all(self, wanted: dict[tuple[str, str], PeerRef]) -> None:
        with trio.move_on_after(_DROP_S):
            async with trio.open_nursery() as nursery:
                for (_, job_id), worker in wanted.items():
                    nursery.start_soon(self._drop, worker, job_id)

    async def _drop(self, worker: PeerRef, job_id: str) -> None:
        try:
            await self._node.request(worker, DropCheckpoints(job_id=job_id), timeout_s=_DROP_S)
        except NetworkError as exc:
            logger.debug("A worker keeps its copies for now: %s", exc, extra={"worker_peer_id": worker.peer})

    async def _ask_around(self, patience_s: float = 0.0) -> list[Copy]:
        """All copies of jobs of this name that the DHT leads to; who does not answer is asked again for
        that long, for it may have the newest.
        """
        answered: dict[str, list[Copy]] = {}
        silent: dict[str, str] = {}

        async def ask(worker: PeerRef) -> None:
            try:
                answer = await self._node.request(worker, FindCheckpoints(job=self._job), timeout_s=_ASK_S)
            except Refused as exc:
                logger.info("A worker gives no copies: %s", exc, extra={"worker_peer_id": worker.peer})
                answered[worker.peer] = []
            except NetworkError as exc:
                silent[worker.peer] = str(exc)
            else:
                found = answer.found if isinstance(answer, CheckpointList) else ()
                answered[worker.peer] = [(worker, index) for index in found if only_book(index).files]

        deadline = trio.current_time() + patience_s
        while True:
            silent.clear()
            async with trio.open_nursery() as nursery:
                for worker in await self._node.find_providers(self._name):
                    if worker.peer not in answered:
                        nursery.start_soon(ask, worker)
            if not silent or trio.current_time() + _PAUSE_S > deadline:
                break
            await trio.sleep(_PAUSE_S)
        for peer, reason in silent.items():
            logger.warning(
                "A worker may have copies, but does not answer: %s", reason, extra={"worker_peer_id": peer}
            )
        return [copy for copies in answered.values() for copy in copies]

    @property
    def _name(self) -> str:
        return replica_name(self._node.peer_id, self._job)

    async def _fetch_one_of(self, copies: list[Copy], place: Path) -> Copy | None:
        """The first copy all of whose files came to ``place``. Who is away is asked again for a while."""
        await in_thread(shutil.rmtree, place, True)
        left = list(copies)
        deadline = trio.current_time() + self._patience_s
        while left:
            # they may have other addresses by now
            await self._node.find_providers(self._name)
            for copy in list(left):
                worker, index = copy
                fields = {"worker_peer_id": worker.peer, "job_id": index.job_id, "round": index.round}
                try:
                    await self._fetch(worker, index, place)
                    return copy
                except NetworkError as exc:
                    final = isinstance(exc, TransferCorrupt)
                    if isinstance(exc, Refused):
                        final = not exc.retryable
                    if final:
                        left.remove(copy)
                    logger.warning("A copy of round %d was not had: %s", index.round, exc, extra=fields)
            if trio.current_time() + _PAUSE_S > deadline:
                break
            if left:
                await trio.sleep(_PAUSE_S)
        return None

    async def _fetch(self, worker: PeerRef, index: CheckpointIndex, place: Path) -> None:
        for file in index.files:
            path = place / safe_relative(file.name)
            if await in_thread(path.is_file):
                # whole and verified, from whomever; the hash is the same
                continue
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            name = f"{index.round}/{file.name}"
            expect = TransferMeta(kind="checkpoint", name=name, size=file.size, blake3=file.blake3)
            what = PullFile(kind="checkpoint", name=name, job_id=index.job_id)
            await self._node.transfers.pull(worker, what, path, expect, file.size)


def with_book(index: CheckpointIndex, book: CheckpointFile) -> CheckpointIndex:
    """What a copy consists of."""
    return msgspec.structs.replace(index, files=(*index.files, book))


def without_book(index: CheckpointIndex) -> CheckpointIndex:
    """What the checkpoint itself consists of."""
    files = tuple(file for file in index.files if file.name != BOOK)
    return msgspec.structs.replace(index, files=files, signature="")


def only_book(index: CheckpointIndex) -> CheckpointIndex:
    """The ledger of a copy."""
    files = tuple(file for file in index.files if file.name == BOOK)
    return msgspec.structs.replace(index, files=files)

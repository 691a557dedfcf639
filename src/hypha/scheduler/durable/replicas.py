"""Replicas: copies of a job's checkpoints that workers keep, for when what the scheduler keeps is lost.

:class:`Replicating` makes them. Workers are asked one after the other, so the scheduler sends one copy at a
time: first those who have copies of this job already, the parameter server's own worker last, for it and its
copy would be lost together. :class:`Replicas` fetches them back, each file verified against the hash that the
ledger has of it, or an index with the scheduler's own signature: any worker may announce that it has some.
Both are one module, as one must recognise what the other left.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Collection, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import trio

from hypha.errors import ConfigError, NetworkError, Problem, Refused, TransferCorrupt
from hypha.messages import (
    CheckpointFile,
    CheckpointHeld,
    CheckpointIndex,
    CheckpointList,
    DropCheckpoints,
    FindCheckpoints,
    HoldCheckpoint,
    JobStamp,
    PeerRef,
    PullFile,
    replica_name,
)
from hypha.net.bulk.transfers import meta_of
from hypha.node import Node
from hypha.runtime import in_thread
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.durable.state_directory import (
    CheckpointStore,
    StateDirectory,
    checkpoint_meta,
    safe_relative,
)
from hypha.scheduler.leasing.events import LeaseGained

logger = logging.getLogger(__name__)

#: the ledger's name among the files of a copy
LEDGER = "job.db"
#: workers that cannot be reached may be restarting: they are asked again for so long
PATIENCE_S = 30.0
#: more generations than a job can have begun between two of its checkpoints
GENERATIONS_SKIPPED = 1000
_PAUSE_S = 2.0
_ASK_S = 10.0
_DROP_S = 2.0
#: while there are too few copies it is tried again this often
RETRY_S = 5.0
_HOLD_S = 30.0

Copy = tuple[PeerRef, CheckpointIndex]


class Replicas:
    """Copies of the checkpoints of the job called ``job``, as ``node`` left them with workers."""

    def __init__(self, node: Node, job: str) -> None:
        self.node = node
        self.job = job
        #: who was asked by this scheduler to keep one, whatever came of it
        self.asked: dict[str, PeerRef] = {}

    def signed(self, index: CheckpointIndex) -> CheckpointIndex:
        """``index`` as it is left with workers, by which this scheduler knows it again."""
        unsigned = msgspec.structs.replace(index, signature="")
        data = f"checkpoint of {self.job}:".encode() + msgspec.json.encode(unsigned, order="deterministic")
        return msgspec.structs.replace(index, signature=self.node.sign(data).hex())

    async def bring_back(self, ledger: Ledger, store: CheckpointStore, round_: int) -> bool:
        """Fetch the checkpoint for ``round_`` into ``store``; False when nobody has it undamaged."""
        copies = []
        for worker, index in await ledger.run(Ledger.replicas, round_):
            files = tuple(file for file in index.files if file.name != LEDGER)
            copies.append((worker, msgspec.structs.replace(index, files=files, signature="")))
        place = store.returning(round_)
        found = await self._fetch_one_of(copies, place) if copies else None
        if found is None:
            return False
        worker, index = found
        await in_thread(store.adopt, index, place)
        logger.warning(
            "The checkpoint for round %d was lost here; the copy of a worker takes its place",
            round_,
            extra=_fields(worker, index),
        )
        return True

    async def bring_back_ledger(self, state: StateDirectory) -> None:
        """Put the ledger of the newest copy into ``state``, if there is none; do nothing when there is no
        copy either. :class:`ConfigError` when there are copies of several jobs of this name.
        """
        if state.ledger.exists():
            return
        copies = [copy for copy in await self._ask_around(PATIENCE_S) if self._is_own(*copy)]
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
        ledgers = [(worker, _ledger_of(index)) for worker, index in copies]
        found = await self._fetch_one_of(ledgers, place)
        if found is None:
            return
        worker, index = found
        for stale in state.path.glob(f"{state.ledger.name}-*"):
            stale.unlink()
        (place / LEDGER).replace(state.ledger)
        shutil.rmtree(place, ignore_errors=True)
        with closing(await in_thread(Ledger, state.ledger)) as ledger:
            # this copy was not yet complete when the ledger in it was written
            for holder, whole in copies:
                if _ledger_of(whole) == index:
                    await ledger.run(Ledger.replicated, holder, whole)
            await ledger.run(Ledger.checkpoint, index.round, "scheduler")
            # the scheduler went on after it wrote this ledger: its leases expire, its later generations are
            # skipped
            await ledger.run(Ledger.lease_ended)
            await ledger.run(Ledger.skip_generations, GENERATIONS_SKIPPED)
        logger.warning(
            "There is no ledger in %s; it is taken from the copy that a worker has of round %d (--fresh "
            "would start anew)",
            state.path,
            index.round,
            extra=_fields(worker, index),
        )

    def _is_own(self, worker: PeerRef, index: CheckpointIndex) -> bool:
        """Whether this scheduler has left that copy there, in whatever generation."""
        if index == self.signed(index):
            return True
        logger.warning(
            "A worker reports a copy of round %d which this scheduler has not signed; it is not "
            "used (workers of earlier versions do not keep the signature)",
            index.round,
            extra=_fields(worker, index),
        )
        return False

    async def forget(self, ledger: Ledger, job_id: str) -> None:
        """The job is done: ask whoever has copies, or was asked to keep one, to drop them. A worker that does
        not receive the request deletes them after a while.
        """
        holders = {worker.peer: worker for worker, _ in await ledger.run(Ledger.replicas)} | self.asked
        # an earlier scheduler may have been killed before its ledger had the copy
        holders |= {worker.peer: worker for worker in await self.node.find_providers(self._name)}
        await self._drop_all({(peer, job_id): worker for peer, worker in holders.items()})

    async def forget_all(self) -> None:
        """Have the copies of all jobs of this name dropped, wherever the DHT leads."""
        copies = await self._ask_around()
        await self._drop_all({(worker.peer, index.job_id): worker for worker, index in copies})

    async def _drop_all(self, wanted: dict[tuple[str, str], PeerRef]) -> None:
        async def drop(worker: PeerRef, job_id: str) -> None:
            try:
                await self.node.request(worker, DropCheckpoints(job_id=job_id), timeout_s=_DROP_S)
            except NetworkError as exc:
                text = "A request to drop copies was not delivered; the worker keeps them for now: %s"
                logger.debug(text, exc, extra={"worker_peer_id": worker.peer})

        with trio.move_on_after(_DROP_S):
            async with trio.open_nursery() as nursery:
                for (_, job_id), worker in wanted.items():
                    nursery.start_soon(drop, worker, job_id)

    async def _ask_around(self, patience_s: float = 0.0) -> list[Copy]:
        """All copies of jobs of this name that the DHT leads to; a worker that does not reply is asked
        again for that long, for it may have the newest.
        """
        answered: dict[str, list[Copy]] = {}
        silent: dict[str, str] = {}

        async def ask(worker: PeerRef) -> None:
            try:
                answer = await self.node.request(worker, FindCheckpoints(job=self.job), timeout_s=_ASK_S)
            except Refused as exc:
                logger.info(
                    "A worker refused to list its copies: %s", exc, extra={"worker_peer_id": worker.peer}
                )
                answered[worker.peer] = []
            except NetworkError as exc:
                silent[worker.peer] = str(exc)
            else:
                found = answer.found if isinstance(answer, CheckpointList) else ()
                answered[worker.peer] = [(worker, index) for index in found if _ledger_of(index).files]

        deadline = trio.current_time() + patience_s
        while True:
            silent.clear()
            async with trio.open_nursery() as nursery:
                for worker in await self.node.find_providers(self._name):
                    if worker.peer not in answered:
                        nursery.start_soon(ask, worker)
            if not silent or trio.current_time() + _PAUSE_S > deadline:
                break
            await trio.sleep(_PAUSE_S)
        for peer, reason in silent.items():
            logger.warning(
                "A worker may have copies, but does not reply: %s", reason, extra={"worker_peer_id": peer}
            )
        return [copy for copies in answered.values() for copy in copies]

    @property
    def _name(self) -> str:
        return replica_name(self.node.peer_id, self.job)

    async def _fetch_one_of(self, copies: list[Copy], place: Path) -> Copy | None:
        """The first copy all of whose files came to ``place``. Unreachable workers are asked again for a
        while.
        """
        await in_thread(shutil.rmtree, place, True)
        left = list(copies)
        deadline = trio.current_time() + PATIENCE_S
        while left:
            # they may have other addresses by now
            await self.node.find_providers(self._name)
            for copy in list(left):
                worker, index = copy
                try:
                    await self._fetch(worker, index, place)
                    return copy
                except NetworkError as exc:
                    if isinstance(exc, TransferCorrupt) or (isinstance(exc, Refused) and not exc.retryable):
                        left.remove(copy)
                    logger.warning(
                        "The copy of the checkpoint for round %d was not fetched: %s",
                        index.round,
                        exc,
                        extra=_fields(worker, index),
                    )
            if trio.current_time() + _PAUSE_S > deadline:
                break
            if left:
                await trio.sleep(_PAUSE_S)
        return None

    async def _fetch(self, worker: PeerRef, index: CheckpointIndex, place: Path) -> None:
        for file in index.files:
            path = place / safe_relative(file.name)
            if await in_thread(path.is_file):
                # whole and verified, from another worker; the hash is the same
                continue
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            expect = checkpoint_meta(index.round, file)
            what = PullFile(kind="checkpoint", name=expect.name, job_id=index.job_id)
            await self.node.transfers.pull(worker, what, path, expect, file.size)


def ranked(leases: Iterable[LeaseGained], holders: Collection[str]) -> list[LeaseGained]:
    """One lease of each worker, in the order in which they are asked for storage."""
    leases = list(leases)
    servers = {lease.worker.peer for lease in leases if lease.kind == "aggregate"}
    by_peer = {lease.worker.peer: lease for lease in leases}
    return [
        by_peer[peer] for peer in sorted(by_peer, key=lambda one: (one in servers, one not in holders, one))
    ]


@dataclass
class Replicating:
    """Keeps ``wanted`` copies of the newest checkpoint in ``store``; :meth:`run` does the work. ``stamp`` is
    the job's current one, ``leases`` are those held now, ``replicas`` remembers who was asked.
    """

    replicas: Replicas
    ledger: Ledger
    store: CheckpointStore
    stamp: Callable[[], JobStamp]
    leases: Callable[[], Iterable[LeaseGained]]
    wanted: int
    #: of the newest checkpoint, and what is copied of it, once that is known
    _round: int | None = None
    _index: CheckpointIndex | None = None
    _changed: trio.Event = field(default_factory=trio.Event)
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    #: leases of workers that keep nothing
    _without: set[str] = field(default_factory=set)
    _logged: tuple[int, str] = (-1, "")

    def put(self, round_: int) -> None:
        """The checkpoint for ``round_`` is the newest one."""
        self._round, self._index = round_, None
        self._changed.set()

    async def run(self) -> None:
        """Until :meth:`close`, or cancelled."""
        with self._scope:
            while self.wanted:
                self._changed = trio.Event()
                enough = self._round is None or await self._copy(self._round)
                with trio.move_on_after(math.inf if enough else RETRY_S):
                    await self._changed.wait()

    def close(self) -> None:
        self._scope.cancel()

    async def _copy(self, round_: int) -> bool:
        """True when there are as many copies as are wanted, or none is possible any more."""
        ledger = self.store.state.incoming / f"ledger-{round_}.db"
        try:
            index = self._index or await self._describe(round_, ledger)
        except (Refused, OSError) as exc:
            logger.error("The checkpoint for round %d cannot be copied: %s", round_, exc)
            return True
        if round_ == self._round:
            self._index = index
        copies = await self.ledger.run(Ledger.replicas)
        done = {worker.peer for worker, copy in copies if copy.round == round_}
        reason = "nobody who is leased offers storage (storage.checkpoints_gb of workers)"
        for lease in ranked(self.leases(), {worker.peer for worker, _ in copies}):
            if len(done) >= self.wanted or round_ != self._round:
                break
            peer = lease.worker.peer
            if peer in done or lease.lease_id in self._without:
                continue
            fields = _fields(lease.worker, index)
            try:
                await self._copy_to(lease.worker, index, ledger)
            except Refused as exc:
                # no copy of a later round is taken there either; any other refusal may be of this round alone
                if exc.code in ("not-allowed", "unsupported"):
                    self._without.add(lease.lease_id)
                    continue
                reason = str(exc)
            except NetworkError as exc:
                reason = str(exc)
            else:
                await self.ledger.run(Ledger.replicated, lease.worker, index)
                done.add(peer)
                logger.info("A worker keeps a copy of the checkpoint for round %d", round_, extra=fields)
                continue
            logger.info("A worker did not take a copy of the checkpoint: %s", reason, extra=fields)
        few = round_ == self._round and len(done) < self.wanted
        if few and self._logged != (round_, reason):
            self._logged = (round_, reason)
            text = "There are %d of %d copies of the checkpoint for round %d: %s"
            logger.warning(text, len(done), self.wanted, round_, reason)
        return not few

    async def _describe(self, round_: int, ledger: Path) -> CheckpointIndex:
        """What is to be copied: the checkpoint, and the ledger as it is now, in ``ledger``."""
        index = await in_thread(self.store.index, round_)
        for old in ledger.parent.glob("ledger-*.db"):
            old.unlink()
        await self.ledger.run(Ledger.copy_to, ledger)
        meta = await meta_of(ledger, "checkpoint", LEDGER)
        copied = CheckpointFile(name=LEDGER, size=meta.size, blake3=meta.blake3)
        return self.replicas.signed(msgspec.structs.replace(index, files=(*index.files, copied)))

    async def _copy_to(self, worker: PeerRef, index: CheckpointIndex, ledger: Path) -> None:
        stamp, node = self.stamp(), self.replicas.node
        keep = tuple(start.round for start in await self.ledger.run(Ledger.starts) if start.place)
        hold = HoldCheckpoint(stamp=stamp, job=self.replicas.job, index=index, keep=keep)
        files = {file.name: file for file in index.files}
        self.replicas.asked[worker.peer] = worker
        # what is missing once more after it was sent is not going to come
        for last in (False, True):
            answer = await node.request(worker, hold, timeout_s=_HOLD_S)
            if not isinstance(answer, CheckpointHeld) or not files.keys() >= set(answer.missing):
                raise Refused("malformed", "its reply does not state which files it misses", worker.peer)
            if not answer.missing:
                return
            if last:
                raise Refused("internal", f"{', '.join(answer.missing)} did not stay there", worker.peer)
            for name in answer.missing:
                path = ledger if name == LEDGER else self.store.path(index.round, name)
                await node.transfers.send(worker, path, checkpoint_meta(index.round, files[name], stamp))


def _ledger_of(index: CheckpointIndex) -> CheckpointIndex:
    return msgspec.structs.replace(index, files=tuple(one for one in index.files if one.name == LEDGER))


def _fields(worker: PeerRef, index: CheckpointIndex) -> dict[str, object]:
    return {"worker_peer_id": worker.peer, "job_id": index.job_id, "round": index.round}

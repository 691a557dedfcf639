"""Files from executor to executor: what may come in (:class:`ExecutorInbox`), and what is sent.

A file lands in ``incoming/``, once it is whole, under a name made of its round, hash and sender: two files
never share one, and a transfer that was cut is resumed where it was. One that still waits for the executor is
not taken twice; one that it has worked off is, since what a repetition means is for the executor to decide.

A file is sent to all receivers at a time, each with its own luck (:class:`Deliveries`). A receiver that
cannot be reached is tried again by the transfer itself, for a while. A delivery that nobody needs any more (a
newer round goes to the same receiver, the receiver left the job) is given up at once, so one dead worker does
not hold up a round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Literal

import trio

from hypha.errors import NetworkError, Refused
from hypha.messages import Delivery, JobStamp, PeerRef, ReceivedFile, TransferMeta
from hypha.node import Transfers
from hypha.runtime import chance
from hypha.telemetry.instruments import BROADCAST_DURATION, UPDATE_SEND_DURATION
from hypha.worker.bridge.feeds import FileArrivals
from hypha.worker.jobs.directory import JobDirectory

logger = logging.getLogger("hypha.worker.send")
receiving = logging.getLogger("hypha.worker.receive")

#: A receiver that fails is tried again for this long after its first failure.
GIVE_UP_AFTER_S = 60.0
#: Files of one sender that the executor has not deleted yet; more are ``busy``.
MAX_WAITING = 8


class ExecutorInbox:
    """``stamp`` gives the job's current one, ``senders`` the PeerIDs that may send now, None while that is
    not known yet.
    """

    def __init__(
        self,
        stamp: Callable[[], JobStamp],
        directory: JobDirectory,
        arrivals: FileArrivals,
        senders: Callable[[], frozenset[str] | None],
        max_bytes: int,
    ) -> None:
        self._stamp = stamp
        self._directory = directory
        self._arrivals = arrivals
        self._senders = senders
        self._max_bytes = max_bytes
        #: by sender: generation, round and attempt
        self._newest: dict[str, tuple[int, int, int]] = {}
        #: files of an earlier generation of the job
        self.refused = 0

    async def gate(self, caller: str, meta: TransferMeta) -> Path:
        """Where the file goes; ``Refused`` when it may not come in."""
        stamp = self._fence(caller, meta)
        senders = self._senders()
        if senders is None:
            raise Refused("busy", "this executor does not know yet who takes part")
        if caller not in senders:
            raise Refused("uninvited", f"{caller} may not send {meta.kind} to this executor")
        if meta.size > self._max_bytes:
            raise Refused("too-large", f"{meta.size} bytes, allowed are {self._max_bytes}")
        if not meta.checked.isalnum() or not meta.kind.isalnum():
            raise Refused("malformed", "kind and hash must be plain words")
        # theta of another attempt at the round has the same bytes and another meaning
        name = f"{meta.kind}-{stamp.generation}-{stamp.round}-{stamp.attempt}-{meta.checked[:32]}-{caller}"
        waiting = [file for file in self._arrivals.waiting() if file.from_peer == caller]
        if any(file.path == f"incoming/{name}" for file in waiting):
            raise Refused("duplicate", f"this {meta.kind} of round {stamp.round} is here already")
        if len(waiting) >= MAX_WAITING:
            raise Refused("busy", "earlier files are not worked off yet")
        return self._directory.receiving(name)

    async def arrived(self, caller: str, meta: TransferMeta, path: Path) -> None:
        """The file is whole, verified and durable, but not acknowledged yet; the executor gets it."""
        stamp = self._fence(caller, meta)
        delivered = self._directory.deliver(path)
        newest = _turn(stamp)
        self._newest[caller] = max(self._newest.get(caller, newest), newest)
        self._arrivals.put(ReceivedFile(path=delivered, size=meta.size, from_peer=caller, meta=meta))

    def _fence(self, caller: str, meta: TransferMeta) -> JobStamp:
        stamp = meta.stamp
        current = self._stamp()
        if stamp is None or stamp.job_id != current.job_id:
            raise Refused("malformed", "the file carries no stamp of this job")
        if stamp.generation < current.generation:
            self.refused += 1
            receiving.warning(
                "A %s of generation %d, which is over, was refused (%d so far).",
                meta.kind,
                stamp.generation,
                self.refused,
                extra={"peer_id": caller, "job_id": stamp.job_id},
            )
            raise Refused("stale", f"generation {stamp.generation} is over")
        if stamp.generation > current.generation:
            raise Refused("busy", f"generation {stamp.generation} has not started here yet")
        # Per sender; another generation of the job may go back to the round of a checkpoint.
        newest = self._newest.get(caller)
        if newest is not None and _turn(stamp) < newest:
            raise Refused("stale", f"you have sent {meta.kind} of round {newest[1]} already")
        return stamp


class Deliveries:
    """All deliveries of one executor, by ``transfers``."""

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        #: in the order in which they were asked for
        self._running: list[_Delivering] = []

    async def deliver(
        self,
        path: Path,
        meta: TransferMeta,
        receivers: Sequence[PeerRef],
        strategy: Literal["all", "random", "one"],
    ) -> tuple[Delivery, ...]:
        """``all``: to every receiver, concurrently. ``one`` and ``random``: to one after the other, in
        order or at random, until one acknowledged.
        """
        if strategy == "all":
            outcomes: dict[str, Delivery] = {}

            async def one(receiver: PeerRef) -> None:
                outcomes[receiver.peer] = await self._deliver(path, meta, receiver)

            async with trio.open_nursery() as nursery:
                for receiver in receivers:
                    nursery.start_soon(one, receiver)
            return tuple(outcomes[receiver.peer] for receiver in receivers)
        order = list(receivers)
        if strategy == "random":
            chance().shuffle(order)
        tried = []
        for receiver in order:
            tried.append(await self._deliver(path, meta, receiver))
            if tried[-1].acknowledged:
                break
        return tuple(tried)

    def keep_only(self, kind: str, peers: Collection[str]) -> None:
        """Give up deliveries of ``kind`` to anybody else."""
        for delivering in self._running:
            if delivering.meta.kind == kind and delivering.peer not in peers:
                delivering.give_up("uninvited", "it takes no part in the job any more")

    async def _deliver(self, path: Path, meta: TransferMeta, receiver: PeerRef) -> Delivery:
        turn = _turn(meta.stamp)
        # asked for again because it takes long: a second one would only be in its way
        while same := [one for one in self._running if (one.meta, one.peer) == (meta, receiver.peer)]:
            await same[0].ended.wait()
            if same[0].outcome is not None:
                return same[0].outcome
        for other in self._running:
            if (other.meta.kind, other.peer) == (meta.kind, receiver.peer) and _turn(other.meta.stamp) < turn:
                other.give_up("stale", f"overtaken by round {turn[1]}")
        delivering = _Delivering(meta, receiver.peer)
        self._running.append(delivering)
        began = trio.current_time()
        try:
            delivering.outcome = await self._outcome(delivering, path, meta, receiver)
            _record(meta, receiver, delivering.outcome, trio.current_time() - began)
            return delivering.outcome
        finally:
            self._running.remove(delivering)
            delivering.ended.set()

    async def _outcome(
        self, delivering: _Delivering, path: Path, meta: TransferMeta, receiver: PeerRef
    ) -> Delivery:
        try:
            with delivering.scope:
                await self._transfers.send(receiver, path, meta, GIVE_UP_AFTER_S)
                return Delivery(peer=receiver.peer, acknowledged=True)
            return delivering.given_up
        except Refused as exc:
            if exc.code == "duplicate":
                return Delivery(peer=receiver.peer, acknowledged=True)  # it has it
            logger.warning("%s was refused: %s", meta.name, exc, extra={"peer_id": receiver.peer})
            return Delivery(peer=receiver.peer, acknowledged=False, error=exc.code, detail=exc.reason)
        except NetworkError as exc:
            logger.error("%s was not delivered: %s", meta.name, exc, extra={"peer_id": receiver.peer})
            return Delivery(peer=receiver.peer, acknowledged=False, error="unreachable", detail=str(exc))


def _record(meta: TransferMeta, receiver: PeerRef, outcome: Delivery, lasted_s: float) -> None:
    """How long the delivery of a pseudo-gradient, or of theta, took."""
    duration = {"update": UPDATE_SEND_DURATION, "theta": BROADCAST_DURATION}.get(meta.kind)
    if duration is not None:
        duration.record(lasted_s, status="success" if outcome.acknowledged else "failure")
    if outcome.acknowledged:
        stamp = meta.stamp
        logger.debug(
            "The %s %s was delivered within %.3f s: %d bytes.",
            meta.kind,
            meta.name,
            lasted_s,
            meta.size,
            extra={
                "peer_id": receiver.peer,
                **({"job_id": stamp.job_id, "round": stamp.round} if stamp is not None else {}),
            },
        )


def _turn(stamp: JobStamp | None) -> tuple[int, int, int]:
    """A later one overtakes: the generation of the job, the round in it, the attempt at that."""
    return (0, 0, 0) if stamp is None else (stamp.generation, stamp.round, stamp.attempt)


class _Delivering:
    def __init__(self, meta: TransferMeta, peer: str) -> None:
        self.meta = meta
        self.peer = peer
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        #: None until it has ended, and when whoever asked for it did not wait
        self.outcome: Delivery | None = None
        #: valid when ``scope`` was cancelled
        self.given_up = Delivery(peer=peer, acknowledged=False)

    def give_up(self, error: str, detail: str) -> None:
        self.given_up = Delivery(peer=self.peer, acknowledged=False, error=error, detail=detail)
        self.scope.cancel()

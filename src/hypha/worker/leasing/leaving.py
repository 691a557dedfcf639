"""How a worker stops being of use to anybody: drained it makes no more offers, leaving it ends soon.

A worker that leaves reports to each scheduler that holds a lease by when (:class:`WorkerLeaving`, once a
second), so that what was trained is handed over and another worker looked for. It has left when nothing runs
under its leases any more; what is leased still when the time is up is handed back, so that its scheduler need
not wait for a lease to expire, whatever the way between them is.
"""

from __future__ import annotations

import logging

import trio

from hypha.errors import NetworkError, Refused
from hypha.messages import WorkerLeaving
from hypha.node import Node
from hypha.rules.leases import Lease, Release
from hypha.worker.leasing.events import OfferFailed
from hypha.worker.leasing.service import LeaseService

logger = logging.getLogger(__name__)

#: A scheduler receives it again after this long, one that did not answer sooner.
REPEAT_S, RETRY_S = 1.0, 0.2
#: Of the time that is left, what is kept for handing leases back: this share, so long at most.
HAND_BACK_SHARE, HAND_BACK_S = 0.2, 1.0


class Leaving:
    """Of one worker, whose leases are at ``lease_service``. :meth:`run` does the work, beside the rest of the
    worker; :attr:`left` is set when it is over.
    """

    def __init__(self, node: Node, lease_service: LeaseService) -> None:
        self._node = node
        self._lease_service = lease_service
        self._begun = trio.Event()
        #: when the worker ends, and why, once it leaves
        self.ends_at: float | None = None
        self.reason = ""
        self.left = trio.Event()
        #: when what is leased still is handed back
        self._hand_back_at = 0.0
        #: a scheduler that does not answer is asked again as long as there is time
        self._patient = True
        #: leases whose schedulers receive reports, and those of whom nobody has received one
        self._told: set[str] = set()
        self._unreached: set[str] = set()

    @property
    def in_words(self) -> str:
        """For people: whether it makes offers, and when it ends."""
        if self.ends_at is not None:
            left_s = max(0.0, self.ends_at - trio.current_time())
            return f"ends in {left_s:.1f} s ({self.reason})"
        return "is drained, and makes no new offers" if self._lease_service.is_closed else "makes offers"

    def drain(self) -> None:
        """Make no more offers; what is leased goes on."""
        if not self._lease_service.is_closed:
            logger.info("Drained: this worker makes no new offers; %d leases go on.", len(self._accepted()))
        self._lease_service.close()

    def resume(self) -> None:
        """Make offers again. Raises Refused when the worker leaves already."""
        if self.ends_at is not None:
            raise Refused("invalid", f"this worker {self.in_words}, and that cannot be taken back")
        if self._lease_service.is_closed:
            logger.info("This worker makes offers again.")
        self._lease_service.reopen()

    def begin(self, within_s: float, reason: str, patient: bool = True) -> None:
        """Leave within that time. Called again, the sooner end holds. Unless ``patient``, no scheduler that
        cannot be reached at once is waited for.
        """
        ends_at = trio.current_time() + within_s
        self._lease_service.close()
        if self.ends_at is not None and self.ends_at <= ends_at:
            return
        self.ends_at, self.reason, self._patient = ends_at, reason, patient
        self._hand_back_at = ends_at - min(HAND_BACK_S, HAND_BACK_SHARE * within_s)
        for lease in self._lease_service.leases:
            if not lease.accepted:
                # whoever takes this offer up is refused, and takes the next one
                self._lease_service.handle(OfferFailed(lease.lease_id, reason))
        if leases := self._accepted():
            logger.info(
                "This worker leaves within %.1f s (%s): %d leases are handed back, with what was trained.",
                within_s,
                reason,
                len(leases),
            )
        self._begun.set()
        self._lease_service.changes.note()

    async def run(self) -> None:
        """Once it begins to leave: report to schedulers, wait until nothing runs, hand back what is left."""
        await self._begun.wait()
        try:
            async with trio.open_nursery() as nursery:
                await self._until_nothing_runs(nursery)
                nursery.cancel_scope.cancel()
            await self._hand_back()
        finally:
            self.left.set()

    def _accepted(self) -> list[Lease]:
        return [lease for lease in self._lease_service.leases if lease.accepted]

    async def _until_nothing_runs(self, nursery: trio.Nursery) -> None:
        while True:
            seen = self._lease_service.changes.count
            leases = self._accepted()
            for lease in leases:
                if lease.lease_id not in self._told:
                    self._told.add(lease.lease_id)
                    nursery.start_soon(self._tell, lease)
            waits = (
                any(lease.lease_id not in self._unreached for lease in leases) or self._lease_service.draining
            )
            if not waits or trio.current_time() >= self._hand_back_at:
                return
            # it may become sooner
            with trio.move_on_at(self._hand_back_at):
                await self._lease_service.changes.wait(seen)

    async def _tell(self, lease: Lease) -> None:
        """Its scheduler, again and again while there is the lease; cancelled when that is handed back."""
        fields = {"lease_id": lease.lease_id, "peer_id": lease.scheduler, "job_id": lease.job_id}
        received = False
        while any(one.lease_id == lease.lease_id for one in self._accepted()):
            if (left_s := self._hand_back_at - trio.current_time()) <= 0:
                return
            pause_s = REPEAT_S
            notice = WorkerLeaving(lease_id=lease.lease_id, left_s=left_s, reason=self.reason)
            try:
                await self._node.request(lease.scheduler, notice, timeout_s=2.0 * REPEAT_S)
                received = True
            except Refused as exc:
                logger.debug("A scheduler did not take the notice: %s", exc, extra=fields)
                pause_s = RETRY_S
                # it does not know this notice, or takes none from this worker, while there is the lease
                if exc.final or exc.code == "role":
                    self._not_received(lease)
                    return
            except NetworkError as exc:
                logger.info(
                    "It could not be reported to a scheduler that this worker ends: %s", exc, extra=fields
                )
                pause_s = RETRY_S
                if not received:
                    self._not_received(lease)
            await trio.sleep(pause_s)

    def _not_received(self, lease: Lease) -> None:
        """Who has a moment only does not spend it on a scheduler that cannot receive it."""
        if not self._patient:
            self._unreached.add(lease.lease_id)
            self._lease_service.changes.note()

    async def _hand_back(self) -> None:
        leases = self._accepted()
        for lease in leases:
            self._lease_service.handle(Release(lease.lease_id, lease.scheduler))
        # on a busy machine that takes longer than what is left: it is worth that
        with trio.move_on_after(HAND_BACK_S):
            async with trio.open_nursery() as nursery:
                for lease in leases:
                    if lease.lease_id not in self._unreached:
                        nursery.start_soon(self._tell_handed_back, lease)

    async def _tell_handed_back(self, lease: Lease) -> None:
        notice = WorkerLeaving(lease_id=lease.lease_id, left_s=0.0, reason=self.reason)
        try:
            await self._node.request(lease.scheduler, notice, timeout_s=HAND_BACK_S)
        except NetworkError as exc:
            fields = {"lease_id": lease.lease_id, "peer_id": lease.scheduler}
            logger.info("That a lease is handed back was not delivered: %s", exc, extra=fields)

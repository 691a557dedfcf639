"""The places of a job and who is leased for each, as the allocator and the renewals note it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from hypha.journal import JournalEntry
from hypha.messages import ExecutorClass
from hypha.scheduler.goodput.place import GoodputPlace
from hypha.scheduler.goodput.recovery import Recoveries, reason_of
from hypha.scheduler.goodput.report import FailureReason, GoodputNews
from hypha.scheduler.leasing import events as allocation
from hypha.scheduler.leasing.renewal import Lapsed, Renewed

NANOSECONDS = 1_000_000_000


def nanoseconds(seconds: float) -> int:
    """``seconds`` in whole ones."""
    return round(seconds * NANOSECONDS)


class Leases(ABC):
    """The part of :class:`hypha.scheduler.goodput.machine.Goodput` that the others stand on."""

    def __init__(self, places: int, began: float) -> None:
        self.began = self.now = nanoseconds(began)
        #: the job gave everything back; time does not count any more
        self.ended = False
        self.places = [GoodputPlace(self.began) for _ in range(places)]
        self.recoveries = Recoveries(self.began)
        self._news: list[GoodputNews] = []
        #: places about which something changed
        self._touched: set[int] = set()
        #: by lease: what was offered, where it is used, why it ended
        self._offered: dict[str, tuple[ExecutorClass, str]] = {}
        self._under: dict[str, int] = {}
        #: leases for which there is no place yet, in the order in which they were gained
        self._spare: dict[str, str] = {}
        self._lapsed: dict[str, str] = {}
        #: places that an earlier scheduler had leased
        self._adopted: set[int] = set()
        self._server_lease: str | None = None
        self._server_sign = self.began
        #: leases under which something failed, that was counted; and workers whose loss the round machine has
        #: not noted yet
        self._counted: set[str] = set()
        self._counted_early: set[str] = set()
        #: who trained at a place last; for which round and attempt its batches are done
        self._trainer: dict[int, str] = {}
        self._finished: dict[int, tuple[str, int, int]] = {}
        #: places that wait for nothing but a parameter server, or for the scheduler to receive them
        self._stalled: set[int] = set()
        self._began_generation = False
        #: something was missing in the open round
        self._disturbed = True

    def take_renewal(self, entry: JournalEntry, lease: str, now: int) -> None:
        if isinstance(entry.event, Renewed):
            number = self._under.get(lease)
            if number is not None:
                self.places[number].alive = now
            elif lease == self._server_lease:
                self._server_sign = now
        for action in entry.actions:
            if isinstance(action, Lapsed):
                self._lapsed[lease] = action.reason

    def take_allocation(self, entry: JournalEntry, now: int) -> None:
        for action in entry.actions:
            if isinstance(action, allocation.Accept):
                self._offered[action.offer.lease_id] = (action.kind, action.offer.worker.peer)
        match entry.event:
            case allocation.Gained(lease_id=lease) if lease in self._offered:
                self._gained(*self._offered.pop(lease), lease, now)
            case allocation.Adopted(kind=kind, lease_id=lease, worker=peer):
                number = self._gained(kind, peer, lease, now)
                if number is not None:
                    self._adopted.add(number)
            case allocation.LeaseFailed(lease_id=lease):
                self._lease_lost(lease, now)
            case allocation.Want(kind="train", count=0):
                # the job gives everything back
                self.ended = True
            case _:
                pass

    def _gained(self, kind: ExecutorClass, peer: str, lease: str, now: int) -> int | None:
        """The place that ``peer`` has now, for a worker; one where something was lost comes first."""
        if kind == "aggregate":
            self._server_lease, self._server_sign = lease, now
            return None
        vacant = [number for number, place in enumerate(self.places) if not place.peer]
        if any(place.peer == peer for place in self.places):
            return None
        if not vacant:
            # it is to take the place of a worker that leaves, which has that still
            self._spare[lease] = peer
            return None
        number = min(vacant, key=lambda one: not self.places[one].failed)
        self.places[number].occupy(peer, lease, now)
        self._under[lease] = number
        self._touched.add(number)
        return number

    def _lease_lost(self, lease: str, now: int) -> None:
        self._offered.pop(lease, None)
        self._spare.pop(lease, None)
        why = self._lapsed.pop(lease, None)
        if lease == self._server_lease:
            self._server_lease = None
        number = self._under.pop(lease, None)
        if number is None:
            return
        place, peer = self.places[number], self.places[number].peer
        if self._began_generation and lease not in self._counted:
            reason: FailureReason = "dropped" if why is None else reason_of(why)
            self.fail(number, reason, max(place.heard, place.alive), now)
            self._counted_early.add(peer)
        self._counted.discard(lease)
        self._adopted.discard(number)
        place.vacate(now)
        self._touched.add(number)
        if self._spare:
            lease, peer = next(iter(self._spare.items()))
            del self._spare[lease]
            place.occupy(peer, lease, now)
            self._under[lease] = number
            self._spare_used(number, now)

    @abstractmethod
    def _spare_used(self, number: int, now: int) -> None:
        """The place is that of a worker that was leased before."""

    def fail(self, number: int, reason: FailureReason, sign: int, now: int) -> None:
        """What is at the place is lost; its last sign of life was at ``sign``."""
        place = self.places[number]
        place.lose(sign, now)
        self._counted.add(place.lease)
        self._stalled.discard(number)
        self._trainer.pop(number, None)
        self._finished.pop(number, None)
        self._disturbed = True
        self._news += self.recoveries.failed(number, "train", place.peer, reason, sign, now)

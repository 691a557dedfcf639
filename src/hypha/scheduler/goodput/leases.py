"""The places of a job and who is leased for each, as the allocator and the renewals note it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hypha.journal import JournalEntry
from hypha.messages import ExecutorClass
from hypha.scheduler.goodput.place import GoodputPlace
from hypha.scheduler.goodput.report import FailureReason, Recoveries, reason_of
from hypha.scheduler.leasing import events as allocation
from hypha.scheduler.leasing.renewal import Lapsed, Renewed
from hypha.scheduler.rounds.participants import Member
from hypha.scheduler.rounds.state import RoundState

NANOSECONDS = 1_000_000_000


def nanoseconds(seconds: float) -> int:
    return round(seconds * NANOSECONDS)


class GoodputLeases:
    """The part of :class:`hypha.scheduler.goodput.machine.Goodput` that knows who has a place. ``machine``
    gives the present round machine, None before there is one.
    """

    def __init__(self, places: int, began: float, machine: Callable[[], RoundState | None]) -> None:
        self.began = self.now = nanoseconds(began)
        #: the job gave everything back; time does not count any more
        self.ended = False
        self.places = [GoodputPlace(self.began) for _ in range(places)]
        self.recoveries = Recoveries(self.began)
        self._machine = machine
        #: by lease: what was offered, where it is used, why it ended
        self._offered: dict[str, tuple[ExecutorClass, str]] = {}
        self._under: dict[str, GoodputPlace] = {}
        #: leases for which there is no place yet, in the order in which they were gained
        self._spare: dict[str, str] = {}
        self._lapsed: dict[str, str] = {}
        self._server_lease: str | None = None
        self._server_sign = self.began
        #: before a generation of the job has begun nothing fails that could be lost
        self._begun = False
        #: something was missing in the open round
        self._disturbed = True

    @property
    def _members(self) -> Mapping[str, Member]:
        """As the round machine knows them, by peer."""
        machine = self._machine()
        return {} if machine is None else machine.members

    def _take_renewal(self, entry: JournalEntry, lease: str, now: int) -> None:
        if isinstance(entry.event, Renewed):
            place = self._under.get(lease)
            if place is not None:
                place.alive = now
            elif lease == self._server_lease:
                self._server_sign = now
        for action in entry.actions:
            if isinstance(action, Lapsed):
                self._lapsed[lease] = action.reason

    def _take_allocation(self, entry: JournalEntry, now: int) -> None:
        for action in entry.actions:
            if isinstance(action, allocation.Accept):
                self._offered[action.offer.lease_id] = (action.kind, action.offer.worker.peer)
        match entry.event:
            case allocation.Gained(lease_id=lease) if lease in self._offered:
                self._gained(*self._offered.pop(lease), lease, now)
            case allocation.Adopted(kind=kind, lease_id=lease, worker=peer):
                self._gained(kind, peer, lease, now)
            case allocation.LeaseFailed(lease_id=lease):
                self._lease_lost(lease, now)
            case allocation.Want(kind="train", count=0):
                # the job gives everything back
                self.ended = True

    def _gained(self, kind: ExecutorClass, peer: str, lease: str, now: int) -> None:
        """A worker gets a vacant place; one where something was lost comes first."""
        if kind == "aggregate":
            self._server_lease, self._server_sign = lease, now
            return
        if any(place.peer == peer for place in self.places):
            return
        vacant = [place for place in self.places if not place.peer]
        if vacant:
            self._occupy(min(vacant, key=lambda one: not one.failed), peer, lease, now)
        else:
            # it is to take the place of a worker that leaves, which has that still
            self._spare[lease] = peer

    def _occupy(self, place: GoodputPlace, peer: str, lease: str, now: int) -> None:
        place.occupy(peer, now)
        self._under[lease] = place

    def _lease_lost(self, lease: str, now: int) -> None:
        self._offered.pop(lease, None)
        self._spare.pop(lease, None)
        why = self._lapsed.pop(lease, None)
        if lease == self._server_lease:
            self._server_lease = None
        place = self._under.pop(lease, None)
        if place is None:
            return
        if self._begun and not place.counted:
            self._fail(place, "dropped" if why is None else reason_of(why), place.last_sign, now)
        # the round machine does not know it yet, and may receive the worker's report of a round meanwhile
        place.vacate(now)
        if self._spare:
            lease, peer = next(iter(self._spare.items()))
            del self._spare[lease]
            self._occupy(place, peer, lease, now)
            place.joined = peer in self._members

    def _fail(self, place: GoodputPlace, reason: FailureReason, sign: int, now: int) -> None:
        """What is at the place is lost; its last sign of life was at ``sign``."""
        place.lose(sign, now)
        place.over()
        self._disturbed = True
        self.recoveries.failed(place, place.peer, reason, sign, now)

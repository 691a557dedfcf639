"""What goes into the allocator, what comes out of it, and what a pool reports of its leases: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msgspec import Struct

from hypha import __version__
from hypha.messages import ExecutorClass, ExecutorDescriptor, PeerRef, Resources, WorkerOffer, WorkerRequest
from hypha.rules.leases import Tick
from hypha.scheduler.leasing.renewal import Lapsed, Recovered, Suspected

#: why an offer was not taken
Cause = Literal["late", "price", "resources", "features", "avoided", "not-needed", "other"]


class Search(Struct, frozen=True, tag="Ask"):
    """Whom to look for. ``bid`` is published, ``max_price`` is private: while workers are missing the bid is
    raised every ``raise_after_s`` by the share ``raise_by`` of what lies between the two. ``needs`` are the
    features (:mod:`hypha.features`) that a worker must have.

    ``request_id`` stays the same as long as the scheduler looks for these workers, so that one that
    already holds a lease for it does not offer again.
    """

    request_id: str
    executor: ExecutorDescriptor
    resources: Resources
    bid: float
    max_price: float
    dataset: str | None = None
    needs: tuple[str, ...] = ()
    #: a worker can make use of so many times ``resources``; what it offers beyond that counts for nothing
    useful: float | None = None
    raise_after_s: float | None = None
    raise_by: float = 0.0
    #: with fewer the job cannot begin; 0: nobody knows how many it needs
    least: int = 0

    @property
    def kind(self) -> ExecutorClass:
        return self.executor.kind


class SearchTimes(Struct, frozen=True, tag="Pace"):
    """How long a request collects offers (pauses between requests begin with twice that and grow),
    for how long no further one may come when offers come after that deadline, how long a worker that
    failed is avoided. A job that cannot begin for lack of workers, and holds some that others have asked for
    before it did, gives them back ``yield_after_s`` (up to twice that) after it got the last one, and ten
    times as late where all others asked after it did; ``None``: never.
    """

    offer_deadline_s: float = 0.5
    lull_s: float = 0.1
    longest_pause_s: float = 5.0
    avoid_s: float = 120.0
    yield_after_s: float | None = None


# --- in -------------------------------------------------------------------------------------------------


class Want(Struct, frozen=True, tag=True):
    """``count`` workers of ``kind`` shall be held; what is held beyond stays until released."""

    kind: ExecutorClass
    count: int


class Offered(Struct, frozen=True, tag=True):
    """The authenticated ``caller`` offers."""

    caller: str
    offer: WorkerOffer


class Gained(Struct, frozen=True, tag=True):
    """The acceptance of this lease was confirmed."""

    lease_id: str


class Adopted(Struct, frozen=True, tag=True):
    """This lease was gained by an earlier scheduler of the job."""

    kind: ExecutorClass
    lease_id: str
    worker: str


class LeaseFailed(Struct, frozen=True, tag="Lost"):
    """This lease is over or could not be accepted. ``avoid``: its worker is to blame."""

    lease_id: str
    avoid: bool = True


class WorkerLeaves(Struct, frozen=True, tag="Leaves"):
    """The worker of this lease ends in ``left_s`` seconds: the lease lasts until then, and another worker is
    looked for meanwhile.
    """

    lease_id: str
    left_s: float = 0.0


class TrackRecord(Struct, frozen=True, tag=True):
    """What a ledger has of ``worker``: ``rounds`` hold its updates, of ``samples_per_s`` in the mean; so many
    ``failures``. ``capacity`` is the weighted one of its last lease, 0.0 where it is not known.
    """

    worker: str
    rounds: int = 0
    failures: int = 0
    samples_per_s: float = 0.0
    capacity: float = 0.0


class Worked(Struct, frozen=True, tag=True):
    """A round was applied, with updates of these workers: who did how many samples a second."""

    speeds: tuple[tuple[str, float], ...]


class Contended(Struct, frozen=True, tag=True):
    """The worker of this lease reports whether others ask it for what the lease holds, and whether one of
    them has asked for longer than this job.
    """

    lease_id: str
    contended: bool
    outranked: bool = False


class Begun(Struct, frozen=True, tag=True):
    """The job trains: what it holds is not given back any more for lack of the rest."""


class GatewayChanged(Struct, frozen=True, tag=True):
    """What was published may not have been received: advertise again what is still wanted, now, or after the
    usual pause where that is a moment ago.
    """


class AllocatorBegan(Struct, frozen=True, tag=True):
    """What an allocator was made from: the first entry of its journal."""

    asks: tuple[Search, ...]
    pace: SearchTimes


AllocatorEvent = (
    Want
    | Offered
    | Gained
    | Adopted
    | LeaseFailed
    | WorkerLeaves
    | TrackRecord
    | Worked
    | Contended
    | Begun
    | GatewayChanged
    | Tick
)


# --- out --------------------------------------------------------------------------------------------------


class Advertise(Struct, frozen=True, tag=True):
    """Publish ``ask`` for ``count`` more workers; offers are collected for ``offer_within_s``. A
    ``raised_bid`` is published in place of the bid of ``ask``.
    """

    ask: Search
    count: int
    offer_within_s: float
    raised_bid: float | None = None

    @property
    def bid(self) -> float:
        """What is published."""
        return self.ask.bid if self.raised_bid is None else self.raised_bid

    def request(self, scheduler: PeerRef) -> WorkerRequest:
        return WorkerRequest(
            request_id=self.ask.request_id,
            scheduler=scheduler,
            resources=self.ask.resources,
            executor=self.ask.executor,
            count=self.count,
            bid=self.bid,
            offer_within_s=self.offer_within_s,
            dataset=self.ask.dataset,
            version=__version__,
            needs=self.ask.needs,
        )


class Keep(Struct, frozen=True, tag=True):
    """Answer the offer: it is being considered."""

    lease_id: str


class Decline(Struct, frozen=True, tag=True):
    """Answer the offer with a refusal (the worker frees its lease at once)."""

    lease_id: str
    code: str
    reason: str
    cause: Cause = "other"


class Accept(Struct, frozen=True, tag=True):
    """Take it: renew the lease now and keep it renewed. It expires at ``expires_at`` unless renewed."""

    kind: ExecutorClass
    offer: WorkerOffer
    expires_at: float


class Dismiss(Struct, frozen=True, tag=True):
    """Not taken after all: release the lease."""

    lease_id: str
    worker: PeerRef
    cause: Cause = "other"


class GiveBack(Struct, frozen=True, tag=True):
    """Give way: release this lease, which is taken, and maybe confirmed; :class:`LeaseFailed` follows."""

    lease_id: str


AllocatorAction = Advertise | Keep | Decline | Accept | Dismiss | GiveBack

# --- what a pool reports ----------------------------------------------------------------------------------


class LeaseGained(Struct, frozen=True):
    """A worker is held: jobs of ``kind`` may be dispatched under ``lease_id``. The ledger keeps it, so that
    another scheduler of the job can go on with it. ``version`` is the worker's, where it states one.
    """

    lease_id: str
    worker: PeerRef
    resources: Resources
    price: float
    kind: ExecutorClass
    version: str = ""


LeaseChange = Gained | Suspected | Recovered | WorkerLeaves | Lapsed


@dataclass(frozen=True)
class PoolEvent:
    """What became of ``lease``: first it was gained. After :class:`Lapsed` nothing more is reported; of one
    that :meth:`Pool.release` gave back not even that. :class:`WorkerLeaves` is reported again whenever the
    worker announces it.
    """

    lease: LeaseGained
    change: LeaseChange

"""The leases that a job holds, and what becomes of them: plain values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct

from hypha.messages import ExecutorClass, PeerRef, Resources


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


@dataclass(frozen=True)
class HeldLease:
    """A lease that is held, as it stands: it ends at ``expires_at`` of trio's clock unless it is renewed."""

    lease: LeaseGained
    expires_at: float
    suspected: bool
    #: when its worker ends, where the worker has announced it
    leaves_at: float | None = None


@dataclass(frozen=True)
class LeaseSuspect:
    """The worker cannot be reached, repeatedly; its lease has not expired."""

    lease_id: str
    worker: PeerRef
    kind: ExecutorClass
    reason: str


@dataclass(frozen=True)
class LeaseRecovered:
    """A suspected worker answered again."""

    lease_id: str
    worker: PeerRef
    kind: ExecutorClass


@dataclass(frozen=True)
class LeaseLost:
    """The lease expired, or the worker ended it. One that :meth:`Pool.release` gave back is not reported."""

    lease_id: str
    worker: PeerRef
    kind: ExecutorClass
    reason: str
    #: it did not end the lease itself
    to_blame: bool = True


@dataclass(frozen=True)
class LeaseLeaving:
    """The worker ends in ``left_s`` seconds; its lease lasts until then, and another worker is looked for.
    Reported again whenever the worker announces it.
    """

    lease_id: str
    worker: PeerRef
    kind: ExecutorClass
    left_s: float
    reason: str


PoolEvent = LeaseGained | LeaseSuspect | LeaseRecovered | LeaseLeaving | LeaseLost

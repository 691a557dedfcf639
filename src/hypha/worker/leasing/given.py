"""The leases that a worker has given, as its operator sees them: ``/leases`` and ``hypha leases``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from hypha.messages import ExecutorClass, Resources, Value
from hypha.naming import name_of

if TYPE_CHECKING:
    from hypha.worker.leasing.leaving import Leaving
    from hypha.worker.leasing.service import LeaseService


class GivenLease(Value, frozen=True):
    """A lease that a worker has given: to whom, for what, and for how long yet. ``state`` is ``temporary``
    (held with an offer), ``accepted``, or ``bound`` (a job was dispatched to it).
    """

    lease: str
    scheduler: str
    name: str
    kind: ExecutorClass
    executor: str
    state: str
    price: float
    resources: Resources
    expires_in_s: float
    job: str = ""


class AskedPrice(Value, frozen=True):
    """What a worker takes for one lease: ``asked`` now, at a ``load`` of 0 to 1, ``rest`` without any."""

    asked: float
    rest: float
    floor: float
    load: float
    strategy: str


class GivenLeases(Value, frozen=True):
    """What ``/leases`` of a worker answers: leases, what is free, whether it makes offers, at what price."""

    state: str
    free: Resources
    leases: tuple[GivenLease, ...] = ()
    price: AskedPrice | None = None
    worker: str = ""
    name: str = ""


def given_leases(lease_service: LeaseService, leaving: Leaving, worker: str = "") -> GivenLeases:
    """Of ``worker`` (its PeerID), as they are now."""
    now, pricing = trio.current_time(), lease_service.arbiter.pricing
    return GivenLeases(
        state=leaving.in_words,
        worker=worker,
        name=name_of(worker),
        price=AskedPrice(
            asked=pricing.asked,
            rest=pricing.at_rest,
            floor=pricing.terms.floor,
            load=pricing.load,
            strategy=pricing.terms.strategy,
        ),
        free=lease_service.arbiter.book.free,
        leases=tuple(
            GivenLease(
                lease=lease.lease_id,
                scheduler=lease.scheduler,
                name=name_of(lease.scheduler),
                kind=lease.kind,
                executor=lease.executor.name,
                state="bound" if lease.job_id else "accepted" if lease.accepted else "temporary",
                price=lease.price,
                resources=lease.resources,
                expires_in_s=max(0.0, lease.expires_at - now),
                job=lease.job_id or "",
            )
            for lease in lease_service.leases
        ),
    )

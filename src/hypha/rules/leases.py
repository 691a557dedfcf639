"""The leases of one worker: who may use which part of it, and until when.

:class:`LeaseBook` is the lessor's side, a part of its arbiter (:mod:`hypha.worker.leasing.arbiter`), which
notes in its journal what happens. A lease starts *temporary* (held with an offer), is accepted by its first
renewal and lives on from renewal to renewal. It belongs to one scheduler, one executor and, once dispatched
to, one job. Expiry always frees it, a release only makes that sooner: no message is needed. What is reserved
never exceeds the total. A lease may ask to be *held while draining*: when it ends, its resources stay
reserved until its executor is gone, at most for the time it asked for.

The lessee's side is :mod:`hypha.scheduler.leasing.renewal`. There is no clock in here: times are seconds of
one node's monotonic clock and never cross the wire.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from msgspec import Struct

from hypha.messages import ExecutorClass, ExecutorDescriptor, Resources
from hypha.rules.resources import add_up, check, fits, is_valid, left_of

EndReason = Literal["expired", "released"]


@dataclass(frozen=True)
class Lease:
    """``resources`` are reserved for ``scheduler`` until ``expires_at``, to run one job on ``executor``.

    ``job_id`` is set by the first dispatch. ``hold_s`` is how long the resources may stay reserved
    after the end while the executor drains.
    """

    lease_id: str
    request_id: str
    scheduler: str
    executor: ExecutorDescriptor
    resources: Resources
    price: float
    expires_at: float
    accepted: bool = False
    job_id: str | None = None
    hold_s: float = 0.0

    @property
    def kind(self) -> ExecutorClass:
        """The class of executor it is for."""
        return self.executor.kind


# --- what happens to leases ---------------------------------------------------------------------------


class Release(Struct, frozen=True, tag=True):
    """``caller`` gives its lease back."""

    lease_id: str
    caller: str


class Bind(Struct, frozen=True, tag=True):
    """``caller`` dispatches ``job_id`` to its lease. With ``job_id`` None only the rights are checked."""

    lease_id: str
    caller: str
    kind: ExecutorClass
    job_id: str | None = None


class Hold(Struct, frozen=True, tag=True):
    """When this lease ends, keep its resources for up to ``hold_s``, until :class:`Drained`."""

    lease_id: str
    hold_s: float


class Drained(Struct, frozen=True, tag=True):
    """Nothing of the lease's executor runs any more."""

    lease_id: str


class Tick(Struct, frozen=True, tag=True):
    """Only time has passed."""


BookEvent = Release | Bind | Hold | Drained | Tick


# --- what follows from it -----------------------------------------------------------------------------


class Granted(Struct, frozen=True, tag=True):
    """The request was carried out; ``lease`` as it is now."""

    lease: Lease


class Denied(Struct, frozen=True, tag=True):
    """It was not; ``code`` is one of :data:`hypha.errors.REFUSALS`."""

    lease_id: str
    code: str
    reason: str


class LeaseEnded(Struct, frozen=True, tag="Ended"):
    """The lease is over: whoever works under it must stop."""

    lease: Lease
    reason: EndReason


class Freed(Struct, frozen=True, tag=True):
    """The resources of a lease that was held while draining are free now."""

    lease: Lease


BookAction = Granted | Denied | LeaseEnded | Freed


class LeaseBook:
    """Reservations against ``total``. Whatever happens at ``now``, what is due by then ends first; times must
    not run backwards.
    """

    def __init__(self, total: Resources) -> None:
        check(total, "total resources")
        self.total = total
        self._validated_at = -math.inf
        self._live: dict[str, Lease] = {}
        self._draining: dict[str, tuple[Lease, float]] = {}

    def __iter__(self) -> Iterator[Lease]:
        """Leases that have not ended; draining ones are not among them."""
        return iter(tuple(self._live.values()))

    def __len__(self) -> int:
        return len(self._live)

    def get(self, lease_id: str) -> Lease | None:
        """The lease, unless it has ended."""
        return self._live.get(lease_id)

    def live_for(self, scheduler: str, request_id: str) -> Lease | None:
        """The lease that ``scheduler`` was given for ``request_id``, unless it has ended."""
        for lease in self._live.values():
            if lease.request_id == request_id and lease.scheduler == scheduler:
                return lease
        return None

    @property
    def draining(self) -> tuple[Lease, ...]:
        """Ended leases whose resources are still held."""
        return tuple(lease for lease, _ in self._draining.values())

    @property
    def used(self) -> Resources:
        """What is reserved, draining leases included."""
        return add_up(self._parts())

    def _parts(self) -> list[Resources]:
        return [lease.resources for lease in (*self._live.values(), *self.draining)]

    @property
    def free(self) -> Resources:
        """``total`` without :attr:`used`."""
        return left_of(self.total, self.used)

    @property
    def next_wake(self) -> float | None:
        """When the next lease expires or the next hold runs out; None without any."""
        moments = [lease.expires_at for lease in self._live.values()]
        moments.extend(until for _, until in self._draining.values())
        return min(moments, default=None)

    def validate(self, now: float) -> None:
        """Assert what always holds at ``now``. For tests and simulation."""
        assert now >= self._validated_at, f"time ran from {self._validated_at} back to {now}"
        self._validated_at = now
        assert not self._live.keys() & self._draining.keys(), "a lease that has ended lives"
        assert fits(self.used, self.total), f"{self.used} are reserved of {self.total}"
        for lease_id, lease in self._live.items():
            assert lease_id == lease.lease_id, f"{lease.lease_id} is known as {lease_id}"
            assert lease.expires_at >= now, f"{lease_id} has expired, but lives"
            assert lease.accepted or lease.job_id is None, f"{lease_id} has a job and was not accepted"
        for lease_id, (lease, until) in self._draining.items():
            assert lease_id == lease.lease_id, f"{lease.lease_id} is known as {lease_id}"
            assert until >= now, f"{lease_id} is held for longer than was asked for"

    def reserve(self, lease: Lease, life_s: float, now: float) -> list[BookAction]:
        """Reserve what ``lease`` asks for; its ``expires_at`` is set to ``life_s`` from now."""
        actions = self._expire(now)
        # against the whole sum, not against what is free: errors within tolerance must not add up
        if lease.lease_id in self._live or lease.lease_id in self._draining:
            actions.append(Denied(lease.lease_id, "duplicate", "a lease with this id exists"))
        elif not is_valid(lease.resources):
            actions.append(Denied(lease.lease_id, "invalid", "amounts must be finite and not negative"))
        elif not fits(add_up([*self._parts(), lease.resources]), self.total):
            actions.append(Denied(lease.lease_id, "lease", f"{lease.resources} is more than is free"))
        else:
            until = now + _finite(life_s, "life_s")
            kept = self._keep(replace(lease, expires_at=until, accepted=False, job_id=None))
            actions.append(Granted(kept))
        return actions

    def renew(self, lease_id: str, caller: str, life_s: float, now: float) -> list[BookAction]:
        """``caller`` renews (first: accepts) its lease for ``life_s`` from now."""
        actions, found = self._expire(now), self._owned(lease_id, caller)
        if isinstance(found, Lease):
            # a renewal never shortens a life: it may have been overtaken by a later one
            until = max(found.expires_at, now + life_s)
            return [*actions, Granted(self._keep(replace(found, expires_at=until, accepted=True)))]
        return [*actions, found]

    def revoke(self, lease_id: str, now: float) -> list[BookAction]:
        """Take back a lease that nobody accepted (its offer was not delivered)."""
        actions, lease = self._expire(now), self._live.get(lease_id)
        # an accepted lease shows that the offer did arrive, whatever the sender thinks
        return actions if lease is None or lease.accepted else [*actions, self._end(lease, "released", now)]

    def handle(self, event: BookEvent, now: float) -> list[BookAction]:
        """What else may happen to leases."""
        actions = self._expire(now)
        match event:
            case Release(lease_id, caller):
                found = self._owned(lease_id, caller)
                actions.append(found if isinstance(found, Denied) else self._end(found, "released", now))
            case Bind():
                actions.append(self._bind(event))
            case Hold(lease_id, hold_s):
                lease = self._live.get(lease_id)
                if lease is None:
                    actions.append(_unknown(lease_id))
                else:
                    actions.append(Granted(self._keep(replace(lease, hold_s=_finite(hold_s, "hold_s")))))
            case Drained(lease_id):
                held = self._draining.pop(lease_id, None)
                lease = self._live.get(lease_id)
                if held is not None:
                    actions.append(Freed(held[0]))
                elif lease is not None:
                    self._keep(replace(lease, hold_s=0.0))
            case Tick():
                pass
        return actions

    def _keep(self, lease: Lease) -> Lease:
        self._live[lease.lease_id] = lease
        return lease

    def _owned(self, lease_id: str, caller: str) -> Lease | Denied:
        lease = self._live.get(lease_id)
        # a foreign lease answers like an unknown one: nobody learns which ids exist
        return lease if lease is not None and lease.scheduler == caller else _unknown(lease_id)

    def _bind(self, event: Bind) -> Granted | Denied:
        lease = self._owned(event.lease_id, event.caller)
        if isinstance(lease, Denied):
            return lease
        if not lease.accepted:
            return Denied(lease.lease_id, "lease", "it was never accepted; renew it first")
        if lease.kind != event.kind:
            return Denied(lease.lease_id, "lease", f"it is for {lease.kind} jobs, not for {event.kind}")
        if event.job_id is None:
            return Granted(lease)
        if lease.job_id not in (None, event.job_id):
            return Denied(lease.lease_id, "lease", f"it is bound to job {lease.job_id}")
        return Granted(self._keep(replace(lease, job_id=event.job_id)))

    def _expire(self, now: float) -> list[BookAction]:
        actions: list[BookAction] = []
        due = [lease for lease in self._live.values() if lease.expires_at <= now]
        for lease in sorted(due, key=lambda lease: (lease.expires_at, lease.lease_id)):
            # the hold counts from the expiry itself, not from when somebody looked
            actions.append(self._end(lease, "expired", lease.expires_at))
        for lease_id, (lease, until) in list(self._draining.items()):
            if until <= now:
                del self._draining[lease_id]
                actions.append(Freed(lease))
        return actions

    def _end(self, lease: Lease, reason: EndReason, at: float) -> LeaseEnded:
        del self._live[lease.lease_id]
        if lease.hold_s > 0:
            self._draining[lease.lease_id] = (lease, at + lease.hold_s)
        return LeaseEnded(lease, reason)


def _unknown(lease_id: str) -> Denied:
    return Denied(lease_id, "lease", f"no lease {lease_id} of yours lives here")


def _finite(seconds: float, name: str) -> float:
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{name} = {seconds} is not a finite duration")
    return seconds

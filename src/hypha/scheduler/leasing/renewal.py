"""The lessee's side of one lease, as a pure machine: :class:`Renewal`.

It says when to renew (after 75 % of the lease's time, earlier by some jitter so that leases gained together
are not renewed together), how to repeat a failed renewal until the lease is over, and when to suspect
that the other side died. Times are seconds of this node's monotonic clock.
"""

from __future__ import annotations

import math
from random import Random
from typing import Literal

from msgspec import Struct

from hypha.backoff import pause_after
from hypha.errors import retry_of
from hypha.journal import Journal
from hypha.rules.leases import Tick

#: of the entries in a journal, before the lease's id
NAME = "renewal"


class Renewed(Struct, frozen=True, tag=True):
    """The lessor answered the attempt: the lease lasts ``expires_in_s`` more."""

    expires_in_s: float


class RenewalFailed(Struct, frozen=True, tag=True):
    """No reply. ``unreachable``: no connection could be made at all. ``gone``: the lessor's machine refuses
    connections, so nobody listens there any more.
    """

    reason: str
    unreachable: bool = False
    gone: bool = False


class RenewalRefused(Struct, frozen=True, tag=True):
    """The lessor refused."""

    code: str
    reason: str


class ConnectionLost(Struct, frozen=True, tag=True):
    """The last connection to the lessor ended: find out at once whether it still runs."""


class CertificateRevoked(Struct, frozen=True, tag=True):
    """The lessor's certificate is refused from now on: whatever it promised is worth nothing."""


class RenewalBegan(Struct, frozen=True, tag=True):
    """What the machine of one lease was made from: its first entry in a journal."""

    expires_in_s: float


RenewalEvent = Renewed | RenewalFailed | RenewalRefused | ConnectionLost | CertificateRevoked | Tick


#: why a lease is over
LapseCause = Literal["expired", "refused", "gone", "revoked"]


class Attempt(Struct, frozen=True, tag=True):
    """Send a renewal now and give it ``timeout_s``."""

    timeout_s: float


class Suspected(Struct, frozen=True, tag=True):
    """The lessor was unreachable repeatedly; the lease itself has not expired."""

    reason: str


class Recovered(Struct, frozen=True, tag=True):
    """A suspected lessor answered again."""


class Lapsed(Struct, frozen=True, tag=True):
    """The lease is over. Reported once; the machine is at its end. ``refused``: the lessor itself ended it.
    ``cause``: its time was up, or that, or the lessor's machine refused connections, or its
    certificate was revoked.
    """

    reason: str
    refused: bool = False
    cause: LapseCause = "expired"


RenewalAction = Attempt | Suspected | Recovered | Lapsed


class Renewal:
    """Keeps one lease alive. The lessor promised ``expires_in_s`` at ``now``, by its offer.

    The first attempt, which accepts the lease, is due at once. The time granted by a reply is
    counted from when its attempt was *sent*: the lessor started counting later, so this side never
    believes in a lease that the other side has ended. ``lease_id`` names it in the journal.
    """

    RENEW_AT = 0.75
    JITTER = 0.1
    FIRST_RETRY_S = 0.2
    LONGEST_RETRY_S = 2.0
    LONGEST_ATTEMPT_S = 10.0
    SHORTEST_ATTEMPT_S = 0.05
    SUSPECT_AFTER = 2
    #: a lessor that has been gone for so long has ended, and its leases with it, whatever they promised
    GONE_FOR_S = 1.0
    #: A worker may promise what it likes; one that falls silent afterwards holds up the job for so long at
    #: most. Longer leases are renewed more often.
    LONGEST_LEASE_S = 120.0

    def __init__(
        self,
        expires_in_s: float,
        now: float,
        random: Random,
        lease_id: str = "",
        journal: Journal | None = None,
    ) -> None:
        self.expires_at = now + min(expires_in_s, self.LONGEST_LEASE_S)
        self.suspected = False
        self._random = random
        self._next_at = now
        self._sent_at: float | None = None
        self._nudged = False
        self._failures = 0
        self._unreachable = 0
        self._gone_since: float | None = None
        self._over = False
        self._why = "never answered"
        self._name = f"{NAME}:{lease_id}"
        self._journal = journal
        self._longest = self.expires_at
        #: what chance gave while the present event was handled
        self._drawn: list[float] = []
        if journal is not None:
            journal.note(self._name, now, RenewalBegan(expires_in_s), (), self._summary())

    @property
    def next_wake(self) -> float:
        """When the next :class:`Tick` is due; an answer may come earlier."""
        if self._over:
            return math.inf
        return self.expires_at if self._sent_at is not None else min(self._next_at, self.expires_at)

    def handle(self, event: RenewalEvent, now: float) -> list[RenewalAction]:
        """Apply ``event`` at ``now``."""
        self._drawn.clear()
        actions = self._apply(event, now)
        if self._journal is not None:
            self._journal.note(self._name, now, event, actions, self._summary(), self._drawn)
            if self._journal.checked:
                self.validate(now)
        return actions

    def validate(self, now: float) -> None:
        """Assert what always holds after an event at ``now``. For tests and simulation."""
        assert self.expires_at >= self._longest, "a lease's time was shortened"
        self._longest = self.expires_at
        assert self._over or self.expires_at > now, "a lease that has expired is believed in"
        assert self._over or self._sent_at is not None or self._next_at > now, "a renewal is overdue"
        assert self._sent_at is None or self._sent_at <= now, "a renewal was sent in the future"
        assert 0 <= self._unreachable <= self._failures, f"{self._unreachable} of {self._failures} failures"
        assert self.suspected or self._unreachable < self.SUSPECT_AFTER, "a dead lessor is not suspected"
        assert self.next_wake <= self.expires_at or self._over, "nobody looks when the lease is over"

    def _summary(self) -> dict[str, object]:
        """Of its state, for the journal."""
        return {
            "expires_at": self.expires_at,
            "suspected": self.suspected,
            "attempting": self._sent_at is not None,
            "over": self._over,
        }

    def _draw(self) -> float:
        self._drawn.append(self._random.random())
        return self._drawn[-1]

    def _apply(self, event: RenewalEvent, now: float) -> list[RenewalAction]:
        if self._over:
            return []
        actions: list[RenewalAction] = []
        match event:
            case Renewed(expires_in_s):
                actions.extend(self._renewed(expires_in_s, now))
            case RenewalFailed(reason, unreachable, gone):
                self._retry(reason, now)
                if not gone:
                    self._gone_since = None
                else:
                    self._gone_since = now if self._gone_since is None else self._gone_since
                    dead_at = self._gone_since + self.GONE_FOR_S
                    if now >= dead_at:
                        return self._lapse(f"nobody is there any more: {reason}", "gone")
                    # pauses grow for one that is out of reach; this one is known to be dead by then
                    self._next_at = min(self._next_at, dead_at)
                self._unreachable = self._unreachable + 1 if unreachable else 0
                if self._unreachable >= self.SUSPECT_AFTER and not self.suspected:
                    self.suspected = True
                    actions.append(Suspected(reason))
            case RenewalRefused(code, reason):
                # the lease is gone, or was never ours: nothing will change that
                if retry_of(code) == "never" or code in ("lease", "role"):
                    return self._lapse(f"refused ({code}): {reason}", "refused")
                self._retry(f"refused ({code}): {reason}", now)
                self._unreachable = 0
                self._gone_since = None
            case ConnectionLost():
                # an attempt under way is what is wanted; if it fails it is repeated without waiting
                # only after a success: where connections open and break again, the pauses still grow
                if self._failures == 0:
                    self._nudged = self._sent_at is not None
                    self._next_at = now
            case CertificateRevoked():
                return self._lapse("its certificate was revoked", "revoked")
            case Tick():
                pass
        if now >= self.expires_at:
            return [*actions, *self._lapse(f"expired; the last renewal: {self._why}")]
        if self._sent_at is None and now >= self._next_at:
            self._sent_at = now
            left = self.expires_at - now
            # a third of what is left: long enough for a slow peer, and lost requests leave time for others
            timeout_s = max(self.SHORTEST_ATTEMPT_S, min(self.LONGEST_ATTEMPT_S, left / 3))
            actions.append(Attempt(timeout_s))
        return actions

    def _renewed(self, expires_in_s: float, now: float) -> list[RenewalAction]:
        sent_at = now if self._sent_at is None else self._sent_at
        self._sent_at = None
        if not (math.isfinite(expires_in_s) and expires_in_s > 0):
            self._retry(f"the reply granted {expires_in_s} s, which is no time", now)
            return []
        self.expires_at = max(self.expires_at, sent_at + min(expires_in_s, self.LONGEST_LEASE_S))
        granted_s = self.expires_at - sent_at
        self._next_at = sent_at + granted_s * self.RENEW_AT * (1 - self.JITTER * self._draw())
        self._failures = self._unreachable = 0
        self._gone_since = None
        self._nudged = False
        self._why = "succeeded"
        if self.suspected:
            self.suspected = False
            return [Recovered()]
        return []

    def _retry(self, reason: str, now: float) -> None:
        sent_at = now if self._sent_at is None else self._sent_at
        self._sent_at = None
        self._why = reason
        pause = pause_after(self._failures, self.FIRST_RETRY_S, self.LONGEST_RETRY_S)
        self._failures += 1
        # the time an attempt took is part of the pause: after one that timed out there is none
        self._next_at = now if self._nudged else max(now, sent_at + pause * (0.5 + 0.5 * self._draw()))
        self._nudged = False

    def _lapse(self, reason: str, cause: LapseCause = "expired") -> list[RenewalAction]:
        self._over = True
        return [Lapsed(reason, cause == "refused", cause)]

"""What goes into the round machine and what comes out of it: plain values, no behaviour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypha.errors import HyphaError
from hypha.messages import Directive, ExecutorClass, JobStamp, LedgerRound, PeerRef, Progress
from hypha.messages import Event as ExecutorEvent
from hypha.scheduler.slices import TrackerState

# --- in -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """An executor was started under a lease; ``batch_size`` matters for training ones."""

    ref: PeerRef
    kind: ExecutorClass
    batch_size: int = 1


@dataclass(frozen=True)
class Lost:
    """The lease of ``kind`` at ``peer`` ended, or the peer is gone."""

    peer: str
    kind: ExecutorClass
    reason: str


@dataclass(frozen=True)
class Unreachable:
    """``peer`` cannot be reached any more; its lease still lives, so it may come back."""

    peer: str
    kind: ExecutorClass


@dataclass(frozen=True)
class Reachable:
    """``peer``, which could not be reached, answered again."""

    peer: str
    kind: ExecutorClass


@dataclass(frozen=True)
class Told:
    """A :class:`hypha.messages.ReportEvent`, deduplicated, from the authenticated ``sender``."""

    sender: str
    kind: ExecutorClass
    incarnation: str
    stamp: JobStamp
    event: ExecutorEvent


@dataclass(frozen=True)
class Reported:
    """Progress from the report stream of the authenticated ``sender``."""

    sender: str
    incarnation: str
    stamp: JobStamp
    progress: Progress


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Input = Joined | Lost | Unreachable | Reachable | Told | Reported | Tick

# --- out ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Send:
    """Steer the executor of ``kind`` at ``to``; repeated until acknowledged or superseded."""

    to: PeerRef
    kind: ExecutorClass
    directive: Directive


@dataclass(frozen=True)
class Drop:
    """Release the lease of ``kind`` at ``peer``, do not take that peer again for a while, replace it."""

    peer: str
    kind: ExecutorClass
    reason: str


@dataclass(frozen=True)
class Again:
    """Start the training executor at ``peer`` again, under the lease it has, after ``pause_s`` or a little
    more; ``instead_of`` is the incarnation that failed.
    """

    peer: str
    reason: str
    pause_s: float
    instead_of: str


@dataclass(frozen=True)
class Record:
    """A round was applied (or more became known of it: replaces the entry of that round and generation).

    ``tracker`` is the slices' state when the next round began, ``steps`` the inner steps taken by then.
    """

    entry: LedgerRound
    tracker: TrackerState | None
    steps: int


@dataclass(frozen=True)
class Checkpointed:
    """``round`` can be started from the files at ``place``."""

    round: int
    place: str


@dataclass(frozen=True)
class Restart:
    """The parameter server is gone: begin a new generation from the last checkpoint; from the one before
    that when it said that the last is ``unusable``.
    """

    reason: str
    unusable: bool = False


@dataclass(frozen=True)
class Publish:
    """All ``files`` of the trained model are here."""

    files: tuple[str, ...]


@dataclass(frozen=True)
class Fail:
    """The job cannot go on."""

    error: HyphaError


@dataclass(frozen=True)
class Keep:
    """Who trains on which slice is to be durable; ``kept`` is set then. Not the machine's own: it stands in
    line with what the machine has asked for.
    """

    generation: int
    tracker: TrackerState
    kept: Callable[[], None]


Action = Send | Keep | Drop | Again | Record | Checkpointed | Restart | Publish | Fail

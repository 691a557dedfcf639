"""What goes into the round machine and what comes out of it: plain values, no behaviour."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from hypha.errors import HyphaError
from hypha.messages import Directive, ExecutorClass, JobStamp, LedgerRound, PeerRef, Progress
from hypha.messages import Event as ExecutorEvent
from hypha.scheduler.rules import Rules, Start
from hypha.scheduler.slices import TrackerState

# --- in -----------------------------------------------------------------------------------------------


class Joined(Struct, frozen=True, tag=True):
    """An executor was started under a lease; ``batch_size`` matters for training ones."""

    ref: PeerRef
    kind: ExecutorClass
    batch_size: int = 1


class Lost(Struct, frozen=True, tag=True):
    """The lease of ``kind`` at ``peer`` ended, or the peer is gone."""

    peer: str
    kind: ExecutorClass
    reason: str


class Unreachable(Struct, frozen=True, tag=True):
    """``peer`` cannot be reached any more; its lease still lives, so it may come back."""

    peer: str
    kind: ExecutorClass


class Reachable(Struct, frozen=True, tag=True):
    """``peer``, which could not be reached, answered again."""

    peer: str
    kind: ExecutorClass


class Told(Struct, frozen=True, tag=True):
    """A :class:`hypha.messages.ReportEvent`, deduplicated, from the authenticated ``sender``."""

    sender: str
    kind: ExecutorClass
    incarnation: str
    stamp: JobStamp
    event: ExecutorEvent


class Reported(Struct, frozen=True, tag=True):
    """Progress from the report stream of the authenticated ``sender``."""

    sender: str
    incarnation: str
    stamp: JobStamp
    progress: Progress


class Tick(Struct, frozen=True, tag=True):
    """Time has passed."""


class LifeBegan(Struct, frozen=True, tag=True):
    """What the machine of one life was made from: its first entry in a journal."""

    rules: Rules
    start: Start
    tracker: TrackerState
    scheduler: PeerRef


Input = Joined | Lost | Unreachable | Reachable | Told | Reported | Tick

# --- out ----------------------------------------------------------------------------------------------


class Send(Struct, frozen=True, tag=True):
    """Steer the executor of ``kind`` at ``to``; repeated until acknowledged or superseded."""

    to: PeerRef
    kind: ExecutorClass
    directive: Directive


class Drop(Struct, frozen=True, tag=True):
    """Release the lease of ``kind`` at ``peer``, do not take that peer again for a while, replace it."""

    peer: str
    kind: ExecutorClass
    reason: str


class Again(Struct, frozen=True, tag=True):
    """Start the training executor at ``peer`` again, under the lease it has, after ``pause_s`` or a little
    more; ``instead_of`` is the incarnation that failed.
    """

    peer: str
    reason: str
    pause_s: float
    instead_of: str


class Record(Struct, frozen=True, tag=True):
    """A round was applied (or more became known of it: replaces the entry of that round and generation).

    ``tracker`` is the slices' state when the next round began, ``steps`` the inner steps taken by then.
    """

    entry: LedgerRound
    tracker: TrackerState | None
    steps: int


class Checkpointed(Struct, frozen=True, tag=True):
    """``round`` can be started from the files at ``place``."""

    round: int
    place: str


class Restart(Struct, frozen=True, tag=True):
    """The parameter server is gone: begin a new generation from the last checkpoint; from the one before
    that when it said that the last is ``unusable``.
    """

    reason: str
    unusable: bool = False


class Publish(Struct, frozen=True, tag=True):
    """All ``files`` of the trained model are here."""

    files: tuple[str, ...]


class Fail(Struct, frozen=True, tag=True):
    """The job cannot go on."""

    error: HyphaError


class Keep(Struct, frozen=True, tag=True):
    """Who trains on which slice is to be durable; ``kept`` is set then. Not the machine's own: it stands in
    line with what the machine has asked for.
    """

    generation: int
    tracker: TrackerState
    kept: Callable[[], None]


Action = Send | Keep | Drop | Again | Record | Checkpointed | Restart | Publish | Fail

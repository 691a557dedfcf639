"""What goes into the round machine and what comes out of it: plain values, no behaviour."""

from __future__ import annotations

from msgspec import Struct

from hypha.errors import HyphaError
from hypha.messages import Directive, ExecutorClass, JobStamp, LedgerRound, NextSlice, PeerRef, Progress
from hypha.messages import Event as ExecutorEvent
from hypha.scheduler.data.slices import Assignment, TrackerState
from hypha.scheduler.rounds.policy import CarriedOver, Rules, Start


class Joined(Struct, frozen=True, tag=True):
    """An executor was started under a lease; ``batch_size`` matters for training ones."""

    ref: PeerRef
    kind: ExecutorClass
    batch_size: int = 1


class _OfExecutor(Struct, frozen=True):
    """About the executor of ``kind`` at ``peer``."""

    peer: str
    kind: ExecutorClass


class ParticipantLost(_OfExecutor, frozen=True, tag="Lost"):
    """The lease of ``kind`` at ``peer`` ended, or the peer is gone."""

    reason: str


class GoesOn(_OfExecutor, frozen=True, tag=True):
    """The executor of ``kind`` at ``peer``, started in an earlier generation, has been told of this one. A
    training executor that has its model reports that at the end of its batch.
    """


class Unreachable(_OfExecutor, frozen=True, tag=True):
    """``peer`` cannot be reached any more; its lease still lives, so it may come back."""


class Reachable(_OfExecutor, frozen=True, tag=True):
    """``peer``, which could not be reached, answered again."""


class ParticipantLeaves(_OfExecutor, frozen=True, tag="Leaves"):
    """The worker ``peer`` ends in ``left_s`` seconds, and its executor of ``kind`` with it; told again."""

    left_s: float


class Told(Struct, frozen=True, tag=True):
    """A :class:`hypha.messages.ReportEvent`, deduplicated, from the authenticated ``sender``."""

    sender: str
    kind: ExecutorClass
    incarnation: str
    stamp: JobStamp
    event: ExecutorEvent


#: What one sender may report of rounds that are not open yet: a parameter server names each worker, in two of
#: them when a scheduler takes over.
_MOST_EARLY = 2048


def with_early(early: list[Told], told: Told) -> list[Told]:
    """``early``, what was said of rounds that are not open yet, with ``told``: in the place of an earlier one
    that said the like, so that whoever repeats it without end takes no more room.
    """
    said = _said(told)
    if any(_said(one) == said for one in early):
        return [told if _said(one) == said else one for one in early]
    if sum(one.sender == told.sender for one in early) >= _MOST_EARLY:
        return early
    return [*early, told]


def _said(told: Told) -> tuple[object, ...]:
    event = told.event
    return (told.sender, told.kind, type(event), getattr(event, "round", 0), getattr(event, "worker", ""))


class Reported(Struct, frozen=True, tag=True):
    """Progress from the report stream of the authenticated ``sender``."""

    sender: str
    incarnation: str
    stamp: JobStamp
    progress: Progress


class TimePassed(Struct, frozen=True, tag="Tick"):
    """Time has passed."""


class JobRefused(_OfExecutor, frozen=True, tag=True):
    """The worker ``peer`` will not run the executor of ``kind`` that it was sent."""

    reason: str


class LeasesHeld(Struct, frozen=True, tag=True):
    """How many leases of each kind are held now, and in words what is ``missing``."""

    train: int
    aggregate: int
    missing: str


class DataServed(Struct, frozen=True, tag=True):
    """Whether any data node serves the dataset; while none does, no deadline runs."""

    served: bool


class SliceAsked(Struct, frozen=True, tag=True):
    """The authenticated ``caller``, which holds a lease, asks for its next slice; answered by one
    :class:`AnswerSlice`.
    """

    caller: str
    request: NextSlice


class Disregarded(Struct, frozen=True, tag=True):
    """Something was received that has no place in this generation of the job: it is counted as ``what``."""

    what: str


class GenerationBegan(Struct, frozen=True, tag="LifeBegan"):
    """What the machine of one generation was made from: its first entry in a journal."""

    rules: Rules
    start: Start
    tracker: TrackerState
    scheduler: PeerRef
    carried: CarriedOver


Input = (
    Joined
    | ParticipantLost
    | GoesOn
    | Unreachable
    | Reachable
    | ParticipantLeaves
    | Told
    | Reported
    | TimePassed
    | JobRefused
    | LeasesHeld
    | DataServed
    | SliceAsked
    | Disregarded
)


class Send(Struct, frozen=True, tag=True):
    """Steer the executor of ``kind`` at ``to``; repeated until acknowledged or superseded."""

    to: PeerRef
    kind: ExecutorClass
    directive: Directive


class Drop(_OfExecutor, frozen=True, tag=True):
    """Release the lease of ``kind`` at ``peer``, do not take that peer again for a while, replace it."""

    reason: str


class LetGo(_OfExecutor, frozen=True, tag=True):
    """Release the lease of ``kind`` at ``peer``, which ends soon and has nothing more to contribute. That is
    no fault of its worker.
    """

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
    """A round was applied. ``tracker`` is the slices' state when the next round began, ``steps`` the inner
    steps taken by then.
    """

    entry: LedgerRound
    tracker: TrackerState
    steps: int


class Checkpointed(Struct, frozen=True, tag=True):
    """``round`` can be started from the files at ``place``."""

    round: int
    place: str


class Restart(Struct, frozen=True, tag=True):
    """The parameter server is gone, and this generation with it: begin a new generation from the last
    checkpoint; from the one before that when it said that the last is ``unusable``. The machine is at its
    end.
    """

    reason: str
    unusable: bool = False
    carried: CarriedOver = CarriedOver()


class Publish(Struct, frozen=True, tag=True):
    """All ``files`` of the trained model are here."""

    files: tuple[str, ...]


class Fail(Struct, frozen=True, tag=True):
    """The job cannot go on."""

    error: HyphaError


class FirstTheta(Struct, frozen=True, tag=True):
    """The hash of theta of round 0, as the parameter server reported it; once in a generation."""

    theta: str


class KeepSlices(Struct, frozen=True, tag=True):
    """Make durable who trains on which slice."""

    tracker: TrackerState


class AnswerSlice(Struct, frozen=True, tag=True):
    """Answer with the slice, once all that was decided before is carried out, or with the ``reason`` why
    there is none.
    """

    slice: Assignment | None = None
    #: all workers together are to hold half an epoch ahead at most: this one so many slices
    ahead: int = 1
    reason: str = ""


Action = (
    Send
    | Drop
    | LetGo
    | Again
    | Record
    | FirstTheta
    | KeepSlices
    | AnswerSlice
    | Checkpointed
    | Restart
    | Publish
    | Fail
)

#: what belongs into the ledger, whatever becomes of the job
Durable = Record | FirstTheta | KeepSlices | Checkpointed

"""Directives: from a scheduler to an executor, through its worker."""

from __future__ import annotations

from hypha.messages.values import ExecutorClass, JobStamp, Message, PeerRef


class Plan(Message):
    """For a training executor: in ``round``, synchronise after ``batches`` batches counted from the
    round's start (already passed: at once). ``None``: go on, the sync point is not known yet.
    """

    round: int
    batches: int | None = None


class Rejoin(Message):
    """The job goes on in another generation, ``generation``, after its parameter server or its scheduler was
    lost. Everybody reports again what it holds: a training executor ``Loaded`` and ``RoundStarted``; a
    parameter server the last ``RoundApplied``, ``ModelReady``, and each ``UpdateReceived`` of both rounds.

    For a training executor, ``parameter_server`` is where it is now; with ``resend`` it is a new one, which
    needs the open round's update. With ``start_over`` rounds were lost: what is held of them (theta, slices,
    the optimizer's state) is dropped, and theta of ``round`` comes; ``steps`` inner steps were taken before.
    """

    generation: int
    round: int
    steps: int = 0
    parameter_server: PeerRef | None = None
    resend: bool = False
    start_over: bool = False


class Members(Message):
    """For a parameter server: the workers whose updates count, complete each time.

    ``most_samples`` says for how many samples their updates of ``round`` may stand at most: a larger one is
    refused, and one of a worker that is not named in it waits for the next of these messages. Without
    ``round`` nothing is said about that. ``batch_sizes`` are those that the workers were told,
    ``most_batch_size`` what they may grow to (None: they do not grow, or an earlier version does not say).
    """

    peers: tuple[PeerRef, ...]
    round: int | None = None
    most_samples: dict[str, int] = {}
    batch_sizes: dict[str, int] = {}
    most_batch_size: int | None = None


class SendModel(Message):
    """For a parameter server: send theta of the current round to ``to`` (a joiner, or one left out).

    ``attempt`` counts how often ``to`` has to begin this round anew, because its update was refused: theta of
    a higher attempt is no repetition, even though it is the same.
    """

    to: PeerRef
    attempt: int = 0


class CloseRound(Message):
    """For a parameter server: apply the outer step of ``round`` to what was received (from anybody
    else it is refused as stale from now on), then send the new theta to all members.
    """

    round: int
    final: bool = False
    checkpoint: bool = False


class SaveCheckpoint(Message):
    """For a parameter server: save a checkpoint of the open round as it began (``round``, or a later one that
    it is in by now), unless that is done or under way.
    """

    round: int


class Export(Message):
    """For a parameter server: write the model as users load it and send its files to ``to``."""

    to: PeerRef


class Finish(Message):
    """The job is over (or stops): end cleanly with exit code 0."""

    reason: str = "done"


Directive = Plan | Rejoin | Members | SendModel | CloseRound | SaveCheckpoint | Export | Finish


class Steer(Message):
    """A directive for the executor of ``kind`` of a job; ``seq`` grows, an older one is ignored."""

    stamp: JobStamp
    kind: ExecutorClass
    seq: int
    directive: Directive

"""Events from an executor, or its worker, to the scheduler, and directives the other way."""

from __future__ import annotations

from hypha.messages.values import ExecutorClass, Id, JobStamp, Message, PeerRef, Value

#: An executor's event, as JSON. It goes to the scheduler in one request, beside its envelope, which also has
#: to take what the contributions of a thousand workers to one round take.
MAX_EVENT_BYTES = 512 << 10

#: What one update may say of what it stands for, as JSON: some five hundred slices.
MAX_CONTRIBUTION_BYTES = 32 << 10


class SliceRange(Value):
    """Rows ``start:stop`` of a slice in this epoch's order (shuffled by seed, epoch and slice)."""

    epoch: int
    slice: int
    start: int
    stop: int


class Contribution(Value):
    """What one update stands for: enough to compute it again (``hypha.executor.replay``).

    ``incarnation`` names the executor process (its optimizer state lives and dies with it);
    ``steps`` is its inner step count before this round's first step, ``finished`` the
    (epoch, slice) pairs whose last row is in here. ``restarts`` counts how often the process has begun
    a fresh optimizer, because a round went on without steps that it had taken. ``threads`` is what
    torch computed with: sums come out otherwise with another number, and Adam makes much of that.
    """

    round: int
    worker: str
    incarnation: Id
    samples: int
    batches: int
    batch_size: int
    steps: int
    ranges: tuple[SliceRange, ...]
    finished: tuple[tuple[int, int], ...] = ()
    loss: float = 0.0
    restarts: int = 0
    threads: int = 1
    #: of the round, as in :class:`SendModel`
    attempt: int = 0


class UpdateStatistics(Value):
    """What a parameter server measured of one update: its L2 norm, its cosine to the weighted mean of all
    updates of the round (estimated, see :mod:`hypha.executor.outer.agreement`; None where there is none, as
    of zeros), the size of its file, and what it was multiplied by before it was added, as it was larger than
    it may be (None: this version does not say). ``buffer_clips`` are the same for buffers that it moved too
    far.
    """

    worker: str
    norm: float = 0.0
    cosine: float | None = None
    size_bytes: int = 0
    clip: float | None = None
    buffer_clips: dict[str, float] | None = None


class Alive(Message):
    """Said by the executor to its worker, which keeps it to itself: the thread that does the work goes on,
    or has nothing to do (it waits for theta, a plan, data, updates). Every other event says so too. Who has
    said it once is to give a sign of life every second or so; silent for ``hang_s``, it is killed.
    """


class Loaded(Message):
    """A training executor has built its model and waits for theta."""

    incarnation: Id


class RoundStarted(Message):
    """A training executor runs on theta of ``round``, whose hash is ``theta``. ``batch_size``: how many rows
    its batches have in it, where they may grow (None: as many as its job says).
    """

    round: int
    theta: str
    attempt: int = 0
    batch_size: int | None = None


class Progress(Message):
    """Counts since the round's start. ``busy_s`` is time spent in batches, ``loss`` the latest mean
    over the batches since the previous report.
    """

    round: int
    batches: int
    samples: int
    busy_s: float
    loss: float
    learning_rate: float = 0.0
    attempt: int = 0


class UpdateSent(Message):
    """The update of a round is with the parameter server (acknowledged). Schedulers of earlier versions wait
    for it; those of this one learn of updates from the parameter server alone, and pass over it.
    """

    contribution: Contribution


class ModelReady(Message):
    """A parameter server holds theta of ``round``; it takes updates from now on. ``notes`` are lines for the
    user: what was chosen when the model was built (a fresh head, weights that are not used, no weights at
    all).
    """

    round: int
    theta: str
    parameters: int
    size_bytes: int
    notes: tuple[str, ...] = ()


class UpdateReceived(Message):
    """A parameter server accepted the update of ``worker`` for ``round``. ``contribution`` is what the file's
    header states, checked: all that the scheduler learns of the update, even if its worker is gone.
    """

    round: int
    worker: str
    samples: int
    contribution: Contribution | None = None


class UpdateRefused(Message):
    """A parameter server refused an update; ``code`` as in ``errors.REFUSALS``."""

    round: int
    worker: str
    code: str
    reason: str


class RoundApplied(Message):
    """The outer step of ``round`` is done; ``theta`` is the hash of theta of ``round + 1``.
    ``contributors`` in the order in which their updates were added, each after its ``UpdateReceived``;
    ``updates`` is what was measured of each. ``contributions``: only parameter servers of earlier versions,
    which do not report ``UpdateReceived`` again after a ``Rejoin``.
    """

    round: int
    theta: str
    contributors: tuple[str, ...]
    contributions: tuple[Contribution, ...] = ()
    update_norm: float = 0.0
    checkpoint: bool = False
    updates: tuple[UpdateStatistics, ...] = ()


class CheckpointSaved(Message):
    """A checkpoint from which ``round`` can be started is durable at ``place``."""

    round: int
    place: str


class Exported(Message):
    """All files of the trained model are with the scheduler, which acknowledged them."""

    round: int
    files: tuple[str, ...]


class ExecutorError(Message):
    """An executor cannot go on, and says why before it exits. ``kind``: ``model``, ``batch`` (model and data
    do not go together; the first line of ``message`` says what to change), ``data``, ``oom``, ``not-finite``,
    ``checkpoint`` (the one it was to restore is not there, or damaged), ``disk`` (it is full), ``internal``.
    """

    kind: str
    message: str


class ExecutorExited(Message):
    """Said by the worker, never the executor: the process ended. ``tail`` is its last output."""

    exit_code: int
    tail: str
    incarnation: Id = ""


Event = (
    Alive
    | Loaded
    | RoundStarted
    | Progress
    | UpdateSent
    | ModelReady
    | UpdateReceived
    | UpdateRefused
    | RoundApplied
    | CheckpointSaved
    | Exported
    | ExecutorError
    | ExecutorExited
)


class ReportEvent(Message):
    """An event that must arrive (everything but ``Progress``), repeated until acknowledged.
    ``seq`` counts per job, kind and incarnation: the scheduler handles each once.
    """

    stamp: JobStamp
    kind: ExecutorClass
    incarnation: Id
    seq: int
    event: Event


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


def slot_of(directive: Directive) -> tuple[str, str]:
    """A newer directive replaces that of its slot. Each joiner needs theta, so ``SendModel`` counts by
    receiver.
    """
    return (type(directive).__name__, directive.to.peer if isinstance(directive, SendModel) else "")


class Steer(Message):
    """A directive for the executor of ``kind`` of a job; ``seq`` grows, an older one is ignored."""

    stamp: JobStamp
    kind: ExecutorClass
    seq: int
    directive: Directive

"""Which updates a parameter server adds to its sum: of this job and round, of members, of no more samples
than the scheduler says that their workers can have trained on, and of rows that there are. A sum cannot be
taken back, so each is judged before it is added; one about which the scheduler has not said anything yet
waits until it has. Pure.
"""

from __future__ import annotations

from hypha.contributions import contribution_problem
from hypha.errors import Refused
from hypha.messages import AggregateJob, Contribution, Members, ReceivedFile


def admit(file: ReceivedFile, job: AggregateJob, round_: int, members: Members | None) -> bool:
    """Whether the update in ``file`` is to be added to the sum of ``round_`` now; False: it waits for the
    next ``members``. Raises :class:`Refused` for what is of another job, generation or round, from a
    stranger, or of too many samples.
    """
    if members is None:
        return False
    stamp, worker, samples = file.meta.stamp, file.from_peer, file.meta.samples
    if stamp is None or stamp.job_id != job.job_id:
        raise Refused("uninvited", "the update is of another job", worker)
    if stamp.generation < job.generation:
        raise Refused("stale", f"the update is of generation {stamp.generation} of the job", worker)
    if stamp.round != round_:
        raise Refused("stale", f"round {round_} is open, not {stamp.round}", worker)
    if all(ref.peer != worker for ref in members.peers):
        raise Refused("uninvited", "the worker takes no part in the job", worker)
    if members.round is None:
        # a scheduler of an earlier version says nothing about samples
        return True
    most = members.most_samples.get(worker) if members.round == round_ else None
    if most is None:
        return False
    if samples > most:
        raise Refused(
            "invalid",
            f"it is to stand for {samples} samples, and its worker was given {most} at most",
            worker,
        )
    return True


def check_contribution(
    worker: str, contribution: Contribution | None, job: AggregateJob, members: Members | None
) -> None:
    """Raises :class:`Refused` for an update that does not say what it stands for, or says what cannot be, so
    that what is added to the sum is in the ledger, and is replayed. ``contribution`` is what its file says. A
    scheduler of an earlier version does not say which rows there are: then nothing is asked.
    """
    if not job.slice_rows:
        return
    if contribution is None:
        raise Refused("invalid", "its file does not say what it stands for, as its transfer does", worker)
    told = None if members is None else members.batch_sizes.get(worker)
    size = contribution.batch_size if told is None else told
    problem = contribution_problem(contribution, size, job.slice_rows)
    rows = sum(span.stop - span.start for span in contribution.ranges)
    if not problem and rows != contribution.samples:
        # which of them it has trained on, nobody could tell
        problem = f"it names {rows} rows for {contribution.samples} samples"
    if problem:
        raise Refused("invalid", f"it cannot be what it says: {problem}", worker)

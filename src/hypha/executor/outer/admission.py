"""Which updates a parameter server adds to its sum: of this job and round, of members, of no more samples
than the scheduler says that their workers can have trained on, and of rows that there are. A sum cannot be
taken back, so each is checked before it is added; one about which the scheduler has not said anything yet
waits until it has. Pure.
"""

from __future__ import annotations

from hypha.errors import Refused
from hypha.messages import AggregateJob, Contribution, Members, ReceivedFile
from hypha.rules.contributions import contribution_problem


def admit(file: ReceivedFile, job: AggregateJob, round_: int, members: Members | None) -> bool:
    """Whether the update in ``file`` is to be judged now; False: it waits for the next ``members``. Raises
    :class:`Refused` for what is of another job, generation or round, or from a stranger.
    """
    if members is None:
        return False
    stamp, worker = file.meta.stamp, file.from_peer
    if stamp is None or stamp.job_id != job.job_id:
        raise Refused("uninvited", "the update is of another job", worker)
    if stamp.generation < job.generation:
        raise Refused("stale", f"the update is of generation {stamp.generation} of the job", worker)
    if stamp.round != round_:
        raise Refused("stale", f"round {round_} is open, not {stamp.round}", worker)
    if all(ref.peer != worker for ref in members.peers):
        raise Refused("uninvited", "the worker takes no part in the job", worker)
    # a scheduler of an earlier version says nothing about samples
    return members.round is None or (members.round == round_ and worker in members.most_samples)


def check_contribution(
    file: ReceivedFile, contribution: Contribution, job: AggregateJob, members: Members | None
) -> None:
    """Raises :class:`Refused` for an update, admitted as ``file``, whose header states a ``contribution``
    that cannot be, so that what is added to the sum is in the ledger, and is replayed. A scheduler of an
    earlier version does not say which rows there are: then these are not checked.
    """
    worker, stamp = file.from_peer, file.meta.stamp
    told, most, grown = None, None, None
    if members is not None:
        told, most = members.batch_sizes.get(worker), members.most_samples.get(worker)
        grown = members.most_batch_size
    problem = contribution_problem(contribution, told, job.slice_rows, grown)
    if contribution.worker != worker or (stamp is not None and contribution.round != stamp.round):
        problem = f"it is of round {contribution.round} of {contribution.worker}"
    elif most is not None and contribution.samples > most:
        problem = f"{contribution.samples} samples, and its worker was given {most} at most"
    if problem:
        raise Refused("invalid", f"it cannot be what it states: {problem}", worker)

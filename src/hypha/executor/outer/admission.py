"""Which updates a parameter server adds to its sum: of this job and round, of members, of no more samples
than the scheduler says that their workers can have trained on, and of rows that there are. A sum cannot be
taken back, so each is checked before it is added; one about which the scheduler has not said anything yet
waits until it has. Pure.

How large an update may be is judged beside those of recent rounds: a huge one is scaled down, not believed.
The limit is the job's ``max_update_norm`` where it states one. Else it is ``max_update_ratio`` times the
median of the norms of the updates of the last rounds, as they were sent; what is larger is scaled down to
that median, so that it moves theta as far as another, and not further. Updates are added to the sum as they
come, so the median of their own round is not known then. That of the rounds before it is, and norms change
little from one round to the next: by less than half even at the end of a warm-up. A parameter server that has
seen no round yet keeps the first updates aside until the round is closed, or so many are there, and takes the
median of those: the lower one of an even number, so that of two the smaller counts. By how much an update was
scaled is in the ledger (``UpdateStatistics.clip``), and a replay does the same.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

from hypha.errors import Refused
from hypha.messages import AggregateJob, Contribution, Members, ReceivedFile
from hypha.rules.contributions import contribution_problem

#: rounds whose norms are remembered
ROUNDS = 4
#: updates of a first round that are kept aside: their files take room on the disk
MOST_ASIDE = 16


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


class NormLimit:
    """Of one parameter server, round after round."""

    def __init__(self, job: AggregateJob) -> None:
        self._most = job.max_update_norm
        self._ratio = job.max_update_ratio
        self._rounds: deque[tuple[float, ...]] = deque(maxlen=ROUNDS)

    @property
    def is_known(self) -> bool:
        """:meth:`clip` can tell now; else norms have to be seen first."""
        return self._most is not None or self._ratio is None or bool(self._rounds)

    def saw(self, norms: Iterable[float]) -> None:
        """The norms of a round's updates, as they were sent."""
        if found := tuple(norm for norm in norms if norm > 0.0):
            self._rounds.append(found)

    def clip(self, norm: float) -> float:
        """What an update of that norm is multiplied by."""
        if self._most is not None:
            return min(1.0, self._most / max(norm, 1e-30))
        if self._ratio is None or not self._rounds or norm <= self._ratio * self.median():
            return 1.0
        return self.median() / norm

    def median(self) -> float:
        """Of the rounds that are remembered; 0.0 where there is none."""
        known = [norm for norms in self._rounds for norm in norms]
        return statistics.median_low(known) if known else 0.0

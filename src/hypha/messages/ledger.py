"""The ledger: what a job did, enough to do it again (``ledger.json``, JSON)."""

from __future__ import annotations

from hypha.messages.data import Manifest
from hypha.messages.events import Contribution, UpdateStatistics
from hypha.messages.jobs import AggregateJob, TrainJob
from hypha.messages.values import Value


class LedgerRound(Value):
    """One outer step. ``theta`` is the hash of theta of ``round + 1``, that is, after this step (as in
    :class:`RoundApplied`). ``contributors`` are in the mean; ``left_out``, which only earlier versions wrote,
    trained but are not. ``generation`` is the job's generation; after a restore from a checkpoint rounds
    occur again under a higher one, and the earlier ones are ``discarded``.
    """

    round: int
    theta: str
    contributors: tuple[Contribution, ...]
    left_out: tuple[Contribution, ...] = ()
    generation: int = 0
    discarded: bool = False
    samples: int = 0
    loss: float = 0.0
    update_norm: float = 0.0
    #: from theta_r at the parameter server to its being applied
    duration_s: float = 0.0
    #: what was measured of each contributor's update; earlier versions kept nothing of it
    updates: tuple[UpdateStatistics, ...] = ()


class LedgerFile(Value):
    """``ledger.json``. ``job`` and ``aggregate`` are the descriptions as dispatched, without tokens;
    their ``me`` is empty and ``job.batch_size`` 0, as these differ by worker (see each Contribution).
    ``theta`` is the hash of theta of round 0; ``rounds`` are in the order in which they happened.
    """

    job: TrainJob
    aggregate: AggregateJob
    manifest: Manifest
    manifest_hash: str
    theta: str
    rounds: tuple[LedgerRound, ...]
    version: int = 1

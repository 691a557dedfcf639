"""What the job's configuration says about rounds, and what outlives one generation of a job."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct

from hypha.config.job import JobConfig
from hypha.messages import JobStamp, OuterOptimizer


@dataclass(frozen=True)
class Rules:
    """``samples`` is the target of a round over all workers, ``inner_steps`` (if set) each worker's
    number of optimizer steps instead; plans are multiples of ``multiple`` batches (gradient accumulation).
    """

    rounds: int
    samples: int
    inner_steps: int | None = None
    multiple: int = 1
    #: how many samples a worker may let its batches grow to; None: they stay as they are
    most_batch_size: int | None = None
    quorum: float = 1.0
    grace_s: float = 10.0
    deadline_s: float = 60.0
    min_workers: int = 2
    #: a generation begins with ``min_workers``, ``start_grace_s`` after they are here, or with ``workers`` at
    #: once
    workers: int = 1
    start_grace_s: float = 0.0
    checkpoint_every: int = 10
    max_failures: int = 5
    executor_restarts: int = 2
    #: who has not loaded the model after so long, while others have, is replaced
    load_s: float | None = None
    #: the job ends when it has had fewer than ``min_workers`` leases, or no parameter server, for so long
    wait_s: float | None = None

    @classmethod
    def from_config(cls, job: JobConfig) -> Rules:
        """The rules of ``job``; without any target a round is 100 full batches a worker."""
        rounds, pool = job.rounds, job.resources
        batch = (rounds.batch_size or rounds.max_batch_size) * rounds.gradient_accumulation
        return cls(
            rounds=rounds.update_rounds,
            samples=rounds.avg_samples_between_updates or 100 * batch * pool.num_workers,
            inner_steps=rounds.inner_steps,
            multiple=rounds.gradient_accumulation,
            most_batch_size=rounds.max_batch_size if rounds.grow_batch_size else None,
            quorum=rounds.quorum,
            grace_s=rounds.grace_s,
            deadline_s=rounds.deadline_s,
            min_workers=min(pool.min_workers or pool.num_workers, pool.num_workers),
            workers=pool.num_workers,
            start_grace_s=pool.start_grace_s,
            checkpoint_every=job.checkpoint.every_rounds,
            # a worker that was good for nothing, and another one, are no reason to end the job
            max_failures=5 + pool.executor_restarts,
            executor_restarts=pool.executor_restarts,
            load_s=pool.load_s,
            wait_s=pool.wait_s,
        )


@dataclass(frozen=True)
class Start:
    """Where a generation of the job begins: ``steps`` inner steps were taken before; ``theta`` is the hash of
    what is to be restored, empty when nothing is. ``taken_over``: the parameter server is that of the
    generation before, and may have closed ``round`` already. ``optimizer`` is what the job began with, for
    good; ``None`` in journals of before there was a choice.
    """

    job_id: str
    generation: int = 0
    round: int = 0
    steps: int = 0
    theta: str = ""
    taken_over: bool = False
    optimizer: OuterOptimizer | None = None

    @property
    def stamp(self) -> JobStamp:
        return JobStamp(job_id=self.job_id, generation=self.generation)


class CarriedOver(Struct, frozen=True):
    """What one generation of a job hands on to the next: its executors' failures since the last applied
    round, since when there have been too few leases, and whose executors had their model.
    """

    in_a_row: int = 0
    not_finite: tuple[tuple[str, int], ...] = ()
    restarts: tuple[tuple[str, int], ...] = ()
    short_since: float | None = None
    had_model: tuple[str, ...] = ()
    alike: tuple[tuple[str, str, int], ...] = ()

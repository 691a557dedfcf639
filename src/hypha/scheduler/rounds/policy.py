"""What the job's configuration says about rounds, and what outlives one generation of a job."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from msgspec import Struct

from hypha.config.job import JobConfig
from hypha.errors import ExecutorFailed, HyphaError, JobFailed, ModelError, NotFinite
from hypha.messages import ExecutorClass, OuterOptimizer

#: losses that were not finite, of several workers or of one, after which a job is given up
_DIVERGED, _DIVERGED_ALONE = 3, 5


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


class CarriedOver(Struct, frozen=True):
    """What one generation of a job hands on to the next: its executors' failures since the last applied
    round, as in :class:`Failures`, since when there have been too few leases, and whose executors had their
    model.
    """

    in_a_row: int = 0
    model: tuple[tuple[str, ExecutorClass, str], ...] = ()
    not_finite: tuple[tuple[str, int], ...] = ()
    restarts: tuple[tuple[str, int], ...] = ()
    short_since: float | None = None
    had_model: tuple[str, ...] = ()
    alike: tuple[tuple[str, str, int], ...] = ()


@dataclass
class Failures:
    """Failures of executors since the last applied round; ``limit`` of them end the job. The round machine of
    one generation owns them; those of the next generation are made from what it hands on.
    """

    limit: int = 5
    in_a_row: int = 0
    model: dict[tuple[str, ExecutorClass], str] = field(default_factory=dict)
    #: workers whose loss, or update, was not finite, each as often
    not_finite: Counter[str] = field(default_factory=Counter)
    #: how often a worker's executor was started again since a round that holds its update
    restarts: Counter[str] = field(default_factory=Counter)
    #: what any executor would say again -> the workers whose executors have said it, each as often
    alike: dict[str, Counter[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, carried: CarriedOver, limit: int) -> Failures:
        """Those that an earlier generation has handed on."""
        model = {(peer, kind): message for peer, kind, message in carried.model}
        alike: dict[str, Counter[str]] = {}
        for what, peer, times in carried.alike:
            alike.setdefault(what, Counter())[peer] = times
        not_finite, restarts = Counter(dict(carried.not_finite)), Counter(dict(carried.restarts))
        return cls(limit, carried.in_a_row, model, not_finite, restarts, alike)

    def hand_on(self, short_since: float | None, had_model: Iterable[str] = ()) -> CarriedOver:
        """For the next generation."""
        return CarriedOver(
            in_a_row=self.in_a_row,
            model=tuple((peer, kind, message) for (peer, kind), message in self.model.items()),
            not_finite=tuple(self.not_finite.items()),
            restarts=tuple(self.restarts.items()),
            short_since=short_since,
            had_model=tuple(sorted(had_model)),
            alike=tuple((what, *entry) for what, said in self.alike.items() for entry in said.items()),
        )

    def applied(self, contributors: Iterable[str]) -> None:
        """A round was applied: what failed before was overcome, and those did their part."""
        self.in_a_row = 0
        self.model.clear()
        self.alike.clear()
        self.not_finite.clear()
        for peer in contributors:
            self.restarts.pop(peer, None)

    def add(
        self, peer: str, kind: ExecutorClass, message: str, cause: str, others: Collection[str] = ()
    ) -> HyphaError | None:
        """Count one; the error with which the job ends if that was too much. ``others`` are the further
        workers that are in the job now.

        That the model is wrong, or that model and data do not go together, is believed when more workers say
        the same than others are there that do not: two of three, but not two of four, which may be liars
        beside a job that goes well. Where nobody else is there, two failures of one worker are enough. That
        training diverges is believed after the third time when two workers did, as one may have broken
        memory; else later.
        """
        self.in_a_row += 1
        if cause in ("model", "batch"):
            said = self.alike.setdefault(fingerprint(cause, message), Counter())
            said[peer] += 1
            left = len(set(others) - said.keys())
            if said.total() > 1 and (left == 0 or len(said) > max(1, left)):
                return _of_the_job(cause, message, said.total())
        if cause == "model":
            self.model[peer, kind] = message
            left = len(set(others) - {one for one, _ in self.model})
            if len(self.model) > max(1, left):
                return ModelError(
                    f"the model cannot be used: {message} (said by {len(self.model)} executors)"
                )
        if cause == "not-finite":
            self.not_finite[peer] += 1
            times = self.not_finite.total()
            if times >= (_DIVERGED if len(self.not_finite) > 1 else _DIVERGED_ALONE):
                return NotFinite(
                    f"training diverges, {times} times on {len(self.not_finite)} worker(s) without an "
                    f"applied round in between: {message}"
                )
        if self.in_a_row >= self.limit:
            if cause in ("model", "batch"):
                return _of_the_job(cause, message, self.in_a_row)
            text = (
                f"{self.in_a_row} executors failed in a row without an applied round; the last one: {message}"
            )
            return ExecutorFailed(text) if cause == "exit" else JobFailed(text)
        return None


def _of_the_job(cause: str, message: str, times: int) -> HyphaError:
    what = "the model cannot be used" if cause == "model" else "the model cannot be trained on this data"
    line, _, rest = message.partition("\n")
    text = f"{what}: {line} (said by {times} executors)"
    return (ModelError if cause == "model" else JobFailed)(f"{text}\n{rest}" if rest else text)


def fingerprint(cause: str, message: str) -> str:
    """What is the same in two messages about one mistake, on two batches: the first line, without numbers."""
    return cause + re.sub(r"[-+]?\d[\d.,e+-]*", "#", message.partition("\n")[0])

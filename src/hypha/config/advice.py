"""What is allowed, and yet hardly ever meant: settings of a job that are far from what trains well.

Advice is no error: ``validate`` prints it after its OK and exits with 0, ``run`` logs it once. It is given
for what somebody has set, never for a default, and says what to set instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from hypha.config.job import DEFAULT_BATCH_SIZE, JobConfig, outer_defaults, outer_values
from hypha.config.models import NodeConfig, SchedulerConfig
from hypha.errors import Problem

#: learning rate / (1 - momentum), how far a steady update carries theta in the end, may differ from the
#: chosen optimizer's by this factor, and momentum be more by that much, before the measured losses suffer
_FACTOR, _MORE_MOMENTUM = 2.6, 0.25
#: DiLoCo's own 0.7 and 0.9 are for thousands of rounds: of jobs so long nothing was measured here
_MEASURED_ROUNDS = 500
#: AdamW changes a parameter by about this much a step; above it hardly anything trains
_HIGH_RATE = 0.05
#: a schedule that ends before this share of the steps leaves the rest without any learning rate
_SHARE = 0.8


def advice(config: NodeConfig) -> list[Problem]:
    """On a component's valid configuration."""
    if not isinstance(config, SchedulerConfig):
        return []
    job = config.scheduler.job
    found = [*_outer(job), *_rounds(job), *_inner(job), *_schedule(job), *_quorum(job)]
    return [Problem(f"scheduler.job.{key}", message) for key, message in found]


def steps_of_a_worker(job: JobConfig) -> int:
    """Optimizer steps in the whole job, where the workers are equally fast; at least one a round."""
    rounds = job.rounds
    if rounds.inner_steps is not None:
        return rounds.update_rounds * rounds.inner_steps
    batch = (
        rounds.batch_size or min(DEFAULT_BATCH_SIZE, rounds.max_batch_size)
    ) * rounds.gradient_accumulation
    samples = (rounds.avg_samples_between_updates or 0) / job.resources.num_workers
    return rounds.update_rounds * max(1, math.ceil(samples / batch))


def _outer(job: JobConfig) -> Iterator[tuple[str, str]]:
    given, rounds = job.outer_optimizer, job.rounds.update_rounds
    if (given.learning_rate is None and given.momentum is None) or rounds > _MEASURED_ROUNDS:
        return
    rate, momentum = outer_values(given, rounds)
    best_rate, best_momentum = outer_defaults(rounds)
    reach, best_reach = rate / (1.0 - momentum), best_rate / (1.0 - best_momentum)
    instead = (
        f"leave both out for learning_rate {best_rate:g} and momentum {best_momentum:g} (docs/defaults.md)"
    )
    set_ = f"learning_rate {rate:g} with momentum {momentum:g}"
    if momentum > best_momentum + _MORE_MOMENTUM:
        yield "outer_optimizer.momentum", f"{momentum:g} is much for a job of {rounds} rounds; {instead}"
    elif reach > _FACTOR * best_reach:
        yield "outer_optimizer", f"{set_} takes long steps for {rounds} rounds; {instead}"
    elif reach * _FACTOR < best_reach:
        yield "outer_optimizer", f"{set_} takes short steps for {rounds} rounds; {instead}"


def _rounds(job: JobConfig) -> Iterator[tuple[str, str]]:
    rounds = job.rounds
    key = "batch_size" if rounds.batch_size is not None else "max_batch_size"
    if getattr(rounds, key) == 1:
        yield (
            f"rounds.{key}",
            "with batches of one sample gradients are mostly noise, and BatchNorm layers cannot be trained; "
            "set it to 8 or more, as memory allows (gradient_accumulation makes steps of several batches)",
        )
    if steps_of_a_worker(job) <= rounds.update_rounds:
        key = "inner_steps" if rounds.inner_steps is not None else "avg_samples_between_updates"
        yield (
            f"rounds.{key}",
            "workers synchronise after every step, which costs far more time than it trains; DiLoCo takes "
            "20 to 500 steps a round",
        )


def _inner(job: JobConfig) -> Iterator[tuple[str, str]]:
    rate = job.inner_optimizer.learning_rate
    if rate > _HIGH_RATE:
        yield (
            "inner_optimizer.learning_rate",
            f"AdamW changes every parameter by about {rate:g} a step, with which hardly any model trains; "
            "1e-3 suits small models, 1e-4 and less large or trained ones",
        )


def _schedule(job: JobConfig) -> Iterator[tuple[str, str]]:
    schedule, steps = job.schedule, steps_of_a_worker(job)
    if schedule.type == "constant":
        if schedule.warmup_steps:
            yield "schedule.warmup_steps", "a constant schedule has no warm-up; set type to another one"
        return
    total = schedule.training_steps
    if schedule.warmup_steps >= total:
        yield (
            "schedule.warmup_steps",
            f"the warm-up is as long as training_steps ({total}) or longer, so there is no training at the "
            "full rate",
        )
    elif schedule.warmup_steps >= steps:
        yield (
            "schedule.warmup_steps",
            f"the job has about {steps} steps a worker, all of which are warm-up",
        )
    if total < _SHARE * steps:
        yield (
            "schedule.training_steps",
            f"the learning rate is 0 from step {total} on, and the job has about {steps} steps a worker",
        )
    if schedule.type == "wsd" and schedule.decay_steps > total - schedule.warmup_steps:
        yield "schedule.decay_steps", "warm-up and decay are longer than training_steps together"


def _quorum(job: JobConfig) -> Iterator[tuple[str, str]]:
    quorum, workers = job.rounds.quorum, job.resources.num_workers
    if quorum == 1.0:
        return
    if workers == 1:
        yield "rounds.quorum", "with one worker there is nobody to do without; leave it out"
    elif math.ceil(quorum * workers) == 1:
        yield (
            "rounds.quorum",
            f"one of {workers} updates is enough to close a round, so most of the training may be thrown "
            "away; more than half is usual",
        )

"""Opening a job: its dataset is found, its ledger opened, and what an earlier scheduler left is taken up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import trio

from hypha.config.job import JobConfig
from hypha.messages import OuterOptimizer
from hypha.runtime import in_thread, is_simulated
from hypha.scheduler.data.datasets import ServedDataset, find_dataset
from hypha.scheduler.descriptions import outer_optimizer
from hypha.scheduler.durable.database import left_behind
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.durable.starts import Generation, first_generation
from hypha.scheduler.job.states import JobContext
from hypha.scheduler.leasing.events import LeaseGained
from hypha.scheduler.preflight.checking import check_before_leasing
from hypha.scheduler.preflight.trial import ModelTrial, open_trial

logger = logging.getLogger(__name__)

#: what an earlier job left is given back within
_RELEASE_S = 0.8


@dataclass(frozen=True)
class Opened:
    """``generation`` begins. ``left`` are leases that an earlier scheduler held: where the job is
    ``resumed`` its executors may run under them, else they are those of another job.
    """

    dataset: ServedDataset
    ledger: Ledger
    generation: Generation
    left: tuple[LeaseGained, ...]

    @property
    def resumed(self) -> bool:
        """An earlier scheduler has begun the job."""
        return self.generation.start.generation > 0


async def open_job(
    context: JobContext, fresh: bool, nursery: trio.Nursery, enter: Callable[[str], None]
) -> Opened:
    """Start the pool in ``nursery``, then open the job; ``enter`` is called with each step. Whoever calls
    closes the ledger. Raises :class:`hypha.errors.HyphaError`.
    """
    config, node, state, replicas = context.config, context.node, context.state, context.replicas
    left = await left_behind(state.ledger)
    trained = not fresh and (bool(left.leases) or left.trained)
    # a child process has no virtual clock
    wanted = "quick" if config.check == "full" and is_simulated() else config.check
    checks = "none" if trained else wanted

    async def check(trial: ModelTrial | None) -> None:
        enter(f"checking that the model goes with the dataset {dataset.name}")
        await check_before_leasing(config, dataset.manifest, trial)

    async def check_anew() -> None:
        # the name of a job that is done, used for the next experiment: a new one for the check too
        if trained and wanted != "none":
            async with open_trial(config.model.type if wanted == "full" else None) as trial:
                await check(trial)

    # what it imports takes as long as the look-up of the dataset
    async with open_trial(config.model.type if checks == "full" else None) as trial:
        enter("waiting for a gateway")
        await node.wait_connected()
        if not fresh:
            # they expire: they are renewed while everything else is looked for
            context.pool.adopt(left.leases)
        await nursery.start(context.pool.run)
        looking = f"looking for the dataset {config.dataset.dataset}"
        enter(looking)
        known = None if fresh else left.manifest_hash
        dataset = await find_dataset(node, config.dataset, lambda why: enter(f"{looking}: {why}"), known)
        logger.info(
            "The dataset %s has %d samples in %d slices at %d data nodes",
            dataset.name,
            dataset.manifest.samples,
            len(dataset.manifest.slices),
            len(dataset.providers),
        )
        if checks != "none":
            await check(trial)
    enter("reading the job's state")
    if fresh:
        await in_thread(state.move_aside, "A fresh start was asked for")
    if config.checkpoint.replicas:
        await (replicas.forget_all() if fresh else replicas.bring_back_ledger(state))
    ledger, generation = await first_generation(state, config, node.ref(), dataset, replicas, check_anew)
    return Opened(dataset, ledger, generation, left.leases)


async def take_up(context: JobContext, opened: Opened, fresh: bool) -> None:
    """What was left by an earlier scheduler: its rounds count, or its leases go back."""
    start = opened.generation.start
    if start.optimizer is not None:
        _log_optimizer(start.optimizer, context.config)
    if opened.resumed:
        file = await opened.ledger.run(Ledger.to_file)
        context.progressed.resume(file.rounds)
        logger.info("The job goes on from round %d", start.round, extra={"job_id": start.job_id})
        if opened.left:
            logger.info("The job goes on with %d leases of its earlier scheduler", len(opened.left))
    elif opened.left:
        logger.info("%d leases of an earlier job are given back", len(opened.left))
        context.pool.adopt(opened.left if fresh else ())
        with trio.move_on_after(_RELEASE_S):
            async with trio.open_nursery() as nursery:
                for lease in opened.left:
                    nursery.start_soon(context.pool.release, lease.lease_id)


def _log_optimizer(optimizer: OuterOptimizer, config: JobConfig) -> None:
    """Log what was chosen, where the configuration leaves it open."""
    rounds, chosen = config.rounds.update_rounds, outer_optimizer(config)
    if None not in (config.outer_optimizer.learning_rate, config.outer_optimizer.momentum):
        return
    if optimizer == chosen:
        why = f"chosen by update_rounds = {rounds}"
    else:
        would = f"learning rate {chosen.learning_rate:g}, momentum {chosen.momentum:g}"
        why = f"with which the job began; started anew with {rounds} rounds it would have {would}"
    logger.info(
        "The outer optimizer has learning rate %g and momentum %g, %s; "
        "scheduler.job.outer_optimizer sets them",
        optimizer.learning_rate,
        optimizer.momentum,
        why,
    )

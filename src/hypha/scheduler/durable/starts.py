"""Where a generation of a job begins: at round 0, where an earlier scheduler left it, or at the newest
checkpoint whose bytes are all there.

A job is resumed by a scheduler that finds its unfinished ledger, and by one that lost its parameter server;
each time under the next generation, so that no message of the earlier generation counts. While a lease
on the parameter server may last, its theta is the newest there is, and the job goes on from that.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from msgspec import Struct

from hypha.config.job import JobConfig
from hypha.errors import ConfigError, JobFailed, Problem
from hypha.messages import Local, OuterOptimizer, PeerRef, Peers, Reference
from hypha.runtime import in_thread, new_id
from hypha.scheduler.data.datasets import ServedDataset
from hypha.scheduler.data.slices import SliceTracker, TrackerState
from hypha.scheduler.descriptions import described
from hypha.scheduler.durable.ledger import Ledger, Standing, open_ledger
from hypha.scheduler.durable.replicas import Replicas
from hypha.scheduler.durable.state_directory import CheckpointStore, StateDirectory
from hypha.scheduler.rounds.policy import Start

logger = logging.getLogger(__name__)

#: of a description: what a resumed job may have otherwise (a new key makes a new PeerID, and jobs of earlier
#: versions have no max_update_ratio)
_MAY_DIFFER = frozenset({"job_id", "checkpoint", "scheduler", "peers", "max_update_ratio"})


@dataclass(frozen=True)
class Generation:
    """``place`` holds the checkpoint: ``scheduler``, a path or URL, or nothing at round 0 and where the
    parameter server still runs. ``rounds_lost``: the job was further; what workers hold of those rounds is
    void.
    """

    start: Start
    tracker: TrackerState
    place: str = ""
    rounds_lost: bool = False

    def restore(self, scheduler: PeerRef) -> Reference | None:
        if not self.place:
            return None
        if self.place == "scheduler":
            return Peers(peers=(scheduler,), resource=f"checkpoint/{self.start.round}")
        return Local(url=self.place)


async def first_generation(
    state: StateDirectory,
    config: JobConfig,
    scheduler: PeerRef,
    dataset: ServedDataset,
    replicas: Replicas,
    before_anew: Callable[[], Awaitable[None]],
) -> tuple[Ledger, Generation]:
    """Resume the unfinished job in ``state``, or one that is done and shall have more rounds; else begin a
    new one. The state of another job that is done, or has not finished a round, is kept aside, once
    ``before_anew`` has returned. ``replicas`` take the place of what is lost. :class:`ConfigError` when the
    job that is to go on is another one. A job that goes on has the outer optimizer that it began with.
    """
    job_id = f"{config.name}-{new_id()[:12]}"
    new = _new(config, scheduler, dataset, job_id)
    ledger = await open_ledger(state.ledger)
    try:
        standing = await ledger.run(Ledger.standing)
        if standing is not None:
            applied, steps, theta = await ledger.run(Ledger.open_round)
            began = standing.aggregate.optimizer
            # before the first round nothing is lost by choosing anew
            goes_on = _new(config, scheduler, dataset, job_id, began) if applied else new
            other = differences(goes_on, standing)
            extended = config.rounds.update_rounds > applied
            if other and applied and (standing.state != "done" or extended):
                advice = (
                    f"the job in {state.path} is another one; undo the change to go on with it, give this "
                    "job another name, or start anew with --fresh (what is there is kept aside)"
                )
                raise ConfigError([Problem("scheduler.job", text) for text in (advice, *other)])
            if not other:
                if standing.state == "done" and extended:
                    logger.info(
                        "The job had %d rounds; it goes on to %d", applied, config.rounds.update_rounds
                    )
                await in_thread(state.prepare)
                last = Start(standing.job_id, standing.generation, optimizer=began)
                if any(lease.kind == "aggregate" for lease in await ledger.run(Ledger.leases)):
                    # its scheduler was killed: the job goes on where it was
                    start = Start(last.job_id, last.generation + 1, applied, steps, theta, True, began)
                    slices = await ledger.run(Ledger.slices)
                    await ledger.run(Ledger.begin_generation, start.generation, applied, slices)
                    return ledger, Generation(start, slices)
                store = CheckpointStore(state, standing.job_id, config.checkpoint.keep)
                return ledger, await next_generation(ledger, store, last, replicas)
            ledger.close()
            await before_anew()
            why = "is done" if standing.state == "done" else "has not finished a round"
            reason = f"The earlier job of this name {why}, and was another one ({'; '.join(other)})"
            await in_thread(state.move_aside, reason)
            ledger = await open_ledger(state.ledger)
        await in_thread(state.prepare)
        tracker = SliceTracker([part.samples for part in dataset.manifest.slices]).to_state()
        await ledger.run(Ledger.open_job, new, dataset.manifest, tracker)
    except BaseException:
        ledger.close()
        raise
    return ledger, Generation(Start(job_id, optimizer=new.aggregate.optimizer), tracker)


async def next_generation(
    ledger: Ledger, store: CheckpointStore, last: Start, replicas: Replicas
) -> Generation:
    """The generation after ``last``, from the newest checkpoint that can be used, or of which there is a
    copy.
    """
    open_round, _, _ = await ledger.run(Ledger.open_round)
    for begin in await ledger.run(Ledger.starts):
        kept = begin.place != "scheduler" or await in_thread(store.verify, begin.round)
        if not (kept or await replicas.bring_back(ledger, store, begin.round)):
            await ledger.run(Ledger.forget_checkpoint, begin.round)
            continue
        theta = await ledger.run(Ledger.theta_of, begin.round)
        start = Start(
            last.job_id, last.generation + 1, begin.round, begin.steps, theta, optimizer=last.optimizer
        )
        lost = begin.round < open_round
        # of the open round the workers keep what they have, so their slices stay theirs
        tracker = begin.tracker.unassigned() if lost else await ledger.run(Ledger.slices)
        await ledger.run(Ledger.begin_generation, start.generation, start.round, tracker)
        return Generation(start, tracker, begin.place, rounds_lost=lost)
    raise JobFailed(f"the ledger {ledger.path} has no round to begin from; start the job with --fresh")


def _new(
    config: JobConfig,
    scheduler: PeerRef,
    dataset: ServedDataset,
    job_id: str,
    began: OuterOptimizer | None = None,
) -> Standing:
    return Standing(job_id, dataset.manifest_hash, *described(config, scheduler, job_id, began))


def differences(now: Standing, before: Standing) -> list[str]:
    """In what ``now`` is another job than that ``before``, in words, each once."""
    found = [
        *_differences("train", before.train, now.train),
        *_differences("aggregate", before.aggregate, now.aggregate),
        *_differences("the dataset's manifest hash", before.manifest_hash, now.manifest_hash),
    ]
    return list(dict.fromkeys(f"{path} is {new!r} now and was {old!r}" for path, old, new in found))


def _differences(path: str, before: object, now: object) -> Iterator[tuple[str, object, object]]:
    if isinstance(before, Struct) and type(before) is type(now):
        # msgspec's own conversion would leave out fields that have their default
        for name in sorted(set(before.__struct_fields__) - _MAY_DIFFER):
            yield from _differences(f"{path}.{name}", getattr(before, name), getattr(now, name))
    elif isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(f"{path}.{key}", before.get(key), now.get(key))
    elif before != now:
        yield path, before, now

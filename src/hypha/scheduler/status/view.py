"""A running job as people see it: its snapshot, filled from what runs, and one sentence of what it does, what
it lacks, and whom it waits for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable

import msgspec
import trio

from hypha import __version__
from hypha.config.job import JobConfig
from hypha.errors import HyphaError
from hypha.features import printable
from hypha.messages import ExecutorClass, Resources
from hypha.naming import name_of, shown
from hypha.scheduler.data.datasets import ServedDataset
from hypha.scheduler.descriptions import resources_of
from hypha.scheduler.goodput.report import GoodputReport
from hypha.scheduler.job.states import JobContext, JobResult, JobStage, Outcome
from hypha.scheduler.leasing.holding import Holding
from hypha.scheduler.leasing.pool import Pool
from hypha.scheduler.rounds.machine import RoundMachine
from hypha.scheduler.rounds.participants import Member
from hypha.scheduler.rounds.state import OPEN, RoundState
from hypha.scheduler.status.snapshot import (
    ConnectionSnapshot,
    JobSnapshot,
    JobState,
    LeaseSnapshot,
    ServiceSnapshot,
    SliceCounts,
    WorkerSnapshot,
)
from hypha.waiting import Reminder
from hypha.waiting import in_words as duration_in_words

logger = logging.getLogger(__name__)

#: named of each kind; a hundred names would hide the rest of the sentence
_MOST_NAMED = 5


def snapshot_of(
    context: JobContext,
    stage: JobStage,
    outcome: Outcome,
    goodput: GoodputReport | None,
    services: tuple[ServiceSnapshot, ...],
) -> JobSnapshot:
    """The job now, which is at ``stage``, and what is around it: leases, connections, and ``services``."""
    config, node, pool, progressed = context.config, context.node, context.pool, context.progressed
    machine, dataset, now = stage.machine, stage.dataset, trio.current_time()
    output = outcome.output if isinstance(outcome, JobResult) else ""
    if isinstance(outcome, HyphaError):
        message = str(outcome)
    elif machine is None:
        message = stage.step
    else:
        message = sentence(config, machine, pool, dataset, output)
    server = machine.server.peer if machine is not None and machine.server is not None else None
    snapshot = JobSnapshot(
        name=config.name,
        state="failed" if isinstance(outcome, HyphaError) else job_state(machine, pool, config),
        message=message,
        rounds=config.rounds.update_rounds,
        samples=progressed.samples,
        samples_per_s=progressed.samples_per_s,
        loss=progressed.loss,
        dataset=config.dataset.dataset,
        dataset_samples=dataset.manifest.samples if dataset is not None else 0,
        providers=len(dataset.providers) if dataset is not None else 0,
        leases=len({(lease.worker.peer, lease.kind) for lease in pool.leases}),
        checkpoint=progressed.checkpoint,
        output=output,
        elapsed_s=now - context.began,
        goodput=goodput,
        version=__version__,
        scheduler=node.peer_id,
        scheduler_name=name_of(node.peer_id),
        held=tuple(_lease_snapshot(held, now) for held in pool.held),
        connections=tuple(
            ConnectionSnapshot(
                peer=one.peer,
                kind=one.kind,
                direction=one.direction,
                address=one.address,
                roles=tuple(sorted(one.roles)),
                round_trip_s=one.round_trip_s,
                name=name_of(one.peer),
            )
            for one in sorted(node.connections(), key=lambda one: (one.peer, one.address))
        ),
        services=services,
        parameter_server=server,
        parameter_server_name=name_of(server or ""),
    )
    if machine is None:
        return snapshot
    return msgspec.structs.replace(
        snapshot,
        job_id=machine.start.job_id,
        phase=machine.phase,
        generation=machine.start.generation,
        round=machine.round,
        theta=machine.theta,
        workers=_worker_snapshots(context, machine),
        epoch=machine.tracker.epoch,
        refused=dict(machine.counts),
        slices=SliceCounts(**machine.tracker.counts()),
    )


def _worker_snapshots(context: JobContext, machine: RoundMachine) -> tuple[WorkerSnapshot, ...]:
    leases = {lease.worker.peer: lease for lease in context.pool.leases if lease.kind == "train"}
    updates = context.progressed.updates
    shown = []
    for peer, member in machine.members.items():
        update, lease = updates.get(peer), leases.get(peer)
        worker = WorkerSnapshot(
            peer=peer,
            state=member.state(machine.round),
            batches=member.batches,
            planned=member.plan,
            batch_size=member.batch_size,
            samples_per_s=member.samples_per_s,
            samples=member.total_samples,
            loss=member.loss if math.isfinite(member.loss) else None,
            lease="" if lease is None else lease.lease_id,
            update_norm=update.norm if update is not None else None,
            update_cosine=update.cosine if update is not None else None,
            version="" if lease is None else printable(lease.version),
            name=name_of(peer),
            idle_share=member.idle_share,
        )
        shown.append(worker)
    return tuple(shown)


def _lease_snapshot(held: Holding, now: float) -> LeaseSnapshot:
    lease = held.lease
    return LeaseSnapshot(
        lease=lease.lease_id,
        peer=lease.worker.peer,
        kind=lease.kind,
        price=lease.price,
        **msgspec.structs.asdict(lease.resources),
        expires_in_s=max(0.0, held.renewal.expires_at - now),
        suspected=held.renewal.suspected,
        leaves_in_s=None if math.isinf(held.leaves_at) else max(0.0, held.leaves_at - now),
        version=printable(lease.version),
        name=name_of(lease.worker.peer),
    )


def job_state(machine: RoundMachine | None, pool: Pool, config: JobConfig) -> JobState:
    if machine is None:
        return "allocating"
    if machine.phase in ("exporting", "done", "failed"):
        return machine.phase
    if machine.paused:
        return "paused"
    if machine.phase != "loading":
        return "training"
    minimum = config.resources.min_workers or config.resources.num_workers
    train = sum(1 for lease in pool.leases if lease.kind == "train")
    return "allocating" if train < minimum or train == len(pool.leases) else "loading"


def sentence(
    config: JobConfig, machine: RoundMachine, pool: Pool, dataset: ServedDataset | None, output: str
) -> str:
    """What is going on, and what is missing."""
    state = job_state(machine, pool, config)
    name = config.dataset.dataset
    if state == "done":
        return f"done: the trained model is in {output}" if output else "publishing the trained model"
    if state == "exporting":
        return "the parameter server sends the trained model"
    if dataset is not None and not dataset.providers:
        return f"no data node serves {name} right now; training pauses until one returns"
    if state in ("allocating", "paused"):
        kept = f"round {machine.round + 1} is kept; " if state == "paused" else ""
        return kept + missing(config, pool)
    if state == "loading":
        loaded, members = len(machine.loaded), len(machine.members)
        server = "is ready" if machine.server_ready else "is loading it"
        return f"{loaded} of {members} workers have the model; the parameter server {server}"
    short = pool.missing("train")
    more = f"; looking for {short} more workers" if short else ""
    return f"round {machine.round + 1} of {config.rounds.update_rounds}{more}"


def missing(config: JobConfig, pool: Pool) -> str:
    """Which leases are missing, and what was asked for."""
    wanted = config.resources.num_workers + 1
    parts = []
    kinds: tuple[ExecutorClass, ...] = ("aggregate", "train")
    for kind in kinds:
        if pool.missing(kind):
            section = config.resources
            asked = section.worker if kind == "train" else section.parameter_server
            price = section.worker_price if kind == "train" else section.parameter_server_price
            what = "a parameter server" if kind == "aggregate" else "a worker"
            bid = pool.bid(kind)
            raised = f", though the bid was raised to {bid:g}" if bid > price.bid else ""
            offered = in_words(resources_of(asked))
            parts.append(f"nobody else offered {offered} for {what} at up to {price.max:g}{raised}")
            if shortage := pool.shortage(kind):
                parts.append(shortage)
    detail = "; ".join(parts)
    if not parts and len(pool.leases) == wanted:
        return "waiting for executors that load the model or are started again"
    text = f"waiting for workers: {len(pool.leases)} of {wanted} leases"
    return f"{text}; {detail}" if detail else text


def in_words(resources: Resources) -> str:
    """``cpu=2 gpu=10``."""
    named = msgspec.structs.asdict(resources).items()
    return " ".join(f"{name}={value:g}" for name, value in named if value) or "anything"


class Awaiting:
    """Logs what a job waits for once it has stood still for a minute, and once a minute from then on. It
    stands still while it is at the same place, each time that :meth:`look` is called.
    """

    def __init__(self) -> None:
        self._place: object = None
        self._since = trio.current_time()
        self._reminder = Reminder()

    def look(self, place: object, what: Callable[[], str]) -> None:
        """The job is at ``place``; ``what`` is called for what it waits for there."""
        if place != self._place:
            self._place, self._since = place, trio.current_time()
            self._reminder.reset()
        elif self._reminder.due():
            logger.info("For %s now: %s.", duration_in_words(trio.current_time() - self._since), what())


def awaited(machine: RoundState) -> str:
    """Whom the round machine waits for, by name; empty where it is nobody of the job."""
    server = shown(machine.server.peer) if machine.server is not None else ""
    if machine.phase == "loading":
        loading = [member for member in machine.members.values() if not member.loaded]
        waits = [f"{_named(loading)} to load the model"] if loading else []
        if server and not machine.server_ready:
            waits.append(f"the parameter server {server} to load it")
        return " and for ".join(waits)
    if machine.phase in OPEN:
        open_ = [member for member in machine.participants if not member.accepted]
        return "; ".join(
            f"{_named(those)} {state}"
            for state in ("unreachable", "loading", "waiting", "training", "scheduled", "updating")
            if (those := [member for member in open_ if member.state(machine.round) == state])
        )
    if machine.phase == "closing":
        return f"the outer step of the parameter server {server}"
    return ""


def _named(members: Iterable[Member]) -> str:
    """``worker-1 (…wTqXNUgL, batch 4 of 20) and 3 others``."""
    found = sorted(members, key=lambda member: (member.batches, member.peer))
    words = [
        f"{shown(one.peer)}" + (f" at batch {one.batches} of {one.plan or '?'}" if one.batches else "")
        for one in found[:_MOST_NAMED]
    ]
    left = len(found) - len(words)
    return ", ".join(words) + (f" and {left} others" if left else "")

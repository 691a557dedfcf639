"""The snapshot of a running job, filled from what runs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec
import trio

from hypha import __version__
from hypha.errors import HyphaError
from hypha.features import printable
from hypha.naming import name_of
from hypha.node import ConnectionInfo
from hypha.scheduler.goodput.report import GoodputReport
from hypha.scheduler.job.states import JobContext, JobResult, JobStage, Outcome
from hypha.scheduler.leasing.leases import HeldLease
from hypha.scheduler.rounds.machine import RoundMachine
from hypha.scheduler.status.sentences import job_state, sentence
from hypha.scheduler.status.snapshot import (
    ConnectionSnapshot,
    JobSnapshot,
    LeaseSnapshot,
    ServiceSnapshot,
    SliceCounts,
    WorkerSnapshot,
)


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
        connections=_connection_snapshots(node.connections()),
        services=services,
    )
    if machine is None:
        return snapshot
    server = machine.server.peer if machine.server is not None else None
    return msgspec.structs.replace(
        snapshot,
        job_id=machine.start.job_id,
        phase=machine.phase,
        generation=machine.start.generation,
        round=machine.round,
        theta=machine.theta,
        workers=_worker_snapshots(context, machine),
        parameter_server=server,
        parameter_server_name=name_of(server or ""),
        epoch=machine.tracker.epoch,
        refused=dict(machine.counts),
        slices=SliceCounts(**machine.tracker.counts()),
    )


def _worker_snapshots(context: JobContext, machine: RoundMachine) -> tuple[WorkerSnapshot, ...]:
    leases = {lease.worker.peer: lease.lease_id for lease in context.pool.leases if lease.kind == "train"}
    versions = {lease.worker.peer: printable(lease.version) for lease in context.pool.leases}
    updates = context.progressed.updates
    shown = []
    for member in machine.members.values():
        peer, update = member.peer, updates.get(member.peer)
        worker = WorkerSnapshot(
            peer=peer,
            state=member.state(machine.round),
            batches=member.batches,
            planned=member.plan,
            batch_size=member.batch_size,
            samples_per_s=member.samples_per_s,
            samples=member.total_samples,
            loss=member.loss if math.isfinite(member.loss) else None,
            lease=leases.get(peer, ""),
            update_norm=update.norm if update is not None else None,
            update_cosine=update.cosine if update is not None else None,
            version=versions.get(peer, ""),
            name=name_of(peer),
            idle_share=member.idle_share,
        )
        shown.append(worker)
    return tuple(shown)


def _lease_snapshot(held: HeldLease, now: float) -> LeaseSnapshot:
    lease, reserved = held.lease, held.lease.resources
    return LeaseSnapshot(
        lease=lease.lease_id,
        peer=lease.worker.peer,
        kind=lease.kind,
        price=lease.price,
        cpu=reserved.cpu,
        memory=reserved.memory,
        gpu=reserved.gpu,
        storage=reserved.storage,
        expires_in_s=max(0.0, held.expires_at - now),
        suspected=held.suspected,
        leaves_in_s=None if held.leaves_at is None else max(0.0, held.leaves_at - now),
        version=printable(lease.version),
        name=name_of(lease.worker.peer),
    )


def _connection_snapshots(connections: Iterable[ConnectionInfo]) -> tuple[ConnectionSnapshot, ...]:
    """In order of peers."""
    found = [
        ConnectionSnapshot(
            peer=one.peer,
            kind=one.kind,
            direction=one.direction,
            address=one.address,
            roles=tuple(sorted(one.roles)),
            round_trip_s=one.round_trip_s,
            name=name_of(one.peer),
        )
        for one in connections
    ]
    return tuple(sorted(found, key=lambda one: (one.peer, one.address)))

"""The job in words and numbers: builds the snapshot, and the one sentence that a user needs."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from hypha import __version__
from hypha.config.models import JobConfig
from hypha.errors import HyphaError
from hypha.features import printable
from hypha.messages import ExecutorClass, LedgerRound, Resources, UpdateStatistics
from hypha.naming import name_of
from hypha.node import Node
from hypha.scheduler.data.datasets import ServedDataset
from hypha.scheduler.descriptions import resources_of
from hypha.scheduler.goodput.report import GoodputReport
from hypha.scheduler.leasing.leases import HeldLease
from hypha.scheduler.leasing.pool import Pool
from hypha.scheduler.rounds.machine import RoundMachine
from hypha.scheduler.status.snapshot import (
    JobSnapshot,
    JobState,
    LeaseSnapshot,
    ServiceSnapshot,
    SliceCounts,
    connection_snapshots,
    worker_snapshot,
)

_SHARE = 0.3


class Progressed:
    """What was achieved in rounds that count."""

    def __init__(self) -> None:
        self._entries: dict[int, LedgerRound] = {}
        self.samples_per_s = 0.0
        self.checkpoint: int | None = None
        #: when that one became durable, of trio's clock
        self.checkpoint_at: float | None = None

    @property
    def samples(self) -> int:
        """Samples in applied updates."""
        return sum(entry.samples for entry in self._entries.values())

    @property
    def loss(self) -> float | None:
        """Of the newest round."""
        return self._entries[max(self._entries)].loss if self._entries else None

    @property
    def rounds(self) -> Iterable[LedgerRound]:
        """Those that count."""
        return self._entries.values()

    @property
    def updates(self) -> dict[str, UpdateStatistics]:
        """What was measured of the newest round's updates, by worker."""
        newest = self._entries[max(self._entries)].updates if self._entries else ()
        return {one.worker: one for one in newest}

    def add(self, entry: LedgerRound) -> None:
        """A round was applied; or it became more complete."""
        known = entry.round in self._entries
        self._entries[entry.round] = entry
        if not known and entry.duration_s > 0:
            rate = entry.samples / entry.duration_s
            mean = self.samples_per_s
            self.samples_per_s = rate if not mean else mean + _SHARE * (rate - mean)

    def resume(self, entries: Iterable[LedgerRound]) -> None:
        """From an earlier generation."""
        self._entries = {entry.round: entry for entry in entries if not entry.discarded}

    def cut(self, round_: int) -> None:
        """The job goes on from ``round_``: later ones do not count any more."""
        self._entries = {number: entry for number, entry in self._entries.items() if number < round_}


def snapshot_of(
    config: JobConfig,
    machine: RoundMachine | None,
    pool: Pool,
    dataset: ServedDataset | None,
    progressed: Progressed,
    step: str,
    error: HyphaError | None,
    output: str,
    elapsed_s: float,
    goodput: GoodputReport | None = None,
) -> JobSnapshot:
    """The job now. ``step`` is what is done before there is a machine."""
    state = "failed" if error is not None else job_state(machine, pool, config)
    leases = {(lease.worker.peer, lease.kind): lease.lease_id for lease in pool.leases}
    versions = {lease.worker.peer: printable(lease.version) for lease in pool.leases}
    if error is not None:
        message = str(error)
    elif machine is None:
        message = step
    else:
        message = sentence(config, machine, pool, dataset, output)
    members = machine.members.values() if machine is not None else ()
    updates = progressed.updates
    server = machine.server.peer if machine is not None and machine.server is not None else None
    return JobSnapshot(
        name=config.name,
        job_id=machine.start.job_id if machine is not None else "",
        state=state,
        phase=machine.phase if machine is not None else "",
        message=message,
        generation=machine.start.generation if machine is not None else 0,
        round=machine.round if machine is not None else 0,
        rounds=config.rounds.update_rounds,
        samples=progressed.samples,
        samples_per_s=progressed.samples_per_s,
        loss=progressed.loss,
        theta=machine.theta if machine is not None else "",
        workers=tuple(
            worker_snapshot(
                member,
                machine.round if machine else 0,
                leases.get((member.peer, "train"), ""),
                updates.get(member.peer),
                versions.get(member.peer, ""),
            )
            for member in members
        ),
        parameter_server=server,
        parameter_server_name=name_of(server or ""),
        dataset=config.dataset.dataset,
        dataset_samples=dataset.manifest.samples if dataset is not None else 0,
        providers=len(dataset.providers) if dataset is not None else 0,
        epoch=machine.tracker.epoch if machine is not None else 0,
        leases=len(leases),
        checkpoint=progressed.checkpoint,
        output=output,
        elapsed_s=elapsed_s,
        refused=dict(machine.counts) if machine is not None else {},
        goodput=goodput,
        version=__version__,
    )


def with_surroundings(
    job: JobSnapshot,
    machine: RoundMachine | None,
    pool: Pool,
    node: Node,
    now: float,
    services: tuple[ServiceSnapshot, ...] = (),
) -> JobSnapshot:
    """``job`` and what is around it: leases, slices, connections, and gateways and data nodes. ``now`` is of
    trio's clock.
    """
    counts = machine.tracker.counts() if machine is not None else None
    return msgspec.structs.replace(
        job,
        scheduler=node.peer_id,
        scheduler_name=name_of(node.peer_id),
        held=tuple(_lease_snapshot(held, now) for held in pool.held),
        slices=SliceCounts(**counts) if counts is not None else None,
        connections=connection_snapshots(node.connections()),
        services=services,
    )


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


def job_state(machine: RoundMachine | None, pool: Pool, config: JobConfig) -> JobState:
    """In one word."""
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
    named = (
        ("cpu", resources.cpu),
        ("memory", resources.memory),
        ("gpu", resources.gpu),
        ("storage", resources.storage),
    )
    return " ".join(f"{name}={value:g}" for name, value in named if value) or "anything"

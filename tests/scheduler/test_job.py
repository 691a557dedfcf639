"""The whole job loop, once over real nodes and otherwise under a virtual clock. Scripts at the other end of
the wire speak the executors' messages: no tensors, no processes, but every message, lease, transfer and file
of the scheduler is real.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from opentelemetry.sdk.trace import ReadableSpan
from tests.scheduler.world import received
from tests.support.earlier import earlier_lease_service
from tests.support.network import Network, until
from tests.support.signals import Signals
from tests.support.virtual_network import VirtualNetwork, virtual_time

from hypha.cli.job.rerun import rerun
from hypha.config.job import outer_defaults
from hypha.config.models import SchedulerConfig
from hypha.config.offers import OfferConfig
from hypha.errors import (
    AllocationFailed,
    ConfigError,
    DatasetNotFound,
    HyphaError,
    ModelError,
    NetworkError,
    OutputError,
    Refused,
)
from hypha.journal import Journal
from hypha.messages import (
    Acknowledged,
    AggregateJob,
    CancelJob,
    CheckpointSaved,
    CloseRound,
    Column,
    ColumnRange,
    Contribution,
    DatasetDescription,
    DescribeDataset,
    DispatchJob,
    Event,
    ExecutorClass,
    ExecutorDescriptor,
    ExecutorError,
    ExecutorExited,
    Export,
    Exported,
    FileList,
    Finish,
    JobStamp,
    ListFiles,
    Loaded,
    Manifest,
    Members,
    ModelReady,
    NextSlice,
    OuterOptimizer,
    Plan,
    Progress,
    PullFile,
    Rejoin,
    Report,
    ReportEvent,
    Resources,
    RoundApplied,
    RoundStarted,
    SaveCheckpoint,
    SendModel,
    SliceAssigned,
    SliceInfo,
    SliceRange,
    Steer,
    Traced,
    TrainJob,
)
from hypha.net.bulk.transfers import meta_of
from hypha.node import Node
from hypha.rules.leases import Lease
from hypha.rules.manifests import manifest_hash
from hypha.scheduler.durable.ledger import Ledger, read_ledger
from hypha.scheduler.job.ending import finished_job
from hypha.scheduler.job.run import run_job
from hypha.scheduler.job.states import JobResult, Observation
from hypha.scheduler.status.snapshot import JobSnapshot
from hypha.telemetry import instruments as metrics
from hypha.tracing import round_traceparent
from hypha.worker.leasing.arbiter import Arbiter
from hypha.worker.leasing.offers import serve_offers
from hypha.worker.leasing.service import LeaseService
from hypha.worker.leasing.terms import WorkerCapacity

MANIFEST = Manifest(
    name="digits",
    columns=(),
    slices=tuple(SliceInfo(file=f"{i}", samples=20, size=9, blake3="00" * 32) for i in range(8)),
)


@dataclass
class Stage:
    """What the scripts share instead of a bulk plane among themselves: who gets theta, whose update is in."""

    node_dir: Path
    actors: dict[str, Actor] = field(default_factory=dict)
    updates: list[Contribution] = field(default_factory=list)
    restored: list[int] = field(default_factory=list)
    #: what parameter servers were told, by the life they were started in
    optimizers: list[tuple[int, OuterOptimizer]] = field(default_factory=list)
    crash_at: int = -1
    saves: bool = True


@dataclass
class Actor:
    """A worker that plays one executor of each kind, honestly but without tensors."""

    stage: Stage
    node: Node
    nursery: trio.Nursery
    model_error: str = ""
    silent: bool = False
    #: rounds in which, or in the first after which, its training executor dies
    mortal: list[int] = field(default_factory=list)
    died: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    jobs: dict[ExecutorClass, TrainJob | AggregateJob] = field(default_factory=dict)
    seq: dict[str, int] = field(default_factory=dict)
    lives: int = 0
    plan: dict[int, int | None] = field(default_factory=dict)
    plans: trio.Event = field(default_factory=trio.Event)
    finished: set[ExecutorClass] = field(default_factory=set)
    round: int = 0
    members: list[str] = field(default_factory=list)
    steps: int = 0
    generation: dict[ExecutorClass, int] = field(default_factory=dict)
    leases: dict[ExecutorClass, str] = field(default_factory=dict)
    rejoined: list[Rejoin] = field(default_factory=list)
    traced: list[Traced | None] = field(default_factory=list)
    #: what was said of the last rounds, to be said again
    applied: list[Event] = field(default_factory=list)
    started: int = -1
    lease_service: LeaseService | None = None
    #: a parameter server sends a checkpoint whole before what it is asked for after that
    archive: trio.Lock = field(default_factory=trio.Lock)

    def begin(self, work: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Do it until the scheduler is gone."""

        async def until_refused() -> None:
            with suppress(NetworkError):
                await work(*arguments)

        self.nursery.start_soon(until_refused)

    def answer(self) -> None:
        self.node.answer(DispatchJob, self.dispatch)
        self.node.answer(Steer, self.steer)
        self.node.answer(CancelJob, self.cancel)

    async def dispatch(self, caller: str, request: DispatchJob) -> Acknowledged:
        job = request.job
        kind: ExecutorClass = "train" if isinstance(job, TrainJob) else "aggregate"
        if (self.jobs.get(kind), self.leases.get(kind)) == (job, request.lease_id):
            return Acknowledged()
        self.jobs[kind], self.leases[kind] = job, request.lease_id
        self.traced.append(job.traced)
        self.generation[kind] = job.generation
        self.lives += 1
        if request.instead_of:
            self.replaced.append(request.instead_of)
        self.begin(self.train if kind == "train" else self.aggregate)
        return Acknowledged()

    async def cancel(self, caller: str, request: CancelJob) -> Acknowledged:
        self.jobs.pop(request.kind, None)
        return Acknowledged()

    def incarnation(self, kind: ExecutorClass, job: TrainJob | AggregateJob) -> str:
        deaths = len(self.died) if kind == "train" else 0
        return f"{kind}-{job.generation}-{deaths}-{self.node.peer_id}"

    async def say(self, kind: ExecutorClass, event: Event, twice: bool = False) -> None:
        job = self.jobs.get(kind)
        if job is None or self.silent:
            return
        incarnation = self.incarnation(kind, job)
        self.seq[incarnation] = self.seq.get(incarnation, 0) + 1
        stamp = JobStamp(job_id=job.job_id, generation=self.generation[kind], round=self.round)
        report = ReportEvent(
            stamp=stamp, kind=kind, incarnation=incarnation, seq=self.seq[incarnation], event=event
        )
        for _ in range(2 if twice else 1):
            try:
                await self.node.request(job.scheduler, report)
            except NetworkError:
                return

    async def steer(self, caller: str, request: Steer) -> Acknowledged:
        directive = request.directive
        job = self.jobs.get(request.kind)
        if job is None:
            raise Refused("not-found", "it has ended")
        if isinstance(directive, Rejoin):
            self.generation[request.kind] = directive.generation
            self.rejoined.append(directive)
            self.begin(self.rejoin, request.kind, job, directive)
            return Acknowledged()
        if request.stamp.generation != self.generation[request.kind]:
            return Acknowledged()
        match directive:
            case Plan(round=round_, batches=batches):
                self.plan[round_] = batches
                self.plans.set()
            case Members(peers=peers):
                self.members = [ref.peer for ref in peers]
            case SendModel(to=ref):
                self.theta(ref.peer)
            case CloseRound():
                self.begin(self.close, directive)
            case SaveCheckpoint():
                if self.stage.saves:
                    self.begin(self.save)
            case Export():
                self.begin(self.export, directive)
            case Finish():
                self.finished.add(request.kind)
                self.jobs.pop(request.kind, None)
        return Acknowledged()

    async def rejoin(self, kind: ExecutorClass, job: TrainJob | AggregateJob, directive: Rejoin) -> None:
        if isinstance(job, AggregateJob):
            for event in self.applied:
                await self.say(kind, event)
            await self.say(
                kind, ModelReady(round=self.round, theta=f"t{self.round}", parameters=1, size_bytes=4)
            )
            for part in self.stage.updates:
                await self.say(kind, received(part))
            return
        assert directive.parameter_server is not None
        moved = msgspec.structs.replace(job, parameter_server=directive.parameter_server)
        self.jobs[kind] = moved if directive.start_over or directive.resend else job
        await self.say(kind, Loaded(incarnation=self.incarnation("train", job)))
        if directive.start_over:
            self.plan.clear()
            return
        if self.started >= 0:
            await self.say(kind, RoundStarted(round=self.started, theta=f"t{self.started}"))

    # --- as a parameter server

    def theta(self, peer: str) -> None:
        actor = self.stage.actors[peer]
        if "train" in actor.jobs:
            actor.begin(actor.train_round, self.round)

    async def aggregate(self) -> None:
        job = self.jobs["aggregate"]
        assert isinstance(job, AggregateJob)
        self.stage.optimizers.append((job.generation, job.optimizer))
        self.stage.updates.clear()
        if self.model_error:
            await self.say("aggregate", ExecutorError(kind="model", message=self.model_error))
            return
        files = await self.node.request(job.scheduler, ListFiles(kind="model", job_id=job.job_id))
        assert isinstance(files, FileList)
        for meta in files.files:
            path = self.stage.node_dir / f"{self.node.peer_id}-{meta.name}"
            what = PullFile(kind="model", name=meta.name, job_id=job.job_id)
            await self.node.transfers.pull(job.scheduler, what, path, meta, 1 << 20)
            assert path.read_text() == "{}"
        if job.restore is not None:
            listing = await self.node.request(
                job.scheduler, ListFiles(kind="checkpoint", name=str(job.round), job_id=job.job_id)
            )
            assert isinstance(listing, FileList)
            (meta,) = listing.files
            path = self.stage.node_dir / f"restored-{job.generation}"
            what = PullFile(kind="checkpoint", name=meta.name, job_id=job.job_id)
            await self.node.transfers.pull(job.scheduler, what, path, meta, 1 << 20)
            self.stage.restored.append(json.loads(path.read_text())["round"])
        self.round = job.round
        ready = ModelReady(round=self.round, theta=f"t{self.round}", parameters=1, size_bytes=4)
        await self.say("aggregate", ready, twice=True)

    async def close(self, directive: CloseRound) -> None:
        if directive.round != self.round or "aggregate" not in self.jobs:
            return
        if self.round == self.stage.crash_at:
            self.stage.crash_at = -1
            await self.say("aggregate", ExecutorError(kind="internal", message="out of luck"))
            self.jobs.pop("aggregate", None)
            return
        parts = sorted(self.stage.updates, key=lambda part: part.worker)
        self.stage.updates.clear()
        self.round += 1
        names = tuple(part.worker for part in parts)
        applied = RoundApplied(round=directive.round, theta=f"t{self.round}", contributors=names)
        self.applied = [*map(received, parts), applied]
        async with self.archive:
            await self.say("aggregate", applied, twice=True)
            if directive.checkpoint:
                await self.send_checkpoint()
        if not directive.final:
            for peer in self.members:
                self.theta(peer)

    async def save(self) -> None:
        async with self.archive:
            await self.send_checkpoint()

    async def send_checkpoint(self) -> None:
        job = self.jobs["aggregate"]
        path = self.stage.node_dir / f"state-{self.round}.json"
        path.write_text(json.dumps({"round": self.round}))
        stamp = JobStamp(job_id=job.job_id, generation=self.generation["aggregate"], round=self.round)
        meta = await meta_of(path, "checkpoint", "state.json", stamp=stamp)
        await self.node.transfers.send(job.scheduler, path, meta)
        await self.say("aggregate", CheckpointSaved(round=self.round, place="scheduler"))

    async def export(self, directive: Export) -> None:
        job = self.jobs["aggregate"]
        stamp = JobStamp(job_id=job.job_id, generation=self.generation["aggregate"], round=self.round)
        async with self.archive:
            for name in ("config.json", "model.safetensors"):
                path = self.stage.node_dir / f"export-{name}"
                path.write_text(name)
                meta = await meta_of(path, "export", name, stamp=stamp)
                await self.node.transfers.send(directive.to, path, meta)
        exported = Exported(round=self.round, files=("config.json", "model.safetensors"))
        await self.say("aggregate", exported)

    # --- as a training executor

    async def next_slice(self, job: TrainJob, incarnation: str, number: int) -> SliceAssigned:
        """Ask until there is an answer, as a worker does; a scheduler may be away."""
        while True:
            if self.jobs.get("train") is not job:
                raise Refused("stale", "this process has ended")
            stamp = JobStamp(job_id=job.job_id, generation=self.generation["train"], round=self.started)
            request = NextSlice(stamp=stamp, incarnation=incarnation, seq=number)
            with suppress(NetworkError):
                got = await self.node.request(job.scheduler, request, timeout_s=2.0)
                if isinstance(got, SliceAssigned):
                    return got
            await trio.sleep(0.05)

    async def train(self) -> None:
        if self.model_error:
            await self.say("train", ExecutorError(kind="model", message=self.model_error))
            return
        job = self.jobs["train"]
        await self.say("train", Loaded(incarnation=self.incarnation("train", job)))

    async def train_round(self, round_: int) -> None:
        job = self.jobs.get("train")
        if not isinstance(job, TrainJob):
            return
        self.started = round_
        incarnation = self.incarnation("train", job)
        await self.say("train", RoundStarted(round=round_, theta=f"t{round_}"), twice=True)
        number, batches, ranges, finished = self.steps * 1000, 0, [], []
        while (plan := self.plan.get(round_)) is None or batches < max(1, plan):
            number += 1
            got = await self.next_slice(job, incarnation, number)
            if self.jobs.get("train") is not job:
                return
            stamp = JobStamp(job_id=job.job_id, generation=self.generation["train"], round=round_)
            rows = got.samples // job.batch_size * job.batch_size
            ranges.append(SliceRange(epoch=got.epoch, slice=got.index, start=0, stop=rows))
            if rows == got.samples:
                finished.append((got.epoch, got.index))
            await trio.sleep(0.01)
            if self.mortal and round_ >= self.mortal[0]:
                self.mortal.pop(0)
                await self.say("train", ExecutorExited(exit_code=-9, tail="last words"))
                self.jobs.pop("train", None)
                self.died.append(incarnation)
                return
            batches += got.samples // job.batch_size
            progress = Progress(
                round=round_,
                batches=batches,
                samples=batches * job.batch_size,
                busy_s=batches / 500,
                loss=1.0,
            )
            self.node.report(
                job.scheduler.peer, Report(stamp=stamp, incarnation=incarnation, progress=progress)
            )
            if self.jobs.get("train") is not job:
                return
        part = Contribution(
            round=round_,
            worker=self.node.peer_id,
            incarnation=incarnation,
            samples=batches * job.batch_size,
            batches=batches,
            batch_size=job.batch_size,
            steps=self.steps,
            ranges=tuple(ranges),
            finished=tuple(finished),
            loss=1.0 / (round_ + 1),
        )
        self.steps += batches
        server = self.stage.actors[job.parameter_server.peer]
        self.stage.updates.append(part)
        await server.say("aggregate", received(part), twice=True)


@asynccontextmanager
async def data_node(
    network: Network | VirtualNetwork, gateway: Node, manifests: Sequence[Manifest] = (MANIFEST,)
) -> AsyncIterator[Node]:
    """What it says is the last of ``manifests`` at the time."""
    async with network.leaf("data", [gateway], roles=("data",)) as node:

        async def describe(caller: str, request: DescribeDataset) -> DatasetDescription:
            return DatasetDescription(manifest=manifests[-1], manifest_hash=manifest_hash(manifests[-1]))

        node.answer(DescribeDataset, describe)
        await node.provide("digits")
        yield node


@asynccontextmanager
async def actor(
    network: Network | VirtualNetwork,
    gateway: Node,
    stage: Stage,
    lease_service_of: Callable[..., LeaseService] = lambda *of, on_expired: LeaseService(
        Arbiter(*of), on_expired
    ),
    **traits: Any,
) -> AsyncIterator[Actor]:
    executors = (
        ExecutorDescriptor(kind="train", name="diloco-transformer"),
        ExecutorDescriptor(kind="aggregate", name="parameter-server"),
    )
    async with network.leaf("worker", [gateway], roles=("worker",)) as node, trio.open_nursery() as nursery:
        play = Actor(stage, node, nursery, **traits)
        stage.actors[node.peer_id] = play
        play.answer()

        def ended(lease: Lease) -> None:
            pass

        terms = OfferConfig(lease_s=15.0, temporary_lease_s=5.0)
        total = Resources(cpu=2, memory=8, storage=1)
        lease_service = lease_service_of(WorkerCapacity(total, executors), terms, node.ref, on_expired=ended)
        play.lease_service = lease_service
        await nursery.start(serve_offers, node, lease_service)
        yield play
        nursery.cancel_scope.cancel()


def config_for(
    network: Network | VirtualNetwork, gateway: Node, tmp_path: Path, **job: Any
) -> SchedulerConfig:
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    described: dict[str, Any] = {
        "name": "digits",
        "model": {"type": "image-classification", "path": str(tmp_path / "model")},
        "dataset": {"dataset": "digits", "wait_s": 5.0},
        "rounds": {"update_rounds": 4, "avg_samples_between_updates": 120, "batch_size": 5, "deadline_s": 5},
        "resources": {"num_workers": 2, "worker": {"cpu": 1, "memory": 1}, "parameter_server": {"cpu": 1}},
        "checkpoint": {"every_rounds": 2, "keep": 1},
        # there is no model to try a batch on
        "check": "quick",
        "output": str(tmp_path / "out"),
        **job,
    }
    return SchedulerConfig.model_validate(
        {
            **network.settings("scheduler", [gateway]),
            "state_dir": tmp_path / "state",
            "scheduler": {"job": described},
        }
    )


@pytest.mark.loopback
async def test_a_job_from_its_configuration_to_its_model(
    real_network: Network, tmp_path: Path, signals: Signals
) -> None:
    stage, seen = Stage(tmp_path), list[JobSnapshot]()
    async with (
        real_network.gateway() as gateway,
        data_node(real_network, gateway),
        data_node(real_network, gateway),
    ):
        async with actor(real_network, gateway, stage) as one, actor(real_network, gateway, stage) as two:
            with trio.fail_after(40):
                journal = Journal(file=tmp_path / "journal.jsonl", checked=True)
                config = config_for(real_network, gateway, tmp_path)
                result = await run_job(config, Observation(seen.append, journal, 1.0))
                journal.close()
            await until(lambda: one.finished | two.finished == {"train", "aggregate"})
            await until(lambda: "train" in one.finished and "train" in two.finished)
    assert isinstance(result, JobResult)
    assert (result.rounds, result.workers, result.theta) == (4, 2, "t4")
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "hypha.json"}
    with closing(Ledger(tmp_path / "state" / "digits" / "job.db")) as book:
        assert book.leases() == []
    ledger = read_ledger(result.ledger)
    assert [(entry.round, entry.theta) for entry in ledger.rounds] == [
        (0, "t1"),
        (1, "t2"),
        (2, "t3"),
        (3, "t4"),
    ]
    assert ledger.theta == "t0"
    again = rerun(tmp_path / "journal.jsonl")
    assert again.difference is None
    assert again.machines == 5, "rounds, allocator, and the renewal of each of three leases"
    assert not again.without_beginning
    assert not (tmp_path / "state" / "digits" / "journal.jsonl").exists(), "nothing failed"
    assert all(len(entry.contributors) == 2 for entry in ledger.rounds)
    assert sum(entry.samples for entry in ledger.rounds) == result.samples
    used = [pair for entry in ledger.rounds for part in entry.contributors for pair in part.finished]
    assert len(used) == len(set(used))
    assert read_ledger(tmp_path / "state" / "digits" / "job.db") == ledger
    kept = [path.name for path in (tmp_path / "state" / "digits" / "checkpoints").iterdir()]
    assert kept == ["round-4"]
    states = [snapshot.state for snapshot in seen]
    assert {"allocating", "training", "done"} <= set(states)
    check_signals(signals, result, [*one.traced, *two.traced])
    assert seen[-1].output == str(out)
    assert any(len(snapshot.workers) == 2 for snapshot in seen)


def check_signals(signals: Signals, result: JobResult, traced: list[Traced | None]) -> None:
    """What a finished job leaves in traces and metrics."""
    (job,) = signals.spans("Run job")
    assert (job.attributes or {})["hypha.job"] == result.job_id
    dispatched = {
        identifiers_of(span) for span in signals.spans("Dispatch job") if signals.parent_of(span) == job
    }
    assert len(dispatched) == 3
    assert {identifiers(told.traceparent) for told in traced if told is not None} == dispatched
    rounds = signals.spans("Round")
    assert [(span.attributes or {})["hypha.round"] for span in rounds] == [0, 1, 2, 3]
    for number, span in enumerate(rounds):
        assert identifiers_of(span) == identifiers(round_traceparent(result.job_id, 0, number, 1.0))
        linked = {f"{one.context.trace_id:032x}-{one.context.span_id:016x}" for one in span.links}
        assert linked == dispatched
        plans = [one for one in signals.spans("Plan") if signals.parent_of(one) == span]
        assert {(one.attributes or {})["hypha.round"] for one in plans} == {number}
    for advertised in signals.spans("Publish task advertisement"):
        assert signals.parent_of(advertised) == job
    assert signals.reading(metrics.JOB_SAMPLES) == result.samples
    assert signals.reading(metrics.SYNCHRONIZATIONS) == 4
    assert signals.reading(metrics.JOB_DURATION, status="done") == 1
    assert not signals.readings(metrics.ACTIVE_WORKERS), "the job is over"


def identifiers(traceparent: str) -> str:
    """Of trace and span."""
    return traceparent[3:52]


def identifiers_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}-{span.context.span_id:016x}"


@virtual_time
async def test_a_snapshot_shows_a_round_with_its_own_numbers(network: VirtualNetwork, tmp_path: Path) -> None:
    """However long the disk takes."""
    network.runtime.blocking_s = 0.5
    stage, seen = Stage(tmp_path), list[JobSnapshot]()
    async with network.gateway() as gateway, data_node(network, gateway):
        async with actor(network, gateway, stage), actor(network, gateway, stage):
            with trio.fail_after(40):
                await network.run_job(config_for(network, gateway, tmp_path), Observation(seen.append))
    rounds = {snapshot.round for snapshot in seen}
    numbers = {(snapshot.round, snapshot.samples, snapshot.loss) for snapshot in seen}
    assert 4 in rounds
    assert len(numbers) == len(rounds)


@virtual_time
async def test_a_failed_executor_is_started_again_under_its_lease_and_in_the_end_replaced(
    network: VirtualNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage, seen = Stage(tmp_path), list[JobSnapshot]()
    resources = {"num_workers": 2, "worker": {"cpu": 1, "memory": 1}, "parameter_server": {"cpu": 1}}
    async with network.gateway() as gateway, data_node(network, gateway):
        async with actor(network, gateway, stage) as one, actor(network, gateway, stage) as two:
            one.mortal, two.mortal = [1], [2, 2]
            config = config_for(network, gateway, tmp_path, resources=resources | {"executor_restarts": 1})
            with trio.fail_after(40):
                result = await network.run_job(config, Observation(seen.append))
    assert one.replaced == one.died
    # the second time its worker was replaced, in want of others by itself
    assert two.replaced == two.died[:1]
    assert len(two.died) == 2
    assert caplog.text.count("An executor is started again") == 2
    assert "ended with exit code -9\nlast words" in caplog.text
    assert caplog.text.count("A worker is replaced") == 1
    # both are needed: the round is kept meanwhile
    assert any(snapshot.state == "paused" and "started again" in snapshot.message for snapshot in seen)
    leases = {each.lease for snapshot in seen for each in snapshot.workers if each.peer == one.node.peer_id}
    # none is held any more when the last snapshot is taken
    assert len(leases - {""}) == 1
    assert {entry.generation for entry in read_ledger(result.ledger).rounds} == {0}


@virtual_time
async def test_a_job_that_does_not_wait_begins_with_few_and_the_rest_joins(
    network: VirtualNetwork, tmp_path: Path
) -> None:
    stage, seen = Stage(tmp_path), list[JobSnapshot]()
    resources = {"num_workers": 2, "min_workers": 1, "start_grace_s": 0.2, "parameter_server": {"cpu": 1}}
    rounds = {"update_rounds": 30, "avg_samples_between_updates": 120, "batch_size": 5, "deadline_s": 5}
    config = {"resources": resources, "rounds": rounds}
    async with network.gateway() as gateway, data_node(network, gateway), trio.open_nursery() as nursery:
        async with actor(network, gateway, stage) as one:
            results: list[JobResult] = []

            async def run() -> None:
                made = config_for(network, gateway, tmp_path, **config)
                results.append(await network.run_job(made, Observation(seen.append)))

            nursery.start_soon(run)
            await until(lambda: bool(seen) and seen[-1].round >= 2, 20)
            assert [each.peer for each in seen[-1].workers] == [one.node.peer_id]
            async with actor(network, gateway, stage):
                await until(lambda: bool(results), 40)
    crews = [len(entry.contributors) for entry in read_ledger(results[0].ledger).rounds]
    assert (crews[0], crews[-1]) == (1, 2)


@virtual_time
async def test_a_job_without_a_word_about_batches_has_none_of_one_and_says_so_once(
    network: VirtualNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stage = Stage(tmp_path)
    rounds = {"update_rounds": 1, "avg_samples_between_updates": 40, "deadline_s": 5}
    async with network.gateway() as gateway, data_node(network, gateway):
        async with actor(network, gateway, stage), actor(network, gateway, stage):
            with trio.fail_after(40):
                result = await network.run_job(config_for(network, gateway, tmp_path, rounds=rounds))
    (entry,) = read_ledger(result.ledger).rounds
    assert [part.batch_size for part in entry.contributors] == [16, 16]
    assert caplog.text.count("trains with batches of 16 samples") == 1


@virtual_time
async def test_a_lost_parameter_server_is_restored_elsewhere(network: VirtualNetwork, tmp_path: Path) -> None:
    stage = Stage(tmp_path, crash_at=3)
    async with network.gateway() as gateway, data_node(network, gateway):
        async with actor(network, gateway, stage), actor(network, gateway, stage):
            with trio.fail_after(60):
                result = await network.run_job(config_for(network, gateway, tmp_path))
    assert stage.crash_at == -1
    assert stage.restored == [2]
    assert result.theta == "t4"
    ledger = read_ledger(result.ledger)
    counted = [entry for entry in ledger.rounds if not entry.discarded]
    assert [entry.round for entry in counted] == [0, 1, 2, 3]
    assert {entry.generation for entry in counted} == {0, 1}
    used = [pair for entry in counted for part in entry.contributors for pair in part.finished]
    assert len(used) == len(set(used))
    # the other parameter server takes the same outer steps, and they are those of the ledger
    assert [generation for generation, _ in stage.optimizers] == [0, 1]
    assert {one for _, one in stage.optimizers} == {ledger.aggregate.optimizer}
    assert ledger.aggregate.optimizer == OuterOptimizer(*outer_defaults(4))


def labelled(high: int) -> Manifest:
    """A dataset of images with labels up to that."""
    columns = (
        Column(name="labels", dtype="I64", shape=()),
        Column(name="pixel_values", dtype="F32", shape=(1, 8, 8)),
    )
    ranges = (ColumnRange(column="labels", low=0, high=high),)
    return msgspec.structs.replace(MANIFEST, columns=columns, ranges=ranges)


@virtual_time
async def test_a_stopped_job_is_resumed_and_leaves_no_lease(
    network: VirtualNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether model and dataset go together is checked before it begins, and no more once it has trained."""
    caplog.set_level(logging.INFO)
    stage = Stage(tmp_path)
    manifests = [labelled(9)]
    async with network.gateway() as gateway, data_node(network, gateway, manifests=manifests):
        async with actor(network, gateway, stage) as one, actor(network, gateway, stage) as two:
            config = config_for(network, gateway, tmp_path)
            with trio.fail_after(40), pytest.raises(ConfigError, match="labels runs from 0 to 9"):
                await network.run_job(config)
            assert "Looking for" not in caplog.text
            assert not (tmp_path / "state/digits/job.db").exists(), "there is nothing to move aside"
            manifests.append(labelled(1))
            with trio.CancelScope() as scope:

                def stop(snapshot: JobSnapshot) -> None:
                    if snapshot.checkpoint == 2:
                        scope.cancel()

                began = trio.current_time()
                with trio.fail_after(40):
                    await network.run_job(config, Observation(stop))
            assert scope.cancelled_caught
            assert trio.current_time() - began < 40
            assert not one.jobs
            assert not two.jobs
            assert "Looking for" in caplog.text
            applied = len(read_ledger(tmp_path / "state/digits/job.db").rounds)
            manifests.append(labelled(9))
            with trio.fail_after(40):
                result = await network.run_job(config)
    ledger = read_ledger(result.ledger)
    counted = [entry for entry in ledger.rounds if not entry.discarded]
    assert [entry.round for entry in counted] == [0, 1, 2, 3]
    if scope.cancelled_caught:
        assert stage.restored == [applied]
        assert counted[-1].generation == 1


@virtual_time
@pytest.mark.parametrize("saves", [True, False])
async def test_a_stopped_job_goes_on_from_the_round_it_was_in(
    network: VirtualNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture, saves: bool
) -> None:
    caplog.set_level("INFO", "hypha.scheduler")
    stage = Stage(tmp_path, saves=saves)
    rounds = {"update_rounds": 6, "avg_samples_between_updates": 960, "batch_size": 5, "deadline_s": 5}
    async with network.gateway() as gateway, data_node(network, gateway):
        async with actor(network, gateway, stage), actor(network, gateway, stage):
            config = config_for(network, gateway, tmp_path, rounds=rounds)
            with trio.CancelScope() as scope:

                def stop(snapshot: JobSnapshot) -> None:
                    if snapshot.round == 3 and snapshot.checkpoint == 2:
                        scope.cancel()

                with trio.fail_after(40):
                    await network.run_job(config, Observation(stop))
            assert scope.cancelled_caught
            # one more may have been applied meanwhile; it is not lost either
            applied = [entry.round for entry in read_ledger(tmp_path / "state/digits/job.db").rounds]
            with trio.fail_after(40):
                result = await network.run_job(config)
    ledger = read_ledger(result.ledger)
    discarded = [entry.round for entry in ledger.rounds if entry.discarded]
    assert len(applied) >= 3
    if saves:
        assert stage.restored == [len(applied)]
        assert discarded == []
        assert f"The job will go on from round {len(applied)}" in caplog.text
    else:
        assert stage.restored == [2]
        assert discarded == applied[2:]
        assert "could not be saved in time; the job will go on from round 2" in caplog.text
    assert [entry.round for entry in ledger.rounds if not entry.discarded] == list(range(6))


@virtual_time
async def test_a_job_that_is_done_stays_so_and_can_have_more_rounds(
    network: VirtualNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hypha.scheduler.job.opening")
    stage = Stage(tmp_path)

    def config(rounds: int, **job: Any) -> SchedulerConfig:
        lengths = {"avg_samples_between_updates": 120, "batch_size": 5, "deadline_s": 5}
        return config_for(network, gateway, tmp_path, rounds={"update_rounds": rounds, **lengths}, **job)

    async with network.gateway() as gateway, data_node(network, gateway):
        async with actor(network, gateway, stage), actor(network, gateway, stage):
            assert await finished_job(tmp_path / "state", config(3).scheduler.job) is None
            with trio.fail_after(40):
                result = await network.run_job(config(3))
            state = tmp_path / "state" / "digits"
            before = {path: path.stat().st_mtime_ns for path in state.rglob("*") if path.is_file()}
            for rounds in (3, 2):
                done = await finished_job(tmp_path / "state", config(rounds).scheduler.job)
                assert done is not None
                assert (done.job_id, done.rounds, done.theta) == (result.job_id, 3, "t3")
                assert (done.samples, done.output) == (result.samples, str(tmp_path / "out"))
            after = {path: path.stat().st_mtime_ns for path in state.rglob("*") if path.is_file()}
            assert {path for path in after if path.suffix != ".db-shm"} >= set(before)
            assert not (state / "old-1").exists()
            # another job of that name is another matter
            optimizer = {"learning_rate": 0.5, "momentum": 0.25}
            other = config(3, outer_optimizer=optimizer).scheduler.job
            assert await finished_job(tmp_path / "state", other) is None
            with trio.fail_after(20), pytest.raises(ConfigError, match="momentum is 0"):
                await network.run_job(config(5, outer_optimizer=optimizer))
            # the model is to be elsewhere: it is exported again, and nothing is trained
            elsewhere = config(3, output=str(tmp_path / "elsewhere"))
            assert await finished_job(tmp_path / "state", elsewhere.scheduler.job) is None
            trained = len(stage.updates)
            with trio.fail_after(40):
                copied = await network.run_job(elsewhere)
            assert copied.output == str(tmp_path / "elsewhere")
            assert (tmp_path / "elsewhere" / "hypha.json").is_file()
            assert len(stage.updates) == trained
            assert await finished_job(tmp_path / "state", config(3).scheduler.job) is None

            assert await finished_job(tmp_path / "state", config(5).scheduler.job) is None
            stage.restored.clear()
            with trio.fail_after(40):
                longer = await network.run_job(config(5))
    assert longer.job_id == result.job_id
    assert (longer.rounds, longer.theta) == (5, "t5")
    assert stage.restored == [3]
    counted = [entry for entry in read_ledger(longer.ledger).rounds if not entry.discarded]
    assert [(entry.round, entry.generation) for entry in counted] == [(0, 0), (1, 0), (2, 0), (3, 2), (4, 2)]
    assert not (state / "old-1").exists()
    # what was chosen for three rounds stays, though five would have more momentum: a job is replayed with one
    began = OuterOptimizer(*outer_defaults(3))
    assert began != OuterOptimizer(*outer_defaults(5))
    assert stage.optimizers == [(0, began), (1, began), (2, began)]
    assert read_ledger(longer.ledger).aggregate.optimizer == began
    told = [line for line in caplog.messages if line.startswith("The outer optimizer has")]
    assert [line.split(", ")[1].split(";")[0] for line in told] == [
        "chosen by update_rounds = 3",
        "chosen by update_rounds = 3",
        "with which the job began",
    ]
    assert "started anew with 5 rounds it would have learning rate 1, momentum 0.5" in told[-1]


@virtual_time
async def test_a_job_that_failed_before_its_first_round_takes_a_corrected_configuration(
    network: VirtualNetwork, tmp_path: Path
) -> None:
    stage = Stage(tmp_path)
    async with network.gateway() as gateway, data_node(network, gateway):
        async with actor(network, gateway, stage, model_error="no such class") as one:
            async with actor(network, gateway, stage, model_error="no such class") as two:
                with trio.fail_after(40), pytest.raises(HyphaError):
                    await network.run_job(config_for(network, gateway, tmp_path))
                one.model_error = two.model_error = ""
                corrected = {"type": "image-classification", "path": str(tmp_path / "model"), "seed": 7}
                with trio.fail_after(40):
                    result = await network.run_job(config_for(network, gateway, tmp_path, model=corrected))
    assert result.rounds == 4
    assert [entry.generation for entry in read_ledger(result.ledger).rounds] == [0] * 4
    assert (tmp_path / "state" / "digits" / "old-1" / "job.db").is_file(), "what was there is kept"


@virtual_time
async def test_an_unfinished_job_is_not_mistaken_for_another_one(
    network: VirtualNetwork, tmp_path: Path
) -> None:
    stage = Stage(tmp_path)
    async with network.gateway() as gateway, data_node(network, gateway):
        async with actor(network, gateway, stage), actor(network, gateway, stage):
            with trio.CancelScope() as scope:

                def stop(snapshot: JobSnapshot) -> None:
                    if snapshot.round:
                        scope.cancel()

                with trio.fail_after(40):
                    await network.run_job(config_for(network, gateway, tmp_path), Observation(stop))
            assert scope.cancelled_caught
            optimizer = {"learning_rate": 0.5, "momentum": 0.25}
            changed = config_for(network, gateway, tmp_path, outer_optimizer=optimizer)
            with trio.fail_after(20), pytest.raises(ConfigError, match="--fresh") as caught:
                await network.run_job(changed)
            assert "aggregate.optimizer.momentum is 0.25 now and was " in str(caught.value)
            assert caught.value.exit_code == 2
            with trio.fail_after(40):
                result = await network.run_job(changed, fresh=True)
    ledger = read_ledger(result.ledger)
    assert [(entry.round, entry.generation) for entry in ledger.rounds] == [(n, 0) for n in range(4)]
    assert (tmp_path / "state" / "digits" / "old-1" / "job.db").is_file()


@virtual_time
@pytest.mark.parametrize(
    ("changes", "error", "exit_code", "says"),
    [
        ({"output": "/proc/nowhere/out"}, OutputError, 6, "/proc/nowhere"),
        ({"dataset": {"dataset": "nothing", "wait_s": 1.0}}, DatasetNotFound, 3, "nothing"),
        (
            {"resources": {"num_workers": 2, "worker": {"gpu": 10, "cpu": 1}, "wait_s": 2.0}},
            AllocationFailed,
            4,
            "gpu=10",
        ),
        (
            {
                "model": {"type": "torch", "entrypoint": "models:make", "loss": "bce-with-logits"},
                "resources": {"num_workers": 1, "parameter_server": {"cpu": 1}, "wait_s": 2.0},
            },
            AllocationFailed,
            4,
            "offered, but without multi-label: upgrade it",
        ),
    ],
)
async def test_what_cannot_be_had_ends_with_its_own_exit_code(
    network: VirtualNetwork,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[HyphaError],
    exit_code: int,
    says: str,
) -> None:
    stage = Stage(tmp_path)
    async with (
        network.gateway() as gateway,
        data_node(network, gateway),
        actor(network, gateway, stage, lease_service_of=earlier_lease_service),
    ):
        with trio.fail_after(20), pytest.raises(error, match=says) as caught:
            await network.run_job(config_for(network, gateway, tmp_path, **changes))
    assert caught.value.exit_code == exit_code
    left = tmp_path / "state" / "digits" / "journal.jsonl"
    assert left.exists() == (error is AllocationFailed), "left where machines were at work"
    if left.exists():
        about, *entries = map(json.loads, left.read_bytes().splitlines())
        assert about["about"]["state"] == "failed"
        assert says in about["about"]["message"]
        (failed,) = [entry for entry in entries if "Fail" in {one["type"] for one in entry["actions"]}]
        assert failed["actions"][0]["error"] == {"error": "AllocationFailed", "text": str(caught.value)}
        assert failed["state"]["phase"] == "failed"


@virtual_time
async def test_a_model_that_cannot_be_loaded_ends_the_job(network: VirtualNetwork, tmp_path: Path) -> None:
    stage, error = Stage(tmp_path), "config.json is no model"
    async with network.gateway() as gateway, data_node(network, gateway):
        async with actor(network, gateway, stage, model_error=error) as one:
            async with actor(network, gateway, stage, model_error=error) as two:
                with trio.fail_after(30), pytest.raises(ModelError, match=error) as caught:
                    await network.run_job(config_for(network, gateway, tmp_path))
                await until(lambda: not one.jobs or not two.jobs)
    assert caught.value.exit_code == 5

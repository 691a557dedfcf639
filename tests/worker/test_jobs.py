"""Whole workers over loopback: a scheduler leases, dispatches, steers; real executors run.

The scheduler's node also plays data node and, for training jobs, parameter server.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from blake3 import blake3
from msgspec.structs import replace
from tests.support.network import LOOPBACK, Network, address_of, until
from tests.support.stopwatch import Stopwatch

from hypha.config.models import WorkerConfig
from hypha.errors import Refused
from hypha.messages import (
    Acknowledged,
    AggregateJob,
    CancelJob,
    Directive,
    DispatchJob,
    Event,
    ExecutorClass,
    ExecutorDescriptor,
    ExecutorExited,
    FileList,
    Finish,
    Health,
    HealthReport,
    Job,
    JobStamp,
    ListFiles,
    Loaded,
    Members,
    ModelReady,
    ModelSpec,
    NextSlice,
    PeerRef,
    Progress,
    PullFile,
    ReleaseLease,
    RenewLease,
    Report,
    ReportEvent,
    Resources,
    RoundApplied,
    RoundStarted,
    SliceAssigned,
    Steer,
    TrainJob,
    TransferMeta,
    WorkerOffer,
    WorkerRequest,
)
from hypha.net import Libp2pNode as Node
from hypha.net.bulk.transfers import meta_of
from hypha.worker.node import run_worker

pytestmark = pytest.mark.loopback

SCRIPT = Path(__file__).with_name("executor_script.py")


@pytest.fixture
def network(tmp_path: Path) -> Network:
    return Network(tmp_path / "pki")


@dataclass
class Scheduler:
    """What a scheduler does on the wire, and what it heard."""

    node: Node
    directory: Path
    offers: dict[str, WorkerOffer] = field(default_factory=dict)
    events: list[ReportEvent] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    asked: list[NextSlice] = field(default_factory=list)
    updates: list[tuple[str, TransferMeta]] = field(default_factory=list)
    seq: int = 0

    def start(self) -> None:
        self.node.answer(WorkerOffer, self._offer)
        self.node.answer(ReportEvent, self._event)
        self.node.answer(NextSlice, self._slice)
        self.node.answer_reports(lambda caller, reports: self.reports.extend(reports))
        self.node.transfers.serve("slice", self._serve)
        self.node.transfers.accept("update", None, self._gate, self._arrived)

    async def _offer(self, caller: str, offer: WorkerOffer) -> Acknowledged:
        self.offers[offer.request_id] = offer
        return Acknowledged()

    async def _event(self, caller: str, report: ReportEvent) -> Acknowledged:
        if report not in self.events:
            self.events.append(report)
        return Acknowledged()

    def _file(self, index: int) -> Path:
        path = self.directory / f"slice-{index}"
        path.write_bytes(bytes([index]) * 1000)
        return path

    async def _slice(self, caller: str, request: NextSlice) -> SliceAssigned:
        self.asked.append(request)
        data = self._file(request.seq).read_bytes()
        return SliceAssigned(
            dataset="digits",
            index=request.seq,
            epoch=0,
            samples=2,
            size=len(data),
            blake3=blake3(data).hexdigest(),
            providers=(self.node.ref(),),
        )

    async def _serve(self, caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        path = self._file(int(request.name.rpartition("/")[2]))
        return path, await meta_of(path, "slice", request.name)

    async def _gate(self, caller: str, meta: TransferMeta) -> Path:
        return self.directory / f"update-{len(self.updates)}"

    async def _arrived(self, caller: str, meta: TransferMeta, path: Path) -> None:
        self.updates.append((caller, meta))

    async def lease(self, kind: ExecutorClass, name: str, request_id: str) -> WorkerOffer:
        request = WorkerRequest(
            request_id=request_id,
            scheduler=self.node.ref(),
            resources=Resources(cpu=1, memory=1),
            executor=ExecutorDescriptor(kind=kind, name=name),
            count=1,
            bid=1.0,
            offer_within_s=2.0,
        )
        with trio.fail_after(20):
            while request_id not in self.offers:
                await self.node.publish(request)
                with trio.move_on_after(1):
                    await until(lambda: request_id in self.offers)
        offer = self.offers[request_id]
        await self.node.request(offer.worker, RenewLease(lease_id=offer.lease_id))
        return offer

    async def dispatch(self, offer: WorkerOffer, job: Job, instead_of: str = "") -> None:
        request = DispatchJob(lease_id=offer.lease_id, job=job, instead_of=instead_of)
        await self.node.request(offer.worker, request)

    async def steer(
        self, worker: PeerRef, kind: ExecutorClass, directive: Directive, generation: int = 0
    ) -> None:
        self.seq += 1
        stamp = JobStamp(job_id="job", generation=generation)
        await self.node.request(worker, Steer(stamp=stamp, kind=kind, seq=self.seq, directive=directive))

    async def theta(
        self,
        worker: PeerRef,
        round_: int,
        contributors: tuple[str, ...] = (),
        generation: int = 0,
        attempt: int = 0,
    ) -> None:
        path = self.directory / f"theta-{round_}"
        path.write_bytes(b"t" * (round_ + 1))
        stamp = JobStamp(job_id="job", generation=generation, round=round_, attempt=attempt)
        meta = replace(await meta_of(path, "theta", path.name, stamp), contributors=contributors)
        await self.node.transfers.send(worker, path, meta)

    def heard(self, kind: type[Event], incarnation: str | None = None) -> list[Any]:
        return [
            report.event
            for report in self.events
            if isinstance(report.event, kind) and incarnation in (None, report.incarnation)
        ]

    async def exit(self, count: int = 1) -> ExecutorExited:
        await until(lambda: len(self.heard(ExecutorExited)) >= count, 20)
        ended: ExecutorExited = self.heard(ExecutorExited)[count - 1]
        return ended


@dataclass
class System:
    scheduler: Scheduler
    gateway: Node
    worker: PeerRef
    scope: trio.CancelScope
    work_dir: Path
    others: dict[str, PeerRef] = field(default_factory=dict)

    def train(self, parameter_server: PeerRef | None = None, generation: int = 0, **changes: Any) -> TrainJob:
        fields: dict[str, Any] = {
            "job_id": "job",
            "generation": generation,
            "executor": ExecutorDescriptor(kind="train", name="echo"),
            "me": self.worker.peer,
            "scheduler": self.scheduler.node.ref(),
            "parameter_server": parameter_server or self.scheduler.node.ref(),
            "model": ModelSpec(task="causal-lm"),
            "dataset": "digits",
            "batch_size": 2,
        }
        return TrainJob(**{**fields, **changes})

    def server(self, name: str) -> AggregateJob:
        return AggregateJob(
            job_id="job",
            generation=0,
            executor=ExecutorDescriptor(kind="aggregate", name=name),
            me=self.worker.peer,
            scheduler=self.scheduler.node.ref(),
            model=ModelSpec(task="causal-lm"),
        )

    def directories(self) -> list[str]:
        return [path.name for path in self.work_dir.iterdir() if "hypha-" in path.name]


def configuration(network: Network, gateway: Node, work_dir: Path, **changes: Any) -> WorkerConfig:
    files = network.pki.files("worker", ("worker",))
    executors = [
        {"class": kind, "name": name, "cmd": sys.executable, "args": [str(SCRIPT), "{SOCKET_PATH}", name]}
        for kind, name in [
            ("train", "echo"),
            ("train", "crash"),
            ("train", "sleep"),
            ("train", "peek"),
            ("train", "hang"),
            ("aggregate", "gather"),
            ("aggregate", "pulse"),
        ]
    ]
    return WorkerConfig.model_validate(
        {
            "cert_pem": files.cert,
            "key_pem": files.key,
            "trust_pem": files.trust,
            "listen_addresses": list(LOOPBACK),
            "gateway_addresses": [address_of(gateway)],
            "exclude_cidr": [],
            "work_dir": work_dir,
            "resources": {"cpu": 4, "memory": 4},
            "offer": {"request_window_s": 0.05, "lease_s": 30.0},
            "executors": executors,
            "stop_grace_s": 0.3,
            "limits": {"enforce": "rlimit"},
            **changes,
        }
    )


@asynccontextmanager
async def system(network: Network, tmp_path: Path, **changes: Any) -> AsyncIterator[System]:
    directory = tmp_path / "scheduler"
    directory.mkdir()
    async with network.gateway() as gateway:
        async with (
            # it plays the parameter server and the data node, too
            network.leaf("scheduler", [gateway], roles=("scheduler", "worker", "data")) as node,
            trio.open_nursery() as nursery,
        ):
            scheduler = Scheduler(node, directory)
            scheduler.start()
            config = configuration(network, gateway, tmp_path / "work", **changes)
            worker = await nursery.start(run_worker_in, config)
            yield System(scheduler, gateway, worker[0], worker[1], tmp_path / "work")
            nursery.cancel_scope.cancel()


async def run_worker_in(
    config: WorkerConfig,
    *,
    task_status: trio.TaskStatus[tuple[PeerRef, trio.CancelScope]] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            ref = await nursery.start(run_worker, config)
            task_status.started((ref, scope))


async def test_training_job_from_lease_to_finish(network: Network, tmp_path: Path) -> None:
    async with system(network, tmp_path) as it:
        scheduler, worker = it.scheduler, it.worker
        offer = await scheduler.lease("train", "echo", "r")
        await scheduler.dispatch(offer, it.train())
        await scheduler.dispatch(offer, it.train())  # repeated: no second executor
        await until(lambda: scheduler.heard(Loaded), 20)
        for round_ in range(2):
            await scheduler.theta(worker, round_, (worker.peer,) if round_ else ())
            await until(lambda: len(scheduler.updates) > round_, 20)  # noqa: B023 - awaited in this turn
        assert [event.round for event in scheduler.heard(RoundStarted)] == [0, 1]
        assert [(caller, meta.stamp, meta.samples, meta.kind) for caller, meta in scheduler.updates] == [
            (worker.peer, JobStamp(job_id="job", round=round_), 2, "update") for round_ in range(2)
        ]
        assert (scheduler.directory / "update-0").read_bytes() == b"\x01" * 1000
        assert (scheduler.directory / "update-1").read_bytes() == b"\x02" * 1000
        await until(lambda: scheduler.reports)
        assert isinstance(scheduler.reports[-1].progress, Progress)
        await scheduler.steer(worker, "train", Finish())
        ended = await scheduler.exit()
        assert ended.exit_code == 0
        assert '"acknowledged":true' in ended.tail.replace(" ", "")
        assert len(scheduler.heard(Loaded)) == 1
        assert {report.incarnation for report in scheduler.events} == {ended.incarnation}
        assert [report.seq for report in scheduler.events] == list(range(1, len(scheduler.events) + 1))
        # the third slice was here before anybody asked for it
        assert [request.seq for request in scheduler.asked] == [1, 2, 3]
        assert [request.cached for request in scheduler.asked] == [(), (1,), (1, 2)]
        await until(lambda: it.directories() == [])


async def test_an_executor_that_cannot_be_started_is_reported(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError("no socket here")

    monkeypatch.setattr("hypha.worker.jobs.execution.bind_bridge", refuse)
    async with system(network, tmp_path) as it:
        await it.scheduler.dispatch(await it.scheduler.lease("train", "echo", "r"), it.train())
        ended = await it.scheduler.exit()
        assert ended.exit_code == 126
        assert "the worker could not start the executor: no socket here" in ended.tail


async def test_worker_left_out_of_a_round_starts_over_with_fresh_slices(
    network: Network, tmp_path: Path
) -> None:
    async with system(network, tmp_path) as it:
        scheduler, worker = it.scheduler, it.worker
        await scheduler.dispatch(await scheduler.lease("train", "echo", "r"), it.train())
        await until(lambda: scheduler.heard(Loaded), 20)
        await scheduler.theta(worker, 0)
        await until(lambda: scheduler.updates and len(scheduler.asked) == 2, 20)
        await scheduler.theta(worker, 1, ("somebody else",))
        await until(lambda: len(scheduler.updates) == 2, 20)
        # slice 2 was fetched ahead in round 0 and went back to the scheduler: it is not trained on here
        assert (scheduler.directory / "update-1").read_bytes() == b"\x03" * 1000
        assert [request.stamp.round for request in scheduler.asked[:3]] == [0, 0, 1]
        with pytest.raises(Refused, match="stale"):
            await scheduler.theta(worker, 0)
        # the update of round 1 was refused: the same theta, to begin the round anew with other slices
        await scheduler.theta(worker, 1, ("somebody else",), attempt=1)
        await until(lambda: len(scheduler.updates) == 3, 20)
        stamps = [(request.stamp.round, request.stamp.attempt) for request in scheduler.asked]
        assert stamps[:5] == [(0, 0), (0, 0), (1, 0), (1, 0), (1, 1)]
        # the one that was fetched ahead in the first attempt is not trained on
        assert (scheduler.directory / "update-2").read_bytes() == b"\x05" * 1000


async def test_crash_is_reported_and_its_directory_kept(network: Network, tmp_path: Path) -> None:
    async with system(network, tmp_path) as it:
        offer = await it.scheduler.lease("train", "crash", "r")
        job = it.train(executor=ExecutorDescriptor(kind="train", name="crash"))
        await it.scheduler.dispatch(offer, job)
        ended = await it.scheduler.exit()
        assert (ended.exit_code, ended.tail) == (3, "something is wrong")
        await until(lambda: [name[:12] for name in it.directories()] == ["failed-hypha"])
        # the end is known, so the same dispatch now means: once more
        await it.scheduler.dispatch(offer, job)
        assert (await it.scheduler.exit(2)).incarnation != ended.incarnation


async def test_an_executor_does_not_get_at_the_files_of_its_workers_other_jobs(
    network: Network, tmp_path: Path
) -> None:
    """Another scheduler knows the worker by its own lease, and would give it its model."""
    async with (
        system(network, tmp_path) as it,
        network.leaf("scheduler", [it.gateway], roles=("scheduler",)) as other,
    ):
        asked: list[str] = []

        async def list_files(caller: str, request: ListFiles) -> FileList:
            asked.append(caller)
            return FileList(files=())

        other.answer(ListFiles, list_files)
        offer = await it.scheduler.lease("train", "peek", "r")
        executor = ExecutorDescriptor(kind="train", name="peek")
        await it.scheduler.dispatch(offer, it.train(other.ref(), executor=executor))
        ended = await it.scheduler.exit()
        assert "403" in ended.tail
        assert "the scheduler of its own job alone" in ended.tail
        assert asked == []


async def test_parameter_server_and_training_on_one_worker(network: Network, tmp_path: Path) -> None:
    async with system(network, tmp_path) as it:
        scheduler, worker = it.scheduler, it.worker
        aggregate = await scheduler.lease("aggregate", "gather", "a")
        train = await scheduler.lease("train", "echo", "t")
        await scheduler.dispatch(aggregate, it.server("gather"))
        await scheduler.dispatch(train, it.train())
        await until(lambda: scheduler.heard(Loaded) and scheduler.heard(ModelReady), 20)
        health = await scheduler.node.request(worker, Health())
        assert isinstance(health, HealthReport)
        assert health.details["jobs"] == "aggregate, train"
        path = scheduler.directory / "mine"
        path.write_bytes(b"x")
        stamp = JobStamp(job_id="job", round=6)
        mine = replace(await meta_of(path, "update", "mine", stamp), samples=1)
        await scheduler.steer(worker, "aggregate", Members(peers=(worker,)))
        with pytest.raises(Refused) as caught:  # the scheduler is no member
            await scheduler.node.transfers.send(worker, path, mine)
        assert caught.value.code == "uninvited"
        stray = await meta_of(path, "theta", "stray", stamp=JobStamp(job_id="other", round=6))
        with pytest.raises(Refused):
            await scheduler.node.transfers.send(worker, path, stray)
        await scheduler.steer(worker, "aggregate", Members(peers=(worker, scheduler.node.ref())))
        # theta goes to every member; this scheduler takes none, the worker's trainer knows another server
        await scheduler.node.transfers.send(worker, path, mine)
        await until(lambda: scheduler.heard(RoundApplied) or scheduler.heard(ExecutorExited), 30)
        ended = await scheduler.exit()
        assert "409" in ended.tail
        assert "uninvited" in ended.tail
        assert scheduler.heard(RoundApplied) == []


async def test_refusals_at_dispatch(network: Network, tmp_path: Path) -> None:
    async with system(network, tmp_path) as it:
        offer = await it.scheduler.lease("train", "echo", "r")

        async def code(job: Job, lease_id: str = offer.lease_id) -> str:
            with pytest.raises(Refused) as caught:
                await it.scheduler.node.request(it.worker, DispatchJob(lease_id=lease_id, job=job))
            return caught.value.code

        assert await code(it.train(), "nonsense") == "lease"
        assert await code(it.train(executor=ExecutorDescriptor(kind="train", name="crash"))) == "lease"
        assert await code(it.train(me="somebody")) == "invalid"
        assert await code(it.train(scheduler=PeerRef(peer="somebody"))) == "invalid"
        model = ModelSpec(task="torch", entrypoint="os:system")
        assert await code(it.train(model=model)) == "not-allowed"
        async with network.leaf("scheduler", [it.gateway], roles=("scheduler",)) as rival:
            job = it.train(scheduler=rival.ref())
            with pytest.raises(Refused) as caught:
                await rival.request(it.worker, DispatchJob(lease_id=offer.lease_id, job=job))
            assert caught.value.code == "lease"
        async with network.leaf("worker", [it.gateway], roles=("worker",)) as colleague:
            with pytest.raises(Refused) as caught:
                await colleague.request(it.worker, CancelJob(job_id="job", kind="train"))
            assert caught.value.code == "role"
        assert it.directories() == []


async def test_generations_and_cancellation(network: Network, tmp_path: Path) -> None:
    async with system(network, tmp_path) as it:
        scheduler = it.scheduler
        offer = await scheduler.lease("train", "echo", "r")
        await scheduler.dispatch(offer, it.train(generation=1))
        await until(lambda: len(scheduler.heard(Loaded)) == 1, 20)
        for generation in (0, 2):
            with pytest.raises(Refused, match="stale"):
                await scheduler.steer(it.worker, "train", Finish(), generation)
        with pytest.raises(Refused, match="stale"):
            await scheduler.theta(it.worker, 0, generation=0)
        with pytest.raises(Refused, match="stale"):
            await scheduler.dispatch(offer, it.train(generation=0))
        await scheduler.dispatch(offer, it.train(generation=2))
        await until(lambda: len(scheduler.heard(Loaded)) == 2, 20)
        first, second = scheduler.heard(Loaded)
        assert first.incarnation != second.incarnation
        await scheduler.theta(it.worker, 0, generation=2)
        await until(lambda: scheduler.updates, 20)
        await scheduler.node.request(it.worker, CancelJob(job_id="job", kind="train"))
        assert (await scheduler.exit(2)).exit_code != 0
        await until(lambda: it.directories() == [])
        with pytest.raises(Refused, match="not-found"):
            await scheduler.node.request(it.worker, CancelJob(job_id="none", kind="train"))


async def deaf_executor(it: System) -> psutil.Process:
    offer = await it.scheduler.lease("train", "sleep", "r")
    await it.scheduler.dispatch(offer, it.train(executor=ExecutorDescriptor(kind="train", name="sleep")))
    await until(lambda: it.scheduler.heard(Loaded), 20)
    return psutil.Process(int(it.scheduler.heard(Loaded)[0].incarnation))


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_a_hung_executor_is_killed_and_one_that_waits_is_not(network: Network, tmp_path: Path) -> None:
    async with system(network, tmp_path, hang_s=1.0) as it:
        scheduler = it.scheduler
        await scheduler.dispatch(await scheduler.lease("aggregate", "pulse", "a"), it.server("pulse"))
        await until(lambda: scheduler.heard(ModelReady), 20)
        waiting = psutil.Process(int(scheduler.heard(ModelReady)[0].theta))
        job = it.train(executor=ExecutorDescriptor(kind="train", name="hang"))
        await scheduler.dispatch(await scheduler.lease("train", "hang", "t"), job)
        await until(lambda: scheduler.heard(Loaded), 20)
        hung = psutil.Process(int(scheduler.heard(Loaded)[0].incarnation))
        ended = await scheduler.exit()
        assert ended.exit_code == -9
        first, *rest = ended.tail.splitlines()
        assert first.startswith("it hung: no sign of life for ")
        assert rest == ["about to hang"]
        assert is_gone(hung)
        # it had nothing to do all the time; and a stopped process does not even wait
        assert not is_gone(waiting)
        waiting.suspend()
        ended = await scheduler.exit(2)
        assert (ended.exit_code, ended.tail.splitlines()[0][:8]) == (-9, "it hung:")
        assert is_gone(waiting)


async def test_a_job_that_asks_for_less_patience_gets_it(network: Network, tmp_path: Path) -> None:
    async with system(network, tmp_path) as it:
        job = it.train(executor=ExecutorDescriptor(kind="train", name="hang"), hang_s=1.0)
        await it.scheduler.dispatch(await it.scheduler.lease("train", "hang", "t"), job)
        assert "(1 are allowed)" in (await it.scheduler.exit()).tail


async def test_an_executor_is_replaced_once_whoever_dispatches_it_again(
    network: Network, tmp_path: Path
) -> None:
    async with system(network, tmp_path) as it:
        scheduler = it.scheduler
        offer = await scheduler.lease("train", "echo", "r")
        await scheduler.dispatch(offer, it.train())
        await until(lambda: scheduler.heard(Loaded), 20)
        first = scheduler.heard(Loaded)[0].incarnation
        await scheduler.dispatch(offer, it.train(), instead_of=first)
        await scheduler.dispatch(offer, it.train(), instead_of=first)
        assert (await scheduler.exit()).incarnation == first
        await until(lambda: len(scheduler.heard(Loaded)) == 2, 20)
        await scheduler.dispatch(offer, it.train(), instead_of=first)
        await scheduler.steer(it.worker, "train", Finish())
        second = await scheduler.exit(2)
        assert (second.exit_code, second.incarnation) == (0, scheduler.heard(Loaded)[1].incarnation)


async def test_released_lease_stops_its_executor(network: Network, tmp_path: Path) -> None:
    async with system(network, tmp_path) as it:
        process = await deaf_executor(it)
        lease_id = it.scheduler.offers["r"].lease_id
        await it.scheduler.node.request(it.worker, ReleaseLease(lease_id=lease_id))
        await until(lambda: is_gone(process))
        assert (await it.scheduler.exit()).exit_code == -9
        # everything is free again
        await it.scheduler.lease("train", "sleep", "again")


async def test_expired_lease_stops_its_executor(network: Network, tmp_path: Path) -> None:
    offer = {"request_window_s": 0.05, "lease_s": 1.0}
    async with system(network, tmp_path, offer=offer, stop_grace_s=0.5) as it:
        process = await deaf_executor(it)
        await until(lambda: is_gone(process))


async def test_worker_that_ends_leaves_nothing(network: Network, tmp_path: Path) -> None:
    async with system(network, tmp_path, stop_grace_s=60.0) as it:
        process = await deaf_executor(it)
        started = Stopwatch()
        it.scope.cancel()
        await until(lambda: is_gone(process))
        await until(lambda: it.directories() == [])
        assert started.elapsed_s() < 5

"""Executors of a simulated world: they speak the bridge's words as the real ones do, and train a toy model.

What :mod:`hypha.executor.training` and :mod:`hypha.executor.parameter_server` do in threads is done here in
tasks of a simulated process, a child of its worker's: the inbox (``handover.Inbox``), the stream of rows,
update files, outer step, theta's files and checkpoints are the real code. A batch takes as long as the
machine's speed says.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import trio

from hypha.errors import CheckpointUnusable, DataError, HyphaError, NetworkError, PeerUnreachable, Refused
from hypha.executor import tensors
from hypha.executor.checkpoint import MOMENTUM, STATE, THETA, CheckpointState, read_checkpoint
from hypha.executor.handover import Inbox, UpdateToSend
from hypha.executor.losses import Losses
from hypha.executor.outer import OuterStep
from hypha.executor.running import kind_of
from hypha.executor.slices_reader import Slice
from hypha.executor.toy import ToyTrainer, toy_slice, toy_theta
from hypha.executor.updates import contribution_in
from hypha.messages import (
    AggregateJob,
    Alive,
    CheckpointSaved,
    CloseRound,
    Contribution,
    Directive,
    Event,
    ExecutorError,
    Export,
    Exported,
    FetchedFile,
    Finish,
    Job,
    Loaded,
    Local,
    Members,
    ModelReady,
    PeerRef,
    Peers,
    Progress,
    ReceivedFile,
    Reference,
    Rejoin,
    RoundApplied,
    RoundStarted,
    SaveCheckpoint,
    SchedulerData,
    SendCall,
    SendModel,
    Sent,
    TrainJob,
    UpdateReceived,
    UpdateRefused,
    UpdateSent,
)
from hypha.node import Changes
from hypha.runtime import chance
from hypha.simulation.process import SimulatedProcess, this_process
from hypha.worker.bridge import Desk
from hypha.worker.feeds import Feed
from hypha.worker.keepers import Launch
from hypha.worker.process import Exit
from hypha.worker.starting import EndSignals

logger = logging.getLogger("hypha.simulation")

T = TypeVar("T")

_ALIVE_S = 1.0
_FLUSH_S = 3.0
#: as in hypha.executor.handover and hypha.executor.parameter_server
_SEND_RETRY_S = 1.0
_PASSING_UPDATE = frozenset({"no-space", "busy", "not-found"})
_PASSING_EXPORT = frozenset({"uninvited", "stale", "no-space"})
_EXPORT_RETRY_S = 2.0
_SIGKILL, _SIGTERM = 9, 15


class Bridge:
    """An executor's end of it: calls run in the worker's process, events go there in order."""

    def __init__(self, desk: Desk, worker: SimulatedProcess, directory: Path) -> None:
        self.directory = directory
        self._desk = desk
        self._worker = worker
        self._events: deque[Event] = deque()
        self._changed = Changes()

    @property
    def job(self) -> Job:
        """What this executor is to do."""
        return self._desk.job

    async def fetch(self, reference: Reference) -> list[tuple[Path, FetchedFile]]:
        """Have the worker fetch ``reference``. Raises Refused and PeerUnreachable."""
        files = await self._asked(lambda: self._desk.fetch(reference))
        return [(self.directory / file.path, file) for file in files]

    async def send(self, call: SendCall) -> Sent:
        """Have the worker send a file. Raises Refused or PeerUnreachable when nobody acknowledged."""
        sent = await self._asked(lambda: self._desk.send(call))
        if not any(delivery.acknowledged for delivery in sent.deliveries):
            refused = [delivery for delivery in sent.deliveries if delivery.error != "unreachable"]
            worst = (refused or list(sent.deliveries))[0]
            if refused:
                raise Refused(worst.error, worst.detail)
            raise PeerUnreachable("behind the bridge", worst.detail)
        return sent

    async def _asked(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await self._worker.call(call)
        except Refused:
            raise
        except NetworkError as exc:
            raise PeerUnreachable("behind the bridge", str(exc)) from exc

    def relative(self, path: Path) -> str:
        """``path`` as the bridge wants it."""
        return path.relative_to(self.directory).as_posix()

    def report(self, event: Event) -> None:
        """Have ``event`` delivered."""
        if isinstance(event, Progress) and self._events and isinstance(self._events[-1], Progress):
            self._events.pop()
        if isinstance(event, Alive) and self._events:
            return
        self._events.append(event)
        self._changed.note()

    async def run(self) -> None:
        """Deliver events, until cancelled."""
        while True:
            while self._events:
                event = self._events[0]

                async def say(event: Event = event) -> None:
                    self._desk.say(event)

                await self._worker.call(say)
                if self._events and self._events[0] is event:
                    self._events.popleft()
                self._changed.note()
            await self._changed.wait()

    async def flush(self) -> None:
        """Wait until the worker has all events, for a few seconds."""
        with trio.move_on_after(_FLUSH_S):
            while self._events:
                await self._changed.wait()

    async def directives(self, handler: Callable[[Directive], None]) -> None:
        """Call ``handler`` for each, until cancelled."""
        await self._follow(self._desk.open_directives, handler)

    async def receive(self, kinds: tuple[str, ...], handler: Callable[[ReceivedFile], None]) -> None:
        """Call ``handler`` for each file that arrives, until cancelled."""
        await self._follow(lambda: self._desk.open_arrivals(frozenset(kinds)), handler)

    async def _follow(
        self, open_: Callable[[], AbstractContextManager[Feed[Any]]], handler: Callable[[Any], None]
    ) -> None:
        send, receive = trio.open_memory_channel[Any](float("inf"))

        async def pump() -> None:
            with open_() as feed:
                while True:
                    send.send_nowait(await feed.get())

        async def consume() -> None:
            async for item in receive:
                handler(item)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(consume)
            await self._worker.call(pump)


class SimulatedTrainer:
    """A training executor; see :mod:`hypha.executor.training`, whose steps it takes one by one."""

    def __init__(self, bridge: Bridge, job: TrainJob, batch_s: Callable[[], float]) -> None:
        self._bridge = bridge
        self._job = job
        self._batch_s = batch_s
        self._incarnation = bridge.directory.name
        self._inbox = Inbox(job.parameter_server, job.generation)
        self._changed = Changes()
        self._toy = ToyTrainer(job.steps)
        self._round, self._attempt, self._generation = -1, 0, job.generation
        self._hash = ""
        self._restarts = 0
        self._lost = False
        self._steps_there = job.steps
        self._last: Contribution | None = None
        self._sender: _UpdateSender | None = None
        self._ready: Slice | None = None
        self._dropped_before = (0, 0, 0)
        self._batches = self._samples = 0
        self._busy_s = 0.0
        self._first_steps = job.steps
        self._losses = Losses(trio.current_time())

    async def run(self, nursery: trio.Nursery) -> None:
        """Train until ``Finish``."""
        nursery.start_soon(self._bridge.receive, ("theta",), self._theta_arrived)
        nursery.start_soon(self._bridge.directives, self._direct)
        self._bridge.report(Loaded(incarnation=self._incarnation))
        nursery.start_soon(self._prefetch)
        while (theta := await self._wait_for_theta()) is not None:
            self._adopt(theta, nursery)
            await self._train_round(nursery)

    def _direct(self, directive: Directive) -> None:
        self._inbox.direct(directive)
        self._changed.note()

    # --- theta --------------------------------------------------------------------------------------

    def _theta_arrived(self, file: ReceivedFile) -> None:
        stamp, waiting = file.meta.stamp, self._inbox.theta
        seen = (self._generation, self._round, self._attempt)
        if waiting is not None and waiting.meta.stamp is not None:
            told = waiting.meta.stamp
            seen = (told.generation, told.round, told.attempt)
        at = (stamp.generation, stamp.round, stamp.attempt) if stamp is not None else (-1, -1, -1)
        superseded: ReceivedFile | None
        if at < max(seen, (self._inbox.lost_before, -1, -1)) or (
            waiting is not None and _same_theta(waiting, file)
        ):
            superseded = file
        else:
            superseded, self._inbox.theta = waiting, file
        if superseded is not None and (superseded is file or superseded.path != file.path):
            (self._bridge.directory / superseded.path).unlink(missing_ok=True)
        self._changed.note()

    async def _wait_for_theta(self) -> ReceivedFile | None:
        inbox = self._inbox
        while True:
            while not (self._interrupted() or inbox.rejoin is not None):
                await self._changed.wait()
            if inbox.finished:
                return None
            self._rejoin()
            theta, inbox.theta = inbox.theta, None
            if theta is not None and not self._repeated(theta):
                return theta

    def _interrupted(self) -> bool:
        return self._inbox.finished or self._inbox.theta is not None

    def _rejoin(self) -> None:
        inbox = self._inbox
        rejoin, inbox.rejoin = inbox.rejoin, None
        if rejoin is None:
            return
        self._steps_there = rejoin.steps
        theta = inbox.theta
        if rejoin.start_over:
            self._lost = self._round >= 0
            self._last = None
            if self._sender is not None:
                self._sender.stop()
            if self._round < 0:
                self._drop_before((rejoin.generation, 0, 0))
            stamp = theta.meta.stamp if theta is not None else None
            if theta is not None and (stamp is None or stamp.generation < rejoin.generation):
                inbox.theta = None
                (self._bridge.directory / theta.path).unlink(missing_ok=True)
        self._bridge.report(Loaded(incarnation=self._incarnation))
        if self._last is not None:
            self._bridge.report(UpdateSent(contribution=self._last))
        if self._round >= 0 and not self._lost:
            self._started()

    def _repeated(self, file: ReceivedFile) -> bool:
        stamp = file.meta.stamp
        if self._lost or stamp is None or (stamp.round, file.meta.blake3) != (self._round, self._hash):
            return False
        if stamp.attempt > self._attempt:
            return False
        (self._bridge.directory / file.path).unlink(missing_ok=True)
        self._started()
        return True

    def _overtaken(self) -> bool:
        self._rejoin()
        theta = self._inbox.theta
        if theta is not None and self._repeated(theta):
            self._inbox.theta = None
        return self._lost or self._interrupted()

    def _adopt(self, file: ReceivedFile, nursery: trio.Nursery) -> None:
        path = self._bridge.directory / file.path
        if self._toy.adopt(path) != file.meta.xxh3:
            raise DataError(f"theta in {path.name} is not what was sent; the worker's disk may be failing")
        path.unlink(missing_ok=True)
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.stop()
        stamp = file.meta.stamp
        at = (stamp.generation, stamp.round, stamp.attempt) if stamp is not None else (0, 0, 0)
        round_ = at[1]
        continued = round_ == self._round + 1 and not self._lost
        if sender is not None and continued and self._job.me in file.meta.contributors:
            self._last = sender.contribution
        elif self._round >= 0:
            self._start_over(at)
        self._generation, self._round, self._attempt = at
        self._hash, self._lost = file.meta.blake3, False
        self._first_steps = self._toy.inner.steps
        self._batches = self._samples = 0
        self._busy_s = 0.0
        self._toy.stream.start_round()
        self._losses = Losses(trio.current_time())
        self._started()

    def _started(self) -> None:
        self._bridge.report(RoundStarted(round=self._round, theta=self._hash, attempt=self._attempt))

    def _start_over(self, at: tuple[int, int, int]) -> None:
        self._last = None
        self._drop_before(at)
        if self._lost or at[1] < self._round:
            self._forget_steps(self._steps_there)
        elif self._batches:
            self._forget_steps(self._first_steps)

    def _drop_before(self, at: tuple[int, int, int]) -> None:
        self._toy.stream.drop_before(at)
        self._dropped_before = at
        if self._ready is not None and self._ready.asked < at:
            self._ready = None
            self._changed.note()

    def _forget_steps(self, steps: int) -> None:
        self._restarts += 1
        self._toy.fresh(steps)

    # --- a round ------------------------------------------------------------------------------------

    async def _train_round(self, nursery: trio.Nursery) -> None:
        while not self._at_sync_point():
            if self._overtaken():
                return
            if self._toy.stream.rows >= self._job.batch_size:
                await self._train()
            elif not await self._more_rows():
                continue
        self._synchronise(nursery)

    def _at_sync_point(self) -> bool:
        plan = self._inbox.plan
        if plan is None or plan.round != self._round or plan.batches is None:
            return False
        return self._batches >= max(1, plan.batches)

    async def _more_rows(self) -> bool:
        if self._ready is None:
            self._tell_all()
        while self._ready is None:
            if self._interrupted() or self._inbox.rejoin is not None or self._at_sync_point():
                return False
            await self._changed.wait()
        part, self._ready = self._ready, None
        self._toy.stream.push(part)
        self._changed.note()
        return True

    async def _prefetch(self) -> None:
        job = self._job
        while True:
            dataset = SchedulerData(peer=job.scheduler.peer, dataset=job.dataset)
            path, file = (await self._bridge.fetch(dataset))[0]
            assigned = file.slice
            if assigned is None:
                raise DataError(f"the worker did not say which slice {path.name} is")
            asked = (file.generation, file.round, file.attempt)
            part = toy_slice(path, assigned.epoch, assigned.index, job.seed, asked)
            path.unlink(missing_ok=True)
            if asked < self._dropped_before:
                continue
            self._ready = part
            self._changed.note()
            while self._ready is not None:
                await self._changed.wait()

    async def _train(self) -> None:
        started = trio.current_time()
        loss = self._toy.batch(self._job.batch_size)
        await trio.sleep(self._batch_s())
        now = trio.current_time()
        self._losses.add(loss)
        self._batches += 1
        self._samples += self._job.batch_size
        self._busy_s += now - started
        if self._losses.due(now):
            self._progress(self._losses.latest(now))

    def _tell_all(self) -> None:
        if self._losses.waiting:
            self._progress(self._losses.latest(trio.current_time()))

    def _progress(self, loss: float) -> None:
        self._bridge.report(
            Progress(
                round=self._round,
                batches=self._batches,
                samples=self._samples,
                busy_s=self._busy_s,
                loss=loss,
                attempt=self._attempt,
            )
        )

    def _synchronise(self, nursery: trio.Nursery) -> None:
        self._tell_all()
        path = self._bridge.directory / "outgoing" / f"update-{self._round}-{self._restarts}.safetensors"
        stream = self._toy.stream
        contribution = Contribution(
            round=self._round,
            worker=self._job.me,
            incarnation=self._incarnation,
            restarts=self._restarts,
            attempt=self._attempt,
            samples=self._samples,
            batches=self._batches,
            batch_size=self._job.batch_size,
            steps=self._first_steps,
            ranges=tuple(stream.ranges),
            finished=tuple(stream.finished),
            loss=self._losses.mean(),
        )
        xxh3 = self._toy.write_update(path, self._job, contribution).xxh3
        update = UpdateToSend(path, xxh3, contribution)
        self._sender = _UpdateSender(self._bridge, self._inbox, self._changed, update)
        nursery.start_soon(self._sender.run)


class _UpdateSender:
    """Sends the update of the open round, and again to another parameter server, until told to stop."""

    def __init__(self, bridge: Bridge, inbox: Inbox, changed: Changes, update: UpdateToSend) -> None:
        self._bridge = bridge
        self._inbox = inbox
        self._changed = changed
        self._path = update.path
        self._xxh3 = update.xxh3
        self.contribution = update.contribution
        self._stopped = False
        self._lost_before = inbox.lost_before

    def stop(self) -> None:
        """The round is over."""
        self._stopped = True
        self._changed.note()

    async def run(self) -> None:
        """Until there is nothing more to send."""
        try:
            await self._run()
        finally:
            self._path.unlink(missing_ok=True)

    async def _run(self) -> None:
        said_in = reached = -1
        inbox = self._inbox
        while await self._wait(said_in, None):
            server, generation, number = inbox.parameter_server, inbox.generation, inbox.servers
            try:
                if number != reached:
                    await self._bridge.send(
                        SendCall(
                            resource=Peers(peers=(server,), resource="update"),
                            path=self._bridge.relative(self._path),
                            round=self.contribution.round,
                            samples=self.contribution.samples,
                            xxh3=self._xxh3,
                            generation=generation,
                        )
                    )
                    reached = number
                said_in = generation
                self._bridge.report(UpdateSent(contribution=self.contribution))
            except Refused as exc:
                if exc.code in _PASSING_UPDATE:
                    await self._wait(generation, _SEND_RETRY_S)
                    continue
                said_in = generation
            except PeerUnreachable:
                await self._wait(generation, _SEND_RETRY_S)

    async def _wait(self, said_in: int, timeout_s: float | None) -> bool:
        """For another life of the job than ``said_in``; False when there is nothing more to send."""
        inbox = self._inbox

        def over() -> bool:
            return self._stopped or inbox.lost_before != self._lost_before

        with trio.move_on_after(float("inf") if timeout_s is None else timeout_s):
            while not (over() or inbox.generation != said_in):
                await self._changed.wait()
        return not over()


class SimulatedParameterServer:
    """See :mod:`hypha.executor.parameter_server`, whose steps it takes one by one."""

    def __init__(self, bridge: Bridge, job: AggregateJob, nursery: trio.Nursery, step_s: float) -> None:
        self._bridge = bridge
        self._job = job
        self._nursery = nursery
        self._step_s = step_s
        self._inputs: deque[Directive | ReceivedFile] = deque()
        self._changed = Changes()
        self._members: dict[str, PeerRef] | None = None
        self._early: list[ReceivedFile] = []
        self._applied: RoundApplied | None = None
        self._exporting = -1
        self._exported: Exported | None = None
        self._saving = -1
        self._saved: CheckpointSaved | None = None
        self.round = job.round
        self._contributors: tuple[str, ...] = ()
        self._contributions: dict[str, Contribution] = {}
        self._archive: deque[Callable[[], Awaitable[None]]] = deque()
        self._archiving = False
        self._links = 0

    def _put(self, item: Directive | ReceivedFile) -> None:
        self._inputs.append(item)
        self._changed.note()

    async def run(self) -> None:
        """Serve until ``Finish``."""
        self._nursery.start_soon(self._bridge.directives, self._put)
        await self._load()
        self._nursery.start_soon(self._bridge.receive, ("update",), self._put)
        self._nursery.start_soon(self._keep_archive)
        self._ready()
        while True:
            while not self._inputs:
                await self._changed.wait()
            item = self._inputs.popleft()
            if isinstance(item, Finish):
                break
            await self._handle(item)
        with trio.move_on_after(30.0):
            while self._archive or self._archiving:
                await self._changed.wait()

    async def _load(self) -> None:
        job = self._job
        momentum: dict[str, Any] = {}
        if job.restore is None:
            self._theta = toy_theta()
        else:
            try:
                fetched = await self._bridge.fetch(job.restore)
            except Refused as exc:
                if exc.code != "not-found":
                    raise
                raise CheckpointUnusable(f"the checkpoint is not there: {exc.reason}") from exc
            files = {path.name: path for path, _ in fetched}
            self._theta, momentum, state = read_checkpoint(files, job.job_id, job.round)
            self.round, self._contributors = state.round, state.contributors
        self._outer = OuterStep(self._theta, job)
        if momentum:
            self._outer.restore_momentum(momentum)
        self._hashes = tensors.write(self._theta_path(), self._theta.all())

    def _theta_path(self) -> Path:
        return self._bridge.directory / "outgoing" / f"theta-{self.round}.safetensors"

    def _ready(self) -> None:
        self._bridge.report(
            ModelReady(round=self.round, theta=self._hashes.blake3, parameters=8, size_bytes=32)
        )

    def _rejoin(self) -> None:
        if self._exported is not None:
            self._exporting = -1
        if self._applied is not None:
            self._bridge.report(self._applied)
        if self._saved is not None:
            self._bridge.report(self._saved)
        self._saving = -1
        self._ready()
        for worker, samples in self._outer.contributors.items():
            self._received(worker, samples)

    async def _handle(self, item: Directive | ReceivedFile) -> None:
        match item:
            case ReceivedFile():
                self._update_arrived(item)
            case Members():
                self._members = {ref.peer: ref for ref in item.peers}
                early, self._early = self._early, []
                for file in early:
                    self._update_arrived(file)
            case SendModel():
                self._send_theta((item.to,), item.attempt)
            case CloseRound():
                await self._close(item)
            case SaveCheckpoint():
                self._checkpoint()
            case Export():
                self._export(item.to)
            case Rejoin():
                self._rejoin()
            case _:
                pass

    # --- updates ------------------------------------------------------------------------------------

    def _update_arrived(self, file: ReceivedFile) -> None:
        if self._members is None:
            self._early.append(file)
            return
        path = self._bridge.directory / file.path
        round_ = file.meta.stamp.round if file.meta.stamp is not None else -1
        try:
            self._check(file)
            self._outer.add(file.from_peer, file.meta.samples, path)
        except Refused as exc:
            self._bridge.report(
                UpdateRefused(round=round_, worker=file.from_peer, code=exc.code, reason=exc.reason)
            )
        else:
            contribution = contribution_in(path, file.from_peer, round_, file.meta.samples)
            if contribution is not None:
                self._contributions[file.from_peer] = contribution
            self._received(file.from_peer, file.meta.samples)
        finally:
            path.unlink(missing_ok=True)

    def _received(self, worker: str, samples: int) -> None:
        contribution = self._contributions.get(worker)
        self._bridge.report(
            UpdateReceived(round=self.round, worker=worker, samples=samples, contribution=contribution)
        )

    def _check(self, file: ReceivedFile) -> None:
        stamp, worker = file.meta.stamp, file.from_peer
        if stamp is None or stamp.job_id != self._job.job_id:
            raise Refused("uninvited", "the update is of another job", worker)
        if stamp.generation < self._job.generation:
            raise Refused("stale", f"the update is of generation {stamp.generation} of the job", worker)
        if stamp.round != self.round:
            raise Refused("stale", f"round {self.round} is open, not {stamp.round}", worker)
        if worker not in (self._members or {}):
            raise Refused("uninvited", "the worker takes no part in the job", worker)

    # --- rounds -------------------------------------------------------------------------------------

    async def _close(self, directive: CloseRound) -> None:
        if directive.round == self.round - 1 and self._applied is not None:
            self._bridge.report(self._applied)
            self._send_theta((self._members or {}).values())
            return
        if directive.round != self.round:
            return
        await trio.sleep(self._step_s)
        contributors = tuple(self._outer.contributors)
        norm = self._outer.apply()
        old = self._theta_path()
        self.round += 1
        self._contributors = contributors
        self._hashes = tensors.write(self._theta_path(), self._theta.all())
        due = self.round % self._job.checkpoint.every_rounds == 0
        checkpoint = directive.checkpoint or directive.final or due
        self._applied = RoundApplied(
            round=directive.round,
            theta=self._hashes.blake3,
            contributors=contributors,
            contributions=tuple(self._contributions.values()),
            update_norm=norm,
            checkpoint=checkpoint,
        )
        self._contributions = {}
        self._bridge.report(self._applied)
        if not directive.final:
            self._send_theta((self._members or {}).values())
        old.unlink(missing_ok=True)
        if checkpoint:
            self._checkpoint()

    def _send_theta(self, receivers: Iterable[PeerRef], attempt: int = 0) -> None:
        peers = tuple(receivers)
        if not peers:
            return
        self._links += 1
        link = self._bridge.directory / "outgoing" / f"{self._links}" / self._theta_path().name
        link.parent.mkdir()
        os.link(self._theta_path(), link)
        call = SendCall(
            resource=Peers(peers=peers, strategy="all", resource="theta"),
            path=self._bridge.relative(link),
            round=self.round,
            contributors=self._contributors,
            blake3=self._hashes.blake3,
            attempt=attempt,
            xxh3=self._hashes.xxh3,
        )
        self._nursery.start_soon(self._broadcast, call, link)

    async def _broadcast(self, call: SendCall, link: Path) -> None:
        try:
            await self._bridge.send(call)
        except (Refused, PeerUnreachable) as exc:
            logger.debug("Theta of round %d reached nobody: %s", call.round, exc)
        finally:
            shutil.rmtree(link.parent, ignore_errors=True)

    # --- what stays -----------------------------------------------------------------------------------

    async def _keep_archive(self) -> None:
        while True:
            while not self._archive:
                await self._changed.wait()
            work = self._archive.popleft()
            self._archiving = True
            try:
                await work()
            finally:
                self._archiving = False
                self._changed.note()

    def _in_archive(self, work: Callable[[], Awaitable[None]]) -> None:
        self._archive.append(work)
        self._changed.note()

    def _checkpoint(self) -> None:
        if self._saving == self.round:
            if self._saved is not None and self._saved.round == self.round:
                self._bridge.report(self._saved)
            return
        self._saving = self.round
        directory = self._bridge.directory / "outgoing" / f"checkpoint-{self.round}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / THETA).unlink(missing_ok=True)
        os.link(self._theta_path(), directory / THETA)
        momentum = tensors.write(directory / MOMENTUM, self._outer.momentum_or_zeros()).blake3
        state = CheckpointState(
            job_id=self._job.job_id,
            generation=self._job.generation,
            round=self.round,
            theta=self._hashes.blake3,
            momentum=momentum,
            contributors=self._contributors,
        )
        (directory / STATE).write_bytes(msgspec.json.encode(state))
        round_ = self.round
        self._in_archive(lambda: self._save_checkpoint(directory, round_))

    async def _save_checkpoint(self, directory: Path, round_: int) -> None:
        policy = self._job.checkpoint
        place, relative = policy.place, self._bridge.relative(directory)
        try:
            if place == "scheduler":
                resource: Reference = Peers(peers=(self._job.scheduler,), resource="checkpoint")
                for name in (THETA, MOMENTUM, STATE):
                    await self._bridge.send(
                        SendCall(resource=resource, path=f"{relative}/{name}", round=round_)
                    )
            else:
                place = f"{place.rstrip('/')}/{self._job.job_id}/{round_}"
                call = SendCall(
                    resource=Local(url=place), path=relative, round=round_, marker=STATE, keep=policy.keep
                )
                await self._bridge.send(call)
        except (Refused, PeerUnreachable) as exc:
            logger.debug("The checkpoint of round %d is not saved: %s", round_, exc)
            if self._saving == round_:
                self._saving = -1
        else:
            self._saved = CheckpointSaved(round=round_, place=place)
            self._bridge.report(self._saved)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _export(self, to: PeerRef) -> None:
        if self._exporting == self.round:
            if self._exported is not None:
                self._bridge.report(self._exported)
            return
        self._exporting, self._exported = self.round, None
        directory = self._bridge.directory / "outgoing" / "export"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        tensors.write(directory / "model.safetensors", self._theta.all())
        (directory / "config.json").write_bytes(b"{}")
        self._in_archive(lambda: self._send_export(directory, ["config.json", "model.safetensors"], to))

    async def _send_export(self, directory: Path, names: list[str], to: PeerRef) -> None:
        left = list(names)
        while left:
            call = SendCall(
                resource=Peers(peers=(to,), resource="export"),
                path=self._bridge.relative(directory / left[0]),
                round=self.round,
            )
            try:
                await self._bridge.send(call)
                left.pop(0)
            except (Refused, PeerUnreachable) as exc:
                if isinstance(exc, Refused) and exc.code not in _PASSING_EXPORT:
                    raise
                left = list(names)
                await trio.sleep(_EXPORT_RETRY_S)
        self._exported = Exported(round=self.round, files=tuple(names))
        self._bridge.report(self._exported)
        shutil.rmtree(directory, ignore_errors=True)


class SimulatedExecutors:
    """Runs the executors of one machine, in place of ``worker.starting.run_process``.

    ``start`` makes a child process of the worker's; a batch takes ``batch_s()`` seconds, loading
    ``load_s()``.
    """

    def __init__(
        self,
        start: Callable[[str], SimulatedProcess],
        batch_s: Callable[[], float],
        load_s: Callable[[], float],
    ) -> None:
        self._start = start
        self._batch_s = batch_s
        self._load_s = load_s
        #: whose batches take until then
        self.stalled: dict[SimulatedProcess, float] = {}
        #: those that run now, by class
        self.running: dict[str, SimulatedProcess] = {}

    async def __call__(self, desk: Desk, socket_path: Path, launch: Launch, ends: EndSignals) -> Exit:
        """Run one executor to its end."""
        job = desk.job
        kind = "train" if isinstance(job, TrainJob) else "aggregate"
        process = self._start(kind)
        self.running[kind] = process
        code: int | None = None
        tail = ""
        ended = trio.Event()

        async def main() -> None:
            nonlocal code, tail
            code, tail = await self._main(desk, launch.work_dir)
            process.end()

        process.on_end.append(ended.set)
        process.spawn(main)
        stopped = False

        async def stop_when_told() -> None:
            nonlocal stopped
            await ends.stop.wait()
            stopped = True
            if not process.frozen:
                process.kill()
            await trio.sleep(ends.grace_s)
            process.kill()

        async def kill_when_told() -> None:
            await ends.kill.wait()
            process.kill()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stop_when_told)
                nursery.start_soon(kill_when_told)
                await ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            process.kill()
            if self.running.get(kind) is process:
                del self.running[kind]
        if code is None:
            code = -_SIGTERM if stopped else -_SIGKILL
        return Exit(code=code, tail=tail, stopped=stopped)

    async def _main(self, desk: Desk, directory: Path) -> tuple[int, str]:
        """In the executor's process: its exit code and last words."""
        worker = this_process().parent
        if worker is None:
            raise LookupError("an executor is a child of its worker")
        bridge = Bridge(desk, worker, directory)
        code, tail = 0, ""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bridge.run)
            nursery.start_soon(_say_alive, bridge)
            try:
                await trio.sleep(self._load_s())
                job = bridge.job
                async with trio.open_nursery() as work:
                    if isinstance(job, TrainJob):
                        process = this_process()

                        def batch_s() -> float:
                            stalled_s = self.stalled.get(process, 0.0) - trio.current_time()
                            return max(stalled_s, self._batch_s())

                        await SimulatedTrainer(bridge, job, batch_s).run(work)
                    else:
                        await SimulatedParameterServer(bridge, job, work, 0.01).run()
                    work.cancel_scope.cancel()
            except* (HyphaError, OSError) as group:
                exc = _first(group)
                tail = f"{type(exc).__name__}: {exc}"
                bridge.report(ExecutorError(kind=kind_of(exc), message=str(exc)))
                code = exc.exit_code if isinstance(exc, HyphaError) else 1
            await bridge.flush()
            nursery.cancel_scope.cancel()
        return code, tail


async def _say_alive(bridge: Bridge) -> None:
    while True:
        await trio.sleep(_ALIVE_S * chance().uniform(0.9, 1.1))
        bridge.report(Alive())


def _same_theta(one: ReceivedFile, other: ReceivedFile) -> bool:
    left, right = one.meta.stamp, other.meta.stamp
    if left is None or right is None or one.meta.blake3 != other.meta.blake3:
        return False
    return (left.round, left.attempt) == (right.round, right.attempt)


def _first(group: BaseExceptionGroup[Any]) -> Exception:
    for exc in group.exceptions:
        found = _first(exc) if isinstance(exc, BaseExceptionGroup) else exc
        if isinstance(found, Exception):
            return found
    raise group

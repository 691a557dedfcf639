"""A training executor of a simulated world: it trains a toy model.

What :mod:`hypha.executor.training` does in threads is done here in tasks of a simulated process: the inbox
(``handover.Inbox``), the stream of rows and the update files are the real code.
"""

from __future__ import annotations

from collections.abc import Callable, Set

import msgspec
import trio

from hypha.errors import DataError, PeerUnreachable, Refused
from hypha.executor.bridge.client import update_waits
from hypha.executor.inner.handover import TrainerInbox, UpdateToSend
from hypha.executor.inner.round_counts import RoundCounts
from hypha.executor.inner.slices_reader import Slice
from hypha.executor.toy import ToyTrainer, toy_slice
from hypha.messages import (
    Directive,
    Loaded,
    Peers,
    ReceivedFile,
    RoundStarted,
    SchedulerData,
    SendCall,
    TrainJob,
    UpdateSent,
)
from hypha.node import Changes
from hypha.simulation.executors.bridge import Bridge

#: as in hypha.executor.inner.handover
_SEND_RETRY_S = 1.0
#: what liars say: samples, and how far theta has moved
_CLAIMED, _BLOWN_UP = 10**12, 1e6


class SimulatedTrainer:
    """A training executor; see :mod:`hypha.executor.training`, whose steps it takes one by one."""

    def __init__(
        self, bridge: Bridge, job: TrainJob, batch_s: Callable[[], float], lies: Set[str] = frozenset()
    ) -> None:
        self._bridge = bridge
        self._job = job
        self._batch_s = batch_s
        self._lies = lies
        self._incarnation = bridge.directory.name
        self._inbox = TrainerInbox(job.parameter_server, job.generation)
        self._changed = Changes()
        self._toy = ToyTrainer(job.steps)
        self._round, self._attempt, self._generation = -1, 0, job.generation
        self._hash = ""
        self._restarts = 0
        self._lost = False
        self._steps_there = job.steps
        self._sender: _UpdateSender | None = None
        self._ready: Slice | None = None
        self._dropped_before = (0, 0, 0)

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
        with self._inbox.changed:
            superseded = self._inbox.take_theta(file, (self._generation, self._round, self._attempt))
        if superseded is not None:
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
            if self._sender is not None:
                self._sender.stop()
            if self._round < 0:
                self._drop_before((rejoin.generation, 0, 0))
            stamp = theta.meta.stamp if theta is not None else None
            if theta is not None and (stamp is None or stamp.generation < rejoin.generation):
                inbox.theta = None
                (self._bridge.directory / theta.path).unlink(missing_ok=True)
        self._bridge.report(Loaded(incarnation=self._incarnation))
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
        in_it = sender is not None and continued and self._job.me in file.meta.contributors
        if self._round >= 0 and not in_it:
            self._start_over(at)
        self._generation, self._round, self._attempt = at
        self._hash, self._lost = file.meta.blake3, False
        self._toy.stream.start_round()
        rows, steps = self._job.batch_size, self._toy.inner.steps
        self._done = RoundCounts(round_, self._attempt, rows, steps, trio.current_time())
        self._started()

    def _started(self) -> None:
        self._bridge.report(RoundStarted(round=self._round, theta=self._hash, attempt=self._attempt))

    def _start_over(self, at: tuple[int, int, int]) -> None:
        self._drop_before(at)
        if self._lost or at[1] < self._round:
            self._forget_steps(self._steps_there)
        elif self._done.batches:
            self._forget_steps(self._done.first_steps)

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
        return self._done.batches >= max(1, plan.batches)

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
            while self._ready is not None and "hoard" not in self._lies:
                await self._changed.wait()

    async def _train(self) -> None:
        started = trio.current_time()
        loss = self._toy.batch(self._job.batch_size)
        await trio.sleep(self._batch_s())
        now = trio.current_time()
        self._done.add(loss, self._job.batch_size)
        self._done.busy_s += now - started
        if self._done.losses.due(now):
            self._bridge.report(self._done.progress(self._done.losses.latest(now)))

    def _tell_all(self) -> None:
        if self._done.losses.waiting:
            self._bridge.report(self._done.progress(self._done.losses.latest(trio.current_time())))

    def _synchronise(self, nursery: trio.Nursery) -> None:
        self._tell_all()
        path = self._bridge.directory / "outgoing" / f"update-{self._round}-{self._restarts}.safetensors"
        contribution = self._done.contribution(
            self._job.me, self._incarnation, self._restarts, self._toy.stream
        )
        if "withhold" in self._lies:
            return
        if "claim" in self._lies:
            contribution = msgspec.structs.replace(contribution, samples=_CLAIMED)
        if "blow-up" in self._lies:
            for value in self._toy.local.parameters.values():
                value.add_(_BLOWN_UP)
        xxh3 = self._toy.write_update(path, self._job, contribution)
        update = UpdateToSend(path, xxh3, contribution)
        self._sender = _UpdateSender(self._bridge, self._inbox, self._changed, update)
        nursery.start_soon(self._sender.run)


class _UpdateSender:
    """Sends the update of the open round, and again to another parameter server, until told to stop."""

    def __init__(self, bridge: Bridge, inbox: TrainerInbox, changed: Changes, update: UpdateToSend) -> None:
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
                if update_waits(exc):
                    await self._wait(generation, _SEND_RETRY_S)
                    continue
                said_in = generation
            except PeerUnreachable:
                await self._wait(generation, _SEND_RETRY_S)

    async def _wait(self, said_in: int, timeout_s: float | None) -> bool:
        """For another generation of the job than ``said_in``; False when there is nothing more to send."""
        inbox = self._inbox

        def over() -> bool:
            return self._stopped or inbox.lost_before != self._lost_before

        with trio.move_on_after(float("inf") if timeout_s is None else timeout_s):
            while not (over() or inbox.generation != said_in):
                await self._changed.wait()
        return not over()

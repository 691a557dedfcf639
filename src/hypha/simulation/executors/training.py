"""A training executor of a simulated world: the real one, with a toy model, and with tasks of a simulated
process in place of threads.

What :class:`~hypha.executor.training.Trainer` decides is inherited, as are its inbox, its stream of rows and
its update files; what waits is written again.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Any, cast

import msgspec
import trio

from hypha.errors import DataError, PeerUnreachable, Refused
from hypha.executor.bridge.refusals import update_waits
from hypha.executor.bridge.spans import Traces
from hypha.executor.files import updates
from hypha.executor.files.reused import ReusedFiles
from hypha.executor.inner.batch_size import BatchSize
from hypha.executor.inner.handover import TrainerInbox, UpdateSender, UpdateToSend
from hypha.executor.inner.losses import Losses
from hypha.executor.inner.slices_reader import RowStream, Slice
from hypha.executor.toy import ToyModel, toy_slice
from hypha.executor.training import Trainer
from hypha.messages import (
    Directive,
    Loaded,
    Peers,
    ReceivedFile,
    SchedulerData,
    SendCall,
    TrainJob,
    UpdateSent,
)
from hypha.node import Changes
from hypha.simulation.executors.bridge import Bridge

if TYPE_CHECKING:
    from hypha.executor.inner.local_model import TrainedModel

#: as in hypha.executor.inner.handover
_SEND_RETRY_S = 1.0
#: what liars say: samples, and how far theta has moved
_CLAIMED, _BLOWN_UP = 10**12, 1e6


class SimulatedTrainer(Trainer):
    """A batch takes ``batch_s()``; what it does wrong stands in ``lies``."""

    def __init__(self, bridge: Bridge, job: TrainJob, batch_s: Callable[[], float], lies: Set[str]) -> None:
        # the real one fetches and builds a model here: its attributes are set without that
        self._calls = bridge
        self._bridge = bridge.client
        self._job, self._traces = job, Traces(job)
        self._inbox = TrainerInbox(job.parameter_server, job.generation)
        self._incarnation = bridge.directory.name
        self._round, self._attempt, self._generation = -1, 0, job.generation
        self._hash, self._restarts, self._lost = "", 0, False
        self._batch_size = BatchSize(job.batch_size, None)
        self._steps_there = job.steps
        self._sender: _TaskSender | None = None
        self._reused = ReusedFiles(bridge.directory / "incoming" / ".spare")
        self._toy = ToyModel(job.steps)
        self._model = cast("TrainedModel", self._toy)
        self._stream = RowStream()

        self._batch_s = batch_s
        self._lies = lies
        self._changed = Changes()
        self._ready: Slice | None = None
        self._dropped_before = (0, 0, 0)

    async def serve(self, nursery: trio.Nursery) -> None:
        """Train until ``Finish``."""
        nursery.start_soon(self._calls.receive, ("theta",), self._theta_arrived)
        nursery.start_soon(self._calls.directives, self._direct)
        self._bridge.report(Loaded(incarnation=self._incarnation))
        nursery.start_soon(self._prefetch)
        while (theta := await self._next_theta()) is not None:
            self._adopt(theta)
            await self._train_through_round(nursery)

    def _direct(self, directive: Directive) -> None:
        self._inbox.direct(directive)
        self._changed.note()

    # --- theta --------------------------------------------------------------------------------------

    def _theta_arrived(self, file: ReceivedFile) -> None:
        super()._theta_arrived(file)
        self._changed.note()

    async def _next_theta(self) -> ReceivedFile | None:
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

    def _adopt(self, file: ReceivedFile) -> None:
        super()._adopt(file)
        # the round began by the world's clock
        self._done.losses = Losses(trio.current_time())

    def _drop_before(self, at: tuple[int, int, int]) -> None:
        self._stream.drop_before(at)
        self._dropped_before = at
        if self._ready is not None and self._ready.asked < at:
            self._ready = None
            self._changed.note()

    # --- a round ------------------------------------------------------------------------------------

    async def _train_through_round(self, nursery: trio.Nursery) -> None:
        while not self._at_sync_point():
            if self._overtaken():
                return
            columns = self._stream.take(self._job.batch_size)
            if columns is not None:
                await self._train_batch(columns)
            elif not await self._more_rows():
                continue
        self._hand_over(nursery)

    async def _more_rows(self) -> bool:
        if self._ready is None:
            self._tell_all()
        while self._ready is None:
            if self._interrupted() or self._inbox.rejoin is not None or self._at_sync_point():
                return False
            await self._changed.wait()
        part, self._ready = self._ready, None
        self._stream.push(part)
        self._changed.note()
        return True

    async def _prefetch(self) -> None:
        job = self._job
        while True:
            dataset = SchedulerData(peer=job.scheduler.peer, dataset=job.dataset)
            path, file = (await self._calls.fetch(dataset))[0]
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

    async def _train_batch(self, columns: dict[str, Any]) -> None:
        started = trio.current_time()
        loss = self._model.batch(columns)
        await trio.sleep(self._batch_s())
        now = trio.current_time()
        self._done.add(loss, self._job.batch_size)
        self._done.busy_s += now - started
        if self._done.losses.due(now):
            self._progress(self._done.losses.latest(now))

    def _tell_all(self) -> None:
        if self._done.losses.waiting:
            self._progress(self._done.losses.latest(trio.current_time()))

    def _hand_over(self, nursery: trio.Nursery) -> None:
        self._tell_all()
        job, toy = self._job, self._toy
        path = self._calls.directory / "outgoing" / f"update-{self._round}-{self._restarts}.safetensors"
        contribution = self._done.contribution(job.me, self._incarnation, self._restarts, self._stream)
        if "withhold" in self._lies:
            return
        if "claim" in self._lies:
            contribution = msgspec.structs.replace(contribution, samples=_CLAIMED)
        if "blow-up" in self._lies:
            for value in toy.local.parameters.values():
                value.add_(_BLOWN_UP)
        written = updates.write_update(
            path, toy.local, toy.base, job.update_encoding, contribution=contribution
        )
        update = UpdateToSend(path, written.xxh3, contribution)
        self._sender = _TaskSender(self._calls, self._inbox, update, self._reused, self._changed)
        nursery.start_soon(self._sender.deliver)


class _TaskSender(UpdateSender):
    """It is not started; :meth:`deliver` does what the thread would."""

    def __init__(
        self,
        bridge: Bridge,
        inbox: TrainerInbox,
        update: UpdateToSend,
        reused: ReusedFiles,
        changed: Changes,
    ) -> None:
        super().__init__(bridge.client, inbox, update, reused)
        self._calls = bridge
        self._changed = changed

    def stop(self) -> None:
        super().stop()
        self._changed.note()

    async def deliver(self) -> None:
        """Until there is nothing more to send."""
        try:
            await self._deliver()
        finally:
            self._reused.give(self._path)

    async def _deliver(self) -> None:
        said_in = reached = -1
        inbox = self._inbox
        while await self._wait_for_generation(said_in, None):
            server, generation, number = inbox.parameter_server, inbox.generation, inbox.servers
            try:
                if number != reached:
                    await self._calls.send(
                        SendCall(
                            resource=Peers(peers=(server,), resource="update"),
                            path=self._calls.relative(self._path),
                            round=self.contribution.round,
                            samples=self.contribution.samples,
                            xxh3=self._xxh3,
                            generation=generation,
                        )
                    )
                    reached = number
                said_in = generation
                self._calls.report(UpdateSent(contribution=self.contribution))
            except Refused as exc:
                if update_waits(exc):
                    await self._wait_for_generation(generation, _SEND_RETRY_S)
                    continue
                said_in = generation
            except PeerUnreachable:
                await self._wait_for_generation(generation, _SEND_RETRY_S)

    async def _wait_for_generation(self, said_in: int, timeout_s: float | None) -> bool:
        """Another one of the job than ``said_in``; False when there is nothing more to send."""
        inbox = self._inbox

        def over() -> bool:
            return self._stopped or inbox.lost_before != self._lost_before

        with trio.move_on_after(float("inf") if timeout_s is None else timeout_s):
            while not (over() or inbox.generation != said_in):
                await self._changed.wait()
        return not over()

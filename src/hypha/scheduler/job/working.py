"""A job at work: what becomes of its leases and the time go into the round machine, and every action that the
machine returns is carried out here.

What decides is in the pure modules, what connects them to the network in the handlers and the executors; here
are leases, files, threads and time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from hypha.errors import HyphaError
from hypha.runtime import chance, in_thread
from hypha.scheduler.descriptions import Descriptions, class_names
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.durable.replicas import Replicating
from hypha.scheduler.durable.starts import Generation, next_generation
from hypha.scheduler.executors import JobExecutors, lost
from hypha.scheduler.handlers import FileHandlers, RequestHandlers
from hypha.scheduler.job.driving import RoundDriver
from hypha.scheduler.job.ending import publish, save_last
from hypha.scheduler.job.states import JobContext, JobResult, Opened
from hypha.scheduler.leasing.leases import LeaseGained, LeaseLeaving, LeaseLost, LeaseRecovered, LeaseSuspect
from hypha.scheduler.rounds.events import (
    Action,
    Again,
    AnswerSlice,
    Checkpointed,
    DataServed,
    Drop,
    Durable,
    Fail,
    FirstTheta,
    KeepSlices,
    LeasesHeld,
    LetGo,
    ParticipantLeaves,
    Publish,
    Reachable,
    Record,
    Restart,
    Send,
    TimePassed,
    Unreachable,
)
from hypha.scheduler.rounds.machine import RoundMachine
from hypha.scheduler.status.view import sentence

logger = logging.getLogger(__name__)

_TICK_S = 0.1


class WorkingJob:
    """The third state of a run, after :class:`Opened`. ``end`` is called with what the job comes to; tasks
    run in ``nursery``. :meth:`run` once.
    """

    step = ""

    def __init__(
        self,
        context: JobContext,
        opened: Opened,
        nursery: trio.Nursery,
        end: Callable[[JobResult | HyphaError], None],
    ) -> None:
        self._context = context
        self.dataset = opened.dataset
        self.ledger = opened.ledger
        self._store = opened.store
        self._nursery = nursery
        self._end = end
        node = context.node
        leased = {lease.worker.peer for lease in opened.left if lease.kind == "train"}
        self._driver = driver = RoundDriver(context, opened.generation, leased)
        self._executors = JobExecutors(node, nursery, driver.handle, opened.left, context.traces)
        self._file_handlers = FileHandlers(
            node, context.files.directories, opened.store, self._executors.holds, driver.is_server
        )
        self._request_handlers = RequestHandlers(
            node,
            opened.dataset,
            lambda: (driver.current.start, driver.current.kept),
            driver.handle,
            self._executors.holds,
        )
        self._replicating = Replicating(
            context.replicas,
            opened.ledger,
            context.state,
            lambda: driver.stamp,
            lambda: context.pool.leases,
            context.config.checkpoint.replicas,
        )

    @property
    def machine(self) -> RoundMachine:
        """Of the current generation."""
        return self._driver.current.machine

    async def run(self) -> None:
        """Until ``end`` was called, or cancelled."""
        self._file_handlers.open()
        self._begin_generation()
        self._request_handlers.open()
        pool = self._context.pool
        for record in await self.ledger.run(Ledger.track_records):
            pool.know(record)
        pool.want("aggregate", 1)
        pool.want("train", self._context.config.resources.num_workers)
        self._nursery.start_soon(self.dataset.watch, self._context.node)
        self._nursery.start_soon(self._leases)
        self._nursery.start_soon(self._ticking)
        starts = await self.ledger.run(Ledger.starts)
        if starts and starts[0].place == "scheduler":
            self._replicating.put(starts[0].round, self._store)
        self._nursery.start_soon(self._replicating.run)
        async for action in self._driver.actions:
            # whenever the job is to stop, what the ledger has begun to write is finished
            with trio.CancelScope(shield=isinstance(action, Record | Checkpointed)):
                await self._carry_out(action)

    async def save_last(self, timeout_s: float) -> None:
        """The job is to stop: have the open round saved as it began."""
        machine = self.machine
        await save_last(
            self._context.node, machine, self.ledger, self._driver.actions, self._carry_out_durable, timeout_s
        )

    async def finish(self, reason: str, timeout_s: float) -> None:
        """Send all executors their end, for at most ``timeout_s``; refuse requests for slices that wait."""
        self._driver.current.kept.close()
        await self._executors.finish(reason, timeout_s)

    # --- generations ----------------------------------------------------------------------------------------

    def _descriptions(self, generation: Generation) -> Descriptions:
        config, manifest = self._context.config, self.dataset.manifest
        rows = tuple(part.samples for part in manifest.slices)
        names = class_names(config.model, manifest)
        return Descriptions(
            config, generation.start, self._context.node.ref(), names, rows, self.dataset.manifest_hash
        )

    def _begin_generation(self) -> None:
        generation, machine = self._driver.current.generation, self.machine
        self._context.progressed.cut(generation.start.round)
        self._executors.begin_generation(self._descriptions(generation), generation, lambda: machine.steps)

    async def _restart(self, restart: Restart) -> None:
        """The parameter server is lost: a new generation from the newest checkpoint."""
        start, context = self._driver.current.start, self._context
        if restart.unusable:
            logger.error(
                "The checkpoint for round %d in %s cannot be used: %s",
                start.round,
                self._driver.current.generation.place,
                restart.reason,
                extra={"job_id": start.job_id, "round": start.round},
            )
            await self.ledger.run(Ledger.forget_checkpoint, start.round)
        generation = await next_generation(self.ledger, self._store, start, context.replicas)
        logger.warning(
            "The parameter server was lost (%s); the job goes on from round %d",
            restart.reason,
            generation.start.round,
            extra={"job_id": generation.start.job_id},
        )
        leased = {peer for peer, kind in self._executors.leases if kind == "train"}
        self._driver.begin(generation, restart.carried, leased)
        self._begin_generation()

    # --- actions --------------------------------------------------------------------------------------

    async def _carry_out(self, action: Action) -> None:
        match action:
            case Record() | FirstTheta() | KeepSlices() | Checkpointed():
                await self._carry_out_durable(action)
            case Send():
                self._executors.send(action)
            case Drop(peer=peer, kind=kind, reason=reason):
                logger.warning("A worker is replaced: %s", reason, extra={"worker_peer_id": peer})
                lease = self._executors.lost(peer, kind)
                if lease is not None:
                    await self.ledger.run(Ledger.lease_ended, lease.lease_id)
                    await self.ledger.run(Ledger.failed, peer, reason)
                    self._nursery.start_soon(self._context.pool.release, lease.lease_id, True)
            case LetGo(peer=peer, kind=kind, reason=reason):
                logger.info("A lease is given back: %s", reason, extra={"worker_peer_id": peer})
                lease = self._executors.lost(peer, kind)
                if lease is not None:
                    await self.ledger.run(Ledger.lease_ended, lease.lease_id)
                    self._nursery.start_soon(self._context.pool.release, lease.lease_id)
            case Again(peer=peer, reason=reason, instead_of=instead_of):
                # not all at once, when all failed at once
                pause_s = action.pause_s * chance().uniform(1.0, 1.5)
                fields = {"worker_peer_id": peer, "incarnation": instead_of}
                logger.warning("An executor is started again in %.1f s: %s", pause_s, reason, extra=fields)
                self._executors.again(peer, instead_of, pause_s)
            case Restart():
                await self._restart(action)
            case Publish(files=files):
                result = await publish(self._context, self.ledger, self.machine, files)
                self._replicating.close()
                await self._context.replicas.forget(self.ledger, self._driver.current.start.job_id)
                self._end(result)
            case Fail(error=error):
                self._end(error)
            case AnswerSlice():
                pass  # whoever asked has it

    async def _carry_out_durable(self, action: Durable) -> None:
        match action:
            case Record(entry=entry, tracker=tracker, steps=steps):
                await self.ledger.run(Ledger.record, entry, tracker, steps)
                if entry.generation == self._driver.current.start.generation:
                    self._driver.current.kept.note(tracker.version)
                logger.info(
                    "Round %d of %d was applied: %d samples of %d workers, loss %.4f",
                    entry.round + 1,
                    self._context.rules.rounds,
                    entry.samples,
                    len(entry.contributors),
                    entry.loss,
                    extra={"round": entry.round},
                )
            case KeepSlices(generation=generation, tracker=tracker):
                if generation == self._driver.current.start.generation:
                    await self.ledger.run(Ledger.keep_slices, tracker)
                    self._driver.current.kept.note(tracker.version)
            case FirstTheta(theta=theta):
                await self.ledger.run(Ledger.first_theta, theta)
            case Checkpointed(round=round_, place=place):
                await self._checkpointed(round_, place)

    async def _checkpointed(self, round_: int, place: str) -> None:
        if self._context.config.checkpoint.place == "scheduler":
            place = "scheduler"
            try:
                complete = await in_thread(self._store.complete, round_)
            except OSError as exc:
                logger.error("The checkpoint for round %d cannot be kept: %s", round_, exc)
                return
            if not complete:
                logger.error("A checkpoint for round %d was announced, but its files are not here", round_)
                return
        await self.ledger.run(Ledger.checkpoint, round_, place)
        self._context.progressed.checkpoint = round_
        self._context.progressed.checkpoint_at = trio.current_time()
        # at any other place the files are pruned by the parameter server's worker, which can write there
        rounds = {start.round for start in await self.ledger.run(Ledger.starts) if start.place}
        for old in self._store.outdated(rounds):
            await self.ledger.run(Ledger.forget_checkpoint, old)
            rounds.remove(old)
        if place == "scheduler":
            await in_thread(self._store.keep_only, rounds)
            self._replicating.put(round_, self._store)

    # --- leases ---------------------------------------------------------------------------------------

    async def _leases(self) -> None:
        executors, pool = self._executors, self._context.pool
        async for event in pool.events:
            fields = {"worker_peer_id": event.worker.peer, "lease_id": event.lease_id}
            match event:
                case LeaseGained():
                    if (event.worker.peer, event.kind) in executors.leases:
                        logger.warning(
                            "A worker gave two leases for one kind of job; one is released", extra=fields
                        )
                        await pool.release(event.lease_id, avoid=True)
                    else:
                        executors.gained(event)
                        await self.ledger.run(Ledger.lease_gained, event)
                case LeaseLost(reason=reason):
                    await self.ledger.run(Ledger.lease_ended, event.lease_id)
                    if event.to_blame:
                        await self.ledger.run(Ledger.failed, event.worker.peer, reason)
                    lease = executors.lost(event.worker.peer, event.kind)
                    if lease is not None:
                        self._driver.handle(lost(lease, reason))
                case LeaseSuspect():
                    self._driver.handle(Unreachable(event.worker.peer, event.kind))
                case LeaseLeaving(left_s=left_s):
                    self._driver.handle(ParticipantLeaves(event.worker.peer, event.kind, left_s))
                case LeaseRecovered():
                    self._driver.handle(Reachable(event.worker.peer, event.kind))

    # --- time -----------------------------------------------------------------------------------------

    async def _ticking(self) -> None:
        while True:
            self._driver.handle_change(DataServed(bool(self.dataset.providers)))
            self._driver.handle_change(self._held())
            self._driver.handle(TimePassed())
            # one that goes on after a restart has executors that are worth keeping
            if self.machine.phase != "loading" or self._driver.current.start.generation:
                self._context.pool.begin()
            await trio.sleep(_TICK_S)

    def _held(self) -> LeasesHeld:
        context = self._context
        kinds = [lease.kind for lease in context.pool.leases]
        train, aggregate = kinds.count("train"), kinds.count("aggregate")
        enough = train >= context.rules.min_workers and aggregate > 0
        what = "" if enough else sentence(context.config, self.machine, context.pool, self.dataset, "")
        return LeasesHeld(train, aggregate, what)

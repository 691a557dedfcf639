"""A job at work: events go into the round machine, and every action that it returns is carried out here.

What decides is in the pure modules; here are leases, files, threads and time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import trio

from hypha.errors import HyphaError
from hypha.messages import JobStamp
from hypha.runtime import chance, in_thread
from hypha.scheduler.context import JobContext, JobResult
from hypha.scheduler.data.requests import KeptSlices, RequestHandlers
from hypha.scheduler.data.slices import SliceTracker
from hypha.scheduler.descriptions import Descriptions, class_names
from hypha.scheduler.durable.copying import Replicating
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.durable.publishing import publish
from hypha.scheduler.durable.serving import Serving
from hypha.scheduler.durable.starts import Generation, next_generation
from hypha.scheduler.durable.stopping import save_last
from hypha.scheduler.executors import JobExecutors, lost
from hypha.scheduler.leasing.pool import LeaseGained, LeaseLeaving, LeaseLost, LeaseRecovered, LeaseSuspect
from hypha.scheduler.preparing import Opened
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
    Input,
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
from hypha.scheduler.rounds.policy import CarriedOver, Start
from hypha.scheduler.status.view import sentence

logger = logging.getLogger(__name__)

_TICK_S = 0.1


@dataclass(frozen=True)
class CurrentGeneration:
    """The current generation, its machine, and what of its slices is durable."""

    generation: Generation
    machine: RoundMachine
    kept: KeptSlices

    @property
    def start(self) -> Start:
        """Where it began."""
        return self.generation.start


class WorkingJob:
    """The third state of a run, after :class:`Opened`. ``end`` is called with what the job comes to; tasks
    run in ``nursery``. :meth:`run` once.
    """

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
        self._actions, self._todo = trio.open_memory_channel[Action](math.inf)
        config, node, generation = context.config, context.node, opened.generation
        self._executors = JobExecutors(
            node,
            nursery,
            self.handle,
            generation,
            self._descriptions(generation),
            opened.left,
            context.traces,
        )
        self.current = self._generation_of(generation, CarriedOver())
        #: what the present machine was told of its surroundings, by the event's name
        self._surroundings: dict[str, Input] = {}
        self._serving = Serving(
            node,
            context.directories,
            generation.start.job_id,
            opened.store,
            context.state,
            self._is_member,
            self._is_server,
        )
        self._handlers = RequestHandlers(
            node,
            opened.dataset,
            lambda: (self.current.start, self.current.kept),
            self.handle,
            self._is_leased,
        )
        self._replicating = Replicating(
            node,
            context.copies,
            opened.ledger,
            context.state,
            self._stamp,
            lambda: context.pool.leases,
            config.name,
            config.checkpoint.replicas,
        )

    async def run(self) -> None:
        """Until ``end`` was called, or cancelled."""
        self._serving.start()
        self._begin_generation()
        self._handlers.open()
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
        async for action in self._todo:
            # whenever the job is told to stop, what is begun in the books is finished
            with trio.CancelScope(shield=isinstance(action, Record | Checkpointed)):
                await self._carry_out(action)

    async def save_last(self, timeout_s: float) -> None:
        """When the job is told to stop: have the open round saved as it began."""
        machine = self.current.machine
        await save_last(
            self._context.node, machine, self.ledger, self._todo, self._carry_out_durable, timeout_s
        )

    async def finish(self, reason: str, timeout_s: float) -> None:
        """Tell all executors to end, for at most ``timeout_s``; who waits for a slice is told so."""
        self.current.kept.close()
        await self._executors.finish(reason, timeout_s)

    # --- generations ----------------------------------------------------------------------------------------

    def _descriptions(self, generation: Generation) -> Descriptions:
        config, manifest = self._context.config, self.dataset.manifest
        rows = tuple(part.samples for part in manifest.slices)
        names = class_names(config.model, manifest)
        return Descriptions(
            config, generation.start, self._context.node.ref(), names, rows, self.dataset.manifest_hash
        )

    def _generation_of(self, generation: Generation, carried: CarriedOver) -> CurrentGeneration:
        tracker = SliceTracker.from_state(generation.tracker)
        for worker in tracker.holders:
            if not self._is_leased(worker, "train"):
                tracker.forget(worker)
        context = self._context
        machine = RoundMachine(
            context.rules, generation.start, tracker, context.node.ref(), carried, context.journal
        )
        return CurrentGeneration(generation, machine, KeptSlices())

    def _begin_generation(self) -> None:
        generation, machine = self.current.generation, self.current.machine
        self._context.progressed.cut(generation.start.round)
        self._executors.begin_generation(self._descriptions(generation), generation, lambda: machine.steps)

    async def _restart(self, restart: Restart) -> None:
        """The parameter server is lost: a new generation from the newest checkpoint."""
        start, context = self.current.start, self._context
        if restart.unusable:
            logger.error(
                "The checkpoint for round %d in %s cannot be used: %s",
                start.round,
                self.current.generation.place,
                restart.reason,
                extra={"job_id": start.job_id, "round": start.round},
            )
            await self.ledger.run(Ledger.forget_checkpoint, start.round)
        generation = await next_generation(self.ledger, self._store, start, context.copies)
        logger.warning(
            "The parameter server was lost (%s); the job goes on from round %d",
            restart.reason,
            generation.start.round,
            extra={"job_id": generation.start.job_id},
        )
        self.current.kept.close()
        self.current = self._generation_of(generation, restart.carried)
        self._surroundings = {}
        self._begin_generation()

    # --- events in, actions out -----------------------------------------------------------------------

    def handle(self, event: Input) -> AnswerSlice | None:
        """Tell the round machine. What follows is carried out in order, and soon; the answer to a question
        for a slice is returned.
        """
        answer: AnswerSlice | None = None
        for action in self.current.machine.handle(event, trio.current_time()):
            if isinstance(action, AnswerSlice):
                answer = action
                continue
            if isinstance(action, Record):
                # at once: a snapshot never shows the next round with the last one's numbers
                self._context.progressed.add(action.entry)
                self._context.pool.worked(action.entry)
            self._actions.send_nowait(action)
        return answer

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
                result = await publish(self._context, self.ledger, self.current.machine, files)
                self._replicating.close()
                await self._context.copies.forget(self.ledger, self.current.start.job_id)
                self._end(result)
            case Fail(error=error):
                self._end(error)
            case AnswerSlice():
                pass  # whoever asked has it

    async def _carry_out_durable(self, action: Durable) -> None:
        match action:
            case Record(entry=entry, tracker=tracker, steps=steps):
                await self.ledger.run(Ledger.record, entry, tracker, steps)
                if entry.generation == self.current.start.generation:
                    self.current.kept.note(tracker.version)
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
                if generation == self.current.start.generation:
                    await self.ledger.run(Ledger.keep_slices, tracker)
                    self.current.kept.note(tracker.version)
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
        if place == "scheduler":
            self._replicating.put(round_, self._store)

    # --- leases ---------------------------------------------------------------------------------------

    async def _leases(self) -> None:
        executors, pool = self._executors, self._context.pool
        async for event in pool.events:
            fields = {"worker_peer_id": event.worker.peer, "lease_id": event.lease_id}
            match event:
                case LeaseGained():
                    if (event.worker.peer, event.kind) in executors.leases:
                        logger.warning("A worker gave two leases; one goes back", extra=fields)
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
                        self.handle(lost(lease, reason))
                case LeaseSuspect():
                    self.handle(Unreachable(event.worker.peer, event.kind))
                case LeaseLeaving(left_s=left_s):
                    self.handle(ParticipantLeaves(event.worker.peer, event.kind, left_s))
                case LeaseRecovered():
                    self.handle(Reachable(event.worker.peer, event.kind))

    def _stamp(self) -> JobStamp:
        start = self.current.start
        return JobStamp(job_id=start.job_id, generation=start.generation)

    def _is_member(self, peer: str) -> bool:
        return any(holder == peer for holder, _ in self._executors.leases)

    def _is_leased(self, peer: str, kind: str) -> bool:
        return any(key == (peer, kind) for key in self._executors.leases)

    def _is_server(self, peer: str, stamp: JobStamp | None) -> bool:
        server = self.current.machine.server
        if server is None or server.peer != peer:
            return False
        return stamp is not None and stamp.generation == self.current.start.generation

    # --- time -----------------------------------------------------------------------------------------

    async def _ticking(self) -> None:
        while True:
            self._tell_once(DataServed(bool(self.dataset.providers)))
            self._tell_once(self._held())
            self.handle(TimePassed())
            # one that goes on after a restart has executors that are worth keeping
            if self.current.machine.phase != "loading" or self.current.start.generation:
                self._context.pool.begin()
            await trio.sleep(_TICK_S)

    def _tell_once(self, event: DataServed | LeasesHeld) -> None:
        """Tell the present machine, unless it knows."""
        name = type(event).__name__
        if self._surroundings.get(name) != event:
            self._surroundings[name] = event
            self.handle(event)

    def _held(self) -> LeasesHeld:
        context = self._context
        kinds = [lease.kind for lease in context.pool.leases]
        train, aggregate = kinds.count("train"), kinds.count("aggregate")
        enough = train >= context.rules.min_workers and aggregate > 0
        what = (
            "" if enough else sentence(context.config, self.current.machine, context.pool, self.dataset, "")
        )
        return LeasesHeld(train, aggregate, what)

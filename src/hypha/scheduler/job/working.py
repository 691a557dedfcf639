"""A job at work: what happens goes into the round machine of its current generation, and every action that
the machine returns is carried out here, in order.

What decides is in the pure modules, what connects them to the network in the handlers and the executors; here
are leases, files, threads and time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import trio

from hypha.errors import HyphaError
from hypha.messages import JobStamp
from hypha.runtime import chance, in_thread
from hypha.scheduler.data.datasets import ServedDataset
from hypha.scheduler.data.slices import SliceTracker
from hypha.scheduler.descriptions import Descriptions, class_names
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.durable.replicas import Replicating
from hypha.scheduler.durable.starts import Generation, next_generation
from hypha.scheduler.executors import JobExecutors
from hypha.scheduler.handlers import FileHandlers, KeptSlices, RequestHandlers
from hypha.scheduler.job.ending import publish, save_last
from hypha.scheduler.job.states import JobContext, JobResult, JobStage, Opened
from hypha.scheduler.leasing.events import Gained, WorkerLeaves
from hypha.scheduler.leasing.renewal import Lapsed, Recovered, Suspected
from hypha.scheduler.rounds import events
from hypha.scheduler.rounds.machine import RoundMachine
from hypha.scheduler.rounds.policy import CarriedOver
from hypha.scheduler.status.view import sentence

logger = logging.getLogger(__name__)

_TICK_S = 0.1


class WorkingJob(JobStage):
    """The third state of a run, after :class:`Opened`. ``end`` is called with what the job comes to; tasks
    run in ``nursery``. :meth:`run` once.
    """

    step = ""
    dataset: ServedDataset
    #: of the current generation
    machine: RoundMachine

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
        self._decided, self._actions = trio.open_memory_channel[events.Action](math.inf)
        node = context.node
        self._executors = JobExecutors(node, nursery, self._handle, opened.left, context.traces)
        self._use(opened.generation, CarriedOver())
        self._file_handlers = FileHandlers(
            node, context.files.directories, opened.store, self._executors.holds, self._is_server
        )
        self._request_handlers = RequestHandlers(
            node,
            opened.dataset,
            lambda: (self.machine.start, self._kept),
            self._handle,
            self._executors.holds,
        )
        self._replicating = Replicating(
            context.replicas,
            opened.ledger,
            context.state,
            lambda: self.machine.start.stamp,
            lambda: context.pool.leases,
            context.config.checkpoint.replicas,
        )

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
        async for action in self._actions:
            # whenever the job is to stop, what the ledger has begun to write is finished
            with trio.CancelScope(shield=isinstance(action, events.Record | events.Checkpointed)):
                await self._carry_out(action)

    async def save_last(self, timeout_s: float) -> None:
        """The job is to stop: have the open round saved as it began."""
        node, machine = self._context.node, self.machine
        await save_last(node, machine, self.ledger, self._actions, self._carry_out_durable, timeout_s)

    async def finish(self, reason: str, timeout_s: float) -> None:
        """Send all executors their end, for at most ``timeout_s``; refuse requests for slices that wait."""
        self._kept.close()
        await self._executors.finish(reason, timeout_s)

    # --- generations ----------------------------------------------------------------------------------------

    def _use(self, generation: Generation, carried: CarriedOver) -> None:
        """Of its slices, workers that are not leased any more lose theirs; its machine gets what was
        ``carried`` over.
        """
        tracker = SliceTracker.from_state(generation.tracker)
        for worker in tracker.holders:
            if (worker, "train") not in self._executors.leases:
                tracker.forget(worker)
        context = self._context
        self._generation = generation
        #: which of its slices are durable
        self._kept = KeptSlices()
        #: what its machine was given of its surroundings, by the event's name
        self._surroundings: dict[str, events.Input] = {}
        self.machine = RoundMachine(
            context.rules, generation.start, tracker, context.node.ref(), carried, context.journal
        )

    def _begin_generation(self) -> None:
        context, generation, machine = self._context, self._generation, self.machine
        manifest = self.dataset.manifest
        descriptions = Descriptions(
            context.config,
            generation.start,
            context.node.ref(),
            class_names(context.config.model, manifest),
            tuple(part.samples for part in manifest.slices),
            self.dataset.manifest_hash,
        )
        context.progressed.cut(generation.start.round)
        self._executors.begin_generation(descriptions, generation, lambda: machine.steps)

    async def _restart(self, restart: events.Restart) -> None:
        """The parameter server is lost: a new generation from the newest checkpoint."""
        start, context = self.machine.start, self._context
        if restart.unusable:
            logger.error(
                "The checkpoint for round %d in %s cannot be used: %s",
                start.round,
                self._generation.place,
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
        self._kept.close()
        self._use(generation, restart.carried)
        self._begin_generation()

    # --- events ---------------------------------------------------------------------------------------

    def _handle(self, event: events.Input) -> events.AnswerSlice | None:
        """Have the machine handle ``event``. What follows is carried out in order, and soon; the reply to a
        request for a slice is returned.
        """
        reply: events.AnswerSlice | None = None
        for action in self.machine.handle(event, trio.current_time()):
            if isinstance(action, events.AnswerSlice):
                reply = action
                continue
            if isinstance(action, events.Record):
                # at once: a snapshot never shows the next round with the last one's numbers
                self._context.progressed.add(action.entry)
                self._context.pool.worked(action.entry)
            self._decided.send_nowait(action)
        return reply

    def _handle_change(self, event: events.DataServed | events.LeasesHeld) -> None:
        """Have the machine handle ``event``, unless that is what it was given last."""
        name = type(event).__name__
        if self._surroundings.get(name) != event:
            self._surroundings[name] = event
            self._handle(event)

    def _is_server(self, peer: str, stamp: JobStamp | None) -> bool:
        """Whether ``peer`` is the parameter server of the current generation, which ``stamp`` is of."""
        server, generation = self.machine.server, self.machine.start.generation
        if server is None or server.peer != peer:
            return False
        return stamp is not None and stamp.generation == generation

    # --- actions --------------------------------------------------------------------------------------

    async def _carry_out(self, action: events.Action) -> None:
        match action:
            case events.Record() | events.FirstTheta() | events.KeepSlices() | events.Checkpointed():
                await self._carry_out_durable(action)
            case events.Send():
                self._executors.send(action)
            case events.Drop(peer=peer, reason=reason):
                logger.warning("A worker is replaced: %s", reason, extra={"worker_peer_id": peer})
                await self._give_back(action, to_blame=True)
            case events.LetGo(peer=peer, reason=reason):
                logger.info("A lease is given back: %s", reason, extra={"worker_peer_id": peer})
                await self._give_back(action, to_blame=False)
            case events.Again(peer=peer, reason=reason, instead_of=instead_of):
                # not all at once, when all failed at once
                pause_s = action.pause_s * chance().uniform(1.0, 1.5)
                fields = {"worker_peer_id": peer, "incarnation": instead_of}
                logger.warning("An executor is started again in %.1f s: %s", pause_s, reason, extra=fields)
                self._executors.again(peer, instead_of, pause_s)
            case events.Restart():
                await self._restart(action)
            case events.Publish(files=files):
                result = await publish(self._context, self.ledger, self.machine, files)
                self._replicating.close()
                await self._context.replicas.forget(self.ledger, self.machine.start.job_id)
                self._end(result)
            case events.Fail(error=error):
                self._end(error)
            case events.AnswerSlice():
                pass  # whoever asked has it

    async def _give_back(self, action: events.Drop | events.LetGo, to_blame: bool) -> None:
        lease = self._executors.lost(action.peer, action.kind)
        if lease is None:
            return
        await self.ledger.run(Ledger.lease_ended, lease.lease_id)
        if to_blame:
            await self.ledger.run(Ledger.failed, action.peer, action.reason)
        self._nursery.start_soon(self._context.pool.release, lease.lease_id, to_blame)

    async def _carry_out_durable(self, action: events.Durable) -> None:
        match action:
            case events.Record(entry=entry, tracker=tracker, steps=steps):
                await self.ledger.run(Ledger.record, entry, tracker, steps)
                if entry.generation == self.machine.start.generation:
                    self._kept.note(tracker.version)
                logger.info(
                    "Round %d of %d was applied: %d samples of %d workers, loss %.4f",
                    entry.round + 1,
                    self._context.rules.rounds,
                    entry.samples,
                    len(entry.contributors),
                    entry.loss,
                    extra={"round": entry.round},
                )
            case events.KeepSlices(generation=generation, tracker=tracker):
                if generation == self.machine.start.generation:
                    await self.ledger.run(Ledger.keep_slices, tracker)
                    self._kept.note(tracker.version)
            case events.FirstTheta(theta=theta):
                await self.ledger.run(Ledger.first_theta, theta)
            case events.Checkpointed(round=round_, place=place):
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
            lease, peer, kind = event.lease, event.lease.worker.peer, event.lease.kind
            match event.change:
                case Gained():
                    if (peer, kind) in executors.leases:
                        logger.warning(
                            "A worker gave two leases for one kind of job; one is released",
                            extra={"worker_peer_id": peer, "lease_id": lease.lease_id},
                        )
                        await pool.release(lease.lease_id, avoid=True)
                    else:
                        executors.gained(lease)
                        await self.ledger.run(Ledger.lease_gained, lease)
                case Lapsed(reason, refused):
                    await self.ledger.run(Ledger.lease_ended, lease.lease_id)
                    if not refused:
                        await self.ledger.run(Ledger.failed, peer, reason)
                    if executors.lost(peer, kind) is not None:
                        self._handle(events.ParticipantLost(peer, kind, reason))
                case Suspected():
                    self._handle(events.Unreachable(peer, kind))
                case WorkerLeaves(_, left_s):
                    self._handle(events.ParticipantLeaves(peer, kind, left_s))
                case Recovered():
                    self._handle(events.Reachable(peer, kind))

    # --- time -----------------------------------------------------------------------------------------

    async def _ticking(self) -> None:
        while True:
            self._handle_change(events.DataServed(bool(self.dataset.providers)))
            self._handle_change(self._held())
            self._handle(events.TimePassed())
            # one that goes on after a restart has executors that are worth keeping
            if self.machine.phase != "loading" or self.machine.start.generation:
                self._context.pool.begin()
            await trio.sleep(_TICK_S)

    def _held(self) -> events.LeasesHeld:
        context = self._context
        kinds = [lease.kind for lease in context.pool.leases]
        train, aggregate = kinds.count("train"), kinds.count("aggregate")
        enough = train >= context.rules.min_workers and aggregate > 0
        what = "" if enough else sentence(context.config, self.machine, context.pool, self.dataset, "")
        return events.LeasesHeld(train, aggregate, what)

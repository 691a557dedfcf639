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

from hypha.errors import HyphaError, NetworkError
from hypha.messages import JobStamp, PeerRef, SaveCheckpoint, Steer
from hypha.runtime import chance, in_thread
from hypha.scheduler.data.datasets import ServedDataset
from hypha.scheduler.data.slices import SliceTracker
from hypha.scheduler.descriptions import Descriptions
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.durable.replicas import Replicating
from hypha.scheduler.durable.starts import Generation, next_generation
from hypha.scheduler.durable.state_directory import CheckpointStore
from hypha.scheduler.executors import JobExecutors
from hypha.scheduler.handlers import FileHandlers, RequestHandlers
from hypha.scheduler.job.ending import publish
from hypha.scheduler.job.opening import Opened
from hypha.scheduler.job.states import JobContext, JobResult, JobStage
from hypha.scheduler.leasing.events import Gained, WorkerLeaves
from hypha.scheduler.leasing.renewal import Lapsed, Recovered, Suspected
from hypha.scheduler.rounds import events
from hypha.scheduler.rounds.machine import RoundMachine
from hypha.scheduler.rounds.policy import CarriedOver
from hypha.scheduler.status.view import sentence

logger = logging.getLogger(__name__)

_TICK_S = 0.1
#: of the request to save the open round: above the numbers of all directives before it, and below that of the
#: last one
_SAVE_SEQ = (1 << 62) - 1
_SAVE_PAUSE_S = 0.1


class WorkingJob(JobStage):
    """A job that was ``opened``. ``end`` is called with what it comes to; tasks run in ``nursery``.
    :meth:`run` once.
    """

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
        super().__init__("", opened.dataset)
        self._context = context
        self._ledger = opened.ledger
        #: whether the ledger has what the machine said last of slices, as far as it was carried out
        self._slices_kept = True
        job_id, keep = opened.generation.start.job_id, context.config.checkpoint.keep
        self._store = CheckpointStore(context.state, job_id, keep)
        self._nursery = nursery
        self._end = end
        #: an event is set once all before it is carried out
        self._decided, self._actions = trio.open_memory_channel[events.Action | trio.Event](math.inf)
        node = context.node
        left = opened.left if opened.resumed else ()
        self.executors = JobExecutors(node, nursery, self._handle, left, context.traces)
        self._replicating = Replicating(
            context.replicas,
            opened.ledger,
            self._store,
            lambda: self.machine.start.stamp,
            lambda: context.pool.leases,
            context.config.checkpoint.replicas,
        )
        self._begin(opened.generation, CarriedOver())

    async def run(self) -> None:
        """Until ``end`` was called, or cancelled."""
        node, pool, executors = self._context.node, self._context.pool, self.executors
        FileHandlers(node, self._context.directories, self._store, executors.holds, self._is_server).open()
        RequestHandlers(node, self.dataset, self._handle, self._carried_out, executors.holds).open()
        for record in await self._ledger.run(Ledger.track_records):
            pool.know(record)
        pool.want("aggregate", 1)
        pool.want("train", self._context.config.resources.num_workers)
        self._nursery.start_soon(self.dataset.watch, node)
        self._nursery.start_soon(self._leases)
        self._nursery.start_soon(self._ticking)
        newest, *_ = await self._ledger.run(Ledger.starts)
        if newest.place == "scheduler":
            self._replicating.put(newest.round)
        self._nursery.start_soon(self._replicating.run)
        async for action in self._actions:
            # whenever the job is to stop, what the ledger has begun to write is finished
            with trio.CancelScope(shield=isinstance(action, events.Record | events.Checkpointed)):
                await self._carry_out(action)

    async def save_last(self, timeout_s: float) -> None:
        """The job is to stop: have the open round saved as it began, unless it is, for at most ``timeout_s``.
        What was decided is carried out only as far as the ledger is to have it.
        """
        machine = self.machine
        while self._actions.statistics().current_buffer_used:
            await self._carry_out_durable()
        asked_for, newest = machine.round, await self._newest_start()
        server = machine.server if machine.server_ready and machine.phase not in ("done", "failed") else None
        if server is not None and newest < asked_for:
            with trio.move_on_after(timeout_s):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._request_save, server, asked_for)
                    while newest < machine.round:
                        if isinstance(await self._carry_out_durable(), events.Checkpointed):
                            newest = await self._newest_start()
                    nursery.cancel_scope.cancel()
        fields = {"job_id": machine.start.job_id}
        if newest < machine.round:
            text = "Round %d could not be saved in time; the job will go on from round %d"
            logger.warning(text, machine.round, newest, extra=fields)
        else:
            logger.info("The job will go on from round %d", newest, extra=fields)

    async def _carry_out_durable(self) -> events.Action | trio.Event:
        action = await self._actions.receive()
        if isinstance(action, events.Durable | trio.Event):
            await self._carry_out(action)
        return action

    async def _newest_start(self) -> int:
        newest, *_ = await self._ledger.run(Ledger.starts)
        return newest.round

    async def _request_save(self, server: PeerRef, round_: int) -> None:
        """Send it until it is delivered."""
        stamp, save = self.machine.start.stamp, SaveCheckpoint(round=round_)
        steer = Steer(stamp=stamp, kind="aggregate", seq=_SAVE_SEQ, directive=save)
        while True:
            try:
                await self._context.node.request(server.peer, steer)
                return
            except NetworkError as exc:
                fields = {"worker_peer_id": server.peer}
                logger.debug("The request to save a checkpoint was not delivered: %s", exc, extra=fields)
            await trio.sleep(_SAVE_PAUSE_S)

    def _begin(self, generation: Generation, carried: CarriedOver) -> None:
        """Of its slices, workers that are not leased any more lose theirs; its machine gets what was
        ``carried`` over.
        """
        tracker = SliceTracker.from_state(generation.tracker)
        for worker in tracker.holders:
            if (worker, "train") not in self.executors.leases:
                tracker.forget(worker)
        context = self._context
        self._generation = generation
        #: what its machine was given of its surroundings last
        self._surroundings: dict[type, events.Input] = {}
        self.machine = machine = RoundMachine(
            context.rules, generation.start, tracker, context.node.ref(), carried, context.journal
        )
        descriptions = Descriptions(context.config, generation.start, context.node.ref(), self.dataset)
        context.progressed.cut(generation.start.round)
        self.executors.begin_generation(descriptions, generation, lambda: machine.steps)

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
            await self._ledger.run(Ledger.forget_checkpoint, start.round)
        generation = await next_generation(self._ledger, self._store, start, context.replicas)
        logger.warning(
            "The parameter server was lost (%s); the job goes on from round %d",
            restart.reason,
            generation.start.round,
            extra={"job_id": generation.start.job_id},
        )
        self._begin(generation, restart.carried)

    def _handle(self, event: events.Input) -> list[events.Action]:
        """What the machine decides on ``event``; that is carried out in order, and soon."""
        decided = self.machine.handle(event, trio.current_time())
        for action in decided:
            if isinstance(action, events.Record):
                # at once: a snapshot never shows the next round with the last one's numbers
                self._context.progressed.add(action.entry)
                self._context.pool.worked(action.entry)
            self._decided.send_nowait(action)
        return decided

    async def _carried_out(self) -> None:
        """Return when all that was decided so far is carried out."""
        done = trio.Event()
        self._decided.send_nowait(done)
        await done.wait()

    def _is_server(self, peer: str, stamp: JobStamp | None) -> bool:
        """Whether ``peer`` is the parameter server of the current generation, which ``stamp`` is of."""
        server, generation = self.machine.server, self.machine.start.generation
        if server is None or server.peer != peer:
            return False
        return stamp is not None and stamp.generation == generation

    async def _carry_out(self, action: events.Action | trio.Event) -> None:
        match action:
            case trio.Event() if self._slices_kept:
                action.set()
            case trio.Event():
                pass  # what it waits for was not written, as the job stops
            case events.Record(entry=entry, tracker=tracker, steps=steps):
                await self._ledger.run(Ledger.record, entry, tracker, steps)
                logger.info(
                    "Round %d of %d was applied: %d samples of %d workers, loss %.4f",
                    entry.round + 1,
                    self._context.rules.rounds,
                    entry.samples,
                    len(entry.contributors),
                    entry.loss,
                    extra={"round": entry.round},
                )
            case events.KeepSlices(tracker=tracker):
                self._slices_kept = False
                await self._ledger.run(Ledger.keep_slices, tracker)
                self._slices_kept = True
            case events.FirstTheta(theta=theta):
                await self._ledger.run(Ledger.first_theta, theta)
            case events.Checkpointed(round=round_, place=place):
                await self._checkpointed(round_, place)
            case events.Send():
                self.executors.send(action)
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
                self.executors.again(peer, instead_of, pause_s)
            case events.Restart():
                await self._restart(action)
            case events.Publish(files=files):
                result = await publish(self._context, self._ledger, self.machine, files)
                self._replicating.close()
                await self._context.replicas.forget(self._ledger, self.machine.start.job_id)
                self._end(result)
            case events.Fail(error=error):
                self._end(error)
            case events.AnswerSlice():
                pass  # whoever asked has it, and waits for what is before it

    async def _give_back(self, action: events.Drop | events.LetGo, to_blame: bool) -> None:
        lease = self.executors.lost(action.peer, action.kind)
        if lease is None:
            return
        await self._ledger.run(Ledger.lease_ended, lease.lease_id)
        if to_blame:
            await self._ledger.run(Ledger.failed, action.peer, action.reason)
        self._nursery.start_soon(self._context.pool.release, lease.lease_id, to_blame)

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
        await self._ledger.run(Ledger.checkpoint, round_, place)
        self._context.progressed.checkpoint = round_
        self._context.progressed.checkpoint_at = trio.current_time()
        # at any other place the files are pruned by the parameter server's worker, which can write there
        rounds = {start.round for start in await self._ledger.run(Ledger.starts) if start.place}
        for old in self._store.outdated(rounds):
            await self._ledger.run(Ledger.forget_checkpoint, old)
            rounds.remove(old)
        if place == "scheduler":
            await in_thread(self._store.keep_only, rounds)
            self._replicating.put(round_)

    async def _leases(self) -> None:
        executors, pool = self.executors, self._context.pool
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
                        await self._ledger.run(Ledger.lease_gained, lease)
                case Lapsed(reason, refused):
                    await self._ledger.run(Ledger.lease_ended, lease.lease_id)
                    if not refused:
                        await self._ledger.run(Ledger.failed, peer, reason)
                    if executors.lost(peer, kind) is not None:
                        self._handle(events.ParticipantLost(peer, kind, reason))
                case Suspected():
                    self._handle(events.Unreachable(peer, kind))
                case WorkerLeaves(_, left_s):
                    self._handle(events.ParticipantLeaves(peer, kind, left_s))
                case Recovered():
                    self._handle(events.Reachable(peer, kind))

    async def _ticking(self) -> None:
        while True:
            around: tuple[events.Input, ...] = (events.DataServed(bool(self.dataset.providers)), self._held())
            for event in around:
                if self._surroundings.get(type(event)) != event:
                    self._surroundings[type(event)] = event
                    self._handle(event)
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

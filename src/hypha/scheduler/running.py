"""A job from its configuration to its published model: the loop that wires the machines to the network.

Everything that decides is in the pure modules beside this one; here are leases, files, threads and time.
What ends a job comes out as one :class:`HyphaError` with its exit code.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import trio

from hypha.config.models import JobConfig
from hypha.errors import AllocationFailed, HyphaError, JobFailed, OutputError
from hypha.journal import Journal
from hypha.messages import JobStamp
from hypha.node import Node
from hypha.runtime import chance, in_thread, new_id
from hypha.scheduler.allocator import Pace
from hypha.scheduler.checkpoints import CheckpointStore
from hypha.scheduler.crew import Crew, lost
from hypha.scheduler.datasets import Dataset, find_dataset
from hypha.scheduler.describe import Descriptions
from hypha.scheduler.desk import Desk
from hypha.scheduler.events import (
    Action,
    Again,
    Checkpointed,
    Drop,
    Fail,
    Input,
    Keep,
    Publish,
    Reachable,
    Record,
    Restart,
    Send,
    Tick,
    Unreachable,
)
from hypha.scheduler.export import Output, Published
from hypha.scheduler.ledger import Ledger, export_ledger, held_leases
from hypha.scheduler.lives import Life, first_life, next_life
from hypha.scheduler.pool import LeaseGained, LeaseLost, LeaseRecovered, LeaseSuspect, Pool, asks_from
from hypha.scheduler.replicas import Copies
from hypha.scheduler.replicating import Replicating
from hypha.scheduler.rounds import RoundMachine
from hypha.scheduler.rules import Failures, Rules
from hypha.scheduler.serving import ServedDirectory, Serving
from hypha.scheduler.slices import SliceTracker
from hypha.scheduler.snapshot import JobSnapshot
from hypha.scheduler.state import StateDirectory
from hypha.scheduler.stopping import save_last
from hypha.scheduler.view import Progressed, snapshot_of

logger = logging.getLogger("hypha.scheduler")

_TICK_S = 0.1
_OBSERVE_S = 0.2
#: SIGTERM to exit is promised within 5 s; this is our part
_SAVE_S = 1.8
_FAREWELL_S = 0.8
_RELEASE_S = 0.8

Observer = Callable[[JobSnapshot], None]


@dataclass(frozen=True)
class JobResult:
    """A finished job; ``output`` is where the model is."""

    name: str
    job_id: str
    rounds: int
    samples: int
    loss: float | None
    theta: str
    output: str
    ledger: Path
    wall_s: float
    workers: int


class RunningJob:
    """One run of a job; :meth:`run` once. ``node`` is connected or will be."""

    def __init__(
        self,
        config: JobConfig,
        node: Node,
        state: StateDirectory,
        output: Output,
        directories: dict[str, ServedDirectory],
        observe: Observer | None,
        journal: Journal | None = None,
    ) -> None:
        self.journal = journal or Journal()
        self.config = config
        self.node = node
        self.state = state
        self.output = output
        self.observe = observe
        self.rules = Rules.from_config(config)
        self.failures = Failures(limit=self.rules.max_failures)
        self.progressed = Progressed()
        self.serving = Serving(node, directories, self._is_member, self._is_server)
        pool = config.resources
        self.pool = Pool(
            node,
            asks_from(pool, config.dataset.dataset),
            Pace(offer_deadline_s=pool.offer_deadline_s),
            journal=self.journal,
        )
        self.began = trio.current_time()
        self.dataset: Dataset | None = None
        self.life: Life | None = None
        self.machine: RoundMachine | None = None
        self.crew: Crew | None = None
        self.ledger: Ledger | None = None
        self.store: CheckpointStore | None = None
        self.copies = Copies(node, config.name)
        self.replicating: Replicating | None = None
        self._actions, self._todo = trio.open_memory_channel[Action](math.inf)
        self._outcome: JobResult | HyphaError | None = None
        self._scope = trio.CancelScope()
        self._message = ""
        self._theta_noted = False
        self._restarting = False
        self._kept_version = -1
        self._output = ""

    # --- life -----------------------------------------------------------------------------------------

    async def run(self, fresh: bool) -> JobResult:
        """To the end; raises what ended it."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._observing)
                    await self._prepare(fresh, nursery)
                    await self._work(nursery)
        except* HyphaError as group:
            self._outcome = _first(group)
        finally:
            with trio.CancelScope(shield=True):
                done = isinstance(self._outcome, JobResult)
                if not done:
                    await self._save_last()
                if self.crew is not None:
                    await self.crew.finish("done" if done else "the scheduler stops", _FAREWELL_S)
                if self.life is not None:
                    await self.pool.close(_RELEASE_S)
                # else what an earlier scheduler left is as it was
                if self.ledger is not None:
                    # on a full disk it would wait; then the next scheduler gives back what is over
                    with trio.move_on_after(_RELEASE_S):
                        await self.ledger.run(Ledger.lease_ended)
                    self.ledger.close()
            self._look()
        if isinstance(self._outcome, JobResult):
            return self._outcome
        raise self._outcome or JobFailed("the job ended without a result")

    async def _save_last(self) -> None:
        if self.machine is None or self.ledger is None:
            return
        async with trio.open_nursery() as nursery:
            await save_last(
                self.node,
                self.machine,
                self.ledger,
                self._todo,
                lambda action: self._carry_out(action, nursery),
                _SAVE_S,
            )

    async def _prepare(self, fresh: bool, nursery: trio.Nursery) -> None:
        self._message = "waiting for a gateway"
        await self.node.wait_connected()
        left = await held_leases(self.state.ledger)
        if not fresh:
            # their time runs: they are renewed while everything else is looked for
            self.pool.adopt(left)
        await nursery.start(self.pool.run)
        name = self.config.dataset.dataset
        self._message = f"looking for the dataset {name}"
        self.dataset = await find_dataset(self.node, name, self.config.dataset.wait_s)
        logger.info(
            "The dataset %s has %d samples in %d slices at %d data nodes",
            name,
            self.dataset.manifest.samples,
            len(self.dataset.manifest.slices),
            len(self.dataset.providers),
        )
        self._message = "reading the job's state"
        job_id = f"{self.config.name}-{new_id()[:12]}"
        self.ledger, self.life = await first_life(
            self.state, self.config, self.node.ref(), self.dataset, job_id, self.copies, fresh
        )
        start = self.life.start
        self.store = CheckpointStore(self.state, start.job_id, self.config.checkpoint.keep)
        self.serving.start(start.job_id, self.store, self.state)
        if start.generation:
            file = await self.ledger.run(Ledger.to_file)
            self.progressed.resume(file.rounds)
            logger.info("The job goes on from round %d", start.round, extra={"job_id": start.job_id})
        self.crew = Crew(self.node, nursery, self._handle, self._refused)
        if not left:
            return
        if start.generation:
            logger.info("Going on with %d leases of this job's earlier scheduler", len(left))
            self.crew.adopt(left)
        else:
            logger.info("Giving back %d leases of an earlier job", len(left))
            self.pool.adopt(left if fresh else ())
            await self._give_back(left)

    async def _give_back(self, left: Iterable[LeaseGained]) -> None:
        with trio.move_on_after(_RELEASE_S):
            async with trio.open_nursery() as nursery:
                for lease in left:
                    nursery.start_soon(self.pool.release, lease.lease_id)

    async def _work(self, nursery: trio.Nursery) -> None:
        assert self.dataset is not None
        self._begin_life()
        desk = Desk(
            self.node, lambda: self.machine, self.dataset, self._handle, self._is_leased, self._slices_kept
        )
        desk.open()
        self.pool.want("aggregate", 1)
        self.pool.want("train", self.config.resources.num_workers)
        nursery.start_soon(self.dataset.watch, self.node)
        nursery.start_soon(self._leases)
        nursery.start_soon(self._ticking)
        await self._start_replicating(nursery)
        await self._carry_out_all(nursery)

    async def _start_replicating(self, nursery: trio.Nursery) -> None:
        assert self.ledger is not None
        assert self.store is not None
        self.replicating = Replicating(
            self.node,
            self.copies,
            self.ledger,
            self.state,
            self._stamp,
            lambda: self.pool.leases,
            self.config.name,
            self.config.checkpoint.replicas,
        )
        starts = await self.ledger.run(Ledger.starts)
        if starts and starts[0].place == "scheduler":
            self.replicating.put(starts[0].round, self.store)
        nursery.start_soon(self.replicating.run)

    def _stamp(self) -> JobStamp:
        assert self.life is not None
        start = self.life.start
        return JobStamp(job_id=start.job_id, generation=start.generation)

    def _begin_life(self) -> None:
        assert self.life is not None
        assert self.crew is not None
        start = self.life.start
        tracker = SliceTracker.from_state(self.life.tracker)
        for worker in tracker.holders:
            if not self._is_leased(worker, "train"):
                tracker.forget(worker)
        self.machine = RoundMachine(self.rules, start, tracker, self.node.ref(), self.failures, self.journal)
        self.progressed.cut(start.round)
        machine = self.machine
        descriptions = Descriptions(self.config, start, self.node.ref())
        self._restarting = False
        self.crew.begin_life(descriptions, self.life, lambda: machine.steps)

    def _end(self, outcome: JobResult | HyphaError) -> None:
        self._outcome = self._outcome or outcome
        self._scope.cancel()

    # --- events in, actions out -----------------------------------------------------------------------

    def _handle(self, event: Input) -> None:
        if self.machine is None or self._restarting:
            return
        for action in self.machine.handle(event, trio.current_time()):
            if isinstance(action, Restart):
                self._restarting = True
            if isinstance(action, Record):
                # at once: a snapshot never shows the next round with the last one's numbers
                self.progressed.add(action.entry)
            self._actions.send_nowait(action)

    async def _carry_out_all(self, nursery: trio.Nursery) -> None:
        async for action in self._todo:
            # whenever the job is told to stop, what is begun in the books is finished
            with trio.CancelScope(shield=isinstance(action, Record | Checkpointed)):
                await self._carry_out(action, nursery)

    async def _carry_out(self, action: Action, nursery: trio.Nursery) -> None:
        assert self.ledger is not None
        assert self.crew is not None
        match action:
            case Send():
                self.crew.send(action)
            case Record(entry=entry, tracker=tracker, steps=steps):
                await self.ledger.run(Ledger.record, entry, tracker, steps)
                logger.info(
                    "Round %d of %d was applied: %d samples of %d workers, loss %.4f",
                    entry.round + 1,
                    self.rules.rounds,
                    entry.samples,
                    len(entry.contributors),
                    entry.loss,
                    extra={"round": entry.round},
                )
            case Keep(generation=generation, tracker=tracker, kept=kept):
                assert self.life is not None
                if generation == self.life.start.generation:
                    await self.ledger.run(Ledger.keep_slices, tracker)
                kept()
            case Checkpointed(round=round_, place=place):
                await self._checkpointed(round_, place)
            case Drop(peer=peer, kind=kind, reason=reason):
                logger.warning("A worker is replaced: %s", reason, extra={"peer_id": peer})
                lease = self.crew.lost(peer, kind)
                if lease is not None:
                    await self.ledger.run(Ledger.lease_ended, lease.lease_id)
                    nursery.start_soon(self.pool.release, lease.lease_id, True)
            case Again(peer=peer, reason=reason, instead_of=instead_of):
                # not all at once, when all failed at once
                pause_s = action.pause_s * chance().uniform(1.0, 1.5)
                fields = {"peer_id": peer, "incarnation": instead_of}
                logger.warning("An executor is started again in %.1f s: %s", pause_s, reason, extra=fields)
                self.crew.again(peer, instead_of, pause_s)
            case Restart():
                await self._restart(action)
            case Publish(files=files):
                await self._publish(files)
            case Fail(error=error):
                self._end(error)

    async def _checkpointed(self, round_: int, place: str) -> None:
        assert self.ledger is not None
        assert self.store is not None
        if self.config.checkpoint.place == "scheduler":
            place = "scheduler"
            try:
                complete = await in_thread(self.store.complete, round_)
            except OSError as exc:
                logger.error("The checkpoint for round %d cannot be kept: %s", round_, exc)
                return
            if not complete:
                logger.error("A checkpoint for round %d was announced, but its files are not here", round_)
                return
        await self.ledger.run(Ledger.checkpoint, round_, place)
        self.progressed.checkpoint = round_
        # at any other place the files are pruned by the parameter server's worker, which can write there
        rounds = [start.round for start in await self.ledger.run(Ledger.starts) if start.place]
        for old in await in_thread(self.store.prune, rounds):
            await self.ledger.run(Ledger.forget_checkpoint, old)
        if self.replicating is not None and place == "scheduler":
            self.replicating.put(round_, self.store)

    async def _restart(self, restart: Restart) -> None:
        """The parameter server is lost: a new generation from the newest checkpoint."""
        assert self.ledger is not None
        assert self.life is not None
        assert self.store is not None
        if restart.unusable:
            start = self.life.start
            logger.error(
                "The checkpoint for round %d in %s cannot be used: %s",
                start.round,
                self.life.place,
                restart.reason,
                extra={"job_id": start.job_id, "round": start.round},
            )
            await self.ledger.run(Ledger.forget_checkpoint, start.round)
        if self.machine is not None:
            await self.ledger.run(Ledger.keep_slices, self.machine.tracker.to_state())
        self.life = await next_life(self.ledger, self.store, self.life.start, self.copies)
        logger.warning(
            "The parameter server was lost (%s); the job goes on from round %d",
            restart.reason,
            self.life.start.round,
            extra={"job_id": self.life.start.job_id},
        )
        self._theta_noted = False
        self._begin_life()

    async def _publish(self, files: tuple[str, ...]) -> None:
        assert self.ledger is not None
        assert self.machine is not None
        start = self.machine.start
        export = self.state.export_of(start.generation)
        missing = [name for name in files if not (export / name).is_file()]
        if missing or not files:
            what = ", ".join(missing) or "any file"
            raise JobFailed(f"the parameter server exported the model without {what}")
        about = Published(
            job=self.config.name,
            job_id=start.job_id,
            rounds=self.rules.rounds,
            samples=self.progressed.samples,
            theta=self.machine.theta,
        )
        # before the model: what fails here must not leave a model that is published once more
        file = await self.ledger.run(Ledger.to_file)
        path = self.state.path / "ledger.json"
        try:
            await in_thread(export_ledger, file, path)
        except OSError as exc:
            raise OutputError(f"{path} cannot be written: {exc}; make room and start the job again") from exc
        self._output = await in_thread(self.output.publish, export, about)
        await self.ledger.run(Ledger.done)
        if self.replicating is not None:
            self.replicating.close()
        await self.copies.forget(self.ledger, start.job_id)
        logger.info("The trained model is in %s", self._output, extra={"job_id": start.job_id})
        counted = [entry for entry in file.rounds if not entry.discarded]
        self._end(
            JobResult(
                name=self.config.name,
                job_id=start.job_id,
                rounds=self.rules.rounds,
                samples=self.progressed.samples,
                loss=self.progressed.loss,
                theta=self.machine.theta,
                output=self._output,
                ledger=path,
                wall_s=trio.current_time() - self.began,
                workers=len({part.worker for entry in counted for part in entry.contributors}),
            )
        )

    async def _slices_kept(self) -> None:
        """Return when another scheduler would know who trains on which slice."""
        machine, kept = self.machine, trio.Event()
        if machine is not None:
            state = machine.tracker.to_state()
            self._actions.send_nowait(Keep(machine.start.generation, state, kept.set))
            await kept.wait()

    # --- leases ---------------------------------------------------------------------------------------

    async def _leases(self) -> None:
        assert self.crew is not None
        assert self.ledger is not None
        async for event in self.pool.events:
            fields = {"peer_id": event.worker.peer, "lease_id": event.lease_id}
            match event:
                case LeaseGained():
                    if (event.worker.peer, event.kind) in self.crew.leases:
                        logger.warning("A worker gave two leases; one goes back", extra=fields)
                        await self.pool.release(event.lease_id, avoid=True)
                    else:
                        self.crew.gained(event)
                        await self.ledger.run(Ledger.lease_gained, event)
                case LeaseLost(reason=reason):
                    await self.ledger.run(Ledger.lease_ended, event.lease_id)
                    lease = self.crew.lost(event.worker.peer, event.kind)
                    if lease is not None:
                        self._handle(lost(lease, reason))
                case LeaseSuspect():
                    self._handle(Unreachable(event.worker.peer, event.kind))
                case LeaseRecovered():
                    self._handle(Reachable(event.worker.peer, event.kind))

    def _refused(self, lease: LeaseGained, reason: str) -> None:
        """A worker that will not do the job is as bad as one that fails at it."""
        error = self.failures.add(lease.worker.peer, lease.kind, reason, "refused")
        self._actions.send_nowait(
            Fail(error) if error is not None else Drop(lease.worker.peer, lease.kind, reason)
        )
        self._handle(lost(lease, reason))

    def _is_member(self, peer: str) -> bool:
        return self.crew is not None and any(holder == peer for holder, _ in self.crew.leases)

    def _is_leased(self, peer: str, kind: str) -> bool:
        return self.crew is not None and any(key == (peer, kind) for key in self.crew.leases)

    def _is_server(self, peer: str, stamp: JobStamp | None) -> bool:
        machine = self.machine
        if machine is None or machine.server is None or machine.server.peer != peer:
            return False
        return stamp is not None and stamp.generation == machine.start.generation

    # --- time -----------------------------------------------------------------------------------------

    async def _ticking(self) -> None:
        assert self.ledger is not None
        short_since: float | None = None
        while True:
            self._handle(Tick())
            machine = self.machine
            if machine is not None and self.dataset is not None:
                machine.starved = not self.dataset.providers
                if machine.theta and machine.round == 0 and not self._theta_noted:
                    self._theta_noted = True
                    await self.ledger.run(Ledger.first_theta, machine.theta)
                if machine.tracker.version != self._kept_version and not self._restarting:
                    self._kept_version = machine.tracker.version
                    state = machine.tracker.to_state()
                    self._actions.send_nowait(Keep(machine.start.generation, state, lambda: None))
            short_since = self._short(short_since)
            await trio.sleep(_TICK_S)

    def _short(self, since: float | None) -> float | None:
        """Since when there are too few leases; ends the job when that is longer than it wants to wait."""
        held = self.pool.leases
        train = sum(1 for lease in held if lease.kind == "train")
        now = trio.current_time()
        if train >= self.rules.min_workers and train < len(held):
            return None
        since = now if since is None else since
        wait_s = self.config.resources.wait_s
        if wait_s is not None and now - since >= wait_s:
            self._end(
                AllocationFailed(
                    f"after {wait_s:g} s still {self._snapshot().message}; "
                    "start more workers, ask for less or raise price.max"
                )
            )
        return since

    def _snapshot(self) -> JobSnapshot:
        return snapshot_of(
            self.config,
            self.machine,
            self.pool,
            self.dataset,
            self.progressed,
            self._message,
            self._outcome if isinstance(self._outcome, HyphaError) else None,
            self._output,
            trio.current_time() - self.began,
        )

    def _look(self) -> None:
        if self.observe is not None:
            self.observe(self._snapshot())

    async def _observing(self) -> None:
        while True:
            self._look()
            await trio.sleep(_OBSERVE_S)


def _first(group: BaseExceptionGroup[HyphaError]) -> HyphaError:
    for exc in group.exceptions:
        return _first(exc) if isinstance(exc, BaseExceptionGroup) else exc
    raise JobFailed("an empty group of errors")

"""The parameter server: ``python -m hypha.executor.parameter_server SOCKET``, run in the job directory.

It holds theta and momentum, adds the workers' updates up as they arrive, and applies the outer step when
the scheduler closes the round. One thread handles everything in the order in which it came; sending theta,
checkpoints and the finished model happens in others, from files that do not change any more.

A round that is closed without any update leaves theta and momentum as they are; the next round begins.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import sys
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from hypha.decoding import MAX_REASON
from hypha.errors import CheckpointUnusable, DataError, ModelError, PeerUnreachable, Refused
from hypha.executor.bridge.client import ALIVE_S, BridgeClient
from hypha.executor.bridge.spans import Traces
from hypha.executor.files import tensors
from hypha.executor.files.reused import ReusedFiles
from hypha.executor.files.theta import Theta
from hypha.executor.files.updates import contribution_in
from hypha.executor.models.model_files import ModelFiles
from hypha.executor.outer.admission import admit, check_contribution
from hypha.executor.outer.archive import Archive, CheckpointState, read_checkpoint
from hypha.executor.outer.step import OuterStep
from hypha.executor.running import begin_traces, leave, run_executor
from hypha.executor.threads import WorkQueue
from hypha.messages import (
    AggregateJob,
    Alive,
    CloseRound,
    Directive,
    Export,
    Finish,
    Members,
    ModelReady,
    PeerRef,
    Peers,
    ReceivedFile,
    Reference,
    Rejoin,
    RoundApplied,
    SaveCheckpoint,
    SendCall,
    SendModel,
    UpdateReceived,
    UpdateRefused,
)
from hypha.naming import cleaned
from hypha.tracing.operations import (
    BROADCAST,
    CHECKPOINT,
    EXPORT,
    LOAD_MODEL,
    OUTER_STEP,
    RECEIVE_UPDATE,
)

logger = logging.getLogger("hypha.executor.parameter_server")


class ParameterServer:
    """One aggregation job, from its model to ``Finish``."""

    def __init__(self, bridge: BridgeClient, job: AggregateJob, traces: Traces) -> None:
        """Directives are received from now on."""
        self._bridge = bridge
        self._job = job
        self._traces = traces
        #: of the job's current generation
        self._generation = job.generation
        self._changed = bridge.threads.condition()
        self._inputs: deque[Directive | ReceivedFile | Exception] = deque()
        self._members: Members | None = None
        #: updates that came before it was said who takes part, or for how many samples they may stand
        self._early: list[ReceivedFile] = []
        self._broadcasts = WorkQueue(bridge.threads, "theta", self.put, at_once=8)
        self._links = 0
        self._archive = Archive(bridge, job, self.put)
        #: what was reported of the updates of the open round, by worker; and of the round before it, which
        #: ends with its RoundApplied
        self._received: dict[str, UpdateReceived] = {}
        self._applied: tuple[UpdateReceived | RoundApplied, ...] = ()
        self.round = job.round
        self._contributors: tuple[str, ...] = ()
        #: done with, to be written over
        self._updates = ReusedFiles(bridge.directory / "incoming" / ".spare")
        self._thetas = ReusedFiles(bridge.directory / "outgoing" / ".spare", limit=1)
        bridge.failed = self.put
        bridge.directives(self.put)

    def put(self, item: Directive | ReceivedFile | Exception) -> None:
        """Something to handle, from any thread."""
        with self._changed:
            self._inputs.append(item)
            self._changed.notify_all()

    async def run(self) -> None:
        """Serve until ``Finish``. Raises what makes going on impossible."""
        with self._traces.in_dispatch(LOAD_MODEL):
            await self._load()
        self._bridge.receive(("update",), self.put)
        count = sum(value.numel() for value in self._theta.parameters.values())
        logger.info("Holding theta of round %d: %d parameters.", self.round, count)
        self._ready()
        while not isinstance(item := await self._next(), Finish):
            if isinstance(item, Exception):
                raise item
            await self._handle(item)
        await self._archive.finish()

    async def _next(self) -> Directive | ReceivedFile | Exception:
        with self._changed:
            while not await self._changed.wait_for(lambda: bool(self._inputs), ALIVE_S):
                self._bridge.report(Alive())
            return self._inputs.popleft()

    def _ready(self) -> None:
        count = sum(value.numel() for value in self._theta.parameters.values())
        size = self._theta.size_bytes()
        self._bridge.report(
            ModelReady(
                round=self.round,
                theta=self._hashes.blake3,
                parameters=count,
                size_bytes=size,
                notes=tuple(self._files.notes),
            )
        )

    def _rejoin(self, rejoin: Rejoin) -> None:
        """Another scheduler steers: say what is here. Updates of the generation before are as good as ever,
        but what was exported is not there any more.
        """
        logger.info("The job goes on as generation %d; round %d is open.", rejoin.generation, self.round)
        self._generation = rejoin.generation
        self._report_applied()
        self._archive.begin_generation()
        self._ready()
        for received in self._received.values():
            self._bridge.report(received)

    def _report_applied(self) -> None:
        for event in self._applied:
            self._bridge.report(event)

    @property
    def _peers(self) -> tuple[PeerRef, ...]:
        return () if self._members is None else self._members.peers

    async def _handle(self, item: Directive | ReceivedFile) -> None:
        match item:
            case ReceivedFile():
                self._update_arrived(item)
            case Members():
                self._members = item
                early, self._early = self._early, []
                for file in early:
                    self._update_arrived(file)
            case SendModel():
                self._send_theta((item.to,), item.attempt)
            case CloseRound():
                self._close(item)
            case SaveCheckpoint():
                self._checkpoint()
            case Export():
                await self._archive.export(
                    self.round, self._files, self._theta, item.to, self._traces.in_dispatch(EXPORT)
                )
            case Rejoin():
                self._rejoin(item)
            case _:
                logger.warning("A parameter server does not handle %s.", type(item).__name__)

    # --- the model ----------------------------------------------------------------------------------

    async def _load(self) -> None:
        job = self._job
        self._files = ModelFiles(self._bridge, self._job, self._archive.finished_within, self.put)
        momentum: dict[str, Tensor] = {}
        if job.restore is None:
            self._theta = await self._files.first_theta()
        else:
            # a checkpoint says what theta looks like; importing and building a model takes longer than all
            # the rest, and everybody waits
            self._theta, momentum = await self._restored(job.restore)
        # one set of threads, ours: chunks are handed to them without barriers
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._beside = threads > 1
        self._outer = OuterStep(self._theta, job, threads)
        if momentum:
            self._outer.restore_momentum(momentum)
        self._hashes = tensors.write(self._theta_path(), self._theta.all(), beside=self._beside)
        _give_memory_back()

    async def _restored(self, reference: Reference) -> tuple[Theta, dict[str, Tensor]]:
        """Theta and momentum of a checkpoint, if all of it is there and is what was saved."""
        try:
            fetched = await self._bridge.patiently(self._bridge.fetch(reference))
        except Refused as exc:
            if exc.code != "not-found":
                raise
            raise CheckpointUnusable(f"the checkpoint is not there: {exc.reason}") from exc
        files = {path.name: path for path, _ in fetched}
        theta, momentum, state = read_checkpoint(files, self._job.job_id, self._job.round)
        self.round = state.round
        self._contributors = state.contributors
        return theta, momentum

    def _theta_path(self) -> Path:
        return self._bridge.directory / "outgoing" / f"theta-{self.round}.safetensors"

    # --- updates ------------------------------------------------------------------------------------

    def _update_arrived(self, file: ReceivedFile) -> None:
        round = file.meta.stamp.round if file.meta.stamp is not None else -1
        path = self._bridge.directory / file.path
        with self._traces.in_round(RECEIVE_UPDATE, self._generation, round) as receiving:
            receiving.set_attributes({"hypha.peer": file.from_peer, "hypha.transfer.bytes": file.size})
            try:
                if not admit(file, self._job, self.round, self._members):
                    self._wait_for_members(file)
                    return
                contribution = contribution_in(path)
                check_contribution(file, contribution, self._job, self._members)
                norm = self._outer.add(file.from_peer, contribution.samples, path)
            except (Refused, DataError) as exc:
                code, reason = (exc.code, exc.reason) if isinstance(exc, Refused) else ("invalid", str(exc))
                # it may quote the file, which is the worker's
                reason = cleaned(reason, MAX_REASON)
                logger.warning("The update of %s for round %d is refused: %s", file.from_peer, round, reason)
                refused = UpdateRefused(round=round, worker=file.from_peer, code=code, reason=reason)
                self._bridge.report(refused)
            else:
                samples = contribution.samples
                logger.info("Added the update of %s (%d samples, norm %g).", file.from_peer, samples, norm)
                received = self._received[file.from_peer] = UpdateReceived(
                    round=round, worker=file.from_peer, samples=samples, contribution=contribution
                )
                self._bridge.report(received)
            self._updates.give(path)

    def _wait_for_members(self, file: ReceivedFile) -> None:
        """One update of each worker: a later one takes the place of an earlier."""
        for early in [one for one in self._early if one.from_peer == file.from_peer]:
            self._early.remove(early)
            if early.path != file.path:
                self._updates.give(self._bridge.directory / early.path)
        self._early.append(file)

    # --- rounds -------------------------------------------------------------------------------------

    def _close(self, directive: CloseRound) -> None:
        if directive.round == self.round - 1 and self._applied:
            # sent again: then somebody has not received it
            self._report_applied()
            self._send_theta(self._peers)
            return
        if directive.round != self.round:
            logger.warning("Round %d cannot be closed in round %d.", directive.round, self.round)
            return
        with self._traces.in_round(OUTER_STEP, self._generation, self.round):
            checkpoint, old = self._step(directive)
        if not directive.final:
            self._send_theta(self._peers)
        # a broadcast that still runs keeps its own link
        self._thetas.give(old)
        if checkpoint:
            self._checkpoint()

    def _step(self, directive: CloseRound) -> tuple[bool, Path]:
        """Apply the outer step; whether a checkpoint is due, and the file of theta that is out of date."""
        contributors = tuple(self._outer.contributors)
        if not contributors:
            logger.warning("Round %d is closed without any update; theta stays.", self.round)
        norm = self._outer.apply()
        old = self._theta_path()
        self.round += 1
        self._contributors = contributors
        self._hashes = tensors.write(
            self._theta_path(), self._theta.all(), reused=self._thetas, beside=self._beside
        )
        due = self.round % self._job.checkpoint.every_rounds == 0
        checkpoint = directive.checkpoint or directive.final or due
        applied = RoundApplied(
            round=directive.round,
            theta=self._hashes.blake3,
            contributors=contributors,
            update_norm=norm,
            checkpoint=checkpoint,
            updates=self._outer.statistics,
        )
        self._applied, self._received = (*self._received.values(), applied), {}
        self._bridge.report(applied)
        return checkpoint, old

    def _send_theta(self, receivers: tuple[PeerRef, ...], attempt: int = 0) -> None:
        """In the background, from a link to its file, whose own name may be taken away at once."""
        if not receivers:
            return
        path, round_ = self._theta_path(), self.round
        self._links += 1
        link = path.parent / f"{self._links}" / path.name
        link.parent.mkdir(parents=True)
        os.link(path, link)
        call = SendCall(
            resource=Peers(peers=receivers, strategy="all", resource="theta"),
            path=self._bridge.relative(link),
            round=round_,
            contributors=self._contributors,
            blake3=self._hashes.blake3,
            attempt=attempt,
            xxh3=self._hashes.xxh3,
        )
        span = self._traces.in_round(BROADCAST, self._generation, round_)

        async def broadcast() -> None:
            # the worker has tried long enough when it reports a failure: whoever still takes part is missed
            # by the scheduler, which says ``SendModel``, or gives it up
            try:
                with span:
                    sent = await self._bridge.send(call)
                for delivery in sent.deliveries:
                    if not delivery.acknowledged:
                        text = f"{delivery.detail} ({delivery.error})"
                        logger.warning("Theta of round %d did not reach %s: %s", round_, delivery.peer, text)
            except (Refused, PeerUnreachable) as exc:
                logger.warning("Theta of round %d reached nobody: %s", round_, exc)
            finally:
                shutil.rmtree(link.parent, ignore_errors=True)

        self._broadcasts.put(broadcast)

    def _checkpoint(self) -> None:
        # it belongs to the round that was applied; the last one has none after it
        applied = bool(self._applied) and self._applied[-1].round == self.round - 1
        within = self.round - 1 if applied else self.round
        state = CheckpointState(
            job_id=self._job.job_id,
            generation=self._job.generation,
            round=self.round,
            theta=self._hashes.blake3,
            momentum="",
            contributors=self._contributors,
        )
        self._archive.checkpoint(
            state,
            self._theta_path(),
            self._outer.momentum_or_zeros,
            self._traces.in_round(CHECKPOINT, self._generation, within),
        )


def _give_memory_back() -> None:
    """Building a model leaves much of the heap free; glibc keeps it unless asked."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def main(arguments: list[str]) -> int:
    """Entry point."""

    async def work(bridge: BridgeClient) -> None:
        job = bridge.job()
        if not isinstance(job, AggregateJob):
            raise ModelError(f"a parameter server cannot do a job of type {type(job).__name__}")
        await ParameterServer(bridge, job, begin_traces(bridge, job)).run()

    return run_executor(Path(arguments[0]), work)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

"""The training executor: ``python -m hypha.executor.training SOCKET``, run in the job directory.

It trains on theta of the open round, never waiting for the network between batches: directives, theta and
the next slice arrive in threads and are looked up. At the planned batch it sends its pseudo-gradient and
waits for theta of the next round. A theta that came about without its update means that it was left out:
it drops its slices and starts over from there with a fresh optimizer, so that every contribution can be
computed again from the ledger.

With ``HYPHA_STEP_S`` in its environment (``env`` of the worker's ``[[executors]]``) a batch takes at least so
many seconds: a machine plays a slower one, or several on the same machine do not compete for it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from hypha.config.environment import variable
from hypha.errors import DataError, ModelError, PeerUnreachable
from hypha.executor.bridge.client import ALIVE_S, BridgeClient
from hypha.executor.bridge.spans import Traces
from hypha.executor.files import updates
from hypha.executor.files.reused import ReusedFiles
from hypha.executor.inner.batch_size import BatchSize
from hypha.executor.inner.handover import TrainerInbox, UpdateSender, UpdateToSend, turn_of
from hypha.executor.inner.local_model import LocalModel
from hypha.executor.inner.loop import least_step_s
from hypha.executor.inner.process_group import ProcessGroup, number_of_processes
from hypha.executor.inner.round_counts import RoundCounts
from hypha.executor.inner.slices_reader import RowStream, SliceReadAhead
from hypha.executor.models.model_files import fetched
from hypha.executor.models.model_tensors import check_buffers, check_same_model
from hypha.executor.models.preprocessing import Preprocessor, padding_of
from hypha.executor.running import begin_traces, leave, run_executor
from hypha.messages import (
    Alive,
    Contribution,
    Loaded,
    Progress,
    ReceivedFile,
    Reference,
    RoundStarted,
    TrainJob,
)
from hypha.tracing.operations import LOAD_MODEL, LOAD_WEIGHTS, SEND_UPDATE, TRAIN

logger = logging.getLogger("hypha.executor.training")


class Trainer:
    """One training job, from its model to ``Finish``; of an executor of several processes, with its
    ``group``.
    """

    def __init__(
        self, bridge: BridgeClient, job: TrainJob, traces: Traces, group: ProcessGroup | None = None
    ) -> None:
        """Directives are received from now on."""
        self._bridge = bridge
        self._job = job
        self._traces = traces
        self._group = group
        self._threads = bridge.threads
        self._inbox = TrainerInbox(self._threads, job.parameter_server, job.generation)
        self._incarnation = bridge.directory.name
        #: the open round, which attempt at it, and the generation of the job in which its theta came
        self._round, self._attempt, self._generation = -1, 0, job.generation
        self._hash = ""
        self._restarts = 0
        # what does not fit in another process of several is not known here
        self._batch_size = BatchSize(job.batch_size, job.most_batch_size if group is None else None)
        #: the open round was lost: nothing of it counts
        self._lost = False
        #: inner steps before the round from which another generation of the job began
        self._steps_there = job.steps
        self._sender: UpdateSender | None = None
        self._reused = ReusedFiles(bridge.directory / "incoming" / ".spare")
        bridge.failed = self._inbox.fail
        bridge.directives(self._inbox.direct)

    async def run(self) -> None:
        """Train until ``Finish``. Raises what makes going on impossible."""
        with self._traces.in_dispatch(LOAD_MODEL):
            await self._load()
        self._bridge.receive(("theta",), self._theta_arrived)
        self._bridge.report(Loaded(incarnation=self._incarnation))
        self._slices.start()
        try:
            while (theta := await self._wait_for_theta()) is not None:
                self._adopt(theta)
                if await self._train_to_sync_point():
                    self._synchronise()
            self._model.end()
        finally:
            if self._sender is not None:
                self._sender.stop()

    async def _load(self) -> None:
        job, preprocess = self._job, None
        source = None if job.model.source is None else await self._fetched(job.model.source)
        if job.preprocessor is not None:
            preprocess = Preprocessor(job.preprocessor, await self._fetched(job.preprocessor.source))
        self._model = self._build(source)
        padding = padding_of(None, config=self._model.config)
        self._stream = RowStream(padding if preprocess is None else preprocess.padding)
        self._slices = SliceReadAhead(self._bridge, job, preprocess, self._inbox.changed)
        least = least_step_s(variable("HYPHA_STEP_S"))
        self._step_s: Callable[[], float] = lambda: least

    def _build(self, source: Path | None) -> LocalModel:
        if self._group is None:
            return LocalModel(self._job, source)
        # what it imports few executors need
        from hypha.executor.inner.spread_model import SpreadModel

        return SpreadModel(self._group, self._job, source)

    async def _fetched(self, reference: Reference) -> Path:
        try:
            return await self._bridge.patiently(fetched(self._bridge, reference))
        except PeerUnreachable as exc:
            raise ModelError(f"the model's files cannot be fetched: {exc}") from exc

    # --- theta --------------------------------------------------------------------------------------

    def _theta_arrived(self, file: ReceivedFile) -> None:
        with self._inbox.changed:
            superseded = self._inbox.take_theta(file, (self._generation, self._round, self._attempt))
        if superseded is not None:
            (self._bridge.directory / superseded.path).unlink(missing_ok=True)

    async def _wait_for_theta(self) -> ReceivedFile | None:
        """The next theta to train on; None when the job is finished."""
        inbox = self._inbox
        while True:
            with inbox.changed:
                while not await inbox.changed.wait_for(self._news, ALIVE_S):
                    self._bridge.report(Alive())
                if inbox.failure is not None:
                    raise inbox.failure
                if inbox.finished:
                    return None
                self._rejoin()
                theta, inbox.theta = inbox.theta, None
            if theta is not None and not self._repeated(theta):
                return theta

    def _interrupted(self) -> bool:
        inbox = self._inbox
        return inbox.finished or inbox.theta is not None or inbox.failure is not None

    def _news(self) -> bool:
        return self._interrupted() or self._inbox.rejoin is not None

    def _rejoin(self) -> None:
        """Do what the scheduler has said about another generation of the job, if it has (the inbox is
        locked).
        """
        inbox = self._inbox
        rejoin, inbox.rejoin = inbox.rejoin, None
        if rejoin is None:
            return
        logger.info("The job goes on as generation %d from round %d.", rejoin.generation, rejoin.round)
        self._steps_there = rejoin.steps
        theta = inbox.theta
        if rejoin.start_over:
            self._lost = self._round >= 0
            if self._sender is not None:
                self._sender.stop()
            if self._round < 0:
                # no theta will say so: slices that were fetched for a first round are with others now
                self._drop_before((rejoin.generation, 0, 0))
            if theta is not None and turn_of(theta)[0] < rejoin.generation:
                inbox.theta = None
                (self._bridge.directory / theta.path).unlink(missing_ok=True)
        self._bridge.report(Loaded(incarnation=self._incarnation))
        if self._round >= 0 and not self._lost:
            self._started()

    def _repeated(self, file: ReceivedFile) -> bool:
        """Is it theta of the round that is open here? Then say again that the round has started. With a
        higher attempt it is none: our update was refused, and the round begins anew.
        """
        _, round, attempt = turn_of(file)
        if self._lost or attempt > self._attempt or (round, file.meta.blake3) != (self._round, self._hash):
            return False
        (self._bridge.directory / file.path).unlink(missing_ok=True)
        self._started()
        return True

    def _overtaken(self) -> bool:
        """Is there something newer to do than this round?"""
        with self._inbox.changed:
            self._rejoin()
            theta = self._inbox.theta
            if theta is not None and self._repeated(theta):
                self._inbox.theta = None
            return self._lost or self._interrupted()

    def _adopt(self, file: ReceivedFile) -> None:
        """Start the round of ``file``."""
        at = generation, round, _ = turn_of(file)
        with self._traces.in_round(LOAD_WEIGHTS, generation, round) as loading:
            loading.set_attribute("hypha.transfer.bytes", file.size)
            path = self._bridge.directory / file.path
            if not self._hash:
                check_same_model(path, self._model.base)
            found = self._model.load(path)
            if found.xxh3 != file.meta.xxh3:
                raise DataError(
                    f"theta in {path.name} is not what was sent; the worker's disk may be failing"
                )
            self._reused.give(path)
            sender, self._sender = self._sender, None
            if sender is not None:
                sender.stop()
            continued = round == self._round + 1 and not self._lost
            in_it = sender is not None and continued and self._job.me in file.meta.contributors
            if self._round >= 0 and not in_it:
                self._start_over(at)
            self._generation, self._round, self._attempt = at
            self._hash, self._lost = file.meta.blake3, False
            self._stream.start_round()
            self._done = RoundCounts(self._batch_size.rows, self._model.inner.steps, self._threads.now())
            self._model.start_round(round)
            self._started()

    def _started(self) -> None:
        grown = self._done.rows if self._job.most_batch_size is not None else None
        self._bridge.report(
            RoundStarted(round=self._round, theta=self._hash, attempt=self._attempt, batch_size=grown)
        )

    def _start_over(self, at: tuple[int, int, int]) -> None:
        """Drop what was asked for before theta of that generation, round and attempt came."""
        _, round, _ = at
        if round == self._round and not self._lost:
            logger.warning("The update of round %d was refused; the round begins anew.", round)
        else:
            logger.warning(
                "Round %d went on without this worker; it starts over from round %d.", self._round, round
            )
        self._drop_before(at)
        if self._lost or round < self._round:
            self._forget_steps(self._steps_there)
        elif self._done.batches:
            self._forget_steps(self._done.first_steps)

    def _drop_before(self, at: tuple[int, int, int]) -> None:
        self._stream.drop_before(at)
        self._slices.drop_before(at)

    def _forget_steps(self, steps: int) -> None:
        """They are in no theta: no ledger has them, so neither may the optimizer."""
        self._restarts += 1
        self._model.start_over(steps)

    # --- a round ------------------------------------------------------------------------------------

    async def _train_to_sync_point(self) -> bool:
        """False when the round was overtaken."""
        with self._traces.in_round(TRAIN, self._generation, self._round) as train:
            while not (reached := self._at_sync_point()) and not self._overtaken():
                columns = await self._next_batch()
                if columns is not None:
                    await self._train(columns)
            train.set_attributes({"hypha.batches": self._done.batches, "hypha.samples": self._done.samples})
            if not reached:
                train.add_event("overtaken")
        return reached

    def _at_sync_point(self) -> bool:
        plan = self._inbox.plan
        if plan is None or plan.round != self._round or plan.batches is None:
            return False
        # a plan for nothing still needs a batch: an update of no samples has no weight
        return self._done.batches >= max(1, plan.batches)

    async def _next_batch(self) -> dict[str, torch.Tensor] | None:
        """None when something happened while the trainer waited for data: it has to look around first."""
        while (columns := self._stream.take(self._done.rows)) is None:
            part = self._slices.take()
            if part is not None:
                self._stream.push(part)
                continue
            self._tell_all()
            with self._inbox.changed:
                while not await self._inbox.changed.wait_for(self._look_around, ALIVE_S):
                    # a preprocessor may hang as a batch may
                    if self._slices.fetching:
                        self._bridge.report(Alive())
            if not self._slices.ready:
                return None
        return columns

    def _look_around(self) -> bool:
        return self._slices.ready or self._news() or self._at_sync_point()

    async def _train(self, columns: dict[str, torch.Tensor]) -> None:
        now, done = self._threads.now, self._done
        started = now()
        loss = self._model.batch(columns)
        if step_s := self._step_s():
            await self._threads.sleep(max(0.0, started + step_s - now()))
        done.add(loss, len(next(iter(columns.values()))))
        mean = done.losses.latest(now()) if done.losses.due(now()) else None
        done.busy_s += now() - started
        if mean is not None:
            self._progress(mean)

    def _tell_all(self) -> None:
        """Report the batches that were not due to be reported: there may be no next one for a while."""
        if self._done.losses.waiting:
            self._progress(self._done.losses.latest(self._threads.now()))

    def _progress(self, loss: float) -> None:
        """Report all of the round so far, with the mean ``loss`` of the batches since the last report."""
        done = self._done
        self._bridge.report(
            Progress(
                round=self._round,
                batches=done.batches,
                samples=done.samples,
                busy_s=done.busy_s,
                loss=loss,
                learning_rate=self._model.inner.learning_rate,
                attempt=self._attempt,
            )
        )

    def _synchronise(self) -> None:
        """Write the update and have it sent."""
        self._tell_all()
        self._model.flush()
        path = self._bridge.directory / "outgoing" / f"update-{self._round}-{self._restarts}.safetensors"
        contribution = self._contribution()
        local, base = self._model.theta(), self._model.base
        check_buffers(local, base)
        xxh3 = updates.write_update(path, local, base, self._job.update_encoding, self._reused, contribution)
        sending = partial(self._traces.in_round, SEND_UPDATE, self._generation, self._round)
        update = UpdateToSend(path, xxh3, contribution)
        self._sender = UpdateSender(self._bridge, self._inbox, update, self._reused, sending)
        fits = not self._model.inner.rows.limited
        self._batch_size.round_ended(self._done.batches, self._done.busy_s, fits)

    def _contribution(self) -> Contribution:
        """What the update of the round stands for."""
        done = self._done
        return Contribution(
            round=self._round,
            worker=self._job.me,
            incarnation=self._incarnation,
            restarts=self._restarts,
            attempt=self._attempt,
            samples=done.samples,
            batches=done.batches,
            batch_size=done.rows,
            steps=done.first_steps,
            ranges=tuple(self._stream.ranges),
            finished=tuple(self._stream.finished),
            loss=done.losses.mean(),
            threads=torch.get_num_threads(),
        )


def main(arguments: list[str]) -> int:
    """Entry point: of the executor, or of one of its processes."""
    group = ProcessGroup(Path.cwd()) if number_of_processes() > 1 else None
    if group is not None and group.rank:
        from hypha.executor.inner.spread_model import follow_rank_zero

        return follow_rank_zero(group)

    async def work(bridge: BridgeClient) -> None:
        job = bridge.job()
        if not isinstance(job, TrainJob):
            raise ModelError(f"a training executor cannot do a job of type {type(job).__name__}")
        with nullcontext() if group is None else group.whole():
            await Trainer(bridge, job, begin_traces(bridge, job), group).run()

    return run_executor(Path(arguments[0]), work)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

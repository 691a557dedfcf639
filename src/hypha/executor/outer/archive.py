"""What stays of a parameter server's work: checkpoints, and the trained model that is exported.

Both are sent in the order of their rounds, from files that do not change any more, so that rounds go on
meanwhile. A checkpoint is theta, momentum, and a description that is written last, so that with
it the two are whole. Reading one needs no model: the files say what the tensors look like, the description
which bytes they are.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import torch
from msgspec.structs import replace
from opentelemetry.trace import Span
from torch import Tensor

from hypha.decoding import decode_json
from hypha.errors import CheckpointUnusable, DataError, PeerUnreachable, Refused, Undecodable
from hypha.executor.bridge.client import BridgeClient, export_waits
from hypha.executor.files import tensors
from hypha.executor.files.tensors import TensorFile
from hypha.executor.files.theta import Theta
from hypha.executor.models.model_files import ModelFiles
from hypha.executor.threads import WorkQueue
from hypha.messages import AggregateJob, CheckpointSaved, Exported, Local, PeerRef, Peers, Reference, SendCall

logger = logging.getLogger("hypha.executor.parameter_server")

#: how long the last checkpoint may hold up the end
_FINISH_GRACE_S = 30.0
_EXPORT_RETRY_S = 2.0
THETA, MOMENTUM, STATE = "theta.safetensors", "momentum.safetensors", "state.json"


class CheckpointState(msgspec.Struct, frozen=True):
    """``state.json``; ``theta`` and ``momentum`` are the BLAKE3 of the two files."""

    job_id: str
    generation: int
    round: int
    theta: str
    momentum: str
    contributors: tuple[str, ...] = ()
    version: int = 1


class Archive:
    """``failed`` is called with what goes wrong in the background."""

    def __init__(self, bridge: BridgeClient, job: AggregateJob, failed: Callable[[Exception], None]) -> None:
        self._bridge = bridge
        self._job = job
        self._changed = bridge.threads.condition()
        self._finished = False
        self._work = WorkQueue(bridge.threads, "archive", failed)
        self._exporting = -1
        self._exported: Exported | None = None
        #: the newest checkpoint: the round that it is of, and what was reported of it when it was saved
        self._saving = -1
        self._saved: CheckpointSaved | None = None

    async def finish(self) -> None:
        """The job has ended: wait a little for the last checkpoint."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()
        await self._bridge.patiently(self._work.done(_FINISH_GRACE_S))

    async def finished_within(self, timeout_s: float) -> bool:
        """Has the job ended, or does it so soon?"""
        with self._changed:
            return await self._changed.wait_for(lambda: self._finished, timeout_s)

    def begin_generation(self) -> None:
        """Another scheduler steers: report the newest checkpoint. It may have neither that nor what was
        exported: asked again, both are sent again.
        """
        if self._exported is not None:
            self._exporting = -1
        if self._saved is not None:
            self._bridge.report(self._saved)
        self._saving = -1

    def checkpoint(
        self,
        state: CheckpointState,
        theta: Path,
        momentum: Callable[[], dict[str, Tensor]],
        span: AbstractContextManager[Span],
    ) -> None:
        """Write a checkpoint now, of the file ``theta`` and of ``momentum``, whose hash ``state`` lacks; make
        it durable in the background, in ``span``. Once a round is enough.
        """
        round = state.round
        if self._saving == round:
            if self._saved is not None and self._saved.round == round:
                self._bridge.report(self._saved)
            return
        self._saving = round
        directory = self._bridge.directory / "outgoing" / f"checkpoint-{round}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / THETA).unlink(missing_ok=True)
        os.link(theta, directory / THETA)
        state = replace(state, momentum=tensors.write(directory / MOMENTUM, momentum()).blake3)
        (directory / STATE).write_bytes(msgspec.json.encode(state))

        async def save() -> None:
            with span as saving:
                saving.set_attribute("hypha.checkpoint.round", round)
                await self._save(directory, round)

        self._work.put(save)

    async def _save(self, directory: Path, round: int) -> None:
        policy = self._job.checkpoint
        place, relative = policy.place, self._bridge.relative(directory)
        try:
            if place == "scheduler":
                resource: Reference = Peers(peers=(self._job.scheduler,), resource="checkpoint")
                for name in (THETA, MOMENTUM, STATE):
                    await self._bridge.send(
                        SendCall(resource=resource, path=f"{relative}/{name}", round=round)
                    )
            else:
                place = f"{place.rstrip('/')}/{self._job.job_id}/{round}"
                resource = Local(url=place)
                await self._bridge.send(
                    SendCall(resource=resource, path=relative, round=round, marker=STATE, keep=policy.keep)
                )
        except (Refused, PeerUnreachable) as exc:
            # the next one may get through; the scheduler goes on from the last one that it knows of
            logger.error("The checkpoint of round %d is not saved: %s", round, exc)
            if self._saving == round:
                self._saving = -1
        else:
            self._saved = CheckpointSaved(round=round, place=place)
            self._bridge.report(self._saved)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    async def export(
        self,
        round: int,
        files: ModelFiles,
        theta: Theta,
        to: PeerRef,
        span: AbstractContextManager[Span],
    ) -> None:
        """Send the model, with ``theta`` of ``round``, to the scheduler ``to``, until that has all of it, in
        the background, in ``span``.
        """
        if self._exporting == round:
            # asked again: then it is under way, or its report was lost
            if self._exported is not None:
                self._bridge.report(self._exported)
            return
        self._exporting, self._exported = round, None
        directory = self._bridge.directory / "outgoing" / "export"
        shutil.rmtree(directory, ignore_errors=True)
        names = await files.export(theta, directory)

        async def send() -> None:
            with span:
                if not await self._deliver_export(round, directory, names, to):
                    return
                self._exported = Exported(round=round, files=tuple(names))
                self._bridge.report(self._exported)
            shutil.rmtree(directory, ignore_errors=True)

        # the model is not trained any further, so its files may go while updates are still refused
        self._work.put(send)

    async def _deliver_export(self, round: int, directory: Path, names: list[str], to: PeerRef) -> bool:
        """False when the job has ended before all files were with the scheduler."""
        left = list(names)
        while left and not self._finished:
            call = SendCall(
                resource=Peers(peers=(to,), resource="export"),
                path=self._bridge.relative(directory / left[0]),
                name=left[0],
                round=round,
            )
            try:
                await self._bridge.send(call)
                left.pop(0)
            except (Refused, PeerUnreachable) as exc:
                if isinstance(exc, Refused) and not export_waits(exc):
                    raise
                # the scheduler is away; the one that comes back may have none of the files
                logger.warning("The trained model is not delivered yet: %s", exc)
                left = list(names)
                await self.finished_within(_EXPORT_RETRY_S)
        return not left


def read_checkpoint(
    files: Mapping[str, Path], job_id: str, round_: int
) -> tuple[Theta, dict[str, Tensor], CheckpointState]:
    """Theta, momentum by parameter, and the description, if ``files`` (by name) are the checkpoint of that
    round of that job, and each is what was saved; else :class:`CheckpointUnusable`. Theta and momentum are
    deleted once they were read.
    """
    if missing := {THETA, MOMENTUM, STATE} - files.keys():
        raise CheckpointUnusable(f"the checkpoint lacks {', '.join(sorted(missing))}")
    try:
        state = decode_json(files[STATE].read_bytes(), CheckpointState)
    except Undecodable as exc:
        raise CheckpointUnusable(f"{STATE} of the checkpoint cannot be read: {exc}") from exc
    if (state.job_id, state.round) != (job_id, round_):
        raise CheckpointUnusable(f"the checkpoint is of round {state.round} of job {state.job_id}")
    everything = _read(files[THETA], state.theta)
    # each parameter has a momentum, a buffer has none
    momentum = _read(files[MOMENTUM], state.momentum)
    if strangers := momentum.keys() - everything.keys():
        raise CheckpointUnusable(f"{MOMENTUM} of the checkpoint holds {min(strangers)}, which theta lacks")
    parameters = {name: everything.pop(name) for name in momentum}
    return Theta(parameters, everything), momentum, state


def _read(path: Path, expected: str) -> dict[str, Tensor]:
    try:
        with TensorFile(path) as file:
            into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in file.specs.items()}
        found = tensors.read(path, into).blake3
    except DataError as exc:
        raise CheckpointUnusable(f"{path.name} of the checkpoint cannot be read: {exc}") from exc
    if found != expected:
        raise CheckpointUnusable(f"{path.name} of the checkpoint is not the file that was saved")
    path.unlink()
    return into

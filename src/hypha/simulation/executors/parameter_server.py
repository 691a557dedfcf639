"""The parameter server of a simulated world.

What :mod:`hypha.executor.parameter_server` does in threads is done here in tasks of a simulated process: the
inbox, the outer step, theta's files and the checkpoints are the real code.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import trio

from hypha.errors import CheckpointUnusable, DataError, PeerUnreachable, Refused
from hypha.executor.bridge.client import export_waits
from hypha.executor.files import tensors
from hypha.executor.files.updates import contribution_in
from hypha.executor.outer.admission import admit, check_contribution
from hypha.executor.outer.archive import MOMENTUM, STATE, THETA, CheckpointState, read_checkpoint
from hypha.executor.outer.step import OuterStep
from hypha.executor.toy import toy_theta
from hypha.messages import (
    AggregateJob,
    CheckpointSaved,
    CloseRound,
    Directive,
    Export,
    Exported,
    Finish,
    Local,
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
from hypha.node import Changes
from hypha.simulation.executors.bridge import Bridge

logger = logging.getLogger("hypha.simulation")

#: as in hypha.executor.parameter_server
_EXPORT_RETRY_S = 2.0


class SimulatedParameterServer:
    """See :mod:`hypha.executor.parameter_server`, whose steps it takes one by one."""

    def __init__(self, bridge: Bridge, job: AggregateJob, nursery: trio.Nursery, step_s: float) -> None:
        self._bridge = bridge
        self._job = job
        self._nursery = nursery
        self._step_s = step_s
        self._inputs: deque[Directive | ReceivedFile] = deque()
        self._changed = Changes()
        self._members: Members | None = None
        self._early: list[ReceivedFile] = []
        self._received: dict[str, UpdateReceived] = {}
        self._applied: tuple[UpdateReceived | RoundApplied, ...] = ()
        self._exporting = -1
        self._exported: Exported | None = None
        self._saving = -1
        self._saved: CheckpointSaved | None = None
        self.round = job.round
        self._contributors: tuple[str, ...] = ()
        self._archive: deque[Callable[[], Awaitable[None]]] = deque()
        self._archiving = False
        self._links = 0

    def _put(self, item: Directive | ReceivedFile) -> None:
        self._inputs.append(item)
        self._changed.note()

    async def run(self) -> None:
        """Serve until ``Finish``."""
        self._nursery.start_soon(self._bridge.directives, self._put)
        await self._load()
        self._nursery.start_soon(self._bridge.receive, ("update",), self._put)
        self._nursery.start_soon(self._keep_archive)
        self._ready()
        while True:
            while not self._inputs:
                await self._changed.wait()
            item = self._inputs.popleft()
            if isinstance(item, Finish):
                break
            await self._handle(item)
        with trio.move_on_after(30.0):
            while self._archive or self._archiving:
                await self._changed.wait()

    async def _load(self) -> None:
        job = self._job
        momentum: dict[str, Any] = {}
        if job.restore is None:
            self._theta = toy_theta()
        else:
            try:
                fetched = await self._bridge.fetch(job.restore)
            except Refused as exc:
                if exc.code != "not-found":
                    raise
                raise CheckpointUnusable(f"the checkpoint is not there: {exc.reason}") from exc
            files = {path.name: path for path, _ in fetched}
            self._theta, momentum, state = read_checkpoint(files, job.job_id, job.round)
            self.round, self._contributors = state.round, state.contributors
        self._outer = OuterStep(self._theta, job)
        if momentum:
            self._outer.restore_momentum(momentum)
        self._hashes = tensors.write(self._theta_path(), self._theta.all())

    def _theta_path(self) -> Path:
        return self._bridge.directory / "outgoing" / f"theta-{self.round}.safetensors"

    @property
    def _peers(self) -> tuple[PeerRef, ...]:
        return () if self._members is None else self._members.peers

    def _ready(self) -> None:
        self._bridge.report(
            ModelReady(round=self.round, theta=self._hashes.blake3, parameters=8, size_bytes=32)
        )

    def _rejoin(self) -> None:
        if self._exported is not None:
            self._exporting = -1
        self._report_applied()
        if self._saved is not None:
            self._bridge.report(self._saved)
        self._saving = -1
        self._ready()
        for received in self._received.values():
            self._bridge.report(received)

    def _report_applied(self) -> None:
        for event in self._applied:
            self._bridge.report(event)

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
                await self._close(item)
            case SaveCheckpoint():
                self._checkpoint()
            case Export():
                self._export(item.to)
            case Rejoin():
                self._rejoin()
            case _:
                pass

    # --- updates ------------------------------------------------------------------------------------

    def _update_arrived(self, file: ReceivedFile) -> None:
        path = self._bridge.directory / file.path
        round_ = file.meta.stamp.round if file.meta.stamp is not None else -1
        try:
            if not admit(file, self._job, self.round, self._members):
                self._early.append(file)
                return
            contribution = contribution_in(path)
            check_contribution(file, contribution, self._job, self._members)
            self._outer.add(file.from_peer, contribution.samples, path)
        except (Refused, DataError) as exc:
            code, reason = (exc.code, exc.reason) if isinstance(exc, Refused) else ("invalid", str(exc))
            self._bridge.report(UpdateRefused(round=round_, worker=file.from_peer, code=code, reason=reason))
        else:
            received = UpdateReceived(
                round=round_, worker=file.from_peer, samples=contribution.samples, contribution=contribution
            )
            self._received[file.from_peer] = received
            self._bridge.report(received)
        path.unlink(missing_ok=True)

    # --- rounds -------------------------------------------------------------------------------------

    async def _close(self, directive: CloseRound) -> None:
        if directive.round == self.round - 1 and self._applied:
            self._report_applied()
            self._send_theta(self._peers)
            return
        if directive.round != self.round:
            return
        await trio.sleep(self._step_s)
        contributors = tuple(self._outer.contributors)
        norm = self._outer.apply()
        old = self._theta_path()
        self.round += 1
        self._contributors = contributors
        self._hashes = tensors.write(self._theta_path(), self._theta.all())
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
        if not directive.final:
            self._send_theta(self._peers)
        old.unlink(missing_ok=True)
        if checkpoint:
            self._checkpoint()

    def _send_theta(self, receivers: Iterable[PeerRef], attempt: int = 0) -> None:
        peers = tuple(receivers)
        if not peers:
            return
        self._links += 1
        link = self._bridge.directory / "outgoing" / f"{self._links}" / self._theta_path().name
        link.parent.mkdir()
        os.link(self._theta_path(), link)
        call = SendCall(
            resource=Peers(peers=peers, strategy="all", resource="theta"),
            path=self._bridge.relative(link),
            round=self.round,
            contributors=self._contributors,
            blake3=self._hashes.blake3,
            attempt=attempt,
            xxh3=self._hashes.xxh3,
        )
        self._nursery.start_soon(self._broadcast, call, link)

    async def _broadcast(self, call: SendCall, link: Path) -> None:
        try:
            await self._bridge.send(call)
        except (Refused, PeerUnreachable) as exc:
            logger.debug("Theta of round %d reached nobody: %s", call.round, exc)
        finally:
            shutil.rmtree(link.parent, ignore_errors=True)

    # --- what stays -----------------------------------------------------------------------------------

    async def _keep_archive(self) -> None:
        while True:
            while not self._archive:
                await self._changed.wait()
            work = self._archive.popleft()
            self._archiving = True
            try:
                await work()
            finally:
                self._archiving = False
                self._changed.note()

    def _in_archive(self, work: Callable[[], Awaitable[None]]) -> None:
        self._archive.append(work)
        self._changed.note()

    def _checkpoint(self) -> None:
        if self._saving == self.round:
            if self._saved is not None and self._saved.round == self.round:
                self._bridge.report(self._saved)
            return
        self._saving = self.round
        directory = self._bridge.directory / "outgoing" / f"checkpoint-{self.round}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / THETA).unlink(missing_ok=True)
        os.link(self._theta_path(), directory / THETA)
        momentum = tensors.write(directory / MOMENTUM, self._outer.momentum_or_zeros()).blake3
        state = CheckpointState(
            job_id=self._job.job_id,
            generation=self._job.generation,
            round=self.round,
            theta=self._hashes.blake3,
            momentum=momentum,
            contributors=self._contributors,
        )
        (directory / STATE).write_bytes(msgspec.json.encode(state))
        round_ = self.round
        self._in_archive(lambda: self._save_checkpoint(directory, round_))

    async def _save_checkpoint(self, directory: Path, round_: int) -> None:
        policy = self._job.checkpoint
        place, relative = policy.place, self._bridge.relative(directory)
        try:
            if place == "scheduler":
                resource: Reference = Peers(peers=(self._job.scheduler,), resource="checkpoint")
                for name in (THETA, MOMENTUM, STATE):
                    await self._bridge.send(
                        SendCall(resource=resource, path=f"{relative}/{name}", round=round_)
                    )
            else:
                place = f"{place.rstrip('/')}/{self._job.job_id}/{round_}"
                call = SendCall(
                    resource=Local(url=place), path=relative, round=round_, marker=STATE, keep=policy.keep
                )
                await self._bridge.send(call)
        except (Refused, PeerUnreachable) as exc:
            logger.debug("The checkpoint of round %d is not saved: %s", round_, exc)
            if self._saving == round_:
                self._saving = -1
        else:
            self._saved = CheckpointSaved(round=round_, place=place)
            self._bridge.report(self._saved)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _export(self, to: PeerRef) -> None:
        if self._exporting == self.round:
            if self._exported is not None:
                self._bridge.report(self._exported)
            return
        self._exporting, self._exported = self.round, None
        directory = self._bridge.directory / "outgoing" / "export"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        tensors.write(directory / "model.safetensors", self._theta.all())
        (directory / "config.json").write_bytes(b"{}")
        self._in_archive(lambda: self._send_export(directory, ["config.json", "model.safetensors"], to))

    async def _send_export(self, directory: Path, names: list[str], to: PeerRef) -> None:
        left = list(names)
        while left:
            call = SendCall(
                resource=Peers(peers=(to,), resource="export"),
                path=self._bridge.relative(directory / left[0]),
                round=self.round,
            )
            try:
                await self._bridge.send(call)
                left.pop(0)
            except (Refused, PeerUnreachable) as exc:
                if isinstance(exc, Refused) and not export_waits(exc):
                    raise
                left = list(names)
                await trio.sleep(_EXPORT_RETRY_S)
        self._exported = Exported(round=self.round, files=tuple(names))
        self._bridge.report(self._exported)
        shutil.rmtree(directory, ignore_errors=True)

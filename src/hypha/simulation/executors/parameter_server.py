"""The parameter server of a simulated world: the real one, with a toy model, and with tasks of a simulated
process in place of threads.

What :class:`~hypha.executor.parameter_server.ParameterServer` decides and writes is inherited; what waits for
its worker is written again.
"""

from __future__ import annotations

import logging
import shutil
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import trio

from hypha.errors import CheckpointUnusable, PeerUnreachable, Refused
from hypha.executor.bridge.refusals import export_waits
from hypha.executor.bridge.spans import Traces
from hypha.executor.files import tensors
from hypha.executor.files.theta import Theta
from hypha.executor.outer.archive import Archive
from hypha.executor.outer.broadcast import Broadcasts
from hypha.executor.outer.checkpoint import MOMENTUM, STATE, THETA, read_checkpoint
from hypha.executor.outer.step import OuterStep
from hypha.executor.parameter_server import ParameterServer
from hypha.executor.toy import toy_theta
from hypha.messages import (
    AggregateJob,
    CheckpointSaved,
    CloseRound,
    Directive,
    Exported,
    Finish,
    Local,
    PeerRef,
    Peers,
    ReceivedFile,
    Reference,
    SendCall,
)
from hypha.node import Changes
from hypha.simulation.executors.bridge import Bridge

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from hypha.executor.models.model_files import ModelFiles

logger = logging.getLogger("hypha.simulation")

#: as in hypha.executor.outer.archive
_FINISH_GRACE_S, _EXPORT_RETRY_S = 30.0, 2.0


class SimulatedParameterServer(ParameterServer):
    """It takes ``step_s`` to close a round."""

    def __init__(self, bridge: Bridge, job: AggregateJob, nursery: trio.Nursery, step_s: float) -> None:
        super().__init__(bridge.client, job, Traces(job))
        self._calls = bridge
        self._nursery = nursery
        self._step_s = step_s
        self._changed = Changes()
        self._archive: _TaskArchive = _TaskArchive(bridge, job, self._changed)
        self._broadcasts = _TaskBroadcasts(bridge, nursery)
        self._files = cast("ModelFiles", _ToyFiles())

    def put(self, item: Directive | ReceivedFile | Exception) -> None:
        super().put(item)
        self._changed.note()

    async def serve(self) -> None:
        """Until ``Finish``."""
        self._nursery.start_soon(self._calls.directives, self.put)
        await self._load_toy()
        self._nursery.start_soon(self._calls.receive, ("update",), self.put)
        self._nursery.start_soon(self._archive.run)
        self._ready()
        while not isinstance(item := await self._next_item(), Finish):
            if isinstance(item, CloseRound) and item.round == self.round:
                await trio.sleep(self._step_s)
            self._handle(item)
        with trio.move_on_after(_FINISH_GRACE_S):
            await self._archive.done()

    async def _next_item(self) -> Directive | ReceivedFile:
        while self._inputs.empty():
            await self._changed.wait()
        return cast("Directive | ReceivedFile", self._inputs.get_nowait())

    async def _load_toy(self) -> None:
        momentum: dict[str, Any] = {}
        self._theta = toy_theta()
        if self._job.restore is not None:
            self._theta, momentum = await self._fetched(self._job.restore)
        self._outer = OuterStep(self._theta, self._job)
        if momentum:
            self._outer.restore_momentum(momentum)
        self._hashes = tensors.write(self._theta_path(), self._theta.all())
        self._beside = False

    async def _fetched(self, reference: Reference) -> tuple[Theta, dict[str, Any]]:
        try:
            fetched = await self._calls.fetch(reference)
        except Refused as exc:
            if exc.code != "not-found":
                raise
            raise CheckpointUnusable(f"the checkpoint is not there: {exc.reason}") from exc
        files = {path.name: path for path, _ in fetched}
        theta, momentum, state = read_checkpoint(files, self._job.job_id, self._job.round)
        self.round, self._contributors = state.round, state.contributors
        return theta, momentum


class _ToyFiles:
    """Of the toy model: nothing but theta."""

    notes = ()

    def export(self, theta: Theta, directory: Path) -> list[str]:
        directory.mkdir()
        tensors.write(directory / "model.safetensors", theta.all())
        (directory / "config.json").write_bytes(b"{}")
        return ["config.json", "model.safetensors"]


class _Tasks:
    """In place of a pool of threads; what it is given to call is a coroutine function."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def submit(self, call: Callable[..., Awaitable[object]], *arguments: object) -> Future[Any]:
        self._nursery.start_soon(call, *arguments)
        return Future()


class _TaskBroadcasts(Broadcasts):
    def __init__(self, bridge: Bridge, nursery: trio.Nursery) -> None:
        super().__init__(bridge.client, lambda _: None, lambda _: nullcontext())
        self._calls = bridge
        self._threads = cast("ThreadPoolExecutor", _Tasks(nursery))

    async def _send(self, call: SendCall, link: Path) -> None:  # type: ignore[override]
        try:
            await self._calls.send(call)
        except (Refused, PeerUnreachable) as exc:
            logger.debug("Theta of round %d reached nobody: %s", call.round, exc)
        finally:
            shutil.rmtree(link.parent, ignore_errors=True)


class _TaskArchive(Archive):
    """:meth:`run` does its work, one piece after the other, and notes what has ``changed``."""

    def __init__(self, bridge: Bridge, job: AggregateJob, changed: Changes) -> None:
        span_of = cast("Any", lambda operation, round_: nullcontext())
        super().__init__(bridge.client, job, Traces(job), span_of, lambda _: None)
        self._calls = bridge
        self._waiting: deque[Callable[[], Any]] = deque()
        self._working = False
        self._changed = changed

    def _submit(self, work: Callable[[], Any]) -> None:
        self._waiting.append(work)
        self._changed.note()

    async def run(self) -> None:
        while True:
            while not self._waiting:
                await self._changed.wait()
            work = self._waiting.popleft()
            self._working = True
            try:
                await work()
            finally:
                self._working = False
                self._changed.note()

    async def done(self) -> None:
        while self._waiting or self._working:
            await self._changed.wait()

    async def _save_in_span(self, directory: Path, round: int, within: int) -> None:  # type: ignore[override]
        policy = self._job.checkpoint
        place, relative = policy.place, self._calls.relative(directory)
        try:
            if place == "scheduler":
                resource: Reference = Peers(peers=(self._job.scheduler,), resource="checkpoint")
                for name in (THETA, MOMENTUM, STATE):
                    await self._calls.send(
                        SendCall(resource=resource, path=f"{relative}/{name}", round=round)
                    )
            else:
                place = f"{place.rstrip('/')}/{self._job.job_id}/{round}"
                resource = Local(url=place)
                await self._calls.send(
                    SendCall(resource=resource, path=relative, round=round, marker=STATE, keep=policy.keep)
                )
        except (Refused, PeerUnreachable) as exc:
            logger.debug("The checkpoint of round %d is not saved: %s", round, exc)
            if self._saving == round:
                self._saving = -1
        else:
            self._saved = CheckpointSaved(round=round, place=place)
            self._calls.report(self._saved)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    async def _send_export(  # type: ignore[override]
        self, round: int, directory: Path, names: list[str], to: PeerRef
    ) -> None:
        left = list(names)
        while left:
            call = SendCall(
                resource=Peers(peers=(to,), resource="export"),
                path=self._calls.relative(directory / left[0]),
                round=round,
            )
            try:
                await self._calls.send(call)
                left.pop(0)
            except (Refused, PeerUnreachable) as exc:
                if isinstance(exc, Refused) and not export_waits(exc):
                    raise
                left = list(names)
                await trio.sleep(_EXPORT_RETRY_S)
        self._exported = Exported(round=round, files=tuple(names))
        self._calls.report(self._exported)
        shutil.rmtree(directory, ignore_errors=True)

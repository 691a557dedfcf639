"""What the workers of a job request and send: checked here, and handed to the round machine or the files.

:class:`RequestHandlers` are for events, reports and slices, :class:`FileHandlers` for what travels in bulk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from hypha.config.job import JobConfig
from hypha.errors import ModelError, Refused
from hypha.messages import (
    Acknowledged,
    FileList,
    JobStamp,
    ListFiles,
    NextSlice,
    NoSlice,
    PullFile,
    Report,
    ReportEvent,
    SliceAssigned,
    TransferMeta,
)
from hypha.net.bulk.transfers import meta_of
from hypha.node import Node
from hypha.runtime import free_bytes, in_thread
from hypha.scheduler.data.datasets import ServedDataset
from hypha.scheduler.descriptions import MODEL, PREPROCESSOR
from hypha.scheduler.durable.state_directory import CheckpointStore, safe_relative
from hypha.scheduler.rounds.events import Action, AnswerSlice, Disregarded, Input, Reported, SliceAsked, Told

#: events of one process whose numbers are remembered
_REMEMBERED = 1024
#: processes whose events are remembered
_PROCESSES = 1024
_RETRY_S = 0.2


class Seen:
    """Which numbered events of which process were handled already."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, str, str], OrderedDict[int, None]] = OrderedDict()

    def first_time(self, process: tuple[str, str, str], seq: int) -> bool:
        """True once for each ``seq`` of ``process``."""
        numbers = self._seen.setdefault(process, OrderedDict())
        self._seen.move_to_end(process)
        if len(self._seen) > _PROCESSES:
            self._seen.popitem(last=False)
        if seq in numbers or (len(numbers) == _REMEMBERED and seq < next(iter(numbers))):
            return False
        numbers[seq] = None
        if len(numbers) > _REMEMBERED:
            numbers.popitem(last=False)
        return True


@dataclass(eq=False)
class RequestHandlers:
    """Answer ``ReportEvent`` and ``NextSlice``, and receive the report stream. ``handle`` returns what the
    round machine decides; ``carried_out`` returns once that is carried out.
    """

    node: Node
    dataset: ServedDataset
    handle: Callable[[Input], list[Action]]
    carried_out: Callable[[], Awaitable[None]]
    is_leased: Callable[[str, str | None], bool]
    seen: Seen = field(default_factory=Seen)

    def open(self) -> None:
        """Answer from now on."""
        self.node.answer(ReportEvent, self._event)
        self.node.answer(NextSlice, self._slice)
        self.node.answer_reports(self._reports, admits=lambda peer: self.is_leased(peer, None))

    async def _event(self, caller: str, request: ReportEvent) -> Acknowledged:
        if not self.is_leased(caller, request.kind):
            self.handle(Disregarded("no lease"))
            raise Refused("stale", "this scheduler holds no lease of yours for that any more")
        if self.seen.first_time((caller, request.kind, request.incarnation), request.seq):
            self.handle(Told(caller, request.kind, request.incarnation, request.stamp, request.event))
        return Acknowledged()

    async def _slice(self, caller: str, request: NextSlice) -> SliceAssigned | NoSlice:
        if not self.is_leased(caller, "train"):
            self.handle(Disregarded("no lease"))
            raise Refused("uninvited", "you take no part in this scheduler's job")
        if not self.dataset.providers:
            return NoSlice(retry_in_s=1.0, reason="no data node serves the dataset right now")
        *_, answer = self.handle(SliceAsked(caller, request))
        assert isinstance(answer, AnswerSlice), "a request for a slice has its answer last"
        got = answer.slice
        if got is None:
            return NoSlice(retry_in_s=_RETRY_S, reason=answer.reason)
        # a worker may hold only what another scheduler, or generation, would know of
        await self.carried_out()
        part = self.dataset.manifest.slices[got.index]
        return SliceAssigned(
            dataset=self.dataset.name,
            index=got.index,
            epoch=got.epoch,
            samples=got.samples,
            size=part.size,
            blake3=part.blake3,
            providers=self.dataset.providers_for(got.index),
            ahead=answer.ahead,
        )

    def _reports(self, caller: str, reports: list[Report]) -> None:
        for report in reports:
            self.handle(Reported(caller, report.incarnation, report.stamp, report.progress))


class ServedDirectory:
    """The regular files under ``path``, by relative name, each hashed once. :class:`ModelError` when there
    are none.
    """

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = kind
        self.path = path.resolve()
        found = (file for file in self.path.rglob("*") if file.is_file())
        self._files = {
            file.relative_to(self.path).as_posix(): file
            for file in sorted(found)
            if not any(part.startswith(".") for part in file.relative_to(self.path).parts)
        }
        if not self._files:
            raise ModelError(f"{path} (the {kind}) is no directory with files in it")
        self._metas: dict[str, TransferMeta] = {}
        self._lock = trio.Lock()

    async def file(self, name: str) -> tuple[Path, TransferMeta]:
        """One file; :class:`Refused` when there is no such file."""
        path = self._files.get(name)
        if path is None:
            raise Refused("not-found", f"the {self.kind} has no file {name!r}")
        async with self._lock:
            if name not in self._metas:
                self._metas[name] = await meta_of(path, self.kind, name)
        return path, self._metas[name]

    async def list(self) -> FileList:
        return FileList(files=tuple([(await self.file(name))[1] for name in self._files]))


def served_directories(job: JobConfig) -> dict[str, ServedDirectory]:
    """What the configuration names by ``path``."""
    paths = {MODEL: job.model.path, PREPROCESSOR: job.preprocessor.path if job.preprocessor else None}
    return {kind: ServedDirectory(kind, path) for kind, path in paths.items() if path is not None}


@dataclass(eq=False)
class FileHandlers:
    """Answer ``ListFiles`` and serve and accept files at ``node``: out go the model's and the preprocessor's
    ``directories``, and checkpoints of ``store`` to restore from; in come checkpoints and the trained model,
    from the parameter server alone. ``is_member`` knows who holds a lease, ``is_server`` whether a stamp is
    that of the parameter server's current generation.
    """

    node: Node
    directories: dict[str, ServedDirectory]
    store: CheckpointStore
    is_member: Callable[[str], bool]
    is_server: Callable[[str, JobStamp | None], bool]

    def open(self) -> None:
        """Answer from now on."""
        job_id = self.store.job_id
        for kind in (*self.directories, "checkpoint"):
            self.node.transfers.serve(kind, self._file)
        self.node.answer(ListFiles, self._list_files)
        for kind in ("checkpoint", "export"):
            self.node.transfers.accept(kind, job_id, self._gate, self._arrived)

    def _invited(self, caller: str, request: ListFiles | PullFile) -> None:
        if not self.is_member(caller):
            raise Refused("uninvited", "you hold no lease for this scheduler's job")
        if request.job_id not in (None, self.store.job_id):
            raise Refused(
                "uninvited", f"the request is for job {request.job_id}, which is not this scheduler's"
            )

    async def _list_files(self, caller: str, request: ListFiles) -> FileList:
        self._invited(caller, request)
        if request.kind == "checkpoint" and request.name.isdecimal():
            return await in_thread(self.store.files, int(request.name))
        if request.kind not in self.directories or request.name:
            raise Refused("not-found", f"there is no resource {request.kind} {request.name}".rstrip())
        return await self.directories[request.kind].list()

    async def _file(self, caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        self._invited(caller, request)
        if request.kind == "checkpoint":
            return await in_thread(self.store.file, request.name)
        return await self.directories[request.kind].file(request.name)

    def _from_server(self, caller: str, meta: TransferMeta) -> None:
        if not self.is_server(caller, meta.stamp):
            raise Refused(
                "uninvited", "only the parameter server of this job's current generation may send that"
            )

    async def _gate(self, caller: str, meta: TransferMeta) -> Path:
        self._from_server(caller, meta)
        if meta.kind == "checkpoint":
            return await in_thread(self.store.place_for, meta)
        state = self.store.state
        generation = meta.stamp.generation if meta.stamp is not None else 0
        path = state.export_of(generation) / safe_relative(meta.name)
        needed, free = meta.size, free_bytes(state.path)
        if needed > free:
            raise Refused("no-space", f"{meta.name} has {needed} bytes; {free} are free in {state.path}")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    async def _arrived(self, caller: str, meta: TransferMeta, path: Path) -> None:
        self._from_server(caller, meta)
        if meta.kind == "checkpoint":
            self.store.arrived(meta)

"""What the scheduler serves to, and takes from, the workers of its job in bulk.

Out: the model's and the preprocessor's local directories, and checkpoints to restore from. In:
checkpoints and the trained model, from the parameter server alone. Files are hashed once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import trio

from hypha.config.job import JobConfig
from hypha.errors import ModelError, Refused
from hypha.messages import FileList, JobStamp, ListFiles, PullFile, TransferMeta
from hypha.net.bulk.transfers import meta_of
from hypha.node import Node
from hypha.runtime import free_bytes, in_thread
from hypha.scheduler.descriptions import MODEL, PREPROCESSOR
from hypha.scheduler.durable.checkpoints import CheckpointStore, safe_relative
from hypha.scheduler.durable.state_directory import StateDirectory


class ServedDirectory:
    """The regular files under ``path``, by relative name. :class:`ModelError` when there are none."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = kind
        self.path = path.resolve()
        hidden = (part for part in self.path.rglob("*") if part.is_file())
        self._files = {
            file.relative_to(self.path).as_posix(): file
            for file in sorted(hidden)
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
        """All files with their hashes."""
        return FileList(files=tuple([(await self.file(name))[1] for name in self._files]))


def served_directories(job: JobConfig) -> dict[str, ServedDirectory]:
    """What the configuration names by ``path``."""
    served = {}
    if job.model.path is not None:
        served[MODEL] = ServedDirectory(MODEL, job.model.path)
    if job.preprocessor is not None and job.preprocessor.path is not None:
        served[PREPROCESSOR] = ServedDirectory(PREPROCESSOR, job.preprocessor.path)
    return served


class Serving:
    """Wires all of it to ``node``. ``is_member`` knows who holds a lease, ``is_server`` whether a stamp
    is that of the parameter server's current generation.
    """

    def __init__(
        self,
        node: Node,
        directories: dict[str, ServedDirectory],
        job_id: str,
        store: CheckpointStore,
        state: StateDirectory,
        is_member: Callable[[str], bool],
        is_server: Callable[[str, JobStamp | None], bool],
    ) -> None:
        self._node = node
        self._directories = directories
        self._is_member = is_member
        self._is_server = is_server
        self._job_id = job_id
        self._store = store
        self._state = state

    def start(self) -> None:
        """Answer from now on."""
        job_id = self._job_id
        for kind in self._directories:
            self._node.transfers.serve(kind, self._directory_file)
        self._node.transfers.serve("checkpoint", self._checkpoint_file)
        self._node.answer(ListFiles, self._list_files)
        self._node.transfers.accept("checkpoint", job_id, self._checkpoint_gate, self._checkpoint_arrived)
        self._node.transfers.accept("export", job_id, self._export_gate, self._export_arrived)

    def _invited(self, caller: str, request: ListFiles | PullFile) -> None:
        if not self._is_member(caller):
            raise Refused("uninvited", "you hold no lease for this scheduler's job")
        if request.job_id not in (None, self._job_id):
            raise Refused("uninvited", f"that is for job {request.job_id}, which is not this scheduler's")

    async def _list_files(self, caller: str, request: ListFiles) -> FileList:
        self._invited(caller, request)
        kind, _, rest = request.kind.partition("/")
        name = request.name or rest
        if kind == "checkpoint" and name.isdecimal():
            return await in_thread(self._store.files, int(name))
        if kind not in self._directories or name:
            raise Refused("not-found", f"there is no resource {request.kind} {request.name}".rstrip())
        return await self._directories[kind].list()

    async def _directory_file(self, caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        self._invited(caller, request)
        directory = self._directories.get(request.kind)
        if directory is None:
            raise Refused("not-found", f"there is no resource {request.kind}")
        return await directory.file(request.name)

    async def _checkpoint_file(self, caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        self._invited(caller, request)
        return await in_thread(self._store.file, request.name)

    def _from_server(self, caller: str, meta: TransferMeta) -> None:
        if not self._is_server(caller, meta.stamp):
            raise Refused(
                "uninvited", "only the parameter server of this job's current generation may send that"
            )

    async def _checkpoint_gate(self, caller: str, meta: TransferMeta) -> Path:
        self._from_server(caller, meta)
        return await in_thread(self._store.place_for, meta)

    async def _checkpoint_arrived(self, caller: str, meta: TransferMeta, path: Path) -> None:
        self._from_server(caller, meta)
        self._store.arrived(meta)

    async def _export_gate(self, caller: str, meta: TransferMeta) -> Path:
        self._from_server(caller, meta)
        state = self._state
        generation = meta.stamp.generation if meta.stamp is not None else 0
        path = state.export_of(generation) / safe_relative(meta.name)
        needed, free = meta.size, free_bytes(state.path)
        if needed > free:
            raise Refused("no-space", f"{meta.name} has {needed} bytes; {free} are free in {state.path}")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    async def _export_arrived(self, caller: str, meta: TransferMeta, path: Path) -> None:
        self._from_server(caller, meta)

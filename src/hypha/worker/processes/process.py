"""Running one executor: its command, its environment, its output, its end.

Between worker and executor stands a keeper (:mod:`hypha.processes.keeper`) that makes sure that nothing of
the executor survives: not the executor's end, not a stop, not even ``kill -9`` of the worker. Secrets of a
job are in none of argv, environment, files and log: an executor asks for them over its bridge (``GET /job``).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import msgspec
import trio

from hypha.config.models import ExecutorConfig
from hypha.errors import ExecutorFailed
from hypha.messages import AggregateJob, ExecutorClass, HuggingFace, Job, Reference
from hypha.processes.keeper import become_subreaper, children, descendants
from hypha.telemetry.instruments import EXECUTOR_STARTS
from hypha.worker.jobs.directory import JobDirectory
from hypha.worker.limits.limits import thread_environment
from hypha.worker.processes.keepers import (
    KILLED_WITHIN_S,
    Keeper,
    Launch,
    each_line,
    start_keeper,
)
from hypha.worker.processes.warm import ExecutorHost

logger = logging.getLogger("hypha.worker.executor")

#: Hypha's own executors, for a configuration without ``cmd``.
OWN_EXECUTORS = {"train": "hypha.executor.training", "aggregate": "hypha.executor.parameter_server"}

#: Starts the training one on several devices.
LAUNCHER = "hypha.executor.launch"

#: An isolated executor that signal N ended has the exit code 128 + N.
SIGNALLED = 128
TAIL_LINES = 50
_LEVELS = {"WARNING": logging.WARNING, "ERROR": logging.ERROR}
#: A keeper whose host has ended takes so long to end when it has reported.
_ENDING_S = 0.1
#: The kernel takes 128 KiB for one argument.
MAX_JOB_JSON_BYTES = 100 * 1024


def references_of(job: Job) -> list[Reference]:
    """Every reference in ``job`` that its executor is going to fetch."""
    found = [job.model.source, job.preprocessor.source if job.preprocessor is not None else None]
    if isinstance(job, AggregateJob):
        found.append(job.restore)
    return [reference for reference in found if reference is not None]


def secrets_of(job: Job) -> tuple[str, ...]:
    """Every token in ``job``."""
    hubs = (reference for reference in references_of(job) if isinstance(reference, HuggingFace))
    return tuple(dict.fromkeys(hub.token for hub in hubs if hub.token))


def without_secrets(job: Job) -> Job:
    """``job`` with every token gone: what may be written down."""
    model = msgspec.structs.replace(job.model, source=_without_token(job.model.source))
    preprocessor = job.preprocessor
    if preprocessor is not None:
        source = _without_token(preprocessor.source) or preprocessor.source
        preprocessor = msgspec.structs.replace(preprocessor, source=source)
    if isinstance(job, AggregateJob):
        job = msgspec.structs.replace(job, restore=_without_token(job.restore))
    return msgspec.structs.replace(job, model=model, preprocessor=preprocessor)


def _without_token(reference: Reference | None) -> Reference | None:
    return msgspec.structs.replace(reference, token=None) if isinstance(reference, HuggingFace) else reference


@dataclass(frozen=True)
class Exit:
    """How an executor ended: its exit code (negative: the signal that killed it), its last lines, and
    whether that was because it was stopped.
    """

    code: int
    tail: str
    stopped: bool


def prepare_launch(
    config: ExecutorConfig, job: Job, directory: JobDirectory, environment: Mapping[str, str]
) -> Launch:
    """Fill in the placeholders and write ``job.json``. ``environment`` is the base and the limits'.

    Raises :class:`ExecutorFailed` when ``{JOB_JSON}`` would not fit into an argument.
    """
    text = msgspec.json.encode(without_secrets(job)).decode()
    job_file = directory.path / "job.json"
    job_file.write_text(text)
    job_file.chmod(0o600)
    values = {
        "{SOCKET_PATH}": str(directory.socket_path),
        "{WORK_DIR}": str(directory.path),
        "{JOB_JSON}": text,
        "{JOB_FILE}": str(job_file),
    }
    own = ""
    if config.accelerate is not None:
        # it has a process for each device: nothing that a host could fork
        command = [
            *(sys.executable, "-m", LAUNCHER, str(config.accelerate.absolute())),
            *(config.args or ["{SOCKET_PATH}"]),
        ]
    elif config.cmd is None:
        own = OWN_EXECUTORS[config.kind]
        command = [sys.executable, "-m", own, *(config.args or ["{SOCKET_PATH}"])]
    else:
        command = [config.cmd, *config.args]
    if any("{JOB_JSON}" in part for part in command) and len(text.encode()) > MAX_JOB_JSON_BYTES:
        raise ExecutorFailed(
            f"the job's description has {len(text.encode())} bytes, too many for an argument; "
            f"use {{JOB_FILE}} instead of {{JOB_JSON}} in the args of executor {config.name!r}"
        )
    return Launch(
        job_id=job.job_id,
        argv=tuple(_substitute(part, values) for part in command),
        environment={
            **environment,
            **({} if config.threads is None else thread_environment(config.threads)),
            **{name: _substitute(value, values) for name, value in config.env.items()},
            "SOCKET_PATH": values["{SOCKET_PATH}"],
            "WORK_DIR": values["{WORK_DIR}"],
        },
        work_dir=directory.path,
        secrets=secrets_of(job),
        own=own,
        torch_only=job.model.task == "torch" and job.preprocessor is None,
        kind=config.kind,
    )


def _substitute(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(name, value)
    return text


class Supervision:
    """What executors have in common while they run: ``host`` forks them where that can be, and with
    ``adopting`` what is left of one whose keeper was killed is adopted by this process, found, and ended.

    An executor runs as the worker's user, so it can kill its keeper, and children of it that have left its
    session would run on as nobody's. As the worker is a child subreaper (prctl(2)), the kernel makes them the
    worker's children. Whatever the worker starts itself shares its session, or is a keeper or host that runs
    now: any other child is one of these. Raises OSError.
    """

    def __init__(self, host: ExecutorHost | None = None, adopting: bool = False) -> None:
        self.host = host
        #: process groups of executors, which are those of their keepers
        self.running: dict[int, ExecutorClass] = {}
        #: held while a keeper or a host is started and not known yet: it is never taken for an orphan
        self.starting = trio.Lock()
        self._adopting = adopting
        if adopting:
            become_subreaper()

    async def end_orphans(self) -> None:
        """Kill those that there are, with all below them, and wait until they are gone."""
        if not self._adopting:
            return
        async with self.starting:
            ended: set[int] = set()
            if self._orphans():
                # a keeper whose host has ended is our child, too, and about to end when it reports that
                await trio.sleep(_ENDING_S)
            with trio.move_on_after(KILLED_WITHIN_S):
                while found := self._orphans():
                    ended.update(found)
                    for pid in (*found, *(below for one in found for below in descendants(one))):
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    await trio.sleep(0.01)
        if ended:
            logger.warning(
                "An executor's keeper was killed; processes %s, which it left behind, were ended.",
                ", ".join(map(str, sorted(ended))),
            )

    def _orphans(self) -> list[int]:
        """Without those that have ended, which are reaped."""
        known, session = {*self.running, self.host.pid if self.host else None}, os.getsid(0)
        found = []
        for pid in children(os.getpid()):
            with suppress(ProcessLookupError, ChildProcessError):
                if pid in known or os.getsid(pid) == session:
                    continue
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    found.append(pid)
        return found


async def run_executor(
    launch: Launch,
    stop: trio.Event,
    grace_s: float,
    *,
    kill: trio.Event | None = None,
    supervision: Supervision | None = None,
) -> Exit:
    """Run it until it ends.

    Once ``stop`` is set its group gets SIGTERM, and all that is left after ``grace_s`` SIGKILL. When ``kill``
    is set, or this is cancelled, it is killed at once, and gone when this returns.
    """
    began = trio.current_time()
    supervision = supervision or Supervision()
    host, running = supervision.host, supervision.running
    keeper: Keeper | None = await host.fork(launch) if host is not None else None
    way = "cold" if keeper is None else "warm"
    if keeper is None:
        async with supervision.starting:
            keeper = await start_keeper(launch)
            running[keeper.pid] = launch.kind
    EXECUTOR_STARTS.add(kind=launch.kind, way=way)
    logger.debug(
        "The executor was %s within %.3f s; its keeper is process %d.",
        "forked by the executor host" if way == "warm" else "started",
        trio.current_time() - began,
        keeper.pid,
        extra={"job_id": launch.job_id, "pid": keeper.pid, "way": way},
    )
    running[keeper.pid] = launch.kind
    if launch.on_start is not None:
        launch.on_start(keeper.pid)
    try:
        return await _attend(keeper, launch, stop, grace_s, kill)
    finally:
        running.pop(keeper.pid, None)
        with trio.CancelScope(shield=True):
            await supervision.end_orphans()


async def _attend(
    keeper: Keeper, launch: Launch, stop: trio.Event, grace_s: float, kill: trio.Event | None
) -> Exit:
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    drained = trio.Event()
    stopped = False

    async def stop_when_set() -> None:
        nonlocal stopped
        await stop.wait()
        stopped = True
        keeper.signal_group(signal.SIGTERM)
        await trio.sleep(grace_s)
        await keeper.end()

    async def kill_when_set(asked: trio.Event) -> None:
        await asked.wait()
        await keeper.end()

    def say(text: str) -> None:
        for secret in launch.secrets:
            text = text.replace(secret, "***")
        tail.append(text)
        # our own executors begin a line with its level; what goes wrong there is the operator's business
        logger.log(_LEVELS.get(text.partition(" ")[0], logging.DEBUG), "%s", text)

    async def read() -> None:
        await each_line(keeper.output, say)
        drained.set()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop_when_set)
            if kill is not None:
                nursery.start_soon(kill_when_set, kill)
            nursery.start_soon(read)
            await keeper.wait()
            # Everybody who had the pipe is dead, so this only empties it.
            with trio.move_on_after(KILLED_WITHIN_S):
                await drained.wait()
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await keeper.end()
            await keeper.aclose()
    code = -signal.SIGKILL if keeper.code is None else keeper.code
    if launch.isolated and code > SIGNALLED:
        code = SIGNALLED - code
    return Exit(code=code, tail="\n".join(tail), stopped=stopped)

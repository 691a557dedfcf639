"""Executors that start in milliseconds: forked by an executor host (:mod:`hypha.executor.host`), a process
that has imported what they need.

A worker has a host of its own, started in the background and again when it ends, or shares one with other
nodes of its machine (``warm_host``). A dispatch waits for a host that is still importing: it has begun
before, and does what an executor started now would do, in the same order. Where a host is not to be had, or
would not make the same executor, :meth:`ExecutorHost.fork` gives None: it is started as any other program.

A host's end disturbs no running executor: its keeper has its lifeline at the worker, and reports to the
worker itself how it ended.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import trio

from hypha.backoff import NO_JITTER, Backoff
from hypha.config.environment import inherited_state
from hypha.config.models import WorkerConfig
from hypha.decoding import decode
from hypha.errors import HyphaError, Undecodable
from hypha.messages import Forked, ForkReply, ForkRequest, KeeperEnded, NotForked, encode
from hypha.naming import cleaned
from hypha.worker.processes.keepers import KEEPER, KILLED_WITHIN_S, Keeper, Launch, each_line

logger = logging.getLogger("hypha.worker.executor")

#: How long a host may take to answer: while it may still be importing, and later.
IMPORTS_WITHIN_S, FORKS_WITHIN_S = 30.0, 5.0
#: Between the end of a host and the next one; doubled each time, but for one that was ready meanwhile.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
#: See :mod:`hypha.executor.host`.
UNUSABLE = 3
_MAX_REPLY_BYTES = 4096
#: Characters of a line that is repeated in the log.
_MAX_LINE = 300
_reply: msgspec.msgpack.Decoder[ForkReply] = msgspec.msgpack.Decoder(ForkReply)


class HostUnusable(HyphaError):
    """An executor host does not answer, or cannot be reached."""


class ForkedKeeper(Keeper):
    """A keeper that a host has forked, or is to; ``reports`` is its connection."""

    def __init__(self, reports: trio.socket.SocketType, lifeline: int, output: int) -> None:
        super().__init__(trio.lowlevel.FdStream(lifeline), trio.lowlevel.FdStream(output))
        self._reports = reports
        self._reading = trio.Lock()
        self._ended = False

    async def refused(self) -> str:
        """Why the host would not make the same executor; empty, once it runs. Raises :class:`HostUnusable`
        when the host has ended.
        """
        match await self._receive():
            case Forked(pid=pid):
                self.pid = pid
                return ""
            case NotForked(reason=reason):
                self._ended = True
                return reason
            case _:
                raise HostUnusable("the host ended while it was asked")

    async def wait(self) -> None:
        async with self._reading:
            while not self._ended:
                match await self._receive():
                    case Forked(pid=pid):
                        self.pid = pid
                    case KeeperEnded(status=status):
                        self.code = os.waitstatus_to_exitcode(status)
                    case None:
                        self._ended = True
                        # as it does not report how its executor ended, it was killed
                        self.code = -signal.SIGKILL if self.code is None else self.code

    async def abandon(self, asked: bool) -> None:
        """Nobody wants it any more; once this returns it is gone. If it was asked for and the host does not
        look, it will not be forked, as the host sees that nobody waits for it.
        """
        await self._lifeline.aclose()
        if asked:
            with trio.move_on_after(KILLED_WITHIN_S):
                await self.wait()
            self.signal_group(signal.SIGKILL)
        await self.aclose()

    async def _receive(self) -> ForkReply | None:
        try:
            data = await self._reports.recv(_MAX_REPLY_BYTES)
        except OSError:
            data = b""
        try:
            return decode(_reply.decode, data) if data else None
        except Undecodable as exc:
            logger.error("A reply of the executor host cannot be read: %s", exc)
            return None

    async def aclose(self) -> None:
        await super().aclose()
        self._reports.close()


class ExecutorHost(ABC):
    """Forks executors."""

    def __init__(self) -> None:
        #: for which it may be silent
        self.patience_s = IMPORTS_WITHIN_S
        #: logged already that executors are started without it
        self._warned = False

    @property
    def pid(self) -> int | None:
        """Of a host that is this process's child, while it runs."""
        return None

    async def fork(self, launch: Launch) -> ForkedKeeper | None:
        """A running keeper; None: start it without a host. Cancelled, nothing is left of it."""
        if not launch.own:
            return None
        try:
            keeper = await self._ask(launch)
        except (HostUnusable, OSError) as exc:
            level = logging.DEBUG if self._warned else logging.WARNING
            logger.log(level, "Executors are started without their host: %s.", exc)
            self._warned = True
            return None
        self._warned = False
        return keeper

    async def _ask(self, launch: Launch) -> ForkedKeeper | None:
        request = ForkRequest(
            module=launch.own,
            # beyond ``python -m module``
            arguments=launch.argv[3:],
            directory=str(launch.work_dir),
            environment=dict(launch.environment),
            keeper_options=tuple(launch.keeper_options),
            torch_only=launch.torch_only,
            python=sys.executable,
            package=str(KEEPER),
            inherited=inherited_state(),
        )
        with self._control() as control, _channels() as (keeper, theirs):
            asked = False
            try:
                with trio.move_on_after(self.patience_s):
                    rights = struct.pack(f"{len(theirs)}i", *theirs)
                    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
                    await trio.lowlevel.wait_writable(control)
                    control.sendmsg([encode(request)], ancillary)
                    asked = True
                    # ours of these must be gone, or their ends would not be seen
                    for descriptor in theirs:
                        os.close(descriptor)
                    theirs.clear()
                    if not (why := await keeper.refused()):
                        return keeper
                    logger.debug("The executor is not forked, but started: %s.", why)
                    await keeper.abandon(asked)
                    return None
                self._silent()
                raise HostUnusable(f"it has not answered for {self.patience_s:g} s")
            except BaseException:
                with trio.CancelScope(shield=True):
                    await keeper.abandon(asked)
                raise

    @abstractmethod
    def _control(self) -> AbstractContextManager[socket.socket]:
        """A connection for one request. Raises OSError and :class:`HostUnusable`."""

    @abstractmethod
    def _silent(self) -> None:
        """It did not answer."""


@contextmanager
def _channels() -> Iterator[tuple[ForkedKeeper, list[int]]]:
    """A keeper that is yet to be forked, and the descriptors it gets: connection, lifeline, output."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lifeline, held = os.pipe()
    read, output = os.pipe()
    descriptors = [theirs.detach(), lifeline, output]
    try:
        yield ForkedKeeper(trio.socket.from_stdlib_socket(mine), held, read), descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


class SharedHost(ExecutorHost):
    """One that somebody else has started, listening at ``path``."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._silent_until = -float("inf")

    @contextmanager
    def _control(self) -> Iterator[socket.socket]:
        if trio.current_time() < self._silent_until:
            raise HostUnusable(f"{self._path} does not answer")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
            control.setblocking(False)
            try:
                control.connect(str(self._path))
            except OSError as exc:
                raise HostUnusable(f"{self._path}: {exc.strerror}") from exc
            credentials = control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            if struct.unpack("3i", credentials)[1] != os.getuid():
                raise HostUnusable(f"{self._path} belongs to another user")
            yield control

    def _silent(self) -> None:
        self._silent_until = trio.current_time() + LONGEST_PAUSE_S


class OwnHost(ExecutorHost):
    """A worker's own, with ``environment``: :meth:`run` starts it, and again when it has ended."""

    def __init__(self, environment: Mapping[str, str], starting: trio.Lock | None = None) -> None:
        super().__init__()
        #: held until :attr:`pid` is that of the process
        self._starting = starting or trio.Lock()
        self._environment = dict(environment)
        self._connection: socket.socket | None = None
        self._process: trio.Process | None = None
        self._ready = False
        #: of what it has written that is no entry of a log, as a traceback ends with
        self._last_line = ""

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @contextmanager
    def _control(self) -> Iterator[socket.socket]:
        if self._connection is None:
            raise HostUnusable("it has ended")
        # a descriptor of its own: the host may end, and be started again, while this one is waited for
        with self._connection.dup() as control:
            yield control

    def _silent(self) -> None:
        if self._process is not None:
            self._process.kill()

    async def run(self) -> None:
        """Until cancelled; no host is left then. Returns when it can never be used here."""
        backoff = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S, jitter=NO_JITTER)
        while True:
            try:
                code = await self._run_once()
            except OSError as exc:
                logger.warning("The executor host cannot be started: %s.", exc)
                pause_s = backoff.next_s()
            else:
                if code == UNUSABLE:
                    return
                if self._ready:
                    backoff.reset()
                pause_s = backoff.next_s()
                logger.warning(
                    "The executor host ended with exit code %d; it is started again in %g s.%s",
                    code,
                    pause_s,
                    f" Its last line: {self._last_line}" if self._last_line else "",
                )
            self._ready, self.patience_s = False, IMPORTS_WITHIN_S
            await trio.sleep(pause_s)

    async def _run_once(self) -> int:
        self._last_line = ""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.setblocking(False)
            async with self._starting:
                process = await trio.lowlevel.open_process(
                    # without its directory on the path: a fork has its own
                    [sys.executable, "-P", "-m", "hypha.executor.host"],
                    stdin=theirs.fileno(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    # Ctrl-C is the worker's
                    start_new_session=True,
                )
                self._process, self._connection = process, ours
            theirs.close()
            try:
                assert process.stdout is not None
                await each_line(process.stdout, self._say)
                return await process.wait()
            finally:
                self._connection = self._process = None
                with trio.CancelScope(shield=True):
                    process.kill()
                    with trio.move_on_after(KILLED_WITHIN_S):
                        await process.wait()
                    if process.stdout is not None:
                        await process.stdout.aclose()

    def _say(self, line: str) -> None:
        try:
            entry = decode(json.loads, line)
            level, message = logging.getLevelNamesMapping()[entry["level"]], str(entry["message"])
        except (Undecodable, KeyError, TypeError):
            logger.debug("The executor host printed: %s", line)
            self._last_line = cleaned(line, _MAX_LINE) or self._last_line
            return
        if entry.get("ready"):
            self._ready, self.patience_s = True, FORKS_WITHIN_S
        logger.log(level, "%s", message)


@asynccontextmanager
async def open_host(
    config: WorkerConfig, environment: Mapping[str, str], starting: trio.Lock | None = None
) -> AsyncIterator[ExecutorHost | None]:
    """The host that ``config`` names, if any. It is gone when the block ends, a shared one excepted.
    ``starting`` is held while one is started and not known yet.
    """
    forked = any(
        one.cmd is None and one.accelerate is None and one.runtime == "process" for one in config.executors
    )
    if not config.warm or sys.platform != "linux" or not forked:
        yield None
    elif config.warm_host is not None:
        yield SharedHost(config.warm_host)
    else:
        own = OwnHost(environment, starting)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(own.run)
            yield own
            nursery.cancel_scope.cancel()

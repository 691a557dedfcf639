"""The keeper between a worker and one executor: no process of the executor outlives it or the worker.

It is started by path (``python -I -S keeper.py ... -- command``), imports the standard library only, and is
up in some 20 ms; an executor host (:mod:`hypha.executor.host`) forks it and calls :func:`keep`. Its standard
input is a lifeline held by the worker: when that ends, by a request to stop or because the worker was killed,
every descendant is killed, those that left the process group too. The keeper ends as the executor did, with
the same exit code or by the same signal.

Why not just ``PR_SET_PDEATHSIG`` on the executor? That signal is sent when the *thread* that forked
ends, and the worker forks in short-lived threads; and it would not reach the executor's own children.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36

#: What shells say when a command cannot be executed, or does not exist.
CANNOT_EXECUTE, NOT_FOUND = 126, 127
#: Whose handlers a keeper replaces.
KEPT_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _prctl() -> Callable[[int, int], None]:
    if sys.platform != "linux":
        return lambda option, value: None
    library = ctypes.CDLL(None, use_errno=True)

    def call(option: int, value: int) -> None:
        if library.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option})")

    return call


def deny_inspection() -> None:
    """Processes of the same user, but not root's, can neither read this one's environment and memory in /proc
    nor trace it; nor does it leave a core file. Programs that it executes are as ever. Raises OSError.
    """
    _prctl()(PR_SET_DUMPABLE, 0)


def become_subreaper() -> None:
    """From now on, processes below this one whose parent ends are this one's children. Raises OSError."""
    _prctl()(PR_SET_CHILD_SUBREAPER, 1)


def _by_parent() -> dict[int, list[int]]:
    """PIDs of children, from /proc; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # the command name may hold spaces and brackets, so count from the last bracket
            parent = int(file.read().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(name))
    return children


def children(root: int) -> list[int]:
    return _by_parent().get(root, [])


def descendants(root: int) -> list[int]:
    children = _by_parent()
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _reap(child: int, status: int | None) -> tuple[int | None, bool]:
    """Collect whatever has ended; the child's status once it has, and whether anybody is left."""
    while True:
        try:
            pid, ended = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status, False
        if pid == 0:
            return status, True
        if pid == child:
            status = ended


def _kill_all(child: int, status: int | None) -> int:
    """Kill every descendant until none is left; the child's wait status. As a subreaper this process
    inherits orphans, so "no children" means "no descendants".
    """
    while True:
        status, alive = _reap(child, status)
        if not alive:
            return status if status is not None else signal.SIGKILL
        for pid in descendants(os.getpid()) or ([child] if status is None else []):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def end_like(status: int) -> NoReturn:
    """Leave with the exit code, or by the signal, of ``status``."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # SIGKILL has no handler to reset
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


class Confinement:
    """What is applied to an executor before it runs: ``--cgroup FILE`` (its PID is written there),
    ``--rlimit NAME=VALUE``, ``--cores 0,1`` (it runs on no others) and ``--ignore SIGNAL``, in any number. No
    dataclass: that import would double the keeper's start.
    """

    def __init__(self, options: Sequence[str]) -> None:
        self.groups: list[str] = []
        self.limits: list[tuple[int, int]] = []
        self.ignored: list[signal.Signals] = []
        self.cores: set[int] = set()
        for option, value in zip(options[::2], options[1::2], strict=True):
            if option == "--cgroup":
                self.groups.append(value)
            elif option == "--ignore":
                self.ignored.append(signal.Signals[value])
            elif option == "--cores":
                self.cores.update(map(int, value.split(",")))
            else:
                name, _, amount = value.partition("=")
                self.limits.append((int(getattr(resource, name)), int(amount)))

    def apply(self) -> None:
        """To this process."""
        for group in self.groups:
            with open(group, "w") as file:
                file.write(str(os.getpid()))
        for name, amount in self.limits:
            hard = resource.getrlimit(name)[1]
            amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
            resource.setrlimit(name, (amount, amount))
        if self.cores and sys.platform == "linux":
            os.sched_setaffinity(0, self.cores)
        for number in self.ignored:
            signal.signal(number, signal.SIG_IGN)


def keep(confinement: Confinement, start: Callable[[Callable[[], None]], int]) -> int:
    """Keep the child that ``start`` starts, which calls what it is given before anything else and returns
    the child's PID; the child's wait status, once it and every other descendant is gone.

    The calling process has one thread, and its standard input is the lifeline. Its handlers of SIGCHLD,
    SIGTERM, SIGINT and SIGHUP are replaced; the child, where it is only forked, must reset them.
    """
    prctl = _prctl()
    become_subreaper()
    keeper = os.getpid()

    def prepare() -> None:
        # In the forked child; the keeper has one thread, so this is safe.
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:  # the keeper died before the line above
            os._exit(CANNOT_EXECUTE)
        confinement.apply()

    def ignore(number: int, frame: FrameType | None) -> None:
        """A handler, not SIG_IGN: that one would be inherited by the executor."""

    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in KEPT_SIGNALS:
        signal.signal(number, ignore)
    child = start(prepare)
    status: int | None = None
    while status is None:
        ready, _, _ = select.select([0, readable], [], [])
        if readable in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(readable, 4096)
        status, _ = _reap(child, status)
        if 0 in ready and not os.read(0, 4096):
            break
    return _kill_all(child, status)


def main(arguments: list[str]) -> NoReturn:
    """Run ``[options] -- command``; does not return."""
    split = arguments.index("--")
    command = arguments[split + 1 :]
    #: held on to: an object that is dropped would wait for its process itself
    started: list[subprocess.Popen[bytes]] = []

    def start(prepare: Callable[[], None]) -> int:
        try:
            started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=prepare))
            return started[0].pid
        except (OSError, subprocess.SubprocessError) as exc:
            print(f"cannot start {command[0]}: {exc}", file=sys.stderr, flush=True)
            os._exit(NOT_FOUND if isinstance(exc, FileNotFoundError) else CANNOT_EXECUTE)

    end_like(keep(Confinement(arguments[:split]), start))


if __name__ == "__main__":
    main(sys.argv[1:])

"""The keeper between a worker and one executor: no process of the executor outlives it or the worker.

It is started by path (``python -I -S launch.py ... -- command``), imports the standard library only, and
is up in some 20 ms. Its standard input is a lifeline held by the worker: when that ends, by a request to
stop or because the worker was killed, every descendant is killed, those that left the process group too.
The keeper ends as the executor did, with the same exit code or by the same signal.

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
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

#: What shells say when a command cannot be executed, or does not exist.
CANNOT_EXECUTE, NOT_FOUND = 126, 127


def _prctl() -> Callable[[int, int], None]:
    if sys.platform != "linux":
        return lambda option, value: None
    library = ctypes.CDLL(None, use_errno=True)

    def call(option: int, value: int) -> None:
        if library.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option})")

    return call


def _descendants(root: int) -> list[int]:
    """PIDs below ``root``, from /proc; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # the command name may hold spaces and brackets, so count from the last bracket
            parent = int(file.read().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(name))
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
        for pid in _descendants(os.getpid()) or ([child] if status is None else []):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _end_like(status: int) -> NoReturn:
    """Leave with the exit code, or by the signal, of ``status``."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # SIGKILL has no handler to reset
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _options(arguments: list[str]) -> tuple[list[str], list[tuple[int, int]], list[str]]:
    """``--cgroup FILE`` and ``--rlimit NAME=VALUE`` in any number, then ``--`` and the command."""
    split = arguments.index("--")
    groups, limits = [], []
    for option, value in zip(arguments[:split:2], arguments[1:split:2], strict=True):
        if option == "--cgroup":
            groups.append(value)
        else:
            name, _, amount = value.partition("=")
            limits.append((int(getattr(resource, name)), int(amount)))
    return groups, limits, arguments[split + 1 :]


def main(arguments: list[str]) -> NoReturn:
    """Run the command; does not return."""
    groups, limits, command = _options(arguments)
    prctl = _prctl()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    keeper = os.getpid()

    def prepare() -> None:
        # In the forked child; the keeper has one thread, so this is safe.
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:  # the keeper died before the line above
            os._exit(CANNOT_EXECUTE)
        for group in groups:
            with open(group, "w") as file:
                file.write(str(os.getpid()))
        for name, amount in limits:
            hard = resource.getrlimit(name)[1]
            amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
            resource.setrlimit(name, (amount, amount))

    def ignore(number: int, frame: FrameType | None) -> None:
        """A handler, not SIG_IGN: that one would be inherited by the executor."""

    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, ignore)
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=prepare)
    except (OSError, subprocess.SubprocessError) as exc:
        print(f"cannot start {command[0]}: {exc}", file=sys.stderr, flush=True)
        os._exit(NOT_FOUND if isinstance(exc, FileNotFoundError) else CANNOT_EXECUTE)

    status: int | None = None
    while status is None:
        ready, _, _ = select.select([0, readable], [], [])
        if readable in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(readable, 4096)
        status, _ = _reap(process.pid, status)
        if 0 in ready and not os.read(0, 4096):
            break
    _end_like(_kill_all(process.pid, status))


if __name__ == "__main__":
    main(sys.argv[1:])

"""What becomes of a fork of an executor host: a keeper, and below it an executor like one that was started.

The keeper is :func:`hypha.processes.keeper.keep`, with a session and process group of its own. It says itself
how the executor ended, to the worker directly, so that an end is not lost with the host. The executor has
what a fresh process has: default signal handlers, no descriptors but 0, 1 and 2, the environment, directory,
arguments and thread counts that it was given, a random state of its own, its command line in ``/proc``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from hypha.config.environment import replace_environment
from hypha.messages import Forked, ForkRequest, KeeperEnded, encode
from hypha.processes import keeper
from hypha.processes.forking import close_all_but, run_main, set_command_line, start_afresh

_SET_BLAS_THREADS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)


def become_keeper(request: ForkRequest, reply: int, lifeline: int, output: int) -> NoReturn:
    """In a fresh fork, whose signals are blocked: keep the executor, say how it ended, and end."""
    try:
        os.setsid()
        for source, target in ((lifeline, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        close_all_but(reply)
        signal.set_wakeup_fd(-1)
        told = socket.socket(fileno=reply)
        command = [request.python, "-m", request.module, *request.arguments]
        replace_environment(request.environment)
        set_command_line([request.python, keeper.__file__, *request.keeper_options, "--", *command])
        with contextlib.suppress(OSError):  # a worker that has gone is seen by the lifeline
            told.send(encode(Forked(pid=os.getpid())))

        def start(prepare: Callable[[], None]) -> int:
            pid = os.fork()
            if pid == 0:
                _be_executor(request, prepare, command)
            # the keeper's handlers are in place, the executor sees to its own
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            return pid

        try:
            os.chdir(request.directory)
            status = keeper.keep(keeper.Confinement(request.keeper_options), start)
        except OSError as exc:
            _cannot_start(request, exc)
            status = keeper.CANNOT_EXECUTE << 8
        with contextlib.suppress(OSError):
            told.send(encode(KeeperEnded(status=status)))
        keeper.end_like(status)
    finally:
        # an exception: nothing of the host's own code may run on here
        traceback.print_exc()
        os._exit(keeper.CANNOT_EXECUTE)


def _cannot_start(request: ForkRequest, exc: Exception) -> None:
    print(f"cannot start {request.module}: {exc}", file=sys.stderr, flush=True)


def _be_executor(request: ForkRequest, prepare: Callable[[], None], command: Sequence[str]) -> NoReturn:
    """In a fork of the keeper, whose signals are blocked."""

    def main() -> object:
        try:
            prepare()
        except OSError as exc:
            _cannot_start(request, exc)
            return keeper.CANNOT_EXECUTE
        become_executor(request, command)
        return sys.modules[request.module].main(list(request.arguments))

    run_main(main)


def become_executor(request: ForkRequest, command: Sequence[str]) -> None:
    """Give this fork what a fresh process has."""
    start_afresh(command, request.module, request.arguments)
    np.random.seed()
    torch.manual_seed(int.from_bytes(os.urandom(7), "big"))
    set_threads(request.environment)


def set_threads(environment: Mapping[str, str]) -> None:
    """Those of torch and of numpy, whose libraries were loaded before ``environment`` was known."""
    if (count := environment.get("OMP_NUM_THREADS")) is not None:
        torch.set_num_threads(int(count))
    # the host's was loaded with one
    blas = environment.get("OPENBLAS_NUM_THREADS") or environment.get("OMP_NUM_THREADS")
    threads = int(blas) if blas else len(os.sched_getaffinity(0))
    if threads == 1:
        return
    for path in sorted(_loaded("openblas")):
        library = ctypes.CDLL(path)
        name = next((one for one in _SET_BLAS_THREADS if hasattr(library, one)), None)
        if name is not None:
            getattr(library, name)(ctypes.c_int(threads))


def _loaded(name: str) -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    return {path for path in paths if name in os.path.basename(path)}
